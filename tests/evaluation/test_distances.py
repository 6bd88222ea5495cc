"""Surface distances against medpy's, and the engines against each other."""

from __future__ import annotations

from dataclasses import asdict, astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from medpy.metric import binary
from monai.transforms import KeepLargestConnectedComponent
from numpy.typing import NDArray
from scipy import ndimage

from evaluation import distances
from evaluation.cases import Measuring, largest_components, measure
from evaluation.distances import borders, medpy_surface, surface_distances
from evaluation.metrics import confusion, confusions
from evaluation.scores import ImageScores, VolumeScores
from tests.evaluation.test_metrics import MaskPair, mask_pairs

EXACT = {"rel": 1e-9, "abs": 1e-9}
SPACINGS = [None, (1.0, 1.0, 1.0), (2.5, 0.7, 1.3), (0.05, 3.0, 40.0)]


def boxes(*corners: tuple[int, ...], shape: tuple[int, ...] = (9, 12, 10)) -> NDArray[np.bool_]:
    """A mask of boxes (start and stop of each axis)."""
    mask = np.zeros(shape, bool)
    for corner in corners:
        mask[tuple(slice(*pair) for pair in zip(corner[::2], corner[1::2], strict=True))] = True
    return mask


# dense, dense, and a few single voxels
NOISE = [np.random.default_rng(seed).random((20, 24, 22)) < share for seed, share in enumerate((0.3, 0.6, 0.0003))]
KINDS = {
    "single voxels": (boxes((4, 5, 5, 6, 5, 6)), boxes((0, 1, 0, 1, 0, 1))),
    "touching the edge": (boxes((0, 9, 0, 4, 0, 10)), boxes((3, 9, 8, 12, 0, 10))),
    "everything": (boxes((0, 9, 0, 12, 0, 10)), boxes((2, 5, 2, 5, 2, 5))),
    "thin": (boxes((4, 5, 0, 12, 0, 10)), boxes((0, 9, 6, 7, 5, 6))),
    "equal": (boxes((2, 6, 2, 6, 2, 6)), boxes((2, 6, 2, 6, 2, 6))),
    "hollow": (boxes((1, 8, 1, 9, 1, 9)) & ~boxes((3, 6, 3, 6, 3, 6)), boxes((3, 6, 3, 6, 3, 6))),
    "far and scattered": (boxes((1, 3, 1, 3, 1, 3), (8, 9, 11, 12, 9, 10)), boxes((1, 3, 1, 4, 1, 3))),
    "one slice": (boxes((0, 1, 2, 5, 2, 5), shape=(1, 12, 10)), boxes((0, 1, 4, 7, 4, 9), shape=(1, 12, 10))),
    "far apart": (boxes((1, 4, 1, 4, 1, 4), shape=(30, 40, 40)), boxes((25, 29, 35, 40, 36, 39), shape=(30, 40, 40))),
    "noise": (NOISE[0], NOISE[1]),
    "noise and a box": (NOISE[0], boxes((2, 5, 2, 5, 2, 5), shape=NOISE[0].shape)),
    "noise in a corner": (boxes((0, 6, 0, 6, 0, 6), shape=NOISE[0].shape) & NOISE[0], NOISE[2]),
    "checkered": (np.indices((12, 14, 13)).sum(0) % 2 == 0, boxes((3, 9, 3, 9, 3, 9), shape=(12, 14, 13))),
    "noise beside nothing": (NOISE[0] & boxes((0, 20, 0, 24, 0, 9), shape=NOISE[0].shape), NOISE[1]),
    "inside a hollow one": (
        boxes((0, 40, 0, 30, 0, 30), shape=(40, 30, 30)) & ~boxes((1, 39, 1, 29, 1, 29), shape=(40, 30, 30)),
        boxes((12, 28, 8, 22, 8, 22), shape=(40, 30, 30)),
    ),
    "flat": (boxes((2, 5, 2, 5), shape=(12, 10)), boxes((4, 7, 4, 9), shape=(12, 10))),
    "a line": (boxes((0, 4), shape=(20,)), boxes((12, 20), shape=(20,))),
}


