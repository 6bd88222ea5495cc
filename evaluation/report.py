"""From label maps to what is written down: rows for each case, `metrics.csv`, `summary.json` and a table.

`Scores` is what every kind of evaluation shares; `evaluation.scores` has the kinds.
"""

from __future__ import annotations

import csv
import json
import math
import platform
import statistics
import textwrap
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transforms import replacing, stem

Row = dict[str, Any]
LabelMap = NDArray[Any] | torch.Tensor

LINE_LENGTH = 120


class Scores(ABC):
    """The scores of all cases of one evaluation. A case is known by its file; added twice, it counts once.

    Args:
        classes: names of the classes 1 … C.
        title: what was evaluated; heading of the table.
        selection: how the evaluated model was chosen; in the summary and in the table.
        published: a row to print beside the results, in per cent and in the protocol's unit: {"name": …, "dice":
            {class or "mean": …}, "hd95": {…}} for volumes, {"name": …, metric: …} for images.

    Raises:
        ValueError: when there is no class, or two have one name.
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
        self.title = title or "Evaluation"
        self.selection = selection or "not stated"
        self.published = dict(published or {})
        self.cases: dict[str, list[Row]] = {}
        # of cases that could not be scored: file → what is wrong
        self.failures: dict[str, str] = {}

    def add(
        self, file: str, prediction: LabelMap, label: LabelMap, spacing_mm: Sequence[float] | None = None
    ) -> list[Row]:
        """Score one case, given two maps of class indices of one shape, and the voxel size per axis where it is known.

        Returns:
            The rows of the case, without its name.

        Raises:
            ValueError: when a map holds other values or the shapes differ; it names the file.
        """
        self.cases[file] = self.score(*class_maps(prediction, label, len(self.classes), file), spacing_mm)
        return self.cases[file]

    @abstractmethod
    def score(self, predicted: NDArray[Any], true: NDArray[Any], spacing_mm: Sequence[float] | None) -> list[Row]:
        """The rows of one case, without its name."""

    @abstractmethod
    def protocols(self) -> dict[str, Any]:
        """Name of each protocol → its rules, units and results."""

    @abstractmethod
    def columns(self) -> list[Group]:
        """The columns of the table, the first one with the names of its lines."""

    def rows(self) -> list[Row]:
        """All rows; a case is called by its file's name, or by the whole path where names repeat."""
        names = {file: stem(file) for file in sorted(self.cases)}
        count = Counter(names.values())
        return [
            {"case": name if count[name] == 1 else file} | row
            for file, name in names.items()
            for row in self.cases[file]
        ]

    def table(self) -> str:
        """The results for a terminal, with the protocols' rules below."""
        count = f"{len(self.cases)} case{'s' * (len(self.cases) != 1)}"
        if self.failures:
            count += f", {len(self.failures)} more could not be scored"
        heading = f"{self.title}: {count}; model selected by: {self.selection}"
        notes = [f"{name}: {result['rules']}." for name, result in self.protocols().items()]
        wrapped = [textwrap.fill(note, LINE_LENGTH, subsequent_indent="  ") for note in notes]
        return "\n".join(["", heading, "", grid(self.columns()), "", *wrapped])

    def summary(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        return {
            "title": self.title,
            "selection": self.selection,
            "classes": self.classes,
            "cases": len(self.cases),
            "failures": self.failures,
            "protocols": self.protocols(),
            "published": self.published,
            "versions": _versions(),
            "files": sorted(self.cases),
        }

    def write(self, directory: str | Path) -> None:
        """Write `metrics.csv`, where an empty field is a value that is not defined, and `summary.json`."""
        folder = Path(directory)
        rows = self.rows()
        with replacing(folder / "metrics.csv") as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["case"])
            writer.writeheader()
            writer.writerows({key: "" if value != value else value for key, value in row.items()} for row in rows)
        with replacing(folder / "summary.json") as path:
            path.write_text(json.dumps(self.summary(), indent=2, allow_nan=False) + "\n", encoding="utf-8")


def class_maps(
    prediction: LabelMap, label: LabelMap, classes: int, case: str = "the case"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both maps as integer arrays.

    Raises:
        ValueError: when a map holds anything but whole numbers 0 … `classes` or the shapes differ; it names the case.

    Example:
        >>> class_maps(torch.tensor([0.0, 1.0]), np.array([1, 2]), classes=2)
        (array([0, 1], dtype=uint8), array([1, 2]))
    """
    predicted = _class_indices(prediction, classes, f"{case}: the prediction")
    true = _class_indices(label, classes, f"{case}: the label")
    if predicted.shape != true.shape:
        raise ValueError(f"{case}: the prediction has shape {predicted.shape}, the label {true.shape}")
    return predicted, true


def _class_indices(values: LabelMap, classes: int, what: str) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    low, high = (array.min(), array.max()) if array.size else (math.nan, math.nan)
    if not 0 <= low <= high <= classes:
        found = f"{what} holds values from {low:g} to {high:g}"
        raise ValueError(f"{found}; with {classes} named classes, 0 to {classes} fit")
    if np.issubdtype(array.dtype, np.integer):
        return array
    indices = array.astype(np.uint8 if classes < 256 else np.int64)
    if not np.array_equal(indices, array):
        raise ValueError(f"{what} holds fractions, not class indices")
    return indices


def spread(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean, sample standard deviation (n − 1) and n of the values that are neither None nor NaN.

    The mean of no value and the deviation of fewer than two are None.

    Example:
        >>> spread([1.0, None, 3.0, math.nan])
        {'mean': 2.0, 'sd': 1.4142135623730951, 'n': 2}
    """
    known = [value for value in values if value is not None and not math.isnan(value)]
    return {
        "mean": statistics.fmean(known) if known else None,
        "sd": statistics.stdev(known) if len(known) > 1 else None,
        "n": len(known),
    }


def plus_minus(mean: float | None, sd: float | None = None, factor: float = 1.0) -> str:
    """`mean ± sd`, both times `factor`, with two decimals; `n/a` without a mean.

    Example:
        >>> plus_minus(0.8125, 0.05, factor=100)
        '81.25 ± 5.00'
    """
    if mean is None:
        return "n/a"
    return f"{mean * factor:.2f}" if sd is None else f"{mean * factor:.2f} ± {sd * factor:.2f}"


Group = tuple[str, list[tuple[str, list[str]]]]
"""Columns under one heading: the heading, and for each column its header and its cells."""


def grid(groups: Sequence[Group]) -> str:
    """A text table of groups of columns, the first group flush left. A line of empty cells becomes a rule.

    Example:
        >>> print(grid([("", [("class", ["liver", "aorta"])]), ("strict", [("Dice %", ["94.17", "87.03"])])]))
                strict
        class   Dice %
        --------------
        liver    94.17
        aorta    87.03
    """
    blocks: list[list[str]] = []
    for title, columns in groups:
        cells = [[header, *lines] for header, lines in columns]
        widths = [max(map(len, column)) for column in cells]
        padded = [
            "  ".join(cell.rjust(w) if blocks else cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            for row in zip(*cells, strict=True)
        ]
        width = max(len(title), len(padded[0]))
        blocks.append([title.ljust(width), *(line.rjust(width) if blocks else line.ljust(width) for line in padded)])
    lines = ["   ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    rule = "-" * max(map(len, lines))
    return "\n".join([*lines[:2], rule, *(line or rule for line in lines[2:])])


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", "monai", "numpy", "scipy", "medpy", "monai-cmunext-vmunet"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a package"
    return found
