"""Keeping a MetaTensor's affine right when the last two axes are resampled."""

from __future__ import annotations

import numpy as np
import torch
from monai.data import MetaTensor

__all__ = ["compose_affine"]


def compose_affine(image: MetaTensor, output_to_input: np.ndarray) -> MetaTensor:
    """Fold a change of the last two axes into the affine of one channel-first image; batches are left alone.

    Args:
        image: (C, H, W) or (C, D, H, W), already resampled, still with the affine from before.
        output_to_input: (3, 3), takes the new (row, column, 1) to the old one.
    """
    rows = image.ndim - 3
    if image.is_batch or rows not in (0, 1):
        return image
    change = np.eye(4)
    axes = [rows, rows + 1, 3]
    change[np.ix_(axes, axes)] = output_to_input
    image.affine = image.affine @ torch.as_tensor(change, dtype=image.affine.dtype)
    return image
