"""Checks a prepared data set before a training, as the bundles' `--check_data` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prepare.output import Report
from transforms import SYNAPSE_CLASSES, DataSplit, InputError, LabelSet, check_split, image_split, synapse_split

SYNAPSE, PICTURES = "lists/lists_Synapse", ("images", "train/images")


def _is_data(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in (SYNAPSE, *PICTURES))


def find_split(folder: Path, fold: int = 1) -> DataSplit:
    """The parts of a folder in one of the layouts that the bundles train on.

    Raises:
        InputError: when it has none of them; sub-folders that have one are named.

    Example:
        >>> find_split(Path("nowhere"))
        Traceback (most recent call last):
        transforms.files.InputError: nowhere: no such folder
    """
    if not folder.is_dir():
        raise InputError("no such folder", path=folder)
    if (folder / SYNAPSE).is_dir():
        return synapse_split(folder, selection="paper")
    if _is_data(folder):
        return image_split(folder, fold, selection="paper")
    inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and _is_data(path))
    layouts = f"expected {SYNAPSE}, or images and masks, or train and val with both"
    remedy = f"check one of {', '.join(inside)} in it" if inside else layouts
    raise InputError("holds no prepared data", path=folder, remedy=remedy)


def check(
    folder: Path,
    *,
    full: bool = False,
    fold: int = 1,
    classes: Sequence[str] | None = None,
    label_map: Mapping[int, int] | None = None,
    report: Report | None = None,
) -> None:
    """Prints what `transforms.check_split` finds in a folder, every pair of nearly equal images included.

    Args:
        folder: as `python -m prepare` makes it, or a folder of images and masks.
        full: open every file, not a sample.
        fold: number of the lists that divide a folder of pictures.
        classes: names; None for the organs of CT, and for one lesion in pictures.
        label_map: {stored number: class} of masks.
        report: prints it.

    Raises:
        InputError: when the data hold errors.

    Example:
        >>> check(Path("nowhere"))
        Traceback (most recent call last):
        transforms.files.InputError: nowhere: no such folder
    """
    report = report or Report()
    split = find_split(folder, fold)
    names = classes or (SYNAPSE_CLASSES if (folder / SYNAPSE).is_dir() else ("lesion",))
    found = check_split(split, LabelSet(names, label_map), full)
    for line in found.lines:
        report(line)
    for one, two in found.near:
        report(f"nearly equal: {one} ≈ {two}")
    for line in found.warnings:
        report(f"WARNING: {line}")
    for line in found.errors if len(found.errors) > 1 else ():
        report(f"ERROR: {line}")
    found.raise_errors()
