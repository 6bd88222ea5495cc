"""The selective scan of Mamba: one contract, several backends, chosen by device.

- `reference`: a loop over the positions in PyTorch; slow, obvious, the only one that computes in float64.
- `parallel`: PyTorch only, no loop over the length; runs everywhere, and is what tracing, scripting and export use.
- `onnx`: no backend, but what `onnx.to_onnx` writes: one standard `Scan` for any length.
- `pt2`: no backend either, but what `pt2.to_pt2` writes: PyTorch's `scan` operator, for any length.
- `cpu`: the native kernel, built at installation where there is a C compiler.
- `mamba_ssm`: that package's own kernel for NVIDIA GPUs, where it is installed.
- `triton`: kernels for NVIDIA GPUs, compiled by the Triton that comes with PyTorch.

Symbols: u (or x) input, delta (Δ) step, A state decay, B and C input and output projections, D skip; N states a
channel, G groups that share B and C, L positions, R rank of Δ.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import cpu, mamba_ssm, onnx, parallel, pt2, reference, triton_scan

__all__ = ["available_backends", "default_backend", "selective_scan", "selective_scan_2d"]

logger = logging.getLogger(__name__)

# Best first. `mamba_ssm` is proven on GPUs; `triton` has only run in Triton's interpreter so far.
# A native backend names its DEVICE, and unavailable() says why it cannot be used: "" if it can.
_NATIVE: dict[str, ModuleType] = {"cpu": cpu, "mamba_ssm": mamba_ssm, "triton": triton_scan}
_EVERYWHERE: dict[str, ModuleType] = {"parallel": parallel, "reference": reference}


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that can be used on `device`, best first.

    Example:
        >>> available_backends("cpu")[-2:]
        ('parallel', 'reference')
    """
    kind = torch.device(device).type
    native = (name for name, module in _NATIVE.items() if kind == module.DEVICE and not module.unavailable())
    return *native, *_EVERYWHERE


def default_backend(device: torch.device | str) -> str:
    """The backend that `backend=None` takes on `device`.

    Example:
        >>> default_backend("meta")
        'parallel'
    """
    return available_backends(device)[0]


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _choose(backend: str | None, kind: str) -> str:
    """The backend for a kind of device: the best one, or the one asked for.

    Raises:
        ValueError: when the backend is unknown or not for this device.
        RuntimeError: when it is not installed.
    """
    if backend is None:
        chosen = default_backend(kind)
        missing = [module.unavailable() for module in _NATIVE.values() if kind == module.DEVICE]
        if chosen in _EVERYWHERE and missing:
            _warn_once(f"{'; '.join(missing)}. Until then the selective scan runs in plain PyTorch, many times slower")
        return chosen
    if backend not in _NATIVE | _EVERYWHERE:
        raise ValueError(f"unknown selective scan backend {backend!r}; known are {', '.join(_NATIVE | _EVERYWHERE)}")
    if backend in _NATIVE and _NATIVE[backend].unavailable():
        raise RuntimeError(_NATIVE[backend].unavailable())
    if backend not in available_backends(kind):
        known = ", ".join(available_backends(kind))
        raise ValueError(f"selective scan backend {backend!r} does not run on {kind}; there are {known}")
    return backend


