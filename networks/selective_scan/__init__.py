"""The selective scan of Mamba: one contract, several backends, chosen by device.

- `reference`: a loop over the positions in PyTorch; slow, obvious, the only one that computes in float64.
- `parallel`: PyTorch only, no loop over the length; runs everywhere, and is what tracing, scripting and export use.
- `cpu`: the native kernel, forward and backward, built at installation where there is a C compiler.
- `cuda`: mamba_ssm's kernel, where it is really there.

Symbols: u input, delta (Δ) step, A state decay, B and C input and output projections, D skip; N states a channel,
G groups that share B and C, L positions, R rank of Δ.
"""

import torch
from torch import Tensor

from . import parallel, reference

__all__ = ["available_backends", "default_backend", "selective_scan", "selective_scan_2d"]


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that can be used on `device`, best first."""
    return ("parallel", "reference")


def default_backend(device: torch.device | str) -> str:
    """The backend that `backend=None` takes on `device`."""
    return available_backends(device)[0]


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
        delta_softplus: Δ = softplus(delta + delta_bias).

    Returns:
        y (batch, G·d, L) in u's dtype.
    """
    if B.dim() == 3:
        B = B.unsqueeze(1)
    if C.dim() == 3:
        C = C.unsqueeze(1)
    if torch.jit.is_scripting():
        return parallel.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)
    else:
        module = reference if backend == "reference" else parallel
        return module.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


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

    Directions: 0 row-major, 1 column-major, 2 and 3 the reverses of 0 and 1.

    Args:
        x: (B, H, W, d).
        x_dbl: (B, H, W, 4, R + 2N): for each position, in spatial order, and direction the low-rank (dt, B, C).
        dt_weight: (4, d, R); Δ_k = softplus(dt_k · dt_weight[k]ᵀ + dt_bias[k]).
        A: (4·d, N), negative.
        D: (4·d,).
        dt_bias: (4, d).

    Returns:
        y (B, H, W, d) in x's dtype.
    """
    if torch.jit.is_scripting():
        return parallel.selective_scan_2d(x, x_dbl, dt_weight, A, D, dt_bias)
    else:
        module = reference if backend == "reference" else parallel
        return module.selective_scan_2d(x, x_dbl, dt_weight, A, D, dt_bias)
