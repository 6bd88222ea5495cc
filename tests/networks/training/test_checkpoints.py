from __future__ import annotations

import errno
import logging
import math
import operator
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from networks.training import (
    Checkpoints,
    RunRecord,
    load_trained,
    start_from,
)
from transforms import replacing

ROOT = Path(__file__).parents[3]
BATCHES = [None] * 3


class Run:
    """A trainer that moves one weight a step, scored after each epoch by an evaluator that follows `scores`."""

    def __init__(
        self,
        folder: Path,
        scores: list[float],
        lowest: bool = False,
        epochs: int = 0,
        rate: float = 1.0,
        settings: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=rate, momentum=0.5)
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
        record = RunRecord(folder, self.network, "cpu", None, settings, replacing) if settings else None
        self.checkpoints = Checkpoints(
            folder, self.network, self.optimizer, self.scheduler, replacing=replacing, record=record, **options
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
    assert last["position"] == {"epoch": epochs, "step": 0, "steps": len(BATCHES), "seen": 0}
    assert last["selection"] == dict(zip(("best", "best_epoch", "since_best"), selection, strict=True))
    if best_epoch := selection[1]:
        until_best = Run(tmp_path / "other", scores[:best_epoch])()
        assert saved(tmp_path / "new/model.pt")["weight"].item() == until_best.weight
    files = ["last.previous.pt", "last.pt", "model.pt", "training.log"]
    assert sorted(os.listdir(tmp_path / "new")) == [file for file in files if best_epoch or file != "model.pt"]


def test_a_training_that_never_validates_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.1, 0.2])
    run.evaluator.run = lambda data: None
    with pytest.raises(ValueError, match=r"score was never computed, as no validation ran: there is no model\.pt"):
        run()
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pt", "last.pt", "training.log"]


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
    resumed = Run(tmp_path / "parts", scores, resume=True)()
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
    for patience in (1, 3):
        with pytest.raises(ValueError, match=r"last\.pt has ended early, after 3 validations .*give a larger"):
            Run(tmp_path, scores, resume=True, patience=patience)()
    assert Run(tmp_path, scores, resume=True, patience=4)().trainer.state.epoch == 5


def test_what_cannot_be_resumed_is_one_line(tmp_path: Path) -> None:
    def message(**options: Any) -> str:
        with pytest.raises(ValueError, match=r"last\.pt") as caught:
            Run(tmp_path, [0.1, 0.2], resume=True, **options)()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "last.pt"
    assert message() == f"{path} does not exist: start without --resume, or name the run's --ckpt_dir"
    Run(tmp_path, [0.1, 0.2], settings={"fold": 1})()
    assert message(settings={"fold": 1}) == f"{path} has finished its 2 epochs: give a larger --max_epochs"
    line = f"{path} is of a run with fold 1, and it is 2 now: give the same to go on, or start without --resume"
    assert message(settings={"fold": 2}, epochs=5) == line
    state = saved(path)
    torch.save({**state, "model": nn.Linear(3, 1).state_dict()}, path)
    assert "does not continue this run (Error(s) in loading state_dict for Linear: Unexpected key" in message(epochs=5)
    (tmp_path / "last.previous.pt").unlink()
    torch.save(nn.Linear(3, 1).state_dict(), path)
    assert message(epochs=5) == f"{path} is no run's state; no older state can be read either: start without --resume"


@pytest.mark.parametrize("damage", ["cut short", "a flipped bit", "empty", "missing", "a folder"])
def test_a_damaged_state_gives_way_to_the_one_before(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scores = [0.1, 0.8, 0.5, 0.3, 0.2, 0.9]
    whole = Run(tmp_path / "whole", scores)()
    Run(tmp_path / "parts", scores[:4])()
    path = tmp_path / "parts/last.pt"
    content = bytearray(path.read_bytes())
    content[content.find(saved(path)["model"]["weight"].numpy().tobytes())] ^= 1
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "missing":
        kinds = {"cut short": content[:-100], "a flipped bit": content, "empty": b""}
        path.write_bytes(kinds[damage])
    with caplog.at_level(logging.INFO):
        if damage == "a folder":
            with pytest.raises(ValueError, match="cannot be written"):
                Run(tmp_path / "parts", scores, resume=True)()
            return
        resumed = Run(tmp_path / "parts", scores, resume=True)()
    assert f"the one before it is taken: {tmp_path / 'parts/last.previous.pt'}" in caplog.text
    assert f"resumed from {tmp_path / 'parts/last.previous.pt'} after epoch 3" in caplog.text
    assert resumed.weight == whole.weight
    assert str(saved(path)) == str(saved(tmp_path / "whole/last.pt"))


def test_auto_starts_or_goes_on(tmp_path: Path) -> None:
    scores = [0.1, 0.8, 0.5, 0.3]
    Run(tmp_path, scores[:2], resume="auto")()
    assert Run(tmp_path, scores, resume="auto")().weight == Run(tmp_path / "whole", scores)().weight


def test_starting_anew_keeps_an_earlier_run(tmp_path: Path) -> None:
    for number in range(3):
        Run(tmp_path, [0.5 + number])()
    kept = [saved(tmp_path / f"earlier-{n}/last.pt")["selection"]["best"] for n in (1, 2)]
    assert kept == [0.5, 1.5]
    assert saved(tmp_path / "last.pt")["selection"]["best"] == 2.5
    assert sorted(os.listdir(tmp_path)) == ["earlier-1", "earlier-2", "last.pt", "model.pt", "training.log"]


def test_a_given_learning_rate_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Run(tmp_path, [0.1, 0.2])()
    with caplog.at_level(logging.INFO):
        resumed = Run(tmp_path, [0.1, 0.2, 0.3], resume=True, rate=0.5)
        resumed.checkpoints.attach(resumed.trainer, resumed.evaluator)
    resumed.checkpoints._release()
    assert "learning rate 0.5 from here on, as given now; the run began with 1" in caplog.text
    # two epochs of a schedule that halves
    assert resumed.optimizer.param_groups[0]["lr"] == 0.5 / 4


def test_a_folder_takes_one_run_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from networks.training.stopping import FolderLock\n"
        f"lock = FolderLock(Path({str(tmp_path)!r})); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"{tmp_path} is in use by another run"):
            Run(tmp_path, [0.1])()
        # a crash leaves no lock behind
        other.kill()
    Run(tmp_path, [0.1])()
    Run(tmp_path, [0.1, 0.2], resume=True)()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".0a1b2c3d.last.pt").write_bytes(b"half")
    (tmp_path / ".mine").touch()
    Run(tmp_path, [0.1])()
    assert sorted(os.listdir(tmp_path)) == [".mine", "last.pt", "model.pt", "training.log"]


