import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from evaluation import dice, hd95
from evaluation.protocols import paper, strict
from tests.golden import fill

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses_and_metrics.json").read_text())


MaskPair = list[NDArray[np.bool_]]


def volume(name: str) -> NDArray[np.bool_]:
    return gaussian_filter(fill._noise(name, (20, 48, 40), 0), 3) > 0.01


PREDICTION, LABEL = volume("volume_pred"), volume("volume_label")
EMPTY = np.zeros_like(LABEL)


@st.composite
def mask_pairs(draw: st.DrawFn) -> MaskPair:
    """Two masks of one shape, 2-D or 3-D, each with at least one true voxel, often touching the array's border."""
    shape = draw(st.lists(st.integers(1, 9), min_size=2, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    pair = []
    for _ in range(2):
        mask = rng.random(shape) < draw(st.sampled_from([0.02, 0.2, 0.8]))
        mask[tuple(rng.integers(0, shape))] = True
        pair.append(mask)
    return pair


def test_golden_volumes() -> None:
    assert [int(PREDICTION.sum()), int(LABEL.sum())] == GOLDEN["volume_voxels"]
    expected = GOLDEN["transunet_dice_hd95"]
    assert [dice(PREDICTION, LABEL), hd95(PREDICTION, LABEL)] == pytest.approx(expected["pred_and_label"], rel=1e-12)
    assert hd95(PREDICTION, LABEL, (3, 1, 1)) == pytest.approx(GOLDEN["medpy_hd95_spacing_3_1_1"], rel=1e-12)


@pytest.mark.parametrize(
    ("case", "prediction", "label"),
    [
        ("pred_and_label", PREDICTION, LABEL),
        ("pred_only", PREDICTION, EMPTY),
        ("label_only", EMPTY, LABEL),
        ("both_empty", EMPTY, EMPTY),
    ],
)
def test_paper_protocol_is_the_published_one(
    case: str, prediction: NDArray[np.bool_], label: NDArray[np.bool_]
) -> None:
    score = paper(prediction, label)
    assert [score.dice, score.hd95] == pytest.approx(GOLDEN["transunet_dice_hd95"][case], rel=1e-12)
    assert score.hd95_unit == "voxels"


def test_strict_protocol_empty_cases() -> None:
    missed, alarm, absent = strict(EMPTY, LABEL), strict(PREDICTION, EMPTY), strict(EMPTY, EMPTY)
    assert (missed.dice, missed.status) == (0, "missed")
    assert (alarm.dice, alarm.status) == (0, "false alarm")
    assert math.isnan(absent.dice)
    assert absent.status == "absent"
    assert all(math.isnan(score.hd95) for score in (missed, alarm, absent))


def test_strict_protocol_measures_in_mm_only_with_a_spacing() -> None:
    assert strict(PREDICTION, LABEL).hd95_unit == "voxels"
    score = strict(PREDICTION, LABEL, (3, 1, 1))
    assert score.hd95_unit == "mm"
    assert score.hd95 == pytest.approx(GOLDEN["medpy_hd95_spacing_3_1_1"])


def test_values_computable_by_hand() -> None:
    square, shifted = np.zeros((2, 9, 9), bool)
    square[2:5, 2:5] = shifted[2:5, 4:7] = True  # one of three columns in common
    assert dice(square, shifted) == pytest.approx(1 / 3)
    assert hd95(square, shifted) == 2
    assert hd95(square, shifted, (10, 0.5)) == 1
    assert dice(EMPTY, EMPTY) == 1


@given(mask_pairs(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_cropping_changes_nothing(pair: MaskPair, with_spacing: bool) -> None:
    spacing = [2.5, 0.7, 1.3][: pair[0].ndim] if with_spacing else None
    assert hd95(*pair, spacing) == binary.hd95(*pair, voxelspacing=spacing)
    assert dice(*pair) == binary.dc(*pair)


@given(mask_pairs())
@settings(max_examples=50, deadline=None)
def test_symmetric_and_perfect_on_itself(pair: MaskPair) -> None:
    first, second = pair
    assert hd95(first, second) == hd95(second, first)
    assert dice(first, second) == dice(second, first)
    assert (dice(first, first), hd95(first, first)) == (1, 0)


def test_tensors_and_arrays_agree() -> None:
    tensors = torch.from_numpy(PREDICTION), torch.from_numpy(LABEL)
    assert dice(*tensors) == dice(PREDICTION, LABEL)
    assert hd95(*tensors) == hd95(PREDICTION, LABEL)


@pytest.mark.parametrize("metric", [dice, hd95])
def test_bad_masks_are_refused(metric: Callable[..., float]) -> None:
    with pytest.raises(ValueError, match="must be boolean, not int64"):
        metric(LABEL.astype(np.int64), LABEL)
    with pytest.raises(ValueError, match="shapes must be equal"):
        metric(LABEL[1:], LABEL)


def test_hd95_refuses_empty_masks_and_wrong_spacings() -> None:
    with pytest.raises(ValueError, match="the prediction is empty"):
        hd95(EMPTY, LABEL)
    with pytest.raises(ValueError, match="the label is empty"):
        hd95(PREDICTION, EMPTY)
    for spacing in ((1, 1), (1, 1, 0)):
        with pytest.raises(ValueError, match="3 positive numbers"):
            hd95(PREDICTION, LABEL, spacing)
