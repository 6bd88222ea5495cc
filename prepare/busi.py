"""BUSI, the breast ultrasound images of Al-Dhabyani et al., to the layout that published networks train on.

images/benign (4).png       RGB, whatever the download held
masks/0/benign (4).png      0 and 255; all masks of an image merged
busi_train1.txt, busi_val1.txt, …2, …3      names without suffix; each pair of lists is one split
dataset.json                counts, splits, images that are the same
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from prepare.output import PrepareError, Report, staged, write_facts
from prepare.pictures import read_mask, read_rgb
from transforms import PICTURE_SUFFIXES, case_name, list_files, stem

TRAIN_SHARE = 0.7


@dataclass(frozen=True)
class Sample:
    """One image of the download with all its masks; an image of normal tissue may have none."""

    name: str
    kind: str
    image: Path
    masks: tuple[Path, ...]


def _natural(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def find_samples(raw: Path, kinds: Sequence[str]) -> list[Sample]:
    """The images of the folders `kinds` with their masks (`NAME_mask.png`, `NAME_mask_1.png` …), in natural order.

    Raises:
        PrepareError: when a folder is missing, an image has no mask, or a mask has no image.
    """
    root = raw if (raw / kinds[0]).is_dir() else raw / "Dataset_BUSI_with_GT"
    samples = []
    for kind in kinds:
        folder = root / kind
        if not folder.is_dir():
            raise PrepareError(f"{raw}: no folder {kind}/ in it; --raw wants the unpacked Dataset_BUSI_with_GT")
        images: dict[str, Path] = {}
        masks = defaultdict(list)
        for path in list_files(folder, PICTURE_SUFFIXES):
            if (name := case_name(path)) == stem(path):
                images[name] = path
            else:
                masks[name].append(path)
        if orphans := sorted(masks.keys() - images.keys()):
            raise PrepareError(f"{folder}: masks without an image, such as {orphans[0]}; unpack the download again")
        if kind != "normal" and (bare := sorted(images.keys() - masks.keys())):
            raise PrepareError(f"{folder}: images without a mask, such as {bare[0]}; unpack the download again")
        for name in sorted(images, key=_natural):
            samples.append(Sample(name, kind, images[name], tuple(masks[name])))
    if not samples:
        raise PrepareError(f"{raw}: no pictures in {', '.join(kinds)}")
    return samples


def stratified_split(groups: Sequence[Sequence[str]], kind_of: dict[str, str], seed: int) -> tuple[set[str], set[str]]:
    """Names for training and validation: 70 % of every kind, rounded down, groups never divided.

    Args:
        groups: names that must stay together; a group counts for the kind of its first name.
        kind_of: the class of each name.
        seed: of the draw.

    Example:
        >>> kind_of = {f"{kind} ({n})": kind for kind in ("benign", "malignant") for n in range(10)}
        >>> train, val = stratified_split([[name] for name in kind_of], kind_of, seed=41)
        >>> len(train), sum(kind_of[name] == "benign" for name in train), len(val)
        (14, 7, 6)
    """
    rng = np.random.default_rng(seed)
    train: set[str] = set()
    for kind in sorted(set(kind_of.values())):
        mine = [group for group in groups if kind_of[group[0]] == kind]
        room = int(TRAIN_SHARE * sum(map(len, mine)))
        for index in rng.permutation(len(mine)):
            if len(mine[index]) <= room:
                train.update(mine[index])
                room -= len(mine[index])
    return train, set(kind_of) - train


def _given_splits(folder: Path, names: set[str]) -> dict[int, dict[str, list[str]]]:
    splits: dict[int, dict[str, list[str]]] = {}
    for train_file in sorted(folder.glob("busi_train*.txt"), key=lambda path: _natural(path.stem)):
        number = train_file.stem.removeprefix("busi_train")
        parts = {}
        for part, path in (("train", train_file), ("val", folder / f"busi_val{number}.txt")):
            if not path.is_file():
                raise PrepareError(f"{path}: missing, though {train_file.name} is there")
            parts[part] = path.read_text(encoding="utf-8").split("\n")
            parts[part] = [line.strip() for line in parts[part] if line.strip()]
            if unknown := sorted(set(parts[part]) - names):
                raise PrepareError(f"{path}: {len(unknown)} names that are not in the data, such as {unknown[0]}")
        splits[int(number or 1)] = parts
    if not splits:
        raise PrepareError(f"{folder}: no busi_train1.txt and busi_val1.txt in it")
    return splits


def _write_sample(sample: Sample, folder: Path) -> tuple[str, bool]:
    """Writes image and mask. Returns a hash of the image's pixels, and whether the mask marks anything."""
    image = read_rgb(sample.image)
    height, width, _ = image.shape
    mask = np.zeros((height, width), bool)
    for path in sample.masks:
        one = read_mask(path)
        if one.shape != mask.shape:
            raise PrepareError(f"{path}: {one.shape[1]}×{one.shape[0]} pixels, the image {width}×{height}")
        mask |= one
    if sample.kind == "normal" and mask.any():
        raise PrepareError(f"{sample.masks[0]}: marks a lesion in an image of normal tissue")
    Image.fromarray(image).save(folder / "images" / f"{sample.name}.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / "0" / f"{sample.name}.png")
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest(), bool(mask.any())


def prepare_busi(
    raw: Path,
    out: Path,
    *,
    seed: int = 41,
    splits: int = 3,
    split_files: Path | None = None,
    include_normal: bool = False,
    deduplicate: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    report: Report | None = None,
) -> None:
    """Prepares the raw download, in the layout that this module's head describes.

    Args:
        raw: the unpacked folder Dataset_BUSI_with_GT, or the folder above it.
        out: the folder to make.
        seed: of the first split; each further one takes the next number.
        splits: how many 70/30 splits to draw, stratified by class.
        split_files: folder with busi_train1.txt, busi_val1.txt …, used as they are instead.
        include_normal: take the images without a lesion too, with empty masks.
        deduplicate: keep images with the same pixels on one side of every split.
        overwrite: replace an `out` that was prepared before.
        workers: threads; None for one per core.
        report: prints what was done.

    Raises:
        PrepareError: when input or output folder are not as they must be; then nothing is written.

    Example:
        >>> prepare_busi(Path("nowhere"), Path("out"))
        Traceback (most recent call last):
        prepare.output.PrepareError: nowhere: no folder benign/ in it; --raw wants the unpacked Dataset_BUSI_with_GT
    """
    report = report or Report()
    if splits < 1:
        raise PrepareError(f"--splits {splits}: at least one split is needed")
    if split_files and deduplicate:
        raise PrepareError("given split files are used as they are: leave out --deduplicate or --split-files")
    kinds = ("benign", "malignant", "normal") if include_normal else ("benign", "malignant")
    samples = find_samples(raw, kinds)
    kind_of = {sample.name: sample.kind for sample in samples}
    if len(kind_of) < len(samples):
        raise PrepareError(f"{raw}: two classes hold an image of the same name")
    parts = _given_splits(split_files, set(kind_of)) if split_files else {}

    with staged(out, overwrite) as folder:
        for sub in ("images", "masks/0"):
            (folder / sub).mkdir(parents=True)
        written = report.map(lambda sample: _write_sample(sample, folder), samples, "preparing", workers)
        same_pixels = defaultdict(list)
        for sample, (content, _) in zip(samples, written, strict=True):
            same_pixels[content].append(sample.name)
        empty = [s.name for s, (_, marked) in zip(samples, written, strict=True) if not marked and s.kind != "normal"]
        groups = list(same_pixels.values())
        duplicates = [group for group in groups if len(group) > 1]

        if not parts:
            units = groups if deduplicate else [[name] for name in kind_of]
            for number in range(1, splits + 1):
                train, val = stratified_split(units, kind_of, seed + number - 1)
                parts[number] = {"train": sorted(train, key=_natural), "val": sorted(val, key=_natural)}
        for number, split in parts.items():
            for part, names in split.items():
                (folder / f"busi_{part}{number}.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
        write_facts(
            folder,
            {
                "dataset": "busi",
                "images": dict(Counter(kind_of.values())),
                "several_masks": [sample.name for sample in samples if len(sample.masks) > 1],
                "empty_masks": empty,
                "duplicates": duplicates,
                "splits": "given" if split_files else {"seed": seed, "deduplicated": deduplicate},
                "counts": {str(n): {part: len(names) for part, names in split.items()} for n, split in parts.items()},
            },
            report,
        )

    for name in empty:
        report(f"WARNING: the mask of {name} is empty")
    rows = []
    for number, split in parts.items():
        sides = {part: set(names) for part, names in split.items()}
        if both := sorted(sides["train"] & sides["val"], key=_natural):
            report(f"WARNING: split {number}: {len(both)} images are in training AND validation, such as {both[0]}")
        for group in duplicates:
            if sides["train"] & set(group) and sides["val"] & set(group):
                where = ", ".join(f"{n} ({'train' if n in sides['train'] else 'val'})" for n in group)
                report(f"WARNING: split {number}: the same image on both sides: {where}; --deduplicate keeps it on one")
        for part, names in split.items():
            count = Counter(kind_of[name] for name in names)
            rows.append((str(number), part, str(len(names)), *(str(count[kind]) for kind in kinds)))
    report.table(("split", "part", "images", *kinds), rows)
    merged = sum(len(sample.masks) > 1 for sample in samples)
    report(f"{len(samples)} images, {merged} with several masks merged, {len(duplicates)} groups of equal images")
