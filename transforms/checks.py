"""What is wrong with a data set, known before hours of training: every file read once, through the gate's readers."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from monai.utils import ensure_tuple
from PIL import Image
from scipy.fft import dctn
from tqdm import tqdm

from transforms.datasets import DataSplit, LabelSet, is_normal
from transforms.files import PICTURE_SUFFIXES, InputError, has_suffix, stem
from transforms.intensity import WINDOW_HU
from transforms.pictures import EXIF_ORIENTATION, PictureReader, check_sizes, read_mask
from transforms.volumes import SliceReader, read_volume

MODES = ("quick", "full", "false", "true")
# How many pairs of each part the quick form opens, spread evenly.
QUICK_SAMPLE = 8
# Files of one length, up to which the quick form compares them. In formats that do not compress all have one.
SAME_LENGTH = 32
LOGGED_ERRORS = 20
# Standard deviation of an image that shows nothing, as a share of its range.
CONSTANT = 2 / 255
# Of 452 images of BUSI all 80 pairs above are the same picture again, or the next frame of the same scan. The most
# similar pairs of different patients' skin lesions lie at 0.55.
NEAR = 0.7
# A mask that marks more than this share of its image, or all of its border, marks the background perhaps.
NEARLY_ALL = 0.95
FINGERPRINT = 32

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pair:
    """An image file and its label files, and the part and the case they belong to; the case of a picture is itself."""

    part: str
    image: Path
    labels: tuple[Path, ...]
    case: str

    @property
    def sliced(self) -> bool:
        """True for a slice or a volume, of which an empty one is nothing special."""
        return not has_suffix(self.image, PICTURE_SUFFIXES)

    def __str__(self) -> str:
        return f"{stem(self.image)} ({self.part})"


@dataclass(frozen=True, eq=False)
class Content:
    """What was found in one pair.

    Args:
        pair: the files.
        errors: one line for each thing that makes the pair useless.
        shape: of the label.
        classes: numbers in the label.
        constant: the image shows nothing.
        inverted: the mask of one class may mark the background, see `looks_inverted`.
        digests: of the pixels; one for each slice that shows something.
        fingerprint: of a picture, see `fingerprint`.
    """

    pair: Pair
    errors: tuple[str, ...] = ()
    shape: tuple[int, ...] = ()
    classes: frozenset[int] = frozenset()
    constant: bool = False
    inverted: bool = False
    digests: tuple[bytes, ...] = ()
    fingerprint: np.ndarray | None = None


@dataclass(frozen=True)
class DataReport:
    """What `check_split` found.

    Args:
        lines: a summary.
        errors: one line each; a training would fail, or learn something wrong.
        warnings: one line each; a training would run.
        near: pairs of pictures that are nearly the same.
        equal: groups of those whose images are the same.
    """

    lines: tuple[str, ...]
    errors: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    near: tuple[tuple[Pair, Pair], ...] = field(default=(), repr=False)
    equal: tuple[tuple[Pair, ...], ...] = field(default=(), repr=False)

    def raise_errors(self) -> None:
        """Does nothing when all is well.

        Raises:
            InputError: that names the first error, and says how many there are.

        Example:
            >>> DataReport((), ("a.png: no such file", "b.png: no such file")).raise_errors()
            Traceback (most recent call last):
            transforms.files.InputError: a.png: no such file; and 1 more error in the data, listed above
        """
        if self.errors:
            more = len(self.errors) - 1
            listed = f"and {more} more error{'s' * (more > 1)} in the data, listed above" if more else ""
            raise InputError(self.errors[0], remedy=listed)


def check_data(split: DataSplit, labels: LabelSet | Sequence[str], mode: str | bool = "quick") -> None:
    """Logs what a data set holds, and refuses one that is not as it must be: the call before a training.

    Args:
        split: the data.
        labels: its classes, or their names.
        mode: "quick" or true opens a few pairs of each part, "full" all of them, "false" none.

    Raises:
        InputError: naming the first error in the data, after the others are logged; or when there is no such mode.

    Example:
        >>> item = {"image": "nowhere.png", "label": "nowhere.png"}
        >>> check_data(DataSplit([item], [], [], ""), ["lesion"])
        Traceback (most recent call last):
        transforms.files.InputError: nowhere.png: no such file
    """
    word = str(mode).lower()
    if word not in MODES:
        raise InputError(f"check_data must be one of {', '.join(MODES)}, not {mode!r}")
    if word == "false":
        return
    report = check_split(split, labels, full=word == "full")
    for line in report.lines:
        logger.info(line)
    for line in report.warnings:
        logger.warning(line)
    # the first is what raise_errors says
    for line in report.errors[1:LOGGED_ERRORS]:
        logger.error(line)
    report.raise_errors()


def check_split(split: DataSplit, labels: LabelSet | Sequence[str], full: bool = False) -> DataReport:
    """What is wrong with the parts of a data set, as far as one can tell without training on it.

    Errors: an empty training part, or one whose masks mark nothing; a file that is missing or cannot be read; image and
    label of different sizes; label numbers without a class; one image in two parts. Warnings: a CT case in two parts;
    masks that mark nothing, images that show nothing, classes that no training image shows, equal images, and pictures
    that are nearly equal.

    Args:
        split: the data.
        labels: its classes, or their names.
        full: open all pairs. Else a few of each part, and of the others see that the files are there; equal files are
            found all the same.

    Example:
        >>> report = check_split(DataSplit([], [], [], ""), ["lesion"])
        >>> report.errors
        ('there is nothing to train on',)
    """
    labels = labels if isinstance(labels, LabelSet) else LabelSet(labels)
    parts = {"training": split.train, "validation": split.validation, "test": split.test}
    if split.validation == split.test:
        del parts["validation"]
    pairs = {part: list(_pairs(part, items)) for part, items in parts.items() if items}
    everything = [pair for some in pairs.values() for pair in some]
    chosen = everything if full else [pair for some in pairs.values() for pair in _spread(some, QUICK_SAMPLE)]

    errors = [] if split.train else ["there is nothing to train on"]
    errors += [
        f"{file}: is in the {' and the '.join(parts)} part" for file, parts in _repeated(everything) if len(parts) > 1
    ]
    if not full:
        opened = {pair.image for pair in chosen}
        errors += [line for pair in everything if pair.image not in opened for line in _missing(pair)]
    contents = list(_read_all(chosen, labels, full))
    errors += [line for content in contents for line in content.errors]
    good = [content for content in contents if not content.errors]

    equal = _equal_pixels(good) if full else _equal_files(everything)
    near = _near(good, equal) if full else []
    warnings = [] if split.test else ["there is nothing to test on"]
    if twice := [stem(file) for file, parts in _repeated(everything) if len(parts) == 1]:
        warnings.append(f"{_some(twice)}: more than once in the same part")
    warnings += [*_shared_cases(everything), *_empty(good, full), *_inverted(good), *_constant(good, full)]
    if full and not errors:
        warnings += _absent(good, labels)
    if not errors and _marks_nothing(pairs["training"], good, labels):
        errors.append("no training mask marks anything: there is nothing to learn")
    warnings += _listed("the same image more than once", [" = ".join(map(str, group)) for group in equal], equal)
    warnings += _listed("nearly the same image twice", [f"{one} ≈ {two}" for one, two in near], near)
    lines = [
        f"data checked, {'everything' if full else 'a sample'} opened: "
        + ", ".join(f"{part} {_count(some, contents, part)}" for part, some in pairs.items()),
        *_classes(good, labels, pairs),
        _sizes([content.shape for content in good]),
        f"empty masks: {sum(not content.classes - {0} for content in good)}, full or inverted ones:"
        f" {sum(content.inverted for content in good)}",
        f"images that show nothing: {sum(content.constant for content in good)}",
        f"groups of equal images: {len(equal)}, in different parts: {sum(map(_across, equal))}",
    ]
    if full:
        lines.append(f"pairs of nearly equal images: {len(near)}, in different parts: {sum(map(_across, near))}")
    lines.append(f"errors: {len(errors)}, warnings: {len(warnings)}")
    return DataReport(tuple(lines), tuple(errors), tuple(warnings), tuple(near), tuple(map(tuple, equal)))


def fingerprint(picture: np.ndarray) -> np.ndarray:
    """(1023,) of length 1: scalar products of two say how alike the pictures are, whatever their sizes and contrast.

    They are the low frequencies of a thumbnail. Pictures of one kind share their lowest ones (dark below, a spot in the
    middle), so each counts in proportion to its frequency. A perceptual hash of 64 bits keeps too little for that.

    Args:
        picture: (H, W) or (H, W, 3) uint8.

    Example:
        >>> picture = np.random.default_rng(0).integers(0, 256, (90, 120), np.uint8)
        >>> darker, other = picture // 2, picture[::-1]
        >>> bool(fingerprint(picture) @ fingerprint(darker) > NEAR > fingerprint(picture) @ fingerprint(other))
        True
    """
    side = 2 * FINGERPRINT
    thumbnail = Image.fromarray(picture).convert("L").resize((side, side), Image.Resampling.BOX)
    frequencies = dctn(np.asarray(thumbnail, np.float32), norm="ortho")[:FINGERPRINT, :FINGERPRINT]
    weighted = (frequencies * np.hypot(*np.indices(frequencies.shape))).ravel()[1:]
    return (weighted / max(np.linalg.norm(weighted), 1e-9)).astype(np.float32)


def _pairs(part: str, items: Iterable[Mapping[str, Any]]) -> Iterator[Pair]:
    for item in items:
        if isinstance(item["image"], str | os.PathLike):
            image = Path(item["image"])
            yield Pair(part, image, tuple(map(Path, ensure_tuple(item["label"]))), _case(image))
        else:
            # the slices of one case
            for image, label in zip(map(Path, item["image"]), map(Path, item["label"]), strict=True):
                yield Pair(part, image, (label,), _case(image))


def _case(image: Path) -> str:
    """A slice's is what stands before the first `_`: case0005_slice000."""
    return stem(image) if has_suffix(image, PICTURE_SUFFIXES) else stem(image).split("_")[0]


