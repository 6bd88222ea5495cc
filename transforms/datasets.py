"""From a prepared folder to what a bundle trains, validates and tests on, and to its classes.

Bundle configurations call these functions. What a user can get wrong therefore ends the program with one line that
names the folder and the remedy, not with a traceback: `DatasetError` is a `SystemExit`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple

from transforms.files import PICTURE_SUFFIXES, by_name, list_files, pair_by_name, stem

SYNAPSE_CLASSES = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
# Ids in BTCV's raw label files, in the order of SYNAPSE_CLASSES; the other ids become background.
BTCV_IDS = (8, 4, 3, 2, 6, 11, 1, 7)

SYNAPSE_LISTS = Path("lists/lists_Synapse")
SELECTIONS = ("holdout", "paper")


class DatasetError(SystemExit):
    """The data that a bundle needs are missing or not as expected. The program prints one line and exits with 1."""


@dataclass(frozen=True)
class DataSplit:
    """What a network is trained, selected and tested on.

    Args:
        train: items {"image": file, "label": file}, as `image_split` and `synapse_split` say.
        validation: items that choose the model; none where it is chosen without.
        test: items of the reported results.
        rule: how the model is chosen, in words for logs and reports.

    Example:
        >>> item = {"image": "images/a.png", "label": "masks/a.png"}
        >>> len(DataSplit(train=[item], validation=[], test=[item], rule="lowest training loss").train)
        1
    """

    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    test: list[dict[str, Any]]
    rule: str

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
        ValueError: when there is no name or the same name twice, or when `label_map` maps something else than whole
            numbers to 0 … C.

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
            raise ValueError(f"classes must be one or more different names, not {list(classes)}")
        label_map = self.label_map
        if label_map is None and len(classes) > 1:
            label_map = {index: index for index in range(len(classes) + 1)}
        if label_map is not None:
            numbers = [*label_map, *label_map.values()] if isinstance(label_map, Mapping) else []
            if not numbers or not all(isinstance(number, int) and not isinstance(number, bool) for number in numbers):
                raise ValueError(f"label_map must be {{stored number: class}} in whole numbers, not {label_map!r}")
            if nameless := sorted(set(label_map.values()) - set(range(len(classes) + 1))):
                raise ValueError(f"label_map gives class {nameless[0]}, but classes names 1 … {len(classes)}")
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


def synapse_split(
    dataset_dir: str | Path,
    val_cases: int | Sequence[str] = 3,
    selection: str = "holdout",
    seed: int = 42,
    metric: str = "Dice",
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

    Raises:
        DatasetError: when files are missing or the cases cannot be held out.

    Example:
        >>> synapse_split("nowhere")
        Traceback (most recent call last):
        transforms.datasets.DatasetError: nowhere holds no prepared Synapse data ...
    """
    root = Path(dataset_dir)
    _check_selection(selection)
    slices = _read_list(root, "train.txt")
    volumes = _read_list(root, "test_vol.txt")

    cases: dict[str, list[str]] = {}
    for name in slices:
        cases.setdefault(name.split("_")[0], []).append(name)
    held_out = _held_out(sorted(cases), val_cases, seed, root) if selection == "holdout" else []

    def npz(names: Sequence[str]) -> list[str]:
        return [str(_existing(root / "train_npz" / f"{name}.npz")) for name in names]

    def h5(name: str) -> str:
        return str(_existing(root / "test_vol_h5" / f"{name}.npy.h5"))

    training = [file for case, names in cases.items() if case not in held_out for file in npz(names)]
    validation = [npz(sorted(cases[case])) for case in held_out]
    return DataSplit(
        train=[{"image": file, "label": file} for file in training],
        validation=[{"image": files, "label": files} for files in validation],
        test=[{"image": h5(name), "label": h5(name)} for name in volumes],
        rule=f"{metric} on held-out training cases" if held_out else "lowest training loss, as published",
    )


