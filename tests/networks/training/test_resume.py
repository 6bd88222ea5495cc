"""A run that is killed at any moment and resumed ends with the same bits as one that was not."""

from __future__ import annotations

import operator
import os
import random
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Events
from ignite.metrics import Average
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import LrScheduleHandler, ValidationHandler, from_engine
from monai.transforms import Compose, OneOf, RandFlipd, RandGaussianNoised, RandRotate90d, ToTensord
from torch import nn

from networks.training import (
    Checkpoints,
    EpochSampler,
    FiniteAverage,
    Repeatable,
    SeededDataset,
    StepGuard,
    WeightAverage,
)
from networks.training.steps import poly_schedule
from transforms import replacing

EPOCHS, ITEMS, BATCH, SEED = 3, 11, 2, 7


class Slow:
    """Makes a step long enough to be killed in."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, item: Any) -> Any:
        time.sleep(self.seconds)
        return item


def train(
    folder: Path, workers: int = 0, seconds: float = 0.0, batch: int = BATCH, decay: float | None = None, **options: Any
) -> SupervisedTrainer:
    """A small training with everything random that the bundles have: order, transforms, dropout; and batch norms."""
    torch.manual_seed(SEED)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(4, 1, 1)
    )
    images = torch.rand(ITEMS, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = [{"image": image, "label": (image > 0.5).float()} for image in images]
    keys = ["image", "label"]
    transform = Compose(
        [
            RandRotate90d(keys, prob=0.5),
            OneOf([RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in (0, 1)]),
            RandGaussianNoised("image", prob=0.8),
            ToTensord(keys, track_meta=False),
            Slow(seconds),
        ]
    )
    dataset = SeededDataset(data, transform, SEED)
    sampler = EpochSampler(dataset, SEED)
    loader = DataLoader(dataset, batch_size=batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = poly_schedule(optimizer, EPOCHS * len(loader))
    loss = nn.BCEWithLogitsLoss()
    metric = {"loss": FiniteAverage(output_transform=from_engine(["loss"], first=True))}
    val_metric = Average(
        output_transform=lambda output: loss(
            *(torch.stack([item[key] for item in output]) for key in ("pred", "label"))
        )
    )
    average = None if decay is None else WeightAverage(network, decay)
    validated = average.network if average else network
    evaluator = SupervisedEvaluator(
        "cpu", DataLoader(data[:3], batch_size=1), validated, key_val_metric={"val_loss": val_metric},
        metric_cmp_fn=operator.lt,
    )  # fmt: skip
    trainer = SupervisedTrainer(
        "cpu", EPOCHS, loader, network, optimizer, loss, key_train_metric=metric,
        train_handlers=[
            Repeatable(SEED, sampler),
            StepGuard(network),
            *([average] if average else []),
            LrScheduleHandler(schedule, epoch_level=False, print_lr=False),
            ValidationHandler(1, evaluator),
        ],
    )  # fmt: skip
    more = {"trained": network, "average": average} if average else None
    checkpoints = Checkpoints(folder, validated, optimizer, schedule, replacing, metrics=metric, more=more, **options)
    trainer.add_event_handler(Events.COMPLETED, lambda: (folder / "done").touch())
    checkpoints.attach(trainer, evaluator)
    trainer.add_event_handler(Events.STARTED, lambda: (folder / "started").touch())
    trainer.run()
    return trainer


def in_a_process(*arguments: Any, kill_after: float | None = None, number: int = signal.SIGKILL, **options: Any) -> int:
    """Exit code of `train` in a process of its own, forked because the imports take seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            train(*arguments, **options)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    if kill_after is not None:
        while number != signal.SIGKILL and not (arguments[0] / "started").exists():
            time.sleep(0.01)
        time.sleep(kill_after)
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(folder: Path, name: str) -> dict[str, Any]:
    content = torch.load(folder / name, weights_only=True)
    kept = ("model", "optimizer", "lr_scheduler", "trained", "average")
    return content if name == "model.pt" else {key: content[key] for key in kept if key in content}


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Another number of threads rounds in another order, and those of OpenMP do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    assert in_a_process(folder) == 0
    return folder


