"""What two label maps of one case are measured to be, class by class, before any rule is applied."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from evaluation.distances import Surface, borders, medpy_surface
from evaluation.metrics import (
    Confusion,
    Engine,
    Overlap,
    check_engine,
    confusions,
    cropped_masks,
    overlap,
    overlap_of_masks,
)
from transforms import InputError

LabelMap = NDArray[Any] | torch.Tensor
Status = Literal["computed", "missed", "false alarm", "absent"]
Postprocess = Literal["none", "largest"]

TOLERANCE = 2.0


@dataclass(frozen=True)
class Measuring:
    """How cases are measured.

    Args:
        tolerances: of the surface Dice, for each class; one for all. In mm and in voxels or pixels alike.
        engine: "fast", or "medpy" to let medpy compute.
        postprocess: "none", or "largest" to keep only the largest connected component of each predicted class.

    Raises:
        ValueError: when an option is none of these, or a tolerance is negative.

    Example:
        >>> Measuring(tolerances=(1.0, 3.0)).tolerance(2), Measuring().tolerance(2)
        (3.0, 2.0)
    """

    tolerances: tuple[float, ...] = (TOLERANCE,)
    engine: Engine = "fast"
    postprocess: Postprocess = "none"

    def __post_init__(self) -> None:
        check_engine(self.engine)
        if self.postprocess not in get_args(Postprocess):
            raise ValueError(f"postprocess must be one of {', '.join(get_args(Postprocess))}, not {self.postprocess!r}")
        if not self.tolerances or not all(0 <= tolerance < math.inf for tolerance in self.tolerances):
            raise ValueError(f"tolerances must be numbers from 0 up, not {self.tolerances}")

    def tolerance(self, index: int) -> float:
        """Of the class `index`, 1 … C."""
        return self.tolerances[index - 1 if len(self.tolerances) > 1 else 0]


@dataclass(frozen=True)
class Structure:
    """One class of one case. `voxels` and `mm` are None unless both masks have voxels, and the spacing is known."""

    counts: Confusion
    overlap: Overlap
    voxels: Surface | None = None
    mm: Surface | None = None

    @property
    def status(self) -> Status:
        """Which of the two masks have voxels."""
        tp, fp, fn, _ = self.counts
        if tp + fn:
            return "computed" if tp + fp else "missed"
        return "false alarm" if fp else "absent"


@dataclass(frozen=True)
class Case:
    """All classes of one case. The hash is that of the label's class indices, in C order, behind its shape."""

    shape: tuple[int, ...]
    spacing_mm: tuple[float, ...] | None
    structures: tuple[Structure, ...]
    label_sha256: str

    @property
    def diagonal(self) -> float:
        """Of the whole image, in mm where the spacing is known, else in voxels."""
        return math.dist((0,) * len(self.shape), np.multiply(self.shape, self.spacing_mm or 1))

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel; NaN where the spacing is not known."""
        return math.nan if self.spacing_mm is None else math.prod(self.spacing_mm) / 1000

    def with_classes(self, classes: int) -> Case:
        """The same case with more classes, which are in neither map."""
        counts = Confusion(0, 0, 0, math.prod(self.shape))
        added = (Structure(counts, overlap(counts)),) * (classes - len(self.structures))
        return replace(self, structures=self.structures + added)


def measure(
    predicted: NDArray[Any],
    true: NDArray[Any],
    classes: int,
    spacing_mm: Sequence[float] | None = None,
    measuring: Measuring | None = None,
) -> Case:
    """Measures one case.

    Args:
        predicted: class indices 0 … C.
        true: class indices 0 … C, of the same shape.
        classes: C.
        spacing_mm: voxel size per axis, where it is known.
        measuring: how.

    Example:
        >>> case = measure(np.array([[0, 1, 1]]), np.array([[0, 0, 1]]), classes=1, spacing_mm=(1.0, 5.0))
        >>> case.structures[0].overlap.iou, case.structures[0].mm.hd, case.structures[0].status
        (0.5, 5.0, 'computed')
    """
    measuring = measuring or Measuring()
    spacing = None if spacing_mm is None else tuple(float(size) for size in spacing_mm)
    if measuring.postprocess == "largest":
        predicted = largest_components(predicted, classes)
    find = _fast if measuring.engine == "fast" else _medpy
    return Case(true.shape, spacing, tuple(find(predicted, true, classes, spacing, measuring)), _hash(true))


def _fast(
    predicted: NDArray[Any], true: NDArray[Any], classes: int, spacing: tuple[float, ...] | None, measuring: Measuring
) -> list[Structure]:
    structures = []
    pairs = zip(confusions(predicted, true, classes), borders(predicted, true, classes), strict=True)
    for index, (counts, surfaces) in enumerate(pairs, 1):
        voxels = mm = None
        if surfaces.prediction.size and surfaces.label.size:
            tolerance = measuring.tolerance(index)
            voxels = surfaces.distances().surface(tolerance)
            mm = surfaces.distances(spacing).surface(tolerance) if spacing else None
        structures.append(Structure(counts, overlap(counts), voxels, mm))
    return structures


def _medpy(
    predicted: NDArray[Any], true: NDArray[Any], classes: int, spacing: tuple[float, ...] | None, measuring: Measuring
) -> list[Structure]:
    structures = []
    pairs = zip(confusions(predicted, true, classes), cropped_masks(predicted, true, classes), strict=True)
    for index, (counts, masks) in enumerate(pairs, 1):
        voxels = mm = None
        if all(mask.any() for mask in masks):
            tolerance = measuring.tolerance(index)
            voxels = medpy_surface(*masks, tolerance)
            mm = medpy_surface(*masks, tolerance, spacing) if spacing else None
        structures.append(Structure(counts, overlap_of_masks(*masks, "medpy"), voxels, mm))
    return structures


def largest_components(labels: NDArray[Any], classes: int) -> NDArray[Any]:
    """A label map with the largest connected component of each class, neighbours over edges and corners included.

    As MONAI's `KeepLargestConnectedComponent`, which asks scikit-image to be installed. Of several largest ones the
    first stays; there it is any.

    Example:
        >>> largest_components(np.array([1, 0, 1, 1, 2, 0, 2]), classes=2)
        array([0, 0, 1, 1, 2, 0, 0])
    """
    kept = labels.copy()
    neighbours = np.ones((3,) * labels.ndim)
    for index, box in enumerate(ndimage.find_objects(labels, classes), 1):
        if box is not None:
            parts, number = ndimage.label(labels[box] == index, neighbours)
            if number > 1:
                sizes = np.zeros(number + 1, np.int64)
                # NumPy counts in a copy of eight bytes a voxel, so slab by slab
                for slab in np.array_split(parts, len(parts)):
                    sizes += np.bincount(slab.ravel(), minlength=number + 1)
                sizes[0] = 0
                dropped = parts != sizes.argmax()
                dropped &= parts > 0
                kept[box][dropped] = 0
    return kept


def class_maps(
    prediction: LabelMap, label: LabelMap, classes: int, case: str = "the case"
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both maps as integer arrays.

    Raises:
        InputError: when a map holds anything but whole numbers 0 … `classes` or the shapes differ; it names the case.

    Example:
        >>> class_maps(torch.tensor([0.0, 1.0]), np.array([1, 2]), classes=2)
        (array([0, 1], dtype=uint8), array([1, 2]))
    """
    predicted = _class_indices(prediction, classes, case, "the prediction")
    true = _class_indices(label, classes, case, "the label")
    if predicted.shape != true.shape:
        raise InputError(f"the prediction has shape {predicted.shape}, the label {true.shape}", path=case)
    return predicted, true


def _class_indices(values: LabelMap, classes: int, case: str, what: str) -> NDArray[Any]:
    array = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
    low, high = (array.min(), array.max()) if array.size else (math.nan, math.nan)
    if not 0 <= low <= high <= classes:
        found = f"{what} holds values from {low:g} to {high:g}"
        raise InputError(found, path=case, remedy=f"with {classes} named classes, 0 to {classes} fit")
    if np.issubdtype(array.dtype, np.integer):
        return array
    indices = array.astype(np.uint8 if classes < 256 else np.int64)
    if not np.array_equal(indices, array):
        raise InputError(f"{what} holds fractions, not class indices", path=case)
    return indices


def _hash(labels: NDArray[Any]) -> str:
    # as unsigned bytes where they fit, so that what is stored as other integers has the same hash
    stored = labels.astype(np.uint8 if labels.max(initial=0) < 256 else "<u2")
    return hashlib.sha256(repr(stored.shape).encode() + np.ascontiguousarray(stored).tobytes()).hexdigest()
