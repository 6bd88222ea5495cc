from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.transforms import OneOf
from scipy import ndimage

from transforms import RandRotateDegrees, RandRotateDegreesd, RandRotFlip, RandRotFlipd, rot_flip, rotate

shapes = st.tuples(st.integers(1, 30), st.integers(1, 30))


def numbered(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(1, np.prod(shape) + 1, dtype=np.int32).reshape(shape)


@pytest.mark.parametrize("shape", [(512, 512), (224, 224), (101, 122), (64, 33), (7, 8), (1, 5)])
def test_rotate_is_scipys_for_every_published_angle(shape: tuple[int, int]) -> None:
    x = numbered(shape)
    for angle in range(-20, 20):
        np.testing.assert_array_equal(rotate(x, angle), ndimage.rotate(x, angle, order=0, reshape=False))


@settings(deadline=None)
@given(shapes, st.floats(-720, 720))
def test_rotate_is_scipys_for_any_angle(shape: tuple[int, int], angle: float) -> None:
    x = numbered(shape)
    np.testing.assert_array_equal(rotate(x, angle), ndimage.rotate(x, angle, order=0, reshape=False))


def test_rotate_keeps_leading_axes_dtype_and_kind() -> None:
    x = torch.rand(2, 3, 15, 20, dtype=torch.float64)
    out = rotate(x, 13)
    assert out.dtype == torch.float64
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(out[i, j], ndimage.rotate(x[i, j].numpy(), 13, order=0, reshape=False))
    assert torch.equal(rotate(x, 0), x)
    assert isinstance(rotate(x.numpy(), 13), np.ndarray)


@settings(deadline=None)
@given(shapes, st.integers(-4, 7), st.sampled_from([0, 1]))
def test_rot_flip_is_numpys_and_undoes_itself(shape: tuple[int, int], k: int, axis: int) -> None:
    x = numbered(shape)
    out = rot_flip(x, k, axis)
    np.testing.assert_array_equal(out, np.flip(np.rot90(x, k), axis))
    np.testing.assert_array_equal(rot_flip(out, k, axis), x)


@pytest.mark.parametrize(
    "move", [lambda x: rotate(x, 17)] + [lambda x, k=k, a=a: rot_flip(x, k, a) for k in range(4) for a in (0, 1)]
)
def test_affine_follows(move: Callable[[MetaTensor], MetaTensor]) -> None:
    affine = torch.tensor([[0, -2.0, 0, 7], [-3, 0, 0, 5], [0, 0, 4, -9], [0, 0, 0, 1]], dtype=torch.float64)
    image = MetaTensor(torch.zeros(1, 21, 30), affine=affine)
    image[0, 12, 17] = 1
    out = move(image)
    (_, row, column), *others = out.nonzero().tolist()
    assert not others
    there = out.affine @ torch.tensor([row, column, 0, 1.0], dtype=torch.float64)
    # Nearest neighbour leaves the point within half a pixel.
    assert (there - affine @ torch.tensor([12, 17, 0, 1.0], dtype=torch.float64)).abs().max() <= 1.5
    torch.testing.assert_close(image.affine, affine)


def test_draws_cover_the_published_ranges() -> None:
    flip, turn = RandRotFlip().set_random_state(0), RandRotateDegrees(0.5).set_random_state(0)
    x = np.eye(64)
    seen, angles, turned = set(), set(), 0
    for _ in range(1000):
        flip.randomize()
        turned += turn(x) is not x
        seen.add((flip.k, flip.axis))
        angles.add(turn.angle)
    assert seen == {(k, axis) for k in range(4) for axis in (0, 1)}
    assert angles == set(range(-20, 20))
    assert 400 < turned < 600


def test_probability_0_changes_nothing() -> None:
    x = torch.rand(1, 9, 9)
    assert RandRotFlip(0)(x) is x
    assert RandRotateDegrees(0)(x) is x


def test_published_scheme_treats_image_and_label_alike() -> None:
    keys = ["image", "label"]
    scheme = OneOf([RandRotFlipd(keys, prob=1), RandRotateDegreesd(keys, prob=0.5)], weights=[0.5, 0.5])
    x = numbered((1, 16, 16))

    def run(seed: int) -> list[dict]:
        scheme.set_random_state(seed)
        return [scheme({"image": x.astype(np.float32), "label": x, "name": "a"}) for _ in range(40)]

    results = run(1)
    assert all(np.array_equal(one["image"], one["label"]) for one in results)
    assert any(not np.array_equal(one["label"], x) for one in results)
    for seed, equal in ((1, True), (2, False)):
        again = run(seed)
        assert equal == all(np.array_equal(a["label"], b["label"]) for a, b in zip(results, again, strict=True))


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="axis"):
        rot_flip(np.zeros((3, 3)), 1, 2)
    with pytest.raises(ValueError, match="shape"):
        rotate(np.zeros(3), 5)
    with pytest.raises(ValueError, match="angle"):
        rotate(np.zeros((3, 3)), float("nan"))
    with pytest.raises(ValueError, match="degrees"):
        RandRotateDegrees(degrees=(20, -20))
