"""The selective scan by the native kernel (scan_cpu.c), as PyTorch operators with fake and autograd implementations.

The kernel is plain C, loaded with ctypes; `pip install` builds it where there is a C compiler. It computes in float32.
Where gradients are wanted, the forward pass keeps the N states a channel before each chunk of 64 positions (L·N/64
values a channel and direction), and the backward pass scans each chunk again from there.
"""

import ctypes
import functools
import importlib.machinery
import math
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = "cpu"
INSTALL = "`pip install -e .` from the checkout, with gcc or clang on the path"
LEVELS = ("baseline", "avx2", "avx512")
_LANES = (4, 8, 16)


class _Scan(ctypes.Structure):
    """`struct scan` of scan_cpu.h."""

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
    """Why the kernel cannot be used and how to get it; empty if it can. A broken build is used, and raises."""
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
    """The instruction sets that this processor can run, worst first."""
    return LEVELS[: _library().scan_best_level() + 1]


def _run(backward: bool, level: str, sizes: dict[str, int], arrays: dict[str, Tensor | None]) -> None:
    """Fill a `struct scan` and run it; every array is contiguous float32."""
    scan = _Scan(level=LEVELS.index(level), **sizes)
    for name, array in arrays.items():
        setattr(scan, name, None if array is None else array.data_ptr())
    if _library().scan_run(ctypes.byref(scan), int(backward), torch.get_num_threads()):
        raise MemoryError("the selective scan found no memory for its buffers")


