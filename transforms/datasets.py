"""From a prepared folder to what a bundle trains, validates and tests on, and to its classes.

Bundle configurations call these functions. What a user can get wrong is an `InputError`: one line that names the folder
and the remedy. What was passed over in a folder is counted and logged in one line.
"""

from __future__ import annotations

import filecmp
import glob
import json
import logging
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from transforms.dicom import dicom_items
from transforms.files import (
    DICOM_SUFFIXES,
    PICTURE_SUFFIXES,
    InputError,
    PathLike,
    list_files,
    pair_masks,
    passed_over,
    printable,
    read_list,
    same_letters,
    shortened,
    stem,
    without_by_products,
)

SYNAPSE_CLASSES = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
# Ids in BTCV's raw label files, in the order of SYNAPSE_CLASSES; the other ids become background.
BTCV_IDS = (8, 4, 3, 2, 6, 11, 1, 7)

SYNAPSE_LISTS = Path("lists/lists_Synapse")
SELECTIONS = ("holdout", "paper")

# What lies in the former is what the latter's pictures show.
LABEL_FOLDERS = ("mask", "masks", "label", "labels", "labelstr", "annotations", "gt", "groundtruth")
IMAGE_FOLDERS = ("image", "images", "img", "imgs", "imagestr", "imagests")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSplit:
    """What a network is trained, selected and tested on.

    Args:
        train: items {"image": file, "label": file}, as `image_split` and `synapse_split` say.
        validation: items that choose the model; none where it is chosen without.
        test: items of the reported results.
        rule: how the model is chosen, in words for logs and reports.
        note: what prepared data say of themselves, that they are phantoms for instance.

    Example:
        >>> item = {"image": "images/a.png", "label": "masks/a.png"}
        >>> len(DataSplit(train=[item], validation=[], test=[item], rule="lowest training loss").train)
        1
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    rule: str
    note: str = ""

    def summary(self) -> str:
        """What a training's log says of it.

        Example:
            >>> DataSplit([{"image": "a.png", "label": "a.png"}], [], [], "lowest training loss").summary()
            '1 images to train on, model selected by lowest training loss'
        """
        return f"{len(self.train)} images to train on, model selected by {self.rule}"


@dataclass(frozen=True)
class LabelSet:
    """The classes of a data set, and what follows from them for network, loss and mask files.

    Args:
        classes: names of the classes 1 … C; class 0 is the background.
        label_map: {number in the mask files: class}. None where one class is drawn bright on dark, and where mask
            files hold the numbers of several classes as they are.

    Raises:
        InputError: when there is no name or the same name twice, or when `label_map` maps something else than whole
            numbers to 0 … C, lists no number for a class, or would give the background the number of a class.

    Example:
        >>> LabelSet(["lesion"]).out_channels
        1
        >>> eye = LabelSet(["cup", "disc"], {0: 0, 128: 1, 255: 2})
        >>> eye.out_channels, eye.mask_mode
        (3, 'nearest')
    """

    classes: Sequence[str]
    label_map: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        classes = ensure_tuple(self.classes)
        if not classes or len(set(classes)) < len(classes) or not all(isinstance(name, str) for name in classes):
            raise InputError(f"classes must be one or more different names, not {list(classes)}")
        label_map = self.label_map
        if label_map is None and len(classes) > 1:
            label_map = {index: index for index in range(len(classes) + 1)}
        if label_map is not None:
            _check_label_map(label_map, classes)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "label_map", label_map)

    @property
    def binary(self) -> bool:
        """True for one class: one channel, sigmoid."""
        return len(self.classes) == 1

    @property
    def multiclass(self) -> bool:
        """True for several classes: a channel each and one for the background, softmax."""
        return not self.binary

    @property
    def out_channels(self) -> int:
        """Channels of the network's output."""
        return 1 if self.binary else len(self.classes) + 1

    @property
    def mask_mode(self) -> str:
        """Interpolation when a mask is resized: the published one for one class, one that keeps numbers for several."""
        return "bilinear" if self.binary else "nearest"


