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

from prepare.output import Report, check_workers, oddities, staged, write_facts
from transforms import (
    PICTURE_SUFFIXES,
    InputError,
    PictureReader,
    check_sizes,
    find_folder,
    list_files,
    made_of,
    merged_masks,
    pair_masks,
    passed_over,
    printable,
    read_list,
    same_letters,
    stem,
)

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


def find_samples(
    raw: Path, kinds: Sequence[str], allow_unpaired: bool = False, passed: Counter[str] | None = None
) -> list[Sample]:
    """The images of the folders `kinds` with their masks (`NAME_mask.png`, `NAME_mask_1.png` …), in natural order.

    Args:
        raw: the folder of these folders, or one up to two levels above it.
        kinds: names of the folders.
        allow_unpaired: leave out images without a mask and masks without an image.
        passed: counts what was left out.

    Raises:
        InputError: when a folder is missing, an image has no mask, or a mask has no image.
    """
    first = find_folder(raw, kinds[0])
    if first is None:
        fact = f"no folder {kinds[0]}/ in it"
        raise InputError(fact, path=raw, remedy="--raw wants the unpacked Dataset_BUSI_with_GT")
    samples = []
    for kind in kinds:
        folder = first.parent / kind
        if not folder.is_dir():
            fact = f"no folder {kind}/ in it"
            raise InputError(fact, path=first.parent, remedy="--raw wants the unpacked Dataset_BUSI_with_GT")
        files = list_files(folder, PICTURE_SUFFIXES, passed=passed)
        images = [path for path in files if made_of(path) == stem(path)]
        masks = [path for path in files if made_of(path) != stem(path)]
        marked = {same_letters(made_of(path)) for path in masks}
        bare = [path for path in images if kind == "normal" and same_letters(stem(path)) not in marked]
        pairs = pair_masks([path for path in images if path not in bare], masks, allow_unpaired, passed)
        for image, those in sorted([*pairs, *((path, ()) for path in bare)], key=lambda pair: _natural(stem(pair[0]))):
            name = stem(image)
            if name != name.strip() or not name.isprintable():
                raise InputError("a list of names cannot hold this name", path=image, remedy="rename image and mask")
            samples.append(Sample(name, kind, image, those))
    if not samples:
        raise InputError(f"no pictures in {', '.join(kinds)}", path=raw)
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
                raise InputError(f"missing, though {train_file.name} is there", path=path)
            parts[part] = read_list(path)
            if not parts[part]:
                raise InputError("lists nothing", path=path)
            if twice := [name for name, count in Counter(parts[part]).items() if count > 1]:
                raise InputError(f"lists {twice[0]} twice", path=path)
            if unknown := sorted(set(parts[part]) - names):
                raise InputError(f"{len(unknown)} names that are not in the data, such as {unknown[0]}", path=path)
        splits[int(number or 1)] = parts
    if not splits:
        raise InputError("no busi_train1.txt and busi_val1.txt in it", path=folder)
    return splits


def _write_sample(sample: Sample, folder: Path) -> tuple[str, str]:
    """Writes image and mask. Returns a hash of the image's pixels, and `oddities` of the mask."""
    image, facts = PictureReader().get_data([sample.image])
    mask = np.zeros(image.shape[:2], bool)
    if sample.masks:
        mask = merged_masks(sample.masks) > 0
        check_sizes(sample.image, image.shape[:2], facts["exif_orientation"], sample.masks[0], mask.shape)
    if sample.kind == "normal" and mask.any():
        raise InputError("marks a lesion in an image of normal tissue", path=sample.masks[0])
    Image.fromarray(image).save(folder / "images" / f"{sample.name}.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / "0" / f"{sample.name}.png")
    return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest(), oddities(mask)


def prepare_busi(
    raw: Path,
    out: Path,
    *,
    seed: int = 41,
    splits: int = 3,
    split_files: Path | None = None,
    include_normal: bool = False,
    deduplicate: bool = False,
    allow_unpaired: bool = False,
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
        allow_unpaired: leave out images without a mask and masks without an image, and say how many.
        overwrite: replace an `out` that was prepared before.
        workers: threads; None for one per core.
        report: prints what was done.

    Raises:
        InputError: when input or output folder are not as they must be; then nothing is written.

    Example:
        >>> prepare_busi(Path("nowhere"), Path("out"))
        Traceback (most recent call last):
        transforms.files.InputError: nowhere: no folder benign/ in it; --raw wants the unpacked Dataset_BUSI_with_GT
    """
    report = report or Report()
    if splits < 1:
        raise InputError(f"--splits {splits}: at least one split is needed")
    check_workers(workers)
    if split_files and deduplicate:
        raise InputError("given split files are used as they are: leave out --deduplicate or --split-files")
    kinds = ("benign", "malignant", "normal") if include_normal else ("benign", "malignant")
    passed: Counter[str] = Counter()
    samples = find_samples(raw, kinds, allow_unpaired, passed)
    kind_of = {sample.name: sample.kind for sample in samples}
    if len(kind_of) < len(samples):
        raise InputError("two classes hold an image of the same name", path=raw)
    parts = _given_splits(split_files, set(kind_of)) if split_files else {}

    with staged(out, overwrite) as folder:
        for sub in ("images", "masks/0"):
            (folder / sub).mkdir(parents=True)
        written = report.map(lambda sample: _write_sample(sample, folder), samples, "preparing", workers)
        same_pixels = defaultdict(list)
        for sample, (content, _) in zip(samples, written, strict=True):
            same_pixels[content].append(sample.name)
        odd = {sample.name: oddity for sample, (_, oddity) in zip(samples, written, strict=True)}
        empty, inverted = ([name for name, found in odd.items() if found == kind] for kind in ("empty", "inverted"))
        empty = [name for name in empty if kind_of[name] != "normal"]
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

    if words := passed_over(passed):
        report(f"{printable(str(raw))}: {words}")
    report.odd_masks(empty, inverted)
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
