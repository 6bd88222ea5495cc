"""Multiply-accumulates against the published numbers and by hand; tiny networks are measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import networks
from experiments import cost
from experiments.cost import count, input_of, measured
from networks.selective_scan import selective_scan
from tests.experiments.conftest import MakePlan


@pytest.mark.parametrize(("name", "gmac"), [("cmunext_s", 1.01), ("cmunext", 7.23), ("cmunext_l", 16.85)])
def test_macs_are_the_published_ones(name: str, gmac: float) -> None:
    # they grow with the number of pixels
    macs, why = count(getattr(networks, name)().eval(), torch.zeros(1, 3, 64, 64))
    assert why == ""
    assert macs is not None
    assert round(macs * 16 / 1e9, 2) == gmac


class Scan(nn.Module):
    """One scan of (batch, channels, length) with four states."""

    scan_backend: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        states = x.new_ones(x.shape[0], 1, 4, x.shape[2])
        return selective_scan(x, x, -x.new_ones(x.shape[1], 4), states, states, backend=self.scan_backend)


def test_a_scan_is_counted_by_its_formula() -> None:
    pytest.importorskip("networks.selective_scan.cpu")
    if networks.selective_scan.default_backend(torch.device("cpu")) != "cpu":
        pytest.skip("the native kernel is not built")
    assert count(Scan(), torch.zeros(2, 3, 5)) == (2 * 3 * 5 * (4 * 4 + 2), "")
    # in four directions, with the projection of the time steps
    small = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1, 1], "d_state": 4}
    network = networks.VMUNet(**small).eval()
    scans = [module for module in network.modules() if hasattr(module, "scan_backend")]
    with_scans, _ = count(network, torch.zeros(1, 3, 32, 32))
    seen: list[int] = []
    for scan in scans:
        scan.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1] * args[0].shape[2]))
    network(torch.zeros(1, 3, 32, 32))
    by_hand = 0
    for scan, pixels in zip(scans, seen, strict=True):
        directions, channels, rank = scan.dt_projs_weight.shape
        by_hand += pixels * directions * channels * (4 * 4 + 2 + rank)
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 32, 32))
    assert with_scans == counter.get_total_flops() // 2 + by_hand


def test_what_is_not_counted_is_said() -> None:
    scan = Scan()
    scan.scan_backend = "parallel"
    assert count(scan, torch.zeros(1, 2, 3)) == (None, "the selective scan is counted where its native kernel is built")

    @torch.library.custom_op("tests_cost::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return 2 * x

    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return twice(x)

    assert count(Own(), torch.zeros(1)) == (None, "the operator tests_cost::twice is not counted")


def test_networks_are_measured_once(make_plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "_memory", lambda *arguments: 1.5)
    inputs = {cell.row: input_of(cell) for cell in make_plan().cells}
    assert all(one.shape == (3, 32, 32) for one in inputs.values())
    found, facts = measured(inputs, tmp_path / "costs.json")
    assert facts["threads"] == torch.get_num_threads()
    for name, one in found.items():
        assert one.parameters == sum(parameter.numel() for parameter in inputs[name].build().parameters())
        assert one.latency_ms is not None
        assert one.latency_ms > 0
    before = (tmp_path / "costs.json").read_bytes()
    row = "recipe/CMUNeXt"
    assert measured({row: inputs[row]}, tmp_path / "costs.json") == ({row: found[row]}, facts)
    assert (tmp_path / "costs.json").read_bytes() == before
    # a file that is none is measured anew
    (tmp_path / "costs.json").write_text("[]")
    measured({row: inputs[row]}, tmp_path / "costs.json")
    assert len(json.loads((tmp_path / "costs.json").read_text())["costs"]) == 1


def test_channels_are_those_of_the_data(make_plan: MakePlan) -> None:
    entry = {"bundle": "vmunet_synapse", "data": "d"}
    networks_of = {"BasicUNet": {"_target_": "BasicUNet", "spatial_dims": 2}}
    (cell,) = make_plan(bundles={"a": entry}, networks=networks_of, folds=None, baseline=None).cells
    one = input_of(cell)
    assert one.shape == (1, 32, 32)
    assert one.build()(torch.zeros(1, *one.shape)).shape == (1, 9, 32, 32)
