from __future__ import annotations

import logging
import sys

import pytest
from ignite.engine import Engine, Events
from torch import nn

from networks.training import (
    EpochLog,
    Progress,
    RunLog,
)


def test_the_log_says_what_is_trained_and_how_long_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = Engine(lambda engine, batch: [{"loss": 4}])
    RunLog(nn.Linear(999, 1000), "cpu", "7 images").attach(trainer)
    trainer.run([None] * 4, max_epochs=3)
    first, second = (record.message for record in caplog.records if record.name == "networks.training.log")
    assert first == "Linear (1.00 M parameters) on cpu. 7 images"
    assert second.endswith("s per step, 4 steps per epoch, about 0 min for 2 epochs")


def test_the_log_has_one_line_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer, validator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)

    def validate() -> None:
        trainer.state.metrics["train_loss"] = trainer.state.epoch / 10
        if trainer.state.epoch == 2:
            validator.run([None])
            validator.state.metrics["iou"] = 0.5
            validator.state.best_metric, validator.state.best_metric_epoch = 0.5, 2

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    EpochLog(validator).attach(trainer)
    trainer.run([None], max_epochs=3)
    lines = [record.message.rpartition(" (")[0] for record in caplog.records if record.name == "networks.training.log"]
    assert lines == [
        "epoch 1/3: train_loss 0.1000",
        "epoch 2/3: train_loss 0.2000, iou 0.5000, best 0.5000 in epoch 2",
        "epoch 3/3: train_loss 0.3000",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    engine = Engine(lambda engine, batch: [{"loss": 4}])
    Progress(desc="Steps").attach(engine)
    engine.run([None] * 3, max_epochs=1)
    shown = capsys.readouterr().err
    assert ("Steps" in shown) == ("loss=4" in shown) == terminal
