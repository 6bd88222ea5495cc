"""Demo data: phantoms, written as raw downloads and then prepared by the same code as real ones.

synapse/    as `prepare synapse` makes it, and raw/img, raw/label: the test cases as NIfTI in Hounsfield units
busi/       as `prepare busi` makes it
isic17/     as `prepare isic --year 2017` makes it
"""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image

from prepare.busi import prepare_busi
from prepare.isic import FOLDERS, prepare_isic
from prepare.output import Report, staged, write_facts
from prepare.phantoms import ct_phantom, dermoscopy_phantom, ultrasound_phantom
from prepare.synapse import TEST_CASES, TRAIN_CASES, prepare_synapse
from transforms import InputError

MARK = "synthetic phantom, not patient data"
FIELD_OF_VIEW_MM, SCAN_LENGTH_MM = 360, 144


def _write_ct(folder: Path, case: int, seed: int, slices: int, size: int) -> None:
    """Writes a BTCV-like pair with axis codes LAS."""
    spacing_mm = (SCAN_LENGTH_MM / slices, FIELD_OF_VIEW_MM / size, FIELD_OF_VIEW_MM / size)
    rng = np.random.default_rng((seed, 0, case))
    arrays = ct_phantom(rng, (slices, size, size), spacing_mm)
    depth, height, width = spacing_mm
    for kind, array in zip(("img", "label"), arrays, strict=True):
        columns_rows_slices = np.ascontiguousarray(array.transpose(2, 1, 0)[:, ::-1])
        (folder / kind).mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(columns_rows_slices, np.diag([-width, height, depth, 1.0]))
        nib.save(image, folder / kind / f"{kind}{case:04d}.nii.gz")


def _picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """(H, W): half of the pictures are 256², the others any size, as downloads are."""
    return (256, 256) if rng.random() < 0.5 else (int(rng.integers(180, 300)), int(rng.integers(200, 340)))


def _write_ultrasound(folder: Path, number: int, seed: int) -> None:
    """Writes a BUSI-like image and its mask, now and then in two files; every third lesion is malignant."""
    rng = np.random.default_rng((seed, 1, number))
    kind = "malignant" if number % 3 == 0 else "benign"
    grey, mask = ultrasound_phantom(rng, _picture_size(rng), kind == "malignant")
    name = f"{kind} ({number})"
    (folder / kind).mkdir(parents=True, exist_ok=True)
    Image.fromarray(grey).convert(("L", "RGB", "RGBA")[number % 3]).save(folder / kind / f"{name}.png")
    parts = [mask]
    if number % 10 == 5:
        left = np.arange(mask.shape[1]) < np.flatnonzero(mask.any(axis=0)).mean()
        parts = [mask & left, mask & ~left]
    for suffix, part in zip(("_mask", "_mask_1"), parts, strict=False):
        Image.fromarray(part.astype(np.uint8) * 255).save(folder / kind / f"{name}{suffix}.png")


def _write_dermoscopy(folder: Path, number: int, seed: int, part: str) -> None:
    """Writes an ISIC-like image and its mask."""
    rng = np.random.default_rng((seed, 2, number))
    image, mask = dermoscopy_phantom(rng, _picture_size(rng))
    images, masks = (folder / name for name in FOLDERS[2017][part])
    for sub in (images, masks):
        sub.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(images / f"ISIC_{number:07d}.jpg", quality=95)
    Image.fromarray(mask.astype(np.uint8) * 255).save(masks / f"ISIC_{number:07d}_segmentation.png")


def prepare_demo(
    out: Path,
    *,
    seed: int = 0,
    cases: int = 12,
    slices: int = 32,
    size: int = 128,
    images: int = 40,
    overwrite: bool = False,
) -> None:
    """Writes demo data for all three bundles, in the layout that this module's head describes.

    Args:
        out: the folder to make.
        seed: equal seeds give equal data.
        cases: CT volumes, a quarter of them for the test part; 0 for none.
        slices: of each volume.
        size: rows and columns of each slice.
        images: ultrasound images, and as many dermoscopy images; 0 for none.
        overwrite: replace an `out` that was prepared before.

    Raises:
        InputError: when a number is out of range, or `out` is taken.

    Example:
        >>> prepare_demo(Path("out"), images=3)
        Traceback (most recent call last):
        transforms.files.InputError: expected at least 8 images, or 0 of them and some cases
    """
    report = Report(MARK)
    if cases and (not 2 <= cases <= len(TRAIN_CASES) or slices < 8 or size < 32):
        raise InputError(f"expected 2 … {len(TRAIN_CASES)} cases of at least 8 slices and a size of 32 or more")
    if (images and images < 8) or not (cases or images):
        raise InputError("expected at least 8 images, or 0 of them and some cases")
    with staged(out, overwrite, bytes_needed=5 * cases * slices * size**2 + 300_000 * images) as folder:
        raw = folder / "raw"
        if cases:
            test = TEST_CASES[: max(1, cases // 4)]
            train = TRAIN_CASES[: cases - len(test)]
            for case in report.progress(train + test, "drawing CT"):
                _write_ct(raw, case, seed, slices, size)
            prepare_synapse(raw, folder / "synapse", train, test, report=report)
            for case in test:
                for kind in ("img", "label"):
                    target = folder / "synapse" / "raw" / kind
                    target.mkdir(parents=True, exist_ok=True)
                    (raw / kind / f"{kind}{case:04d}.nii.gz").rename(target / f"{kind}{case:04d}.nii.gz")
        if images:
            for number in report.progress(range(1, images + 1), "drawing ultrasound"):
                _write_ultrasound(raw, number, seed)
            prepare_busi(raw, folder / "busi", report=report)
            for number in report.progress(range(1, images + 1), "drawing dermoscopy"):
                _write_dermoscopy(raw, number, seed, "train" if number <= 0.7 * images else "val")
            prepare_isic(raw, folder / "isic17", year=2017, report=report)
        shutil.rmtree(raw)
        write_facts(folder, {"dataset": "demo", "seed": seed}, report)
    report(f"demo data → {out}")
