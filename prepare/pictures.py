"""Images and masks of the 2D data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prepare.output import PrepareError
from transforms import read_picture

__all__ = ["read_mask", "read_rgb"]


def _read(path: Path, mode: str) -> np.ndarray:
    try:
        return read_picture(path, mode)
    except (ValueError, FileNotFoundError) as error:
        raise PrepareError(str(error)) from error


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8; raises PrepareError naming the file when it cannot be read."""
    return _read(path, "RGB")


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool: brighter than half the range, which also settles masks that were smoothed; 0/1 files are known too.

    Raises:
        PrepareError: naming the file when it cannot be read.
    """
    mask = _read(path, "L")
    return mask > 0 if mask.max() == 1 else mask > 127
