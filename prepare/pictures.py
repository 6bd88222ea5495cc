"""Reads images and masks of the 2D data sets; what cannot be read is a `PrepareError`."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prepare.output import PrepareError
from transforms import MaskReader, PictureReader


def _read(reader: PictureReader, path: Path) -> np.ndarray:
    try:
        return reader.get_data(path)[0]
    except (ValueError, FileNotFoundError) as error:
        raise PrepareError(str(error)) from error


def read_rgb(path: Path) -> np.ndarray:
    """An image as (H, W, 3) uint8.

    Raises:
        PrepareError: when the file cannot be read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (4, 3)).save(f"{folder}/a.png")
        ...     read_rgb(Path(folder) / "a.png").shape
        (3, 4, 3)
    """
    return _read(PictureReader("RGB"), path)


def read_mask(path: Path) -> np.ndarray:
    """A mask as (H, W) bool: the pixels that `MaskReader` takes as marked.

    Raises:
        PrepareError: when the file cannot be read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (2, 1), 255).save(f"{folder}/a.png")
        ...     read_mask(Path(folder) / "a.png").tolist()
        [[True, True]]
    """
    return _read(MaskReader(), path).astype(bool)
