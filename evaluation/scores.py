"""From measured cases to rows and one summary, both frozen; what renders them is elsewhere.

There are two kinds of evaluation: volumes class by class, and single images.
"""

from __future__ import annotations

import math
import platform
import statistics
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaluation.cases import TOLERANCE, Case, LabelMap, Measuring, Postprocess, class_maps, measure
from evaluation.intervals import Mean, MeanOfClasses, mean_of_classes, spread
from evaluation.metrics import Engine
from evaluation.protocols import (
    IMAGE_RULES,
    PAPER_RULES,
    ImageScore,
    MissedDistance,
    Score,
    image_score,
    paper,
    pooled,
    strict,
    strict_rules,
)
from transforms import InputError, stem

FORMAT = 1
METRICS = {
    "iou": "IoU %",
    "dice": "Dice %",
    "sensitivity": "sensitivity %",
    "specificity": "specificity %",
    "precision": "precision %",
    "f1": "F1 %",
    "accuracy": "accuracy %",
}
STRICT_METRICS = ("dice", "iou", "precision", "recall", "surface_dice", "hd95", "assd", "prediction_ml", "label_ml",
                  "difference_ml")  # fmt: skip
PAPER_METRICS = ("dice", "hd95")
DISTANCES = ("hd95", "assd")


@dataclass(frozen=True)
class Row:
    """One class of one case, under one protocol."""

    case: str
    structure: str
    score: Score | ImageScore

    def cells(self) -> dict[str, str | int | float]:
        """A line of `metrics.csv`."""
        return {"case": self.case, "class": self.structure, **asdict(self.score), "format": FORMAT}


@dataclass(frozen=True)
class StructureResult:
    """One class under one protocol, over all cases."""

    metrics: Mapping[str, Mean]
    missed: int
    false_alarms: int
    absent: int


@dataclass(frozen=True)
class Protocol:
    """All classes under one set of rules."""

    rules: str
    distance_unit: str
    classes: Mapping[str, StructureResult]
    mean: Mapping[str, MeanOfClasses]


@dataclass(frozen=True)
class Published:
    """A published row to print beside the results: metric → class, "mean" or "sd" → value, in per cent or its unit.

    Example:
        >>> Published.of({"name": "paper", "iou": 71.56, "iou_sd": 2.43, "dice": {"liver": 94.0}}).values
        {'iou': {'mean': 71.56, 'sd': 2.43}, 'dice': {'liver': 94.0}}
    """

    name: str = "published"
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, row: Mapping[str, Any] | None) -> Published:
        """From what configurations say: {"name": …, metric: value or {class: value}, "METRIC_sd": value}."""
        values: dict[str, dict[str, float]] = {}
        for key, value in (row or {}).items():
            if isinstance(value, Mapping):
                values[key] = dict(value)
            elif key != "name":
                values.setdefault(key.removesuffix("_sd"), {})["sd" if key.endswith("_sd") else "mean"] = float(value)
        return cls(str((row or {}).get("name", "published")), values)


@dataclass(frozen=True)
class Summary:
    """What `summary.json` holds; docs/formats.md explains it."""

    kind: str
    title: str
    selection: str
    classes: tuple[str, ...]
    cases: int
    failures: Mapping[str, str]
    postprocess: Postprocess
    engine: Engine
    protocols: Mapping[str, Protocol]
    published: Published
    versions: Mapping[str, str]
    files: tuple[str, ...]
    labels: Mapping[str, str]
    weights: Mapping[str, str] = field(default_factory=dict)
    data: str = ""
    format: int = FORMAT


@dataclass(frozen=True)
class Results:
    """What an evaluation left in a folder."""

    folder: Path
    summary: Summary
    rows: tuple[Row, ...]