def _partition(items: int, channels: int, level: str) -> dict[str, int]:
    """Cut items first, then channels, so that every thread has as much to do as the others.

    Sums over channels need a copy for each segment of channels, sums over items a much smaller one for each item group.
    """
    threads = torch.get_num_threads()
    item_groups = math.gcd(items, threads)
    blocks = -(-channels // _LANES[LEVELS.index(level)])
    return {"item_groups": item_groups, "segments": min(threads // item_groups, blocks)}


def _level(level: str) -> str:
    known = available_levels()
    if level and level not in known:
        raise ValueError(f"instruction set {level!r} is not one of this processor's: {', '.join(known)}")
    return level or known[-1]


def _padded(channels: int) -> int:
    return -(-channels // 16) * 16


def _states(like: Tensor, items: int, directions: int, length: int, state: int, channels: int, save: bool) -> Tensor:
    if not save:
        return like.new_empty((0,))
    return like.new_empty(items, directions, -(-length // _chunk()), state, _padded(channels))


_operators = torch.library.Library("selective_scan", "DEF")
_operators.define(
    "scan_1d(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool delta_softplus,"
    ' bool save_states, str level="") -> (Tensor, Tensor)'
)
_operators.define(
    "scan_1d_backward(Tensor grad_y, Tensor states, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D,"
    ' Tensor? delta_bias, bool delta_softplus, str level="")'
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_operators.define(
    "scan_2d(Tensor x, Tensor x_dbl, Tensor dt_weight, Tensor A, Tensor D, Tensor dt_bias, bool save_states,"
    ' str level="") -> (Tensor, Tensor)'
)
_operators.define(
    "scan_2d_backward(Tensor grad_y, Tensor states, Tensor x, Tensor x_dbl, Tensor dt_weight, Tensor A, Tensor D,"
    ' Tensor dt_bias, str level="") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)'
)


def _contiguous(*tensors: Tensor | None) -> list[Any]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _sizes_1d(u: Tensor, A: Tensor, B: Tensor, softplus: bool, level: str) -> dict[str, int]:
    batch, channels, length = u.shape
    groups = B.shape[1]
    return {
        "directions": 1,
        "items": batch * groups,
        "groups": groups,
        "channels": channels // groups,
        "height": 1,
        "width": length,
        "state": A.shape[1],
        "rank": 0,
        "softplus": int(softplus),
        "padded_channels": _padded(channels // groups),
        **_partition(batch * groups, channels // groups, level),
    }


def _sizes_2d(x: Tensor, dt_weight: Tensor, A: Tensor, level: str) -> dict[str, int]:
    batch, height, width, channels = x.shape
    return {
        "directions": 4,
        "items": batch,
        "groups": 1,
        "channels": channels,
        "height": height,
        "width": width,
        "state": A.shape[1],
        "rank": dt_weight.shape[2],
        "softplus": 1,
        "padded_channels": _padded(channels),
        **_partition(batch, channels, level),
    }


@torch.library.impl(_operators, "scan_1d", "CPU")
def _scan_1d(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save_states: bool,
    level: str = "",
) -> tuple[Tensor, Tensor]:
    level = _level(level)
    u, delta, A, B, C, D, delta_bias = _contiguous(u, delta, A, B, C, D, delta_bias)
    sizes = _sizes_1d(u, A, B, delta_softplus, level)
    y = torch.empty_like(u)
    states = _states(u, sizes["items"], 1, u.shape[2], A.shape[1], sizes["channels"], save_states)
    if u.numel():
        arrays = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "bias": delta_bias, "y": y}
        _run(False, level, sizes, {**arrays, "states": states if save_states else None})
    return y, states


@torch.library.impl(_operators, "scan_1d_backward", "CPU")
def _scan_1d_backward(
    grad_y: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    level: str = "",
) -> tuple[Tensor, ...]:
    level = _level(level)
    grad_y, u, delta, A, B, C, D, delta_bias = _contiguous(grad_y, u, delta, A, B, C, D, delta_bias)
    sizes = _sizes_1d(u, A, B, delta_softplus, level)
    item_groups, segments = sizes["item_groups"], sizes["segments"]
    grad_u, grad_delta = torch.empty_like(u), torch.empty_like(u)
    grad_B, grad_C = u.new_empty(segments, *B.shape), u.new_empty(segments, *C.shape)
    grad_A = u.new_zeros(item_groups, *A.shape)
    grad_D, grad_bias = u.new_zeros(item_groups, len(A)), u.new_zeros(item_groups, len(A))
    if u.numel():
        arrays = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "bias": delta_bias, "states": states}
        gradients = {"grad_y": grad_y, "grad_u": grad_u, "grad_delta": grad_delta, "grad_B": grad_B, "grad_C": grad_C}
        sums = {"grad_A": grad_A, "grad_D": grad_D, "grad_bias": grad_bias}
        _run(True, level, sizes, {**arrays, **gradients, **sums})
    return grad_u, grad_delta, *(_sum(part) for part in (grad_A, grad_B, grad_C, grad_D, grad_bias))


@torch.library.impl(_operators, "scan_2d", "CPU")
def _scan_2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    save_states: bool,
    level: str = "",
) -> tuple[Tensor, Tensor]:
    level = _level(level)
    x, x_dbl, dt_weight, A, D, dt_bias = _contiguous(x, x_dbl, dt_weight, A, D, dt_bias)
    sizes = _sizes_2d(x, dt_weight, A, level)
    y = torch.empty_like(x)
    states = _states(x, len(x), 4, x.shape[1] * x.shape[2], A.shape[1], x.shape[3], save_states)
    if x.numel():
        arrays = {"u": x, "x_dbl": x_dbl, "dt_weight": dt_weight, "A": A, "D": D, "bias": dt_bias, "y": y}
        _run(False, level, sizes, {**arrays, "states": states if save_states else None})
    return y, states


@torch.library.impl(_operators, "scan_2d_backward", "CPU")
def _scan_2d_backward(
    grad_y: Tensor,
    states: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    level: str = "",
) -> tuple[Tensor, ...]:
    level = _level(level)
    grad_y, x, x_dbl, dt_weight, A, D, dt_bias = _contiguous(grad_y, x, x_dbl, dt_weight, A, D, dt_bias)
    sizes = _sizes_2d(x, dt_weight, A, level)
    item_groups, segments = sizes["item_groups"], sizes["segments"]
    grad_x, grad_x_dbl = torch.empty_like(x), x.new_empty(segments, *x_dbl.shape)
    grad_dt_weight, grad_A = x.new_zeros(item_groups, *dt_weight.shape), x.new_zeros(item_groups, *A.shape)
    grad_D, grad_dt_bias = x.new_zeros(item_groups, *D.shape), x.new_zeros(item_groups, *dt_bias.shape)
    if x.numel():
        arrays = {"u": x, "x_dbl": x_dbl, "dt_weight": dt_weight, "A": A, "D": D, "bias": dt_bias, "states": states}
        gradients = {"grad_y": grad_y, "grad_u": grad_x, "grad_x_dbl": grad_x_dbl, "grad_dt_weight": grad_dt_weight}
        sums = {"grad_A": grad_A, "grad_D": grad_D, "grad_bias": grad_dt_bias}
        _run(True, level, sizes, {**arrays, **gradients, **sums})
    return grad_x, *(_sum(part) for part in (grad_x_dbl, grad_dt_weight, grad_A, grad_D, grad_dt_bias))


def _sum(parts: Tensor) -> Tensor:
    """Add the tasks' copies; in this order whatever the threads did."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


@torch.library.register_fake("selective_scan::scan_1d", lib=_operators)
def _scan_1d_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    save_states: bool,
    level: str = "",
) -> tuple[Tensor, Tensor]:
    batch, groups = B.shape[:2]
    states = _states(u, batch * groups, 1, u.shape[2], A.shape[1], u.shape[1] // groups, save_states)
    return u.new_empty(u.shape), states


@torch.library.register_fake("selective_scan::scan_1d_backward", lib=_operators)
def _scan_1d_backward_fake(
    grad_y: Tensor,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    level: str = "",
) -> tuple[Tensor, ...]:
    shapes: list[Sequence[int]] = [u.shape, u.shape, A.shape, B.shape, C.shape, A.shape[:1], A.shape[:1]]
    return tuple(u.new_empty(shape) for shape in shapes)


@torch.library.register_fake("selective_scan::scan_2d", lib=_operators)
def _scan_2d_fake(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    save_states: bool,
    level: str = "",
) -> tuple[Tensor, Tensor]:
    states = _states(x, x.shape[0], 4, x.shape[1] * x.shape[2], A.shape[1], x.shape[3], save_states)
    return x.new_empty(x.shape), states


@torch.library.register_fake("selective_scan::scan_2d_backward", lib=_operators)
def _scan_2d_backward_fake(
    grad_y: Tensor,
    states: Tensor,
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    level: str = "",
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(tensor.shape) for tensor in (x, x_dbl, dt_weight, A, D, dt_bias))


def _setup_context_1d(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.saved, ctx.level = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_1d(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if not ctx.saved:
        _, states = torch.ops.selective_scan.scan_1d(*tensors, ctx.softplus, True, ctx.level)
    gradients = torch.ops.selective_scan.scan_1d_backward(grad_y, states, *tensors, ctx.softplus, ctx.level)
    wanted = [None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients, strict=True)]
    return *wanted, None, None, None


def _setup_context_2d(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.saved, ctx.level = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward_2d(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if not ctx.saved:
        _, states = torch.ops.selective_scan.scan_2d(*tensors, True, ctx.level)
    return *torch.ops.selective_scan.scan_2d_backward(grad_y, states, *tensors, ctx.level), None, None


torch.library.register_autograd(
    "selective_scan::scan_1d", _backward_1d, setup_context=_setup_context_1d, lib=_operators
)
torch.library.register_autograd(
    "selective_scan::scan_2d", _backward_2d, setup_context=_setup_context_2d, lib=_operators
)


def _backward_twice(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError("backend 'cpu' has no second derivatives of the selective scan; use backend='parallel'")


torch.library.register_autograd("selective_scan::scan_1d_backward", _backward_twice, lib=_operators)
torch.library.register_autograd("selective_scan::scan_2d_backward", _backward_twice, lib=_operators)


def _wants_gradients(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


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
    """The contract of `networks.selective_scan.selective_scan`; `level` forces one of `available_levels()`."""
    tensors = [None if tensor is None else tensor.float() for tensor in (u, delta, A, B, C, D, delta_bias)]
    y, _ = torch.ops.selective_scan.scan_1d(*tensors, delta_softplus, _wants_gradients(*tensors), level)
    return y.to(u.dtype)


def selective_scan_2d(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, level: str = ""
) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan_2d`; `level` forces one of `available_levels()`."""
    tensors = [tensor.float() for tensor in (x, x_dbl, dt_weight, A, D, dt_bias)]
    y, _ = torch.ops.selective_scan.scan_2d(*tensors, _wants_gradients(*tensors), level)
    return y.to(x.dtype)