def _spread(items: Sequence[Pair], count: int) -> list[Pair]:
    """At most `count` of the items, the first and the last among them."""
    return [items[index] for index in sorted(set(np.linspace(0, len(items) - 1, count).astype(int)))] if items else []


def _missing(pair: Pair) -> list[str]:
    files = dict.fromkeys((pair.image, *pair.labels))
    return [f"{file}: no such file, or an empty one" for file in files if not file.is_file() or not file.stat().st_size]


def _read_all(pairs: Sequence[Pair], labels: LabelSet, bar: bool) -> Iterator[Content]:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(available) as pool:
        results = pool.map(lambda pair: _read(pair, labels), pairs)
        yield from tqdm(results, "checking", len(pairs), disable=None if bar else True, dynamic_ncols=True)


def _read(pair: Pair, labels: LabelSet) -> Content:
    arrays: list[np.ndarray] = []
    errors: list[str] = []
    orientation = 1
    # Of slices and volumes the label is in the same file.
    for kind, file in (("image", pair.image), *(("label", file) for file in pair.labels)):
        try:
            if kind == "label":
                arrays.append(_label(file, labels))
            elif has_suffix(file, PICTURE_SUFFIXES):
                array, facts = PictureReader().get_data([file])
                arrays.append(array)
                orientation = facts[EXIF_ORIENTATION]
            else:
                arrays.append(_image(file))
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split())
            errors.append(line if str(file) in line else f"{file}: {line}")
    if errors:
        # of one file with image and label, one error says enough
        return Content(pair, tuple(errors[:1] if pair.image in pair.labels else dict.fromkeys(errors)))
    image, *masks = arrays
    for file, mask in zip(pair.labels, masks, strict=True):
        if not pair.sliced:
            try:
                check_sizes(pair.image, image.shape[:2], orientation, file, mask.shape)
            except InputError as error:
                return Content(pair, (str(error),))
        if image.shape[: mask.ndim] != mask.shape:
            there = f"{_times(image.shape[: mask.ndim])} of its image {pair.image.name}"
            return Content(pair, (f"{file}: {_times(mask.shape)} pixels, not the {there}",))
    label = np.maximum.reduce(masks)
    classes = frozenset(np.unique(label).tolist())
    if max(classes) > len(labels.classes):
        return Content(pair, (f"{pair.labels[0]}: holds {max(classes)}, the classes are 1 … {len(labels.classes)}",))
    planes = image if label.ndim == 3 else [image]
    shown = [plane for plane in planes if not _is_flat(plane)]
    marks = fingerprint(image) if shown and not pair.sliced else None
    inverted = not pair.sliced and labels.binary and looks_inverted(label)
    return Content(pair, (), label.shape, classes, not shown, inverted, tuple(map(_digest, shown)), marks)