def test_the_way_that_is_taken_depends_on_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for name in ("distance_transform_edt", "cKDTree"):
        original = getattr(distances, name)
        monkeypatch.setattr(
            distances, name, lambda *a, name=name, original=original, **k: taken.append(name) or original(*a, **k)
        )
    ways = {}
    for kind in ("far and scattered", "noise", "noise and a box", "inside a hollow one"):
        taken.clear()
        surface_distances(*KINDS[kind], (3.0, 1.0, 1.0))
        ways[kind] = sorted(set(taken))
    assert ways["far and scattered"] == ["cKDTree"]
    # noise: a search around each point
    assert ways["noise"] == []
    assert ways["noise and a box"] == ["distance_transform_edt"]
    # a tree is tried with a few points, and given up
    assert ways["inside a hollow one"] == ["cKDTree", "distance_transform_edt"]


def check(pair: MaskPair, spacing: tuple[float, ...] | None) -> None:
    first, second = pair
    found = surface_distances(first, second, spacing)
    assert found.hd() == pytest.approx(binary.hd(first, second, spacing), **EXACT)
    assert found.hd95() == pytest.approx(binary.hd95(first, second, spacing), **EXACT)
    assert found.asd() == pytest.approx(binary.asd(first, second, spacing), **EXACT)
    assert found.assd() == pytest.approx(binary.assd(first, second, spacing), **EXACT)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_distances_of_known_kinds_are_those_of_medpy(kind: str, spacing: tuple[float, ...] | None) -> None:
    first, second = KINDS[kind]
    sizes = None if spacing is None else spacing[: first.ndim]
    check([first, second], sizes)
    check([second, first], sizes)


@given(mask_pairs(), st.lists(st.floats(0.01, 100), min_size=3, max_size=3) | st.none())
@settings(max_examples=200, deadline=None)
def test_distances_of_any_masks_are_those_of_medpy(pair: MaskPair, spacing: list[float] | None) -> None:
    check(pair, None if spacing is None else tuple(spacing[: pair[0].ndim]))


@given(mask_pairs(), st.sampled_from([0.0, 1.0, 1.5, 2.0, 3.0]))
@settings(max_examples=100, deadline=None)
def test_the_surface_dice_is_that_of_monai(pair: MaskPair, tolerance: float) -> None:
    for spacing in (None, [2.5, 0.75, 1.25][: pair[0].ndim]):
        found = surface_distances(*pair, spacing).surface_dice(tolerance)
        assert found == pytest.approx(medpy_surface(*pair, tolerance, spacing).surface_dice, abs=1e-6)


