from __future__ import annotations

import operator
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler, from_engine
from torch import nn

from evaluation import MeanLoss
from networks import CMUNeXt, training
from networks.training import (
    Checkpoints,
    EpochSampler,
    FiniteAverage,
    Repeatable,
    SeededDataset,
    Share,
    StepGuard,
    WatchedDataset,
    poly_schedule,
    prepare_network,
)
from networks.training.processes import share_batch_norms
from transforms import replacing

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


# A run of several processes that goes on with another number of them


def run_of_processes(rank: int, world: int, folder: Path, stop_after: int = 0, few: int = 5, patience: int = 0) -> None:
    """A training on 12 images in batches of 4 over all processes, with validation and batch norms over all.

    With `patience` the highest loss counts as the best score, which a training that learns reaches in its first epoch.
    """
    if world > 1:
        os.environ["LOCAL_RANK"] = str(rank)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet{world}", rank=rank, world_size=world)
        idist.sync()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1)).double()
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    data = [{"image": image, "label": (image > 0.5).double()} for image in images]
    dataset, held_out = SeededDataset(data, [], 7), WatchedDataset(data[:few], [])
    sampler = EpochSampler(dataset, 7)
    loader = DataLoader(dataset, batch_size=4 // world, sampler=sampler)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = poly_schedule(optimizer, 4 * len(loader))
    loss = nn.BCEWithLogitsLoss()
    prepared = prepare_network(network, "cpu", sync_batch_norm=True)
    metric = {"loss": FiniteAverage(output_transform=from_engine(["loss"], first=True))}
    evaluator = SupervisedEvaluator(
        "cpu", DataLoader(held_out, batch_size=1, sampler=Share(held_out, few="all")), prepared,
        key_val_metric={"val_loss": MeanLoss(loss)}, metric_cmp_fn=operator.gt if patience else operator.lt,
    )  # fmt: skip
    seen: list[Any] = []
    evaluator.add_event_handler(Events.ITERATION_COMPLETED, lambda: seen.append(1))
    trainer = SupervisedTrainer(
        "cpu", 4, loader, prepared, optimizer, loss, key_train_metric=metric,
        train_handlers=[
            Repeatable(7, sampler),
            StepGuard(network),
            LrScheduleHandler(schedule, epoch_level=False, print_lr=False),
            ValidationHandler(1, evaluator),
        ],
    )  # fmt: skip
    checkpoints = Checkpoints(
        folder, network, optimizer, schedule, replacing, metrics=metric, resume="auto", patience=patience
    )
    checkpoints.attach(trainer, evaluator)
    if stop_after:
        # one process alone is told to stop
        @trainer.on(Events.ITERATION_STARTED(once=stop_after))
        def stop() -> None:
            if rank == world - 1:
                os.kill(os.getpid(), signal.SIGTERM)

    trainer.run()
    if not stop_after:
        assert len(seen) % (few if few < world else len(Share(range(few)))) == 0
    if world > 1:
        dist.destroy_process_group()


def in_processes(world: int, *arguments: Any, **options: Any) -> None:
    """`run_of_processes` in forked ones, because the imports take seconds."""
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            code = 1
            try:
                run_of_processes(rank, world, *arguments, **options)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * world


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's threads do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_another_number_of_processes_goes_on_to_the_same_end(tmp_path: Path) -> None:
    """Stopped in the middle of an epoch, resumed by more and by fewer processes: as one process, uninterrupted."""
    folders = [tmp_path / name for name in ("one", "few", "grows", "shrinks")]
    for folder in folders:
        folder.mkdir()
    one, few, grows, shrinks = folders
    in_processes(1, one)
    in_processes(1, grows, stop_after=5)
    in_processes(2, grows)
    in_processes(2, shrinks, stop_after=5)
    assert torch.load(shrinks / "last.pt", weights_only=True)["position"] == {
        "epoch": 1, "step": 2, "steps": 3, "seen": 8
    }  # fmt: skip
    in_processes(1, shrinks)
    assert_same_end(folders=[one, grows, shrinks])
    # one case to validate on, which both processes see
    shutil.rmtree(one)
    one.mkdir()
    in_processes(1, one, few=1)
    in_processes(2, few, few=1)
    assert_same_end(folders=[one, few])


@pytest.mark.usefixtures("one_thread")
def test_patience_ends_all_processes_in_the_same_epoch(tmp_path: Path) -> None:
    folders = [tmp_path / "1", tmp_path / "2"]
    for world, folder in enumerate(folders, start=1):
        folder.mkdir()
        in_processes(world, folder, patience=2)
    state = torch.load(folders[1] / "last.pt", weights_only=True)
    assert (state["position"]["epoch"], state["selection"]["best_epoch"], state["selection"]["since_best"]) == (3, 1, 2)
    assert_same_end(folders)


def assert_same_end(folders: list[Path]) -> None:
    one = folders[0]
    states = [torch.load(folder / "last.pt", weights_only=True) for folder in folders]
    for folder, state in zip(folders[1:], states[1:], strict=True):
        assert state["position"] == states[0]["position"]
        assert state["selection"]["best"] == pytest.approx(states[0]["selection"]["best"], rel=1e-9)
        for key in ("best_epoch", "since_best"):
            assert state["selection"][key] == states[0]["selection"][key]
        best = torch.load(folder / "model.pt", weights_only=True)
        for name, tensor in torch.load(one / "model.pt", weights_only=True).items():
            torch.testing.assert_close(best[name], tensor, rtol=1e-8, atol=1e-8)
            torch.testing.assert_close(state["model"][name], states[0]["model"][name], rtol=1e-8, atol=1e-8)
