"""What lies on disk: pairs of predictions and labels, read through the gate of `transforms`."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from evaluation.cases import Case, Measuring, class_maps, largest_components, measure
from evaluation.overlay import thumbnail
from transforms import (
    PICTURE_SUFFIXES,
    VOLUME_SUFFIXES,
    InputError,
    by_name,
    case_name,
    has_suffix,
    list_files,
    masks_alone,
    merged_masks,
    on_grid,
    pair_masks,
    passed_over,
    printable,
    read_mask,
    read_picture,
    read_volume,
    reoriented,
    same_letters,
    stem,
)
from transforms.volumes import Volume

# Where the cases would take longer than this in one process, the others are started.
WORTH_SECONDS = 20.0
# Classes that nobody named are numbered one after the other; a number like 30000 is none of them.
UNNAMED = 255
# What is as bright is white, but for JPEG.
BRIGHT = 192


@dataclass(frozen=True)
class Pair:
    """A prediction and the files of its label, of which there may be several for one picture; the image if known."""

    prediction: Path
    labels: tuple[Path, ...]
    image: Path | None = None

    @property
    def file(self) -> str:
        """What the case is known by."""
        return str(self.labels[0])


@dataclass(frozen=True)
class Pairing:
    """Pairs; `unmatched`: file → what it lacks; in words, what is hidden or of another format."""

    pairs: tuple[Pair, ...]
    unmatched: Mapping[str, str]
    passed_over: str = ""


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Args:
        classes: number of the named classes; 0 where none is named: pictures then have one, and volumes as many as
            the labels number.
        spacing_mm: voxel size (D, H, W) of volumes that do not know theirs.
        label_ids: the numbers of the classes 1 … C in the labels of volumes; all others are background.
        label_map: {stored number: class} of pictures.
    """

    classes: int = 0
    spacing_mm: tuple[float, ...] | None = None
    label_ids: tuple[int, ...] = ()
    label_map: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Measured:
    """A case, and of prediction and label the highest class and, in pictures without named classes, class 1's grey."""

    case: Case
    prediction_file: str
    prediction: int
    label: int
    levels: tuple[int | None, int | None] = (None, None)
    picture: bytes = b""


def is_volume(path: Path) -> bool:
    """True for NIfTI and HDF5 files, by their suffix.

    Example:
        >>> is_volume(Path("img0001.nii.gz")), is_volume(Path("benign (1).png"))
        (True, False)
    """
    return has_suffix(path, VOLUME_SUFFIXES)


def pair_files(predictions: Path, labels: Path) -> Pairing:
    """Files that belong together; the labels decide whether volumes or pictures are looked for.

    Equal stems on both sides decide; where the stems differ, `case_name` does. Then `a_mask.png` and `a_mask_1.png` are
    one label.

    Raises:
        InputError: when a path does not exist or has no such files, two files have one name, or nothing fits.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     files = [Path(folder, name) for name in ("img0001_pred.nii.gz", "label0001.nii.gz")]
        ...     for file in files:
        ...         file.touch()
        ...     pair_files(*files).pairs == (Pair(files[0], (files[1],)),)
        True
    """
    passed: Counter[str] = Counter()
    suffixes: tuple[str, ...] = VOLUME_SUFFIXES
    true = list_files(labels, suffixes, recursive=True, passed=passed)
    if not true:
        passed.clear()
        suffixes = PICTURE_SUFFIXES
        true = list_files(labels, suffixes, recursive=True, passed=passed)
    if not true:
        raise InputError(f"is or holds no {', '.join(VOLUME_SUFFIXES + PICTURE_SUFFIXES)} file", path=labels)
    predicted = list_files(predictions, suffixes, recursive=True, passed=passed)
    if not predicted:
        raise InputError(f"is or holds no {', '.join(suffixes)} file", path=predictions)
    if predictions.is_file() and labels.is_file():
        return Pairing((Pair(predictions, (labels,)),), {})
    predicted, true = (
        files if path.is_file() else masks_alone(files, passed)
        for path, files in ((predictions, predicted), (labels, true))
    )
    if suffixes == VOLUME_SUFFIXES:
        name = stem if sorted(map(stem, predicted)) == sorted(map(stem, true)) else case_name
        here, there = by_name(predicted, name), by_name(true, name)
        pairs: list[tuple[Path, tuple[Path, ...]]] = [
            (file, (there[key],)) for key, file in here.items() if key in there
        ]
    else:
        pairs = pair_masks(predicted, true, allow_unpaired=True)
    used = {file for prediction, parts in pairs for file in (prediction, *parts)}
    unmatched = {
        str(file): f"no {kind} of the same name for {printable(str(file))}"
        for files, kind in ((predicted, "label"), (true, "prediction"))
        for file in files
        if file not in used
    }
    if not pairs:
        raise InputError(next(iter(unmatched.values())))
    return Pairing(tuple(Pair(*pair) for pair in pairs), unmatched, passed_over(passed))


