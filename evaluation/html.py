"""From a summary to one page that needs neither network nor script: functions, nothing else."""

from __future__ import annotations

import base64
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jinja2 import Environment
from matplotlib import rc_context
from matplotlib.figure import Figure

from evaluation.protocols import ImageScore
from evaluation.scores import DISTANCES, FEW_CASES, METRICS, Mean, MeanOfClasses, Published, Row, Summary
from evaluation.tables import PERCENT, plus_minus

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
# of all pictures, as letters; the cases that scored best go without where it is not enough
PICTURES_BYTES = 1_600_000
IN_CARDS = {"volumes": ("dice", "hd95", "surface_dice"), "images": ("iou", "dice", "hd95_px", "surface_dice")}
ODD = ("missed", "false alarm", "absent")


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
        >>> from evaluation.scores import ImageScores
        >>> scores = ImageScores(["lesion"], title="<phantoms>")
        >>> _ = scores.add("a.png", np.eye(3, dtype=int), np.eye(3, dtype=int))
        >>> text = page(scores.summary(), scores.rows())
        >>> "<h1>&lt;phantoms&gt;</h1>" in text, "http" in text
        (True, False)
    """
    rows = [row for row in rows if isinstance(row.score, ImageScore) or row.score.protocol == "strict"]
    tables = []
    for name, protocol in summary.protocols.items():
        keys = list(protocol.mean)
        heads = [_title(key, protocol.distance_unit) for key in keys]
        lines = [(structure, [_cell(key, result.metrics[key]) for key in keys])
                 for structure, result in protocol.classes.items()]  # fmt: skip
        if len(summary.classes) > 1:
            lines.append(("mean of classes", [_cell(key, protocol.mean[key]) for key in keys]))
        tables.append({"name": name, "rules": protocol.rules, "heads": heads, "lines": lines})
    odd = [
        (status, sorted({(row.case, row.structure) for row in rows if row.score.status == status})) for status in ODD
    ]
    unit = next(iter(summary.protocols.values())).distance_unit
    plots = [(_title(metric, unit), _plot(rows, summary.classes, metric, unit)) for metric in PLOTTED[summary.kind]]
    cards = _cards(rows, summary.kind, pictures or {})
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    return template.render(
        summary=summary,
        tables=tables,
        plots=[(title, plot) for title, plot in plots if plot],
        cards=cards,
        left_out=len(pictures or {}) - sum(bool(card.picture) for card in cards),
        heads=[_title(metric, unit) for metric in IN_CARDS[summary.kind]],
        odd=[(status, [(case, _anchor(case), name) for case, name in found]) for status, found in odd if found],
        published=_published(summary.published),
        few=summary.cases < FEW_CASES,
        few_cases=FEW_CASES,
    )


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
    return plus_minus(value.mean, sd, factor), ends, number


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
        cards.append((mean, name, Card(name, _anchor(name), score, lines, picture, alt)))
    room, shown = PICTURES_BYTES, []
    for _, _, card in sorted(cards, key=lambda one: one[:2]):
        room -= len(card.picture)
        shown.append(card if room >= 0 else replace(card, picture=""))
    return shown


def _number(row: Row, metric: str) -> str:
    value = getattr(row.score, metric)
    return "" if math.isnan(value) else f"{value * _factor(metric):.2f}"


def _anchor(case: str) -> str:
    """An id for a case, whatever its name."""
    plain = (letter if letter.isalnum() and letter.isascii() else f"_{ord(letter):x}_" for letter in case)
    return f"case-{''.join(plain)}"


def _plot(rows: Sequence[Row], classes: Sequence[str], metric: str, unit: str) -> str:
    """Box plots of a metric for each class, each case a point that links to it; empty where nothing is scored."""
    factor = _factor(metric)
    values = [
        [(row.case, getattr(row.score, metric) * factor) for row in rows
         if row.structure == name and not math.isnan(getattr(row.score, metric))]
        for name in classes
    ]  # fmt: skip
    if not any(values):
        return ""
    rng = np.random.default_rng(0)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": metric, "font.family": "sans-serif"}):
        figure = Figure(figsize=(max(3.6, 1.0 + 0.9 * len(classes)), 3.2))
        axes = figure.add_axes((0.14, 0.3, 0.84, 0.66))
        axes.boxplot([[value for _, value in found] for found in values], showfliers=False, widths=0.5)
        for place, found in enumerate(values, 1):
            spread = place + rng.uniform(-0.16, 0.16, len(found))
            points = axes.scatter(spread, [value for _, value in found], s=14, alpha=0.55, color="#2a6fbb")
            points.set_urls([f"#{_anchor(case)}" for case, _ in found])
        # a $ in a name begins no formula
        axes.set_xticks(range(1, len(classes) + 1), classes, rotation=30, ha="right", parse_math=False)
        axes.set_ylabel(_title(metric, unit))
        axes.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = stream.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    # what browsers know without it
    svg = re.sub(r'\s(xmlns:xlink|xmlns|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    # the page's own ink, in dark mode too
    svg = svg.replace("#000000", "currentColor").replace("<text ", '<text fill="currentColor" ')
    # ids are of the whole page
    return re.sub(r'(id="|href="#|url\(#)(?!case-)', rf"\g<1>{metric}-", svg)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ summary.title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1d21; --paper: #fff; --soft: #5c6470; --line: #cdd2d9; --link: #1a5fa8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #14161a; --soft: #a4acb8; --line: #3b414b; --link: #8ab8f0; } }
@media print { :root { --ink: #000; --paper: #fff; --soft: #333; --line: #888; --link: #000; }
  .card { break-inside: avoid; } }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; font: 1rem/1.5 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
a { color: var(--link); } .soft { color: var(--soft); font-size: .9rem; }
.scroll { overflow-x: auto; margin-bottom: 1.2rem; } .card .scroll { margin: .5rem 0 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  overflow-wrap: normal; white-space: nowrap; }
th[scope=row], th:first-child, td.text { text-align: left; } caption { text-align: left; font-weight: 600; }
td span { display: block; color: var(--soft); font-size: .85rem; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; max-width: 100%; overflow-x: auto; }
svg { max-width: max(100%, 36rem); height: auto; } svg a:hover, svg a:focus { opacity: .6; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .7rem; min-width: 0; }
.card:target { outline: 3px solid var(--link); } .card h3 { margin: 0 0 .4rem; font-size: 1rem; }
summary { cursor: zoom-in; list-style: none; } summary::-webkit-details-marker { display: none; }
summary img { display: block; height: 9rem; max-width: 100%; object-fit: contain; }
.card:has(details[open]) { grid-column: 1 / -1; } details[open] img { width: 100%; height: auto; max-width: 40rem; }
</style>
</head>
<body>
<header>
<h1>{{ summary.title }}</h1>
<p>{{ summary.cases }} case{{ "" if summary.cases == 1 else "s" }}{% if summary.failures %},
{{ summary.failures | length }} more could not be scored{% endif %}. Model selected by: {{ summary.selection }}.</p>
{% if summary.postprocess != "none" %}
<p><strong>Post-processed:</strong> the largest connected component of each predicted class, nothing else of it.</p>
{% endif %}
<nav><a href="#results">Results</a> · <a href="#spread">Every case</a> · <a href="#cases">Worst cases first</a> ·
{% if odd %}<a href="#odd">Missed, false alarms, absent</a> ·{% endif %} <a href="#about">Rules and versions</a></nav>
</header>
<main>
<h2 id="results">Results</h2>
<p class="soft">Mean ± standard deviation, below it the 95 % interval of the mean over the cases (BCa bootstrap, 10 000
resamples, fixed seed) and N.{% if few %} <strong>Caution:</strong> with fewer than {{ few_cases }} cases such intervals
are too narrow; at N = 12 a nominal 95 % covered the true mean 81 % of the time in a simulation.{% endif %}</p>
{% for table in tables %}
<div class="scroll" tabindex="0" role="region" aria-label="{{ table.name }}"><table>
<caption>{{ table.name }}</caption>
<thead><tr><th scope="col">class</th>
{% for head in table.heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in table.lines %}
<tr><th scope="row">{{ name }}</th>{% for mean, ends, n in cells %}<td>{{ mean }}<span>{{ ends }} N {{ n }}</span></td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endfor %}
{% if published %}
<p>{{ summary.published.name }}: {% for line in published %}{{ line }}{{ "" if loop.last else "; " }}{% endfor %}.</p>
{% endif %}
<h2 id="spread">Every case</h2>
<p class="soft">Each point is a case and links to it.</p>
<div class="plots">
{% for title, plot in plots %}
<figure aria-label="Box plots of {{ title }} for each class">{{ plot | safe }}</figure>
{% endfor %}
</div>
{% if odd %}
<h2 id="odd">Missed, false alarms, absent</h2>
{% for status, found in odd %}
<h3>{{ status }} ({{ found | length }})</h3>
<ul>
{% for case, anchor, structure in found %}
<li><a href="#{{ anchor }}">{{ case }}</a>: {{ structure }}</li>
{% endfor %}
</ul>
{% endfor %}
{% endif %}
{% if summary.failures %}
<h2 id="failures">Could not be scored</h2>
<ul>
{% for reason in summary.failures.values() %}
<li>{{ reason }}</li>
{% endfor %}
</ul>
{% endif %}
<h2 id="cases">Worst cases first</h2>
<p class="soft">Predicted outlines are coloured, those of the label white and dashed. A picture opens larger.
{% if left_out %}The {{ left_out }} cases that scored best have none, to keep the page small.{% endif %}</p>
<div class="cards">
{% for card in cards %}
<section class="card" id="{{ card.anchor }}">
<h3>{{ card.name }}: {{ card.score }}</h3>
{% if card.picture %}
<details><summary><img alt="{{ card.alt }}" src="data:image/webp;base64,{{ card.picture }}"></summary></details>
{% endif %}
<div class="scroll" tabindex="0" role="region" aria-label="scores of {{ card.name }}"><table>
<thead><tr><th scope="col">class</th>{% for head in heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, status, cells in card.rows %}
<tr><th scope="row">{{ name }}{% if status != "computed" %} ({{ status }}){% endif %}</th>
{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
</section>
{% endfor %}
</div>
<h2 id="about">Rules and versions</h2>
<dl>
{% for table in tables %}
<dt>{{ table.name }}</dt><dd>{{ table.rules }}.</dd>
{% endfor %}
<dt>computed by</dt><dd>{{ summary.engine }}; {% for name, number in summary.versions.items() %}{{ name }} {{ number }}
{{ "" if loop.last else ", " }}{% endfor %}</dd>
</dl>
</main>
</body>
</html>
"""
