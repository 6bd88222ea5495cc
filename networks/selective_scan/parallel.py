"""The selective scan in PyTorch operations, without a loop over the length: what tracing, scripting and export run.

The sequence is cut into M chunks of T positions, M·T ≥ L, T ≈ √L. First all chunks are scanned side by side from a zero
state, which takes T steps on tensors (batch, M, channels, N) and gives each chunk's last state. Then log₂ M doublings
carry the states from chunk to chunk: a whole chunk decays by exp(A Σ Δ). Last the chunks are scanned again from their
true first states, and this time C reads the states out. Every exponent is a sum of Δ A, never a difference, so nothing
overflows that the recurrence itself keeps finite.

Memory without gradients: some 8 tensors of L values per channel and a dozen of M·N. With gradients autograd keeps the T
steps, some 8·L·N values per channel.
"""

from __future__ import annotations

import math

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
    """The contract of `networks.selective_scan.selective_scan`, in float32; can be scripted.

    Example:
        >>> u, one = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
        >>> selective_scan(u, one, torch.zeros(1, 1), one[:, None], one[:, None], None, None, False)
        tensor([[[1., 3., 6.]]])
    """
    batch, channels, length = u.shape
    groups, state = B.shape[1], A.shape[1]
    width = channels // groups
    x = u.float()
    delta = delta.float()
    if delta_bias is not None:
        delta = delta + delta_bias.float()[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    A = A.float().reshape(groups, width, state)

    if isinstance(length, int):
        steps = math.ceil(math.sqrt(length))
        chunks = (length + steps - 1) // steps
        doublings = math.ceil(math.log(chunks) / math.log(2))
    else:
        # Under torch.export the length may be a symbol: these do up to L = 2²¹. Never one chunk, or it stays one.
        steps, doublings = 32, 16
        chunks = length // steps + 2
    padding = [0, steps * chunks - length]
    # A padded position has Δ = 0: the state passes unchanged.
    delta = F.pad(delta, padding).reshape(batch, groups, width, chunks, steps)
    x = F.pad(x, padding).reshape(batch, groups, width, chunks, steps)
    B = F.pad(B.float(), padding).reshape(batch, groups, 1, state, chunks, steps)
    C = F.pad(C.float(), padding).reshape(batch, groups, 1, state, chunks, steps)
    total = delta.sum(-1)
    # The step comes first, so that each step reads and writes whole contiguous tensors: (batch, M, groups, width, N).
    deltas = torch.unbind(delta.permute(4, 0, 3, 1, 2).contiguous().unsqueeze(-1))
    inputs = torch.unbind((delta * x).permute(4, 0, 3, 1, 2).contiguous().unsqueeze(-1))
    Bs = torch.unbind(B.permute(5, 0, 4, 1, 2, 3).contiguous())
    Cs = torch.unbind(C.permute(5, 0, 4, 1, 2, 3).contiguous())

    h = inputs[0] * Bs[0]
    for t in range(1, steps):
        h = torch.exp(deltas[t] * A) * h + inputs[t] * Bs[t]

    decay = torch.exp(total.permute(0, 3, 1, 2).unsqueeze(-1) * A)
    for k in range(doublings):
        shift = [0, 0, 0, 0, 0, 0, 1 << k, 0]
        h = h + decay * F.pad(h, shift)[:, :chunks]
        decay = decay * F.pad(decay, shift)[:, :chunks]
    h = F.pad(h, [0, 0, 0, 0, 0, 0, 1, 0])[:, :chunks]

    outputs = []
    for t in range(steps):
        h = torch.exp(deltas[t] * A) * h + inputs[t] * Bs[t]
        outputs.append((h * Cs[t]).sum(-1))
    y = torch.stack(outputs, -1).permute(0, 2, 3, 1, 4).reshape(batch, channels, chunks * steps)[:, :, :length]
    if D is not None:
        y = y + D.float()[:, None] * u.float()
    return y.to(u.dtype)


def selective_scan_2d(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan_2d`, in float32; can be scripted.

    Example:
        >>> x, x_dbl, dt_weight = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4, 7), torch.ones(4, 4, 1)
        >>> selective_scan_2d(x, x_dbl, dt_weight, -torch.ones(16, 3), torch.ones(16), torch.ones(4, 4)).shape
        torch.Size([1, 2, 3, 4])
    """
    u, delta, B, C = to_sequences(x.float(), x_dbl.float(), dt_weight.float(), A.shape[1])
    y = selective_scan(u, delta, A, B, C, D, dt_bias.reshape(-1), True)
    return from_sequences(y, x.shape[1], x.shape[2]).to(x.dtype)
