"""What a run says of itself: a line when it starts, a line an epoch, bars on terminals."""

from __future__ import annotations

import csv
import logging
import math
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.engines import Workflow
from torch import nn

from networks.selective_scan import default_backend
from networks.training.processes import is_rank_zero

logger = logging.getLogger(__name__)

TIMED_STEPS = 5
HISTORY, CURVES = "history.csv", "curves.png"
SECONDS_BETWEEN_DRAWINGS = 30


class _Memory(logging.Handler):
    """Keeps what is logged before the file is there that it belongs into."""

    def __init__(self) -> None:
        super().__init__()
        self.records: deque[logging.LogRecord] = deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def remember_log(anew: bool = False) -> None:
    """From here on keeps what is logged, until `hand_over_log`; a call after the first changes nothing.

    Args:
        anew: forgets what was kept for a run that never began.
    """
    if anew:
        hand_over_log(logging.NullHandler())
    if not _memories():
        logging.getLogger().addHandler(_Memory())


def hand_over_log(handler: logging.Handler) -> None:
    """Gives `handler` what was kept, and keeps no more.

    Example:
        >>> remember_log()
        >>> hand_over_log(logging.NullHandler())
    """
    for memory in _memories():
        logging.getLogger().removeHandler(memory)
        for record in memory.records:
            handler.handle(record)


def _memories() -> list[_Memory]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _Memory)]


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
    """Logs one line an epoch, and keeps `history.csv` and `curves.png` beside the checkpoints.

    The line gives the training's metrics, the validation's where there was one, the best so far, the images a second
    and the time left. A metric that is not a number is n/a. The files hold all epochs of the run, earlier commands'
    too. List it after the `ValidationHandler`, whose result it waits for.

    Args:
        validator: the evaluator that validates.
        folder: of the two files.
        replacing: `transforms.replacing`, the context manager that writes a file whole or not at all.

    Example:
        >>> from contextlib import nullcontext
        >>> log = EpochLog(Engine(lambda engine, batch: None), "models", nullcontext)
        >>> log.attach(Engine(lambda engine, batch: None))
    """

    def __init__(
        self, validator: Workflow, folder: str | Path, replacing: Callable[[Path], AbstractContextManager[Path]]
    ) -> None:
        self.validator = validator
        self.folder = Path(folder)
        self.replacing = replacing
        self.rows: list[dict[str, float]] = []
        self.started = 0.0
        self.first_iteration = 0
        self.drawn_at = -math.inf
        self.validations = 0

    def attach(self, engine: Engine) -> None:
        if is_rank_zero():
            self.validator.add_event_handler(Events.COMPLETED, self.validated)
            engine.add_event_handler(Events.STARTED, self.read)
            engine.add_event_handler(Events.EPOCH_STARTED, self.start)
            engine.add_event_handler(Events.EPOCH_COMPLETED, self.log)
            engine.add_event_handler(Events.COMPLETED, lambda: self.try_to(self.draw))

    def read(self, engine: Engine) -> None:
        """Takes over the epochs of the run before it was stopped."""
        file = self.folder / HISTORY
        if not engine.state.epoch or not file.is_file():
            return
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(lines)]
            self.rows = [row | {"epoch": int(row["epoch"])} for row in rows if row["epoch"] <= engine.state.epoch]
        except (OSError, ValueError, TypeError, KeyError, csv.Error):
            logger.warning(f"{file} cannot be read: it begins anew")

    def validated(self) -> None:
        self.validations += 1

    def start(self, engine: Engine) -> None:
        self.started = time.perf_counter()
        self.first_iteration = engine.state.iteration
        self.validations = 0

    def log(self, engine: Engine) -> None:
        seconds = time.perf_counter() - self.started
        steps = engine.state.iteration - self.first_iteration
        validation = self.validator.state.metrics if self.validations else {}
        values = {name: float(value) for name, value in {**engine.state.metrics, **validation}.items()}
        epoch, epochs = engine.state.epoch, engine.state.max_epochs or 0
        self.rows.append({"epoch": epoch, **values, **_rates(engine), "seconds": seconds, "memory_gb": _peak_gb()})
        drawing = self.validations and time.monotonic() - self.drawn_at > SECONDS_BETWEEN_DRAWINGS
        for step in (self.write, self.draw) if drawing else (self.write,):
            self.try_to(step)
        parts = [f"{name} {value:.4f}" if math.isfinite(value) else f"{name} n/a" for name, value in values.items()]
        if self.validations and (best := self.best()):
            parts.append(best)
        left = sum(row["seconds"] for row in self.rows[-5:]) / len(self.rows[-5:]) * (epochs - epoch)
        rest = f", {_clock(left)} left" if left >= 60 else ""
        speed = f", {steps * _batch_size(engine) / seconds:.3g} images/s" if _batch_size(engine) else ""
        logger.info(f"epoch {epoch}/{epochs}: {', '.join(parts)} ({seconds:.1f} s{speed}{rest})")

    def best(self) -> str:
        """The best finite score of the validations, and its epoch."""
        name = self.validator.state.key_metric_name
        best: tuple[float, int] | None = None
        for row in self.rows:
            score = row.get(name, math.nan)
            if math.isfinite(score) and (best is None or self.validator.metric_cmp_fn(score, best[0])):
                best = score, int(row["epoch"])
        return f"best {best[0]:.4f} in epoch {best[1]}" if best else ""

    def try_to(self, step: Callable[[], None]) -> None:
        """A run does not fail for its curves: whether it ends when the disk is full is asked where states are saved."""
        try:
            step()
        except OSError as error:
            logger.warning(f"{self.folder}: {HISTORY} or {CURVES} cannot be written ({error.strerror})")

    def write(self) -> None:
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with self.replacing(self.folder / HISTORY) as path, path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)

    def draw(self) -> None:
        """Draws each kind of metric over the epochs."""
        from matplotlib.figure import Figure

        self.drawn_at = time.monotonic()
        hidden = {"epoch", "seconds", "memory_gb"}
        names = [name for name in dict.fromkeys(name for row in self.rows for name in row) if name not in hidden]
        figure = Figure(figsize=(7, 1 + 1.8 * len(names)), layout="constrained")
        for axes, name in zip(figure.subplots(len(names), sharex=True, squeeze=False)[:, 0], names, strict=True):
            points = [(row["epoch"], row[name]) for row in self.rows if name in row]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else None)
            axes.set_ylabel(name)
            axes.grid(alpha=0.3)
        axes.set_xlabel("epoch")
        with self.replacing(self.folder / CURVES) as path:
            figure.savefig(path, dpi=100)


