"""BTCV abdominal CT (Synapse syn3193805) to the layout that published 2D networks train on.

Orientation: every volume comes out as (D, H, W) with axis codes "SPL": slices run towards Superior, rows towards
Posterior, columns towards the patient's Left. A slice shown row by row is the usual radiological view: anterior on top,
the patient's right on the left. The input's affine decides, so its axis codes make no difference.

Values: Hounsfield units are clipped to [−125, 275] and mapped to [0, 1]; nothing is resampled.

    train_npz/case0005_slice000.npz    image (H, W) float32, label (H, W) uint8
    test_vol_h5/case0001.npy.h5        image (D, H, W) float32, label (D, H, W) uint8, attributes: see `write_volume`
    lists/lists_Synapse/               train.txt (slices), test_vol.txt (cases), all.lst (case files)
    dataset.json                       split, counts, orientation, label mapping, hashes of the raw files
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from prepare.output import Report, staged, write_facts
from transforms import (
    BTCV_IDS,
    ORIENTATION,
    SYNAPSE_CLASSES,
    WINDOW_HU,
    InputError,
    WindowHU,
    on_grid,
    read_volume,
    reoriented,
    replacing,
    sha256,
)

# Ids in the raw label files go up to this; those that are not in BTCV_IDS become background.
BTCV_LARGEST_ID = 13

TRAIN_CASES = (5, 6, 7, 9, 10, 21, 23, 24, 26, 27, 28, 30, 31, 33, 34, 37, 39, 40)
TEST_CASES = (1, 2, 3, 4, 8, 22, 25, 29, 32, 35, 36, 38)
PUBLISHED_TRAINING_SLICES = 2211


@dataclass(frozen=True)
class Case:
    """One prepared case: image (D, H, W) float32 in [0, 1], label (D, H, W) uint8, affine (4, 4) index → RAS mm."""

    image: np.ndarray
    label: np.ndarray
    affine: np.ndarray

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,) in the order (D, H, W)."""
        return nib.affines.voxel_sizes(self.affine)

    @property
    def present(self) -> list[str]:
        """Names of the classes that the label holds."""
        found = set(np.unique(self.label).tolist())
        return [name for number, name in enumerate(SYNAPSE_CLASSES, start=1) if number in found]


def load_volume(image_path: Path, label_path: Path, assume_hu: bool = False) -> Case:
    """One raw pair in the prepared orientation, window and classes.

    Args:
        image_path: NIfTI in Hounsfield units.
        label_path: NIfTI with BTCV's label ids, on the grid of the image.
        assume_hu: take an image that does not look like Hounsfield units for such.

    Raises:
        InputError: when a file cannot be read, does not match its partner, or holds values out of range.
    """
    given, label = read_volume(image_path, "image", assume_hu), read_volume(label_path, "label")
    if sorted(label.array.shape) != sorted(given.array.shape):
        raise InputError(f"shape {label.array.shape}, but {image_path.name} has {given.array.shape}", path=label_path)
    image = reoriented(given)
    ids = on_grid(label.array, label.affine, image.affine, image.array.shape)
    if ids is None:
        raise InputError(
            f"its affine differs from that of {image_path.name}", path=label_path, remedy="the pair does not align"
        )
    if ids.max() > BTCV_LARGEST_ID:
        found = ", ".join(map(str, np.unique(ids)[:20]))
        raise InputError(f"label ids {found}, expected 0 … {BTCV_LARGEST_ID}", path=label_path)
    classes = np.zeros(BTCV_LARGEST_ID + 1, np.uint8)
    classes[list(BTCV_IDS)] = np.arange(1, len(SYNAPSE_CLASSES) + 1)
    return Case(
        image=np.ascontiguousarray(WindowHU()(image.array.astype(np.float32))),
        label=np.ascontiguousarray(classes[ids]),
        affine=image.affine,
    )


