"""The selective scan by the native kernel (scan_cpu.c), as PyTorch operators with fake and autograd implementations.

The kernel is plain C, loaded with ctypes; `pip install` builds it where there is a C compiler. It computes in float32.
Where gradients are wanted, the forward pass keeps the N states a channel before each chunk of 64 positions (L·N/64
values a channel and direction), and the backward pass scans each chunk again from there.

One operator serves both contracts: it takes sequences with `delta`, `B` and `C`, or an image with `x_dbl` and
`dt_weight`, which it scans in four directions.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

DEVICE = "cpu"
_ROOT = pathlib.Path(__file__).parents[2]
_PACKED = (_ROOT / "setup.py").is_file() and not (_ROOT / "pyproject.toml").is_file()
_BUILD = f"`python setup.py build_ext --inplace` in {_ROOT}" if _PACKED else "`pip install -e .` from the checkout"
INSTALL = f"{_BUILD}, with gcc or clang on the path"
# of its own for each copy of this package: that of a packed bundle may be in one process with this one
NAMESPACE = __name__.rpartition(".")[0].removeprefix("networks.").replace(".", "_")
LEVELS = ("baseline", "avx2", "avx512")
_LANES = (4, 8, 16)
_INPUTS = ("u", "delta", "B", "C", "x_dbl", "dt_weight", "A", "D", "bias")


class _Scan(ctypes.Structure):
    """`struct scan` of scan_cpu.h."""

    __slots__ = ()  # a name that is not a field raises
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("level", "item_groups", "segments", "directions", "items", "groups")),
        *((name, ctypes.c_int64) for name in ("channels", "height", "width", "state", "rank", "softplus")),
        ("padded_channels", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("u", "delta", "B", "C", "x_dbl", "dt_weight", "A", "D", "bias")),
        *((name, ctypes.c_void_p) for name in ("y", "states", "grad_y", "grad_u", "grad_delta", "grad_B", "grad_C")),
        *((name, ctypes.c_void_p) for name in ("grad_x_dbl", "grad_dt_weight", "grad_A", "grad_D", "grad_bias")),
    ]


def _library_path() -> pathlib.Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = pathlib.Path(__file__).with_name("scan_cpu" + suffix)
        if path.exists():
            return path
    return None


@functools.cache
def unavailable() -> str:
    """Why the kernel cannot be used and how to get it; empty if it can. A broken build is used, and raises.

    Example:
        >>> isinstance(unavailable(), str)
        True
    """
    return "" if _library_path() else f"the native kernel of the selective scan is not built; build it: {INSTALL}"


@functools.cache
def _library() -> ctypes.CDLL:
    path = _library_path()
    if path is None:
        raise RuntimeError(unavailable())
    library = ctypes.CDLL(str(path))
    if ctypes.c_int64.in_dll(library, "scan_struct_size").value != ctypes.sizeof(_Scan):
        raise RuntimeError(f"{path} was built from other sources; build it again: {INSTALL}")
    library.scan_best_level.restype = ctypes.c_int64
    library.scan_run.argtypes = [ctypes.POINTER(_Scan), ctypes.c_int, ctypes.c_int]
    return library


@functools.cache
def _chunk() -> int:
    return ctypes.c_int64.in_dll(_library(), "scan_chunk").value


@functools.cache
def available_levels() -> tuple[str, ...]:
    """The instruction sets that this processor can run, worst first.

    Raises:
        RuntimeError: when the kernel is not built.

    Example:
        >>> bool(unavailable()) or available_levels()[0] == "baseline"
        True
    """
    return LEVELS[: _library().scan_best_level() + 1]


def _level(level: str) -> str:
    known = available_levels()
    if level and level not in known:
        raise ValueError(f"instruction set {level!r} is not one of this processor's: {', '.join(known)}")
    return level or known[-1]


def _inputs(*tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {name: None if t is None else t.contiguous() for name, t in zip(_INPUTS, tensors, strict=True)}


def _sizes(u: Tensor, B: Tensor | None, dt_weight: Tensor | None, A: Tensor) -> dict[str, int]:
    """What `struct scan` says of the shapes."""
    if B is not None:
        batch, groups = B.shape[:2]
        channels, height, width = u.shape[1] // groups, 1, u.shape[2]
        sizes = {"directions": 1, "items": batch * groups, "groups": groups}
    else:
        batch, height, width, channels = u.shape
        sizes = {"directions": 4, "items": batch, "groups": 1}
    return {
        **sizes,
        "channels": channels,
        "padded_channels": -(-channels // _LANES[-1]) * _LANES[-1],
        "height": height,
        "width": width,
        "state": A.shape[1],
        "rank": 0 if dt_weight is None else dt_weight.shape[2],
    }


def _partition(items: int, channels: int, level: str) -> dict[str, int]:
    """Cuts items first, then channels, so that every thread has as much to do as the others.

    Sums over channels need a copy for each segment of channels, sums over items a much smaller one for each item group.
    """
    threads = torch.get_num_threads()
    item_groups = math.gcd(items, threads)
    blocks = -(-channels // _LANES[LEVELS.index(level)])
    return {"item_groups": item_groups, "segments": min(threads // item_groups, blocks)}


def _states_shape(sizes: dict[str, int], save: bool) -> tuple[int, ...]:
    chunks = -(-sizes["height"] * sizes["width"] // _chunk())
    return (sizes["items"], sizes["directions"], chunks, sizes["state"], sizes["padded_channels"]) if save else (0,)


def _run(
    backward: bool, sizes: dict[str, int], softplus: bool, level: str, arrays: Mapping[str, Tensor | None]
) -> None:
    scan = _Scan(softplus=int(softplus), level=LEVELS.index(level), **sizes)
    for name, array in arrays.items():
        if array is not None:
            if array.dtype != torch.float32 or not array.is_contiguous():
                raise TypeError(f"the kernel takes contiguous float32, not {name} of {array.dtype}")
            setattr(scan, name, array.data_ptr())
    if _library().scan_run(ctypes.byref(scan), int(backward), torch.get_num_threads()):
        raise MemoryError("the selective scan found no memory for its buffers")


def _scan_on_cpu(
    u: Tensor,
    delta: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    x_dbl: Tensor | None,
    dt_weight: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    save_states: bool,
    level: str,
) -> tuple[Tensor, Tensor]:
    """y like u, and the states before each chunk if they are to be saved. All tensors are float32.

    Args:
        u: (batch, G·d, L) with `delta` like u, `B` and `C` (batch, G, N, L); or (B, H, W, d) with `x_dbl` (B, H, W, 4,
            R + 2N) and `dt_weight` (4, d, R).
        A: (channels, N), as D and bias, each a value for all channels, of all groups or directions.
        level: one of `available_levels()`, or empty for the best.
    """
    level = _level(level)
    inputs = _inputs(u, delta, B, C, x_dbl, dt_weight, A, D, bias)
    sizes = _sizes(u, B, dt_weight, A)
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    states = u.new_empty(_states_shape(sizes, save_states))
    if u.numel():
        sizes |= _partition(sizes["items"], sizes["channels"], level)
        _run(False, sizes, softplus, level, {**inputs, "y": y, "states": states if save_states else None})
    return y, states


def _scan_backward_on_cpu(
    grad_y: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    x_dbl: Tensor | None,
    dt_weight: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    level: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of u … bias, arguments as of the scan; an empty tensor for one that is not there."""
    level = _level(level)
    inputs = _inputs(u, delta, B, C, x_dbl, dt_weight, A, D, bias)
    if not u.numel():
        return tuple(u.new_empty(0) if tensor is None else torch.zeros_like(tensor) for tensor in inputs.values())  # type: ignore[return-value]
    sizes = _sizes(u, B, dt_weight, A)
    sizes |= _partition(sizes["items"], sizes["channels"], level)
    gradients: dict[str, Tensor] = {}
    for name, tensor in inputs.items():
        if tensor is None:
            continue
        if name in ("u", "delta"):
            gradients[name] = torch.empty_like(tensor)
        elif name in ("B", "C", "x_dbl"):
            gradients[name] = tensor.new_empty(sizes["segments"], *tensor.shape)
        else:
            gradients[name] = tensor.new_zeros(sizes["item_groups"], *tensor.shape)
    outputs = {f"grad_{name}": gradient for name, gradient in gradients.items()}
    _run(True, sizes, softplus, level, {**inputs, **outputs, "states": states, "grad_y": grad_y.contiguous()})
    # The tasks' copies are added in this order, whatever the threads did.
    for name in gradients.keys() - {"u", "delta"}:
        copies = gradients[name]
        gradients[name] = copies[0] if len(copies) == 1 else copies.sum(0)
    return tuple(gradients[name] if name in gradients else u.new_empty(0) for name in _INPUTS)  # type: ignore[return-value]


