"""The two kinds of evaluation: volumes class by class, and single images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import nan
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.metrics import Confusion, class_boxes, confusion, hd95, surface_dice
from evaluation.protocols import IMAGE_RULES, RULES, occurrence, paper, per_image, pooled, strict
from evaluation.report import Group, Row, Scores, plus_minus, spread

METRICS = {
    "iou": "IoU %",
    "dice": "Dice %",
    "sensitivity": "sensitivity %",
    "specificity": "specificity %",
    "precision": "precision %",
    "f1": "F1 %",
    "accuracy": "accuracy %",
}
COUNTS = ("missed", "false_alarms")


def cropped_masks(
    predicted: NDArray[Any], true: NDArray[Any], classes: int
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """For each class 1 … C the two masks, cut to the box that holds both; of size 0 where neither map has the class.

    Example:
        >>> maps = np.array([0, 1, 0, 0]), np.array([0, 1, 1, 0])
        >>> [(predicted.tolist(), true.tolist()) for predicted, true in cropped_masks(*maps, classes=2)]
        [([True, False], [True, True]), ([], [])]
    """
    for index, box in enumerate(class_boxes([predicted, true], classes), start=1):
        yield predicted[box] == index, true[box] == index


class VolumeScores(Scores):
    """Volumes: every class of every case under the strict and the published protocol of `evaluation.protocols`.

    Example:
        >>> scores = VolumeScores(["liver", "spleen"])
        >>> row, *_ = scores.add("case1.nii.gz", np.ones((2, 3, 4), int), np.ones((2, 3, 4), int))
        >>> row["class"], row["protocol"], row["dice"]
        ('liver', 'strict', 1.0)
        >>> scores.mean_dice()  # the spleen is in neither map: not scored
        1.0
    """

    def score(self, predicted: NDArray[Any], true: NDArray[Any], spacing_mm: Sequence[float] | None) -> list[Row]:
        rows: list[Row] = []
        for name, masks in zip(self.classes, cropped_masks(predicted, true, len(self.classes)), strict=True):
            by_strict = strict(*masks, spacing_mm)
            # In voxels the protocols agree on computed pairs, and surface distances take long.
            by_paper = by_strict if spacing_mm is None and by_strict.status == "computed" else paper(*masks)
            for protocol, score in (("strict", by_strict), ("paper", by_paper)):
                rows.append({"class": name, "protocol": protocol} | score._asdict())
        return rows

    def mean_dice(self) -> float:
        """Strict Dice, mean over cases for each class, then over classes; NaN where no class was scored."""
        mean = self.protocols()["strict"]["mean"]["dice"]["mean"]
        return nan if mean is None else mean

    def protocols(self) -> dict[str, Any]:
        return {name: self._protocol(name, rules) for name, rules in RULES.items()}

    def _protocol(self, name: str, rules: str) -> dict[str, Any]:
        rows = [row for row in self.rows() if row["protocol"] == name]
        # Millimetres and voxels have no common mean: cases without spacing are left out where others have one.
        unit = "mm" if any(row["hd95_unit"] == "mm" for row in rows) else "voxels"
        in_unit = [row for row in rows if row["hd95_unit"] == unit]
        without = len({row["case"] for row in rows}) - len({row["case"] for row in in_unit})
        classes = {}
        for name in self.classes:
            status = [row["status"] for row in rows if row["class"] == name]
            classes[name] = {
                "dice": spread(row["dice"] for row in rows if row["class"] == name),
                "hd95": spread(row["hd95"] for row in in_unit if row["class"] == name),
                "missed": status.count("missed"),
                "false_alarms": status.count("false alarm"),
                "absent": status.count("absent"),
            }
        note = f"; cases without voxel spacing, left out of the means of HD95: {without}" if without else ""
        return {
            "rules": rules + note,
            "dice_unit": "fraction",
            "hd95_unit": unit,
            "mean": {
                "dice": _mean_of_classes("dice", classes, rows),
                "hd95": _mean_of_classes("hd95", classes, in_unit),
                "missed": sum(value["missed"] for value in classes.values()),
                "false_alarms": sum(value["false_alarms"] for value in classes.values()),
            },
            "classes": classes,
        }

    def columns(self) -> list[Group]:
        groups: list[Group] = [("", [("class", [*self.classes, "", "mean of classes"])])]
        for name, result in self.protocols().items():
            classes, mean = list(result["classes"].values()), result["mean"]
            columns = []
            for key, header, factor in (("dice", "Dice %", 100), ("hd95", f"HD95 {result['hd95_unit']}", 1)):
                cells = [plus_minus(value[key]["mean"], value[key]["sd"], factor) for value in classes]
                total = plus_minus(mean[key]["mean"], mean[key]["sd_over_cases"], factor)
                columns.append((header, [*cells, "", total]))
                columns.append(("N", [*(str(value[key]["n"]) for value in classes), "", str(mean[key]["cases"])]))
            groups.append((name, columns))
            if name == "strict":
                counts = [(key, [*(str(value[key]) for value in classes), "", str(mean[key])]) for key in COUNTS]
                groups.append(("number of", [(key.replace("_", " "), cells) for key, cells in counts]))
        published = [
            (header, [f"{values[key]:.2f}" if key in values else "" for key in [*self.classes, "", "mean"]])
            for header, values in (("Dice %", self.published.get("dice")), ("HD95", self.published.get("hd95")))
            if values
        ]
        return [*groups, (self.published.get("name", "published"), published)] if published else groups


def _mean_of_classes(key: str, classes: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """The mean of the classes' means, and how the cases' means over their classes spread."""
    means = spread(value[key]["mean"] for value in classes.values())
    cases: dict[str, list[float]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row[key])
    over_cases = spread(spread(values)["mean"] for values in cases.values())
    return {"mean": means["mean"], "classes": means["n"], "sd_over_cases": over_cases["sd"], "cases": over_cases["n"]}


class ImageScores(Scores):
    """Single images: the two published ways to count pixels, and HD95 and surface Dice in pixels.

    Several classes are each scored against all others; their mean is given as well.

    Args:
        tolerance_px: of the surface Dice.

    Example:
        >>> scores = ImageScores(["lesion"])
        >>> row, *_ = scores.add("a.png", np.array([[1, 1, 0, 0]]), np.array([[1, 0, 0, 0]]))
        >>> row["status"], row["tp"], row["fp"]
        ('computed', 1, 1)
        >>> round(scores.mean("iou"), 3)
        0.5
    """

    def __init__(self, *args: Any, tolerance_px: float = 2.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tolerance_px = tolerance_px

    def score(self, predicted: NDArray[Any], true: NDArray[Any], spacing_mm: Sequence[float] | None) -> list[Row]:
        rows: list[Row] = []
        for index, name in enumerate(self.classes, start=1):
            masks = predicted == index, true == index
            counts, status = confusion(*masks), occurrence(*masks)
            surface = {
                "hd95_px": hd95(*masks) if status == "computed" else nan,
                "surface_dice": surface_dice(*masks, self.tolerance_px),
            }
            rows.append({"class": name, "status": status} | per_image(counts) | surface | counts._asdict())
        return rows

    def protocols(self) -> dict[str, Any]:
        rows = self.rows()
        results: dict[str, Any] = {name: {"rules": rules, "classes": {}} for name, rules in IMAGE_RULES.items()}
        results["surface"]["rules"] += f"; tolerance of the surface Dice: {self.tolerance_px:g} pixels"
        for name in self.classes:
            own = [row for row in rows if row["class"] == name]
            status = [row["status"] for row in own]
            counts = [Confusion(row["tp"], row["fp"], row["fn"], row["tn"]) for row in own]
            results["per image"]["classes"][name] = {key: spread(row[key] for row in own) for key in METRICS}
            # One number for the whole set: there is no spread to give.
            results["pooled"]["classes"][name] = {
                key: {"mean": value, "sd": None, "n": len(own)} for key, value in pooled(counts).items()
            }
            results["surface"]["classes"][name] = {
                "hd95_px": spread(row["hd95_px"] for row in own),
                "surface_dice": spread(row["surface_dice"] for row in own),
                "missed": status.count("missed"),
                "false_alarms": status.count("false alarm"),
                "absent": status.count("absent"),
            }
        for result in results.values():
            classes = list(result["classes"].values())
            keys = [key for key, value in classes[0].items() if isinstance(value, dict)]
            result["mean_of_classes"] = {key: spread(value[key]["mean"] for value in classes)["mean"] for key in keys}
        return results

    def mean(self, metric: str = "iou") -> float:
        """A per-image metric, mean over the images for each class, then over the classes; NaN without any image."""
        mean = self.protocols()["per image"]["mean_of_classes"][metric]
        return nan if mean is None else mean

    def columns(self) -> list[Group]:
        protocols = self.protocols()
        lines: list[tuple[str, ...]] = []
        for name in self.classes:
            each, whole, surface = (protocols[key]["classes"][name] for key in ("per image", "pooled", "surface"))
            scores = [(header, each[key], whole.get(key), 100) for key, header in METRICS.items()]
            scores.append(("HD95 px", surface["hd95_px"], None, 1))
            scores.append((f"surface Dice % at {self.tolerance_px:g} px", surface["surface_dice"], None, 100))
            if lines:
                lines.append(("",) * 4)
            prefix = f"{name}: " if len(self.classes) > 1 else ""
            for header, value, one, factor in scores:
                cells = plus_minus(value["mean"], value["sd"], factor), str(value["n"])
                lines.append((prefix + header, *cells, plus_minus(one["mean"], None, factor) if one else ""))
            for key in COUNTS:
                lines.append((prefix + key.replace("_", " "), str(surface[key]), str(each["iou"]["n"]), ""))
        labels, means, counts, pools = (list(column) for column in zip(*lines, strict=True))
        groups: list[Group] = [
            ("", [("metric", labels)]),
            ("per image", [("mean ± sd", means), ("N", counts)]),
            ("pooled", [("all pixels", pools)]),
        ]
        if self.published and len(self.classes) == 1:
            known = [f"{self.published[key]:.2f}" if key in self.published else "" for key in METRICS]
            groups.append((self.published.get("name", "published"), [("", known + [""] * (len(lines) - len(known)))]))
        return groups
