"""The selective scan in the plainest PyTorch, and what every other backend is tested and measured against.

Formulated as mamba_ssm's own reference, the fallback people run today where its kernel does not install: decay exp(ΔA)
and inflow ΔBu for all positions at once, (batch, channels, L, N) each, then a loop over the positions.

h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t,  y_t = C_t · h_t + D u_t,  h_0 = 0   (Gu and Dao, arXiv 2312.00752, eq. 2–4)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .directions import from_sequences, to_sequences


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
    """Loop over the positions; float64 inputs are computed in float64, all others in float32.

    Example:
        >>> u, one = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
        >>> selective_scan(u, one, torch.zeros(1, 1), one[:, None], one[:, None], None, None, False)
        tensor([[[1., 3., 6.]]])
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    x, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    width = u.shape[1] // B.shape[1]
    B, C = (matrix.to(dtype).repeat_interleave(width, dim=1) for matrix in (B, C))  # (batch, channels, N, L)

    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    inflow = torch.einsum("bdl,bdl,bdnl->bdln", delta, x, B)
    h = x.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for t in range(u.shape[2]):
        h = decay[:, :, t] * h + inflow[:, :, t]
        outputs.append(torch.einsum("bdn,bdn->bd", h, C[:, :, :, t]))
    y = torch.stack(outputs, -1)
    if D is not None:
        y = y + D.to(dtype)[:, None] * x
    return y.to(u.dtype)


def selective_scan_2d(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Four sequences, one scan, summed at their positions.

    Example:
        >>> x, x_dbl, dt_weight = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4, 7), torch.ones(4, 4, 1)
        >>> selective_scan_2d(x, x_dbl, dt_weight, -torch.ones(16, 3), torch.ones(16), torch.ones(4, 4)).shape
        torch.Size([1, 2, 3, 4])
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, delta, B, C = to_sequences(x.to(dtype), x_dbl.to(dtype), dt_weight.to(dtype), A.shape[1])
    y = selective_scan(u, delta, A, B, C, D, dt_bias.reshape(-1), True)
    return from_sequences(y, x.shape[1], x.shape[2]).to(x.dtype)