class Scores(ABC):
    """The scores of all cases of one evaluation. A case is known by its file; added twice, it counts once.

    Args:
        classes: names of the classes 1 … C.
        title: what was evaluated; heading of the table.
        selection: how the evaluated model was chosen; in the summary and in the table.
        published: a row to print beside the results, see `Published`.
        measuring: how cases are measured.

    Raises:
        InputError: when there is no class, two have one name, or there are not as many tolerances as classes.
    """

    kind: str

    def __init__(
        self,
        classes: Sequence[str],
        title: str = "",
        selection: str = "",
        published: Mapping[str, Any] | None = None,
        measuring: Measuring | None = None,
    ) -> None:
        if not classes or len(set(classes)) != len(classes):
            raise InputError(f"classes must be one or more different names, not {list(classes)}")
        self.classes = tuple(classes)
        self.title = title or "Evaluation"
        self.selection = selection or "not stated"
        self.published = Published.of(published)
        self.measuring = measuring or Measuring()
        if len(self.measuring.tolerances) not in (1, len(classes)):
            raise InputError(f"{len(self.measuring.tolerances)} tolerances for {len(classes)} classes")
        self.cases: dict[str, Case] = {}
        # whose predictions these are, and what the data say of themselves; see docs/formats.md
        self.weights: dict[str, str] = {}
        self.data = ""
        # of cases that could not be scored: file → what is wrong
        self.failures: dict[str, str] = {}

    def add(
        self, file: str, prediction: LabelMap, label: LabelMap, spacing_mm: Sequence[float] | None = None
    ) -> list[Row]:
        """Score one case, given two maps of class indices of one shape, and the voxel size per axis where it is known.

        Returns:
            The rows of the case.

        Raises:
            ValueError: when a map holds other values or the shapes differ; it names the file.
        """
        maps = class_maps(prediction, label, len(self.classes), file)
        self.cases[file] = measure(*maps, len(self.classes), spacing_mm, self.measuring)
        return self.score(stem(file), self.cases[file])

    @abstractmethod
    def score(self, name: str, case: Case) -> list[Row]:
        """The rows of one case."""

    @abstractmethod
    def protocols(self, rows: list[Row]) -> dict[str, Protocol]:
        """The results under each set of rules."""

    def names(self) -> dict[str, str]:
        """What each file's case is called: by the file's name, or by the whole path where names repeat."""
        names = {file: stem(file) for file in sorted(self.cases)}
        count = Counter(names.values())
        return {file: name if count[name] == 1 else file for file, name in names.items()}

    def rows(self) -> list[Row]:
        """All rows, in the order of the files."""
        return [row for file, name in self.names().items() for row in self.score(name, self.cases[file])]

    def summary(self) -> Summary:
        """All results. What needs several of them calls this once."""
        return Summary(
            self.kind,
            self.title,
            self.selection,
            self.classes,
            len(self.cases),
            dict(self.failures),
            self.measuring.postprocess,
            self.measuring.engine,
            self.protocols(self.rows()),
            self.published,
            _versions(),
            tuple(sorted(self.cases)),
            {name: self.cases[file].label_sha256 for file, name in self.names().items()},
            dict(self.weights),
            self.data,
        )

    def _tolerances(self) -> dict[str, float]:
        tolerances = self.measuring.tolerances
        names = self.classes if len(tolerances) > 1 else ("",)
        return dict(zip(names, tolerances, strict=True))


