"""The two-dimensional scan written as the one-dimensional one, for backends that only know sequences.

Directions: 0 row-major, 1 column-major, 2 and 3 the reverses of 0 and 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_sequences(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, state: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay the four directions out as four groups of sequences of length L = H·W.

    Args:
        x: (B, H, W, d).
        x_dbl: (B, H, W, 4, R + 2N), at each position and for each direction the low-rank (dt, B, C).
        dt_weight: (4, d, R).
        state: N.

    Returns:
        u (B, 4·d, L), delta before bias and softplus (B, 4·d, L), B and C (B, 4, N, L).

    Example:
        >>> x = torch.arange(4.0).reshape(1, 2, 2, 1)
        >>> to_sequences(x, torch.zeros(1, 2, 2, 4, 3), torch.zeros(4, 1, 1), state=1)[0]
        tensor([[[0., 1., 2., 3.],
                 [0., 2., 1., 3.],
                 [3., 2., 1., 0.],
                 [3., 1., 2., 0.]]])
    """
    batch, height, width, channels = x.shape
    rank = dt_weight.shape[2]
    rows = x.reshape(batch, height * width, channels)
    columns = x.transpose(1, 2).reshape(batch, height * width, channels)
    u = torch.stack([rows, columns, rows.flip(1), columns.flip(1)], 1).transpose(2, 3)
    rows = x_dbl.reshape(batch, height * width, 4, rank + 2 * state)
    columns = x_dbl.transpose(1, 2).reshape(batch, height * width, 4, rank + 2 * state)
    projected = torch.stack(
        [rows[:, :, 0], columns[:, :, 1], rows[:, :, 2].flip(1), columns[:, :, 3].flip(1)], 1
    ).transpose(2, 3)
    dt, B, C = torch.split(projected, [rank, state, state], dim=2)
    # repeated, as matmul does by itself where there are several images: exported programs would note whether there are
    delta = torch.matmul(dt_weight.repeat(batch, 1, 1, 1), dt)
    return u.flatten(1, 2), delta.flatten(1, 2), B, C


def from_sequences(y: Tensor, height: int, width: int) -> Tensor:
    """Put the four results (B, 4·d, L) back to their positions and sum them: (B, H, W, d).

    Example:
        >>> y = torch.tensor([[[0.0, 1, 2, 3], [0, 2, 1, 3], [3, 2, 1, 0], [3, 1, 2, 0]]])
        >>> from_sequences(y, 2, 2).flatten()
        tensor([ 0.,  4.,  8., 12.])
    """
    batch, channels = y.shape[0], y.shape[1] // 4
    by_direction = y.reshape(batch, 4, channels, height * width)
    rows = by_direction[:, 0] + by_direction[:, 2].flip(-1)
    columns = by_direction[:, 1] + by_direction[:, 3].flip(-1)
    rows = rows.reshape(batch, channels, height, width)
    columns = columns.reshape(batch, channels, width, height)
    return (rows + columns.transpose(2, 3)).permute(0, 2, 3, 1)
