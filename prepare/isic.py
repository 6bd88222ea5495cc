"""ISIC 2017 and 2018 (task 1, lesion boundaries) to the layout that published networks train on.

train/images/ISIC_0000000.jpg      as downloaded, or PNG where resized; also val/ and, where downloaded, test/
train/masks/ISIC_0000000.png       0 and 255
train.txt, val.txt, test.txt       the ids of each part
dataset.json                       counts, split, size
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from prepare.output import Report, check_workers, oddities, staged, write_facts
from transforms import (
    PICTURE_SUFFIXES,
    InputError,
    PictureReader,
    check_sizes,
    find_folder,
    list_files,
    merged_masks,
    pair_masks,
    passed_over,
    printable,
    stem,
    without_by_products,
)

# Image and mask folder of each part, as the archive's downloads unpack.
FOLDERS: Mapping[int, Mapping[str, tuple[str, str]]] = {
    2017: {
        "train": ("ISIC-2017_Training_Data", "ISIC-2017_Training_Part1_GroundTruth"),
        "val": ("ISIC-2017_Validation_Data", "ISIC-2017_Validation_Part1_GroundTruth"),
        "test": ("ISIC-2017_Test_v2_Data", "ISIC-2017_Test_v2_Part1_GroundTruth"),
    },
    2018: {
        "train": ("ISIC2018_Task1-2_Training_Input", "ISIC2018_Task1_Training_GroundTruth"),
        "val": ("ISIC2018_Task1-2_Validation_Input", "ISIC2018_Task1_Validation_GroundTruth"),
        "test": ("ISIC2018_Task1-2_Test_Input", "ISIC2018_Task1_Test_GroundTruth"),
    },
}
SPLITS = ("official", "7:3")
LARGEST_SIDE = 16384
# Published counts of the 7:3 split: images of training and validation together → images to train on.
PUBLISHED_TRAINING = {2150: 1500, 2694: 1886}

# An image, and its mask or masks.
Pair = tuple[Path, tuple[Path, ...]]


def find_pairs(
    raw: Path, year: int, allow_unpaired: bool = False, passed: Counter[str] | None = None
) -> dict[str, dict[str, Pair]]:
    """Image and masks of each id, for each part that was downloaded.

    Args:
        raw: holds the unpacked downloads, each perhaps in a folder of its own.
        year: 2017 or 2018.
        allow_unpaired: leave out images without a mask and masks without an image.
        passed: counts what was left out.

    Raises:
        InputError: when nothing is there, an image has no mask, or a mask has no image.
    """
    parts = {}
    for part, names in FOLDERS[year].items():
        images_in, masks_in = (find_folder(raw, name) for name in names)
        if images_in is None:
            continue
        if masks_in is None:
            fact = f"missing, though {names[0]} is there"
            raise InputError(fact, path=raw / names[1], remedy="download the masks too")
        images, masks = (list_files(folder, PICTURE_SUFFIXES, passed=passed) for folder in (images_in, masks_in))
        images = without_by_products(images, passed)
        try:
            pairs = pair_masks(images, masks, allow_unpaired, passed)
        except InputError as error:
            raise InputError(f"{part}: {error}") from error
        if not pairs:
            remedy = "unpack the download into this folder"
            raise InputError("no pictures with masks in it", path=images_in, remedy=remedy)
        parts[part] = {stem(image): (image, those) for image, those in pairs}
    if not parts:
        raise InputError(f"no pictures in {', '.join(images for images, _ in FOLDERS[year].values())}", path=raw)
    return parts


def split_parts(parts: dict[str, dict[str, Pair]], split: str, seed: int) -> dict[str, dict[str, Pair]]:
    """The official parts, or training and validation pooled and drawn anew 7:3; test images stay apart either way.

    Raises:
        InputError: when a part is missing.

    Example:
        >>> pair = Path("image.jpg"), (Path("mask.png"),)
        >>> drawn = split_parts({"train": {str(n): pair for n in range(10)}}, "7:3", seed=42)
        >>> len(drawn["train"]), len(drawn["val"])
        (7, 3)
    """
    if split == "official":
        if missing := [part for part in ("train", "val") if part not in parts]:
            fact = f"the official split lacks {' and '.join(missing)}"
            raise InputError(fact, remedy="download it, or pass --split 7:3")
        return parts
    pool = {**parts.get("train", {}), **parts.get("val", {})}
    if len(pool) < 2:
        raise InputError(f"--split 7:3 draws from the training and validation images, {len(pool)} found")
    count = PUBLISHED_TRAINING.get(len(pool), round(0.7 * len(pool)))
    names = sorted(pool)
    drawn = {names[index] for index in np.random.default_rng(seed).permutation(len(names))[:count]}
    result = {
        "train": {name: pool[name] for name in names if name in drawn},
        "val": {name: pool[name] for name in names if name not in drawn},
    }
    return result | {"test": parts["test"]} if "test" in parts else result


def _resize(array: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W[, C]) uint8 → (H', W'[, C]): bilinear without antialiasing, as the published loaders resize."""
    channels_first = torch.from_numpy(np.ascontiguousarray(np.atleast_3d(array).transpose(2, 0, 1)))[None].float()
    resized = interpolate(channels_first, size, mode="bilinear", align_corners=False).round().byte()
    return resized[0].permute(1, 2, 0).squeeze(-1).numpy()


