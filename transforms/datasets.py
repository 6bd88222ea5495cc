"""From a prepared folder to the lists of files that a bundle's configuration trains, validates and tests on.

These functions are called by bundle configurations, so what a user can get wrong ends the program with one line that
names the folder and the remedy (`DatasetError` is a `SystemExit`), not with a traceback.
"""

import random
import re
from collections.abc import Sequence
from pathlib import Path

from transforms.files import PICTURE_SUFFIXES

SYNAPSE_LISTS = Path("lists/lists_Synapse")
SELECTIONS = ("holdout", "paper")


class DatasetError(SystemExit):
    """The data a bundle needs is not there or not as expected; printed as one line with exit status 1."""


def synapse_split(
    dataset_dir: str | Path, val_cases: int | Sequence[str] = 3, selection: str = "holdout", seed: int = 42
) -> dict[str, list[dict]]:
    """The parts of a folder that `python -m prepare synapse` (or the published release) has laid out.

    Args:
        dataset_dir: holds `train_npz`, `test_vol_h5` and `lists/lists_Synapse`.
        val_cases: how many of the training cases (drawn with `seed`), or which, are held out for model selection.
        selection: "holdout" takes the validation cases out of the training part; "paper" holds nothing out.
        seed: of that draw.

    Returns:
        "train": one item for each slice, {"image": npz file, "label": the same file};
        "validation": one item for each case, {"image": npz files in slice order, "label": the same files};
        "test": one item for each test volume, {"image": h5 file, "label": the same file}.

    Raises:
        DatasetError: when files are missing or no case can be held out.
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
    return {
        "train": [{"image": file, "label": file} for file in training],
        "validation": [{"image": files, "label": files} for files in validation],
        "test": [{"image": h5(name), "label": h5(name)} for name in volumes],
    }


def image_split(
    dataset_dir: str | Path,
    fold: int = 1,
    val_fraction: float = 0.1,
    selection: str = "holdout",
    seed: int = 42,
) -> dict[str, list[dict[str, str]]]:
    """The parts of a folder of images and masks, each item {"image": file, "label": mask file}.

    Understood are the prepared layouts `train|val/images|masks` (dermoscopy), `images`, `masks/0` with the lists
    `*_train1.txt`, `*_val1.txt` (breast ultrasound), and any folder with `images` and `masks`, which is split 7:3 with
    `seed`. Images and masks are paired by stem; a mask's may end in `_segmentation` or `_mask`.

    Args:
        dataset_dir: the folder.
        fold: which of several lists.
        val_fraction: share of the training part that is held out for model selection.
        selection: "holdout" does so; "paper" selects on the test part and holds nothing out, as published.
        seed: of all draws.

    Returns:
        "train", "validation" and "test".

    Raises:
        DatasetError: when the folder is none of these, or a file has no partner.
    """
    root = Path(dataset_dir)
    _check_selection(selection)
    if (root / "train/images").is_dir():
        training, test = (_pairs(root / part) for part in ("train", "val"))
    elif (root / "images").is_dir():
        pairs = _pairs(root)
        if next(root.glob("*_train[0-9]*.txt"), None):
            by_name = {Path(pair["image"]).stem: pair for pair in pairs}
            training, test = ([_listed(by_name, name, root) for name in names] for names in _fold_lists(root, fold))
        else:
            test, training = _draw(pairs, 0.3, seed, root)
    else:
        raise DatasetError(
            f"{root} holds no images to train on (expected images/ and masks/, or train/ and val/ with both): run"
            f" `python -m prepare busi --raw DIR --out {root}`, `python -m prepare isic --raw DIR --out {root}`, or"
            " `python -m prepare demo --out data/demo` and add `--dataset_dir data/demo/busi` (or isic17)"
        )
    validation = test
    if selection == "holdout":
        validation, training = _draw(training, val_fraction, seed, root)
    return {"train": training, "validation": validation, "test": test}


def find_files(path: str | Path, suffixes: Sequence[str]) -> list[dict[str, str]]:
    """[{"image": file}] for `path` itself, or for the files in the folder `path` that end in one of `suffixes`.

    Raises:
        DatasetError: when there is none, or when two differ in their suffixes only.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"{path} does not exist: give a file or a folder of them as --input")
    files = [path] if path.is_file() else _files(path, suffixes)
    if not files or not files[0].name.lower().endswith(tuple(suffixes)):
        raise DatasetError(f"{path} is or holds no {', '.join(suffixes)} file")
    _by_stem(files, suffixes, "would give results of the same name")
    return [{"image": str(file)} for file in files]


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


def _by_stem(files: Sequence[Path], suffixes: Sequence[str], conflict: str, decoration: str = "") -> dict[str, Path]:
    """The files by their names without suffix, and without what matches `decoration` at the end."""
    found: dict[str, Path] = {}
    for file in files:
        suffix = max((suffix for suffix in suffixes if file.name.lower().endswith(suffix)), key=len)
        stem = re.sub(f"{decoration}$", "", file.name[: -len(suffix)])
        if stem in found:
            raise DatasetError(f"{found[stem]} and {file} {conflict}: rename or remove one of them")
        found[stem] = file
    return found


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    files = (file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith("."))
    return [file for file in files if file.name.lower().endswith(tuple(suffixes))]


def _pictures(folder: Path, conflict: str, decoration: str = "") -> dict[str, Path]:
    return _by_stem(_files(folder, PICTURE_SUFFIXES), PICTURE_SUFFIXES, conflict, decoration)


def _pairs(root: Path) -> list[dict[str, str]]:
    """One item for each picture in root/images, with its mask in root/masks or, as published for BUSI, root/masks/0."""
    folder = root / "masks/0" if (root / "masks/0").is_dir() else root / "masks"
    if not folder.is_dir():
        raise DatasetError(f"{folder} is missing: masks lie there, named as the pictures in {root / 'images'}")
    masks = _pictures(folder, "are masks of the same picture", "_(segmentation|mask)")
    images = _pictures(root / "images", "have the same name")
    if alone := sorted(set(images) - set(masks)):
        raise DatasetError(f"{images[alone[0]]} has no mask in {folder} ({len(alone)} such pictures)")
    if not images:
        raise DatasetError(f"{root / 'images'} holds no picture ({', '.join(PICTURE_SUFFIXES)})")
    return [{"image": str(file), "label": str(masks[stem])} for stem, file in images.items()]


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
