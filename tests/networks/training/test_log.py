from __future__ import annotations

import csv
import logging
import math
import operator
import sys
from pathlib import Path

import pytest
from ignite.engine import Engine, Events
from PIL import Image
from torch import nn

from networks.training import (
    EpochLog,
    Progress,
    RunLog,
)
from transforms import replacing


def test_the_log_says_what_is_trained_and_how_long_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = Engine(lambda engine, batch: [{"loss": 4}])
    RunLog(nn.Linear(999, 1000), "cpu", "7 images").attach(trainer)
    trainer.run([None] * 4, max_epochs=3)
    first, second = (record.message for record in caplog.records if record.name == "networks.training.log")
    assert first == "Linear (1.00 M parameters) on cpu. 7 images"
    assert second.endswith("s per step, 4 steps per epoch, about 0 min for 2 epochs")


def logged(folder: Path, epochs: int, resumed: int = 0) -> None:
    """A run that validates in even epochs, scores 0.5, NaN, 0.2 and so on."""
    trainer, validator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)
    validator.state.key_metric_name, validator.metric_cmp_fn = "iou", operator.gt

    def validate() -> None:
        trainer.state.metrics["train_loss"] = trainer.state.epoch / 10
        if trainer.state.epoch % 2 == 0:
            validator.run([None])
            validator.state.metrics["iou"] = {2: 0.5, 4: math.nan, 6: 0.2}[trainer.state.epoch]

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    EpochLog(validator, folder, replacing).attach(trainer)
    trainer.state.max_epochs, trainer.state.epoch, trainer.state.iteration = epochs, resumed, resumed
    trainer.state.epoch_length = 1
    trainer.run([None])


def test_the_log_has_one_line_an_epoch(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO)
    logged(tmp_path, epochs=4)
    lines = [record.message.rpartition(" (")[0] for record in caplog.records if record.name == "networks.training.log"]
    assert lines == [
        "epoch 1/4: train_loss 0.1000",
        "epoch 2/4: train_loss 0.2000, iou 0.5000, best 0.5000 in epoch 2",
        "epoch 3/4: train_loss 0.3000",
        "epoch 4/4: train_loss 0.4000, iou n/a, best 0.5000 in epoch 2",
    ]


def test_the_history_goes_on_where_the_run_does(tmp_path: Path) -> None:
    logged(tmp_path, epochs=5)
    logged(tmp_path, epochs=6, resumed=3)
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["epoch"], row["train_loss"], row["iou"]) for row in rows] == [
        ("1", "0.1", ""), ("2", "0.2", "0.5"), ("3", "0.3", ""),
        ("4", "0.4", "nan"), ("5", "0.5", ""), ("6", "0.6", "0.2"),
    ]  # fmt: skip
    assert float(rows[-1]["memory_gb"]) > 0.01
    with Image.open(tmp_path / "curves.png") as picture:
        picture.verify()


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