def with_images(pairs: Sequence[Pair], images: Path) -> tuple[Pair, ...]:
    """The pairs with the image of each, found by the label's name, where there is one.

    Raises:
        InputError: when the path does not exist or has no such files, two have one name, or none fits.
    """
    suffixes = VOLUME_SUFFIXES if is_volume(pairs[0].labels[0]) else PICTURE_SUFFIXES
    files = list_files(images, suffixes, recursive=True)
    if not files:
        raise InputError(f"is or holds no {', '.join(suffixes)} file", path=images)
    labels = {file for pair in pairs for file in pair.labels}
    names = {case_name(file) for file in labels}
    # masks may lie among the images: an image's own name is that of the case
    plain = [file for file in files if file not in labels and case_name(file) in names]
    own = [file for file in plain if stem(file) in names] or plain
    known = by_name(own, case_name)
    if images.is_file() and len(pairs) == 1:
        return (replace(pairs[0], image=images),)
    found = tuple(replace(pair, image=known.get(same_letters(case_name(pair.labels[0])))) for pair in pairs)
    if not any(pair.image for pair in found):
        raise InputError(f"no image of the same name for {pairs[0].labels[0]}", path=images)
    return found


def measure_files(
    pairs: Sequence[Pair], reading: Reading, measuring: Measuring, jobs: int | None = None
) -> dict[str, Measured | str]:
    """Reads each file once and measures each pair: case → what was found, or what is wrong with it.

    Args:
        pairs: all volumes or all pictures.
        reading: how files are read.
        measuring: how cases are measured.
        jobs: processes. By default one, or as many as there are cores where the first case says that it pays.

    Raises:
        InputError: when a process was ended from outside.
    """
    found: dict[str, Measured | str] = {}
    rest = list(pairs)
    with tqdm(total=len(pairs), unit="case", disable=None) as bar:
        if jobs is None:
            start = time.perf_counter()
            first = rest.pop(0)
            found[first.file] = _measure_pair(first, reading, measuring)
            bar.update()
            worth = (time.perf_counter() - start) * len(rest) > WORTH_SECONDS
            jobs = min(_cores(), len(rest)) if worth else 1
        if jobs < 2:
            for pair in rest:
                found[pair.file] = _measure_pair(pair, reading, measuring)
                bar.update()
        else:
            with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
                running = {pool.submit(_measure_pair, pair, reading, measuring): pair for pair in rest}
                for done in as_completed(running):
                    try:
                        found[running[done].file] = done.result()
                    except BrokenProcessPool as error:
                        raise InputError("a process was ended, perhaps for memory", remedy="try --jobs 1") from error
                    bar.update()
    return {pair.file: found[pair.file] for pair in pairs}


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _measure_pair(pair: Pair, reading: Reading, measuring: Measuring) -> Measured | str:
    try:
        predicted, true, spacing, image = read_pair(pair, reading)
        classes = reading.classes or max(int(predicted.max(initial=0)), int(true.max(initial=0)), 1)
        if not reading.classes and classes > UNNAMED:
            most = pair.prediction if predicted.max(initial=0) == classes else pair.labels[0]
            raise InputError(
                f"holds class numbers up to {classes}, unnamed ones may go up to {UNNAMED}",
                path=most,
                remedy="number the classes 1, 2, …; of labels alone, say which numbers are meant with --label-ids",
            )
        if reading.label_ids and int(predicted.max(initial=0)) > classes:
            raise InputError(
                f"holds classes up to {predicted.max()}, --label-ids numbers {classes}",
                path=pair.prediction,
                remedy="leave --label-ids out where predictions and labels are numbered alike",
            )
        predicted, true = class_maps(predicted, true, classes, pair.file)
        case = measure(predicted, true, classes, spacing, measuring)
        levels: tuple[int | None, int | None] = (None, None)
        if not (reading.classes or reading.label_map or is_volume(pair.prediction)):
            levels = _level([pair.prediction], predicted), _level(pair.labels, true)
        shown = largest_components(predicted, classes) if measuring.postprocess == "largest" else predicted
        picture = thumbnail(image, shown, true, spacing)
        return Measured(
            case, str(pair.prediction), int(predicted.max(initial=0)), int(true.max(initial=0)), levels, picture
        )
    except (ValueError, OSError) as error:
        return str(error)
    except MemoryError:
        return f"{printable(pair.file)}: there is not enough memory for it"


