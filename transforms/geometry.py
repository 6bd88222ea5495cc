"""Arrays, tensors and MetaTensors through one tensor function, with the affine kept right."""

from __future__ import annotations

import numpy as np
import torch
from monai.config import NdarrayOrTensor
from monai.data import MetaTensor

__all__ = ["like_input", "plain_tensor"]


def plain_tensor(x: NdarrayOrTensor) -> torch.Tensor:
    """The numbers of `x`, (…, H, W); raises ValueError when there are fewer than two axes or no numbers."""
    if isinstance(x, torch.Tensor):
        tensor = x.as_tensor() if isinstance(x, MetaTensor) else x
    else:
        tensor = torch.as_tensor(np.ascontiguousarray(x))
    if tensor.ndim < 2 or tensor.numel() == 0:
        raise ValueError(f"expected a non-empty (…, H, W), got shape {tuple(tensor.shape)}")
    return tensor


def like_input(out: torch.Tensor, x: NdarrayOrTensor, output_to_input: np.ndarray) -> NdarrayOrTensor:
    """`out` as the kind of array that `x` is, whose last two axes were resampled to make it.

    A MetaTensor keeps its metadata, and the resampling goes into the affine of one channel-first image, (C, H, W) or
    (C, D, H, W); the affines of batches are left alone.

    Args:
        output_to_input: (3, 3), takes the new (row, column, 1) to the old one.
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
