"""`python -m evaluation compare A B [C …]`: what each of several evaluations of the same cases changed.

A, B, … are folders with the metrics.csv and summary.json that an evaluation wrote. Cases are paired by name. For each
metric and class: the mean difference to the first with its 95 % interval, the p of Wilcoxon's signed-rank test, Holm's
correction of it over the classes, and how many cases got better and worse. Evaluations of other cases, against other
labels or under other rules are refused.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from evaluation.files import Results, read_results
from evaluation.scores import FEW_CASES, FORMAT, spread
from evaluation.tables import LINE_LENGTH, Group, grid
from transforms import InputError, check_output, replacing

# metric → (header, factor, True where more is better)
COMPARED = {
    "volumes": {
        "dice": ("Dice %", 100, True),
        "iou": ("IoU %", 100, True),
        "precision": ("precision %", 100, True),
        "recall": ("recall %", 100, True),
        "surface_dice": ("surface Dice %", 100, True),
        "hd95": ("HD95", 1, False),
        "assd": ("ASSD", 1, False),
    },
    "images": {
        "iou": ("IoU %", 100, True),
        "dice": ("Dice %", 100, True),
        "threshold_jaccard": ("threshold Jaccard %", 100, True),
        "sensitivity": ("sensitivity %", 100, True),
        "specificity": ("specificity %", 100, True),
        "surface_dice": ("surface Dice %", 100, True),
        "hd95_px": ("HD95 px", 1, False),
    },
}
CHANGES = 10
SHOWN = 3


@dataclass(frozen=True)
class Change:
    """One class of one case before and after."""

    case: str
    structure: str
    before: float
    after: float


@dataclass(frozen=True)
class Difference:
    """Second − first of one metric and class over the `n` cases that have both; `p` None where nothing differs."""

    metric: str
    structure: str
    n: int
    mean: float | None
    low: float | None
    high: float | None
    p: float | None
    p_holm: float | None
    better: int
    worse: int


@dataclass(frozen=True)
class Comparison:
    """One evaluation against the first. The largest changes are of the kind's first metric."""

    first: str
    second: str
    kind: str
    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]
    undefined: int
    notes: tuple[str, ...] = ()


def compare(results: Sequence[Results]) -> list[Comparison]:
    """Each of the results against the first.

    Raises:
        InputError: when there are fewer than two, or one is of other cases, labels, classes or rules than the first.
    """
    if len(results) < 2:
        raise InputError("compare takes two or more result folders")
    first, *others = results
    for other in others:
        _check_alike(first, other)
    return [_compare(first, other) for other in others]


def _check_alike(first: Results, other: Results) -> None:
    def refuse(what: str) -> None:
        raise InputError(f"{what} than {first.folder}", path=other.folder, remedy="evaluate both alike")

    if other.kind != first.kind:
        refuse(f"an evaluation of {other.kind}, another kind")
    if other.classes != first.classes:
        refuse(f"classes {', '.join(other.classes)}, others")
    for name in sorted(first.rules.keys() | other.rules.keys()):
        if first.rules.get(name) != other.rules.get(name):
            parts = [set(one.rules.get(name, "").split("; ")) for one in (other, first)]
            own, theirs = ("; ".join(sorted(one)) or "none" for one in (parts[0] - parts[1], parts[1] - parts[0]))
            refuse(f'other rules of {name!r} ("{own}", not "{theirs}")')
    missing, added = first.labels.keys() - other.labels.keys(), other.labels.keys() - first.labels.keys()
    if missing or added:
        refuse("; ".join(f"{what} {_some(cases)}" for what, cases in (("lacks", missing), ("adds", added)) if cases)
               + ", so other cases")  # fmt: skip
    if changed := {case for case, found in first.labels.items() if other.labels[case] != found}:
        refuse(f"other labels of {_some(changed)}")


def _some(cases: set[str]) -> str:
    names = sorted(cases)
    return ", ".join(names[:SHOWN]) + f" … ({len(names)} cases)" * (len(names) > SHOWN)


def _values(results: Results, metric: str, structure: str) -> dict[str, float]:
    """By case, of the strict protocol where there are several."""
    return {
        row["case"]: float(row[metric]) if row[metric] else math.nan
        for row in results.rows
        if row["class"] == structure and row.get("protocol", "strict") == "strict"
    }


def _compare(first: Results, other: Results) -> Comparison:
    differences: list[Difference] = []
    changes: list[Change] = []
    undefined = 0
    for metric, (_, _, more) in COMPARED[first.kind].items():
        found = []
        for structure in first.classes:
            before, after = (_values(results, metric, structure) for results in (first, other))
            both = [case for case in before if not math.isnan(before[case]) and not math.isnan(after[case])]
            undefined += sum(math.isnan(before[case]) != math.isnan(after[case]) for case in before)
            change = np.array([after[case] - before[case] for case in both])
            found.append(_difference(metric, structure, change, more))
            if metric == next(iter(COMPARED[first.kind])):
                changes += [Change(case, structure, before[case], after[case]) for case in both]
        differences += _holm(found)
    changes = [change for change in changes if change.after != change.before]
    changes.sort(key=lambda change: -abs(change.after - change.before))
    notes = tuple(
        f"{results.folder}: post-processed, {results.postprocess} component of each class"
        for results in (first, other)
        if results.postprocess != "none"
    )
    return Comparison(
        str(first.folder), str(other.folder), first.kind, tuple(differences), tuple(changes[:CHANGES]), undefined, notes
    )