def _check_label_map(label_map: Any, classes: Sequence[str]) -> None:
    numbers = [*label_map, *label_map.values()] if isinstance(label_map, Mapping) else []
    if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
        fact = f"--label_map must be {{stored number: class}} in whole numbers, not {label_map!r}"
        quoted = any(isinstance(number, str) and number.strip("+-").isdecimal() for number in numbers)
        raise InputError(fact, remedy="write the numbers without quotes" if quoted else "")
    if nameless := sorted(set(label_map.values()) - set(range(len(classes) + 1))):
        raise InputError(f"--label_map gives class {nameless[0]}, but classes names 1 … {len(classes)}")
    if not 0 <= min(label_map) <= max(label_map) <= 65535:
        raise InputError(
            f"--label_map lists numbers from {min(label_map)} to {max(label_map)}, pictures hold 0 … 65535"
        )
    if missing := sorted(set(range(1, len(classes) + 1)) - set(label_map.values())):
        raise InputError(f"--label_map lists no number for class {missing[0]}, {classes[missing[0] - 1]}")
    if label_map.get(0, 0) > 0 and 0 not in label_map.values():
        fact = f"--label_map makes 0 class {label_map[0]} and lists no number for the background, which is class 0"
        raise InputError(fact, remedy="list one, used or not")


def synapse_split(
    dataset_dir: str | Path,
    val_cases: int | Sequence[str] = 3,
    selection: str = "holdout",
    seed: int = 42,
    metric: str = "Dice",
    allow_overlap: bool = False,
) -> DataSplit:
    """The parts of a folder that `python -m prepare synapse` (or the published release) has laid out.

    A training item is one slice, {"image": npz file, "label": the same file}. A validation item is one case,
    {"image": npz files in slice order, "label": the same files}. A test item is one volume, {"image": h5 file,
    "label": the same file}.

    Args:
        dataset_dir: holds `train_npz`, `test_vol_h5` and `lists/lists_Synapse`.
        val_cases: how many training cases are held out to choose the model (drawn with `seed`), or which.
        selection: "holdout" holds them out; "paper" holds nothing out and has no validation cases.
        seed: of the draw.
        metric: chooses the model; named in the rule.
        allow_overlap: take cases that are trained and tested on, to try things out; the log warns.

    Raises:
        InputError: when files are missing or the cases cannot be held out.

    Example:
        >>> synapse_split("nowhere")
        Traceback (most recent call last):
        transforms.files.InputError: nowhere: holds no prepared Synapse data ...
    """
    root = Path(str(dataset_dir))
    _check_selection(selection)
    slices = _read_list(root, "train.txt")
    volumes = _read_list(root, "test_vol.txt")
    if both := sorted({name.split("_")[0] for name in slices} & {stem(name) for name in volumes}):
        fact = f"{', '.join(both[:3])} {'are' if len(both) > 1 else 'is'} in train.txt and in test_vol.txt"
        if not allow_overlap:
            raise InputError(fact, path=root / SYNAPSE_LISTS, remedy="leave each in one, or --allow_overlap true")
        logger.warning(f"{fact}: test results say nothing about new patients")

    slice_files = _listed(root, "train.txt", slices, "train_npz/{}.npz")
    volume_files = _listed(root, "test_vol.txt", volumes, "test_vol_h5/{}.npy.h5")

    cases: dict[str, list[str]] = {}
    for name in slices:
        cases.setdefault(name.split("_")[0], []).append(name)
    held_out = _held_out(sorted(cases), val_cases, seed, root) if selection == "holdout" else []

    def npz(names: Sequence[str]) -> list[str]:
        return [_as_text(slice_files[name]) for name in names]

    training = [file for case, names in cases.items() if case not in held_out for file in npz(names)]
    validation = [npz(sorted(cases[case])) for case in held_out]
    return DataSplit(
        train=[{"image": file, "label": file} for file in training],
        validation=[{"image": files, "label": files} for files in validation],
        test=[{"image": _as_text(file), "label": _as_text(file)} for file in volume_files.values()],
        rule=f"{metric} on held-out training cases" if held_out else "lowest training loss, as published",
        note=_note(root),
    )


