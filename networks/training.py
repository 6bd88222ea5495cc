"""What the bundles' training loops share beyond MONAI's handlers: precision, progress, checkpoints, processes."""

from __future__ import annotations

import copy
import ctypes
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.data import MetaTensor
from monai.engines import Workflow
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from networks.selective_scan import default_backend
from networks.weights import load_weights, read_checkpoint

logger = logging.getLogger(__name__)

TIMED_STEPS = 5


class Autocast(nn.Module):
    """Runs `network` in the precision asked for, on whatever device the image is.

    MONAI's engines autocast on CUDA only. Here losses and metrics stay outside, in float32: the result is float32, or
    what is wider. bfloat16 needs no gradient scaler. The network gets a plain tensor, because metadata costs time at
    every operation; the result has the image's metadata again.

    Args:
        network: takes and returns one tensor.
        bfloat16: autocast to bfloat16; False leaves the precision alone, an outer autocast too.
        channels_last: memory layout of the image.
        constant_weights: `torch.compile` takes the weights of a compiled network for constants.
        out_channels: how many channels the classes need; None takes whatever comes.

    Raises:
        ValueError: when the network answers with another number of channels.

    Example:
        >>> Autocast(nn.Linear(2, 1), bfloat16=True)(torch.ones(1, 2)).dtype
        torch.float32
    """

    def __init__(
        self,
        network: nn.Module,
        bfloat16: bool,
        channels_last: bool = False,
        constant_weights: bool = False,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.out_channels = out_channels
        # not self.bfloat16, which is a method of modules
        self.to_bfloat16 = bfloat16
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.constant_weights = constant_weights

    def forward(self, x: Tensor) -> Tensor:
        plain = x.as_tensor() if isinstance(x, MetaTensor) else x
        plain = plain.to(memory_format=self.memory_format)
        autocast = torch.autocast(x.device.type, dtype=torch.bfloat16) if self.to_bfloat16 else nullcontext()
        with _compiling_constants() if self.constant_weights else nullcontext(), autocast:
            y = self.network(plain)
        _check_channels(self.network, y.shape[1], self.out_channels)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return MetaTensor(y).copy_meta_from(x) if isinstance(x, MetaTensor) else y


def _check_channels(network: nn.Module, channels: int | None, needed: int | None) -> None:
    """Refuses a network whose output does not fit the classes; one channel stands for one class without background."""
    if needed is not None and channels is not None and channels != needed:
        raise ValueError(
            f"{type(network).__name__} answers with {channels} channel{'s' * (channels != 1)}, and the classes need"
            f" {needed}: leave its out_channels to the configuration, or name the classes (--classes)"
        )


def _compiling_constants() -> AbstractContextManager[None]:
    """The compiler's setting for constant weights; it is read when a shape is met for the first time, in a call."""
    # imported here: it takes two seconds, and only compiled networks need it
    from torch._inductor import config

    return config.patch(freezing=True)


class Progress(ProgressBar):
    """ignite's progress bar on a terminal, with the loss where there is one. A log file gets no bar.

    Example:
        >>> Progress(desc="Files").attach(Engine(lambda engine, batch: None))
    """

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        if is_rank_zero() and sys.stderr.isatty():
            super().attach(engine, output_transform=_shown_loss)


def _shown_loss(output: Any) -> dict[str, Any]:
    first = output[0] if isinstance(output, list) and output else output
    return {"loss": first["loss"]} if isinstance(first, dict) and "loss" in first else {}


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


def _metrics(engine: Engine) -> list[str]:
    return [f"{name} {float(value):.4f}" for name, value in engine.state.metrics.items()]


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


def poly_schedule(optimizer: Optimizer, steps: int, power: float = 0.9) -> LambdaLR:
    """lr · (1 − i / steps)^power, set after step i = 0, 1, …: the first two steps both run at the full rate.

    The schedule of CMUNeXt's training (arXiv 2308.01239), to be stepped after each step.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
        >>> poly_schedule(optimizer, steps=100).get_last_lr()
        [0.01]
    """
    return LambdaLR(optimizer, lambda step: max(1 - max(step - 1, 0) / steps, 0.0) ** power)


class Checkpoints:
    """Writes `last.pt` after each epoch and `model.pt` whenever the score is the best so far; resumes from `last.pt`.

    `model.pt` is the network's bare state_dict. An interrupted run never leaves half a file. Attach it to the trainer
    when that is complete (in `training`): an epoch is saved after all other handlers have seen its end.

    Args:
        ckpt_dir: folder of both files.
        network: whose weights are saved; the bare one, not its distributed wrapper.
        optimizer, lr_scheduler: what else a resumed run needs.
        replacing: `transforms.replacing`, the context manager that writes a file whole or not at all.
        resume: continue the run that `last.pt` holds.
        patience: end the training after so many validations in a row without a better score; 0 never does.
        seed: a resumed run draws from seed + epoch, so that it does not repeat the first epochs' shuffling.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> checkpoints = Checkpoints("models", network, optimizer, poly_schedule(optimizer, 10), replacing=nullcontext)
        >>> checkpoints.best is None
        True
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        network: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        replacing: Callable[[Path], AbstractContextManager[Path]],
        resume: bool | str = False,
        patience: int = 0,
        seed: int = 0,
    ) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.network = network
        self.objects: dict[str, Any] = {"model": network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.replacing = replacing
        self.resume = as_bool(resume)
        self.patience = patience
        self.seed = seed
        self.best: float | None = None
        self.best_epoch = 0
        self.since_best = 0

    def attach(self, trainer: Workflow, evaluator: Workflow) -> None:
        """Saves after the epochs of `trainer`.

        The key metric of `evaluator` chooses the best network, by its `metric_cmp_fn`. Where nothing is held out, that
        is where the evaluator's data are empty, the trainer's key metric does.

        Raises:
            ValueError: when a run is to be resumed and cannot be.
        """
        if self.resume:
            self._load(trainer)
        scored = evaluator if len(evaluator.data_loader) else trainer  # type: ignore[arg-type]
        # an evaluator has one epoch a run
        scored.add_event_handler(Events.EPOCH_COMPLETED, self._score, trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save_last)
        trainer.add_event_handler(Events.COMPLETED, self._say_best, scored)

    def _score(self, scored: Workflow, trainer: Engine) -> None:
        score = float(scored.state.metrics[scored.state.key_metric_name])
        # a network whose score is not a number is never the best
        if math.isfinite(score) and (self.best is None or scored.metric_cmp_fn(score, self.best)):
            self.best, self.best_epoch, self.since_best = score, trainer.state.epoch, 0
            self._save(self.network.state_dict(), "model.pt")
            return
        self.since_best += 1
        if 0 < self.patience <= self.since_best:
            name = scored.state.key_metric_name
            logger.info(f"no better {name} in {self.since_best} validations: training ends early")
            trainer.terminate()

    def _say_best(self, trainer: Engine, scored: Workflow) -> None:
        if self.best is None:
            reason = "not finite in any epoch" if self.since_best else "never computed, as no validation ran"
            raise ValueError(
                f"{scored.state.key_metric_name} was {reason}: there is no model.pt, the last epoch's weights are in"
                f" {self.ckpt_dir / 'last.pt'}"
            )
        if is_rank_zero():
            name = scored.state.key_metric_name
            logger.info(f"best {name} {self.best:.4f} in epoch {self.best_epoch}: {self.ckpt_dir / 'model.pt'}")

    def _save_last(self, trainer: Engine) -> None:
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        selection = {"best": self.best, "best_epoch": self.best_epoch, "since_best": self.since_best}
        self._save({**state, "trainer": dict(trainer.state_dict()), "selection": selection}, "last.pt")

    def _save(self, content: Any, name: str) -> None:
        if is_rank_zero():
            self.ckpt_dir.mkdir(parents=True, exist_ok=True)
            with self.replacing(self.ckpt_dir / name) as path:
                torch.save(content, path)

    def _load(self, trainer: Engine) -> None:
        path = self.ckpt_dir / "last.pt"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: start without --resume, or name the run's --ckpt_dir")
        max_epochs = trainer.state.max_epochs or 0
        try:
            state = read_checkpoint(path)
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
            self.best, self.best_epoch, self.since_best = (
                state["selection"][key] for key in ("best", "best_epoch", "since_best")
            )
            trainer.load_state_dict(state["trainer"])
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} does not continue this run ({reason}): start without --resume") from error
        trainer.state.max_epochs = max_epochs
        if trainer.state.epoch >= max_epochs:
            raise ValueError(f"{path} has finished its {trainer.state.epoch} epochs: give a larger --max_epochs")
        torch.manual_seed(self.seed + trainer.state.epoch)
        logger.info(f"resumed from {path} after epoch {trainer.state.epoch}")


def load_trained(
    network: nn.Module, path: str | Path, wanted: bool | str = True, out_channels: int | None = None
) -> nn.Module:
    """`network` with the weights at `path`, every tensor of it; with `wanted=False` as it is.

    Args:
        out_channels: how many channels the classes need. It is compared with what the network says of itself.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not fit, or the network's output does not fit the classes.

    Example:
        >>> load_trained(nn.Linear(2, 1), "no/model.pt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no weight file no/model.pt: train first, or name an existing checkpoint as --ckpt_path
    """
    _check_channels(network, getattr(network, "out_channels", None), out_channels)
    if as_bool(wanted):
        _load(network, path, "train first, or name an existing checkpoint as --ckpt_path")
    return network


def start_from(
    network: nn.Module, pretrained: str | Path | None, new_head: bool | str = False, min_matched: float = 1.0
) -> nn.Module:
    """`network` with the weights that a training starts from; None leaves them random.

    Args:
        pretrained: a checkpoint that `load_weights` understands.
        new_head: it is of other classes. The last layer, or the layer of that name, is left out, and the log names the
            tensors that stay random.
        min_matched: least share of the network's tensors that the file must fill.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not fit.

    Example:
        >>> network = start_from(nn.Linear(2, 1), None)
    """
    if pretrained is None:
        logger.info("no weights to start from: they are random")
        return network
    if str(new_head).lower() in ("true", "false"):
        new_head = as_bool(new_head)
    remedy = "name an existing file as --pretrained"
    _load(network, pretrained, remedy, start=True, new_head=new_head, min_matched=float(min_matched))
    return network


def _load(network: nn.Module, path: str | Path, remedy: str, **options: Any) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"no weight file {path}: {remedy}")
    logger.info(str(load_weights(network, path, **options)))


def prepare_network(
    network: nn.Module,
    device: torch.device | str,
    amp_dtype: str = "float32",
    channels_last: bool | str = "auto",
    compile: bool | str = False,
    frozen: bool = False,
    out_channels: int | None = None,
) -> nn.Module:
    """`network` on `device`, made fast, and with gradients averaged where there is a process group.

    Args:
        amp_dtype: "float32"; "bfloat16" autocasts; "auto" does so where the device computes in bfloat16 natively.
        channels_last: memory layout of the convolutions; "auto" takes it for networks that normalise in batches. Those
            are convolutional, and faster with it on CPU and GPU alike.
        compile: through `torch.compile`, which takes a minute and pays later; "auto" does so where there is what it
            needs, a GPU or a C++ compiler.
        frozen: a copy that will not be trained, as `network.frozen(bfloat16)` makes it, or a plain copy for networks
            that have no such method. Compiling takes its weights for constants.
        out_channels: how many channels the classes need; a network that answers with others is refused.

    Raises:
        ValueError: for a word that is none of those, or when the output does not fit the classes.

    Example:
        >>> prepare_network(nn.Conv2d(3, 1, 1), "cpu")(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """
    device = torch.device(device)
    if amp_dtype not in ("float32", "bfloat16", "auto"):
        raise ValueError(f"amp_dtype must be float32, bfloat16 or auto, not {amp_dtype!r}")
    _check_channels(network, getattr(network, "out_channels", None), out_channels)
    bfloat16 = computes_bfloat16(device) if amp_dtype == "auto" else amp_dtype == "bfloat16"
    convolutional = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    nhwc = convolutional if channels_last == "auto" else as_bool(channels_last)
    compiler = device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None
    compile = compiler if compile == "auto" else as_bool(compile)
    if compile and not compiler:
        raise ValueError("--compile true needs a C++ compiler: install g++ or clang++, or leave it out")
    if frozen:
        freeze = getattr(network, "frozen", None)
        network = freeze(bfloat16) if freeze else copy.deepcopy(network).eval()
    network = network.to(device)
    if nhwc:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        network.compile()
    prepared: nn.Module = Autocast(network, bfloat16, nhwc, frozen and compile, out_channels)
    if dist.is_initialized():
        _describe_depthwise_as_channels_last(network)
        prepared = DistributedDataParallel(prepared, device_ids=[device] if device.type == "cuda" else None)
    return prepared


def _describe_depthwise_as_channels_last(network: nn.Module) -> None:
    """Gives depthwise kernels (C, 1, K, K) the strides that their gradients come with.

    Both layouts are the same bytes, because a dimension is 1; PyTorch's reducer compares the strides and warns.
    """
    for parameter in network.parameters():
        if parameter.ndim == 4 and parameter.shape[1] == 1 and parameter.is_contiguous():
            *_, height, width = parameter.shape
            parameter.data = parameter.data.as_strided(parameter.shape, (height * width, 1, width, 1))


def keep_freed_memory() -> bool:
    """Lets glibc keep what a layer frees for the next one: blocks of up to 32 MiB, one gibibyte in all.

    By default glibc hands blocks of 128 KiB and more back to the system at once, which clears and maps them again. That
    is a tenth of the time of a forward pass. Afterwards the process stays as large as at its peak until it ends.

    Returns:
        whether it took effect; other C libraries have no such setting. The log says so too.

    Example:
        >>> keep_freed_memory() == (sys.platform == "linux")  # doctest: +SKIP
        True
    """
    trim_threshold, mmap_threshold = -1, -3
    # the largest that mallopt(3) documents: 4 · 1024 · 1024 · sizeof(long)
    largest_block = 4 * 1024 * 1024 * ctypes.sizeof(ctypes.c_long)
    took_effect = False
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        took_effect = bool(libc.mallopt(mmap_threshold, largest_block) and libc.mallopt(trim_threshold, 1 << 30))
    logger.info("freed memory is kept for reuse" if took_effect else "this C library cannot keep freed memory")
    return took_effect


def computes_bfloat16(device: torch.device) -> bool:
    """True where `device` has instructions for bfloat16 products, so that autocast makes it faster.

    Example:
        >>> isinstance(computes_bfloat16(torch.device("cpu")), bool)
        True
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and bool(re.search(r"\bavx512_bf16\b|\bamx_bf16\b|\bbf16\b", flags.read_text()))


def start_process_group() -> None:
    """Joins the processes that torchrun started: through NCCL where there are GPUs, else through gloo.

    Raises:
        ValueError: when torchrun did not start this process.
    """
    if "RANK" not in os.environ:
        raise ValueError("multi_gpu.yaml runs under torchrun --standalone --nproc_per_node=N -m monai.bundle run …")
    dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo")
    # ignite's first look at the group is a collective: all processes must take it, not only those that save
    idist.sync()


def process_device() -> torch.device:
    """This process's GPU, or the CPU where there is none.

    Example:
        >>> process_device().type in ("cpu", "cuda")
        True
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def as_bool(value: bool | str) -> bool:
    """A switch from the command line, where `--resume true` arrives as a word.

    Raises:
        ValueError: when it is neither true nor false.

    Example:
        >>> as_bool("true"), as_bool(False)
        (True, False)
    """
    if isinstance(value, bool):
        return value
    if str(value).lower() not in ("true", "false"):
        raise ValueError(f"expected true or false, not {value!r}")
    return value.lower() == "true"


def is_rank_zero() -> bool:
    """True for rank 0, which alone writes files and prints.

    Example:
        >>> is_rank_zero()  # one process
        True
    """
    return not dist.is_initialized() or dist.get_rank() == 0


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
