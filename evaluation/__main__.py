"""`python -m evaluation PREDICTIONS LABELS`: scores files that are already there, volumes or images.

Two files, or two folders searched with their sub-folders and paired by name: `img0001_pred.nii.gz` belongs to
`label0001.nii.gz`, `ISIC_0000000.png` to `ISIC_0000000_segmentation.png`. Volumes (NIfTI, HDF5 with a data set `label`)
are brought to one orientation and scored per organ under both protocols; images (PNG and the like) are scored per image
and pooled. Where both files know their geometry it must be the same. Labels that number their classes in another way
than the predictions, as BTCV's raw ones do, are read with `--label-ids`.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import EnsureChannelFirst, LoadImage, Orientation
from tqdm import tqdm

from evaluation.handlers import spacing_mm
from evaluation.report import Report, case_name
from evaluation.scores import ImageScores, VolumeScores
from transforms import PICTURE_SUFFIXES, VolumeReader, read_picture

VOLUMES = (".nii", ".nii.gz", ".h5", ".hdf5")
DECORATION = re.compile(r"_(segmentation|seg|mask|label|labels|gt|prediction|pred|trans|lesion)$|^(img|label)(?=\d)")


def pair_files(predictions: Path, labels: Path) -> list[tuple[Path, Path]]:
    """(prediction, label) files that belong together; the labels decide whether volumes or images are looked for.

    Raises ValueError for a path without such files and for files that belong to none or to several others.
    """
    true = _by_name(labels, VOLUMES) or _by_name(labels, PICTURE_SUFFIXES)
    if not true:
        raise ValueError(f"{labels} is or holds no {', '.join(VOLUMES + PICTURE_SUFFIXES)} file")
    suffixes = VOLUMES if is_volume(next(iter(true.values()))) else PICTURE_SUFFIXES
    predicted = _by_name(predictions, suffixes)
    if not predicted:
        raise ValueError(f"{predictions} is or holds no {', '.join(suffixes)} file")
    if predictions.is_file() and labels.is_file():
        return [(predictions, labels)]
    for here, there, what in ((predicted, true, "label"), (true, predicted, "prediction")):
        alone = sorted(here.keys() - there.keys())
        if alone:
            names = ", ".join(str(here[name]) for name in alone[:3])
            raise ValueError(f"{len(alone)} files without a {what} of the same name: {names}{' …' * (len(alone) > 3)}")
    return [(predicted[name], true[name]) for name in sorted(true)]


def is_volume(path: Path) -> bool:
    return path.name.lower().endswith(VOLUMES)


def read_volume(path: Path) -> MetaTensor:
    """The label map (1, D, H, W) in the orientation SPL, with its affine; raises as `transforms.VolumeReader` does."""
    volume: Any = EnsureChannelFirst(channel_dim="no_channel")(LoadImage(VolumeReader(dataset="label"))(path))
    volume = Orientation("SPL", labels=None)(volume)
    return volume


def read_image(path: Path, classes: int) -> np.ndarray:
    """The class indices (H, W) of a picture; one class is cut at half of the range, 0 to 1 or 0 to 255."""
    if classes > 1:
        return read_picture(path, "ids")
    grey = read_picture(path, "L")
    return (grey > (0 if grey.max() <= 1 else 127)).astype(np.uint8)


def evaluate(
    pairs: Sequence[tuple[Path, Path]],
    report: Report,
    spacing: Sequence[float] | None = None,
    label_ids: Sequence[int] = (),
) -> None:
    """Score all pairs; `spacing` (D, H, W) in mm holds for volumes that do not know theirs.

    `label_ids`: the numbers that classes 1, 2, … have in the labels of volumes; all others are background.

    Raises ValueError naming the files that cannot be read or do not fit.
    """
    for prediction_file, label_file in tqdm(pairs, unit="case", disable=None):
        if not is_volume(label_file):
            count = len(report.classes)
            report.add(str(label_file), read_image(prediction_file, count), read_image(label_file, count))
            continue
        prediction, label = read_volume(prediction_file), read_volume(label_file)
        sizes = spacing_mm(prediction), spacing_mm(label)
        if None not in sizes and not torch.allclose(prediction.affine, label.affine, rtol=0, atol=1e-2):
            raise ValueError(f"{prediction_file} and {label_file} lie differently in space: their affines differ")
        true = label[0]
        if label_ids:
            true = torch.zeros_like(label[0])
            for index, number in enumerate(label_ids, 1):
                true[label[0] == number] = index
        report.add(str(label_file), prediction[0], true, sizes[1] or sizes[0] or spacing)


def _by_name(path: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Files below `path`, or `path` itself, by what is left of their names without decoration."""
    if not path.exists():
        raise ValueError(f"{path} does not exist")
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    found: dict[str, Path] = {}
    for file in files:
        if not file.is_file() or file.name.startswith(".") or not file.name.lower().endswith(suffixes):
            continue
        name = case_name(file.name)
        while DECORATION.search(name):
            name = DECORATION.sub("", name)
        name = name.removesuffix(".npy")
        if name in found:
            raise ValueError(f"{found[name]} and {file} have the same name: cannot tell which belongs to which label")
        found[name] = file
    return found


def _count_classes(pairs: Sequence[tuple[Path, Path]]) -> int:
    """The highest class of the labels; raises ValueError where the predictions seem to be numbered in another way."""
    predicted, true = (max(1, *(int(read_volume(file).max()) for file in files)) for files in zip(*pairs, strict=True))
    if true > predicted:
        raise ValueError(
            f"the labels hold classes up to {true}, the predictions up to {predicted}: name the classes with --organs"
            " if both number them alike, else say the labels' numbers with --label-ids (BTCV's raw: 8 4 3 2 6 11 1 7)"
        )
    return true


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("predictions", type=Path, help="file, or folder of files")
    parser.add_argument("labels", type=Path, help="file, or folder of files")
    parser.add_argument("--organs", nargs="+", metavar="NAME", help="names of the classes 1, 2, …; for images: lesion")
    parser.add_argument("--label-ids", nargs="+", type=int, default=[], metavar="ID", help="numbers of classes 1, 2, "
                        "… in volumes' labels, where they differ (BTCV's raw labels: 8 4 3 2 6 11 1 7)")  # fmt: skip
    parser.add_argument("--spacing", nargs=3, type=float, metavar=("D", "H", "W"), help="voxel size in mm along the "
                        "body, front to back and side to side, of volumes that do not know it")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="write metrics.csv and summary.json there")
    parser.add_argument("--title", default="", help="heading of the table")
    parser.add_argument("--selection", default="", help="how the model was selected, for the record")
    options = parser.parse_args(arguments)
    try:
        pairs = pair_files(options.predictions, options.labels)
        report: Report
        if is_volume(pairs[0][1]):
            count = len(options.label_ids) or (0 if options.organs else _count_classes(pairs))
            organs = options.organs or [f"class {i + 1}" for i in range(count)]
            if options.label_ids and len(organs) != count:
                raise ValueError(f"--organs names {len(organs)} classes, --label-ids numbers {count}")
            report = VolumeScores(organs, options.title, options.selection)
        else:
            report = ImageScores(options.organs or ["lesion"], options.title, options.selection)
        evaluate(pairs, report, options.spacing, options.label_ids)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(report.table())
    if options.output:
        report.write(options.output)
        print(f"\nwritten: {options.output / 'metrics.csv'}, {options.output / 'summary.json'}")


if __name__ == "__main__":
    main()
