from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from scipy import ndimage

from transforms import SplineZoom, SplineZoomd, spline_zoom

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def scipy_zoom(x: np.ndarray, size: tuple[int, int], order: int) -> np.ndarray:
    factors = [1] * (x.ndim - 2) + [new / old for new, old in zip(size, x.shape[-2:], strict=True)]
    slices = x.reshape(-1, *x.shape[-2:])
    return np.stack([ndimage.zoom(one, factors[-2:], order=order) for one in slices]).reshape(*x.shape[:-2], *size)


@settings(deadline=None)
@given(sizes, sizes, st.sampled_from([0, 1, 2, 3, 5]), st.sampled_from([(), (1,), (2, 3)]))
@example((8, 9), (26, 9), 3, ())  # scipy takes the last row as lying outside
@example((8, 9), (26, 9), 0, ())
@example((512, 512), (224, 224), 3, (1,))
@example((122, 101), (224, 224), 3, (1,))
@example((224, 224), (512, 500), 0, (1,))
def test_equals_scipy(source: tuple[int, int], target: tuple[int, int], order: int, lead: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=(*lead, *source))
    expected = scipy_zoom(x, target, order)
    out = spline_zoom(torch.from_numpy(x), target, order)
    assert out.dtype == torch.float64
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    out = spline_zoom(x.astype(np.float32), target, order)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5)


def test_same_size_returns_the_values() -> None:
    x = torch.rand(2, 9, 11)
    assert torch.equal(spline_zoom(x, (9, -1)), x)
    assert torch.equal(SplineZoom((None, 11))(x), x)


def test_strided_input() -> None:
    x = np.random.default_rng(0).random((20, 30))[::-1, ::2]
    np.testing.assert_allclose(spline_zoom(x, (11, 8)), scipy_zoom(x, (11, 8), 3), rtol=0, atol=1e-12)


def test_dtype_of_the_result() -> None:
    x = torch.rand(1, 64, 64)
    expected = spline_zoom(x, (31, 33))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = spline_zoom(x, (31, 33))
    assert torch.equal(out, expected)
    assert spline_zoom(x.half(), (31, 33)).dtype == torch.float32
    label = (x * 9).to(torch.uint8)
    assert spline_zoom(label, (31, 33)).dtype == torch.float32
    assert torch.equal(spline_zoom(label, (31, 33), order=0), spline_zoom(label.double(), (31, 33), order=0).byte())


def test_weights_first_used_in_inference_mode_serve_gradients_later() -> None:
    with torch.inference_mode():
        spline_zoom(torch.rand(1, 19, 23), (17, 29))
    x = torch.rand(1, 19, 23, requires_grad=True)
    spline_zoom(x, (17, 29)).sum().backward()
    assert x.grad is not None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("order", [0, 3])
def test_on_a_gpu(order: int) -> None:
    x = torch.rand(4, 1, 130, 100)
    out = spline_zoom(x.cuda(), (64, 70), order).cpu()
    torch.testing.assert_close(out, spline_zoom(x, (64, 70), order), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 20, 30), (1, 5, 20, 30)])
def test_affine_keeps_the_corners_in_place(shape: tuple[int, ...]) -> None:
    affine = torch.tensor([[0, 0, -2, 7], [0, -3, 0, 5], [4, 0, 0, -9], [0, 0, 0, 1.0]], dtype=torch.float64)
    image = MetaTensor(torch.rand(shape), affine=affine)
    out = spline_zoom(image, (41, 10))
    axes = [len(shape) - 3, len(shape) - 2]
    before, after = torch.zeros(2, 4, dtype=torch.float64)
    before[axes], after[axes] = torch.tensor([19.0, 29]).double(), torch.tensor([40.0, 9]).double()
    before[3] = after[3] = 1
    torch.testing.assert_close(out.affine @ after, affine @ before)
    torch.testing.assert_close(out.affine[:, 3], affine[:, 3])
    torch.testing.assert_close(image.affine, affine)


def test_dictionary_takes_an_order_per_key() -> None:
    data = {"image": torch.rand(1, 30, 20), "label": torch.randint(0, 9, (1, 30, 20)), "name": "case0001"}
    out = SplineZoomd(["image", "label"], (16, 24), order=(3, 0))(data)
    assert torch.equal(out["image"], spline_zoom(data["image"], (16, 24), 3))
    assert torch.equal(out["label"], spline_zoom(data["label"], (16, 24), 0))
    assert out["name"] == "case0001"
    assert data["image"].shape == (1, 30, 20)
    assert SplineZoomd("image", 16)(data)["image"].shape == (1, 16, 16)


@pytest.mark.parametrize(
    ("shape", "size", "order"),
    [
        ((8,), (4, 4), 3),
        ((0, 8), (4, 4), 3),
        ((8, 8), (4, 0), 3),
        ((8, 8), (4, -2), 0),
        ((8, 8), (4,), 3),
        ((8, 8), (4, 4), 6),
    ],
)
def test_bad_input(shape: tuple[int, ...], size: tuple[int, ...], order: int) -> None:
    with pytest.raises(ValueError, match=r"order|size|shape"):
        spline_zoom(np.zeros(shape), size, order)
