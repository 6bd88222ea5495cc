"""A volume of 148×512×512 through `SliceToVolume`: the time outside the network, and peak memory."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.harness import Row, memory_row, peak_memory, row
from evaluation import SliceToVolume
from networks import VMUNet, cmunext_s
from networks.training import prepare_network

SHAPE = (1, 1, 148, 512, 512)


class Timed(nn.Module):
    """A network that adds up its own seconds."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.seconds = 0.0

    def forward(self, x: Tensor) -> Tensor:
        start = time.perf_counter()
        y = self.network(x)
        self.seconds += time.perf_counter() - start
        return y


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    network = (VMUNet(out_channels=9) if name == "VM-UNet" else cmunext_s(1, 9)).eval()
    return prepare_network(network, torch.device("cpu"), frozen=True)


def infer(name: str) -> tuple[float, float]:
    """Seconds in all, and those of the network."""
    network = Timed(build(name))
    volume = torch.rand(SHAPE)
    inferer = SliceToVolume((224, 224))
    inferer(volume[:, :, :16], network)
    network.seconds = 0.0
    start = time.perf_counter()
    inferer(volume, network)
    return time.perf_counter() - start, network.seconds


def rows() -> Iterator[Row]:
    for name, goal in (("CMUNeXt-S", 0.08), ("VM-UNet", 0.03)):
        total, of_network = infer(name)
        what = f"volume of 148×512×512, {name}"
        yield row(f"{what}: share of the time outside the network", total - of_network, total, "lower", goal)
        yield memory_row(
            f"{what}: peak memory, the volume included, relative to 3 GiB", peak_memory(infer, name), 3072, 1
        )