def looks_inverted(mask: np.ndarray) -> bool:
    """True where a mask of one class marks nearly everything, or all of the border: its values are exchanged perhaps.

    Args:
        mask: (H, W), 0 is the background.

    Example:
        >>> mask = np.zeros((9, 9))
        >>> mask[3:6, 3:6] = 1
        >>> looks_inverted(mask), looks_inverted(1 - mask)
        (False, True)
    """
    marked = mask > 0
    edges = (marked[0], marked[-1], marked[:, 0], marked[:, -1])
    return bool(marked.mean() > NEARLY_ALL or all(edge.all() for edge in edges))


def _is_flat(image: np.ndarray) -> bool:
    """True if the values of each channel are nearly equal."""
    step = max(1, min(image.shape[:2]) // 256)
    full_range = np.iinfo(image.dtype).max if image.dtype.kind == "u" else 1
    return float(np.max(image[::step, ::step].std(axis=(0, 1)))) < CONSTANT * full_range


def _digest(image: np.ndarray) -> bytes:
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(image).data)
    return digest.digest()


def _image(path: Path) -> np.ndarray:
    """Of a slice or a volume."""
    if has_suffix(path, [".npz"]):
        return SliceReader("image").get_data((path,))[0].astype(np.float32, copy=False)
    volume = read_volume(path)
    if volume.window_hu is not None and not np.allclose(volume.window_hu, WINDOW_HU):
        fact = f"windowed to {volume.window_hu} HU, the networks are trained with {WINDOW_HU}"
        raise InputError(fact, path=path, remedy="prepare it again from its NIfTI")
    return volume.array.astype(np.float32, copy=False)