class VolumeScores(Scores):
    """Volumes: every class of every case under the strict and the published protocol of `evaluation.protocols`.

    Args:
        missed_distance: what HD95 and ASSD of a missed class are under the strict protocol: "undefined", or the
            "diagonal" of the image.

    Example:
        >>> scores = VolumeScores(["liver", "spleen"])
        >>> row, *_ = scores.add("case1.nii.gz", np.ones((2, 3, 4), int), np.ones((2, 3, 4), int))
        >>> row.structure, row.score.protocol, row.score.dice
        ('liver', 'strict', 1.0)
        >>> scores.summary().protocols["strict"].mean["dice"].mean  # the spleen is in neither map: not scored
        1.0
    """

    kind = "volumes"

    def __init__(self, *args: Any, missed_distance: MissedDistance = "undefined", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if missed_distance not in ("undefined", "diagonal"):
            raise InputError(f"missed_distance must be undefined or diagonal, not {missed_distance!r}")
        self.missed_distance: MissedDistance = missed_distance

    def score(self, name: str, case: Case) -> list[Row]:
        return [
            Row(name, structure, score)
            for structure, measured in zip(self.classes, case.structures, strict=True)
            for score in (strict(measured, case, self.missed_distance), paper(measured))
        ]

    def protocols(self, rows: list[Row]) -> dict[str, Protocol]:
        protocols = {}
        for name, rules, metrics in (
            ("strict", strict_rules(self.missed_distance, self._tolerances()), STRICT_METRICS),
            ("paper", PAPER_RULES, PAPER_METRICS),
        ):
            own = [row for row in rows if isinstance(row.score, Score) and row.score.protocol == name]
            units = {row.case: row.score.distance_unit for row in own if isinstance(row.score, Score)}
            # Millimetres and voxels have no common mean: cases without spacing are left out where others have one.
            unit = "mm" if "mm" in units.values() else "voxels"
            without = {case for case, found in units.items() if found != unit}
            if without:
                rules += f"; cases without voxel spacing, left out of the means of HD95 and ASSD: {len(without)}"
            values = {metric: _by_case(own, self.classes, metric) for metric in metrics}
            for metric in set(DISTANCES) & set(metrics):
                values[metric][[case in without for case in units]] = math.nan
            protocols[name] = _protocol(rules, unit, self.classes, values, own)
        return protocols


class ImageScores(Scores):
    """Single images: the published ways to count pixels, and HD95 and surface Dice in pixels.

    Several classes are each scored against all others; their mean is given as well.

    Example:
        >>> scores = ImageScores(["lesion"])
        >>> row, *_ = scores.add("a.png", np.array([[1, 1, 0, 0]]), np.array([[1, 0, 0, 0]]))
        >>> row.score.status, row.score.tp, row.score.fp
        ('computed', 1, 1)
        >>> round(scores.summary().protocols["per image"].mean["iou"].mean, 3)
        0.5
    """

    kind = "images"

    def score(self, name: str, case: Case) -> list[Row]:
        return [
            Row(name, structure, image_score(measured))
            for structure, measured in zip(self.classes, case.structures, strict=True)
        ]

    def protocols(self, rows: list[Row]) -> dict[str, Protocol]:
        metrics = {
            "per image": tuple(METRICS),
            "threshold": ("threshold_jaccard",),
            "surface": ("hd95_px", "surface_dice"),
        }
        found = {
            name: _protocol(
                IMAGE_RULES[name],
                "pixels",
                self.classes,
                {key: _by_case(rows, self.classes, key) for key in keys},
                rows,
            )
            for name, keys in metrics.items()
        }
        tolerances = ", ".join(f"{name} {size:g} pixels".strip() for name, size in self._tolerances().items())
        rules = f"{IMAGE_RULES['surface']}; tolerance of the surface Dice: {tolerances}"
        each = found["per image"]
        return {
            "per image": each,
            "pooled": self._pooled(each),
            "threshold": found["threshold"],
            "surface": replace(found["surface"], rules=rules),
        }

    def _pooled(self, each: Protocol) -> Protocol:
        """One number for the whole set: there is no spread to give."""
        classes = {}
        for index, (name, result) in enumerate(each.classes.items()):
            counts = [case.structures[index].counts for case in self.cases.values()]
            means = {key: Mean(value, None, len(counts)) for key, value in pooled(counts).items()}
            classes[name] = replace(result, metrics=means)
        keys = next(iter(classes.values())).metrics
        mean = {
            key: MeanOfClasses(
                statistics.fmean(known) if (known := _means(classes, key)) else None, len(known), None, len(self.cases)
            )
            for key in keys
        }
        return Protocol(IMAGE_RULES["pooled"], "pixels", classes, mean)


def tolerances_of(classes: Sequence[str], tolerance: float | Mapping[str, float] = TOLERANCE) -> tuple[float, ...]:
    """The tolerance of each class, from one number, or from numbers of some classes; 2 for the others.

    Raises:
        InputError: when a class has no such name.

    Example:
        >>> tolerances_of(["liver", "aorta"], {"aorta": 1}), tolerances_of(["liver", "aorta"], 3)
        ((2.0, 1.0), (3.0,))
    """
    if not isinstance(tolerance, Mapping):
        return (float(tolerance),)
    if unknown := sorted(set(tolerance) - set(classes)):
        raise InputError(f"a tolerance for {', '.join(unknown)}", remedy=f"the classes are {', '.join(classes)}")
    return tuple(float(tolerance.get(name, TOLERANCE)) for name in classes)


def _by_case(rows: Sequence[Row], classes: Sequence[str], metric: str) -> NDArray[np.float64]:
    """(cases, classes), in the order of the rows."""
    return np.array([getattr(row.score, metric) for row in rows], np.float64).reshape(-1, len(classes))


def _protocol(
    rules: str, unit: str, classes: Sequence[str], values: Mapping[str, NDArray[np.float64]], rows: Sequence[Row]
) -> Protocol:
    results = {}
    for index, name in enumerate(classes):
        status = [row.score.status for row in rows if row.structure == name]
        means = {metric: spread(table[:, index].tolist()) for metric, table in values.items()}
        results[name] = StructureResult(
            means, status.count("missed"), status.count("false alarm"), status.count("absent")
        )
    mean = {metric: mean_of_classes(table, _means(results, metric)) for metric, table in values.items()}
    return Protocol(rules, unit, results, mean)


def _means(classes: Mapping[str, StructureResult], metric: str) -> list[float]:
    """Of the classes that have one."""
    means = [result.metrics[metric].mean for result in classes.values()]
    return [mean for mean in means if mean is not None]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "monai", "numpy", "scipy", "medpy", "monai-cmunext-vmunet"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
