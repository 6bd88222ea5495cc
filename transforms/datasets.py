"""From a prepared folder to the lists of files that a bundle's configuration trains, validates and tests on.

These functions are called by bundle configurations, so what a user can get wrong ends the program with one line that
names the folder and the remedy (`DatasetError` is a `SystemExit`), not with a traceback.
"""

import random
from collections.abc import Sequence
from pathlib import Path

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
    if selection not in SELECTIONS:
        raise DatasetError(f"selection must be one of {', '.join(SELECTIONS)}, not {selection!r}")
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


def find_files(path: str | Path, suffixes: Sequence[str]) -> list[dict[str, str]]:
    """[{"image": file}] for `path` itself, or for the files in the folder `path` that end in one of `suffixes`.

    Raises:
        DatasetError: when there is none.
    """
    path = Path(path)
    if not path.exists():
        raise DatasetError(f"{path} does not exist: give a file or a folder of them as --input")
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
    files = [file for file in files if file.name.lower().endswith(tuple(suffixes))]
    if not files:
        raise DatasetError(f"{path} is or holds no {', '.join(suffixes)} file")
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
