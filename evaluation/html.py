"""From a summary or a comparison to one page that needs neither network nor script: functions, nothing else."""

from __future__ import annotations

import base64
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from jinja2 import DictLoader, Environment

from evaluation.compare import CHANGES, COMPARED, Change, Comparison
from evaluation.intervals import FEW_CASES, Mean, MeanOfClasses
from evaluation.plots import Interval, Point, anchor, box_plot, forest_plot, scatter_plot
from evaluation.protocols import ImageScore
from evaluation.scores import DISTANCES, METRICS, Protocol, Published, Results, Row, Summary
from evaluation.tables import PERCENT, plus_minus, signed
from evaluation.templates import TEMPLATES

TITLES = METRICS | {
    "recall": "recall %",
    "surface_dice": "surface Dice %",
    "threshold_jaccard": "threshold Jaccard %",
    "hd95": "HD95",
    "hd95_px": "HD95 px",
    "assd": "ASSD",
    "prediction_ml": "predicted ml",
    "label_ml": "label ml",
    "difference_ml": "difference ml",
}
# of each kind, with the metric that orders the cases first
PLOTTED = {"volumes": ("dice", "hd95", "surface_dice"), "images": ("iou", "dice", "hd95_px")}
# metrics beside each other
COLUMNS = 5
# of all pictures, as letters; the cases that scored best go without where it is not enough
PICTURES_BYTES = 1_600_000
IN_CARDS = {"volumes": ("dice", "hd95", "surface_dice"), "images": ("iou", "dice", "hd95_px", "surface_dice")}
ODD = ("missed", "false alarm", "absent")
ENVIRONMENT = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=DictLoader(TEMPLATES))
_PICTURE = re.compile(
    r'<section class="card" id="(case-\w*)">(?:(?!</section>).)*?src="data:image/webp;base64,([\w+/=]+)"', re.DOTALL
)


@dataclass(frozen=True)
class Card:
    """One case on the page."""

    name: str
    anchor: str
    score: str
    rows: tuple[tuple[str, str, tuple[str, ...]], ...]
    picture: str
    alt: str


def page(summary: Summary, rows: Sequence[Row], pictures: Mapping[str, bytes] | None = None) -> str:
    """The page as HTML, worst cases first.

    Args:
        summary: of the evaluation.
        rows: of the same evaluation.
        pictures: WebP pictures of cases, by the cases' names; see `evaluation.overlay.thumbnail`.

    Example:
        >>> import numpy as np
        >>> from evaluation.scores import ImageScores
        >>> scores = ImageScores(["lesion"], title="<phantoms>")
        >>> _ = scores.add("a.png", np.eye(3, dtype=int), np.eye(3, dtype=int))
        >>> text = page(scores.summary(), scores.rows())
        >>> "<h1>&lt;phantoms&gt;</h1>" in text, "http" in text
        (True, False)
    """
    rows = [row for row in rows if isinstance(row.score, ImageScore) or row.score.protocol == "strict"]
    tables: list[dict[str, object]] = []
    for name, protocol in summary.protocols.items():
        tables += _tables(name, protocol)
    odd = [(status, *_of_status(rows, status)) for status in ODD]
    unit = next(iter(summary.protocols.values())).distance_unit
    plots = []
    for metric in PLOTTED[summary.kind]:
        title, factor = _title(metric, unit), _factor(metric)
        values = {name: _values(rows, name, metric, factor) for name in summary.classes}
        plots.append((title, box_plot(title, values, metric)))
    cards = _cards(rows, summary.kind, pictures or {})
    return ENVIRONMENT.get_template("report").render(
        title=summary.title,
        summary=summary,
        tables=tables,
        plots=[(title, plot) for title, plot in plots if plot],
        cards=cards,
        left_out=len(pictures or {}) - sum(bool(card.picture) for card in cards),
        # the unit stays beside the last word
        heads=["\u00a0".join(_title(metric, unit).rsplit(" ", 1)) for metric in IN_CARDS[summary.kind]],
        odd=[(status, number, found) for status, number, found in odd if found],
        published=_published(summary.published),
        few=summary.cases < FEW_CASES,
        few_cases=FEW_CASES,
    )


def _of_status(rows: Sequence[Row], status: str) -> tuple[int, list[tuple[str, str, list[str]]]]:
    """How many classes of cases have the status, and by case: name, anchor, classes."""
    cases: dict[str, list[str]] = {}
    for row in rows:
        if row.score.status == status:
            cases.setdefault(row.case, []).append(row.structure)
    found = [(case, anchor(case), structures) for case, structures in sorted(cases.items())]
    return sum(map(len, cases.values())), found


