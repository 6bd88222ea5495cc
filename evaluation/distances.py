"""Surface distances of two masks, computed once; HD95, ASSD and surface Dice are read from them.

A border voxel belongs to the mask and has a face neighbour that does not; what is outside the array does not. `hd95` is
the 95th percentile of the distances of **both** directions taken together. This is medpy's definition, the one behind
the published tables. MONAI's, the larger of two directed percentiles, gives another number.

The engine "fast" finds the borders of all classes of a label map in one pass and the nearest border voxels in a k-d
tree, or where that would be slower by a search around each or a distance transform. "medpy" asks medpy, and for the
surface Dice, which medpy lacks, MONAI. They agree to rounding.
"""

from __future__ import annotations

import functools
import math
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

# One border voxel in so many voxels is many, as in noise: then a search around each point may be fastest, up to so many
# voxels away, as long as so many steps serve half of the points.
DENSE, REACH, PATIENCE = 32, 6, 32
# What choosing a way goes by, from about so many points. Nanoseconds: of a distance transform for a voxel and axis; of
# a tree for a point, and for each other point not much farther away than the nearest; of a look at a neighbour.
SAMPLE, VOXEL_NS, POINT_NS, RIVAL_NS, RIVAL, LOOK_NS = 128, 25, 600, 300, 1.05, 8


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
    """The border voxels of a prediction (d, N) and of a label (d, M): array indices."""

    prediction: NDArray[np.int32]
    label: NDArray[np.int32]

    def distances(self, spacing_mm: Sequence[float] | None = None) -> SurfaceDistances:
        """The distances in voxels, or in mm with `spacing_mm`; neither border may be empty."""
        scale = np.ones(len(self.label)) if spacing_mm is None else np.asarray(spacing_mm, np.float64)
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
        ([[0, 0, 0], [1, 2, 3]], [[0], [3]])
    """
    pairs = zip(_borders(predicted, classes), _borders(true, classes), strict=True)
    return [Borders(prediction, label) for prediction, label in pairs]


def _borders(labels: NDArray[Any], classes: int) -> list[NDArray[np.int32]]:
    """For each class the indices (d, N) of its border voxels.

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
        np.array(np.unravel_index(places[indices == index], labels.shape), np.int32) for index in range(1, classes + 1)
    ]


def _nearest(points: NDArray[np.int32], others: NDArray[np.int32], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """The distance from each point (d, N) to the nearest of the others (d, M), both scaled axis by axis.

    The three ways give the same; what each would cost follows from numbers and, for a few points, from trying.
    """
    low = np.minimum(points.min(1), others.min(1))[:, None]
    shape = tuple((np.maximum(points.max(1), others.max(1)) - low[:, 0] + 1).tolist())
    points, others = points - low, others - low
    transform = VOXEL_NS * len(shape) * math.prod(shape)
    found, rest = np.empty(points.shape[1]), np.arange(points.shape[1])
    if DENSE * others.shape[1] > math.prod(shape):
        rest = _search_around(points, others, shape, scale, found, transform)
    if len(rest):
        waiting = points if len(rest) == points.shape[1] else points[:, rest]
        nearest = _nearest_in_tree(waiting, others, scale, transform)
        if nearest is None:
            nearest = _nearest_of_all(others, shape, scale)[:, *waiting]
        # from the differences of whole numbers: scaled coordinates would round
        found[rest] = np.sqrt((((waiting - nearest) * scale[:, None]) ** 2).sum(axis=0))
    return found


def _nearest_of_all(others: NDArray[np.int32], shape: tuple[int, ...], scale: NDArray[np.float64]) -> NDArray[np.int32]:
    """For each voxel of an array of that shape the indices (d, …) of the nearest of the others."""
    free = np.ones(shape, bool)
    free[*others] = False
    nearest: NDArray[np.int32] = np.empty((len(shape), *shape), np.int32)
    distance_transform_edt(free, scale, return_distances=False, return_indices=True, indices=nearest)
    return nearest


def _nearest_in_tree(
    points: NDArray[np.int32], others: NDArray[np.int32], scale: NDArray[np.float64], limit_ns: float
) -> NDArray[np.int32] | None:
    """For each point the nearest of the others (d, N); None where that would take longer than the limit.

    A tree is slow for points with many others about as far away as the nearest, as in the middle of a hollow one.
    """
    count = points.shape[1]
    if count * POINT_NS > limit_ns:
        return None
    tree, places = cKDTree(others.T * scale, balanced_tree=False), points.T * scale
    if count > 4 * SAMPLE:
        sample = places[:: count // SAMPLE]
        distances, _ = tree.query(sample)
        rivals = tree.query_ball_point(sample, distances * RIVAL, return_length=True).mean()
        if count * (POINT_NS + rivals * RIVAL_NS) > limit_ns:
            return None
    return others[:, tree.query(places)[1]]


def _search_around(
    points: NDArray[np.int32], others: NDArray[np.int32], shape: tuple[int, ...], scale: NDArray[np.float64],
    found: NDArray[np.float64], limit_ns: float,
) -> NDArray[np.intp]:  # fmt: skip
    """Fills in the distances of points that have another one within a few voxels; the indices of those that wait.

    Looks at one neighbour of all points after the other, the nearest first, and gives up where that finds little, or
    at once where a few points say that all would take longer than the limit.
    """
    steps, distances = _steps_around(tuple(scale.tolist()))
    padded = tuple(size + 2 * REACH for size in shape)
    strides = np.array([math.prod(padded[axis + 1 :]) for axis in range(len(padded))])
    taken = np.zeros(math.prod(padded), bool)
    taken[np.ravel_multi_index(tuple(others + REACH), padded)] = True
    offsets, everywhere = steps @ strides, np.ravel_multi_index(tuple(points + REACH), padded)

    def look(places: NDArray[np.intp], found: NDArray[np.float64]) -> tuple[NDArray[np.intp], int]:
        """The indices of those that wait, and how often was looked."""
        rest, before, looks = np.arange(len(places)), len(places), 0
        for number, (offset, distance) in enumerate(zip(offsets, distances, strict=True), 1):
            looks += len(rest)
            hit = taken[places + offset]
            found[rest[hit]] = distance
            places, rest = places[~hit], rest[~hit]
            if not len(rest):
                break
            if number % PATIENCE == 0:
                if 2 * len(rest) > before:
                    break
                before = len(rest)
        return rest, looks

    every = max(1, len(everywhere) // SAMPLE)
    sample = everywhere[::every]
    rest, looks = look(sample, np.empty(len(sample)))
    # those that wait take the tree, or all of the transform
    after = min(len(rest) * every * POINT_NS, limit_ns)
    if looks * every * LOOK_NS + after > limit_ns:
        return np.arange(len(everywhere))
    return look(everywhere, found)[0]


@functools.lru_cache(maxsize=64)
def _steps_around(scale: tuple[float, ...]) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Steps to all neighbours (n, d) within reach, the nearest first, and how far they lead."""
    axes = [np.arange(-REACH, REACH + 1)] * len(scale)
    steps = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(scale))
    distances = np.sqrt(((steps * scale) ** 2).sum(axis=1))
    # what lies farther along the finest axis is not among the steps
    complete = np.flatnonzero(distances < (REACH + 1) * min(scale))
    order = complete[np.argsort(distances[complete], kind="stable")]
    return steps[order], distances[order]


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