def image_split(
    dataset_dir: str | Path,
    fold: int = 1,
    val_fraction: float = 0.1,
    selection: str = "holdout",
    seed: int = 42,
    metric: str = "IoU",
) -> DataSplit:
    """The parts of a folder of images and masks; each item is {"image": file, "label": mask file}.

    Three layouts are understood: `train|val/images|masks` (dermoscopy); `images` and `masks/0` with the lists
    `*_train1.txt`, `*_val1.txt` (breast ultrasound); and any folder with `images` and `masks`, which is split 7:3 with
    `seed`. Images and masks are paired by name (`pair_by_name`), so that a mask's may end in `_mask` or the like.

    Args:
        dataset_dir: the folder.
        fold: number of the lists.
        val_fraction: share of the training part that is held out to choose the model.
        selection: "holdout" holds it out; "paper" holds nothing out and chooses on the test part, as published.
        seed: of all draws.
        metric: chooses the model; named in the rule.

    Raises:
        DatasetError: when the folder has none of these layouts, or a file has no partner.

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
    root = Path(dataset_dir)
    _check_selection(selection)
    if (root / "train/images").is_dir():
        training, test = (_pairs(root / part) for part in ("train", "val"))
    elif (root / "images").is_dir():
        pairs = _pairs(root)
        if next(root.glob("*_train[0-9]*.txt"), None):
            by_stem = {stem(pair["image"]): pair for pair in pairs}
            training, test = ([_listed(by_stem, name, root) for name in names] for names in _fold_lists(root, fold))
        else:
            test, training = _draw(pairs, 0.3, seed, root)
    else:
        raise DatasetError(
            f"{root} holds no images to train on (expected images/ and masks/, or train/ and val/ with both): run"
            f" `python -m prepare busi --raw DIR --out {root}`, `python -m prepare isic --raw DIR --out {root}`, or"
            " `python -m prepare demo --out data/demo` and add `--dataset_dir data/demo/busi` (or isic17)"
        )
    if selection == "paper":
        return DataSplit(training, test, test, f"{metric} on the reported test images, as published")
    validation, training = _draw(training, val_fraction, seed, root)
    return DataSplit(training, validation, test, f"{metric} on held-out training images")


def find_files(path: str | Path, suffixes: Sequence[str]) -> list[dict[str, str]]:
    """[{"image": file}] for the file `path`, or for the files in the folder `path` that end in one of `suffixes`.

    Raises:
        DatasetError: when there is none, or when results of two would have the same name.

    Example:
        >>> find_files("nowhere", PICTURE_SUFFIXES)
        Traceback (most recent call last):
        transforms.datasets.DatasetError: nowhere does not exist: give a file or a folder of them as --input
    """
    try:
        files = by_name(list_files(path, suffixes), stem)
    except FileNotFoundError as error:
        raise DatasetError(f"{error}: give a file or a folder of them as --input") from error
    except ValueError as error:
        raise DatasetError(f"{error}, or their results would overwrite each other") from error
    if not files:
        raise DatasetError(f"{path} is or holds no {', '.join(suffixes)} file")
    return [{"image": str(file)} for file in files.values()]


def _read_list(root: Path, name: str) -> list[str]:
    file = root / SYNAPSE_LISTS / name
    if not file.is_file():
        raise DatasetError(
            f"{root} holds no prepared Synapse data ({SYNAPSE_LISTS / name} is missing): run"
            f" `python -m prepare synapse --raw DIR --out {root}`, or `python -m prepare demo --out data/demo`"
            " and add `--dataset_dir data/demo/synapse`"
        )
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise DatasetError(f"{file} is listed but missing: run `python -m prepare synapse` again with --overwrite")
    return file


def _held_out(cases: list[str], wanted: int | Sequence[str], seed: int, root: Path) -> list[str]:
    if isinstance(wanted, int):
        if not 0 < wanted < len(cases):
            raise DatasetError(
                f"{wanted} of the {len(cases)} training cases of {root} cannot be held out for model selection:"
                " give another --val_cases, or --selection paper to select without validation cases"
            )
        return sorted(random.Random(seed).sample(cases, wanted))
    if unknown := sorted(set(wanted) - set(cases)):
        raise DatasetError(f"val_cases {', '.join(unknown)} are no training cases of {root}")
    return sorted(wanted)


def _check_selection(selection: str) -> None:
    if selection not in SELECTIONS:
        raise DatasetError(f"selection must be one of {', '.join(SELECTIONS)}, not {selection!r}")


def _pairs(root: Path) -> list[dict[str, str]]:
    """One item for each picture in root/images, with its mask in root/masks or, as published for BUSI, root/masks/0."""
    folder = root / "masks/0" if (root / "masks/0").is_dir() else root / "masks"
    if not folder.is_dir():
        raise DatasetError(f"{folder} is missing: masks lie there, named as the pictures in {root / 'images'}")
    try:
        images, masks = (list_files(one, PICTURE_SUFFIXES) for one in (root / "images", folder))
        pairs = pair_by_name(images, masks, ("image", "mask"), spare=True)
    except (ValueError, FileNotFoundError) as error:
        raise DatasetError(f"{folder}: {error}") from error
    if not pairs:
        raise DatasetError(f"{root / 'images'} holds no picture ({', '.join(PICTURE_SUFFIXES)})")
    return [{"image": str(image), "label": str(mask)} for image, mask in pairs]


def _fold_lists(root: Path, fold: int) -> list[list[str]]:
    files = [next(root.glob(f"*_{part}{fold}.txt"), None) for part in ("train", "val")]
    if None in files:
        known = sorted(file.name for file in root.glob("*_train[0-9]*.txt"))
        raise DatasetError(f"{root} has no train and val list for --fold {fold}; there are {', '.join(known)}")
    return [[line.strip() for line in file.read_text().splitlines() if line.strip()] for file in files if file]


def _listed(pairs: dict[str, dict[str, str]], name: str, root: Path) -> dict[str, str]:
    if name not in pairs:
        raise DatasetError(f"{name} is listed but {root / 'images'} has no such picture")
    return pairs[name]


def _draw(pairs: list[dict[str, str]], share: float, seed: int, root: Path) -> tuple[list, list]:
    """`share` of the pairs, but one at least, drawn at random, and the rest; both in the order given."""
    if not 0 < share < 1 or len(pairs) < 2:
        raise DatasetError(f"a share of {share} of the {len(pairs)} images of {root} cannot be held out")
    drawn = min(max(round(share * len(pairs)), 1), len(pairs) - 1)
    chosen = set(random.Random(seed).sample(range(len(pairs)), drawn))
    parts: tuple[list, list] = ([], [])
    for index, pair in enumerate(pairs):
        parts[index not in chosen].append(pair)
    return parts