def _label(path: Path, labels: LabelSet) -> np.ndarray:
    if has_suffix(path, PICTURE_SUFFIXES):
        return read_mask(path, labels.label_map, len(labels.classes))
    return SliceReader("label").get_data((path,))[0] if has_suffix(path, [".npz"]) else read_volume(path, "label").array


def _sizes(shapes: Iterable[tuple[int, ...]]) -> str:
    different = sorted(set(shapes), key=np.prod)
    if len(different) < 2:
        return f"size {_times(different[0])}" if different else "no sizes"
    return f"sizes from {_times(different[0])} to {_times(different[-1])}"


def _across(pairs: Iterable[Pair]) -> bool:
    return len({pair.part for pair in pairs}) > 1


def _repeated(pairs: Sequence[Pair]) -> Iterator[tuple[Path, list[str]]]:
    """Image files that are there more than once, each with the parts that it is in."""
    parts = defaultdict(list)
    for pair in pairs:
        parts[pair.image].append(pair.part)
    yield from ((file, list(dict.fromkeys(where))) for file, where in parts.items() if len(where) > 1)


def _shared_cases(pairs: Sequence[Pair]) -> Iterator[str]:
    parts = defaultdict(set)
    for pair in pairs:
        if pair.sliced:
            parts[pair.case].add(pair.part)
    if both := [f"{case} ({', '.join(sorted(where))})" for case, where in parts.items() if len(where) > 1]:
        yield f"{_some(both)}: the same case in two parts, results on it mean nothing"


def _equal_pixels(contents: Sequence[Content]) -> list[list[Pair]]:
    """Groups of pairs with the same image; slices of one case are alike and do not count."""
    holders: dict[bytes, dict[Pair, None]] = defaultdict(dict)
    for content in contents:
        for digest in content.digests:
            holders[digest][content.pair] = None
    return _groups(holders.values())


