"""What the bundles' training loops share beyond MONAI's handlers: precision, progress, checkpoints, processes."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.handlers import LrScheduleHandler, StatsHandler, TensorBoardStatsHandler, ValidationHandler, from_engine
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from networks.selective_scan import default_backend
from networks.weights import load_weights

logger = logging.getLogger(__name__)

TIMED_STEPS = 5


class Autocast(nn.Module):
    """Runs `network` under `torch.autocast` on whatever device the image is, and returns float32.

    MONAI's engines autocast on CUDA only; losses and metrics stay outside, in float32. `amp_dtype` "bfloat16" needs no
    gradient scaler; None leaves the precision alone.
    """

    def __init__(self, network: nn.Module, amp_dtype: str | None) -> None:
        super().__init__()
        self.network = network
        self.dtype = getattr(torch, amp_dtype) if amp_dtype else None

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self.network(x).float()


class TrainingBar(ProgressBar):
    """ignite's progress bar with the loss, shown by the first process only."""

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        if _rank() == 0:
            super().attach(engine, output_transform=lambda output: {"loss": from_engine(["loss"], first=True)(output)})


class RunLog:
    """Says at the start what is trained on what, and after a few steps how long a step takes.

    Args:
        network: the network, for its name, size and scan backend.
        device: where it runs.
        note: anything else worth a line, for instance how the model will be selected.
    """

    def __init__(self, network: nn.Module, device: torch.device | str, note: str = "") -> None:
        self.network = network
        self.device = torch.device(device)
        self.note = note
        self.started = 0.0
        self.steps = 0

    def attach(self, engine: Engine) -> None:
        if _rank() == 0:
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


def train_handlers(
    network: nn.Module,
    device: torch.device | str,
    log_dir: str | Path,
    lr_scheduler: Any,
    lr_per_step: bool = False,
    validator: Engine | None = None,
    val_interval: int = 1,
    note: str = "",
) -> list[Any]:
    """The handlers every bundle's trainer has, in the order they act in.

    Args:
        network, device, note: see `RunLog`.
        log_dir: folder of the TensorBoard events.
        lr_scheduler: stepped after each epoch, or after each step with `lr_per_step`.
        validator: evaluator that runs every `val_interval` epochs; None validates nothing.
    """
    loss = from_engine(["loss"], first=True)
    handlers = [
        RunLog(network, device, note),
        TrainingBar(),
        LrScheduleHandler(lr_scheduler, print_lr=False, epoch_level=not lr_per_step),
    ]
    if validator is not None:
        handlers.append(ValidationHandler(interval=val_interval, validator=validator, epoch_level=True))
    if _rank() == 0:
        handlers.append(StatsHandler(name="training", tag_name="train_loss", iteration_log=False))
        handlers.append(TensorBoardStatsHandler(log_dir=str(log_dir), tag_name="train_loss", output_transform=loss))
    return handlers