def write_volume(path: Path, volume: Case, source: str) -> None:
    """Writes HDF5 with the data sets `image` and `label`.

    Attributes: spacing_mm (3,) in the order (D, H, W); affine (4, 4) from array index to RAS mm; window_hu (2,);
    organs, the names of the classes 1 …; source, the name of the raw file.
    """
    # In memory first: the HDF5 library crashes the process when the disk is full.
    memory = io.BytesIO()
    # One slice per chunk. Windowed CT has few distinct values and packs well.
    packing = {"chunks": (1, *volume.image.shape[1:]), "compression": "gzip", "compression_opts": 1, "shuffle": True}
    with h5py.File(memory, "w") as file:
        file.create_dataset("image", data=volume.image, **packing)
        file.create_dataset("label", data=volume.label, **packing)
        file.attrs["spacing_mm"] = volume.spacing_mm
        file.attrs["affine"] = volume.affine
        file.attrs["window_hu"] = WINDOW_HU
        file.attrs["organs"] = list(SYNAPSE_CLASSES)
        file.attrs["source"] = source
    with replacing(path) as temporary:
        temporary.write_bytes(memory.getbuffer())


def _write_slices(folder: Path, case: str, volume: Case) -> list[str]:
    # Not compressed: training reads every file hundreds of times.
    names = [f"{case}_slice{index:03d}" for index in range(len(volume.image))]
    for name, image, label in zip(names, volume.image, volume.label, strict=True):
        np.savez(folder / f"{name}.npz", image=image, label=label)
    return names


def _raw_file(folder: Path, stem: str) -> Path | None:
    return next(
        (path for suffix in (".nii.gz", ".nii", ".hdr") if (path := folder / f"{stem}{suffix}").is_file()), None
    )


def find_pairs(raw: Path, cases: Sequence[int], allow_missing: bool = False) -> dict[int, tuple[Path, Path]]:
    """Image and label file of each case, from `raw`/img/img0001.nii.gz and `raw`/label/label0001.nii.gz.

    Raises:
        InputError: when the folders are missing, or a case is missing (unless `allow_missing`) or half there.
    """
    roots = [folder for folder in (raw, raw / "Training", raw / "RawData" / "Training") if (folder / "img").is_dir()]
    if not roots:
        raise InputError("no folder img/ in it", path=raw, remedy="--raw wants the BTCV folder with img/ and label/")
    pairs, missing = {}, []
    for case in cases:
        image = _raw_file(roots[0] / "img", f"img{case:04d}")
        label = _raw_file(roots[0] / "label", f"label{case:04d}")
        if image and label:
            pairs[case] = image, label
        elif image or label:
            raise InputError(f"its {'label' if image else 'image'} file is missing", path=image or label)
        else:
            missing.append(case)
    if missing and not allow_missing:
        raise InputError(
            f"cases {' '.join(map(str, missing))} are missing",
            path=raw,
            remedy="complete the download, choose --train-cases and --test-cases, or pass --allow-missing",
        )
    if not pairs:
        raise InputError("none of the wanted cases is there", path=raw)
    return pairs


def _refuse_nothing_to_train_on(cases: Sequence[int], pairs: Mapping[int, tuple[Path, Path]], raw: Path) -> None:
    if not set(cases) & set(pairs):
        remedy = "complete the download, or say with --train-cases which of the others are to be trained on"
        raise InputError("none of the training cases is there", path=raw, remedy=remedy)