@pytest.mark.parametrize("on_save_error", ["stop", "continue"])
def test_a_save_that_fails_leaves_the_old_file(
    on_save_error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Run(tmp_path, [0.1, 0.2])()
    before = (tmp_path / "last.pt").read_bytes()

    def full(content: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    run = Run(tmp_path, [0.1, 0.2, 0.3], resume=True, on_save_error=on_save_error)
    line = r"cannot be written \(No space left on device\); the file before it is whole"
    if on_save_error == "stop":
        with pytest.raises(ValueError, match=rf"{line}: make room, and go on with --resume true"):
            run()
    else:
        run()
        assert re.search(rf"last\.pt {line}", caplog.text)
        assert run.trainer.state.epoch == 3
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last.previous.pt", "last.pt", "model.pt", "training.log"]


@pytest.mark.parametrize("load", [load_trained, start_from])
def test_weights_are_loaded_left_out_or_refused_in_one_line(load: Callable[..., nn.Module], tmp_path: Path) -> None:
    network, other, path = nn.Linear(2, 2), nn.Linear(2, 2), tmp_path / "model.pt"
    assert start_from(network, None) is load_trained(network, path, wanted=False) is network
    torch.save(other.state_dict(), path)
    assert torch.equal(load(network, path).weight, other.weight)
    with pytest.raises(ValueError, match=r"model\.pt.*mis-shaped"):
        load(nn.Linear(2, 3), path)


def changed(*path: Any, to: Any) -> Callable[[dict[str, Any]], Any]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        place: Any = state
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to
        return state

    return change


GROUP = ("optimizer", "param_groups", 0)
STATES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a tensor": (lambda state: torch.zeros(3), "is no run's state"),
    "a list": (lambda state: [state], "is no run's state"),
    **{f"epoch {value}": (changed("position", "epoch", to=value), "is no run's state") for value in (-2, 1.5, None)},
    "no steps": (changed("position", "steps", to=0), "is no run's state"),
    "settings": (changed("settings", to="x"), "is no run's state"),
    "the best": (changed("selection", "best", to=math.nan), "its best score is nan"),
    "rate NaN": (changed(*GROUP, "lr", to=math.nan), "not finite .optimizer param_groups 0 lr."),
    "rate below 0": (changed(*GROUP, "lr", to=-0.1), "its learning rate is -0.1"),
    "rate a word": (changed(*GROUP, "lr", to="fast"), "its learning rate is 'fast'"),
    "rates to come": (changed("lr_scheduler", "_last_lr", to=[math.inf]), "not finite .lr_scheduler"),
    "momentum NaN": (changed("optimizer", "state", 0, "momentum_buffer", to=torch.tensor([[math.nan]])), "not finite"),
    "momentum": (changed("optimizer", "state", 0, "momentum_buffer", to=torch.ones(2, 2)), "is of other weights"),
    "no momentum": (changed("optimizer", "state", 0, to="x"), "is of other weights"),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_that_no_run_can_have_is_one_line(kind: str, tmp_path: Path) -> None:
    change, reason = STATES[kind]
    Run(tmp_path, [0.5])()
    torch.save(change(saved(tmp_path / "last.pt")), tmp_path / "last.pt")
    with pytest.raises(ValueError, match=reason) as caught:
        Run(tmp_path, [0.5, 0.6], resume=True)()
    assert str(tmp_path / "last.pt") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_first_file_that_cannot_be_written_is_not_said_to_follow_one(tmp_path: Path) -> None:
    def full(path: Path) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    run = Run(tmp_path, [0.5])
    run.checkpoints.replacing = full
    with pytest.raises(ValueError, match="No space left on device.; there is none of before: make room"):
        run()


def test_other_data_are_named_in_words(tmp_path: Path) -> None:
    Run(tmp_path, [0.5], settings={"seed": 1})()
    state = saved(tmp_path / "last.pt")
    state["settings"]["data"] = "0123456789abcdef"
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="other data, or with the same divided in another way: give the") as caught:
        Run(tmp_path, [0.5, 0.6], settings={"seed": 1}, resume=True)()
    assert "0123456789abcdef" not in str(caught.value)
