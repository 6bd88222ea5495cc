"""`python -m prepare synapse|busi|isic|folds|demo|check …`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from prepare.busi import prepare_busi
from prepare.check import check
from prepare.demo import MARK, prepare_demo
from prepare.folds import prepare_folds
from prepare.isic import FOLDERS, SPLITS, prepare_isic
from prepare.synapse import prepare_synapse
from transforms import InputError, dashed, expanded, log_warnings


def _seed(word: str) -> int:
    """A whole number, 0 or above."""
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word} is no whole number, 0 or above")
    return int(word)


def _path(word: str) -> Path:
    return Path(expanded(word))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m prepare", description="Prepare data sets for the bundles.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, out: Path | None, about: str, raw: str | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about[0].upper() + about[1:])
        if raw:
            added.add_argument("--raw", type=_path, required=True, help=raw)
        added.add_argument(
            "--out", type=_path, default=out, help=f"folder to make ({out or 'data/isic17, data/isic18'})"
        )
        added.add_argument("--overwrite", action="store_true", help="replace an earlier result in --out")
        return added

    synapse = command(
        "synapse",
        Path("data/Synapse"),
        "BTCV abdominal CT: slices to train on, volumes to test on",
        "folder with img/img0001.nii.gz … and label/label0001.nii.gz …",
    )
    synapse.add_argument("--train-cases", type=int, nargs="*", metavar="N", help="case numbers (the 18 published ones)")
    synapse.add_argument("--test-cases", type=int, nargs="*", metavar="N", help="case numbers (the 12 published ones)")
    synapse.add_argument("--allow-missing", action="store_true", help="go on with the cases that are there")
    synapse.add_argument("--assume-hu", action="store_true", help="take any values for Hounsfield units")
    synapse.set_defaults(run=prepare_synapse)

    busi = command("busi", Path("data/busi"), "BUSI breast ultrasound", "the unpacked folder Dataset_BUSI_with_GT")
    busi.add_argument("--seed", type=_seed, default=41, help="of the splits (%(default)s)")
    busi.add_argument("--splits", type=int, default=3, help="number of random 70/30 splits (%(default)s)")
    busi.add_argument(
        "--split-files", type=_path, metavar="DIR", help="take its busi_train1.txt, busi_val1.txt … instead"
    )
    busi.add_argument("--include-normal", action="store_true", help="take images without a lesion too")
    busi.add_argument("--deduplicate", action="store_true", help="keep equal images on one side of each split")
    busi.add_argument("--allow-unpaired", action="store_true", help="leave out images without mask, and masks without")
    busi.add_argument("--workers", type=int, help="threads (one for each core)")
    busi.set_defaults(run=prepare_busi)

    isic = command("isic", None, "ISIC 2017 or 2018 dermoscopy", "folder with the unpacked downloads")
    isic.add_argument("--year", type=int, choices=tuple(FOLDERS), required=True)
    isic.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="7:3 pools and draws anew (%(default)s)")
    isic.add_argument("--seed", type=_seed, default=42, help="of the 7:3 split (%(default)s)")
    isic.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="resize on the way in (as downloaded)")
    isic.add_argument("--allow-unpaired", action="store_true", help="leave out images without mask, and masks without")
    isic.add_argument("--workers", type=int, help="threads (one for each core)")
    isic.set_defaults(run=prepare_isic)

    folds = command(
        "folds", Path("data/folds"), "folds for cross-validation of a folder of pairs", "folder with images/ and masks/"
    )
    folds.add_argument("--folds", type=int, default=3, help="how many (%(default)s)")
    folds.add_argument("--seed", type=_seed, default=41, help="of the draw (%(default)s)")
    folds.add_argument(
        "--label-map", nargs="+", type=_mapped, metavar="STORED:CLASS", help="numbers in mask files, such as 0:0 255:1"
    )
    folds.add_argument("--allow-unpaired", action="store_true", help="leave out images without mask, and masks without")
    folds.set_defaults(run=_folds)

    demo = command("demo", Path("data/demo"), f"demo data to try everything on: {MARK}")
    demo.add_argument("--seed", type=_seed, default=0, help="equal seeds give equal data (%(default)s)")
    demo.add_argument("--cases", type=int, default=12, help="CT volumes, a quarter of them to test on (%(default)s)")
    demo.add_argument("--slices", type=int, default=32, help="slices of a CT volume (%(default)s)")
    demo.add_argument("--size", type=int, default=128, help="rows and columns of a CT slice (%(default)s)")
    demo.add_argument("--images", type=int, default=40, help="ultrasound, and dermoscopy images (%(default)s)")
    demo.set_defaults(run=prepare_demo)

    about = "Check prepared data: files, sizes, labels, duplicates, leaks between training and test."
    checked = commands.add_parser("check", help=about[0].lower() + about[1:-1], description=about)
    checked.add_argument("folder", type=_path, metavar="DIR", help="prepared data, or a folder with images and masks")
    checked.add_argument("--full", action="store_true", help="open every file, not a sample; find near-duplicates")
    checked.add_argument("--fold", type=int, default=1, help="number of the split's lists (%(default)s)")
    checked.add_argument("--classes", nargs="+", metavar="NAME", help="of classes 1 … (lesion, or the eight organs)")
    checked.add_argument(
        "--label-map", nargs="+", type=_mapped, metavar="STORED:CLASS", help="numbers in mask files, such as 0:0 255:1"
    )
    checked.set_defaults(run=_check)
    return parser


def _mapped(text: str) -> tuple[int, int]:
    stored, number = text.split(":")
    return int(stored), int(number)


def _folds(label_map: list[tuple[int, int]] | None, **options: Any) -> None:
    prepare_folds(label_map=dict(label_map) if label_map else None, **options)


def _check(label_map: list[tuple[int, int]] | None, **options: Any) -> None:
    check(label_map=dict(label_map) if label_map else None, **options)


def main(arguments: list[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, or 1 after one line on stderr that says what to put right."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    command = options.pop("command")
    log_warnings()
    try:
        run(**options)
    except (InputError, OSError) as error:
        print(f"prepare {command}: {dashed(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        # PyTorch says so by a RuntimeError
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        print(f"prepare {command}: there is not enough memory; give less --workers or a smaller size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"prepare {command}: interrupted, nothing was written; run it again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