def read_pair(pair: Pair, reading: Reading) -> tuple[np.ndarray, np.ndarray, Sequence[float] | None, np.ndarray | None]:
    """(Prediction, label, voxel size in mm where it is known, image where there is one), masks as class indices.

    Volumes are in the orientation SPL, pictures have their channels first.

    Raises:
        ValueError: when a file cannot be read, or the files do not lie on one grid.
    """
    if not is_volume(pair.labels[0]):
        options = reading.label_map or None, max(1, reading.classes)
        true = merged_masks(pair.labels, *options)
        picture = None if pair.image is None else np.moveaxis(read_picture(pair.image), -1, 0)
        if picture is not None and picture.shape[1:] != true.shape:
            raise InputError(f"shape {picture.shape[1:]}, but {pair.labels[0]} has {true.shape}", path=pair.image)
        return read_mask(pair.prediction, *options), true, None, picture
    file, label_file = pair.prediction, pair.labels[0]
    prediction, label = read_volume(file, "label"), reoriented(read_volume(label_file, "label"))
    turned = reoriented(prediction)
    predicted = _on_grid_of(label, label_file, prediction, file)
    image = None
    if pair.image is not None:
        image = _on_grid_of(label, label_file, read_volume(pair.image, "image", assume_hu=True), pair.image)
    true = label.array
    if reading.label_ids:
        true = np.zeros_like(label.array)
        for index, number in enumerate(reading.label_ids, 1):
            true[label.array == number] = index
    return predicted, true, label.spacing_mm or turned.spacing_mm or reading.spacing_mm, image


def _on_grid_of(label: Volume, label_file: Path, volume: Volume, file: Path) -> np.ndarray:
    """A volume's array on the grid of the label.

    Raises:
        InputError: when it lies on another one.
    """
    turned = reoriented(volume).array
    found: np.ndarray | None = turned
    # where a file does not say where it lies, nothing but the shapes can be compared
    if volume.geometry == label.geometry == "file":
        found = on_grid(volume.array, volume.affine, label.affine, label.array.shape)
    if found is None and sorted(turned.shape) == sorted(label.array.shape):
        sizes = [" × ".join(f"{size:.3g}" for size in one.spacing_mm or ()) for one in (reoriented(volume), label)]
        what = f"voxels of {sizes[0]} mm, not {sizes[1]}" if sizes[0] != sizes[1] else "their affines differ"
        raise InputError(
            f"lies elsewhere in space than {label_file}: {what}", path=file, remedy="resample it to the label's grid"
        )
    if found is None or found.shape != label.array.shape:
        raise InputError(f"shape {turned.shape}, but {label_file} has {label.array.shape}", path=file)
    return found


def _level(files: Sequence[Path], mask: np.ndarray) -> int | None:
    """What pictures store where a mask is 1, bright being 255; None where the mask is empty."""
    grey = np.maximum.reduce([read_picture(file, "L") for file in files])
    if not mask.any():
        return None
    level = int(np.median(grey[mask == 1]))
    return 255 if level >= BRIGHT else level


def check_levels(measured: Mapping[str, Measured]) -> None:
    """Refuses masks of one class that store it as different numbers: they look like several classes.

    Args:
        measured: cases by name.

    Raises:
        InputError: when some do, naming a case for each number.
    """
    for side, what in enumerate(("predictions", "labels")):
        levels: dict[int, str] = {}
        for label, one in measured.items():
            if (level := one.levels[side]) is not None:
                levels.setdefault(level, label if side else one.prediction_file)
        if len(levels) > 1:
            held = ", ".join(f"{level} ({levels[level]})" for level in sorted(levels))
            raise InputError(
                f"the {what} hold {held} beside the background: that looks like several classes",
                remedy="name them with --classes, and say which number is which class with --label-map",
            )


def numbers(words: Sequence[str], what: str) -> Iterator[tuple[str, float]]:
    """(name, number) of words like `liver:2`; the name is empty where there is a number only.

    Raises:
        InputError: when a word is neither.

    Example:
        >>> list(numbers(["1.5", "left kidney:3"], "--tolerance"))
        [('', 1.5), ('left kidney', 3.0)]
    """
    for word in words:
        name, _, number = word.rpartition(":")
        value = math.nan
        with contextlib.suppress(ValueError):
            value = float(number)
        if not 0 <= value < math.inf:
            raise InputError(f"{what} takes numbers from 0 up, or NAME:NUMBER, not {word!r}")
        yield name, value