def _tables(name: str, protocol: Protocol) -> list[dict[str, object]]:
    """Metrics below each other where there is one class, else beside each other, a few in each table."""
    keys = list(protocol.mean)
    if len(protocol.classes) == 1:
        ((structure, result),) = protocol.classes.items()
        lines = [(_title(key, protocol.distance_unit), [_cell(key, result.metrics[key])]) for key in keys]
        return [{"name": name, "corner": "metric", "heads": [structure], "lines": lines}]
    tables: list[dict[str, object]] = []
    for start in range(0, len(keys), COLUMNS):
        part = keys[start : start + COLUMNS]
        lines = [(structure, [_cell(key, result.metrics[key]) for key in part])
                 for structure, result in protocol.classes.items()]  # fmt: skip
        lines.append(("mean of classes", [_cell(key, protocol.mean[key]) for key in part]))
        heads = [_title(key, protocol.distance_unit) for key in part]
        caption = name if start == 0 else f"{name}, continued"
        tables.append({"name": caption, "corner": "class", "heads": heads, "lines": lines})
    return tables


def _title(metric: str, unit: str = "") -> str:
    title = TITLES.get(metric, metric)
    return f"{title} {unit}" if unit and metric in DISTANCES else title


def _published(row: Published) -> list[str]:
    """One line a metric."""
    lines = []
    for metric, values in row.values.items():
        mean = [plus_minus(values["mean"], values.get("sd"))] if "mean" in values else []
        classes = [f"{name} {value:.2f}" for name, value in values.items() if name not in ("mean", "sd")]
        lines.append(f"{_title(metric)} {', '.join(mean + classes)}")
    return lines


def _factor(metric: str) -> int:
    return 100 if metric in PERCENT or metric in METRICS else 1


def _cell(metric: str, value: Mean | MeanOfClasses) -> tuple[str, str, int]:
    """Mean ± deviation, interval, N."""
    factor = _factor(metric)
    ends = "" if value.low is None or value.high is None else f"[{value.low * factor:.2f}, {value.high * factor:.2f}]"
    sd, number = (value.sd, value.n) if isinstance(value, Mean) else (value.sd_over_cases, value.cases)
    return _minus(plus_minus(value.mean, sd, factor)), _minus(ends), number


def _minus(numbers: str) -> str:
    return numbers.replace("-", "−")