# Not torch.library.custom_op: what that does around each call took 3 % of a scan of 384 channels and 1024 positions.
_operators = torch.library.Library(NAMESPACE, "DEF")
for _name, _function in (("cpu_scan", _scan_on_cpu), ("cpu_scan_backward", _scan_backward_on_cpu)):
    _operators.define(_name + torch.library.infer_schema(_function, mutates_args=()))
    _operators.impl(_name, _function, "CPU")
_scan = getattr(torch.ops, NAMESPACE).cpu_scan.default
_scan_backward = getattr(torch.ops, NAMESPACE).cpu_scan_backward.default


@torch.library.register_fake(_scan, lib=_operators)
def _scan_fake(
    u: Tensor,
    delta: Tensor | None,
    B: Tensor | None,
    C: Tensor | None,
    x_dbl: Tensor | None,
    dt_weight: Tensor | None,
    A: Tensor,
    D: Tensor | None,
    bias: Tensor | None,
    softplus: bool,
    save_states: bool,
    level: str,
) -> tuple[Tensor, Tensor]:
    return u.new_empty(u.shape), u.new_empty(_states_shape(_sizes(u, B, dt_weight, A), save_states))


@torch.library.register_fake(_scan_backward, lib=_operators)
def _scan_backward_fake(grad_y: Tensor, states: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    u, *tensors = arguments[: len(_INPUTS)]
    return tuple(u.new_empty(0 if tensor is None else tensor.shape) for tensor in (u, *tensors))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.saved, ctx.level = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if not ctx.saved:
        _, states = _scan(*tensors, ctx.softplus, True, ctx.level)
    gradients = _scan_backward(grad_y, states, *tensors, ctx.softplus, ctx.level)
    wanted = [None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients, strict=True)]
    return *wanted, None, None, None


