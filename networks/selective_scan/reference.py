"""The selective scan as its equation reads: slow, obvious, and what every other backend is tested against.

h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t,  y_t = C_t · h_t + D u_t,  h_0 = 0   (Gu and Dao, arXiv 2312.00752, eq. 2–4)
"""

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
    """Loop over the positions; float64 inputs are computed in float64, all others in float32."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, channels, length = u.shape
    groups, state = B.shape[1], A.shape[1]
    by_group = (batch, groups, channels // groups, length)
    delta = delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    x, delta, A = u.to(dtype).reshape(by_group), delta.reshape(by_group), A.to(dtype).reshape(groups, -1, state)

    h = x.new_zeros(batch, groups, channels // groups, state)
    outputs = []
    positions = (x.unbind(-1), delta.unbind(-1), B.to(dtype).unbind(-1), C.to(dtype).unbind(-1))
    for x_t, delta_t, B_t, C_t in zip(*positions, strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * x_t)[..., None] * B_t[:, :, None]
        outputs.append((h * C_t[:, :, None]).sum(-1))
    y = torch.stack(outputs, -1).reshape(u.shape)
    if D is not None:
        y = y + D.to(dtype)[:, None] * u.to(dtype)
    return y.to(u.dtype)


def selective_scan_2d(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """Four sequences, one scan, summed at their positions."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    u, delta, B, C = to_sequences(x.to(dtype), x_dbl.to(dtype), dt_weight.to(dtype), A.shape[1])
    y = selective_scan(u, delta, A, B, C, D, dt_bias.reshape(-1), True)
    return from_sequences(y, x.shape[1], x.shape[2]).to(x.dtype)
