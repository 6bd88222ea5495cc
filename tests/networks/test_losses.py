"""The losses against the published values and against the formulas written out in NumPy."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from networks.losses import BCEDiceLoss, CEDiceLoss
from tests.golden import fill

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses_and_metrics.json").read_text())


def golden_binary() -> tuple[torch.Tensor, torch.Tensor]:
    logits, target = (fill._noise(name, (3, 1, 40, 56), 0) for name in ("binary_logits", "binary_target"))
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(target > 0.8, dtype=torch.float32)


def golden_multi() -> tuple[torch.Tensor, torch.Tensor]:
    logits = fill._noise("multi_logits", (2, 9, 32, 48), 0)
    target = np.clip(np.floor(4 * np.abs(fill._noise("multi_target", (2, 32, 48), 0))), 0, 8)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(target, dtype=torch.long)


LOSSES = [
    pytest.param(BCEDiceLoss(bce_weight=0.5, smooth=1e-5), golden_binary, "cmunext_bce_dice", id="cmunext"),
    pytest.param(BCEDiceLoss(), golden_binary, "vmunet_bce_dice", id="vmunet-binary"),
    pytest.param(CEDiceLoss(), golden_multi, "vmunet_ce_dice", id="vmunet-multi"),
]


@pytest.mark.parametrize(("loss", "data", "name"), LOSSES)
def test_value_and_gradient_are_the_published_ones(loss, data, name):
    logits, target = data()
    value = loss(logits.requires_grad_(), target)
    value.backward()
    assert value.item() == pytest.approx(GOLDEN[name]["value"], rel=1e-5)
    assert logits.grad.norm().item() == pytest.approx(GOLDEN[name]["grad_norm"], rel=1e-5)
    assert logits.grad.abs().sum().item() == pytest.approx(GOLDEN[name]["grad_sum_abs"], rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(0.1, 2), st.floats(1e-5, 1))
def test_binary_loss_is_its_formula_with_soft_masks(seed, batch, bce_weight, smooth):
    rng = np.random.default_rng(seed)
    logits, g = rng.normal(0, 3, (batch, 1, 5, 7)), rng.random((batch, 1, 5, 7))
    p = 1 / (1 + np.exp(-logits))
    bce = -(g * np.log(p) + (1 - g) * np.log(1 - p)).mean()
    dice = (2 * (p * g).sum((1, 2, 3)) + smooth) / (p.sum((1, 2, 3)) + g.sum((1, 2, 3)) + smooth)
    value = BCEDiceLoss(bce_weight, smooth)(torch.tensor(logits), torch.tensor(g))
    assert value.item() == pytest.approx(bce_weight * bce + (1 - dice).mean(), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(2, 5))
def test_multi_class_loss_is_its_formula(seed, batch, classes):
    rng = np.random.default_rng(seed)
    logits, label = rng.normal(0, 3, (batch, classes, 4, 6)), rng.integers(0, classes, (batch, 4, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g = np.moveaxis(np.eye(classes)[label], -1, 1)
    cross_entropy = -(g * np.log(p)).sum(1).mean()
    dice = (2 * (p * g).sum((0, 2, 3)) + 1e-5) / ((p**2).sum((0, 2, 3)) + (g**2).sum((0, 2, 3)) + 1e-5)
    for target in (torch.tensor(label), torch.tensor(label)[:, None].float()):
        value = CEDiceLoss()(torch.tensor(logits), target)
        assert value.item() == pytest.approx(cross_entropy + (1 - dice).mean(), rel=1e-6)


@pytest.mark.parametrize(("loss", "data", "name"), LOSSES)
def test_stays_finite_for_huge_logits(loss, data, name):
    logits, target = data()
    logits = (1e4 * logits).requires_grad_()
    value = loss(logits, target)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("loss", "data", "name"), LOSSES)
def test_computes_in_float32_under_autocast(loss, data, name):
    logits, target = data()
    logits = logits.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(logits, target)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, loss(logits.float(), target), rtol=0, atol=0)


def test_binary_masks_of_any_dtype_are_accepted():
    logits, target = golden_binary()
    expected = BCEDiceLoss()(logits, target)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float64):
        assert BCEDiceLoss()(logits, target.to(dtype)) == expected


@pytest.mark.parametrize(
    ("loss", "logits", "target"),
    [
        (BCEDiceLoss(), (2, 1, 8, 8), (2, 8, 8)),
        (BCEDiceLoss(), (2, 1, 8, 8), (2, 1, 8, 9)),
        (CEDiceLoss(), (2, 3, 8, 8), (2, 3, 8, 8)),
        (CEDiceLoss(), (2, 3, 8, 8), (1, 8, 8)),
        (CEDiceLoss(), (2, 1, 8, 8), (2, 1, 8, 8)),
    ],
)
def test_wrong_shapes_are_named(loss, logits, target):
    with pytest.raises(ValueError, match=r"\(2, \d, 8, 8\)"):
        loss(torch.zeros(logits), torch.zeros(target))