# All that torch.compiler.assume_constant_result does; calling it imports torch._dynamo, and with it Triton.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _module(backend: str | None, device: torch.device) -> ModuleType:
    return (_NATIVE | _EVERYWHERE)[_choose(backend, device.type)]


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Switches autocast off, on devices that have it."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@functools.cache
def _scripted(name: str) -> Any:
    """`parallel` as a ScriptFunction: called while tracing it keeps its loops, so that the length stays dynamic."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(getattr(parallel, name))


def _check(u: str, expected: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raise on the first tensor that has not the shape expected, is not real, or is not on the device of `u`."""
    first = expected[u][0]
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"selective scan: {name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        if not tensor.is_floating_point():
            raise TypeError(f"selective scan: {name} has dtype {tensor.dtype}, expected a floating-point one")
        if first is not None and tensor.device != first.device:
            raise ValueError(f"selective scan: {name} is on {tensor.device}, but {u} is on {first.device}")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y_t = C_t · h_t + D u_t with h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t, h_0 = 0.

    Args:
        u, delta: (batch, G·d, L).
        A: (G·d, N).
        B, C: (batch, G, N, L), or (batch, N, L) for one group.
        D, delta_bias: (G·d,).
        delta_softplus: Δ = softplus(delta + delta_bias) instead of delta + delta_bias.
        backend: None for the best on u's device. Under tracing, scripting and export always `parallel`.

    Returns:
        y (batch, G·d, L) in u's dtype. Computed in float32, by `reference` in float64 if u is.

    Raises:
        ValueError: when shapes or devices do not fit together, or the backend is unknown or not for this device.
        TypeError: when a tensor is not of a real floating-point type.
        RuntimeError: when the backend asked for is not installed.

    Example:
        A state that forgets nothing (A = 0) adds up its inputs.

        >>> u = torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> one = torch.ones(1, 1, 3)
        >>> selective_scan(u, delta=one, A=torch.zeros(1, 1), B=one, C=one)
        tensor([[[1., 3., 6.]]])
    """
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    if torch.jit.is_scripting():
        return parallel.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    else:
        if pt2.exporting():
            return pt2.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
        with _without_autocast(u.device.type):
            if torch.jit.is_tracing():
                return _scripted("selective_scan")(u, delta, A, B, C, D, delta_bias, delta_softplus)
            if torch.compiler.is_exporting():
                form = onnx if onnx.exporting() else parallel
                return form.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
            if u.dim() != 3 or A.dim() != 2 or B.dim() != 4 or A.shape[0] % B.shape[1]:
                raise ValueError(
                    "selective scan: expected u (batch, G·d, L), A (G·d, N) and B (batch, G, N, L), got u"
                    f" {tuple(u.shape)}, A {tuple(A.shape)} and B {tuple(B.shape)}"
                )
            batch, channels, length = u.shape
            projection = (batch, B.shape[1], A.shape[1], length)
            expected = {
                "u": (u, (batch, A.shape[0], length)),
                "delta": (delta, (batch, channels, length)),
                "A": (A, (channels, A.shape[1])),
                "B": (B, projection),
                "C": (C, projection),
                "D": (D, (channels,)),
                "delta_bias": (delta_bias, (channels,)),
            }
            _check("u", expected)
            return _module(backend, u.device).selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


def selective_scan_2d(
    x: Tensor,
    x_dbl: Tensor,
    dt_weight: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Scan an image in four directions and sum the results at their positions.

    Directions: 0 row-major, 1 column-major, 2 and 3 the reverses of 0 and 1. Projections are pointwise, so that one
    Linear makes x_dbl in spatial order, and a direction is nothing but an order of positions.

    Args:
        x: (B, H, W, d).
        x_dbl: (B, H, W, 4, R + 2N): for each position, in spatial order, and direction the low-rank (dt, B, C).
        dt_weight: (4, d, R); Δ_k = softplus(dt_k · dt_weight[k]ᵀ + dt_bias[k]).
        A: (4·d, N), negative; rows k·d … (k+1)·d − 1 belong to direction k.
        D: (4·d,).
        dt_bias: (4, d).
        backend: None for the best on x's device. Under tracing, scripting and export always `parallel`.

    Returns:
        y (B, H, W, d) in x's dtype. Computed in float32, by `reference` in float64 if x is.

    Raises:
        ValueError: when shapes or devices do not fit together, or the backend is unknown or not for this device.
        TypeError: when a tensor is not of a real floating-point type.
        RuntimeError: when the backend asked for is not installed.

    Example:
        >>> x, x_dbl = torch.rand(1, 4, 5, 6), torch.rand(1, 4, 5, 4, 2 + 2 * 3)
        >>> dt_weight, dt_bias = torch.rand(4, 6, 2), torch.rand(4, 6)
        >>> selective_scan_2d(x, x_dbl, dt_weight, A=-torch.rand(24, 3), D=torch.rand(24), dt_bias=dt_bias).shape
        torch.Size([1, 4, 5, 6])
    """
    if torch.jit.is_scripting():
        return parallel.selective_scan_2d(x, x_dbl, dt_weight, A, D, dt_bias)
    else:
        if pt2.exporting():
            return pt2.selective_scan_2d(x, x_dbl, dt_weight, A, D, dt_bias)
        with _without_autocast(x.device.type):
            if torch.jit.is_tracing():
                return _scripted("selective_scan_2d")(x, x_dbl, dt_weight, A, D, dt_bias)
            if torch.compiler.is_exporting():
                form = onnx if onnx.exporting() else parallel
                return form.selective_scan_2d(x, x_dbl, dt_weight, A, D, dt_bias)
            if x.dim() != 4 or A.dim() != 2 or dt_weight.dim() != 3:
                raise ValueError(
                    "selective scan: expected x (B, H, W, d), A (4·d, N) and dt_weight (4, d, R), got x"
                    f" {tuple(x.shape)}, A {tuple(A.shape)} and dt_weight {tuple(dt_weight.shape)}"
                )
            channels, state, rank = x.shape[3], A.shape[1], dt_weight.shape[2]
            expected = {
                "x": (x, tuple(x.shape)),
                "x_dbl": (x_dbl, (*x.shape[:3], 4, rank + 2 * state)),
                "dt_weight": (dt_weight, (4, channels, rank)),
                "A": (A, (4 * channels, state)),
                "D": (D, (4 * channels,)),
                "dt_bias": (dt_bias, (4, channels)),
            }
            _check("x", expected)
            return _module(backend, x.device).selective_scan_2d(x, x_dbl, dt_weight, A, D, dt_bias)
