"""CMUNeXt against the published outputs, for sizes the publication does not take, and through every way of export."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from networks.cmunext import CMUNeXt, cmunext, cmunext_l, cmunext_s
from tests.golden import fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

GOLDEN = Path(__file__).parents[1] / "golden"
NETWORKS = json.loads((GOLDEN / "networks.json").read_text())
FACTORIES = {
    "cmunext_s": cmunext_s,
    "cmunext": cmunext,
    "cmunext_l": cmunext_l,
    "cmunext_9class": partial(cmunext, in_channels=1, out_channels=9),
}


@pytest.fixture(scope="module")
def small() -> CMUNeXt:
    """The small variant in eval mode, with norms that do something."""
    model = cmunext_s(in_channels=1, out_channels=2).eval()
    fill.fill(model.state_dict())
    return model


def noise(*shape: int) -> torch.Tensor:
    return torch.from_numpy(fill.image(shape))


@pytest.mark.parametrize("name", FACTORIES)
@torch.inference_mode()
def test_published_outputs_names_and_sizes(name: str) -> None:
    model = FACTORIES[name]().eval()
    assert {key: list(tensor.shape) for key, tensor in model.state_dict().items()} == NETWORKS[name]["state_dict"]
    assert sum(p.numel() for p in model.parameters()) == NETWORKS[name]["parameters"]
    fill.fill(model.state_dict())
    logits = model(noise(*NETWORKS[name]["input"])).numpy()
    published = np.load(GOLDEN / f"{name}.npz")["logits"]
    assert np.linalg.norm(logits - published) <= 1e-5 * np.linalg.norm(published)


@settings(max_examples=15, deadline=None)
@given(height=st.integers(1, 50), width=st.integers(1, 50))
@torch.inference_mode()
def test_any_size_is_continued_at_the_lower_and_right_edge(small: CMUNeXt, height: int, width: int) -> None:
    x = noise(1, 1, height, width)
    rows = np.minimum(np.arange(-(-height // 16) * 16), height - 1)
    columns = np.minimum(np.arange(-(-width // 16) * 16), width - 1)
    expected = small(x[:, :, rows][..., columns])[..., :height, :width]
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-6)


def test_every_parameter_is_trained() -> None:
    torch.manual_seed(0)
    model = cmunext_s()
    model(noise(2, 3, 32, 32)).square().mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(
    ("export", "sizes"),
    [
        (torch.jit.script, [(2, 1, 32, 48), (1, 1, 37, 21)]),
        (lambda small: torch.jit.trace(small, noise(2, 1, 32, 48)), [(1, 1, 37, 21)]),
        (lambda small: torch.compile(small, fullgraph=True, backend="aot_eager"), [(2, 1, 37, 21)]),
        (lambda small: with_dynamic_batch(small, noise(2, 1, 37, 21)), [(3, 1, 37, 21)]),
    ],
    ids=["script", "trace", "compile", "export"],
)
@torch.no_grad()
def test_exports_agree_with_eager(
    export: Callable[[CMUNeXt], Callable[..., torch.Tensor]], sizes: list[tuple[int, ...]], small: CMUNeXt
) -> None:
    exported = export(small)
    for size in sizes:
        torch.testing.assert_close(exported(noise(*size)), small(noise(*size)))


def with_dynamic_batch(network: nn.Module, image: torch.Tensor) -> nn.Module:
    return torch.export.export(network, (image,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()


@pytest.mark.parametrize("name", FACTORIES)
@torch.inference_mode()
def test_frozen_merges_norms_and_changes_nothing_up_to_rounding(name: str) -> None:
    network = FACTORIES[name]()
    fill.fill(network.state_dict())
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    frozen = network.frozen()
    assert network.training
    assert not frozen.training
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in m.modules()) for m in (network, frozen)]
    # what stays: two for each repetition in the encoder, one for each skip fusion but the last
    assert norms[1] == 2 * len([key for key in before if key.endswith("0.fn.0.weight")]) + 3 < norms[0]
    x = noise(*NETWORKS[name]["input"])
    torch.testing.assert_close(frozen(x), network.eval()(x), rtol=0, atol=1e-4)


@torch.inference_mode()
def test_frozen_in_bfloat16_stores_what_autocast_would_round(small: CMUNeXt) -> None:
    x, frozen, half = noise(1, 1, 32, 32), small.frozen(), small.frozen(bfloat16=True)
    assert all(p.dtype == torch.float32 for p in small.parameters())
    for module in half.modules():
        expected = torch.bfloat16 if isinstance(module, nn.Conv2d) else torch.float32
        assert {p.dtype for p in module.parameters(recurse=False)} <= {expected}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(half(x), frozen(x), rtol=0, atol=0)


def test_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="5 stages"):
        CMUNeXt(dims=(16, 32, 64, 128))
    with pytest.raises(ValueError, match="odd"):
        CMUNeXt(kernel_sizes=(3, 3, 7, 8, 7))
