"""Overlap and surface metrics of two binary masks, computed by medpy and MONAI.

`dice(A, B) = 2 |A ∩ B| / (|A| + |B|)`. `hd95` is the 95th percentile of the surface distances of **both** directions
taken together (medpy's definition, the one in the published tables); the larger of two directed percentiles, as MONAI
has it, is another number. What to report when a mask is empty is a protocol's decision, see `evaluation.protocols`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from medpy.metric import binary
from monai.metrics import compute_surface_dice
from numpy.typing import NDArray

Mask = NDArray[np.bool_] | torch.Tensor


def dice(prediction: Mask, label: Mask) -> float:
    """Dice coefficient of two boolean masks of one shape; 1 when both are empty.

    Raises ValueError for masks that are not boolean or differ in shape.
    """
    return float(binary.dc(*as_masks(prediction, label)))


def hd95(prediction: Mask, label: Mask, spacing_mm: Sequence[float] | None = None) -> float:
    """95th percentile of the symmetric surface distance, in voxels, or in mm with `spacing_mm` (one number per axis).

    Raises ValueError for masks that are not boolean, differ in shape or are empty, and for a spacing of another length.
    """
    predicted, true = as_masks(prediction, label)
    if spacing_mm is not None and (len(spacing_mm) != true.ndim or not all(s > 0 for s in spacing_mm)):
        raise ValueError(f"spacing_mm must be {true.ndim} positive numbers, one per axis, not {tuple(spacing_mm)}")
    for name, mask in (("prediction", predicted), ("label", true)):
        if not mask.any():
            raise ValueError(f"hd95 is undefined: the {name} is empty; evaluation.protocols has the rules for this")
    # Every surface voxel lies in the common bounding box and medpy takes what is outside the array for background, so
    # nothing changes but the time: the distance transform visits every voxel it is given.
    box = bounding_box(predicted | true)
    return float(binary.hd95(predicted[box], true[box], voxelspacing=spacing_mm))


def surface_dice(prediction: Mask, label: Mask, tolerance_px: float = 2.0) -> float:
    """Share of both outlines that lies within `tolerance_px` pixels of the other outline, as MONAI computes it.

    0 when one of the masks (H, W) or (D, H, W) is empty, NaN when both are. Raises ValueError as `dice` does.
    """
    predicted, true = (torch.from_numpy(mask)[None, None] for mask in as_masks(prediction, label))
    if not (predicted.any() and true.any()):
        return 0.0 if predicted.any() or true.any() else float("nan")
    with warnings.catch_warnings():  # MONAI 1.6 calls a function of its own with an argument that it deprecates
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        return compute_surface_dice(predicted, true, [tolerance_px], include_background=True).item()


class Confusion(NamedTuple):
    """Pixels of a prediction by whether they are foreground and whether that is true."""

    tp: int
    fp: int
    fn: int
    tn: int


def confusion(prediction: Mask, label: Mask) -> Confusion:
    """The confusion matrix of two boolean masks of one shape; ValueError for others."""
    predicted, true = as_masks(prediction, label)
    tp = int(np.count_nonzero(predicted & true))
    fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(true)) - tp
    return Confusion(tp, fp, fn, true.size - tp - fp - fn)


def bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box that holds every true element of a non-empty `mask`, as one slice per axis."""
    box = []
    for axis in range(mask.ndim):
        others = tuple(i for i in range(mask.ndim) if i != axis)
        occupied = np.flatnonzero(mask.any(axis=others))
        box.append(slice(int(occupied[0]), int(occupied[-1]) + 1))
    return tuple(box)


def as_masks(prediction: Mask, label: Mask) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both masks as NumPy arrays; ValueError unless both are boolean and of one shape."""
    arrays = []
    for name, mask in (("prediction", prediction), ("label", label)):
        array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
        if array.dtype != np.bool_:
            raise ValueError(f"the {name} must be boolean, not {array.dtype}: compare a label map with one class first")
        arrays.append(array)
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(f"the prediction is {arrays[0].shape} and the label {arrays[1].shape}: shapes must be equal")
    return arrays[0], arrays[1]
