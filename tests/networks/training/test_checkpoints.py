from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable
from pathlib import Path
from pickle import PicklingError
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from networks.training import (
    Checkpoints,
    load_trained,
    start_from,
)
from transforms import replacing

BATCHES = [None] * 3


class Run:
    """A trainer that moves one weight a step, scored after each epoch by an evaluator that follows `scores`."""

    def __init__(
        self, folder: Path, scores: list[float], lowest: bool = False, epochs: int = 0, **options: Any
    ) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1.0, momentum=0.5)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.trainer, self.evaluator = Engine(self.step), Engine(lambda engine, batch: None)
        self.trainer.state.max_epochs = epochs or len(scores)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.scheduler.step())
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.evaluator.run([None]))
        self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.score)
        self.scores = scores
        for engine, batches in ((self.trainer, BATCHES), (self.evaluator, [None])):
            engine.state.key_metric_name = "score"
            engine.metric_cmp_fn = operator.lt if lowest else operator.gt
            engine.data_loader = batches
        self.checkpoints = Checkpoints(
            folder, self.network, self.optimizer, self.scheduler, replacing=replacing, **options
        )

    def step(self, engine: Engine, batch: None) -> None:
        self.optimizer.zero_grad()
        self.network(-torch.ones(1, 1)).sum().backward()
        self.optimizer.step()

    def score(self, engine: Engine) -> None:
        engine.state.metrics["score"] = self.scores[self.trainer.state.epoch - 1]

    def __call__(self) -> Run:
        self.checkpoints.attach(self.trainer, self.evaluator)
        self.trainer.run(BATCHES, max_epochs=self.trainer.state.max_epochs)
        return self

    @property
    def weight(self) -> float:
        return self.network.weight.item()


def saved(path: Path) -> Any:
    return torch.load(path, weights_only=True)


NAN = math.nan
UP_AND_DOWN = [0.1, 0.5, 0.4, 0.5, 0.6, 0.1, 0.1, 0.7]


@pytest.mark.parametrize(
    ("scores", "options", "epochs", "selection"),
    [
        ([0.5, 0.2, 0.9, 0.9, NAN, 0.4], {}, 6, (0.9, 3, 3)),
        ([0.5, 0.2, 0.9, 0.9, NAN, 0.4], {"lowest": True}, 6, (0.2, 2, 4)),
        ([NAN, NAN], {}, 2, (None, 0, 2)),
        (UP_AND_DOWN, {"patience": 2}, 4, (0.5, 2, 2)),
        (UP_AND_DOWN, {"patience": 3}, 8, (0.7, 8, 0)),
    ],
)
def test_the_best_epoch_is_kept_beside_the_last_until_patience_ends(
    tmp_path: Path, scores: list[float], options: dict[str, Any], epochs: int, selection: tuple[float | None, int, int]
) -> None:
    run = Run(tmp_path / "new", scores, **options)
    if selection[0] is None:
        with pytest.raises(ValueError, match=r"score was not finite in any epoch: there is no model\.pt, .*last\.pt"):
            run()
    else:
        run()
    last = saved(tmp_path / "new/last.pt")
    assert last["model"]["weight"].item() == run.weight
    assert last["trainer"]["iteration"] == epochs * len(BATCHES)
    assert last["selection"] == dict(zip(("best", "best_epoch", "since_best"), selection, strict=True))
    if best_epoch := selection[1]:
        until_best = Run(tmp_path / "other", scores[:best_epoch])()
        assert saved(tmp_path / "new/model.pt")["weight"].item() == until_best.weight
    assert sorted(os.listdir(tmp_path / "new")) == ["last.pt", "model.pt"][: 2 if best_epoch else 1]


def test_a_training_that_never_validates_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.1, 0.2])
    run.evaluator.run = lambda data: None
    with pytest.raises(ValueError, match=r"score was never computed, as no validation ran: there is no model\.pt"):
        run()
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_training_chooses_where_nothing_is_held_out(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.5, 0.7, 0.6], lowest=True)
    run.evaluator.data_loader = []
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: run.score(run.trainer))
    run()
    assert saved(tmp_path / "last.pt")["selection"] == {"best": 0.5, "best_epoch": 1, "since_best": 2}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    scores = [0.1, 0.8, 0.5, 0.3, 0.2, 0.9]
    whole = Run(tmp_path / "whole", scores)()
    Run(tmp_path / "parts", scores[:3])()
    resumed = Run(tmp_path / "parts", scores, resume=True, seed=7)()
    assert torch.initial_seed() == 7 + 3
    assert resumed.weight == whole.weight
    for name in ("last.pt", "model.pt"):
        one, other = (saved(tmp_path / part / name) for part in ("whole", "parts"))
        assert str(one) == str(other)
    assert resumed.scheduler.last_epoch == 6


def test_patience_counts_across_a_resumption(tmp_path: Path) -> None:
    scores = [0.9, 0.5, 0.5, 0.5, 0.5, 0.5]
    Run(tmp_path, scores[:3])()
    assert Run(tmp_path, scores, resume=True, patience=3)().trainer.state.epoch == 4
    # a smaller patience that has run out already
    assert Run(tmp_path, scores, resume=True, patience=1)().trainer.state.epoch == 5


def test_what_cannot_be_resumed_is_one_line(tmp_path: Path) -> None:
    def message(**options: Any) -> str:
        with pytest.raises((OSError, ValueError), match=r"last\.pt") as caught:
            Run(tmp_path, [0.1, 0.2], resume=True, **options)()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "last.pt"
    assert message() == f"{path} does not exist: start without --resume, or name the run's --ckpt_dir"
    Run(tmp_path, [0.1, 0.2])()
    assert message() == f"{path} has finished its 2 epochs: give a larger --max_epochs"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "does not continue this run" in message(epochs=5)
    path.write_bytes(b"")
    assert "does not continue this run" in message(epochs=5)
    torch.save(nn.Linear(3, 1).state_dict(), path)
    assert "does not continue this run ('model'): start without --resume" in message(epochs=5)
    torch.save({"model": nn.Linear(3, 1).state_dict()}, path)
    assert "does not continue this run (Error(s) in loading state_dict for Linear:)" in message(epochs=5)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.1])()
    before = (tmp_path / "last.pt").read_bytes()
    run.scheduler.unsaveable = lambda: None
    with pytest.raises((AttributeError, PicklingError), match="pickle"):
        run()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "model.pt"]


@pytest.mark.parametrize("load", [load_trained, start_from])
def test_weights_are_loaded_left_out_or_refused_in_one_line(load: Callable[..., nn.Module], tmp_path: Path) -> None:
    network, other, path = nn.Linear(2, 2), nn.Linear(2, 2), tmp_path / "model.pt"
    assert start_from(network, None) is load_trained(network, path, wanted=False) is network
    torch.save(other.state_dict(), path)
    assert torch.equal(load(network, path).weight, other.weight)
    with pytest.raises(ValueError, match=r"model\.pt.*mis-shaped"):
        load(nn.Linear(2, 3), path)
