"""What an organ of one case scores, empty masks included: the published rules and strict ones.

A mask pair is `computed` (both masks have voxels), `missed` (only the label has), a `false alarm` (only the prediction
has) or `absent` (neither has). The protocols agree on computed pairs but for the unit of HD95; the rest:

            paper              strict
false alarm Dice 1, HD95 0     Dice 0, HD95 undefined
missed      Dice 0, HD95 0     Dice 0, HD95 undefined
absent      Dice 0, HD95 0     not scored
HD95        voxels             mm where the spacing is known

`paper` is what the VM-UNet and TransUNet tables were made with. Undefined and unscored values are NaN and are left out
of means, which therefore always come with their N.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import nan
from typing import Literal, NamedTuple

from evaluation.metrics import Mask, as_masks, dice, hd95

Status = Literal["computed", "missed", "false alarm", "absent"]

RULES = {
    "strict": (
        "organ in neither mask: not scored; in the prediction only (false alarm): Dice 0, HD95 undefined; in the label "
        "only (missed): Dice 0, HD95 undefined; means over the scored cases; HD95 in mm where the spacing is known"
    ),
    "paper": (
        "as published for TransUNet and VM-UNet: organ in the prediction only: Dice 1, HD95 0; in the label only or in "
        "neither: Dice 0, HD95 0; means over all cases; HD95 in voxels whatever the spacing"
    ),
}


class Score(NamedTuple):
    """One organ of one case. NaN where the protocol gives no number; `hd95_unit` is "mm" or "voxels"."""

    dice: float
    hd95: float
    hd95_unit: str
    status: Status


def occurrence(prediction: Mask, label: Mask) -> Status:
    """Which of the two boolean masks have voxels."""
    predicted, true = as_masks(prediction, label)
    if true.any():
        return "computed" if predicted.any() else "missed"
    return "false alarm" if predicted.any() else "absent"


def paper(prediction: Mask, label: Mask) -> Score:
    """The published per-volume protocol (TransUNet's evaluation, used by VM-UNet): see the module's table."""
    status = occurrence(prediction, label)
    if status == "computed":
        return Score(dice(prediction, label), hd95(prediction, label), "voxels", status)
    return Score(1.0 if status == "false alarm" else 0.0, 0.0, "voxels", status)


def strict(prediction: Mask, label: Mask, spacing_mm: Sequence[float] | None = None) -> Score:
    """The protocol in which a missed organ and a false alarm cost: see the module's table."""
    unit = "voxels" if spacing_mm is None else "mm"
    status = occurrence(prediction, label)
    if status == "computed":
        return Score(dice(prediction, label), hd95(prediction, label, spacing_mm), unit, status)
    return Score(nan if status == "absent" else 0.0, nan, unit, status)