def image_split(
    dataset_dir: str | Path,
    fold: int = 1,
    val_fraction: float = 0.1,
    selection: str = "holdout",
    seed: int = 42,
    metric: str = "IoU",
    allow_unpaired: bool = False,
) -> DataSplit:
    """The parts of a folder of images and masks; each item is {"image": file, "label": mask file}.

    Three layouts are understood: `train|val/images|masks` (dermoscopy); `images` and `masks/0` with the lists
    `*_train1.txt`, `*_val1.txt` (breast ultrasound); and any folder with `images` and `masks`, which is split 7:3 with
    `seed`. Images and masks are paired by name (`pair_masks`), so that a mask's may end in `_mask` or the like. Where
    an image has several masks (`a_mask.png`, `a_mask_1.png`), "label" is the list of them.

    Args:
        dataset_dir: the folder.
        fold: number of the lists.
        val_fraction: share of the training part that is held out to choose the model.
        selection: "holdout" holds it out; "paper" holds nothing out and chooses on the test part, as published.
        seed: of all draws.
        metric: chooses the model; named in the rule.
        allow_unpaired: leave out images without a mask and masks without an image.

    Raises:
        InputError: when the folder has none of these layouts, a file has no partner, a part is empty, or an image is in
            two parts.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("images/1.jpg", "masks/1_mask.png", "images/2.jpg", "masks/2_mask.png"):
        ...         (Path(folder) / name).parent.mkdir(exist_ok=True)
        ...         (Path(folder) / name).touch()
        ...     split = image_split(folder, selection="paper")
        >>> len(split.train), len(split.test), split.rule
        (1, 1, 'IoU on the reported test images, as published')
    """
    root = Path(str(dataset_dir))
    _check_selection(selection)
    passed: Counter[str] = Counter()
    if (root / "train/images").is_dir():
        training, test = (image_pairs(root / part, allow_unpaired, passed) for part in ("train", "val"))
        _check_apart(training, test)
    elif (root / "images").is_dir():
        pairs = image_pairs(root, allow_unpaired, passed)
        if lists := _fold_lists(root):
            training, test = _by_lists(pairs, lists, str(fold), root, allow_unpaired, passed)
        else:
            if others := sorted(file.name for file in root.glob("*.txt")):
                logger.warning(
                    f"{printable(', '.join(others))}: no lists of a split, which are called NAME_train1.txt and"
                    " NAME_val1.txt; 30 % of the images are drawn to test on"
                )
            test, training = _draw(pairs, 0.3, seed, root)
    else:
        raise InputError(
            "holds no images to train on (expected images/ and masks/, or train/ and val/ with both)",
            path=root,
            remedy=f"run `python -m prepare busi --raw DIR --out {root}`, `python -m prepare isic --raw DIR --out"
            f" {root}`, or `python -m prepare demo --out data/demo` and add `--dataset_dir data/demo/busi` (or isic17)",
        )
    if words := passed_over(passed):
        logger.info(f"{printable(str(root))}: {words}")
    if selection == "paper":
        return DataSplit(training, test, test, f"{metric} on the reported test images, as published", _note(root))
    validation, training = _draw(training, val_fraction, seed, root)
    return DataSplit(training, validation, test, f"{metric} on held-out training images", _note(root))


