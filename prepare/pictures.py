"""Images and masks of the 2D data sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prepare.output import PrepareError
from transforms import MaskReader, PictureReader

__all__ = ["read_mask", "read_rgb"]


def _read(reader: PictureReader, path: Path) -> np.ndarray:
    try:
        return reader.get_data(path)[0]
    except (ValueError, FileNotFoundError) as error:
        raise PrepareError(str(error)) from error


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8; raises PrepareError naming the file when it cannot be read."""
    return _read(PictureReader("RGB"), path)


def read_mask(path: Path) -> np.ndarray:
    """(H, W) bool, as `MaskReader` tells marked pixels; raises PrepareError as `read_rgb` does."""
    return _read(MaskReader(), path).astype(bool)
