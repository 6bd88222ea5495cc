"""What each of several evaluations of the same cases changed against the first.

Cases are paired by name. For each metric and class: the mean difference to the first with its 95 % interval, the p of
Wilcoxon's signed-rank test, Holm's correction of it over the classes, and how many cases got better and worse.
Evaluations of other cases, against other labels or under other rules are refused.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

from evaluation.intervals import spread
from evaluation.protocols import Score
from evaluation.scores import DISTANCES, Results
from transforms import InputError

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
# so many changes are shown
CHANGES = 10
# and so many names in a message
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
    """One evaluation against the first.

    `changes` are of the kind's first metric, the largest first; `unit` is that of distances. `undefined` counts the
    values that were left out, because only one of the two has them.
    """

    first: str
    second: str
    kind: str
    unit: str
    differences: tuple[Difference, ...]
    changes: tuple[Change, ...]
    undefined: int
    notes: tuple[str, ...] = ()


def compare(results: Sequence[Results]) -> list[Comparison]:
    """Each of the results against the first.

    Raises:
        InputError: when there are fewer than two, or one is of other cases, labels, voxel sizes, classes or rules than
            the first.
    """
    if len(results) < 2:
        raise InputError("compare takes two or more result folders")
    if len({one.folder.resolve() for one in results}) < len(results):
        raise InputError("a folder is named twice: it would be compared with itself")
    first, *others = results
    for other in others:
        check_alike(first, other)
    return [_compare(first, other) for other in others]


def check_alike(first: Results, other: Results) -> None:
    """Refuses what cannot be compared.

    Raises:
        InputError: when the other is of other cases, labels, voxel sizes, classes or rules than the first.
    """

    def refuse(what: str) -> None:
        raise InputError(f"{what} than {first.folder}", path=other.folder, remedy="evaluate both alike")

    one, two = first.summary, other.summary
    if two.kind != one.kind:
        refuse(f"an evaluation of {two.kind}, another kind")
    if two.classes != one.classes:
        refuse(f"classes {', '.join(two.classes)}, others")
    for name in sorted(one.protocols.keys() | two.protocols.keys()):
        rules = [summary.protocols[name].rules if name in summary.protocols else "" for summary in (two, one)]
        if rules[0] != rules[1]:
            parts = [set(text.split("; ")) for text in rules]
            own, theirs = ("; ".join(sorted(part)) or "none" for part in (parts[0] - parts[1], parts[1] - parts[0]))
            refuse(f'other rules of {name!r} ("{own}", not "{theirs}")')
    missing, added = one.labels.keys() - two.labels.keys(), two.labels.keys() - one.labels.keys()
    if missing or added:
        refuse("; ".join(f"{what} {_some(cases)}" for what, cases in (("lacks", missing), ("adds", added)) if cases)
               + ", so other cases")  # fmt: skip
    if changed := {case for case, found in one.labels.items() if two.labels[case] != found}:
        refuse(f"other labels of {_some(changed)}")
    # equal labels of other volumes in ml
    sizes, expected = _sizes(other), _sizes(first)
    if changed := {case for case, found in expected.items() if found != sizes[case]}:
        refuse(f"other voxel sizes of {_some(changed)}")


def _sizes(results: Results) -> dict[str, list[tuple[str, str]]]:
    """Of each volume what follows from its voxel size: the unit, and the volumes of the labels to nine digits."""
    found: dict[str, list[tuple[str, str]]] = {}
    for row in results.rows:
        if isinstance(row.score, Score) and row.score.protocol == "strict":
            found.setdefault(row.case, []).append((row.score.distance_unit, f"{row.score.label_ml:.9g}"))
    return found


def _some(cases: set[str]) -> str:
    names = sorted(cases)
    return ", ".join(names[:SHOWN]) + f" … ({len(names)} cases)" * (len(names) > SHOWN)


def values_of(results: Results, metric: str, structure: str) -> dict[str, float]:
    """By case, of the strict protocol where there are several; NaN too for a distance in another unit than most."""
    unit = _unit(results)
    return {
        row.case: math.nan
        if isinstance(row.score, Score) and metric in DISTANCES and row.score.distance_unit != unit
        else getattr(row.score, metric)
        for row in results.rows
        if row.structure == structure and getattr(row.score, "protocol", "strict") == "strict"
    }


def _unit(results: Results) -> str:
    protocols = results.summary.protocols
    return (protocols.get("strict") or next(iter(protocols.values()))).distance_unit


def _compare(first: Results, other: Results) -> Comparison:
    differences: list[Difference] = []
    changes: list[Change] = []
    undefined = 0
    kind, classes = first.summary.kind, first.summary.classes
    for metric, (_, _, more) in COMPARED[kind].items():
        found = []
        for structure in classes:
            before, after = (values_of(results, metric, structure) for results in (first, other))
            both = [case for case in before if not math.isnan(before[case]) and not math.isnan(after[case])]
            undefined += sum(math.isnan(before[case]) != math.isnan(after[case]) for case in before)
            change = np.array([after[case] - before[case] for case in both])
            found.append(difference(metric, structure, change, more))
            if metric == next(iter(COMPARED[kind])):
                changes += [Change(case, structure, before[case], after[case]) for case in both]
        differences += _holm(found)
    changes.sort(key=lambda change: -abs(change.after - change.before))
    notes = tuple(
        f"{results.folder}: post-processed, {results.summary.postprocess} component of each class"
        for results in (first, other)
        if results.summary.postprocess != "none"
    )
    names = str(first.folder), str(other.folder)
    return Comparison(*names, kind, _unit(first), tuple(differences), tuple(changes), undefined, notes)


def difference(metric: str, structure: str, change: np.ndarray, more: bool) -> Difference:
    """What the changes of single cases come to; `more` where more is better.

    Example:
        >>> difference("dice", "liver", np.array([0.1, 0.1, 0.1]), more=True).better
        3
    """
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
    return [replace(one, p_holm=None if one.p is None else next(corrected)) for one in found]


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