def find_files(
    path: PathLike | Sequence[PathLike],
    suffixes: Sequence[str],
    *,
    dicom: str | None = None,
    recursive: bool = False,
    leave_out: PathLike | None = None,
) -> list[dict[str, Any]]:
    """[{"image": file}] for a file, a pattern, the files in a folder that end in one of `suffixes`, or a list of those.

    Masks, probabilities and the like beside their image are no input: `a_mask.png` is passed over where `a.jpg` is.
    "name" is there where results are to be called otherwise than the file: those of sub-folders lie in such, too.

    Args:
        path: what is given.
        suffixes: of files that are taken.
        dicom: "series" takes DICOM too, and the "image" of a series is the list of its files; "frames" takes each frame
            of DICOM pictures, see `dicom_items`. None passes DICOM over.
        recursive: look into sub-folders; of `images` beside `masks` or `labels` only into the former.
        leave_out: a folder that is not looked into, where results lie.

    Raises:
        InputError: when there is none, or when results of two would have the same name.

    Example:
        >>> find_files("nowhere", PICTURE_SUFFIXES)
        Traceback (most recent call last):
        transforms.files.InputError: nowhere: does not exist; give a file or a folder of them as --input
    """
    given = [Path(str(one)) for one in ([path] if isinstance(path, (str, Path)) else ensure_tuple(path))]
    # a pattern that was quoted comes as it is
    given = [found for one in given for found in (_matching(one) if not one.exists() else [one])]
    passed: Counter[str] = Counter()
    roots: dict[Path, Path] = {}
    scans: dict[Path, Path] = {}
    for one in given:
        if not one.exists():
            raise InputError("does not exist", path=one, remedy="give a file or a folder of them as --input")
        root = one if one.is_dir() else one.parent
        others: list[Path] = []
        found = _apart(list_files(one, suffixes, recursive, passed, others if dicom else None), one, leave_out, passed)
        roots |= {file: root for file in found if file not in roots}
        scans |= {file: root for file in _apart(others, one, leave_out, passed) if file not in scans}
    files = list(roots)
    if len(given) > 1 or any(one.is_dir() for one in given):
        files = without_by_products(files, passed)
    items: list[dict[str, Any]] = []
    for file in files:
        folder = file.parent.relative_to(roots[file]).as_posix()
        items.append({"image": _as_text(file)} | ({"name": f"{folder}/{stem(file)}"} if folder != "." else {}))
    for root in dict.fromkeys(scans.values()):
        items += dicom_items([file for file in scans if scans[file] == root], root, dicom == "frames", passed)
    words = passed_over(passed)
    if not items:
        known = ", ".join((*suffixes, *DICOM_SUFFIXES) if dicom else suffixes)
        fact = f"is or holds no {known} file" + f" ({words})" * bool(words and one.is_dir())
        raise InputError(fact, path=given[0] if given else None)
    if words:
        logger.info(f"{printable(str(given[0]))}{' …' * (len(given) > 1)}: {words}")
    taken: dict[str, str] = {}
    for item in items:
        image = item["image"] if isinstance(item["image"], str) else item["image"][0]
        other = taken.setdefault(same_letters(item.get("name") or stem(image)), image)
        if other is not image:
            remedy = "rename or remove one of them, or their results would overwrite each other"
            raise InputError(f"has the same name as {printable(image)}", path=other, remedy=remedy)
    return items


def _apart(files: Sequence[Path], given: Path, leave_out: PathLike | None, passed: Counter[str]) -> list[Path]:
    """The files without those in the folder to leave out, and in folders of labels beside one of images."""
    kept = []
    out = None if leave_out is None else Path(str(leave_out)).absolute()
    for file in files:
        folders = [] if file == given else [one for one in file.parents if one != given and one.is_relative_to(given)]
        labels = next((one for one in folders if one.name.lower() in LABEL_FOLDERS and _beside_images(one)), None)
        if out is not None and folders and file.absolute().is_relative_to(out):
            passed["result"] += 1
        elif labels is not None:
            passed[f"in {labels.name}"] += 1
        else:
            kept.append(file)
    return kept


def _beside_images(folder: Path) -> bool:
    return any(one.is_dir() and one.name.lower() in IMAGE_FOLDERS for one in folder.parent.iterdir())


def _matching(pattern: Path) -> list[Path]:
    """The files that a pattern such as `folder/*.png` stands for; the path itself where it is none."""
    return [Path(name) for name in sorted(glob.glob(str(pattern)))] or [pattern]


def is_normal(path: PathLike) -> bool:
    """True where the image's name says that it shows nothing to mark, as BUSI's `normal (1).png` does.

    Example:
        >>> is_normal("images/normal (1).png"), is_normal("images/benign (1).png")
        (True, False)
    """
    return stem(path).lower().startswith("normal")


def _as_text(file: Path) -> str:
    """The path, so that MONAI takes a leading ~ for what it is: a letter of the name."""
    text = str(file)
    return str(file.absolute()) if text.startswith("~") else text


def _read_list(root: Path, name: str) -> list[str]:
    file = root / SYNAPSE_LISTS / name
    if not file.is_file():
        raise InputError(
            f"holds no prepared Synapse data ({SYNAPSE_LISTS / name} is missing)",
            path=root,
            remedy=f"run `python -m prepare synapse --raw DIR --out {root}`, or `python -m prepare demo --out"
            " data/demo` and add `--dataset_dir data/demo/synapse`",
        )
    return _some(read_list(file), file)


