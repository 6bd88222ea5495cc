"""What one case scores, empty masks included: the published rules, and strict ones.

Volumes, class by class (`paper`, `strict`). A pair of masks is `computed` (both have voxels), `missed` (only the label
has), a `false alarm` (only the prediction has) or `absent` (neither has). On computed pairs the protocols differ in the
unit of HD95 only:

            paper              strict
false alarm Dice 1, HD95 0     Dice 0, HD95 undefined
missed      Dice 0, HD95 0     Dice 0, HD95 undefined
absent      Dice 0, HD95 0     not scored
HD95        voxels             mm where the spacing is known

`paper` made the tables of VM-UNet and TransUNet. Undefined and unscored values are NaN. Means leave them out and
therefore always come with their N.

Single images (`per_image`, `pooled`): the two published ways to count pixels. The mean over images weighs all images
alike. The pooled count weighs all pixels alike, so large lesions weigh more. The same predictions give two numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import nan
from typing import Literal, NamedTuple

from evaluation.metrics import Confusion, Mask, as_masks, dice, hd95

Status = Literal["computed", "missed", "false alarm", "absent"]

RULES = {
    "strict": (
        "class in neither mask: not scored; in the prediction only (false alarm): Dice 0, HD95 undefined; in the label "
        "only (missed): Dice 0, HD95 undefined; means over the scored cases; HD95 in mm where the spacing is known"
    ),
    "paper": (
        "as published for TransUNet and VM-UNet: class in the prediction only: Dice 1, HD95 0; in the label only or in "
        "neither: Dice 0, HD95 0; means over all cases; HD95 in voxels whatever the spacing"
    ),
}

IMAGE_RULES = {
    "per image": (
        "as published for CMUNeXt: each image on its own, IoU with 1e-5 added to intersection and union (so 1 where "
        "both masks are empty), F1 = 2·SE·PC/(SE+PC+1e-6), the other denominators with 1e-6 added (so 0 where there is "
        "nothing to count); mean over the images"
    ),
    "pooled": (
        "as published for VM-UNet on ISIC: the pixels of all images in one confusion matrix; IoU of the foreground "
        "(printed there as mIoU); a ratio without pixels to count is 0"
    ),
    "surface": (
        "in pixels, mean over the images; HD95 (medpy) where both masks have pixels, surface Dice (MONAI) 0 where one "
        "of the masks is empty and undefined where both are"
    ),
}


class Score(NamedTuple):
    """One class of one case. NaN where the protocol gives no number; `hd95_unit` is "mm" or "voxels"."""

    dice: float
    hd95: float
    hd95_unit: str
    status: Status


def occurrence(prediction: Mask, label: Mask) -> Status:
    """Which of the two boolean masks have voxels.

    Example:
        >>> import numpy as np
        >>> occurrence(np.array([True, False]), np.array([False, False]))
        'false alarm'
    """
    predicted, true = as_masks(prediction, label)
    if true.any():
        return "computed" if predicted.any() else "missed"
    return "false alarm" if predicted.any() else "absent"


def paper(prediction: Mask, label: Mask) -> Score:
    """The published per-volume protocol (TransUNet's evaluation, used by VM-UNet): see the module's table.

    Example:
        >>> import numpy as np
        >>> paper(np.array([True, False]), np.array([False, False]))
        Score(dice=1.0, hd95=0.0, hd95_unit='voxels', status='false alarm')
    """
    status = occurrence(prediction, label)
    if status == "computed":
        return Score(dice(prediction, label), hd95(prediction, label), "voxels", status)
    return Score(1.0 if status == "false alarm" else 0.0, 0.0, "voxels", status)


def strict(prediction: Mask, label: Mask, spacing_mm: Sequence[float] | None = None) -> Score:
    """The protocol in which a missed class and a false alarm cost: see the module's table.

    Example:
        >>> import numpy as np
        >>> strict(np.array([True, False]), np.array([False, False]))
        Score(dice=0.0, hd95=nan, hd95_unit='voxels', status='false alarm')
    """
    unit = "voxels" if spacing_mm is None else "mm"
    status = occurrence(prediction, label)
    distance = hd95(prediction, label, spacing_mm) if status == "computed" else nan
    return Score(strict_dice(prediction, label), distance, unit, status)


def strict_dice(prediction: Mask, label: Mask) -> float:
    """Dice under the strict protocol: NaN where both masks are empty.

    Example:
        >>> import numpy as np
        >>> strict_dice(np.array([True, True]), np.array([True, True]))
        1.0
        >>> strict_dice(np.array([False, False]), np.array([False, False]))
        nan
    """
    return nan if occurrence(prediction, label) == "absent" else dice(prediction, label)


def per_image(counts: Confusion) -> dict[str, float]:
    """The metrics of one image as CMUNeXt's evaluation computes them, to be averaged over images.

    Example:
        >>> per_image(Confusion(tp=1, fp=1, fn=2, tn=4))["accuracy"]
        0.625
    """
    tp, fp, fn, tn = counts
    iou = (tp + 1e-5) / (tp + fp + fn + 1e-5)
    sensitivity, precision = tp / (tp + fn + 1e-6), tp / (tp + fp + 1e-6)
    return {
        "iou": iou,
        "dice": 2 * iou / (1 + iou),
        "sensitivity": sensitivity,
        "specificity": tn / (tn + fp + 1e-6),
        "precision": precision,
        "f1": 2 * sensitivity * precision / (sensitivity + precision + 1e-6),
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
    }


def pooled(images: Iterable[Confusion]) -> dict[str, float]:
    """The metrics of a set of images as VM-UNet's evaluation on ISIC computes them, from their summed counts.

    Example:
        >>> pooled([Confusion(tp=1, fp=0, fn=0, tn=8), Confusion(tp=0, fp=3, fn=0, tn=6)])["iou"]
        0.25
    """
    tp, fp, fn, tn = (sum(counts) for counts in zip(Confusion(0, 0, 0, 0), *images, strict=True))

    def ratio(part: int, whole: int) -> float:
        return part / whole if whole else 0.0

    return {
        "iou": ratio(tp, tp + fp + fn),
        "dice": ratio(2 * tp, 2 * tp + fp + fn),
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "accuracy": ratio(tp + tn, tp + fp + fn + tn),
    }