def _equal_files(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Groups of pictures whose files are the same byte for byte; only files of a length that few have are read."""
    by_size: dict[int, dict[Pair, None]] = defaultdict(dict)
    for pair in pairs:
        if not pair.sliced and pair.image.is_file():
            by_size[pair.image.stat().st_size][pair] = None
    holders: dict[bytes, dict[Pair, None]] = defaultdict(dict)
    for same in by_size.values():
        for pair in same if 1 < len(same) <= SAME_LENGTH else ():
            holders[hashlib.blake2b(pair.image.read_bytes()).digest()][pair] = None
    return _groups(holders.values())


def _groups(holders: Iterable[Iterable[Pair]]) -> list[list[Pair]]:
    """Those of several images. Many slices that two cases share are one finding."""
    found: dict[tuple[tuple[str, str], ...], list[Pair]] = {}
    for pairs in map(list, holders):
        key = tuple(dict.fromkeys((pair.part, pair.case) for pair in pairs))
        if len(key) > 1:
            found.setdefault(key, pairs)
    return list(found.values())


def _near(contents: Sequence[Content], equal: Sequence[Sequence[Pair]]) -> list[tuple[Pair, Pair]]:
    """Pairs of pictures that are nearly, but not quite the same; the most alike first."""
    known = {frozenset(two) for group in equal for two in combinations(group, 2)}
    pictures = [content for content in contents if content.fingerprint is not None]
    if len(pictures) < 2:
        return []
    prints = np.stack([np.asarray(content.fingerprint) for content in pictures])
    found = []
    for start in range(0, len(prints), 512):
        alike = np.triu(prints[start : start + 512] @ prints.T, k=start + 1)
        for row, column in np.argwhere(alike > NEAR):
            two = pictures[start + row].pair, pictures[column].pair
            if frozenset(two) not in known:
                found.append((-alike[row, column], two))
    return [two for _, two in sorted(found, key=lambda entry: entry[0])]


def _lacking(contents: Sequence[Content], full: bool, has: Callable[[Content], bool]) -> list[str]:
    """The pictures and CT cases of which nothing `has` it. One slice says nothing of the others of its case."""
    found: dict[tuple[str, str], bool] = defaultdict(bool)
    for content in contents:
        if full or not has_suffix(content.pair.image, [".npz"]):
            found[content.pair.case, content.pair.part] |= has(content)
    return [f"{case} ({part})" for (case, part), one_has in found.items() if not one_has]


def _empty(contents: Sequence[Content], full: bool) -> Iterator[str]:
    names = _lacking(contents, full, lambda content: bool(content.classes - {0}))
    # BUSI's images of normal tissue are named so.
    if names := [name for name in names if not is_normal(name)]:
        yield f"{_some(names)}: the mask marks nothing"


def _inverted(contents: Sequence[Content]) -> Iterator[str]:
    if names := [str(content.pair) for content in contents if content.inverted]:
        yield f"{_some(names)}: the mask marks nearly everything or all of the border, it may be inverted"


def _constant(contents: Sequence[Content], full: bool) -> Iterator[str]:
    if names := _lacking(contents, full, lambda content: not content.constant):
        yield f"{_some(names)}: the image shows nothing, all its values are nearly equal"


def _marks_nothing(pairs: Sequence[Pair], contents: Sequence[Content], labels: LabelSet) -> bool:
    """True where all masks of the training part are background; those that were not opened are, until one is not."""
    known = {content.pair: content.classes for content in contents if content.pair.part == "training"}
    if any(classes - {0} for classes in known.values()):
        return False
    return not any(_label(file, labels).any() for pair in pairs if pair not in known for file in pair.labels)


def _absent(contents: Sequence[Content], labels: LabelSet) -> Iterator[str]:
    present = frozenset().union(*(content.classes for content in contents if content.pair.part == "training"))
    if names := [name for number, name in enumerate(labels.classes, start=1) if number not in present]:
        yield f"no training image shows {', '.join(names)}"


def _classes(contents: Sequence[Content], labels: LabelSet, parts: Iterable[str]) -> Iterator[str]:
    """One line a part: how many of the opened images show each class."""
    for part in parts:
        mine = [content.classes for content in contents if content.pair.part == part]
        counts = Counter(number for classes in mine for number in classes)
        shown = ", ".join(f"{name} in {counts[number]}" for number, name in enumerate(labels.classes, start=1))
        yield f"{part}: {shown} of {len(mine)} opened"


def _count(pairs: Sequence[Pair], contents: Sequence[Content], part: str) -> str:
    opened = sum(content.pair.part == part for content in contents)
    return f"{opened} of {len(pairs)}"


def _times(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def _some(names: Sequence[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (f" … ({len(names)})" if len(names) > count else "")


def _listed(what: str, names: Sequence[str], groups: Sequence[Sequence[Pair]]) -> Iterator[str]:
    """One line for what is in different parts, one for the rest."""
    for across in (True, False):
        mine = [name for name, group in zip(names, groups, strict=True) if _across(group) == across]
        if mine:
            yield f"{what}, {'in two parts' if across else 'in one part'}: {_some(mine)}"
