import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from evaluation import dice, hd95
from evaluation.cases import measure
from evaluation.metrics import Mask
from evaluation.protocols import Score, paper, strict
from evaluation.scores import VolumeScores
from tests.golden import fill

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses_and_metrics.json").read_text())


MaskPair = list[NDArray[np.bool_]]


def volume(name: str) -> NDArray[np.bool_]:
    return gaussian_filter(fill._noise(name, (20, 48, 40), 0), 3) > 0.01


PREDICTION, LABEL = volume("volume_pred"), volume("volume_label")
EMPTY = np.zeros_like(LABEL)
PAIRS = {
    "pred_and_label": (PREDICTION, LABEL),
    "pred_only": (PREDICTION, EMPTY),
    "label_only": (EMPTY, LABEL),
    "both_empty": (EMPTY, EMPTY),
}


def scores(prediction: Mask, label: Mask, spacing_mm: tuple[float, ...] | None = None) -> tuple[Score, Score]:
    """Under the strict and the paper protocol."""
    case = measure(np.asarray(prediction, np.uint8), np.asarray(label, np.uint8), 1, spacing_mm)
    return strict(case.structures[0], case), paper(case.structures[0])


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


@pytest.mark.parametrize("case", PAIRS)
def test_paper_protocol_is_the_published_one(case: str) -> None:
    _, score = scores(*PAIRS[case])
    assert [score.dice, score.hd95] == pytest.approx(GOLDEN["transunet_dice_hd95"][case], rel=1e-12)
    assert score.distance_unit == "voxels"


def test_strict_protocol_empty_cases() -> None:
    missed, alarm, absent = (scores(*PAIRS[case])[0] for case in ("label_only", "pred_only", "both_empty"))
    assert (missed.dice, missed.status) == (0, "missed")
    assert (alarm.dice, alarm.status) == (0, "false alarm")
    assert math.isnan(absent.dice)
    assert absent.status == "absent"
    assert all(math.isnan(score.hd95) for score in (missed, alarm, absent))
    assert dice(EMPTY, EMPTY) == 1


def test_strict_protocol_measures_in_mm_only_with_a_spacing() -> None:
    assert scores(PREDICTION, LABEL)[0].distance_unit == "voxels"
    score, published = scores(PREDICTION, LABEL, (3, 1, 1))
    assert (score.distance_unit, published.distance_unit) == ("mm", "voxels")
    assert score.hd95 == pytest.approx(GOLDEN["medpy_hd95_spacing_3_1_1"], rel=1e-12)


@given(mask_pairs(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_metrics_are_those_of_medpy(pair: MaskPair, with_spacing: bool) -> None:
    spacing = [2.5, 0.7, 1.3][: pair[0].ndim] if with_spacing else None
    assert hd95(*pair, spacing) == binary.hd95(*pair, voxelspacing=spacing)
    assert dice(*pair) == binary.dc(*pair)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint64, np.int64, np.float32, bool])
def test_label_maps_may_be_of_any_type(kind: type) -> None:
    scores = VolumeScores(["organ"])
    row, _ = scores.add("case", PREDICTION.astype(kind), LABEL.astype(kind), (3, 1, 1))
    assert row.score.dice == binary.dc(PREDICTION, LABEL)
    assert row.score.hd95 == binary.hd95(PREDICTION, LABEL, (3, 1, 1))


@pytest.mark.parametrize(
    ("prediction", "label", "spacing", "message"),
    [
        (LABEL.astype(np.int64), LABEL, None, "the prediction must be boolean, not int64"),
        (LABEL, LABEL.astype(np.int64), None, "the label must be boolean, not int64"),
        (LABEL[1:], LABEL, None, "shapes must be equal"),
        (EMPTY, LABEL, None, "the prediction is empty"),
        (PREDICTION, EMPTY, None, "the label is empty"),
        (PREDICTION, LABEL, (1, 1), "3 positive numbers"),
        (PREDICTION, LABEL, (1, 1, 0), "3 positive numbers"),
    ],
)
def test_bad_input_is_refused(prediction: Mask, label: Mask, spacing: tuple[float, ...] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hd95(prediction, label, spacing)
