"""Overlap of two masks: counted voxels, and the ratios made of them.

`dice(A, B) = 2 |A ∩ B| / (|A| + |B|)`. The engine "fast" counts all classes of two label maps in one pass; "medpy" asks
medpy mask by mask, as the published evaluations did. They give the same numbers. `evaluation.distances` has the surface
metrics, `evaluation.protocols` what is reported when a mask is empty.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import nan
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from medpy.metric import binary
from numpy.typing import NDArray
from scipy.ndimage import find_objects

Mask = NDArray[np.bool_] | torch.Tensor
Engine = Literal["fast", "medpy"]


class Confusion(NamedTuple):
    """Numbers of true positive, false positive, false negative and true negative pixels."""

    tp: int
    fp: int
    fn: int
    tn: int


class Overlap(NamedTuple):
    """Dice, IoU, precision and recall, as fractions."""

    dice: float
    iou: float
    precision: float
    recall: float


def dice(prediction: Mask, label: Mask, engine: Engine = "fast") -> float:
    """Dice coefficient of two boolean masks of one shape; 1 when both are empty.

    Raises:
        ValueError: when a mask is not boolean, the shapes differ, or there is no such engine.

    Example:
        >>> dice(np.array([True, True, False]), np.array([True, False, False])) == 2 / 3
        True
        >>> dice(np.array([False]), np.array([False]))
        1.0
    """
    return overlap_of_masks(prediction, label, engine).dice


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


def confusions(predicted: NDArray[Any], true: NDArray[Any], classes: int) -> list[Confusion]:
    """The confusion matrix of each class 1 … C against all else.

    Args:
        predicted: class indices 0 … C, of any shape.
        true: class indices 0 … C, of the same shape.
        classes: C.

    Example:
        >>> confusions(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2]), classes=2)
        [Confusion(tp=1, fp=1, fn=0, tn=2), Confusion(tp=1, fp=0, fn=1, tn=2)]
    """
    number = classes + 1
    joint = np.zeros(number * number, np.int64)
    # a slice at a time: bincount makes 8 bytes of each voxel
    for one, other in zip(np.atleast_2d(predicted), np.atleast_2d(true), strict=True):
        joint += np.bincount((one.astype(np.intp) * number + other.astype(np.intp)).ravel(), minlength=number * number)
    table = joint.reshape(number, number)
    both, of_prediction, of_label = table.diagonal(), table.sum(1), table.sum(0)
    return [
        Confusion(tp, fp, fn, true.size - tp - fp - fn)
        for tp, fp, fn in zip(both.tolist(), (of_prediction - both).tolist(), (of_label - both).tolist(), strict=True)
    ][1:]


def overlap(counts: Confusion) -> Overlap:
    """Dice and IoU, 1 where both masks are empty; precision and recall, NaN where there is nothing to divide by.

    Example:
        >>> overlap(Confusion(tp=1, fp=1, fn=0, tn=7))
        Overlap(dice=0.6666666666666666, iou=0.5, precision=0.5, recall=1.0)
        >>> overlap(Confusion(tp=0, fp=0, fn=2, tn=7))
        Overlap(dice=0.0, iou=0.0, precision=nan, recall=0.0)
    """
    tp, fp, fn, _ = counts
    union = tp + fp + fn
    return Overlap(
        2 * tp / (union + tp) if union else 1.0,
        tp / union if union else 1.0,
        tp / (tp + fp) if tp + fp else nan,
        tp / (tp + fn) if tp + fn else nan,
    )


def overlap_of_masks(prediction: Mask, label: Mask, engine: Engine = "fast") -> Overlap:
    """`overlap` of two boolean masks of one shape.

    Raises:
        ValueError: when a mask is not boolean, the shapes differ, or there is no such engine.

    Example:
        >>> overlap_of_masks(np.array([True, True, False]), np.array([True, False, False]), engine="medpy").iou
        0.5
    """
    predicted, true = as_masks(prediction, label)
    some, any_true = bool(predicted.any()), bool(true.any())
    if check_engine(engine) == "fast" or not (some or any_true):
        return overlap(confusion(predicted, true))
    return Overlap(
        float(binary.dc(predicted, true)),
        float(binary.jc(predicted, true)),
        float(binary.precision(predicted, true)) if some else nan,
        float(binary.recall(predicted, true)) if any_true else nan,
    )


def check_engine(engine: str) -> str:
    """The engine's name.

    Raises:
        ValueError: when there is no such engine.

    Example:
        >>> check_engine("medpy")
        'medpy'
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine must be one of {', '.join(get_args(Engine))}, not {engine!r}")
    return engine


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