@st.composite
def map_pairs(draw: st.DrawFn) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Two label maps of 0 … 4 of one shape; classes touch, and may be missing in either."""
    shape = draw(st.lists(st.integers(1, 8), min_size=2, max_size=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shares = [[0.9, 0.05, 0.05, 0, 0], [0.2, 0.4, 0, 0.4, 0], [0, 0.25, 0.25, 0.25, 0.25]]
    maps = [rng.choice(5, shape, p=draw(st.sampled_from(shares))).astype(np.uint8) for _ in range(2)]
    return maps[0], maps[1]


@given(map_pairs())
@settings(max_examples=100, deadline=None)
def test_all_classes_at_once_are_one_after_the_other(pair: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    counts, edges = confusions(*pair, 4), borders(*pair, 4)
    for index in range(1, 5):
        masks = [array == index for array in pair]
        assert counts[index - 1] == confusion(*masks)
        (alone,) = borders(*(mask.view(np.uint8) for mask in masks), 1)
        np.testing.assert_array_equal(edges[index - 1].prediction, alone.prediction)
        np.testing.assert_array_equal(edges[index - 1].label, alone.label)


@given(map_pairs(), st.booleans(), st.sampled_from(["none", "largest"]))
@settings(max_examples=100, deadline=None)
def test_both_engines_give_the_same_in_every_metric(
    pair: tuple[NDArray[np.uint8], NDArray[np.uint8]], known: bool, postprocess: str
) -> None:
    spacing = (2.5, 0.75, 1.25)[: pair[0].ndim] if known else None
    names = ["a", "b", "c", "d"]
    for kind in (VolumeScores, ImageScores):
        rows = []
        for engine in ("fast", "medpy"):
            scores = kind(names, measuring=Measuring((1.0, 2.0, 3.0, 0.5), engine, postprocess))
            rows.append(scores.add("case", *pair, spacing if kind is VolumeScores else None))
        for fast, slow in zip(*rows, strict=True):
            one, other = asdict(fast.score), asdict(slow.score)
            # MONAI answers in float32
            assert one.pop("surface_dice") == pytest.approx(other.pop("surface_dice"), abs=1e-6, nan_ok=True)
            words = [key for key, value in one.items() if isinstance(value, str)]
            assert [one.pop(key) for key in words] == [other.pop(key) for key in words]
            assert one == pytest.approx(other, **EXACT, nan_ok=True)


def test_medpy_computes_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = KINDS["hollow"]
    maps = [mask.astype(np.uint8) for mask in pair]
    for name in ("dc", "jc", "precision", "recall", "hd", "hd95", "assd"):
        monkeypatch.setattr(binary, name, lambda *masks, voxelspacing=None: -7.0)
    (slow,) = measure(*maps, 1, (1, 1, 1), Measuring(engine="medpy")).structures
    assert astuple(slow.mm)[:3] == astuple(slow.voxels)[:3] == (-7, -7, -7)
    assert slow.overlap == (-7, -7, -7, -7)
    (fast,) = measure(*maps, 1, (1, 1, 1)).structures
    assert min(fast.overlap) >= 0
    assert fast.mm.hd > 0
    assert medpy_surface(*pair, 1.0).hd == -7


def test_an_unknown_engine_is_refused() -> None:
    for options in ({"engine": "slow"}, {"postprocess": "biggest"}, {"tolerances": ()}, {"tolerances": (-1.0,)}):
        with pytest.raises(ValueError, match="must be"):
            Measuring(**options)


@given(map_pairs())
@settings(max_examples=100, deadline=None)
def test_the_largest_component_is_that_of_monai(pair: tuple[NDArray[np.uint8], NDArray[np.uint8]]) -> None:
    pytest.importorskip("skimage", reason="MONAI's needs scikit-image, which is not installed")
    labels, _ = pair
    kept = largest_components(labels, 4)
    expected = KeepLargestConnectedComponent(is_onehot=False)(labels[None].astype(np.int64))[0].numpy()
    for index in range(1, 5):
        parts, number = ndimage.label(labels == index, np.ones((3,) * labels.ndim))
        sizes = sorted(np.bincount(parts.ravel())[1:])
        assert np.count_nonzero(kept == index) == np.count_nonzero(expected == index) == (sizes[-1] if number else 0)
        # which of two equal ones stays is chance there
        if number < 2 or sizes[-1] > sizes[-2]:
            np.testing.assert_array_equal(kept == index, expected == index)


def test_the_largest_component_of_each_class_is_kept() -> None:
    labels = np.zeros((6, 8, 8), np.uint8)
    labels[0:2, 0:3, 0:3], labels[2, 3, 3] = 1, 1  # joined over a corner
    labels[5, 7, 7] = 1
    labels[4, 0:2, 6:8], labels[0, 7, 0:5] = 2, 2
    kept = largest_components(labels, 3)
    assert (np.count_nonzero(kept == 1), np.count_nonzero(kept == 2)) == (19, 5)
    assert not kept[5].any()
    assert labels[5, 7, 7] == 1