def assert_same_end(folder: Path, whole: Path) -> None:
    for name in ("model.pt", "last.pt"):
        assert same(weights(folder, name), weights(whole, name)), name
    first, second = (torch.load(one / "last.pt", weights_only=True) for one in (folder, whole))
    assert first["selection"] == second["selection"]
    assert not list(folder.glob(".????????.*"))


def kill_and_resume(folder: Path, moments: list[float], workers: int, number: int = signal.SIGKILL) -> int:
    """Kills a run again and again and lets it go on; returns how often it really was running."""
    killed = 0
    for moment in moments:
        options = {"workers": workers, "seconds": 0.02, "resume": "auto", "minutes": 0.002}
        code = in_a_process(folder, kill_after=moment, number=number, **options)
        killed += code == -number
        if (folder / "done").exists():
            break
    if not (folder / "done").exists():
        assert in_a_process(folder, workers=workers, resume="auto") == 0
    return killed


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_to_the_same_bits(workers: int, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(workers)
    killed = 0
    for number in range(3):
        folder = tmp_path / str(number)
        killed += kill_and_resume(folder, [draw.uniform(0.05, 0.6) for _ in range(4)], workers)
        assert_same_end(folder, whole)
    assert killed >= 1


@pytest.mark.soak
@pytest.mark.parametrize("workers", [0, 2])
def test_fifty_kills(workers: int, whole: Path, tmp_path: Path) -> None:
    draw = random.Random(100 + workers)
    killed = 0
    for number in range(100):
        killed += kill_and_resume(tmp_path / str(number), [draw.uniform(0.02, 0.9) for _ in range(4)], workers)
        assert_same_end(tmp_path / str(number), whole)
        if killed >= 50:
            break
    assert killed >= 50


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGTERM, 2), (signal.SIGINT, 2), (signal.SIGUSR1, 0)])
def test_a_signal_lets_the_step_be_finished_and_saved(
    number: int, workers: int, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    code = in_a_process(tmp_path, workers=workers, seconds=0.05, kill_after=0.3, number=number)
    assert code == 0
    assert not (tmp_path / "done").exists()
    assert "Traceback" not in capfd.readouterr().err
    position = torch.load(tmp_path / "last.pt", weights_only=True)["position"]
    assert position["epoch"] < EPOCHS
    assert in_a_process(tmp_path, workers=workers, resume=True) == 0
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 5), (1, 11)])
def test_another_batch_size_repeats_and_skips_nothing(before: int, after: int, tmp_path: Path) -> None:
    """Stopped within an epoch, a run sees exactly the images of the epoch that are left."""
    in_a_process(tmp_path, batch=before, seconds=0.05, kill_after=0.2, number=signal.SIGTERM)
    position = torch.load(tmp_path / "last.pt", weights_only=True)["position"]
    seen: list[int] = []

    class Counting(SeededDataset):
        def _transform(self, index: int) -> Any:
            seen.append(index)
            return super()._transform(index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SeededDataset", Counting)
        trainer = train(tmp_path, batch=after, resume=True)
    left = ITEMS - position["seen"] + ITEMS * (EPOCHS - position["epoch"] - 1)
    assert len(seen) == len(set(seen)) == left
    assert trainer.state.epoch == EPOCHS


def test_a_second_stop_in_the_epoch_knows_what_the_first_had_seen(tmp_path: Path) -> None:
    """4 images, then 5 more with another batch size: 9 have been seen, and not the 10 of two batches of 5."""
    seen: list[int] = []

    class StopsAfter(SeededDataset):
        limit = 0

        def _transform(self, index: int) -> Any:
            seen.append(index)
            if len(seen) == self.limit:
                os.kill(os.getpid(), signal.SIGTERM)
            return super()._transform(index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "SeededDataset", StopsAfter)
        for batch, limit, expected in ((4, 3, 4), (5, 8, 9), (1, 10, 10)):
            StopsAfter.limit = limit
            train(tmp_path, batch=batch, resume="auto")
            position = torch.load(tmp_path / "last.pt", weights_only=True)["position"]
            assert (position["epoch"], position["seen"]) == (0, expected)
        StopsAfter.limit = 0
        train(tmp_path, batch=4, resume=True)
    assert len(seen) == len(set(seen)) == ITEMS * EPOCHS


@pytest.mark.parametrize("step", [1, 5, 6, 7, 11, 12, 13, 17])
def test_a_run_goes_on_from_any_step(step: int, whole: Path, tmp_path: Path) -> None:
    """Within the first epoch, a later one, or the last, and between two."""

    class Stops(Repeatable):
        def start_step(self, engine: Any) -> None:
            if engine.state.iteration == step:
                os.kill(os.getpid(), signal.SIGTERM)
            super().start_step(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Repeatable", Stops)
        train(tmp_path)
    position = torch.load(tmp_path / "last.pt", weights_only=True)["position"]
    assert (position["epoch"], position["step"]) == divmod(step, 6)
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("step", [1, 7, 12, 17])
def test_averaged_weights_go_on_from_any_step(step: int, tmp_path: Path) -> None:
    """`model.pt` holds the average; `last.pt` that, the weights that are trained, and how many steps it is of."""
    options = {"decay": 0.8}
    train(tmp_path / "whole", **options)

    class Stops(Repeatable):
        def start_step(self, engine: Any) -> None:
            if engine.state.iteration == step:
                os.kill(os.getpid(), signal.SIGTERM)
            super().start_step(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "Repeatable", Stops)
        train(tmp_path / "stopped", **options)
    last = weights(tmp_path / "stopped", "last.pt")
    assert last["average"] == {"steps": step}
    assert same(last["model"], last["trained"]) == (step == 1)
    train(tmp_path / "stopped", resume=True, **options)
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")
    assert weights(tmp_path / "stopped", "last.pt")["average"] == {"steps": 18}


class FailsOnce:
    """Stands for an image that cannot be read, or for a loader's process that the system kills."""

    def __init__(self, mark: Path, kill: bool) -> None:
        self.mark = mark
        self.kill = kill
        self.number = 0

    def __call__(self, item: Any) -> Any:
        self.number += 1
        if self.number == 15 and not self.mark.exists():
            self.mark.touch()
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("image file is truncated")
        return item


@pytest.mark.parametrize("kill", [False, True])
def test_what_fails_while_data_are_loaded_loses_nothing(
    kill: bool, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Slow", lambda seconds: FailsOnce(tmp_path / "failed", kill))
    line = (
        r"a process that loads images was killed, its last file was item \d+; .*--num_workers 0" if kill else "applying"
    )
    with pytest.raises((ValueError, RuntimeError), match=line) as caught:
        train(tmp_path, workers=int(kill))
    assert not kill or "\n" not in str(caught.value)
    position = torch.load(tmp_path / "last.pt", weights_only=True)["position"]
    assert position["epoch"] == 1
    # a loader works ahead, and its end may come in the middle of a step
    assert position["seen"] or kill
    log = (tmp_path / "training.log").read_text()
    assert re.search(r"ERROR .*(its last file was item|applying)", log)
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)
    assert (tmp_path / "training.log").read_text().startswith(log)


def test_a_failure_after_a_step_does_not_count_the_step_twice(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handler that fails, TensorBoard's on a full disk for instance, when the weights have moved already."""

    class Failing(LrScheduleHandler):
        def __call__(self, engine: Any) -> None:
            if engine.state.iteration == 9 and not (tmp_path / "last.previous.pt").exists():
                raise OSError(28, "No space left on device")
            super().__call__(engine)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules[__name__], "LrScheduleHandler", Failing)
        with pytest.raises(OSError, match="No space left"):
            train(tmp_path)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["position"]["epoch"] == 1
    train(tmp_path, resume=True)
    assert_same_end(tmp_path, whole)


def test_signals_are_the_programs_again_when_the_run_is_over(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    train(tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_workers_change_nothing(whole: Path, tmp_path: Path) -> None:
    assert in_a_process(tmp_path, workers=2) == 0
    assert_same_end(tmp_path, whole)


ENDING = """
import sys
from pathlib import Path
from tests.networks.training.test_resume import train
trainer = train(Path(sys.argv[1]), workers=2)
# something holds the loader's iterator until the interpreter ends
sys.modules["holder"] = trainer
"""


def test_a_run_with_workers_ends(tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    subprocess.run([sys.executable, "-c", ENDING, str(tmp_path)], env=environment, check=True, timeout=150)
