"""What the bundles' training loops share beyond MONAI's handlers: precision, progress, checkpoints, processes."""

import copy
import ctypes
import functools
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.data import DistributedSampler, MetaTensor
from monai.engines import SupervisedTrainer
from monai.handlers import from_engine
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset

from networks.cmunext import CMUNeXt, fold_norms
from networks.selective_scan import default_backend
from networks.vmunet import SS2D
from networks.weights import load_weights

logger = logging.getLogger(__name__)

TIMED_STEPS = 5


class Autocast(nn.Module):
    """Runs `network` under `torch.autocast` on whatever device the image is, and returns float32, or what is wider.

    MONAI's engines autocast on CUDA only; losses and metrics stay outside, in float32. bfloat16 needs no gradient
    scaler; float32 leaves the precision alone. The metadata of an image skips the network, where it would cost time at
    every operation, and is the result's again. `frozen`: where the network is compiled, its weights are constants.
    """

    def __init__(
        self,
        network: nn.Module,
        dtype: torch.dtype,
        channels_last: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.dtype = dtype
        # read when torch.compile meets a shape for the first time, which is within a call
        self.compiling = functools.partial(inductor_config.patch, freezing=True) if frozen else nullcontext
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format

    def forward(self, x: Tensor) -> Tensor:
        plain = x.as_tensor() if isinstance(x, MetaTensor) else x
        plain = plain.to(memory_format=self.memory_format)
        half = self.dtype is torch.bfloat16
        with self.compiling(), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
            y = self.network(plain)
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return MetaTensor(y).copy_meta_from(x) if isinstance(x, MetaTensor) else y


class Bar(ProgressBar):
    """ignite's progress bar, with the loss where there is one, shown by the first process only."""

    def __init__(self, loss: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.loss = from_engine(["loss"], first=True) if loss else None

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        if is_first_process():
            super().attach(engine, output_transform=self._shown if self.loss else None)

    def _shown(self, output: Any) -> dict[str, Any]:
        return {"loss": self.loss(output)} if self.loss else {}


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
        if is_first_process():
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


def trainer(max_epochs: int, parts: Mapping[str, Any]) -> SupervisedTrainer:
    """MONAI's trainer from the `parts` all bundles share and the number of epochs, which the zoo asks for by name."""
    return SupervisedTrainer(max_epochs=max_epochs, **parts)


def poly_schedule(optimizer: Optimizer, steps: int, power: float = 0.9) -> LambdaLR:
    """lr · (1 − i / steps)^power, set after step i = 0, 1, …, so that the first two steps both run at the full rate.

    The schedule of CMUNeXt's training (arXiv 2308.01239), to be stepped after each step.
    """
    return LambdaLR(optimizer, lambda step: max(1 - max(step - 1, 0) / steps, 0.0) ** power)


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
        # a network whose score is not a number is never the best
        if score > (-math.inf if self.best is None else self.best):
            self.best, self.since_best = score, 0
            self._save(self.network.state_dict(), "model.pt")
            logger.info(f"best {metric} so far, {sign * score:.4f}: saved {self.ckpt_dir / 'model.pt'}")
            return
        self.since_best += 1
        if 0 < self.patience <= self.since_best:
            logger.info(f"no better {metric} in {self.since_best} looks: training ends early")
            trainer.terminate()

    def _save_last(self, trainer: Engine) -> None:
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        selection = {"best": self.best, "since_best": self.since_best}
        self._save({**state, "trainer": dict(trainer.state_dict()), "selection": selection}, "last.pt")

    def _save(self, content: Any, name: str) -> None:
        if is_first_process():
            save_atomically(content, self.ckpt_dir / name)

    def _load(self, trainer: Engine) -> None:
        path = self.ckpt_dir / "last.pt"
        if not path.is_file():
            raise SystemExit(f"{path} does not exist: start without --resume, or name the run's --ckpt_dir")
        max_epochs = trainer.state.max_epochs or 0
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
            self.best, self.since_best = state["selection"]["best"], state["selection"]["since_best"]
            trainer.load_state_dict(state["trainer"])
        except (RuntimeError, ValueError, TypeError, KeyError, EOFError, UnpicklingError) as error:
            reason = str(error).partition("\n")[0]
            raise SystemExit(f"{path} does not continue this run ({reason}): start without --resume") from error
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
        raise SystemExit(f"{error}: train first, or name an existing checkpoint as --ckpt_path") from error
    except ValueError as error:
        raise SystemExit(str(error)) from error
    logger.info(str(report))
    return network


def prepare_network(
    network: nn.Module,
    device: torch.device,
    amp_dtype: str = "float32",
    channels_last: bool | str = "auto",
    compiled: bool | str = False,
    frozen: bool = False,
) -> nn.Module:
    """`network` on `device`, made fast, and with gradients averaged where there is a process group.

    Args:
        amp_dtype: "float32"; "bfloat16" autocasts; "auto" does so where the device computes in bfloat16 natively.
        channels_last: memory layout of the convolutions; "auto" takes it for networks that normalise in batches, that
            is for convolutional ones, where it is faster on CPU and GPU alike.
        compiled: through `torch.compile`, which takes a minute and pays later; "auto" does so where there is what it
            needs, a GPU or a C++ compiler.
        frozen: a copy that will not be trained: CMUNeXt's norms are folded into its convolutions, weights are stored in
            bfloat16 where autocast would cast them for each image, and compiling takes them for constants.
    """
    if amp_dtype not in ("float32", "bfloat16", "auto"):
        raise SystemExit(f"amp_dtype must be float32, bfloat16 or auto, not {amp_dtype!r}")
    half = computes_bfloat16(device) if amp_dtype == "auto" else amp_dtype == "bfloat16"
    convolutional = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    nhwc = convolutional if channels_last == "auto" else flag(channels_last)
    if compiled == "auto":
        compiled = device.type == "cuda" or shutil.which("c++") is not None
    if frozen and isinstance(network, CMUNeXt):
        network = fold_norms(network)
    if frozen and half:
        network = halve_weights(network)
    if device.type == "cpu":
        keep_freed_memory()
    network = network.to(device)
    if nhwc:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if flag(compiled):
        network.compile()
    prepared: nn.Module = Autocast(
        network, torch.bfloat16 if half else torch.float32, nhwc, frozen=frozen and flag(compiled)
    )
    if dist.is_initialized():
        prepared = DistributedDataParallel(prepared, device_ids=[device] if device.type == "cuda" else None)
    return prepared


def halve_weights(network: nn.Module) -> nn.Module:
    """A copy with the weights of linear layers, convolutions and projections in bfloat16, the scan's in float32."""
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.bfloat16()
        elif isinstance(module, SS2D):
            module.x_proj_weight.data = module.x_proj_weight.bfloat16()
    return network


def keep_freed_memory() -> None:
    """Lets glibc keep what a layer frees for the next one, up to a gibibyte.

    By default it hands large pieces back to the system at once, which then clears and maps them again: a tenth of the
    time of a forward pass. The process is as large as at its peak then, until it ends. Other C libraries: no effect.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 1 << 30)


def computes_bfloat16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16 products, so that autocast makes it faster."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = Path("/proc/cpuinfo")
    return flags.is_file() and bool(re.search(r"\bavx512_bf16\b|\bamx_bf16\b|\bbf16\b", flags.read_text()))


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


def shared_sampler(dataset: Dataset) -> DistributedSampler | None:
    """Gives each process its share of the training images, shuffled; None where there is one process."""
    return DistributedSampler(dataset, even_divisible=True, shuffle=True) if dist.is_initialized() else None


def flag(value: bool | str) -> bool:
    """A switch from the command line, where `--resume true` arrives as a word.

    Raises:
        SystemExit: when it is neither true nor false.
    """
    if isinstance(value, bool):
        return value
    if value.lower() not in ("true", "false"):
        raise SystemExit(f"expected true or false, not {value!r}")
    return value.lower() == "true"


def is_first_process() -> bool:
    """Whether this process writes and prints; the only one does."""
    return not dist.is_initialized() or dist.get_rank() == 0


def _clock(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"
