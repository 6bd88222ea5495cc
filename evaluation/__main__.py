"""`python -m evaluation PREDICTIONS LABELS`: scores files that are already there, volumes or images.

Two files, or two folders searched with their sub-folders and paired by name: `img0001_pred.nii.gz` belongs to
`label0001.nii.gz`, `ISIC_0000000.png` to `ISIC_0000000_segmentation.png`. Volumes (NIfTI, HDF5 with a data set `label`)
are brought to one orientation and scored class by class under both protocols. Images (PNG and the like) are scored one
by one and pooled. Where both files know their geometry it must be the same. `--label-ids` reads labels that number
their classes in another way than the predictions, as BTCV's raw ones do.

A pair that cannot be scored does not stop the others. The table says so, the failures are listed at the end, and the
exit code is 1.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.report import Scores
from evaluation.scores import ImageScores, VolumeScores
from transforms import (
    BTCV_IDS,
    PICTURE_SUFFIXES,
    SYNAPSE_CLASSES,
    VOLUME_SUFFIXES,
    InputError,
    has_suffix,
    list_files,
    on_grid,
    pair_by_name,
    read_mask,
    read_volume,
    reoriented,
)

logger = logging.getLogger(__name__)


def pair_files(predictions: Path, labels: Path) -> list[tuple[Path, Path]]:
    """(prediction, label) files that belong together; the labels decide whether volumes or images are looked for.

    Raises:
        FileNotFoundError: when a path does not exist.
        ValueError: when a path has no such files, or a file belongs to none or to several others.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     files = [Path(folder, name) for name in ("img0001_pred.nii.gz", "label0001.nii.gz")]
        ...     for file in files:
        ...         file.touch()
        ...     pair_files(*files) == [tuple(files)]
        True
    """
    true = list_files(labels, VOLUME_SUFFIXES, recursive=True) or list_files(labels, PICTURE_SUFFIXES, recursive=True)
    if not true:
        raise ValueError(f"{labels} is or holds no {', '.join(VOLUME_SUFFIXES + PICTURE_SUFFIXES)} file")
    suffixes = VOLUME_SUFFIXES if is_volume(true[0]) else PICTURE_SUFFIXES
    predicted = list_files(predictions, suffixes, recursive=True)
    if not predicted:
        raise ValueError(f"{predictions} is or holds no {', '.join(suffixes)} file")
    if predictions.is_file() and labels.is_file():
        return [(predictions, labels)]
    return pair_by_name(predicted, true)


def is_volume(path: Path) -> bool:
    """True for NIfTI and HDF5 files, by their suffix.

    Example:
        >>> is_volume(Path("img0001.nii.gz")), is_volume(Path("benign (1).png"))
        (True, False)
    """
    return has_suffix(path, VOLUME_SUFFIXES)


def read_image(path: Path, classes: int) -> np.ndarray:
    """The class indices (H, W) of a mask: for several classes the stored numbers 0 … C, for one see `read_mask`.

    Raises:
        InputError: when the file is damaged, or holds values that do not say which class they are.
    """
    return read_mask(path, classes=classes)


def evaluate(
    pairs: Sequence[tuple[Path, Path]],
    scores: Scores,
    spacing: Sequence[float] | None = None,
    label_ids: Sequence[int] = (),
) -> None:
    """Adds the scores of all pairs of files. Those that cannot be scored are in `scores.failures` afterwards.

    Args:
        pairs: (prediction, label) files, all volumes or all pictures.
        scores: what the cases are added to.
        spacing: voxel size (D, H, W) in mm of volumes that do not know theirs.
        label_ids: the numbers of the classes 1 … C in the labels of volumes; all others are background.
    """
    for prediction_file, label_file in tqdm(pairs, unit="case", disable=None):
        try:
            if is_volume(label_file):
                case = volume_pair(prediction_file, label_file, spacing, label_ids)
            else:
                count = len(scores.classes)
                case = read_image(prediction_file, count), read_image(label_file, count), None
            scores.add(str(label_file), *case)
        except (ValueError, OSError) as error:
            scores.failures[str(label_file)] = str(error)


def volume_pair(
    prediction_file: Path, label_file: Path, spacing: Sequence[float] | None = None, label_ids: Sequence[int] = ()
) -> tuple[np.ndarray, np.ndarray, Sequence[float] | None]:
    """(Prediction, label, voxel size in mm where it is known), arrays and sizes in the orientation SPL.

    Args:
        prediction_file: class indices.
        label_file: class indices, or numbers of which `label_ids` are the classes 1 … C.
        spacing: (D, H, W) of volumes that do not know theirs.
        label_ids: see there.

    Raises:
        InputError: when a file cannot be read or the two do not lie on one grid.
    """
    prediction, label = read_volume(prediction_file, "label"), reoriented(read_volume(label_file, "label"))
    turned = reoriented(prediction)
    predicted: np.ndarray | None = turned.array
    # Where a file does not say where it lies, nothing but the shapes can be compared.
    if prediction.geometry == label.geometry == "file":
        predicted = on_grid(prediction.array, prediction.affine, label.affine, label.array.shape)
    if predicted is None and sorted(turned.array.shape) == sorted(label.array.shape):
        raise InputError(f"lies elsewhere in space than {label_file}: their affines differ", path=prediction_file)
    if predicted is None or predicted.shape != label.array.shape:
        raise InputError(f"shape {turned.array.shape}, but {label_file} has {label.array.shape}", path=prediction_file)
    true = label.array
    if label_ids:
        true = np.zeros_like(label.array)
        for index, number in enumerate(label_ids, 1):
            true[label.array == number] = index
    return predicted, true, label.spacing_mm or turned.spacing_mm or spacing


def _count_classes(pairs: Sequence[tuple[Path, Path]]) -> int:
    """The highest class of the labels that can be read.

    Raises:
        InputError: when the predictions end at a lower one, and so seem to be numbered in another way, or when no pair
            can be read.
    """
    highest, first = [], None
    for pair in pairs:
        try:
            highest.append([int(read_volume(file, "label").array.max()) for file in pair])
        except InputError as error:
            first = first or error
    if not highest and first:
        raise first
    predicted, true = (max(1, *column) for column in zip(*highest, strict=True))
    if true > predicted:
        raise InputError(
            f"the labels hold classes up to {true}, the predictions up to {predicted}",
            remedy="name the classes with --classes if both number them alike, else say the labels' numbers with"
            " --label-ids (BTCV's raw: --label-ids btcv)",
        )
    return true


def passed_over(folders: Sequence[Path], pairs: Sequence[tuple[Path, Path]]) -> int:
    """How many files in the folders belong to no pair: hidden ones and other formats.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("a.nii", "notes.txt", ".hidden"):
        ...         Path(folder, name).touch()
        ...     passed_over([Path(folder)], [(Path(folder, "a.nii"), Path(folder, "a.nii"))])
        2
    """
    used = {file for pair in pairs for file in pair}
    # the other file of a NIfTI pair
    used |= {file.with_suffix(suffix) for file in used for suffix in (".img", ".IMG") if has_suffix(file, [".hdr"])}
    found = {file for folder in folders if folder.is_dir() for file in folder.rglob("*") if file.is_file()}
    return len(found - used)


def _label_ids(words: Sequence[str]) -> tuple[int, ...]:
    """The numbers that --label-ids asks for.

    Raises:
        ValueError: when a word is no number above 0, or stands there twice.
    """
    if list(words) == ["btcv"]:
        return BTCV_IDS
    numbers = tuple(int(word) for word in words if word.isdecimal())
    if len(numbers) < len(words) or 0 in numbers or len(set(numbers)) < len(numbers):
        raise ValueError(f"--label-ids takes btcv, or different numbers above 0, not {' '.join(words)}")
    return numbers


def _new_scores(options: argparse.Namespace, pairs: Sequence[tuple[Path, Path]], label_ids: Sequence[int]) -> Scores:
    """Scores to fill. Without --classes, volumes have as many classes as --label-ids or the labels number.

    Raises:
        ValueError: when the options do not fit each other or the files.
    """
    if options.spacing and not all(0 < size < math.inf for size in options.spacing):
        raise InputError(f"--spacing takes three sizes above 0 mm, not {' '.join(map(str, options.spacing))}")
    if not is_volume(pairs[0][1]):
        if label_ids or options.spacing:
            raise ValueError(f"--label-ids and --spacing are for volumes, and {pairs[0][1]} is a picture")
        return ImageScores(options.classes or ["lesion"], options.title, options.selection)
    classes = options.classes
    if not classes and label_ids == BTCV_IDS:
        classes = SYNAPSE_CLASSES
    classes = classes or [f"class {i + 1}" for i in range(len(label_ids) or _count_classes(pairs))]
    if label_ids and len(classes) != len(label_ids):
        raise ValueError(f"--classes names {len(classes)} classes, --label-ids numbers {len(label_ids)}")
    return VolumeScores(classes, options.title, options.selection)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m evaluation`; what a user can get wrong ends it with one line."""
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__.partition("\n")[0])
    parser.add_argument("predictions", type=Path, help="file, or folder of files")
    parser.add_argument("labels", type=Path, help="file, or folder of files")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names of the classes 1, 2, …; for images: lesion")
    parser.add_argument("--label-ids", nargs="+", default=[], metavar="ID", help="numbers of classes 1, 2, … in the "
                        "labels of volumes, where they differ; btcv: those of BTCV's raw labels")  # fmt: skip
    parser.add_argument("--spacing", nargs=3, type=float, metavar=("D", "H", "W"), help="voxel size in mm along the "
                        "body, front to back and side to side, of volumes that do not know it")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="write metrics.csv and summary.json there")
    parser.add_argument("--title", default="", help="heading of the table")
    parser.add_argument("--selection", default="", help="how the model was selected, for the record")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        pairs = pair_files(options.predictions, options.labels)
        if unused := passed_over([options.predictions, options.labels], pairs):
            logger.info(f"passed over: {unused} file{'s' * (unused > 1)}, hidden or of another format")
        label_ids = _label_ids(options.label_ids)
        scores = _new_scores(options, pairs, label_ids)
        evaluate(pairs, scores, options.spacing, label_ids)
        failures = list(scores.failures.values())
        if scores.cases:
            print(scores.table())
            if options.output:
                scores.write(options.output)
                print(f"\nwritten: {options.output / 'metrics.csv'}, {options.output / 'summary.json'}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if len(pairs) == 1 and failures:
        sys.exit(f"error: {failures[0]}")
    if failures:
        sys.exit("\n".join([f"error: {len(failures)} of {len(pairs)} pairs could not be scored:", *failures]))


if __name__ == "__main__":
    main()
