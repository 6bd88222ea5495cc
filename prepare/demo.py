"""Demo data: synthetic phantoms in the layouts of the real data sets, seeded, made in seconds."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from prepare.output import PrepareError, Report, staged, write_facts
from prepare.synapse import BTCV_IDS, ORGANS, TEST_CASES, TRAIN_CASES, prepare_synapse

__all__ = ["MARK", "ct_phantom", "prepare_demo"]

MARK = "synthetic phantom, not patient data"


def _organ_shapes(x: np.ndarray, y: np.ndarray, z: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Boolean organ masks; x, y, z in mm from the body's centre towards left, posterior and superior."""

    def ellipsoid(centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        cx, cy, cz = np.asarray(centre) + rng.uniform(-4, 4, 3)
        rx, ry, rz = np.asarray(radii) * rng.uniform(0.9, 1.1, 3)
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2 < 1

    liver = ellipsoid((-72, -12, 22), (84, 78, 62)) | ellipsoid((-10, -55, 32), (62, 38, 34))
    pancreas = np.zeros_like(liver)
    shift = rng.uniform(-4, 4, 3)
    for t in np.linspace(0, 1, 15):
        # Head beside the duodenum, body across the aorta, tail towards the spleen.
        cx, cy, cz = np.array((-32 + 108 * t, -2 - 30 * np.sin(np.pi * t) + 22 * t, -26 + 44 * t)) + shift
        radius = 19 - 6 * t
        pancreas |= (x - cx) ** 2 + (y - cy) ** 2 + ((z - cz) * 0.8) ** 2 < radius**2
    return {
        "liver": liver,
        "stomach": ellipsoid((56, -48, 32), (46, 36, 40)),
        "spleen": ellipsoid((112, 28, 34), (30, 46, 44)),
        "left kidney": ellipsoid((70, 52, -22), (27, 30, 52)),
        "right kidney": ellipsoid((-66, 54, -30), (27, 30, 52)),
        "pancreas": pancreas,
        "gallbladder": ellipsoid((-52, -62, -22), (20, 24, 28)),
        "aorta": ((x - 12 - rng.uniform(-3, 3)) ** 2 + (y - 36 - rng.uniform(-3, 3)) ** 2) < rng.uniform(11, 13.5) ** 2,
    }


# Mean Hounsfield units in the portal venous phase; neighbours overlap once case-wise shifts and noise are added.
_HOUNSFIELD = {
    "liver": 105,
    "stomach": 35,
    "spleen": 125,
    "left kidney": 175,
    "right kidney": 175,
    "pancreas": 85,
    "gallbladder": 8,
    "aorta": 155,
}


def ct_phantom(
    rng: np.random.Generator,
    shape: tuple[int, int, int] = (32, 128, 128),
    spacing_mm: tuple[float, float, float] = (5.0, 2.8, 2.8),
) -> tuple[np.ndarray, np.ndarray]:
    """One abdomen: (Hounsfield units int16, BTCV label ids uint8), both (D, H, W) in axis codes SPL."""
    axes = [(np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, spacing_mm, strict=True)]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    scale = rng.uniform(0.95, 1.05)
    x, y, z = (x - rng.uniform(-8, 8)) / scale, (y - rng.uniform(-8, 8)) / scale, z - rng.uniform(-8, 8)
    # A smooth displacement of some millimetres makes the outlines uneven.
    waves = []
    for _ in range(3):
        phase, length = rng.uniform(0, 2 * np.pi, 3), rng.uniform(60, 110, 3)
        waves.append(
            3.5 * np.sin(2 * np.pi * x / length[0] + phase[0]) * np.sin(2 * np.pi * y / length[1] + phase[1])
            + 2 * np.sin(2 * np.pi * z / length[2] + phase[2])
        )
    x, y, z = x + waves[0], y + waves[1], z + waves[2]

    outline = (x / 168) ** 2 + (y / 118) ** 2
    spine = (x**2 + (y - 66) ** 2 < 21**2) | ((np.abs(x) < 6) & (y > 66) & (y < 100))
    canal = x**2 + (y - 92) ** 2 < 8**2
    body, cavity = outline < 1, outline < 0.76
    hounsfield = np.full(shape, -1000.0)
    hounsfield[body] = -100
    hounsfield[(outline < 0.86) & ~cavity] = 55
    hounsfield[(x + 18) ** 2 + (y - 36) ** 2 < 12**2] = 130
    for _ in range(10):
        cx, cy, cz = rng.uniform(-95, 95), rng.uniform(-70, 20), rng.uniform(-80, -30)
        loop = ((x - cx) / 18) ** 2 + ((y - cy) / 16) ** 2 + ((z - cz) / 18) ** 2 < 1
        hounsfield[loop & cavity] = rng.uniform(20, 70)
    for side in (-1, 1):
        hounsfield[((x - side * 38) / 20) ** 2 + ((y - 68) / 18) ** 2 < 1] = 55

    label = np.zeros(shape, np.uint8)
    for organ, mask in _organ_shapes(x, y, z, rng).items():
        mask = mask & cavity & ~spine
        label[mask] = BTCV_IDS[ORGANS.index(organ)]
        hounsfield[mask] = _HOUNSFIELD[organ] + rng.normal(0, 8)
    stomach = label == BTCV_IDS[ORGANS.index("stomach")]
    hounsfield[stomach & (y < -62)] = -700
    hounsfield[spine] = rng.uniform(180, 260)
    hounsfield[canal] = 30

    # In-plane blur for partial volume, then the scanner's noise with a little correlation.
    hounsfield = ndimage.gaussian_filter(hounsfield, (0.3, 0.6, 0.6))
    hounsfield += ndimage.gaussian_filter(rng.normal(0, 45, shape), (0, 0.7, 0.7))
    return np.clip(hounsfield, -1024, 1500).round().astype(np.int16), label


def _write_raw_ct(
    folder: Path, case: int, hounsfield: np.ndarray, label: np.ndarray, spacing_mm: tuple[float, float, float]
) -> None:
    """A BTCV-like pair with axis codes LAS."""
    depth, height, width = spacing_mm
    affine = np.diag([-width, height, depth, 1.0])
    for kind, array in (("img", hounsfield), ("label", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        columns_rows_slices = np.ascontiguousarray(array.transpose(2, 1, 0)[:, ::-1])
        nib.save(nib.Nifti1Image(columns_rows_slices, affine), folder / kind / f"{kind}{case:04d}.nii.gz")


def prepare_demo(
    out: Path, *, seed: int = 0, cases: int = 12, slices: int = 32, size: int = 128, overwrite: bool = False
) -> None:
    """Write `out`/synapse in the layout of `prepare synapse`, with the raw NIfTI of its test cases in synapse/raw.

    Args:
        seed: equal seeds give equal data.
        cases: CT volumes, a quarter of them for the test part.
        slices, size: of each volume.

    Raises:
        PrepareError: for numbers out of range or an `out` that is taken.
    """
    report = Report(MARK)
    if not 2 <= cases <= len(TRAIN_CASES) or slices < 8 or size < 32:
        raise PrepareError(f"expected 2 … {len(TRAIN_CASES)} cases, at least 8 slices and a size of 32 or more")
    test = TEST_CASES[: max(1, cases // 4)]
    train = TRAIN_CASES[: cases - len(test)]
    spacing_mm = (160 / slices, 360 / size, 360 / size)
    with staged(out, overwrite) as folder:
        raw = folder / "raw"
        for case in report.progress(train + test, "drawing CT phantoms"):
            rng = np.random.default_rng((seed, case))
            _write_raw_ct(raw, case, *ct_phantom(rng, (slices, size, size), spacing_mm), spacing_mm)
        prepare_synapse(raw, folder / "synapse", train, test, report=report)
        for case in test:
            for kind in ("img", "label"):
                target = folder / "synapse" / "raw" / kind
                target.mkdir(parents=True, exist_ok=True)
                (raw / kind / f"{kind}{case:04d}.nii.gz").rename(target / f"{kind}{case:04d}.nii.gz")
        shutil.rmtree(raw)
        write_facts(folder, {"dataset": "demo", "note": MARK, "seed": seed, "parts": ["synapse"]})
    report(f"demo data → {out}")