class Checkpoints:
    """Writes `last.pt` after each epoch and `model.pt` whenever the score is the best so far; resumes from `last.pt`.

    `model.pt` is the network's bare state_dict. Files are written beside their place and then moved into it, so an
    interrupted run never leaves half a file. Attach it to the trainer when that is complete (in `initialize`): an
    epoch is saved after all other handlers have seen its end.

    Args:
        ckpt_dir: folder of both files.
        network: whose weights are saved; the bare one, not its distributed wrapper.
        others: what else a resumed run needs, as optimizer and learning-rate scheduler.
        resume: continue the run that `last.pt` holds.
        patience: end the training after so many scores in a row without a better one; 0 never does.
        seed: a resumed run draws from seed + epoch, so that it does not repeat the first epochs' shuffling.
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        network: nn.Module,
        others: Mapping[str, Any],
        resume: bool = False,
        patience: int = 0,
        seed: int = 0,
    ) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.network = network
        self.objects = {"model": network, **others}
        self.resume = resume
        self.patience = patience
        self.seed = seed
        self.best: float | None = None
        self.since_best = 0

    def attach(self, trainer: Engine, scored: Engine, metric: str, lowest: bool = False) -> None:
        """Saves after the epochs of `trainer`, scoring by `scored.state.metrics[metric]`, the greatest being best."""
        if self.resume:
            self._load(trainer)
        sign = -1.0 if lowest else 1.0
        # an evaluator has one epoch a run
        scored.add_event_handler(Events.EPOCH_COMPLETED, self._score, trainer, metric, sign)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save_last)

    def _score(self, engine: Engine, trainer: Engine, metric: str, sign: float) -> None:
        score = sign * float(engine.state.metrics[metric])
        if self.best is None or score > self.best:
            self.best, self.since_best = score, 0
            self._save(self.network.state_dict(), "model.pt")
            logger.info(f"best {metric} so far, {sign * score:.4f}: saved {self.ckpt_dir / 'model.pt'}")
            return
        self.since_best += 1
        if self.since_best == self.patience:
            logger.info(f"no better {metric} in {self.patience} looks: training ends early")
            trainer.terminate()

    def _save_last(self, trainer: Engine) -> None:
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        selection = {"best": self.best, "since_best": self.since_best}
        self._save({**state, "trainer": dict(trainer.state_dict()), "selection": selection}, "last.pt")

    def _save(self, content: Any, name: str) -> None:
        if _rank() == 0:
            save_atomically(content, self.ckpt_dir / name)

    def _load(self, trainer: Engine) -> None:
        path = self.ckpt_dir / "last.pt"
        if not path.is_file():
            raise SystemExit(f"{path} does not exist: start without --resume, or name the run's --ckpt_dir")
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name, thing in self.objects.items():
            thing.load_state_dict(state[name])
        self.best, self.since_best = state["selection"]["best"], state["selection"]["since_best"]
        max_epochs = trainer.state.max_epochs or 0
        trainer.load_state_dict(state["trainer"])
        trainer.state.max_epochs = max_epochs
        if trainer.state.epoch >= max_epochs:
            raise SystemExit(f"{path} has finished its {trainer.state.epoch} epochs: give a larger --max_epochs")
        torch.manual_seed(self.seed + trainer.state.epoch)
        logger.info(f"resumed from {path} after epoch {trainer.state.epoch}")


def save_atomically(content: Any, path: Path) -> None:
    """torch.save to a temporary file in the folder of `path` (made if need be), then a move into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_or_exit(network: nn.Module, path: str | Path | None) -> nn.Module:
    """`network` with the weights at `path`; a missing or unfit file ends the program with one line.

    None leaves the network as it is.
    """
    if path is None:
        logger.info("no weights to start from: they are random")
        return network
    try:
        report = load_weights(network, path)
    except FileNotFoundError as error:
        raise SystemExit(f"{error}: train first, or name a checkpoint as --ckpt_path") from error
    except ValueError as error:
        raise SystemExit(str(error)) from error
    logger.info(str(report))
    return network


def prepare_network(network: nn.Module, device: torch.device, amp_dtype: str | None = None) -> nn.Module:
    """`network` on `device` with its precision, and with gradients averaged where there is a process group."""
    prepared: nn.Module = Autocast(network.to(device), amp_dtype)
    if dist.is_initialized():
        prepared = DistributedDataParallel(prepared, device_ids=[device] if device.type == "cuda" else None)
    return prepared


def start_process_group() -> None:
    """Joins the processes that torchrun started: through NCCL where there are GPUs, else through gloo.

    Raises:
        SystemExit: when torchrun did not start this process.
    """
    if "RANK" not in os.environ:
        raise SystemExit("multi_gpu.yaml runs under torchrun --standalone --nproc_per_node=N -m monai.bundle run …")
    dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo")
    # ignite's first look at the group is a collective: all processes must take it, not only those that save
    idist.sync()


def process_device() -> torch.device:
    """This process's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
