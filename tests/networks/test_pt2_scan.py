"""The selective scan in exported programs: any length and batch, groups and options, against the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from networks import VMUNet
from networks.selective_scan import pt2, reference
from networks.selective_scan.pt2 import exporting, to_pt2


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 250])
@pytest.mark.parametrize(("groups", "whole"), [(1, True), (3, False)])
def test_three_loops_are_one_scan(groups: int, whole: bool, length: int) -> None:
    generator = torch.Generator().manual_seed(length)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    u, delta, A = noise(2, 6, length), noise(2, 6, length).abs(), -noise(6, 4).abs()
    B, C = noise(2, groups, 4, length), noise(2, groups, 4, length)
    D, bias = (noise(6), noise(6)) if whole else (None, None)
    expected = reference.selective_scan(u, delta, A, B, C, D, bias, whole)
    found = pt2.selective_scan(u, delta, A, B, C, D, bias, whole)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_vmunet_is_one_program_for_any_batch_and_size(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = VMUNet(3, 2, depths=(1, 1), decoder_depths=(1, 1), dims=(8, 16), d_state=4).eval()
    torch.export.save(to_pt2(network.frozen(), torch.zeros(2, 3, 24, 16)), tmp_path / "a.pt2")
    assert not exporting()
    program = torch.export.load(tmp_path / "a.pt2").module()
    # conditions: two of the deepest positions a side
    for shape in ((1, 9, 9), (2, 24, 16), (3, 40, 17), (1, 50, 64)):
        image = torch.rand(shape[0], 3, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(program(image), network(image), atol=1e-4, rtol=1e-4)


def test_a_network_that_pads_nothing_is_taken_as_it_is() -> None:
    network = nn.Conv2d(1, 2, 3, padding=1).eval()
    image = torch.rand(1, 1, 1, 7)
    with torch.no_grad():
        expected = network(image)
        found = to_pt2(network, torch.zeros(2, 1, 8, 8)).module()(image)
    torch.testing.assert_close(found, expected)