def _write_pair(item: tuple[str, Pair], folder: Path, size: tuple[int, int] | None) -> str:
    """Writes image and mask. Returns `oddities` of the mask."""
    name, (image_path, mask_paths) = item
    # Read even where it is copied: a damaged file ends the preparation, not the training.
    image, facts = PictureReader().get_data([image_path])
    mask = merged_masks(mask_paths) * np.uint8(255)
    check_sizes(image_path, image.shape[:2], facts["exif_orientation"], mask_paths[0], mask.shape)
    if size is None:
        shutil.copyfile(image_path, folder / "images" / f"{name}{image_path.suffix.lower()}")
    else:
        Image.fromarray(_resize(image, size)).save(folder / "images" / f"{name}.png")
        mask = np.where(_resize(mask, size) > 127, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
    return oddities(mask)


def prepare_isic(
    raw: Path,
    out: Path | None = None,
    *,
    year: int,
    split: str = "official",
    seed: int = 42,
    size: tuple[int, int] | None = None,
    allow_unpaired: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
    report: Report | None = None,
) -> None:
    """Prepares the unpacked downloads, in the layout that this module's head describes.

    Args:
        raw: the folder that holds the unpacked downloads.
        out: the folder to make; None for data/isic17 or data/isic18.
        year: 2017 or 2018.
        split: "official", or "7:3" as VM-UNet's authors have it, drawn with `seed`.
        seed: of the 7:3 split.
        size: (H, W) to resize images and masks to; None leaves them as downloaded.
        allow_unpaired: leave out images without a mask and masks without an image, and say how many.
        workers: threads; None for one per core.
        overwrite: replace an `out` that was prepared before.
        report: prints what was done.

    Raises:
        InputError: when input or output folder are not as they must be; then nothing is written.

    Example:
        >>> prepare_isic(Path("nowhere"), Path("out"), year=2017)
        Traceback (most recent call last):
        transforms.files.InputError: nowhere: no pictures in ISIC-2017_Training_Data, ISIC-2017_Validation_Data, ...
    """
    report = report or Report()
    if size is not None and not 1 <= min(size) <= max(size) <= LARGEST_SIDE:
        raise InputError(f"--size {size[0]} {size[1]}: expected rows and columns, from 1 to {LARGEST_SIDE} pixels")
    check_workers(workers)
    passed: Counter[str] = Counter()
    parts = split_parts(find_pairs(raw, year, allow_unpaired, passed), split, seed)
    odd: dict[str, str] = {}
    with staged(out or Path(f"data/isic{year - 2000}"), overwrite) as folder:
        for part, pairs in parts.items():
            for kind in ("images", "masks"):
                (folder / part / kind).mkdir(parents=True)
            write = partial(_write_pair, folder=folder / part, size=size)
            found = report.map(write, list(pairs.items()), f"preparing {part}", workers)
            odd |= {f"{part}/{name}": oddity for name, oddity in zip(pairs, found, strict=True)}
            (folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in pairs))
        write_facts(
            folder,
            {
                "dataset": f"isic{year}",
                "split": split if split == "official" else {"7:3": {"seed": seed}},
                "size": size,
                "counts": {part: len(pairs) for part, pairs in parts.items()},
            },
            report,
        )
    if words := passed_over(passed):
        report(f"{printable(str(raw))}: {words}")
    report.odd_masks(*([name for name, found in odd.items() if found == kind] for kind in ("empty", "inverted")))
    report.table(("part", "images"), [(part, str(len(pairs))) for part, pairs in parts.items()])