def _backward_twice(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("backend 'cpu' has no second derivatives of the selective scan; use backend='parallel'")


torch.library.register_autograd(_scan, _backward, setup_context=_setup_context, lib=_operators)
torch.library.register_autograd(_scan_backward, _backward_twice, lib=_operators)


def _scan_float32(*tensors: Tensor | None, softplus: bool, level: str) -> Tensor:
    inputs = [None if tensor is None else tensor.float() for tensor in tensors]
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    return _scan(*inputs, softplus, save, level)[0]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    level: str = "",
) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan`; `level` forces one of `available_levels()`.

    Raises:
        RuntimeError: when the kernel is not built.
        ValueError: when the processor does not have the level.

    Example:
        >>> u, one = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
        >>> arguments = [u, one, torch.zeros(1, 1), one[:, None], one[:, None], None, None, False]
        >>> unavailable() != "" or selective_scan(*arguments, level="baseline").tolist() == [[[1.0, 3.0, 6.0]]]
        True
    """
    y = _scan_float32(u, delta, B, C, None, None, A, D, delta_bias, softplus=delta_softplus, level=level)
    return y.to(u.dtype)


def selective_scan_2d(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, level: str = ""
) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan_2d`; `level` as `selective_scan`'s.

    Raises:
        RuntimeError: when the kernel is not built.
        ValueError: when the processor does not have the level.

    Example:
        >>> x, x_dbl, dt_weight = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4, 7), torch.ones(4, 4, 1)
        >>> arguments = [x, x_dbl, dt_weight, -torch.ones(16, 3), torch.ones(16), torch.ones(4, 4)]
        >>> unavailable() != "" or selective_scan_2d(*arguments, level="baseline").shape == x.shape
        True
    """
    return _scan_float32(x, None, None, None, x_dbl, dt_weight, A, D, dt_bias, softplus=True, level=level).to(x.dtype)
