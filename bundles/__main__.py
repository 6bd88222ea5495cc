"""`python -m bundles show|export|pack|card|runs|reproduce …`: what configurations run, files for others, runs."""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bundles.configurations import settings_of
from bundles.export import SUFFIX, export_bundle
from bundles.pack import card_of, pack_bundle
from bundles.run import one_line
from bundles.show import show
from networks.training.provenance import FILE, read_run
from networks.weights import read_checkpoint
from transforms import InputError, check_output, replacing

COLUMNS = ("run", "network", "best", "epoch", "epochs", "started", "ended", "selected by")


def runs(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The runs in a folder and below, each with what its `run.json` says, the oldest first.

    Example:
        >>> list(runs(Path("nowhere")))
        []
    """
    found = ((file.parent, read_run(file)) for file in folder.rglob(FILE))
    yield from sorted(((place, run) for place, run in found if run), key=lambda one: str(one[1]["started"]))


def list_runs(folder: Path) -> None:
    """Prints a table of the runs.

    Raises:
        InputError: when there is none.
    """
    rows = [COLUMNS, *(_row(folder, place, run) for place, run in runs(folder))]
    if len(rows) == 1:
        raise InputError(
            f"no {FILE} in it or below", path=folder, remedy="name a folder that holds checkpoints of runs"
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def reproduce(run_folder: Path, out: Path) -> bool:
    """Repeats a training from its `run.json` into another folder, and prints what is equal and what is not.

    Returns:
        whether all weights of `model.pt` are equal, to the bit.

    Raises:
        InputError: when the folder holds no completed run, or the repetition fails.
    """
    before = read_run(run_folder / FILE)
    if not before:
        raise InputError(f"no {FILE} in it", path=run_folder, remedy="name the folder of a run's model.pt")
    if before["how_it_ended"] != "completed" or not before.get("config_files"):
        raise InputError(
            f"the run {before['how_it_ended']}", path=run_folder, remedy="only a completed one is repeated"
        )
    places = {"ckpt_dir": out, "log_dir": out / "runs", "resume": False}
    overrides = {**before["overrides"], **{key: str(value) for key, value in places.items()}}
    words = [word for key, value in overrides.items() for word in (f"--{key}", _word(value))]
    files = before["config_files"]
    listed = f"[{','.join(map(repr, files))}]" if len(files) > 1 else files[0]
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", listed, *words]
    # sums are rounded in another order by another number of threads
    environment = {**os.environ, "OMP_NUM_THREADS": str(before["threads"])}
    if subprocess.run(command, cwd=before.get("working_directory"), env=environment).returncode:
        raise InputError("the repetition failed, see above", path=run_folder)
    after = read_run(out / FILE)
    for name in ("git", "versions", "device", "threads", "machine"):
        if before[name] != after[name]:
            print(f"{name}: {before[name]} then, {after[name]} now")
    if before["settings"]["data"] != after["settings"]["data"]:
        print("the data are not the same files")
    first, second = (read_checkpoint(folder / "model.pt") for folder in (run_folder, out))
    apart = [name for name in first if name not in second or not torch.equal(first[name], second[name])]
    for title, run in (("then", before), ("now", after)):
        print(f"{title}: best {run['best']['metric']} {run['best']['score']:.6f} in epoch {run['best']['epoch']}")
    if apart and (earlier := before.get("earlier_commands")):
        print(f"the run was resumed {len(earlier)} times; its repetition has the last command's settings throughout")
    print("the weights are equal to the bit" if not apart else f"{len(apart)} of {len(first)} tensors differ")
    return not apart


def _row(folder: Path, place: Path, run: dict[str, Any]) -> tuple[str, ...]:
    best = run.get("best") or {}
    return (
        str(place.relative_to(folder)) if place != folder else str(place.name or place),
        str(run["network"]),
        f"{best.get('metric', '')} {best['score']:.4f}" if best else "-",
        str(best.get("epoch", "-")),
        str(run.get("epochs", "-")),
        str(run["started"])[:16].replace("T", " "),
        str(run["how_it_ended"]).partition(":")[0],
        str(run["selection"]),
    )


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, or 1 after one line on stderr that says what to put right."""
    parser = argparse.ArgumentParser(prog="python -m bundles", description=__doc__.partition("\n")[0].split(": ")[1])
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("runs", help="the trainings in a folder and below, with their scores")
    listing.add_argument("folder", type=Path, metavar="DIR")
    about = (
        "train again from a run's run.json, and compare the weights; it executes the configuration that run.json names:"
        " repeat only runs that you trust"
    )
    repeating = commands.add_parser("reproduce", help=about, description=about[0].upper() + about[1:])
    repeating.add_argument("folder", type=Path, metavar="RUN", help="the folder that holds its run.json")
    repeating.add_argument("--out", type=Path, metavar="DIR", help="folder of the repetition (RUN/reproduced)")
    about = "the resolved configuration, the file each key comes from, and all that it would run, without running any"
    showing = commands.add_parser("show", help=about, description=about[0].upper() + about[1:])
    showing.add_argument("what", nargs="+", metavar="BUNDLE_OR_CONFIG", help="a bundle, or files, overlays last")
    showing.add_argument(
        "--config", default="inference", metavar="NAMES", help="a bundle's: train, or train,evaluate … (%(default)s)"
    )
    about = (
        "one file that runs without this project, compared with the network that it was made of; it executes the"
        " bundle's configuration. Further settings are overrides: --image_size 64"
    )
    exporting = commands.add_parser("export", help=about, description=about[0].upper() + about[1:])
    exporting.add_argument("bundle", metavar="BUNDLE", help="its folder or name")
    exporting.add_argument("--weights", type=Path, required=True, metavar="FILE", help="a checkpoint")
    exporting.add_argument("--format", choices=[*SUFFIX], required=True)
    exporting.add_argument("--output", type=Path, metavar="FILE", help="(beside the weights, under their name)")
    about = "for a page: the archive of npm pack, or a folder with its files (the archive in the working directory)"
    exporting.add_argument("--onnxruntime_web", type=Path, metavar="PATH", help=about)
    about = (
        "one zip with the trained network in four forms, resolved configurations, the code they need and a model card,"
        " which MONAI's tools run where nothing of this project is installed. It executes the bundle's configuration."
        " Further settings are overrides: --image_size 64"
    )
    packing = commands.add_parser("pack", help=about, description=about[0].upper() + about[1:])
    about = "the model card of a pack alone: headings of the model zoo, numbers from the report of `evaluating`"
    describing = commands.add_parser("card", help=about, description=about[0].upper() + about[1:])
    for one in (packing, describing):
        one.add_argument("bundle", metavar="BUNDLE", help="its folder or name")
        one.add_argument("--weights", type=Path, required=True, metavar="FILE", help="a checkpoint")
        report = "what `evaluating` wrote for these weights, or none (eval beside them, there, the bundle's eval)"
        one.add_argument("--report", metavar="DIR", help=report)
    packing.add_argument("--output", type=Path, required=True, metavar="DIR", help="for NAME_vVERSION.zip, or the file")
    address = "where the bundle's folder will be published: addresses in large_files.yml begin with it"
    packing.add_argument("--url", default="", metavar="URL", help=address)
    describing.add_argument("--output", type=Path, metavar="FILE", help="(printed)")
    options, rest = parser.parse_known_args(arguments)
    if rest and options.command not in ("export", "pack", "card"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "show":
            print(show(options.what, options.config))
            return 0
        if options.command == "export":
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
            export_bundle(
                options.bundle,
                options.weights,
                options.format,
                options.output,
                settings_of(rest),
                options.onnxruntime_web,
            )
            return 0
        if options.command == "pack":
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
            what = (options.bundle, options.weights, options.output, options.report, options.url)
            pack_bundle(*what, settings_of(rest))
            return 0
        if options.command == "card":
            text = card_of(options.bundle, options.weights, options.report, settings_of(rest))
            if options.output is None:
                print(text, end="")
                return 0
            check_output(options.output.resolve().parent)
            with replacing(options.output) as temporary:
                temporary.write_text(text, encoding="utf-8")
            return 0
        if options.command == "runs":
            list_runs(options.folder)
            return 0
        return 0 if reproduce(options.folder.resolve(), (options.out or options.folder / "reproduced").resolve()) else 1
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        print(line, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
