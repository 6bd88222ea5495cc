"""Folds for cross-validation of a folder of images and masks that comes without a split.

images/ and masks/          copies, as they are
folds_train1.txt, folds_val1.txt, …2 …      names without suffix; every image is in one val list
dataset.json                counts, and which images were kept together
"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from monai.utils import ensure_tuple

from prepare.output import Report, staged, write_facts
from transforms import (
    DataSplit,
    InputError,
    LabelSet,
    check_split,
    image_pairs,
    merged_masks,
    passed_over,
    printable,
    same_letters,
    stem,
)


def kind_of(name: str) -> str:
    """The kind of an image by its name: the letters that it begins with.

    Example:
        >>> kind_of("benign (4)"), kind_of("ISIC_0000012"), kind_of("0017")
        ('benign', 'ISIC', '')
    """
    found = re.match(r"[^\W\d_]*", name)
    return found[0] if found else ""


def stratified_folds(
    groups: Sequence[Sequence[str]], kinds: Mapping[str, str], sizes: Mapping[str, float], folds: int, seed: int
) -> list[list[str]]:
    """Names in `folds` parts that are alike in kinds and sizes; a group is never divided.

    The groups of a kind, in the order of their sizes, are dealt out to the folds, each `folds` of them in an order that
    is drawn anew. So every fold gets as many small and large ones.

    Args:
        groups: names that must stay together; a group counts for the kind and size of its first name.
        kinds: of each name.
        sizes: of each name.
        folds: how many.
        seed: of the draw.

    Example:
        >>> sizes = {f"{kind}{size}": float(size) for kind in "ab" for size in range(6)}
        >>> folds = stratified_folds([[name] for name in sizes], {name: name[0] for name in sizes}, sizes, 3, seed=41)
        >>> [sorted(name[0] for name in fold) for fold in folds]
        [['a', 'a', 'b', 'b'], ['a', 'a', 'b', 'b'], ['a', 'a', 'b', 'b']]
        >>> [sum(sizes[name] < 3 for name in fold) for fold in folds]
        [2, 2, 2]
    """
    rng = np.random.default_rng(seed)
    parts: list[list[str]] = [[] for _ in range(folds)]
    for kind in sorted({kinds[group[0]] for group in groups}):
        mine = sorted(
            (group for group in groups if kinds[group[0]] == kind), key=lambda group: (sizes[group[0]], group)
        )
        for start in range(0, len(mine), folds):
            block = mine[start : start + folds]
            order = rng.permutation(folds).tolist()
            if len(block) < folds or max(map(len, block)) > 1:
                # the emptier folds get what does not come out even
                order.sort(key=lambda fold: len(parts[fold]))
                block = sorted(block, key=len, reverse=True)
            for fold, group in zip(order, block, strict=False):
                parts[fold] += group
    return parts


def prepare_folds(
    raw: Path,
    out: Path,
    *,
    folds: int = 3,
    seed: int = 41,
    label_map: Mapping[int, int] | None = None,
    allow_unpaired: bool = False,
    overwrite: bool = False,
    report: Report | None = None,
) -> None:
    """Copies a folder of images and masks and divides it into folds, in the layout that this module's head describes.

    Folds are alike in the images' kinds (the letters that names begin with) and in the share of the image that is
    marked. Images that are equal, or nearly so, stay in one fold: two pictures of one lesion on both sides would be a
    leak.

    Args:
        raw: holds images/ and masks/ (or masks/0/).
        out: the folder to make.
        folds: how many.
        seed: of the draw.
        label_map: {stored number: class} of masks of several classes.
        allow_unpaired: leave out images without a mask and masks without an image, and say how many.
        overwrite: replace an `out` that was prepared before.
        report: prints what was done.

    Raises:
        InputError: when input or output folder are not as they must be; then nothing is written.

    Example:
        >>> prepare_folds(Path("nowhere"), Path("out"))
        Traceback (most recent call last):
        transforms.files.InputError: nowhere/masks: is missing: masks lie there, named as the pictures in nowhere/images
    """
    report = report or Report()
    if folds < 2:
        raise InputError(f"--folds {folds}: at least two folds are needed")
    passed: Counter[str] = Counter()
    items = {stem(item["image"]): item for item in image_pairs(raw, allow_unpaired, passed)}
    if odd := [name for name in items if name != name.strip() or not name.isprintable()]:
        raise InputError("a list of names cannot hold this name", path=items[odd[0]]["image"], remedy="rename it")
    if len(items) < 2 * folds:
        raise InputError(f"{len(items)} images are too few for {folds} folds", path=raw)
    top = max(label_map.values(), default=1) if label_map else 1
    labels = LabelSet([f"class {number}" for number in range(1, top + 1)], label_map)
    found = check_split(DataSplit(list(items.values()), [], [], ""), labels, full=True)
    found.raise_errors()

    def marked(name: str) -> float:
        masks = merged_masks(ensure_tuple(items[name]["label"]), labels.label_map, len(labels.classes))
        return float(np.mean(masks > 0))

    sizes = dict(zip(items, report.map(marked, list(items), "measuring"), strict=True))
    kinds = {name: kind_of(same_letters(name)) for name in items}
    if rare := sorted(kind for kind, count in Counter(kinds.values()).items() if count < folds):
        report(
            f"{len(rare)} kinds of names have fewer than {folds} images, such as {rare[0]!r}: kinds are not told apart"
        )
        kinds = dict.fromkeys(items, "images")
    alike = [[stem(pair.image) for pair in group] for group in (*found.equal, *found.near)]
    groups = _together(list(items), alike)
    parts = stratified_folds(groups, kinds, sizes, folds, seed)
    if empty := [number for number, part in enumerate(parts, 1) if not part]:
        raise InputError(f"nearly all images are alike: nothing is left for fold {empty[0]}", path=raw)

    with staged(out, overwrite) as folder:
        for item in items.values():
            for file in map(Path, (item["image"], *ensure_tuple(item["label"]))):
                target = folder / file.relative_to(raw)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, target)
        counts = {}
        for number, held_out in enumerate(map(set, parts), 1):
            lists = {
                "train": [name for name in items if name not in held_out],
                "val": [n for n in items if n in held_out],
            }
            for part, names in lists.items():
                (folder / f"folds_{part}{number}.txt").write_text("".join(f"{n}\n" for n in names), encoding="utf-8")
            counts[str(number)] = {part: len(names) for part, names in lists.items()}
        facts = {
            "dataset": "folds",
            "images": dict(Counter(kinds.values())),
            "splits": {"folds": folds, "seed": seed},
            "together": [group for group in groups if len(group) > 1],
            "counts": counts,
        }
        write_facts(folder, facts, report)

    if words := passed_over(passed):
        report(f"{printable(str(raw))}: {words}")
    columns = sorted(set(kinds.values()))
    rows = []
    for number, fold in enumerate(parts, 1):
        count = Counter(kinds[name] for name in fold)
        share = np.median([sizes[name] for name in fold])
        rows.append((str(number), str(len(fold)), *(str(count[kind]) for kind in columns), f"{100 * share:.1f} %"))
    report.table(("fold", "images", *(kind or "no letters" for kind in columns), "median of the marked share"), rows)
    several = [group for group in groups if len(group) > 1]
    alike_ones = f"{len(several)} groups of {sum(map(len, several))} equal or nearly equal ones"
    report(f"{len(items)} images; {alike_ones} stay together")


def _together(names: Sequence[str], alike: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names in groups, each in the given order: names that `alike` links, also over others, are in one.

    Example:
        >>> _together(["a", "b", "c", "d"], [["d", "b"], ["b", "a"]])
        [['a', 'b', 'd'], ['c']]
    """
    group_of = {name: [name] for name in names}
    for linked in alike:
        merged = {name for one in linked for name in group_of[one]}
        together = [name for name in names if name in merged]
        group_of |= dict.fromkeys(together, together)
    return list({id(group): group for group in group_of.values()}.values())
