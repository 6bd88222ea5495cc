"""`python -m evaluation assemble SLICES --reference VOLUME --output OUT`: numbered slice masks → a volume.

SLICES is a folder of pictures. The last number in a file's name is the slice's; they begin with 0 or 1 at the patient's
feet and none may be missing. In a slice rows run from front to back and columns to the patient's left, as `python -m
prepare synapse` cuts them. The volume lies on the grid of the reference.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from monai.data import MetaTensor

from transforms import (
    ORIENTATION,
    PICTURE_SUFFIXES,
    InputError,
    SaveImageVolume,
    VolumeReader,
    check_output,
    dashed,
    has_suffix,
    list_files,
    read_mask,
    reoriented,
    stem,
    whole_numbers,
)
from transforms.volumes import HDF5_SUFFIXES, Volume

_NUMBER = re.compile(r"(\d+)\D*\Z")
SUFFIX = ".nii.gz"


def assemble(
    slices: Path, reference: Path, output: Path, label_map: Mapping[int, int] | None = None
) -> tuple[int, ...]:
    """Writes the volume and returns the shape of the stack, (D, H, W).

    Args:
        slices: folder of pictures whose names end in numbers.
        reference: NIfTI or HDF5 volume whose grid it is; an HDF5 file's data set `label`.
        output: the file, NAME.nii.gz.
        label_map: {stored number: class}; without it the stored numbers are the classes, and 255 beside 0 is class 1.

    Raises:
        InputError: when slices are missing, double, or of another size than the reference's.
    """
    if not output.name.endswith(SUFFIX):
        raise InputError(f"expected a name that ends in {SUFFIX}", path=output)
    # whatever a NIfTI file holds: only its grid is needed
    reader = VolumeReader("label") if has_suffix(reference, HDF5_SUFFIXES) else VolumeReader(assume_hu=True)
    array, meta = reader.get_data((reference,))
    volume = reoriented(Volume(array, meta["affine"], None, meta["geometry"]), ORIENTATION)
    files = _in_order(slices, len(volume.array))
    masks = []
    for file in files:
        mask = read_mask(file, label_map or {number: number for number in range(256)})
        if mask.shape != volume.array.shape[1:]:
            raise InputError(
                f"{mask.shape[0]} × {mask.shape[1]} pixels, the slices of {reference} have "
                f"{volume.array.shape[1]} × {volume.array.shape[2]}",
                path=file,
                remedy="write the masks in the size of the volume",
            )
        masks.append(mask)
    stack = np.stack(masks)
    if not label_map and set(np.unique(stack).tolist()) == {0, 255}:
        stack = stack // 255
    labels = whole_numbers(stack, slices)
    meta = {key: value for key, value in meta.items() if key != "affine"}
    meta["filename_or_obj"] = str(reference)
    SaveImageVolume(output.parent)(
        MetaTensor(torch.from_numpy(labels[None]), torch.from_numpy(volume.affine), meta),
        filename=output.with_name(output.name.removesuffix(SUFFIX)),
    )
    return labels.shape


def _in_order(folder: Path, count: int) -> list[Path]:
    """The slices by their numbers.

    Raises:
        InputError: when they are not `count` consecutive ones from 0 or 1.
    """
    if not folder.is_dir():
        raise InputError("is no folder", path=folder)
    numbered: dict[int, Path] = {}
    for file in list_files(folder, PICTURE_SUFFIXES):
        found = _NUMBER.search(stem(file))
        if found is None:
            raise InputError("has no number in its name", path=file, remedy="name slices slice000.png, slice001.png, …")
        other = numbered.setdefault(int(found[1]), file)
        if other is not file:
            raise InputError(f"has the same number as {other}", path=file, remedy="remove one of them")
    start = 0 if 0 in numbered else 1
    expected = range(start, start + count)
    for what, numbers in (("lacks", set(expected) - set(numbered)), ("adds", set(numbered) - set(expected))):
        if numbers:
            shown = ", ".join(map(str, sorted(numbers)[:5])) + " …" * (len(numbers) > 5)
            raise InputError(
                f"{len(numbered)} slices for {count}, it {what} {shown}",
                path=folder,
                remedy=f"number the slices {start} to {expected[-1]}",
            )
    return [numbered[number] for number in expected]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m evaluation assemble`."""
    parser = argparse.ArgumentParser(prog="python -m evaluation assemble", description=__doc__.partition("\n\n")[2])
    parser.add_argument("slices", type=Path, help="folder of numbered pictures")
    parser.add_argument("--reference", type=Path, required=True, metavar="VOLUME", help="the image or label that the "
                        "slices were cut from")  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="the file to write, NAME.nii.gz")
    parser.add_argument("--label-map", nargs="+", default=[], metavar="N:CLASS", help="which number in the pictures "
                        "is which class; without it the numbers are the classes")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        check_output(options.output.parent)
        shape = assemble(options.slices, options.reference, options.output, parse_label_map(options.label_map))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {dashed(str(error))}")
    print(f"written: {options.output}, {shape[0]} slices of {shape[1]} × {shape[2]}")


def parse_label_map(words: Sequence[str]) -> dict[int, int]:
    """The classes that --label-map gives to stored numbers.

    Raises:
        InputError: when a word is not NUMBER:CLASS, a number stands there twice, or a class is left out.

    Example:
        >>> parse_label_map(["0:0", "85:1", "170:2"])
        {0: 0, 85: 1, 170: 2}
    """
    found: dict[int, int] = {}
    for word in words:
        number, _, index = word.partition(":")
        if not (number.isdecimal() and index.isdecimal()) or int(number) in found:
            raise InputError(f"--label-map takes NUMBER:CLASS once for each stored number, not {' '.join(words)}")
        found[int(number)] = int(index)
    if found and set(found.values()) | {0} != set(range(max(found.values()) + 1)):
        raise InputError(f"--label-map leaves out a class below {max(found.values())}")
    return found
