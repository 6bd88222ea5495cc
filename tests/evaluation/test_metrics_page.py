"""docs/metrics.md: its numbers are what the programs answer."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance, compute_surface_dice

from evaluation.cases import measure
from evaluation.distances import surface_distances
from evaluation.protocols import paper, strict

TEXT = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
SPACINGS = ((1.0, 1.0, 1.0), (3.0, 0.8, 0.8))
TOLERANCE = 2.0


def example() -> tuple[np.ndarray, np.ndarray]:
    """(Prediction, label) as the page describes them."""
    z, y, x = np.ogrid[:24, :24, :24]
    label = (z - 11) ** 2 + (y - 11) ** 2 + (x - 11) ** 2 <= 7**2
    prediction = (z - 11) ** 2 + (y - 12) ** 2 + (x - 13) ** 2 <= 6**2
    prediction[1:4, 1:4, 1:4] = True
    return prediction, label


def ours(spacing: tuple[float, ...]) -> tuple[float, float]:
    found = surface_distances(*example(), spacing)
    return found.hd95(), found.surface_dice(TOLERANCE)


def monai(spacing: tuple[float, ...]) -> tuple[float, float]:
    masks = [torch.from_numpy(mask)[None, None] for mask in example()]
    options = {"include_background": True, "spacing": list(spacing)}
    with warnings.catch_warnings():  # of an argument that MONAI deprecates and gives itself
        warnings.filterwarnings("ignore", category=FutureWarning, module="monai")
        distance = compute_hausdorff_distance(*masks, percentile=95, **options)
        return distance.item(), compute_surface_dice(*masks, [TOLERANCE], **options).item()


def deepmind(spacing: tuple[float, ...]) -> tuple[float, float]:
    package = pytest.importorskip("surface_distance", reason="surface-distance is not installed")
    prediction, label = example()
    with warnings.catch_warnings():  # it takes a function from where SciPy kept it once
        warnings.filterwarnings(
            "ignore", category=DeprecationWarning, message="Please (import|use) .* from the `scipy.ndimage`"
        )
        found = package.compute_surface_distances(label, prediction, spacing)
    return (
        float(package.compute_robust_hausdorff(found, 95)),
        float(package.compute_surface_dice_at_tolerance(found, TOLERANCE)),
    )


def nnunet(spacing: tuple[float, ...]) -> tuple[float, float]:
    """From its definition: medpy's HD95, and the mean of the two directions' shares."""
    found = surface_distances(*example(), spacing)
    shares = [(distances <= TOLERANCE).mean() for distances in (found.from_prediction, found.from_label)]
    return found.hd95(), float(np.mean(shares))


PROGRAMS = {
    "ours, medpy": ours,
    "MONAI 1.6": monai,
    "DeepMind surface-distance 0.1": deepmind,
    "nnU-Net 1, its other form": nnunet,
}


def line(name: str) -> str:
    (coarse, coarse_dice), (fine, fine_dice) = (PROGRAMS[name](spacing) for spacing in SPACINGS)
    return f"| {name} | {coarse:.2f} | {fine:.2f} | {100 * coarse_dice:.2f} % | {100 * fine_dice:.2f} % |"


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_numbers_are_those_of_the_programs(name: str) -> None:
    assert line(name) in TEXT.splitlines()


def test_the_stray_cube_has_the_share_that_the_page_says() -> None:
    found = surface_distances(*example(), SPACINGS[0])
    stray = np.count_nonzero(found.from_prediction > 5)
    assert stray / len(found.both()) < 0.05 < stray / len(found.from_prediction)


@pytest.mark.parametrize(
    ("case", "masks"), [("false alarm", ([1, 0], [0, 0])), ("missed", ([0, 0], [1, 0])), ("absent", ([0, 0], [0, 0]))]
)
def test_empty_masks_score_as_the_page_says(case: str, masks: tuple[list[int], list[int]]) -> None:
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in TEXT.splitlines() if row.startswith("| `")]
    heads = next([cell.strip() for cell in row.split("|")[1:-1]] for row in TEXT.splitlines() if "| missed |" in row)
    measured = measure(*(np.array(mask) for mask in masks), classes=1)
    structure = measured.structures[0]
    for row, score in zip(rows, (paper(structure), strict(structure, measured)), strict=True):
        said = row[heads.index(case)]
        if math.isnan(score.dice):
            assert said == "not scored"
        else:
            hd95 = "undefined" if math.isnan(score.hd95) else f"{score.hd95:g}"
            assert said.startswith(f"Dice {score.dice:g}, HD95 {hd95}")