def _rates(engine: Engine) -> dict[str, float]:
    optimizer = getattr(engine, "optimizer", None)
    return {"learning_rate": optimizer.param_groups[0]["lr"]} if optimizer is not None else {}


def _batch_size(engine: Engine) -> int:
    return getattr(getattr(engine, "data_loader", None), "batch_size", 0) or 0


def _peak_gb() -> float:
    """The most memory that this process has held: of the GPU where it uses one, else of the machine."""
    if torch.cuda.is_available() and (peak := torch.cuda.max_memory_allocated()):
        return round(peak / 1e9, 3)
    try:
        import resource
    except ImportError:  # Windows
        return math.nan
    # kilobytes on Linux, bytes on macOS
    unit = 1 if sys.platform == "darwin" else 1024
    return round(unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9, 3)


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
        engine.add_event_handler(Events.COMPLETED, self.log)

    def log(self, engine: Engine) -> None:
        files: Any = idist.all_reduce((engine.state.iteration or 0) - len(getattr(engine, "failures", ())))
        logger.info(f"masks of {files} file{'s' * (files != 1)} written to {self.output_dir.resolve()}")


def _shown_loss(output: Any) -> dict[str, Any]:
    first = output[0] if isinstance(output, list) and output else output
    return {"loss": first["loss"]} if isinstance(first, dict) and "loss" in first else {}


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
