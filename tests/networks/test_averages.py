"""Networks made of networks answer with the mean of the logits, also frozen and scripted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from networks import CMUNeXt, Ensemble, FlipAverage
from networks.training import load_trained


def network(seed: int = 0, out_channels: int = 3) -> CMUNeXt:
    torch.manual_seed(seed)
    made = CMUNeXt(in_channels=3, out_channels=out_channels, dims=(4, 4, 8, 8, 8), kernel_sizes=(3,) * 5)
    return made.eval()


IMAGE = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_flips_are_turned_back_before_the_mean() -> None:
    one = network()
    views = [((), IMAGE), ((3,), IMAGE.flip(3)), ((2,), IMAGE.flip(2)), ((2, 3), IMAGE.flip(2, 3))]
    expected = torch.stack([one(image).flip(axes) for axes, image in views]).mean(0)
    torch.testing.assert_close(FlipAverage(one)(IMAGE), expected)
    torch.testing.assert_close(FlipAverage(one).frozen()(IMAGE), expected, atol=1e-4, rtol=1e-4)
    assert (expected - one(IMAGE)).abs().max() > 1e-3


@torch.no_grad()
def test_an_ensemble_is_the_mean_of_its_networks_and_can_be_scripted() -> None:
    networks = [network(seed) for seed in range(3)]
    expected = torch.stack([one(IMAGE) for one in networks]).mean(0)
    for made in (Ensemble(networks), Ensemble(networks).frozen(), torch.jit.script(Ensemble(networks))):
        torch.testing.assert_close(made(IMAGE), expected, atol=1e-4, rtol=1e-4)
    for wrong in ([], [network(), network(out_channels=2)]):
        with pytest.raises(ValueError, match="one number of out_channels"):
            Ensemble(wrong)


@torch.no_grad()
def test_several_checkpoints_are_averaged(tmp_path: Path) -> None:
    files = []
    for seed in (1, 2):
        files.append(tmp_path / f"{seed}.pt")
        torch.save(network(seed).state_dict(), files[-1])
    expected = (network(1)(IMAGE) + network(2)(IMAGE)) / 2
    torch.testing.assert_close(load_trained(network(), files).eval()(IMAGE), expected)
    with pytest.raises(FileNotFoundError, match="no weight file"):
        load_trained(network(), [files[0], tmp_path / "none.pt"])
