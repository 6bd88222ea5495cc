"""A CT of 120×512×512 with 8 organs and scattered false positives: both protocols, against medpy organ by organ."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
from medpy.metric import binary

from benchmarks.harness import Row, memory_row, peak_memory, row
from evaluation.cases import measure

SHAPE, SPACING = (120, 512, 512), (3.0, 0.8, 0.8)
ORGANS, SCATTERED = 8, 16_000


def maps() -> tuple[np.ndarray, np.ndarray]:
    """(Prediction, label): ellipsoids, shifted a little in the prediction, which has false voxels everywhere."""
    rng = np.random.default_rng(0)
    prediction, label = np.zeros((2, *SHAPE), np.uint8)
    grid = np.ogrid[tuple(slice(size) for size in SHAPE)]
    for organ in range(1, ORGANS + 1):
        centre = rng.uniform(0.25, 0.75, 3) * SHAPE
        radius = rng.uniform(0.06, 0.18, 3) * SHAPE
        for array, shift in ((label, np.zeros(3)), (prediction, rng.uniform(-3, 3, 3))):
            parts = (((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre + shift, radius, strict=True))
            array[sum(parts) <= 1] = organ
    where = tuple(rng.integers(0, size, SCATTERED) for size in SHAPE)
    prediction[where] = rng.integers(1, ORGANS + 1, SCATTERED)
    return prediction, label


def one_by_one(prediction: np.ndarray, label: np.ndarray) -> list[tuple[float, float]]:
    """Dice and HD95 in mm of each organ."""
    pairs = ((prediction == organ, label == organ) for organ in range(1, ORGANS + 1))
    return [(binary.dc(*pair), binary.hd95(*pair, SPACING)) for pair in pairs]


def rows() -> Iterator[Row]:
    prediction, label = maps()
    start = time.perf_counter()
    case = measure(prediction, label, ORGANS, SPACING)
    ours = time.perf_counter() - start
    start = time.perf_counter()
    expected = one_by_one(prediction, label)
    other = time.perf_counter() - start
    found = [(structure.overlap.dice, structure.mm.hd95) for structure in case.structures if structure.mm]
    difference = float(np.abs(np.subtract(found, expected)).max())
    what = f"case of {'×'.join(map(str, SHAPE))}, {ORGANS} organs, scattered false positives"
    yield row(
        f"{what}: both protocols in voxels and mm, speed-up over medpy's dc and hd95 in mm", ours, other, "higher", 30,
        difference=difference,
    )  # fmt: skip
    yield memory_row(f"{what}: peak memory, both maps included, relative to 1 GiB", peak_memory(whole, None), 1024, 1)


def whole(_: None) -> None:
    """Makes the maps and measures them."""
    measure(*maps(), ORGANS, SPACING)
