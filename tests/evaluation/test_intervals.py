"""How sure the means are, and what the strict protocol and the ISIC challenge say of single cases."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from scipy import stats

from evaluation.cases import Measuring, measure
from evaluation.intervals import FEW_CASES, Mean, interval, spread
from evaluation.protocols import THRESHOLD, image_score, strict, threshold_jaccard
from evaluation.scores import ImageScores, VolumeScores, tolerances_of
from evaluation.tables import table

VALUES = tuple(np.random.default_rng(0).beta(8, 2, 30).tolist())


def test_intervals_are_those_of_scipy() -> None:
    # drawn from the sorted values, so that the order of the cases, which follows from their names, changes nothing
    expected = stats.bootstrap(
        (sorted(VALUES),), np.mean, n_resamples=10_000, method="BCa", random_state=np.random.default_rng(0)
    )
    assert interval(VALUES) == pytest.approx(tuple(expected.confidence_interval), rel=1e-12)
    low, high = interval(VALUES)
    assert low < statistics.fmean(VALUES) < high
    interval.cache_clear()
    assert interval(VALUES) == interval(VALUES[::-1]) == (low, high)


def test_intervals_where_there_is_little_to_draw() -> None:
    assert spread([]) == Mean(None, None, 0)
    assert spread([0.5, math.nan]) == Mean(0.5, None, 1)
    assert spread([0.5] * 9) == Mean(0.5, 0, 9, 0.5, 0.5)
    low, high = interval((0.0,) * 11 + (1.0,))
    assert 0 <= low < 1 / 12 < high <= 1
    low, high = interval((0.0, 1.0))
    assert (low, high) == (0, 1)


def test_the_mean_of_classes_is_drawn_by_cases() -> None:
    scores = VolumeScores(["a", "b"])
    rng = np.random.default_rng(0)
    for case in range(12):
        label = rng.integers(0, 3, (2, 6, 6))
        # a wrong case is wrong in both classes: cases are independent, classes are not
        scores.add(str(case), np.where(rng.random(label.shape) < case / 12, 0, label), label)
    result = scores.summary().protocols["strict"]
    mean, classes = result.mean["dice"], [one.metrics["dice"] for one in result.classes.values()]
    assert mean.low < mean.mean < mean.high
    assert mean.high - mean.low > 0.8 * min(one.high - one.low for one in classes)
    assert result.mean["dice"] == scores.summary().protocols["strict"].mean["dice"]


def test_a_class_in_a_single_case_does_not_hide_the_others() -> None:
    scores = VolumeScores(["a", "b"])
    for case in range(6):
        label = np.zeros((2, 6, 6), int)
        label[0, : case + 1] = 1
        if case == 0:
            label[1] = 2
        scores.add(str(case), np.roll(label, 1, 1), label)
    mean = scores.summary().protocols["strict"].mean["dice"]
    assert (mean.classes, mean.cases) == (2, 6)
    assert math.isfinite(mean.low)
    assert mean.low <= mean.mean <= mean.high


@pytest.mark.parametrize(("cases", "cautious"), [(FEW_CASES - 1, True), (FEW_CASES, False)])
def test_few_cases_are_cautioned(cases: int, cautious: bool) -> None:
    scores = ImageScores(["lesion"])
    for case in range(cases):
        scores.add(str(case), np.eye(6, dtype=int), np.eye(6, k=case % 3, dtype=int))
    assert ("Caution" in table(scores.summary())) == cautious


def test_what_a_missed_structure_costs_in_distance() -> None:
    label = np.zeros((4, 30, 40), np.uint8)
    label[1:3, 5:9, 5:9] = 1
    for spacing, diagonal in ((None, math.hypot(4, 30, 40)), ((5.0, 1.0, 2.0), math.hypot(20, 30, 80))):
        case = measure(np.zeros_like(label), label, 1, spacing)
        score = strict(case.structures[0], case, "diagonal")
        assert (score.dice, score.iou, score.recall) == (0, 0, 0)
        assert score.hd95 == score.assd == pytest.approx(diagonal)
        assert math.isnan(score.precision)
        assert math.isnan(strict(case.structures[0], case).hd95)
        alarm = measure(label, np.zeros_like(label), 1, spacing)
        assert math.isnan(strict(alarm.structures[0], alarm, "diagonal").hd95)
    rules = VolumeScores(["a"], missed_distance="diagonal").summary().protocols["strict"].rules
    assert "HD95 and ASSD the image's diagonal" in rules
    with pytest.raises(ValueError, match="undefined or diagonal"):
        VolumeScores(["a"], missed_distance="zero")


def test_volumes_are_in_ml() -> None:
    prediction, label = np.zeros((2, 10, 10, 10), np.uint8)
    prediction[:5], label[:4] = 1, 1
    case = measure(prediction, label, 1, (2.0, 1.0, 0.5))
    score = strict(case.structures[0], case)
    assert (score.prediction_ml, score.label_ml, score.difference_ml) == pytest.approx((0.5, 0.4, 0.1))
    assert (score.precision, score.recall, score.iou) == (0.8, 1, 0.8)
    case = measure(prediction, label, 1)
    unknown = strict(case.structures[0], case)
    assert all(math.isnan(value) for value in (unknown.label_ml, unknown.surface_dice))
    assert unknown.assd > 0


def test_each_class_has_its_tolerance() -> None:
    label = np.zeros((6, 20, 20), np.uint8)
    label[:, 4:9, 4:9], label[:, 12:17, 12:17] = 1, 2
    scores = VolumeScores(["a", "b"], measuring=Measuring(tolerances_of(["a", "b"], {"b": 0.5})))
    first, _, second, _ = scores.add("x", np.roll(label, 1, 2), label, (1.0, 1.0, 1.0))
    assert first.score.surface_dice == 1
    assert 0 < second.score.surface_dice < 1
    assert "a 2 mm, b 0.5 mm" in scores.summary().protocols["strict"].rules
    with pytest.raises(ValueError, match="a tolerance for c; the classes are a, b"):
        tolerances_of(["a", "b"], {"c": 1})
    with pytest.raises(ValueError, match="3 tolerances for 2 classes"):
        VolumeScores(["a", "b"], measuring=Measuring((1.0, 1.0, 1.0)))


def test_the_threshold_jaccard_is_that_of_the_challenge() -> None:
    rng = np.random.default_rng(0)
    label = rng.random((5, 40, 40)) > 0.5
    shares = [0, 0.1, 0.4, 0.9]
    pairs = [(np.where(rng.random(label[0].shape) < share, 0, label[0]), label[0]) for share in shares]
    pairs += [(np.zeros_like(label[0]), np.zeros_like(label[0])), (label[0], np.zeros_like(label[0]))]
    found = [image_score(measure(*(one.astype(np.uint8) for one in pair), 1).structures[0]) for pair in pairs]
    iou = [(p & t).sum() / max((p | t).sum(), 1) for p, t in ((p.astype(bool), t) for p, t in pairs[:4])]
    assert sorted(iou)[1] < THRESHOLD < sorted(iou)[2]
    assert [one.threshold_jaccard for one in found] == [*(x if x >= THRESHOLD else 0 for x in iou), 1, 0]
    challenge = pytest.importorskip("isic_challenge_scoring.metrics", reason="isic-challenge-scoring is not installed")
    confusion = pytest.importorskip("isic_challenge_scoring.confusion")
    for (prediction, true), score in zip(pairs, found, strict=True):
        matrix = confusion.create_binary_confusion_matrix(true, prediction.astype(bool))
        assert score.threshold_jaccard == pytest.approx(challenge.binary_threshold_jaccard(matrix))


def test_post_processing_is_labelled() -> None:
    label = np.zeros((6, 20, 20), np.uint8)
    label[:, 4:9, 4:9] = 1
    prediction = label.copy()
    prediction[0, 19, 19] = 1
    for postprocess, expected in (("none", False), ("largest", True)):
        scores = VolumeScores(["a"], measuring=Measuring(postprocess=postprocess))
        (row, _) = scores.add("x", prediction, label)
        assert (row.score.dice == 1) == expected
        summary = scores.summary()
        assert summary.postprocess == postprocess
        assert ("Post-processed: the largest connected component" in table(summary)) == expected
    assert threshold_jaccard(measure(prediction, label, 1).structures[0].counts) < 1
