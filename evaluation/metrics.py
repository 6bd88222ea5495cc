"""Overlap and surface metrics of two binary masks, computed by medpy and MONAI.

`dice(A, B) = 2 |A ∩ B| / (|A| + |B|)`. `hd95` is the 95th percentile of the surface distances of **both** directions
taken together. This is medpy's definition, the one behind the published tables. MONAI's, the larger of two directed
percentiles, gives another number. `evaluation.protocols` decides what to report when a mask is empty.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from medpy.metric import binary
from monai.metrics import compute_surface_dice
from numpy.typing import NDArray
from scipy.ndimage import find_objects

Mask = NDArray[np.bool_] | torch.Tensor


def dice(prediction: Mask, label: Mask) -> float:
    """Dice coefficient of two boolean masks of one shape; 1 when both are empty.

    Raises:
        ValueError: when a mask is not boolean or the shapes differ.

    Example:
        >>> dice(np.array([True, True, False]), np.array([True, False, False])) == 2 / 3
        True
    """
    predicted, true = as_masks(prediction, label)
    return float(binary.dc(predicted, true)) if predicted.any() or true.any() else 1.0


def hd95(prediction: Mask, label: Mask, spacing_mm: Sequence[float] | None = None) -> float:
    """95th percentile of the symmetric surface distance, in voxels, or in mm with `spacing_mm` (one number per axis).

    Raises:
        ValueError: when a mask is not boolean or empty, the shapes differ, or `spacing_mm` has another length.

    Example:
        >>> first, second = np.zeros((2, 9, 9), bool)
        >>> first[2:5, 2:5] = second[2:5, 4:7] = True
        >>> hd95(first, second), hd95(first, second, spacing_mm=(10, 0.5))
        (2.0, 1.0)
    """
    predicted, true = as_masks(prediction, label)
    if spacing_mm is not None and (len(spacing_mm) != true.ndim or not all(s > 0 for s in spacing_mm)):
        raise ValueError(f"spacing_mm must be {true.ndim} positive numbers, one per axis, not {tuple(spacing_mm)}")
    for name, mask in (("prediction", predicted), ("label", true)):
        if not mask.any():
            raise ValueError(f"hd95 is undefined: the {name} is empty; evaluation.protocols has the rules for this")
    # The crop changes the time only: every surface voxel lies in the common box, medpy takes what is outside the array
    # for background, and its distance transform visits every voxel it is given.
    (box,) = class_boxes([predicted, true])
    return float(binary.hd95(predicted[box], true[box], voxelspacing=spacing_mm))


def surface_dice(prediction: Mask, label: Mask, tolerance_px: float = 2.0) -> float:
    """Share of both outlines that lies within `tolerance_px` pixels of the other outline, as MONAI computes it.

    0 when one of the masks (H, W) or (D, H, W) is empty, NaN when both are.

    Raises:
        ValueError: when a mask is not boolean or the shapes differ.

    Example:
        >>> first, second = np.zeros((2, 9, 9), bool)
        >>> first[2:5, 2:5] = second[2:5, 4:7] = True
        >>> surface_dice(first, second), surface_dice(first, second, tolerance_px=1.0)
        (1.0, 0.625)
    """
    predicted, true = (torch.from_numpy(mask)[None, None] for mask in as_masks(prediction, label))
    if not (predicted.any() and true.any()):
        return 0.0 if predicted.any() or true.any() else float("nan")
    with warnings.catch_warnings():  # MONAI 1.6 calls a function of its own with an argument that it deprecates
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        return compute_surface_dice(predicted, true, [tolerance_px], include_background=True).item()


class Confusion(NamedTuple):
    """Numbers of true positive, false positive, false negative and true negative pixels."""

    tp: int
    fp: int
    fn: int
    tn: int


def confusion(prediction: Mask, label: Mask) -> Confusion:
    """The confusion matrix of two boolean masks of one shape.

    Raises:
        ValueError: when a mask is not boolean or the shapes differ.

    Example:
        >>> confusion(np.array([True, True, False, False]), np.array([True, False, True, False]))
        Confusion(tp=1, fp=1, fn=1, tn=1)
    """
    predicted, true = as_masks(prediction, label)
    tp = int(np.count_nonzero(predicted & true))
    fp, fn = int(np.count_nonzero(predicted)) - tp, int(np.count_nonzero(true)) - tp
    return Confusion(tp, fp, fn, true.size - tp - fp - fn)


def class_boxes(maps: Sequence[NDArray[Any]], classes: int = 1) -> list[tuple[slice, ...]]:
    """For each class 1 … C the smallest box that holds it in all `maps`, of size 0 where no map has the class.

    Args:
        maps: boolean masks or maps of class indices, all of one shape.
        classes: C.

    Returns:
        One slice per axis for each class.

    Example:
        >>> class_boxes([np.array([0, 1, 0, 2]), np.array([0, 0, 1, 0])], classes=3)
        [(slice(1, 3, None),), (slice(3, 4, None),), (slice(0, 0, None),)]
    """
    boxes = []
    for found in zip(*(find_objects(array, classes) for array in maps), strict=True):
        axes = zip(*(box for box in found if box is not None), strict=True)
        box = tuple(slice(min(s.start for s in axis), max(s.stop for s in axis)) for axis in axes)
        boxes.append(box or (slice(0, 0),) * maps[0].ndim)
    return boxes


def as_masks(prediction: Mask, label: Mask) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Both masks as NumPy arrays.

    Raises:
        ValueError: when a mask is not boolean or the shapes differ.

    Example:
        >>> as_masks(torch.tensor([True, False]), np.array([True, True]))
        (array([ True, False]), array([ True,  True]))
    """
    arrays = []
    for name, mask in (("prediction", prediction), ("label", label)):
        array = mask.detach().cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
        if array.dtype != np.bool_:
            raise ValueError(f"the {name} must be boolean, not {array.dtype}: compare a label map with one class first")
        arrays.append(array)
    if arrays[0].shape != arrays[1].shape:
        raise ValueError(f"the prediction is {arrays[0].shape} and the label {arrays[1].shape}: shapes must be equal")
    return arrays[0], arrays[1]
