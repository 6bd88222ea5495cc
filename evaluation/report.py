"""From masks to what is written down: rows per case, summary, table; `metrics.csv` and `summary.json`."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import statistics
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import find_objects

from evaluation.protocols import RULES, Score, paper, strict

Row = dict[str, Any]
LabelMap = NDArray[Any] | torch.Tensor


def spread(values: Iterable[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (n − 1) and count of the values that are not NaN; None where there are too few."""
    known = [value for value in values if not math.isnan(value)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


class Report(ABC):
    """The scores of all cases of one evaluation. A case added twice counts once.

    Args:
        classes: names of the classes 1 … C, in order.
        title: what was evaluated, heading of the table.
        selection: how the model that is evaluated was chosen; part of the summary.
        published: a row to print beside the results, {"name": …, "dice": {class or "mean": per cent}, …}.
    """

    def __init__(
        self,
        classes: Sequence[str],
        title: str = "",
        selection: str = "",
        published: Mapping[str, Any] | None = None,
    ) -> None:
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"classes must be one or more different names, not {list(classes)}")
        self.classes = list(classes)
        self.title = title
        self.selection = selection
        self.published = published
        self.cases: dict[str, list[Row]] = {}

    def add(
        self, case: str, prediction: LabelMap, label: LabelMap, spacing_mm: Sequence[float] | None = None
    ) -> list[Row]:
        """Score one case, two maps of class indices of one shape; ValueError naming the case where they do not fit."""
        predicted = self._indices(case, "prediction", prediction)
        true = self._indices(case, "label", label)
        if predicted.shape != true.shape:
            raise ValueError(
                f"{case}: the prediction is {predicted.shape}, the label {true.shape}; shapes must be equal"
            )
        self.cases[case] = [{"case": case} | row for row in self._score(predicted, true, spacing_mm)]
        return self.cases[case]

    @property
    def rows(self) -> list[Row]:
        """All rows, cases in alphabetical order."""
        return [row for case in sorted(self.cases) for row in self.cases[case]]

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        return {
            "title": self.title,
            "selection": self.selection or "not stated",
            "cases": sorted(self.cases),
            "classes": self.classes,
            "protocols": self._protocols(),
            "published": self.published,
            "versions": _versions(),
        }

    def _heading(self) -> str:
        return f"{self.title or 'Evaluation'}, {len(self.cases)} cases, model selected by: {self.selection or 'not stated'}"

    @abstractmethod
    def table(self) -> str:
        """The summary for a terminal."""

    @abstractmethod
    def _score(self, predicted: NDArray[Any], true: NDArray[Any], spacing_mm: Sequence[float] | None) -> list[Row]: ...

    @abstractmethod
    def _protocols(self) -> dict[str, Any]: ...

    def write(self, directory: str | Path) -> None:
        """Write `metrics.csv`, an empty field standing for a value that is not defined, and `summary.json`."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        rows = self.rows
        with replacing(folder / "metrics.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["case"])
            writer.writeheader()
            writer.writerows({key: "" if _is_nan(value) else value for key, value in row.items()} for row in rows)
        with replacing(folder / "summary.json") as path:
            path.write_text(json.dumps(self.summary(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def _indices(self, case: str, name: str, values: LabelMap) -> NDArray[Any]:
        array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
        if not np.issubdtype(array.dtype, np.integer):
            indices = array.astype(np.uint8)
            if not np.array_equal(indices, array):
                raise ValueError(f"{case}: the {name} must hold class indices, whole numbers from 0 to 255")
            array = indices
        if array.size == 0 or array.min() < 0 or array.max() > len(self.classes):
            found = "nothing" if array.size == 0 else f"values from {array.min()} to {array.max()}"
            raise ValueError(f"{case}: the {name} holds {found}; with {len(self.classes)} named classes 0 to "
                             f"{len(self.classes)} are expected")  # fmt: skip
        return array


class VolumeScores(Report):
    """Volumes: every organ of every case under both protocols of `evaluation.protocols`."""

    def _score(self, predicted: NDArray[Any], true: NDArray[Any], spacing_mm: Sequence[float] | None) -> list[Row]:
        rows = []
        count = len(self.classes)
        boxes = zip(find_objects(predicted, count), find_objects(true, count), strict=True)
        for index, (organ, pair) in enumerate(zip(self.classes, boxes, strict=True), start=1):
            box = _union([found for found in pair if found is not None], true.ndim)
            masks = predicted[box] == index, true[box] == index
            for protocol, score in (("strict", strict(*masks, spacing_mm)), ("paper", paper(*masks))):
                rows.append({"organ": organ, "protocol": protocol} | score._asdict())
        return rows

    def mean_dice(self) -> float:
        """Strict Dice, mean over cases per organ, then over organs; NaN where no organ was scored."""
        mean = self._protocols()["strict"]["mean"]["dice"]["mean"]
        return math.nan if mean is None else mean

    def _protocols(self) -> dict[str, Any]:
        return {protocol: self._protocol(protocol) for protocol in RULES}

    def _protocol(self, protocol: str) -> dict[str, Any]:
        rows = [row for row in self.rows if row["protocol"] == protocol]
        units = {row["hd95_unit"] for row in rows}
        # Millimetres and voxels have no common mean: where some cases came without spacing, the others are averaged.
        unit = "mm" if "mm" in units else "voxels"
        organs = {}
        for organ in self.classes:
            own = [row for row in rows if row["organ"] == organ]
            organs[organ] = {
                "dice": spread(row["dice"] for row in own),
                "hd95": spread(row["hd95"] for row in own if row["hd95_unit"] == unit),
                "missed": sum(row["status"] == "missed" for row in own),
                "false_alarms": sum(row["status"] == "false alarm" for row in own),
                "absent": sum(row["status"] == "absent" for row in own),
            }
        return {
            "rules": RULES[protocol],
            "dice_unit": "fraction",
            "hd95_unit": unit,
            "cases_without_spacing": len({row["case"] for row in rows if row["hd95_unit"] != unit}),
            "mean": {
                "dice": self._mean_of_organs(organs, [row for row in rows if not math.isnan(row["dice"])], "dice"),
                "hd95": self._mean_of_organs(organs, [row for row in rows if row["hd95_unit"] == unit], "hd95"),
                "missed": sum(value["missed"] for value in organs.values()),
                "false_alarms": sum(value["false_alarms"] for value in organs.values()),
            },
            "organs": organs,
        }

    @staticmethod
    def _mean_of_organs(organs: dict[str, Any], rows: list[Row], key: str) -> dict[str, Any]:
        """The mean of the organs' means; its spread is that of the cases' means over their organs."""
        means = spread(_or_nan(value[key]["mean"]) for value in organs.values())
        cases: dict[str, list[float]] = {}
        for row in rows:
            cases.setdefault(row["case"], []).append(row[key])
        over_cases = spread(_or_nan(spread(values)["mean"]) for values in cases.values())
        return {
            "mean": means["mean"],
            "organs": means["n"],
            "sd_over_cases": over_cases["sd"],
            "cases": over_cases["n"],
        }

    def table(self) -> str:
        protocols = self._protocols()
        groups: list[tuple[str, list[str]]] = [("", ["organ"])]
        lines = [[organ] for organ in [*self.classes, "mean of organs"]]
        for name, result in protocols.items():
            groups.append((name, ["Dice %", "N", f"HD95 {result['hd95_unit']}", "N"]))
            for line, organ in zip(lines, self.classes, strict=False):
                dice, hd95 = result["organs"][organ]["dice"], result["organs"][organ]["hd95"]
                line += [plus_minus(dice["mean"], dice["sd"], 100), str(dice["n"])]
                line += [plus_minus(hd95["mean"], hd95["sd"]), str(hd95["n"])]
            dice, hd95 = result["mean"]["dice"], result["mean"]["hd95"]
            lines[-1] += [plus_minus(dice["mean"], dice["sd_over_cases"], 100), str(dice["cases"])]
            lines[-1] += [plus_minus(hd95["mean"], hd95["sd_over_cases"]), str(hd95["cases"])]
        groups.append(("labels", ["missed", "false alarms"]))
        for line, counts in zip(
            lines, [*protocols["strict"]["organs"].values(), protocols["strict"]["mean"]], strict=True
        ):
            line += [str(counts["missed"]), str(counts["false_alarms"])]
        if self.published:
            for key, unit in (("dice", "Dice %"), ("hd95", "HD95")):
                values = self.published.get(key, {})
                if values:
                    groups.append((f"published: {self.published.get('name', '?')}", [unit]))
                    for line, organ in zip(lines, [*self.classes, "mean"], strict=True):
                        line.append(f"{values[organ]:.2f}" if organ in values else "")
        notes = [f"{name}: {result['rules']}." for name, result in protocols.items()]
        without = protocols["strict"]["cases_without_spacing"]
        if without:
            notes.append(f"{without} cases came without voxel spacing and are not in the mean of HD95 in mm.")
        return "\n".join([self._heading(), grid(groups, lines, last_is_total=True), *notes])


def _union(boxes: Sequence[tuple[slice, ...]], ndim: int) -> tuple[slice, ...]:
    if not boxes:
        return (slice(0, 0),) * ndim
    return tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in zip(*boxes, strict=True))


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def plus_minus(mean: float | None, sd: float | None, factor: float = 1.0) -> str:
    """`mean ± sd` times `factor`, to two digits; `n/a` without a mean."""
    if mean is None:
        return "n/a"
    return f"{mean * factor:.2f}" if sd is None else f"{mean * factor:.2f} ± {sd * factor:.2f}"


def grid(
    groups: Sequence[tuple[str, Sequence[str]]], lines: Sequence[Sequence[str]], last_is_total: bool = False
) -> str:
    """A text table: two header lines (groups of columns, columns), then `lines`; the first column is flush left."""
    headers = [header for _, columns in groups for header in columns]
    widths = [max(len(row[i]) for row in [headers, *lines]) for i in range(len(headers))]
    spans, start = [], 0
    for name, columns in groups:
        span = sum(widths[start : start + len(columns)]) + 2 * (len(columns) - 1)
        widths[start + len(columns) - 1] += max(0, len(name) - span)
        spans.append(f"{name:<{max(span, len(name))}}")
        start += len(columns)
    body = [
        "  ".join(
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in [headers, *lines]
    ]
    rule = "-" * len(body[0])
    table = ["  ".join(spans).rstrip(), body[0], rule, *body[1:]]
    if last_is_total:
        table.insert(-1, rule)
    return "\n".join(table)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well: nobody sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "monai", "numpy", "scipy", "medpy", "monai-cmunext-vmunet"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
