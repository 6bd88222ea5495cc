"""What one case scores, empty masks included: the published rules, and strict ones.

Volumes, class by class (`paper`, `strict`). A pair of masks is `computed` (both have voxels), `missed` (only the label
has), a `false alarm` (only the prediction has) or `absent` (neither has). On computed pairs the protocols differ in the
unit of HD95 only:

            paper              strict
false alarm Dice 1, HD95 0     Dice 0, HD95 undefined
missed      Dice 0, HD95 0     Dice 0, HD95 undefined, or the image's diagonal where that is asked for
absent      Dice 0, HD95 0     not scored
HD95        voxels             mm where the spacing is known

`paper` made the tables of VM-UNet and TransUNet, and has no other metric. Undefined and unscored values are NaN. Means
leave them out and therefore always come with their N.

Single images (`per_image`, `pooled`, `threshold_jaccard`): the published ways to count pixels. The mean over images
weighs all images alike. The pooled count weighs all pixels alike, so large lesions weigh more. The same predictions
give two numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import nan
from typing import Literal

from evaluation.cases import Case, Status, Structure
from evaluation.metrics import Confusion, overlap

MissedDistance = Literal["undefined", "diagonal"]

PAPER_RULES = (
    "as published for TransUNet and VM-UNet: class in the prediction only: Dice 1, HD95 0; in the label only or in "
    "neither: Dice 0, HD95 0; means over all cases; HD95 in voxels whatever the spacing"
)
THRESHOLD = 0.65
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
    "threshold": (
        "as the ISIC challenge of 2018 ranked: the image's IoU, 1 where both masks are empty, or 0 where it is below "
        f"{THRESHOLD:g}; mean over the images"
    ),
    "surface": (
        "in pixels, mean over the images; HD95 (medpy's definition) where both masks have pixels, surface Dice 0 where "
        "one of the masks is empty and undefined where both are"
    ),
}


@dataclass(frozen=True)
class Score:
    """One class of one volume under one protocol. NaN where the protocol gives no number.

    Ratios are fractions, `distance_unit` is "mm" or "voxels", volumes are in ml; the difference is prediction − label.
    """

    protocol: str
    dice: float
    hd95: float
    distance_unit: str
    status: Status
    iou: float = nan
    precision: float = nan
    recall: float = nan
    assd: float = nan
    surface_dice: float = nan
    prediction_ml: float = nan
    label_ml: float = nan
    difference_ml: float = nan


@dataclass(frozen=True)
class ImageScore:
    """One class of one image. Ratios are fractions, distances in pixels; NaN where there is no number."""

    status: Status
    iou: float
    dice: float
    sensitivity: float
    specificity: float
    precision: float
    f1: float
    accuracy: float
    threshold_jaccard: float
    hd95_px: float
    surface_dice: float
    tp: int
    fp: int
    fn: int
    tn: int


def strict_rules(missed_distance: MissedDistance, tolerances: Mapping[str, float]) -> str:
    """The rules of `strict` in words; the tolerances in mm by class, or one named "".

    Example:
        >>> strict_rules("diagonal", {"": 2.0}).split("; ")[2]
        "in the label only (missed): Dice 0, HD95 and ASSD the image's diagonal"
    """
    missed = "HD95 undefined" if missed_distance == "undefined" else "HD95 and ASSD the image's diagonal"
    stated = ", ".join(f"{name} {tolerance:g} mm".strip() for name, tolerance in tolerances.items())
    return (
        "class in neither mask: not scored; in the prediction only (false alarm): Dice 0, HD95 undefined; in the label "
        f"only (missed): Dice 0, {missed}; means over the scored cases; HD95 in mm where the spacing is known; IoU and "
        "surface Dice are 0 where Dice is, ASSD has HD95's rules, precision is undefined where nothing is predicted "
        f"and recall where nothing is labelled; surface Dice at {stated}, and volumes, where the spacing is known"
    )


def paper(structure: Structure) -> Score:
    """The published per-volume protocol (TransUNet's evaluation, used by VM-UNet): see the module's table.

    Example:
        >>> import numpy as np
        >>> from evaluation.cases import measure
        >>> score = paper(measure(np.array([1, 0]), np.array([0, 0]), classes=1).structures[0])
        >>> score.dice, score.hd95, score.status
        (1.0, 0.0, 'false alarm')
    """
    if structure.voxels is not None:
        return Score("paper", structure.overlap.dice, structure.voxels.hd95, "voxels", structure.status)
    return Score("paper", float(structure.status == "false alarm"), 0.0, "voxels", structure.status)


def strict(structure: Structure, case: Case, missed_distance: MissedDistance = "undefined") -> Score:
    """The protocol in which a missed class and a false alarm cost: see the module's table.

    Example:
        >>> import numpy as np
        >>> from evaluation.cases import measure
        >>> case = measure(np.array([1, 0]), np.array([0, 0]), classes=1)
        >>> score = strict(case.structures[0], case)
        >>> score.dice, score.hd95, score.status
        (0.0, nan, 'false alarm')
    """
    status, known = structure.status, case.spacing_mm is not None
    unit = "mm" if known else "voxels"
    if status == "absent":
        return Score("strict", nan, nan, unit, status)
    surface = structure.mm if known else structure.voxels
    undefined = case.diagonal if status == "missed" and missed_distance == "diagonal" else nan
    tp, fp, fn, _ = structure.counts
    shares = structure.overlap
    return Score(
        "strict",
        shares.dice,
        surface.hd95 if surface else undefined,
        unit,
        status,
        iou=shares.iou,
        precision=shares.precision,
        recall=shares.recall,
        assd=surface.assd if surface else undefined,
        surface_dice=(surface.surface_dice if surface else 0.0) if known else nan,
        prediction_ml=(tp + fp) * case.voxel_ml,
        label_ml=(tp + fn) * case.voxel_ml,
        difference_ml=(fp - fn) * case.voxel_ml,
    )


def strict_dice(counts: Confusion) -> float:
    """Dice under the strict protocol: NaN where both masks are empty.

    Example:
        >>> strict_dice(Confusion(tp=2, fp=0, fn=0, tn=1)), strict_dice(Confusion(tp=0, fp=0, fn=0, tn=3))
        (1.0, nan)
    """
    return overlap(counts).dice if counts.tp + counts.fp + counts.fn else nan


def image_score(structure: Structure) -> ImageScore:
    """One class of one image by all rules that give each image a number.

    Example:
        >>> import numpy as np
        >>> from evaluation.cases import measure
        >>> image_score(measure(np.array([[1, 1]]), np.array([[1, 0]]), classes=1).structures[0]).threshold_jaccard
        0.0
    """
    surface = structure.voxels
    either = structure.status != "absent"
    shares = per_image(structure.counts)
    return ImageScore(
        structure.status,
        shares["iou"],
        shares["dice"],
        shares["sensitivity"],
        shares["specificity"],
        shares["precision"],
        shares["f1"],
        shares["accuracy"],
        threshold_jaccard(structure.counts),
        surface.hd95 if surface else nan,
        surface.surface_dice if surface else 0.0 if either else nan,
        *structure.counts,
    )


def threshold_jaccard(counts: Confusion) -> float:
    """The ISIC challenge's score of an image: its IoU, or 0 below 0.65.

    Example:
        >>> threshold_jaccard(Confusion(7, 1, 2, 9)), threshold_jaccard(Confusion(6, 2, 2, 9))
        (0.7, 0.0)
    """
    iou = overlap(counts).iou
    return iou if iou >= THRESHOLD else 0.0


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
