"""What a run says of itself: a line when it starts, a line an epoch, bars on terminals."""

from __future__ import annotations

import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines import Workflow
from torch import nn

from networks.selective_scan import default_backend
from networks.training.processes import is_rank_zero

logger = logging.getLogger(__name__)

TIMED_STEPS = 5


class RunLog:
    """Logs what is trained on what when training starts, and after some steps how long a step takes.

    Args:
        network: the network, for its name, size and scan backend.
        device: where it runs.
        note: anything else worth a line, for instance how the model will be selected.

    Example:
        >>> RunLog(nn.Linear(2, 1), "cpu", "7 images to train on").attach(Engine(lambda engine, batch: None))
    """

    def __init__(self, network: nn.Module, device: torch.device | str, note: str = "") -> None:
        self.network = network
        self.device = torch.device(device)
        self.note = note
        self.started = 0.0
        self.steps = 0

    def attach(self, engine: Engine) -> None:
        if is_rank_zero():
            engine.add_event_handler(Events.STARTED, self.start)
            engine.add_event_handler(Events.ITERATION_STARTED, self.step)

    def start(self, engine: Engine) -> None:
        parameters = sum(p.numel() for p in self.network.parameters()) / 1e6
        scans = [module for module in self.network.modules() if hasattr(module, "scan_backend")]
        scan = f", scan backend {scans[0].scan_backend or default_backend(self.device)}" if scans else ""
        name = type(self.network).__name__
        logger.info(f"{name} ({parameters:.2f} M parameters) on {self.device}{scan}. {self.note}".strip())

    def step(self, engine: Engine) -> None:
        # the first step allocates and compiles, so it is not timed
        self.steps += 1
        if self.steps == 2:
            self.started = time.perf_counter()
        elif self.steps == 2 + TIMED_STEPS:
            seconds = (time.perf_counter() - self.started) / TIMED_STEPS
            per_epoch = engine.state.epoch_length or 0
            epochs = (engine.state.max_epochs or 0) - engine.state.epoch + 1
            left = _clock(epochs * per_epoch * seconds)
            logger.info(f"{seconds:.3f} s per step, {per_epoch} steps per epoch, about {left} for {epochs} epochs")


class EpochLog:
    """Logs one line an epoch: the training's metrics, and the validation's where there was one, with the best so far.

    List it after the `ValidationHandler`, whose result it waits for.

    Args:
        validator: the evaluator that validates.

    Example:
        >>> EpochLog(Engine(lambda engine, batch: None)).attach(Engine(lambda engine, batch: None))
    """

    def __init__(self, validator: Workflow) -> None:
        self.validator = validator
        self.started = 0.0
        self.validations = 0

    def attach(self, engine: Engine) -> None:
        if is_rank_zero():
            self.validator.add_event_handler(Events.COMPLETED, self.validated)
            engine.add_event_handler(Events.EPOCH_STARTED, self.start)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.log)

    def validated(self) -> None:
        self.validations += 1

    def start(self) -> None:
        self.started = time.perf_counter()
        self.validations = 0

    def log(self, engine: Engine) -> None:
        parts = _metrics(engine)
        if self.validations:
            parts += _metrics(self.validator)
            best, epoch = (getattr(self.validator.state, name) for name in ("best_metric", "best_metric_epoch"))
            if epoch > 0 and math.isfinite(best):
                parts.append(f"best {best:.4f} in epoch {epoch}")
        seconds = time.perf_counter() - self.started
        logger.info(f"epoch {engine.state.epoch}/{engine.state.max_epochs}: {', '.join(parts)} ({seconds:.1f} s)")


class Progress(ProgressBar):
    """ignite's progress bar on a terminal, with the loss where there is one. A log file gets no bar.

    Example:
        >>> Progress(desc="Files").attach(Engine(lambda engine, batch: None))
    """

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        if is_rank_zero() and sys.stderr.isatty():
            super().attach(engine, output_transform=_shown_loss)


class ResultsLog:
    """Logs where the results lie when all files have been predicted.

    Args:
        output_dir: the folder.

    Example:
        >>> ResultsLog("predictions").attach(Engine(lambda engine, batch: None))
    """

    def __init__(self, output_dir: str | Path) -> None:
        self.output_dir = Path(output_dir)

    def attach(self, engine: Engine) -> None:
        if is_rank_zero():
            engine.add_event_handler(Events.COMPLETED, self.log)

    def log(self, engine: Engine) -> None:
        files = (engine.state.iteration or 0) - len(getattr(engine, "failures", ()))
        logger.info(f"masks of {files} file{'s' * (files != 1)} written to {self.output_dir.resolve()}")


def _shown_loss(output: Any) -> dict[str, Any]:
    first = output[0] if isinstance(output, list) and output else output
    return {"loss": first["loss"]} if isinstance(first, dict) and "loss" in first else {}


def _metrics(engine: Engine) -> list[str]:
    return [f"{name} {float(value):.4f}" for name, value in engine.state.metrics.items()]


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
