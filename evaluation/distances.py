"""Surface distances of two masks, computed once; HD95, ASSD and surface Dice are read from them.

A border voxel belongs to the mask and has a face neighbour that does not; what is outside the array does not. `hd95` is
the 95th percentile of the distances of **both** directions taken together. This is medpy's definition, the one behind
the published tables. MONAI's, the larger of two directed percentiles, gives another number.

The engine "fast" finds the borders of all classes of a label map in one pass and the nearest border voxels in a k-d
tree, or where there are very many, as in noise, by a search around each. "medpy" asks medpy, and for the surface Dice,
which medpy lacks, MONAI. They agree to rounding.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from medpy.metric import binary
from monai.metrics import compute_surface_dice
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from evaluation.metrics import Engine, Mask, as_masks, check_engine, class_boxes

# One border voxel in so many voxels is many, as in noise: a search around each, up to so many voxels away, as long as
# so many steps serve half of the points, or else a distance transform of the whole array is faster than a tree.
DENSE, REACH, PATIENCE = 32, 6, 32


@dataclass(frozen=True)
class Surface:
    """How far two surfaces lie apart, in one unit; the surface Dice at one tolerance in that unit."""

    hd: float
    hd95: float
    assd: float
    surface_dice: float


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """From each border voxel of one mask to the nearest border voxel of the other, both ways.

    Example:
        >>> first, second = np.zeros((2, 9, 9), bool)
        >>> first[2:5, 2:5] = second[2:5, 4:7] = True
        >>> distances = surface_distances(first, second)
        >>> distances.hd(), distances.hd95(), distances.assd(), distances.surface_dice(1.0)
        (2.0, 2.0, 1.0, 0.625)
    """

    from_prediction: NDArray[np.float64]
    from_label: NDArray[np.float64]

    def both(self) -> NDArray[np.float64]:
        return np.concatenate([self.from_prediction, self.from_label])

    def hd(self) -> float:
        """The largest distance."""
        return float(self.both().max())

    def hd95(self) -> float:
        """The 95th percentile of both directions together."""
        return float(np.percentile(self.both(), 95))

    def asd(self) -> float:
        """The mean distance from the prediction's border to the label's."""
        return float(self.from_prediction.mean())

    def assd(self) -> float:
        """The mean of both directions together."""
        return float(self.both().mean())

    def surface_dice(self, tolerance: float) -> float:
        """The share of both borders that lies within `tolerance` of the other border."""
        return float((self.both() <= tolerance).mean())

    def surface(self, tolerance: float) -> Surface:
        return Surface(self.hd(), self.hd95(), self.assd(), self.surface_dice(tolerance))


@dataclass(frozen=True, eq=False)
class Borders:
    """The border voxels of a prediction (N, d) and of a label (M, d): array indices."""

    prediction: NDArray[np.int32]
    label: NDArray[np.int32]

    def distances(self, spacing_mm: Sequence[float] | None = None) -> SurfaceDistances:
        """The distances in voxels, or in mm with `spacing_mm`; neither border may be empty."""
        scale = np.ones(self.label.shape[1]) if spacing_mm is None else np.asarray(spacing_mm, np.float64)
        return SurfaceDistances(
            _nearest(self.prediction, self.label, scale), _nearest(self.label, self.prediction, scale)
        )


def hd95(prediction: Mask, label: Mask, spacing_mm: Sequence[float] | None = None, engine: Engine = "fast") -> float:
    """95th percentile of the symmetric surface distance, in voxels, or in mm with `spacing_mm` (one number per axis).

    Raises:
        ValueError: when a mask is not boolean or empty, the shapes differ, `spacing_mm` has another length, or there is
            no such engine.

    Example:
        >>> first, second = np.zeros((2, 9, 9), bool)
        >>> first[2:5, 2:5] = second[2:5, 4:7] = True
        >>> hd95(first, second), hd95(first, second, spacing_mm=(10, 0.5))
        (2.0, 1.0)
    """
    if check_engine(engine) == "fast":
        return surface_distances(prediction, label, spacing_mm).hd95()
    return float(binary.hd95(*_checked(prediction, label, spacing_mm), voxelspacing=spacing_mm))


def surface_distances(prediction: Mask, label: Mask, spacing_mm: Sequence[float] | None = None) -> SurfaceDistances:
    """The surface distances of two boolean masks, in voxels, or in mm with `spacing_mm` (one number per axis).

    Raises:
        ValueError: when a mask is not boolean or empty, the shapes differ, or `spacing_mm` has another length.

    Example:
        >>> surface_distances(np.array([True, False, False]), np.array([False, False, True]), (3.0,)).hd()
        6.0
    """
    predicted, true = _checked(prediction, label, spacing_mm)
    (pair,) = borders(predicted.view(np.uint8), true.view(np.uint8), 1)
    return pair.distances(spacing_mm)


def medpy_surface(
    prediction: Mask, label: Mask, tolerance: float, spacing_mm: Sequence[float] | None = None
) -> Surface:
    """`SurfaceDistances.surface` of two boolean masks by medpy, which has no surface Dice: that is MONAI's.

    Raises:
        ValueError: when a mask is not boolean or empty, the shapes differ, or `spacing_mm` has another length.

    Example:
        >>> first, second = np.zeros((2, 9, 9), bool)
        >>> first[2:5, 2:5] = second[2:5, 4:7] = True
        >>> medpy_surface(first, second, tolerance=1.0)
        Surface(hd=2.0, hd95=2.0, assd=1.0, surface_dice=0.625)
    """
    pair = _checked(prediction, label, spacing_mm)
    hd, percentile, assd = (
        float(metric(*pair, voxelspacing=spacing_mm)) for metric in (binary.hd, binary.hd95, binary.assd)
    )
    predicted, true = (torch.from_numpy(np.ascontiguousarray(mask))[None, None] for mask in pair)
    spacing = None if spacing_mm is None else list(spacing_mm)
    with warnings.catch_warnings():  # MONAI 1.6 calls a function of its own with an argument that it deprecates
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        share = compute_surface_dice(predicted, true, [tolerance], include_background=True, spacing=spacing)
    return Surface(hd, percentile, assd, share.item())


def borders(predicted: NDArray[Any], true: NDArray[Any], classes: int) -> list[Borders]:
    """The border voxels of each class 1 … C in two label maps of one shape.

    Example:
        >>> (pair,) = borders(np.array([[0, 1, 1, 1]]), np.array([[0, 0, 0, 1]]), classes=1)
        >>> pair.prediction.tolist(), pair.label.tolist()
        ([[0, 1], [0, 2], [0, 3]], [[0, 3]])
    """
    pairs = zip(_borders(predicted, classes), _borders(true, classes), strict=True)
    return [Borders(prediction, label) for prediction, label in pairs]


def _borders(labels: NDArray[Any], classes: int) -> list[NDArray[np.int32]]:
    """For each class the indices (N, d) of its border voxels.

    Neighbouring voxels of two classes are a border of both, so that one pass does for all classes.
    """
    labels = np.ascontiguousarray(labels)
    border = np.zeros(labels.shape, bool)
    for axis in range(labels.ndim):
        values, found = labels.swapaxes(0, axis), border.swapaxes(0, axis)
        differs = values[1:] != values[:-1]
        found[1:] |= differs
        found[:-1] |= differs
        found[:1] = found[-1:] = True
    border &= labels != 0
    places = np.flatnonzero(border)
    indices = labels.reshape(-1)[places]
    return [
        np.stack(np.unravel_index(places[indices == index], labels.shape), axis=1).astype(np.int32)
        for index in range(1, classes + 1)
    ]


def _nearest(points: NDArray[np.int32], others: NDArray[np.int32], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance from each point to the nearest of the others, both scaled axis by axis."""
    low = np.minimum(points.min(0), others.min(0))
    shape = np.maximum(points.max(0), others.max(0)) - low + 1
    voxels = shape.prod(dtype=np.int64)
    found, rest = np.empty(len(points)), np.arange(len(points))
    if DENSE * len(others) > voxels:
        rest = _search_around(points - low, others - low, shape, scale, found)
    if len(rest):
        waiting = points[rest]
        if DENSE * len(rest) > voxels:
            nearest = _nearest_of_all(others - low, shape, scale)[:, *(waiting - low).T].T + low
        else:
            _, index = cKDTree(others * scale, balanced_tree=False).query(waiting * scale)
            nearest = others[index]
        # from the differences of whole numbers: scaled coordinates would round
        found[rest] = np.sqrt((((waiting - nearest) * scale) ** 2).sum(axis=1))
    return found