def _difference(metric: str, structure: str, change: np.ndarray, more: bool) -> Difference:
    mean = spread(change.tolist())
    p = None
    if change.any():
        with warnings.catch_warnings():  # of few cases, and of ties
            warnings.simplefilter("ignore")
            p = float(stats.wilcoxon(change).pvalue)
    up, down = int((change > 0).sum()), int((change < 0).sum())
    better, worse = (up, down) if more else (down, up)
    return Difference(metric, structure, mean.n, mean.mean, mean.low, mean.high, p, p, better, worse)


def _holm(found: Sequence[Difference]) -> list[Difference]:
    """The same with the p corrected over the classes."""
    corrected = iter(holm([one.p for one in found if one.p is not None]))
    return [Difference(**asdict(one) | {"p_holm": None if one.p is None else next(corrected)}) for one in found]


def holm(values: Sequence[float]) -> list[float]:
    """Holm's correction of several p.

    Example:
        >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
        [0.03, 0.06, 0.06]
    """
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def table(comparison: Comparison) -> str:
    """The comparison for a terminal."""
    heads = COMPARED[comparison.kind]
    several = len({one.structure for one in comparison.differences}) > 1
    cells: list[list[str]] = []
    for one in comparison.differences:
        header, factor, _ = heads[one.metric]
        if several and cells and cells[-1][0] and one.structure == comparison.differences[0].structure:
            cells.append([""] * 8)
        ends = "" if one.low is None or one.high is None else f"[{one.low * factor:+.2f}, {one.high * factor:+.2f}]"
        mean = "n/a" if one.mean is None else f"{one.mean * factor:+.2f}"
        name = f"{header}, {one.structure}" if several else header
        tests = ["" if p is None else f"{p:.2g}" for p in (one.p, one.p_holm)]
        cells.append([name, mean, ends, str(one.n), *tests, str(one.better), str(one.worse)])
    names, *columns = (list(column) for column in zip(*cells, strict=True))
    heads_of = ("mean", "95 %", "N", "p", "p (Holm)", "better", "worse")
    groups: list[Group] = [
        ("", [("metric", names)]),
        ("second − first", list(zip(heads_of[:3], columns[:3], strict=True))),
        ("Wilcoxon", list(zip(heads_of[3:5], columns[3:5], strict=True))),
        ("cases", list(zip(heads_of[5:], columns[5:], strict=True))),
    ]
    lines = ["", f"first:  {comparison.first}", f"second: {comparison.second}", *comparison.notes, "", grid(groups)]
    header, factor, _ = next(iter(heads.values()))
    if comparison.changes:
        lines += ["", f"{header} changed most:"]
        lines += [
            f"  {change.case}{f', {change.structure}' * several}: {change.before * factor:.2f} → "
            f"{change.after * factor:.2f}"
            for change in comparison.changes
        ]
    else:
        lines += ["", f"{header} is the same in every case."]
    notes = [
        "Over the cases in which both have the metric. [low, high]: 95 % interval of the mean difference "
        "(BCa bootstrap, 10 000 resamples, fixed seed); "
        "p: Wilcoxon signed-rank, with Holm's correction over the classes of one metric."
    ]
    if comparison.undefined:
        notes.append(f"Left out, because one of the two has no such number: {comparison.undefined} values.")
    if max((one.n for one in comparison.differences), default=0) < FEW_CASES:
        notes.append(f"Caution: with fewer than {FEW_CASES} cases such intervals are too narrow.")
    return "\n".join([*lines, "", *(textwrap.fill(note, LINE_LENGTH, subsequent_indent="  ") for note in notes)])


def as_dict(comparisons: Sequence[Comparison]) -> Mapping[str, object]:
    """What `comparison.json` holds."""
    return {"format": FORMAT, "comparisons": [asdict(one) for one in comparisons]}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command `python -m evaluation compare`."""
    parser = argparse.ArgumentParser(prog="python -m evaluation compare", description=__doc__.partition("\n\n")[2])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="what an evaluation wrote; first the one "
                        "that the others are compared with")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="DIR", help="write comparison.json there")
    options = parser.parse_args(arguments)
    try:
        if options.output:
            check_output(options.output)
        comparisons = compare([read_results(folder) for folder in options.folders])
        print("\n".join(map(table, comparisons)))
        if options.output:
            with replacing(options.output / "comparison.json") as path:
                text = json.dumps(as_dict(comparisons), indent=2, allow_nan=False)
                path.write_text(f"{text}\n", encoding="utf-8")
            print(f"\nwritten: {options.output / 'comparison.json'}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
