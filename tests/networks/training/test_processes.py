from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from networks import CMUNeXt, training
from networks.training import EpochSampler, Share, prepare_network
from networks.training.processes import share_batch_norms

ROOT = Path(__file__).parents[3]


def test_processes_are_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="few must be refuse or all, not 'some'"):
        Share("abc", few="some")
    with pytest.raises(ValueError, match="multi_gpu.yaml runs under torchrun --standalone --nproc_per_node=N"):
        training.start_process_group()


@pytest.mark.parametrize("count", [2, 7, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_and_epochs_hold_every_item(count: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_rank(rank: int) -> tuple[list[int], list[int]]:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: world > 1)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: world)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda: rank)
        sampler = EpochSampler(range(count), seed=0)
        sampler.set_epoch(2)
        epoch = list(sampler)
        assert len(epoch) == len(sampler)
        assert {index // count for index in epoch} == {2}
        share, everywhere = Share(range(count)), Share(range(count), few="all")
        assert list(everywhere) == (list(share) if count >= world else list(range(count)))
        assert len(share) == len(list(share))
        return list(share), [index % count for index in epoch]

    if count < world:
        with pytest.raises(ValueError, match=f"there are {count} to share out: start as many processes, not {world}"):
            of_rank(0)
        return
    shares, epochs = zip(*(of_rank(rank) for rank in range(world)), strict=True)
    assert [index for share in shares for index in share] == list(range(count))
    assert {index for epoch in epochs for index in epoch} == set(range(count))
    assert len({len(epoch) for epoch in epochs}) == 1


STEPS = 4


def trained(rank: int, world: int) -> dict[str, Any]:
    """A few steps of a network with batch norms on this process's part of the batches."""
    torch.manual_seed(0)
    # in float64, because these steps blow rounding errors up
    network = CMUNeXt(dims=(4, 4, 8, 8, 8), kernel_sizes=(3,) * 5).double()
    prepared = prepare_network(network, "cpu", sync_batch_norm=True)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    draw = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.rand(4, 3, 32, 32, generator=draw, dtype=torch.float64)
        mine = images[rank::world]
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(prepared(mine), (mine[:, :1] > 0.5).double()).backward()
        optimizer.step()
    return network.state_dict()


SCRIPT = """
import sys, torch
from networks.training import start_process_group
from tests.networks.training.test_processes import trained
start_process_group()
rank = torch.distributed.get_rank()
state = trained(rank, torch.distributed.get_world_size())
torch.save(state, f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_shared_batch_norms_make_two_processes_one(tmp_path: Path) -> None:
    """PyTorch's SyncBatchNorm does not run on CPUs; losses differed by 1e-2 without."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one = trained(0, 1)
    for rank in range(2):
        other = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for name, tensor in one.items():
            torch.testing.assert_close(
                other[name], tensor, rtol=1e-8, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
            )


def test_shared_batch_norms_are_plain_ones_in_one_process() -> None:
    torch.manual_seed(0)
    plain, shared = nn.BatchNorm2d(3), share_batch_norms(nn.Sequential(nn.BatchNorm2d(3)))
    image = torch.rand(2, 3, 4, 5)
    assert torch.equal(shared(image), plain(image))
    assert shared.state_dict().keys() == {f"0.{name}" for name in plain.state_dict()}