def _listed(root: Path, name: str, names: Sequence[str], place: str) -> dict[str, Path]:
    """The names of a list, each with its file.

    Args:
        root: the data set.
        name: of the list.
        names: what it holds.
        place: where its files are, `{}` for a name.

    Raises:
        InputError: when one is missing.
    """
    files = {listed: root / place.format(listed) for listed in names}
    for listed, file in files.items():
        if not _exists(file):
            several = len(re.split(r"[\s,;]+", listed)) > 1
            again = "run `python -m prepare synapse` again with --overwrite"
            raise InputError(
                f"names {shortened(listed)}, but {place.format(shortened(listed))} is missing",
                path=root / SYNAPSE_LISTS / name,
                remedy="write one name in a line" if several else again,
            )
    return files


def _some(names: list[str], file: Path) -> list[str]:
    """The names of a list, each once.

    Raises:
        InputError: when there is none.
    """
    if not names:
        raise InputError("lists nothing", path=file, remedy="prepare the data again")
    different = list(dict.fromkeys(names))
    if len(different) < len(names):
        twice = len(names) - len(different)
        logger.warning(f"{printable(str(file))}: {twice} names stand there more than once, each counts once")
    return different


def _exists(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name that is too long
        return False


def _held_out(cases: list[str], wanted: int | str | Sequence[str], seed: int, root: Path) -> list[str]:
    if isinstance(wanted, int):
        if not 0 < wanted < len(cases):
            raise InputError(
                f"{wanted} of the {len(cases)} training cases cannot be held out for model selection",
                path=root,
                remedy="give another --val_cases, or --selection paper to select without validation cases",
            )
        return sorted(random.Random(seed).sample(cases, wanted))
    names = sorted(set(map(str, ensure_tuple(wanted))))
    if unknown := sorted(set(names) - set(cases)):
        raise InputError(f"val_cases {', '.join(unknown)} are no training cases", path=root)
    if not 0 < len(names) < len(cases):
        fact = f"val_cases lists {len(names)} of the {len(cases)} training cases"
        raise InputError(fact, path=root, remedy="leave some to train on and some to choose the model by")
    return names


def _note(root: Path) -> str:
    """What data that `python -m prepare` made say of themselves; nothing where they say nothing."""
    try:
        facts = json.loads((root / "dataset.json").read_bytes())
    except (OSError, ValueError):
        return ""
    note = facts.get("note") if isinstance(facts, dict) else None
    return printable(note) if isinstance(note, str) else ""


def _check_selection(selection: str) -> None:
    if selection not in SELECTIONS:
        raise InputError(f"selection must be one of {', '.join(SELECTIONS)}, not {selection!r}")


def image_pairs(root: Path, allow_unpaired: bool = False, passed: Counter[str] | None = None) -> list[dict[str, Any]]:
    """{"image": file, "label": mask file or a list of them} for each picture in root/images.

    Its mask lies in root/masks or, as published for BUSI, in root/masks/0.

    Args:
        root: the folder.
        allow_unpaired: leave out images without a mask and masks without an image.
        passed: counts what was left out, for `passed_over`.

    Raises:
        InputError: when there is none, or a file has no partner.

    Example:
        >>> image_pairs(Path("nowhere"))
        Traceback (most recent call last):
        transforms.files.InputError: nowhere/masks: is missing: masks lie there, named as the pictures in nowhere/images
    """
    folder = root / "masks/0" if (root / "masks/0").is_dir() else root / "masks"
    if not folder.is_dir():
        fact = f"is missing: masks lie there, named as the pictures in {printable(str(root / 'images'))}"
        raise InputError(fact, path=folder)
    if folder.name == "0" and (root / "masks/1").is_dir():
        remedy = "save one mask for each image, with a number for each class, in masks/"
        raise InputError("holds a folder of masks for each of several classes", path=root / "masks", remedy=remedy)
    images = without_by_products(list_files(root / "images", PICTURE_SUFFIXES, passed=passed), passed)
    masks = list_files(folder, PICTURE_SUFFIXES, passed=passed)
    if not images:
        raise InputError(f"holds no picture ({', '.join(PICTURE_SUFFIXES)})", path=root / "images")
    try:
        pairs = pair_masks(images, masks, allow_unpaired, passed)
    except InputError as error:
        remedy = "" if "same name as" in str(error) else "; add it, or leave such files out with --allow_unpaired true"
        raise InputError(f"{error}{remedy}", path=folder) from error
    if not pairs:
        raise InputError(f"holds no picture that has a mask in {printable(str(folder))}", path=root / "images")
    return [
        {"image": _as_text(image), "label": _as_text(those[0]) if len(those) == 1 else [_as_text(one) for one in those]}
        for image, those in pairs
    ]


def _fold_lists(root: Path) -> dict[str, dict[str, Path]]:
    """The lists `*_train1.txt`, `*_val1.txt` … by number and part.

    Raises:
        InputError: when two have the same number and part.
    """
    lists: dict[str, dict[str, Path]] = {}
    for file in sorted(root.iterdir()):
        if found := re.fullmatch(r"[^.].*_(train|val)(\d+)\.txt", file.name):
            other = lists.setdefault(found[2], {}).setdefault(found[1], file)
            if other is not file:
                raise InputError(f"is of the same split as {file.name}", path=other, remedy="remove one of them")
    return lists


def _by_lists(
    pairs: list[dict[str, Any]],
    lists: dict[str, dict[str, Path]],
    fold: str,
    root: Path,
    allow_unpaired: bool,
    passed: Counter[str],
) -> list[list[dict[str, Any]]]:
    """The items of the training and of the test list of a fold, in the order of the lists."""
    if len(lists.get(fold, {})) < 2:
        known = ", ".join(file.name for parts in lists.values() for file in parts.values())
        raise InputError(f"has no train and val list for --fold {fold}; there are {known}", path=root)
    by_stem = {same_letters(stem(pair["image"])).strip(): pair for pair in pairs}
    names: list[list[str]] = []
    for part in ("train", "val"):
        file = lists[fold][part]
        listed = [same_letters(name) for name in read_list(file)]
        listed = _some([name if name in by_stem else stem(name) for name in listed], file)
        if unknown := [name for name in listed if name not in by_stem]:
            if not allow_unpaired:
                more = f" … ({len(unknown)} names)" * (len(unknown) > 1)
                where = printable(str(root / "images"))
                raise InputError(f"{unknown[0]} is listed but {where} has no such picture{more}", path=file)
            passed["name without picture"] += len(unknown)
        names.append([name for name in listed if name in by_stem])
        if not names[-1]:
            raise InputError("lists no picture that is there", path=file)
    if both := sorted(set(names[0]) & set(names[1])):
        fact = f"{len(both)} images are listed for training and for testing, such as {both[0]}"
        raise InputError(fact, path=lists[fold]["val"], remedy="leave each in one list")
    passed["image in no list"] += len(by_stem.keys() - set(names[0]) - set(names[1]))
    return [[by_stem[name] for name in part] for part in names]


def _check_apart(training: Sequence[Mapping[str, Any]], test: Sequence[Mapping[str, Any]]) -> None:
    """Refuses the same file, by name and content, in both parts; data sets may number the images of each from 1."""
    by_stem = {stem(item["image"]): Path(item["image"]) for item in training}
    both = [item["image"] for item in test if stem(item["image"]) in by_stem]
    same = [image for image in both if Path(image).stat().st_size
            and filecmp.cmp(image, by_stem[stem(image)], shallow=False)]  # fmt: skip
    if same:
        fact = f"is a training image too, as are {len(same) - 1} others" if len(same) > 1 else "is a training image too"
        raise InputError(fact, path=same[0], remedy="leave each image in one part")


def _draw(pairs: list[dict[str, Any]], share: float, seed: int, root: Path) -> tuple[list, list]:
    """`share` of the pairs, but one at least, drawn at random, and the rest; both in the order given."""
    if not 0 < share < 1 or len(pairs) < 2:
        raise InputError(f"a share of {share} of the {len(pairs)} images cannot be held out", path=root)
    drawn = min(max(round(share * len(pairs)), 1), len(pairs) - 1)
    chosen = set(random.Random(seed).sample(range(len(pairs)), drawn))
    parts: tuple[list, list] = ([], [])
    for index, pair in enumerate(pairs):
        parts[index not in chosen].append(pair)
    return parts