def _nearest_of_all(others: NDArray[np.int32], shape: NDArray[Any], scale: NDArray[np.float64]) -> NDArray[np.int32]:
    """For each voxel of an array of that shape the indices (d, …) of the nearest of the others."""
    free = np.ones(shape, bool)
    free[*others.T] = False
    nearest: NDArray[np.int32] = np.empty((len(shape), *shape), np.int32)
    distance_transform_edt(free, scale, return_distances=False, return_indices=True, indices=nearest)
    return nearest


def _search_around(
    points: NDArray[np.int32], others: NDArray[np.int32], shape: NDArray[Any], scale: NDArray[np.float64],
    found: NDArray[np.float64],
) -> NDArray[np.intp]:  # fmt: skip
    """Fills in the distances of points that have another one within a few voxels; the indices of those that wait.

    Looks at one neighbour of all points after the other, the nearest first, and gives up where that finds little.
    """
    steps = np.stack(np.meshgrid(*[np.arange(-REACH, REACH + 1)] * len(shape), indexing="ij"), -1).reshape(
        -1, len(shape)
    )
    distances = np.sqrt(((steps * scale) ** 2).sum(axis=1))
    # what lies farther along the finest axis is not among the steps
    complete = np.flatnonzero(distances < (REACH + 1) * scale.min())
    order = complete[np.argsort(distances[complete], kind="stable")]
    padded = shape + 2 * REACH
    strides = np.append(np.cumprod(padded[:0:-1], dtype=np.int64)[::-1], 1)
    taken = np.zeros(int(padded.prod(dtype=np.int64)), bool)
    taken[(others + REACH) @ strides] = True
    places, rest, before = (points + REACH) @ strides, np.arange(len(points)), len(points)
    for number, index in enumerate(order, 1):
        hit = taken[places + steps[index] @ strides]
        found[rest[hit]] = distances[index]
        places, rest = places[~hit], rest[~hit]
        if not len(rest):
            break
        if number % PATIENCE == 0:
            if 2 * len(rest) > before:
                break
            before = len(rest)
    return rest


def _checked(
    prediction: Mask, label: Mask, spacing_mm: Sequence[float] | None
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both masks, cut to the box that holds them: what is outside of an array counts as background anyway."""
    predicted, true = as_masks(prediction, label)
    if spacing_mm is not None and (len(spacing_mm) != true.ndim or not all(s > 0 for s in spacing_mm)):
        raise ValueError(f"spacing_mm must be {true.ndim} positive numbers, one per axis, not {tuple(spacing_mm)}")
    for name, mask in (("prediction", predicted), ("label", true)):
        if not mask.any():
            raise ValueError(
                f"surface distances are undefined: the {name} is empty; evaluation.protocols has the rules for this"
            )
    (box,) = class_boxes([predicted, true])
    return predicted[box], true[box]
