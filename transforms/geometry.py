"""Lets one tensor function serve arrays, tensors and MetaTensors, and keeps the affine right."""

from __future__ import annotations

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor


def plain_tensor(x: NdarrayOrTensor) -> torch.Tensor:
    """The numbers of `x`, (…, H, W), without metadata.

    Raises:
        ValueError: when there are fewer than two axes or no numbers.

    Example:
        >>> plain_tensor(np.eye(2))
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    if isinstance(x, torch.Tensor):
        tensor = x.as_tensor() if isinstance(x, MetaTensor) else x
    else:
        tensor = torch.as_tensor(np.ascontiguousarray(x))
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(f"expected a non-empty (…, H, W), got shape {tuple(tensor.shape)}")
    return tensor


def like_input(out: torch.Tensor, x: NdarrayOrTensor, output_to_input: np.ndarray) -> NdarrayOrTensor:
    """Turns `out` into what `x` is: array, tensor or MetaTensor.

    A MetaTensor keeps its metadata. The affine of one channel-first image, (C, H, W) or (C, D, H, W), follows the
    resampling; the affines of batches are left alone.

    Args:
        out: `x` with its last two axes resampled.
        x: what was resampled.
        output_to_input: (3, 3), takes the new (row, column, 1) to the old one.

    Example:
        >>> x = MetaTensor(torch.zeros(1, 4, 4), affine=torch.eye(4))
        >>> like_input(torch.zeros(1, 2, 2), x, np.diag([2, 2, 1])).affine.diagonal().tolist()
        [2.0, 2.0, 1.0, 1.0]
    """
    if not isinstance(x, MetaTensor):
        return out if isinstance(x, torch.Tensor) else out.numpy()
    image = MetaTensor(out).copy_meta_from(x)
    spatial, rank = image.ndim - 1, image.affine.shape[-1] - 1
    if not image.is_batch and 2 <= spatial <= rank:
        change = np.eye(rank + 1)
        axes = [spatial - 2, spatial - 1, rank]
        change[np.ix_(axes, axes)] = output_to_input
        image.affine = image.affine @ torch.as_tensor(change, dtype=image.affine.dtype, device=image.affine.device)
    return image