def prepare_synapse(
    raw: Path,
    out: Path,
    train_cases: Sequence[int] | None = None,
    test_cases: Sequence[int] | None = None,
    *,
    allow_missing: bool = False,
    assume_hu: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> None:
    """Prepares raw BTCV pairs as training slices and test volumes, in the layout that this module's head describes.

    Args:
        raw: the folder with img/ and label/.
        out: the folder to make.
        train_cases: case numbers of the training part; None for the published ones.
        test_cases: case numbers of the test part; None for the published ones.
        allow_missing: go on with the cases that are there.
        assume_hu: take images that do not look like Hounsfield units for such.
        overwrite: replace an `out` that was prepared before.
        report: prints what was done.

    Raises:
        InputError: when input or output folder are not as they must be; then nothing is written.

    Example:
        >>> prepare_synapse(Path("nowhere"), Path("out"))
        Traceback (most recent call last):
        transforms.files.InputError: nowhere: no folder img/ in it; --raw wants the BTCV folder with img/ and label/
    """
    report = report or Report()
    parts = {
        "train": sorted(set(TRAIN_CASES if train_cases is None else train_cases)),
        "test": sorted(set(TEST_CASES if test_cases is None else test_cases)),
    }
    both = sorted(set(parts["train"]) & set(parts["test"]))
    if both and (train_cases is None or test_cases is None):
        raise InputError(
            f"cases {' '.join(map(str, both))} would be in training and test",
            remedy="give --train-cases and --test-cases both",
        )
    if both:
        report(f"WARNING: cases {' '.join(map(str, both))} are in training AND test: test results will mean nothing")
    pairs = find_pairs(raw, sorted(set(parts["train"]) | set(parts["test"])), allow_missing)
    _refuse_nothing_to_train_on(parts["train"], pairs, raw)

    slices: list[str] = []
    facts_of_cases, rows = {}, []
    raw_bytes = sum(path.stat().st_size for pair in pairs.values() for path in pair)
    with staged(out, overwrite, bytes_needed=raw_bytes) as folder:
        lists = folder / "lists" / "lists_Synapse"
        for sub in (folder / "train_npz", folder / "test_vol_h5", lists):
            sub.mkdir(parents=True)
        for case, (image_path, label_path) in report.progress(pairs.items(), "preparing"):
            name = f"case{case:04d}"
            volume = load_volume(image_path, label_path, assume_hu)
            where = [part for part, cases in parts.items() if case in cases]
            if "train" in where:
                slices += _write_slices(folder / "train_npz", name, volume)
            if "test" in where:
                write_volume(folder / "test_vol_h5" / f"{name}.npy.h5", volume, image_path.name)
            facts_of_cases[name] = {
                "parts": where,
                "shape": list(volume.image.shape),
                "spacing_mm": [round(float(step), 4) for step in volume.spacing_mm],
                "organs": volume.present,
                "sha256": {path.name: sha256(path) for path in (image_path, label_path)},
            }
            depth, height, width = volume.image.shape
            absent = [name for name in SYNAPSE_CLASSES if name not in volume.present]
            spacing = " × ".join(f"{step:.2f}" for step in volume.spacing_mm)
            rows.append(
                (name, "+".join(where), str(depth), f"{height}×{width}", spacing, ", ".join(absent) or "all present")
            )
        test = [f"case{case:04d}" for case in parts["test"] if case in pairs]
        (lists / "train.txt").write_text("".join(f"{name}\n" for name in slices))
        (lists / "test_vol.txt").write_text("".join(f"{name}\n" for name in test))
        (lists / "all.lst").write_text("".join(f"case{case:04d}.npy.h5\n" for case in pairs))
        write_facts(
            folder,
            {
                "dataset": "synapse",
                "orientation": f"{ORIENTATION}: slices to superior, rows to posterior, columns to the patient's left",
                "window_hu": list(WINDOW_HU),
                "classes": {"0": "background"} | {str(n): name for n, name in enumerate(SYNAPSE_CLASSES, start=1)},
                "raw_ids": dict(zip(SYNAPSE_CLASSES, BTCV_IDS, strict=True)),
                "train": [f"case{case:04d}" for case in parts["train"] if case in pairs],
                "test": test,
                "in_both": [f"case{case:04d}" for case in both if case in pairs],
                "training_slices": len(slices),
                "cases": facts_of_cases,
            },
            report,
        )
    report.table(("case", "part", "slices", "in plane", "spacing mm (D × H × W)", "organs absent"), rows)
    if not test:
        report("WARNING: there is no test volume: no bundle trains on this without one")
    report(f"{len(slices)} training slices, {len(test)} test volumes, orientation {ORIENTATION}")
    if set(TRAIN_CASES) == set(parts["train"]) & set(pairs) and len(slices) != PUBLISHED_TRAINING_SLICES:
        report(f"WARNING: the published training part has {PUBLISHED_TRAINING_SLICES} slices, this one {len(slices)}")