def _cards(rows: Sequence[Row], kind: str, pictures: Mapping[str, bytes]) -> list[Card]:
    """The cases, those with the lowest mean first."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row.case, []).append(row)
    key = PLOTTED[kind][0]
    cards = []
    for name, found in cases.items():
        scored = [getattr(row.score, key) for row in found if not math.isnan(getattr(row.score, key))]
        mean = statistics.fmean(scored) if scored else math.inf
        score = f"{_title(key).removesuffix(' %')} {plus_minus(mean, None, 100)} %" if scored else "not scored"
        lines = tuple(
            (row.structure, row.score.status, tuple(_number(row, metric) for metric in IN_CARDS[kind])) for row in found
        )
        picture = base64.b64encode(pictures[name]).decode() if name in pictures else ""
        alt = f"{name}: predicted outlines (coloured) and those of the label (white, dashed); {score}"
        cards.append((mean, name, Card(name, anchor(name), score, lines, picture, alt)))
    room, shown = PICTURES_BYTES, []
    for _, _, card in sorted(cards, key=lambda one: one[:2]):
        room -= len(card.picture)
        shown.append(card if room >= 0 else replace(card, picture=""))
    return shown


def _number(row: Row, metric: str) -> str:
    value = getattr(row.score, metric)
    return "" if math.isnan(value) else f"{value * _factor(metric):.2f}"


def _values(rows: Sequence[Row], structure: str, metric: str, factor: float) -> list[tuple[str, float]]:
    """(Case, value) of one class where there is a value."""
    found = [(row.case, getattr(row.score, metric) * factor) for row in rows if row.structure == structure]
    return [(case, value) for case, value in found if not math.isnan(value)]


def pictures_of(text: str) -> dict[str, bytes]:
    """The pictures on a page that `page` made, by the anchors of the cases."""
    found = {name: base64.b64decode(letters) for name, letters in _PICTURE.findall(text)}
    return {name: picture for name, picture in found.items() if picture[8:12] == b"WEBP"}


@dataclass(frozen=True)
class Line:
    """One metric of one class on the page of a comparison."""

    name: str
    mean: str
    ends: str
    n: int
    p: str
    p_holm: str
    better: int
    worse: int


def comparison_page(
    comparisons: Sequence[Comparison], results: Sequence[Results], pictures: Sequence[Mapping[str, bytes]] = ()
) -> str:
    """The page as HTML.

    Args:
        comparisons: of each of the results but the first.
        results: what was compared.
        pictures: for each of the results, WebP pictures by the anchors of cases; see `pictures_of`.
    """
    known = list(pictures) or [{}] * len(results)
    parts = []
    short = {str(one.folder): one.folder.name for one in results}
    if len(set(short.values())) < len(short):
        short = {name: name for name in short}
    for number, comparison in enumerate(comparisons, 1):
        heads = COMPARED[comparison.kind]
        first_metric = next(iter(heads))
        shown = [change for change in comparison.changes[:CHANGES] if change.after != change.before]
        cards = _changed(shown, f"c{number}", heads[first_metric][1], (known[0], known[number]))
        parts.append(
            {
                "id": f"c{number}",
                "first": short[comparison.first],
                "second": short[comparison.second],
                "undefined": comparison.undefined,
                "metric": heads[first_metric][0],
                "tables": _difference_tables(comparison),
                "plots": _difference_plots(comparison, f"c{number}", {change.case for change in shown}),
                "cards": cards,
                "pictured": any(card["pictures"] for card in cards),
            }
        )
    cases = results[0].summary.cases
    return ENVIRONMENT.get_template("comparison").render(
        title=f"Comparison with {short[str(results[0].folder)]}",
        cases=cases,
        few=cases < FEW_CASES,
        few_cases=FEW_CASES,
        results=results,
        parts=parts,
    )


def _difference_tables(comparison: Comparison) -> list[dict[str, object]]:
    """One table of all metrics where there is one class, else one for each metric."""
    heads = COMPARED[comparison.kind]
    several = len({one.structure for one in comparison.differences}) > 1
    tables: dict[str, list[Line]] = {}
    for one in comparison.differences:
        title, factor = _title(one.metric, comparison.unit), heads[one.metric][1]
        tests = ["" if p is None else f"{p:.2g}" for p in (one.p, one.p_holm)]
        name = one.structure if several else title
        mean, ends = map(_minus, signed(one, factor))
        line = Line(name, mean, ends, one.n, tests[0], tests[1], one.better, one.worse)
        tables.setdefault(title if several else "", []).append(line)
    return [
        {
            "caption": title or next(iter(comparison.differences)).structure,
            "name": f" of {title}" * bool(title),
            "head": "class" if several else "metric",
            "lines": lines,
        }
        for title, lines in tables.items()
    ]


def _difference_plots(comparison: Comparison, prefix: str, linked: set[str]) -> list[tuple[str, str]]:
    """(What it shows, SVG) of mean differences, by metric where there is one class, else by class; then the cases."""
    heads, unit = COMPARED[comparison.kind], comparison.unit
    several = len({one.structure for one in comparison.differences}) > 1
    groups: dict[tuple[str, bool], list[Interval]] = {}
    for one in comparison.differences:
        title, factor, more = _title(one.metric, unit), heads[one.metric][1], heads[one.metric][2]
        if one.mean is None or (several and one.metric not in PLOTTED[comparison.kind]):
            continue
        ends = (math.nan, math.nan) if one.low is None or one.high is None else (one.low, one.high)
        axis = title if several or not more else "% points"
        name = one.structure if several else title
        groups.setdefault((axis, more), []).append(Interval(name, one.mean * factor, *(end * factor for end in ends)))
    plots: list[tuple[str, str]] = []
    for (axis, more), lines in groups.items():
        label = f"{axis}, second − first ({'right' if more else 'left'}: better)"
        plots.append((f"Mean differences with intervals: {label}", forest_plot(label, lines, f"{prefix}-{len(plots)}")))
    title, factor, _ = next(iter(heads.values()))
    points = [
        Point(
            change.structure,
            change.before * factor,
            change.after * factor,
            f"#{prefix}-{anchor(change.case)}" if change.case in linked else "",
        )
        for change in comparison.changes
    ]
    if points:
        plots.append((f"{title} of every case, first and second", scatter_plot(title, points, f"{prefix}-cases")))
    return plots


def _changed(
    changes: Sequence[Change], prefix: str, factor: float, pictures: Sequence[Mapping[str, bytes]]
) -> list[dict[str, object]]:
    """The cases of the changes, in their order."""
    cases: dict[str, list[Change]] = {}
    for change in changes:
        cases.setdefault(change.case, []).append(change)
    cards: list[dict[str, object]] = []
    for name, found in cases.items():
        shown = [(which, known.get(anchor(name))) for which, known in zip(("first", "second"), pictures, strict=True)]
        cards.append(
            {
                "name": name,
                "anchor": f"{prefix}-{anchor(name)}",
                "pictures": [
                    (f"{name}, {which}: predicted outlines (coloured) and those of the label (white, dashed)",
                     base64.b64encode(picture).decode())
                    for which, picture in shown
                    if picture
                ],
                "rows": [
                    (
                        one.structure,
                        f"{one.before * factor:.2f}",
                        f"{one.after * factor:.2f}",
                        _minus(f"{(one.after - one.before) * factor:+.2f}"),
                    )
                    for one in found
                ],
            }
        )  # fmt: skip
    return cards
