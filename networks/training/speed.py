"""What makes a network fast without changing what it computes: precision, memory layout, compiling, memory."""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import re
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from monai.data import MetaTensor
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from networks.training.processes import share_batch_norms

logger = logging.getLogger(__name__)


def prepare_network(
    network: nn.Module,
    device: torch.device | str,
    amp_dtype: str = "float32",
    channels_last: bool | str = "auto",
    compile: bool | str = False,
    frozen: bool = False,
    out_channels: int | None = None,
    sync_batch_norm: bool = False,
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
        sync_batch_norm: of several processes, batch norms take the batches of all together.

    Raises:
        ValueError: for a word that is none of those, or when the output does not fit the classes.

    Example:
        >>> prepare_network(nn.Conv2d(3, 1, 1), "cpu")(torch.zeros(1, 3, 8, 8)).shape
        torch.Size([1, 1, 8, 8])
    """
    device = torch.device(device)
    if amp_dtype not in ("float32", "bfloat16", "auto"):
        raise ValueError(f"amp_dtype must be float32, bfloat16 or auto, not {amp_dtype!r}")
    for name, switch in {"channels_last": channels_last, "compile": compile}.items():
        if switch not in (True, False, "auto"):
            raise ValueError(f"{name} must be True, False or 'auto', not {switch!r}")
    check_channels(network, getattr(network, "out_channels", None), out_channels)
    bfloat16 = computes_bfloat16(device) if amp_dtype == "auto" else amp_dtype == "bfloat16"
    convolutional = any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    nhwc = convolutional if channels_last == "auto" else channels_last is True
    compiler = device.type == "cuda" or shutil.which(os.environ.get("CXX", "g++")) is not None
    compiled = compiler if compile == "auto" else compile is True
    if compiled and not compiler:
        raise ValueError("--compile true needs a C++ compiler: install g++ or clang++, or leave it out")
    if frozen:
        freeze = getattr(network, "frozen", None)
        network = freeze(bfloat16) if freeze else copy.deepcopy(network).eval()
    if sync_batch_norm and dist.is_initialized():
        network = share_batch_norms(network)
    network = network.to(device)
    if nhwc:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        network.compile()
    prepared: nn.Module = Autocast(network, bfloat16, nhwc, frozen and compiled, out_channels, frozen)
    # what is not trained needs no gradients from the others, and each process may have other images
    if dist.is_initialized() and not frozen:
        _describe_depthwise_as_channels_last(network)
        prepared = DistributedDataParallel(prepared, device_ids=[device] if device.type == "cuda" else None)
    return prepared


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
        finite: refuse answers that are not finite, as damaged weights give them.

    Raises:
        ValueError: when the network answers with another number of channels, or is to be finite and is not.

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
        finite: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.out_channels = out_channels
        self.finite = finite
        # not self.bfloat16, which is a method of modules
        self.to_bfloat16 = bfloat16
        self.memory_format = torch.channels_last if channels_last else torch.preserve_format
        self.constant_weights = constant_weights
        self.register_load_state_dict_pre_hook(_take_bare_names)

    def forward(self, x: Tensor) -> Tensor:
        plain = x.as_tensor() if isinstance(x, MetaTensor) else x
        plain = plain.to(memory_format=self.memory_format)
        autocast = torch.autocast(x.device.type, dtype=torch.bfloat16) if self.to_bfloat16 else nullcontext()
        with _compiling_constants() if self.constant_weights else nullcontext(), autocast:
            y = self.network(plain)
        check_channels(self.network, y.shape[1], self.out_channels)
        if self.finite and not y.isfinite().all():
            raise ValueError(
                f"{type(self.network).__name__} answers with values that are not finite: its weights are bad"
            )
        y = y.to(torch.promote_types(y.dtype, torch.float32))
        return MetaTensor(y).copy_meta_from(x) if isinstance(x, MetaTensor) else y


def _take_bare_names(module: nn.Module, state_dict: dict, prefix: str, *others: object) -> None:
    """Lets `Autocast` load the weights of the bare network, which is what other programs have."""
    own = [name for name in state_dict if name.startswith(prefix)]
    if not any(name.startswith(f"{prefix}network.") for name in own):
        for name in own:
            state_dict[f"{prefix}network.{name.removeprefix(prefix)}"] = state_dict.pop(name)


def check_channels(network: nn.Module, channels: int | None, needed: int | None) -> None:
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
