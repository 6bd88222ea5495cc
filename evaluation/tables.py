"""From a summary or a comparison to text for a terminal: functions, nothing else."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence

from evaluation.compare import CHANGES, COMPARED, Comparison, Difference
from evaluation.intervals import FEW_CASES, Mean, MeanOfClasses
from evaluation.scores import DISTANCES, METRICS, Protocol, Published, Summary

LINE_LENGTH = 120

Group = tuple[str, list[tuple[str, list[str]]]]
"""Columns under one heading: the heading, and for each column its header and its cells."""

PERCENT = ("dice", "iou", "precision", "recall", "surface_dice", "threshold_jaccard")
OVERLAPS = {"dice": "Dice %", "iou": "IoU %", "precision": "precision %", "recall": "recall %"}


def table(summary: Summary) -> str:
    """The results for a terminal, with the protocols' rules below.

    Example:
        >>> import numpy as np
        >>> from evaluation.scores import VolumeScores
        >>> scores = VolumeScores(["liver"])
        >>> _ = scores.add("case1.nii.gz", np.ones((2, 3, 4), int), np.ones((2, 3, 4), int))
        >>> print(table(scores.summary()))
        <BLANKLINE>
        Evaluation: 1 case; model selected by: not stated
        ...
        mean of classes  100.00  1         0.00  1        0             0   100.00  1         0.00  1
        ...
    """
    count = f"{summary.cases} case{'s' * (summary.cases != 1)}"
    if summary.failures:
        count += f", {len(summary.failures)} more could not be scored"
    lines = ["", f"{summary.title}: {count}; model selected by: {summary.selection}"]
    if summary.postprocess == "largest":
        lines.append("Post-processed: the largest connected component of each predicted class, nothing else of it.")
    if summary.engine != "fast":
        lines.append(f"Computed by {summary.engine}.")
    grids = _volume_grids(summary) if summary.kind == "volumes" else _image_grids(summary)
    notes = [f"{name}: {protocol.rules}." for name, protocol in summary.protocols.items()]
    notes.append(
        "[low, high]: 95 % interval of the mean over the cases (BCa bootstrap, 10 000 resamples, fixed seed), "
        "N the number of cases in it."
    )
    if summary.cases < FEW_CASES:
        notes.append(
            f"Caution: with fewer than {FEW_CASES} cases such intervals are too narrow; at N = 12 a nominal 95 % "
            "covered the true mean 81 % of the time in a simulation."
        )
    wrapped = [textwrap.fill(note, LINE_LENGTH, subsequent_indent="  ") for note in notes]
    return "\n".join([*lines, "", "\n\n".join(map(grid, grids)), "", *wrapped])


def _volume_grids(summary: Summary) -> list[list[Group]]:
    names: Group = ("", [("class", [*summary.classes, "", "mean of classes"])])
    groups = [names]
    for name, protocol in summary.protocols.items():
        columns = []
        for key, header in (("dice", "Dice %"), ("hd95", f"HD95 {protocol.distance_unit}")):
            columns.append((header, _column(protocol, key, lambda value, key: _plus_minus(value, _factor(key)))))
            columns.append(("N", _column(protocol, key, lambda value, key: str(_count(value)))))
        groups.append((name, columns))
        if name == "strict":
            groups.append(("number of", [_counts(protocol, "missed"), _counts(protocol, "false_alarms")]))
    groups += _published_classes(summary.published, summary.classes)
    strict = summary.protocols["strict"]
    unit = strict.distance_unit
    more = [OVERLAPS, {"hd95": f"HD95 {unit}", "assd": f"ASSD {unit}"}]
    if unit == "mm":
        more[1] |= {"surface_dice": "surface Dice %"}
    tables = [groups]
    for metrics in more:
        columns = []
        for key, header in metrics.items():
            columns.append((f"{header} [95 %]", _column(strict, key, _with_interval)))
            columns.append(("N", _column(strict, key, lambda value, key: str(_count(value)))))
        tables.append([names, ("strict", columns)])
    if unit == "mm":
        volumes = [
            (header, _column(strict, key, lambda value, key: plus_minus(value.mean)))
            for key, header in (("prediction_ml", "predicted"), ("label_ml", "label"), ("difference_ml", "difference"))
        ]
        tables[-1].append(("volume in ml", volumes))
    return tables


def _image_grids(summary: Summary) -> list[list[Group]]:
    each, whole = summary.protocols["per image"], summary.protocols["pooled"]
    surface, threshold = summary.protocols["surface"], summary.protocols["threshold"]
    tolerance = surface.rules.rpartition(": ")[2]
    at = f" at {tolerance.replace('pixels', 'px')}" if "," not in tolerance else ""
    lines: list[tuple[str, ...]] = []
    for name in summary.classes:
        prefix = f"{name}: " if len(summary.classes) > 1 else ""
        if lines:
            lines.append(("",) * 5)
        values: list[tuple[str, str, Protocol, Protocol | None]] = [
            (header, key, each, whole) for key, header in METRICS.items()
        ]
        values.append(("threshold Jaccard %", "threshold_jaccard", threshold, None))
        values.append(("HD95 px", "hd95_px", surface, None))
        values.append((f"surface Dice %{at}", "surface_dice", surface, None))
        for header, key, protocol, other in values:
            value = protocol.classes[name].metrics[key]
            one = other.classes[name].metrics.get(key) if other else None
            factor = 1 if key == "hd95_px" else 100
            cells = _plus_minus(value, factor), _ends(value, factor), str(value.n)
            lines.append((prefix + header, *cells, plus_minus(one.mean, None, 100) if one else ""))
        result = surface.classes[name]
        for header, count in (("missed", result.missed), ("false alarms", result.false_alarms)):
            lines.append((prefix + header, str(count), "", str(summary.cases), ""))
    labels, means, ends, counts, pools = (list(column) for column in zip(*lines, strict=True))
    groups: list[Group] = [
        ("", [("metric", labels)]),
        ("per image", [("mean ± sd", means), ("95 %", ends), ("N", counts)]),
        ("pooled", [("all pixels", pools)]),
    ]
    if summary.published.values and len(summary.classes) == 1:
        known = published_metrics(summary.published, with_sd=False)
        groups.append((summary.published.name, [("", known + [""] * (len(lines) - len(known)))]))
    return [groups]


def comparison_table(comparison: Comparison) -> str:
    """A comparison for a terminal."""
    heads = COMPARED[comparison.kind]
    several = len({one.structure for one in comparison.differences}) > 1
    cells: list[list[str]] = []
    for one in comparison.differences:
        header, factor, _ = heads[one.metric]
        header = f"{header} {comparison.unit}" if one.metric in DISTANCES else header
        if several and cells and cells[-1][0] and one.structure == comparison.differences[0].structure:
            cells.append([""] * 8)
        name = f"{header}, {one.structure}" if several else header
        tests = ["" if p is None else f"{p:.2g}" for p in (one.p, one.p_holm)]
        cells.append([name, *signed(one, factor), str(one.n), *tests, str(one.better), str(one.worse)])
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
    changes = [change for change in comparison.changes[:CHANGES] if change.after != change.before]
    if changes:
        lines += ["", f"{header} changed most:"]
        lines += [
            f"  {change.case}{f', {change.structure}' * several}: {change.before * factor:.2f} → "
            f"{change.after * factor:.2f}"
            for change in changes
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


def signed(difference: Difference, factor: float) -> tuple[str, str]:
    """A mean difference and its interval, each with its sign."""
    mean, low, high = difference.mean, difference.low, difference.high
    ends = "" if low is None or high is None else f"[{low * factor:+.2f}, {high * factor:+.2f}]"
    return "n/a" if mean is None else f"{mean * factor:+.2f}", ends


def published_metrics(published: Published, with_sd: bool) -> list[str]:
    """The published values of single images, in the order of `METRICS`."""
    rows: list[Mapping[str, float]] = [published.values.get(key, {}) for key in METRICS]
    return [plus_minus(row["mean"], row.get("sd") if with_sd else None) if "mean" in row else "" for row in rows]


def plus_minus(mean: float | None, sd: float | None = None, factor: float = 1.0) -> str:
    """`mean ± sd`, both times `factor`, with two decimals; `n/a` without a mean.

    Example:
        >>> plus_minus(0.8125, 0.05, factor=100)
        '81.25 ± 5.00'
    """
    if mean is None:
        return "n/a"
    return f"{mean * factor:.2f}" if sd is None else f"{mean * factor:.2f} ± {sd * factor:.2f}"


def grid(groups: Sequence[Group]) -> str:
    """A text table of groups of columns, the first group flush left. A line of empty cells becomes a rule.

    Example:
        >>> print(grid([("", [("class", ["liver", "aorta"])]), ("strict", [("Dice %", ["94.17", "87.03"])])]))
                strict
        class   Dice %
        --------------
        liver    94.17
        aorta    87.03
    """
    blocks: list[list[str]] = []
    for title, columns in groups:
        cells = [[header, *lines] for header, lines in columns]
        widths = [max(map(len, column)) for column in cells]
        padded = [
            "  ".join(cell.rjust(w) if blocks else cell.ljust(w) for cell, w in zip(row, widths, strict=True))
            for row in zip(*cells, strict=True)
        ]
        width = max(len(title), len(padded[0]))
        blocks.append([title.ljust(width), *(line.rjust(width) if blocks else line.ljust(width) for line in padded)])
    lines = ["   ".join(parts).rstrip() for parts in zip(*blocks, strict=True)]
    rule = "-" * max(map(len, lines))
    return "\n".join([*lines[:2], rule, *(line or rule for line in lines[2:])])


def _column(protocol: Protocol, key: str, cell: Callable[[Mean | MeanOfClasses, str], str]) -> list[str]:
    """The cells of all classes and of their mean."""
    return [
        *(cell(result.metrics[key], key) for result in protocol.classes.values()),
        "",
        cell(protocol.mean[key], key),
    ]


def _counts(protocol: Protocol, key: str) -> tuple[str, list[str]]:
    numbers = [getattr(result, key) for result in protocol.classes.values()]
    return key.replace("_", " "), [*map(str, numbers), "", str(sum(numbers))]


def _published_classes(published: Published, classes: Sequence[str]) -> list[Group]:
    columns = [
        (header, [f"{values[key]:.2f}" if key in values else "" for key in [*classes, "", "mean"]])
        for header, values in (("Dice %", published.values.get("dice")), ("HD95", published.values.get("hd95")))
        if values
    ]
    return [(published.name, columns)] if columns else []


def _factor(key: str) -> int:
    return 100 if key in PERCENT else 1


def _count(value: Mean | MeanOfClasses) -> int:
    return value.n if isinstance(value, Mean) else value.cases


def _plus_minus(value: Mean | MeanOfClasses, factor: float) -> str:
    return plus_minus(value.mean, value.sd if isinstance(value, Mean) else value.sd_over_cases, factor)


def _ends(value: Mean | MeanOfClasses, factor: float) -> str:
    return "" if value.low is None or value.high is None else f"[{value.low * factor:.2f}, {value.high * factor:.2f}]"


def _with_interval(value: Mean | MeanOfClasses, key: str) -> str:
    return f"{plus_minus(value.mean, None, _factor(key))} {_ends(value, _factor(key))}".rstrip()
