"""VM-UNet against the published outputs, for sizes the publication does not take, and through every way of export."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from networks import VMUNet
from tests.golden import fill

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

GOLDEN = Path(__file__).parents[1] / "golden"
SMALL = {"dims": (8, 16, 32, 64), "depths": (1, 1, 1, 1), "decoder_depths": (1, 1, 1, 1), "d_state": 4}
CONFIGURATIONS = {
    "vmunet_isic": {},
    "vmunet_synapse": {"out_channels": 9},
    "vmunet_44m": {"depths": (2, 2, 9, 2), "decoder_depths": (2, 9, 2, 2)},
}


def small(**changes: object) -> VMUNet:
    torch.manual_seed(0)
    network = VMUNet(**{**SMALL, **changes}).eval()
    fill.fill(network.state_dict())
    return network


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_published_outputs_names_and_sizes(name: str) -> None:
    golden = json.loads((GOLDEN / "networks.json").read_text())[name]
    network = VMUNet(**CONFIGURATIONS[name]).eval()
    state = {f"vmunet.{key}": tensor for key, tensor in network.state_dict().items()}
    assert {key: list(tensor.shape) for key, tensor in state.items()} == golden["state_dict"]
    assert sum(p.numel() for p in network.parameters()) == golden["parameters"]

    fill.fill(state, golden["seed"])
    image = torch.from_numpy(fill.image(golden["input"], golden["seed"]))
    with torch.no_grad():
        logits = network(image)
    expected = torch.from_numpy(np.load(GOLDEN / f"{name}.npz")["logits"])
    assert logits.shape == expected.shape
    assert relative_error(logits, expected) < 1e-4


@pytest.mark.parametrize("size", [(32, 32), (33, 64), (1, 1), (40, 56)])
@torch.no_grad()
def test_any_size_is_the_continued_image_cropped(size: tuple[int, int]) -> None:
    network, image = small(out_channels=4), torch.randn(2, 3, *size)
    rows, columns = (-length % 32 for length in size)
    continued = torch.nn.functional.pad(image, (0, columns, 0, rows), mode="replicate")
    assert network(image).shape == (2, 4, *size)
    torch.testing.assert_close(network(image), network(continued)[..., : size[0], : size[1]])


def test_channels_and_stages_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 or 1 channels, got an image of 2"):
        small()(torch.zeros(1, 2, 32, 32))
    for changes in ({"depths": (1, 1)}, {"dims": (8, 16, 32, 65)}):
        with pytest.raises(ValueError, match="dims"):
            small(**changes)


def test_published_initialisation() -> None:
    torch.manual_seed(0)
    block = VMUNet().requires_grad_(False).layers[0].blocks[0].self_attention
    assert block.in_proj.weight.std() == pytest.approx(0.02, rel=0.05)
    torch.testing.assert_close(block.A_logs.exp(), torch.arange(1.0, 17).expand(768, 16))
    assert torch.equal(block.Ds, torch.ones(768))
    assert block.dt_projs_weight.abs().max() <= 6**-0.5
    dt = torch.nn.functional.softplus(block.dt_projs_bias)
    assert 1e-3 * 0.999 < dt.min() < dt.max() < 0.1 * 1.001
    assert dt.log().std() == pytest.approx(np.log(100) / np.sqrt(12), rel=0.05)


def test_drop_path_rises_then_falls_and_acts_on_samples() -> None:
    network = VMUNet(**{**SMALL, "depths": (2, 1, 1, 1)}, drop_path_rate=0.2)
    rates = [block.drop_path.drop_prob for stage in network.layers for block in stage.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    rates = [block.drop_path.drop_prob for stage in network.layers_up for block in stage.blocks]
    assert rates == pytest.approx([0.2, 0.4 / 3, 0.2 / 3, 0])

    torch.manual_seed(0)
    drop = network.layers_up[0].blocks[0].drop_path.train()
    dropped = drop(torch.ones(5000, 2, 2, 3))
    torch.testing.assert_close(dropped.unique(), torch.tensor([0.0, 1.25]))
    assert torch.equal(dropped.amax((1, 2, 3)), dropped.amin((1, 2, 3)))
    assert dropped.mean() == pytest.approx(1, abs=0.03)


def test_checkpointing_changes_no_gradient() -> None:
    image = torch.randn(2, 3, 32, 32)
    gradients = []
    for use_checkpoint in (False, True):
        network = small(use_checkpoint=use_checkpoint, drop_path_rate=0.5).train()
        torch.manual_seed(1)
        network(image).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    torch.testing.assert_close(*gradients)


@torch.inference_mode()
def test_frozen_is_a_copy_whose_products_are_in_bfloat16() -> None:
    network, image = small().train(), torch.randn(1, 3, 32, 32)
    same, half = network.frozen(), network.frozen(bfloat16=True)
    assert network.training
    assert not same.training
    assert not half.training
    assert all(p.dtype == torch.float32 for p in network.parameters())
    torch.testing.assert_close(same(image), network.eval()(image), rtol=0, atol=0)
    stored = {name for name, p in half.named_parameters() if p.dtype == torch.bfloat16}
    products = ("x_proj_weight", "proj.weight", "proj.bias", "conv2d.weight", "conv2d.bias", "final_conv.weight")
    products += ("final_conv.bias", "reduction.weight", "expand.weight")
    assert stored == {name for name, _ in network.named_parameters() if name.endswith(products)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(half(image), same(image), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["script", "trace", "export", "compile"])
def test_exports_agree_with_eager(how: str) -> None:
    network = small(out_channels=2)
    example, image = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        if how == "script":
            other, image = torch.jit.script(network), torch.randn(3, 1, 40, 50)
        elif how == "trace":
            other = torch.jit.trace(network, example)
        elif how == "export":
            batch = {"x": {0: torch.export.Dim("batch", min=1, max=8)}}
            other = torch.export.export(network, (example,), dynamic_shapes=batch).module()
            image = torch.randn(3, 3, 32, 32)
        else:
            # aot_eager: no C++ compiler is needed to see that the graph is whole and right
            other = torch.compile(network, fullgraph=True, backend="aot_eager")
        # single values of a network with random weights differ by 1e-3 in float32 whatever the order of summation
        assert relative_error(other(image), network(image)) < 1e-4
