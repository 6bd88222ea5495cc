"""ISIC 2017 and 2018 (task 1, lesion boundaries) to the layout that published networks train on.

train/images/ISIC_0000000.jpg      as downloaded, or PNG where resized; also val/ and, where downloaded, test/
train/masks/ISIC_0000000.png       0 and 255
train.txt, val.txt, test.txt       the ids of each part
dataset.json                       counts, split, size
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate

from prepare.output import PrepareError, Report, staged, write_facts
from prepare.pictures import read_mask, read_rgb
from transforms import PICTURE_SUFFIXES, list_files, pair_by_name, stem

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
# Published counts of the 7:3 split: images of training and validation together → images to train on.
PUBLISHED_TRAINING = {2150: 1500, 2694: 1886}

Pair = tuple[Path, Path]


def find_pairs(raw: Path, year: int) -> dict[str, dict[str, Pair]]:
    """Image and mask of each id, for each part that was downloaded.

    Raises:
        PrepareError: when nothing is there, an image has no mask, or a mask has no image.
    """
    parts = {}
    for part, (image_folder, mask_folder) in FOLDERS[year].items():
        if not (raw / image_folder).is_dir():
            continue
        if not (raw / mask_folder).is_dir():
            raise PrepareError(f"{raw / mask_folder}: missing, though {image_folder} is there; download the masks too")
        images, masks = (list_files(raw / folder, PICTURE_SUFFIXES) for folder in (image_folder, mask_folder))
        images = [path for path in images if not stem(path).endswith("_superpixels")]
        try:
            pairs = pair_by_name(images, masks, ("image", "mask"))
        except ValueError as error:
            raise PrepareError(f"{part}: {error}") from error
        parts[part] = {stem(image): (image, mask) for image, mask in pairs}
    if not any(parts.values()):
        raise PrepareError(f"{raw}: no pictures in {', '.join(images for images, _ in FOLDERS[year].values())}")
    return parts


def split_parts(parts: dict[str, dict[str, Pair]], split: str, seed: int) -> dict[str, dict[str, Pair]]:
    """The official parts, or training and validation pooled and drawn anew 7:3; test images stay apart either way.

    Raises:
        PrepareError: when a part is missing.

    Example:
        >>> pair = Path("image.jpg"), Path("mask.png")
        >>> drawn = split_parts({"train": {str(n): pair for n in range(10)}}, "7:3", seed=42)
        >>> len(drawn["train"]), len(drawn["val"])
        (7, 3)
    """
    if split == "official":
        if missing := [part for part in ("train", "val") if part not in parts]:
            raise PrepareError(f"the official split lacks {' and '.join(missing)}: download it, or pass --split 7:3")
        return parts
    pool = {**parts.get("train", {}), **parts.get("val", {})}
    if len(pool) < 2:
        raise PrepareError(f"--split 7:3 draws from the training and validation images, {len(pool)} found")
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


def _write_pair(item: tuple[str, Pair], folder: Path, size: tuple[int, int] | None) -> None:
    name, (image_path, mask_path) = item
    mask = read_mask(mask_path).astype(np.uint8) * 255
    if size is None:
        with Image.open(image_path) as file:
            width, height = file.size
        shutil.copyfile(image_path, folder / "images" / f"{name}{image_path.suffix.lower()}")
    else:
        image = read_rgb(image_path)
        height, width = image.shape[:2]
        Image.fromarray(_resize(image, size)).save(folder / "images" / f"{name}.png")
    if mask.shape != (height, width):
        raise PrepareError(f"{mask_path}: {mask.shape[1]}×{mask.shape[0]} pixels, the image {width}×{height}")
    if size is not None:
        mask = np.where(_resize(mask, size) > 127, 255, 0).astype(np.uint8)
    Image.fromarray(mask).save(folder / "masks" / f"{name}.png")


def prepare_isic(
    raw: Path,
    out: Path | None = None,
    *,
    year: int,
    split: str = "official",
    seed: int = 42,
    size: tuple[int, int] | None = None,
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
        workers: threads; None for one per core.
        overwrite: replace an `out` that was prepared before.
        report: prints what was done.

    Raises:
        PrepareError: when input or output folder are not as they must be; then nothing is written.

    Example:
        >>> prepare_isic(Path("nowhere"), Path("out"), year=2017)
        Traceback (most recent call last):
        prepare.output.PrepareError: nowhere: no pictures in ISIC-2017_Training_Data, ISIC-2017_Validation_Data, ...
    """
    report = report or Report()
    if size is not None and min(size) < 1:
        raise PrepareError(f"--size {size[0]} {size[1]}: expected two positive numbers")
    parts = split_parts(find_pairs(raw, year), split, seed)
    with staged(out or Path(f"data/isic{year - 2000}"), overwrite) as folder:
        for part, pairs in parts.items():
            for kind in ("images", "masks"):
                (folder / part / kind).mkdir(parents=True)
            write = partial(_write_pair, folder=folder / part, size=size)
            report.map(write, list(pairs.items()), f"preparing {part}", workers)
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
    report.table(("part", "images"), [(part, str(len(pairs))) for part, pairs in parts.items()])
