"""`python -m evaluation PREDICTIONS LABELS`: scores files that are already there, volumes or images.

Two files, or two folders searched with their sub-folders and paired by name: `img0001_pred.nii.gz` belongs to
`label0001.nii.gz`, `ISIC_0000000.png` to `ISIC_0000000_segmentation.png`; `a_mask.png` and `a_mask_1.png` are one
label. Volumes (NIfTI, HDF5 with a data set `label`) are brought to one orientation and scored class by class under both
protocols. Images (PNG and the like) are scored one by one and pooled. Where both files know their geometry it must be
the same. `--label-ids` reads labels of volumes that number their classes in another way than the predictions, as BTCV's
raw ones do; `--label-map` says which number in a picture is which class.

A pair that cannot be scored, or a file without its partner, does not stop the others. The table says so, the failures
are listed at the end, and the exit code is 1.

`python -m evaluation compare DIR DIR …` compares what several evaluations wrote, and `python -m evaluation assemble`
makes a volume of slice masks; each explains itself with --help.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from evaluation import assemble
from evaluation.assemble import parse_label_map
from evaluation.cases import Measuring
from evaluation.compare import compare
from evaluation.files import (
    Measured,
    Reading,
    check_levels,
    is_volume,
    measure_files,
    numbers,
    pair_files,
    with_images,
)
from evaluation.results import (
    COMPARISON_FILE,
    COMPARISON_PAGE,
    METRICS_FILE,
    REPORT,
    SUMMARY_FILE,
    read_results,
    write_comparisons,
    write_results,
)
from evaluation.scores import ImageScores, Scores, VolumeScores, tolerances_of
from evaluation.tables import comparison_table, table
from transforms import BTCV_IDS, SYNAPSE_CLASSES, InputError, check_output, dashed, log_warnings

logger = logging.getLogger(__name__)


def label_ids(words: Sequence[str]) -> tuple[int, ...]:
    """The numbers that --label-ids asks for.

    Raises:
        InputError: when a word is no number above 0, or stands there twice.

    Example:
        >>> label_ids(["11", "4"])
        (11, 4)
    """
    if list(words) == ["btcv"]:
        return BTCV_IDS
    found = tuple(int(word) for word in words if word.isdecimal())
    if len(found) < len(words) or 0 in found or len(set(found)) < len(found):
        raise InputError(f"--label-ids takes btcv, or different numbers above 0, not {' '.join(words)}")
    return found


def class_names(options: argparse.Namespace, volumes: bool, reading: Reading) -> tuple[str, ...]:
    """What --classes names, or what follows from the other options; nothing where the files have to say.

    Raises:
        InputError: when the options do not fit each other.
    """
    if options.classes:
        names = tuple(options.classes)
    elif reading.label_ids:
        names = SYNAPSE_CLASSES if reading.label_ids == BTCV_IDS else _numbered(len(reading.label_ids))
    elif reading.label_map:
        names = _numbered(max(reading.label_map.values()))
    else:
        return () if volumes else ("lesion",)
    for option, count in (
        ("--label-ids", len(reading.label_ids)),
        ("--label-map", max(reading.label_map.values(), default=0)),
    ):
        if count and len(names) != count:
            raise InputError(f"--classes names {len(names)} classes, {option} numbers {count}")
    return names


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"class {index}" for index in range(1, count + 1))


def _highest_class(measured: Sequence[Measured]) -> int:
    """The highest class of the labels.

    Raises:
        InputError: when the predictions end at a lower one, and so seem to be numbered in another way.
    """
    predicted, true = (max(1, *(getattr(one, side) for one in measured)) for side in ("prediction", "label"))
    if true > predicted:
        raise InputError(
            f"the labels hold classes up to {true}, the predictions up to {predicted}",
            remedy="name the classes with --classes if both number them alike, else say the labels' numbers with"
            " --label-ids (BTCV's raw: --label-ids btcv)",
        )
    return true


def evaluate(options: argparse.Namespace) -> tuple[Scores | None, list[str], dict[str, bytes]]:
    """The scores of all pairs, None where there is none; what went wrong with the others; pictures by case.

    Raises:
        InputError: when the options do not fit each other or the files.
    """
    pairing = pair_files(options.predictions, options.labels)
    if pairing.passed_over:
        logger.info(pairing.passed_over)
    volumes = is_volume(pairing.pairs[0].labels[0])
    if options.spacing and not all(0 < size < math.inf for size in options.spacing):
        raise InputError(f"--spacing takes three sizes above 0 mm, not {' '.join(map(str, options.spacing))}")
    if not volumes and (options.label_ids or options.spacing):
        raise InputError(f"--label-ids and --spacing are for volumes, and {pairing.pairs[0].file} is a picture")
    if volumes and options.label_map:
        raise InputError(f"--label-map is for pictures, and {pairing.pairs[0].file} is a volume; see --label-ids")
    spacing = tuple(options.spacing) if options.spacing else None
    reading = Reading(0, spacing, label_ids(options.label_ids), parse_label_map(options.label_map))
    names = class_names(options, volumes, reading)
    # pictures without any option are checked to have one class
    known = 0 if not volumes and not (options.classes or reading.label_map) else len(names)
    reading = Reading(known, spacing, reading.label_ids, reading.label_map)
    tolerances = dict(numbers(options.tolerance, "--tolerance"))
    if set(tolerances) - {""} and not names:
        raise InputError("--tolerance of a class needs --classes")
    if not volumes and options.missed_distance != "undefined":
        raise InputError(f"--missed-distance is for volumes, and {pairing.pairs[0].file} is a picture")
    default = tolerances.pop("", Measuring().tolerances[0])
    each = tolerances_of(names, {name: default for name in names} | tolerances if tolerances else default)
    measuring = Measuring(each, options.engine, options.postprocess)

    pairs = with_images(pairing.pairs, options.images) if options.images else pairing.pairs
    found = measure_files(pairs, reading, measuring, options.jobs)
    measured = {file: one for file, one in found.items() if isinstance(one, Measured)}
    failures = {file: dashed(one) for file, one in found.items() if isinstance(one, str)} | dict(pairing.unmatched)
    if not measured:
        return None, list(failures.values()), {}
    check_levels(measured)
    names = names or _numbered(_highest_class(list(measured.values())))
    scores: Scores
    if volumes:
        scores = VolumeScores(
            names, options.title, options.selection, measuring=measuring, missed_distance=options.missed_distance
        )
    else:
        scores = ImageScores(names, options.title, options.selection, measuring=measuring)
    for file, one in measured.items():
        if one.prediction > len(names):
            failures[file] = (
                f"{file}: the prediction holds values up to {one.prediction}; "
                f"with {len(names)} classes, 0 to {len(names)} fit"
            )
        else:
            scores.cases[file] = one.case.with_classes(len(names))
    scores.failures.update(failures)
    pictures = {name: measured[file].picture for file, name in scores.names().items()}
    return scores, list(failures.values()), pictures


def compare_main(arguments: Sequence[str]) -> None:
    """The command `python -m evaluation compare`."""
    parser = argparse.ArgumentParser(
        prog="python -m evaluation compare",
        description="What each of several evaluations of the same cases changed: mean differences with intervals, "
        "Wilcoxon's signed-rank test with Holm's correction over the classes, and the cases that changed most. "
        "Evaluations of other cases, against other labels or under other rules are refused.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="what an evaluation wrote; first the one "
                        "that the others are compared with")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="write comparison.json, comparison.html there")
    options = parser.parse_args(arguments)
    try:
        if options.output:
            check_output(options.output)
        results = [read_results(folder) for folder in options.folders]
        comparisons = compare(results)
        if options.output:
            write_comparisons(options.output, comparisons, results)
        print("\n".join(map(comparison_table, comparisons)))
        if options.output:
            print(f"\nwritten: {options.output / COMPARISON_FILE}, {options.output / COMPARISON_PAGE}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {dashed(str(error))}")


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"compare": compare_main, "assemble": assemble.main}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m evaluation`; what a user can get wrong ends it with one line."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and words[0] in COMMANDS:
        return COMMANDS[words[0]](words[1:])
    parser = argparse.ArgumentParser(
        prog="python -m evaluation",
        description=__doc__.partition("\n")[0],
        epilog="see also: python -m evaluation compare --help, … assemble --help",
    )
    parser.add_argument("predictions", type=Path, help="file, or folder of files")
    parser.add_argument("labels", type=Path, help="file, or folder of files")
    parser.add_argument("--classes", nargs="+", metavar="NAME", help="names of the classes 1, 2, …; for images: lesion")
    parser.add_argument("--label-ids", nargs="+", default=[], metavar="ID", help="numbers of classes 1, 2, … in the "
                        "labels of volumes, where they differ; btcv: those of BTCV's raw labels")  # fmt: skip
    parser.add_argument("--label-map", nargs="+", default=[], metavar="N:CLASS", help="which number in pictures is "
                        "which class: 0:0 85:1 170:2")  # fmt: skip
    parser.add_argument("--spacing", nargs=3, type=float, metavar=("D", "H", "W"), help="voxel size in mm along the "
                        "body, front to back and side to side, of volumes that do not know it")  # fmt: skip
    parser.add_argument("--tolerance", nargs="+", default=[], metavar="[NAME:]SIZE", help="of the surface Dice, for "
                        "all or for single classes, in mm, for images in pixels (2)")  # fmt: skip
    parser.add_argument("--missed-distance", choices=["undefined", "diagonal"], default="undefined", help="what a "
                        "missed class costs in distance: nothing, or the image's diagonal (%(default)s)")  # fmt: skip
    parser.add_argument("--postprocess", choices=["none", "largest"], default="none", help="largest: keep only the "
                        "largest connected component of each predicted class (%(default)s)")  # fmt: skip
    parser.add_argument("--engine", choices=["fast", "medpy"], default="fast", help="what computes (%(default)s)")
    parser.add_argument("--jobs", type=int, metavar="N", help="processes (as many as pay)")
    parser.add_argument("--output", type=Path, metavar="DIR", help="write metrics.csv, summary.json, report.html there")
    parser.add_argument("--images", type=Path, metavar="PATH", help="file or folder of the images, to show on the page")
    parser.add_argument("--title", default="", help="heading of the table")
    parser.add_argument("--selection", default="", help="how the model was selected, for the record")
    options = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log_warnings()
    try:
        if options.output:
            check_output(options.output)
        scores, failures, pictures = evaluate(options)
        if scores and scores.cases:
            summary = scores.summary()
            if options.output:
                write_results(options.output, summary, scores.rows(), pictures)
            print(table(summary))
            if options.output:
                written = ", ".join(str(options.output / name) for name in (METRICS_FILE, SUMMARY_FILE, REPORT))
                print(f"\nwritten: {written}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {dashed(str(error))}")
    if len(failures) == 1:
        sys.exit(f"error: {failures[0]}")
    if failures:
        sys.exit("\n".join([f"error: {len(failures)} cases could not be scored:", *failures]))


if __name__ == "__main__":
    main()
