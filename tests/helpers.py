"""What tests of several folders read."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image


def rows_of(folder: Path) -> list[dict[str, str]]:
    """The rows of an evaluation's metrics.csv."""
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def contents(folder: Path) -> dict[str, bytes]:
    """What is in the files of a folder, by their paths in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read(path: Path) -> np.ndarray:
    """A picture as it is stored."""
    return np.asarray(Image.open(path))
