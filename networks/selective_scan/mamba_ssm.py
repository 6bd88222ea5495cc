"""The selective scan by mamba_ssm's own CUDA kernel, where that is really there.

The package can be installed without its kernel: then it computes in plain PyTorch, and does not count as this backend.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from .directions import from_sequences, to_sequences

DEVICE = "cuda"
INSTALL = (
    "`pip install --no-build-isolation mamba-ssm causal-conv1d` (needs nvcc or a prebuilt wheel; the development"
    " version builds this kernel only with MAMBA_KEEP_CUDA_BUILD=TRUE)"
)


@functools.cache
def unavailable() -> str:
    """Why the kernel cannot be used and how to get it; empty if it can.

    Example:
        >>> torch.cuda.is_available() or bool(unavailable())
        True
    """
    for module in ("mamba_ssm.ops.selective_scan_interface", "selective_scan_cuda"):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name == "selective_scan_cuda":
                return f"mamba_ssm is there without its kernel (no module selective_scan_cuda); install it: {INSTALL}"
            return f"backend 'mamba_ssm' is not installed ({error}); install it: {INSTALL}"
        except ImportError as error:
            return f"mamba_ssm's kernel is there but does not load ({error}); install it again: {INSTALL}"
    return "" if torch.cuda.is_available() else "backend 'mamba_ssm' needs an NVIDIA GPU and a CUDA build of PyTorch"


def _kernel() -> Any:
    return importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan`.

    Raises:
        ImportError: when the kernel is not there; `unavailable()` says how to get it.

    Example:
        >>> u, one = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
        >>> arguments = [u, one, torch.zeros(1, 1), one[:, None], one[:, None]]
        >>> y = [[[1.0, 3.0, 6.0]]]
        >>> unavailable() != "" or selective_scan(*(t.cuda() for t in arguments), None, None, False).tolist() == y
        True
    """
    y = _kernel()(
        u.float().contiguous(),
        delta.float().contiguous(),
        A.float().contiguous(),
        B.float().contiguous(),
        C.float().contiguous(),
        None if D is None else D.float().contiguous(),
        delta_bias=None if delta_bias is None else delta_bias.float().contiguous(),
        delta_softplus=delta_softplus,
    )
    return y.to(u.dtype)


def selective_scan_2d(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan_2d`, through the one-dimensional one.

    Raises:
        ImportError: when the kernel is not there; `unavailable()` says how to get it.
    """
    u, delta, B, C = to_sequences(x.float(), x_dbl.float(), dt_weight.float(), A.shape[1])
    y = selective_scan(u, delta, A, B, C, D, dt_bias.reshape(-1), True)
    return from_sequences(y, x.shape[1], x.shape[2]).to(x.dtype)
