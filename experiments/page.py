"""From a table to Markdown, CSV and one page that needs neither network nor script: functions, nothing else."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import DictLoader

from evaluation.compare import COMPARED, Difference
from evaluation.html import ENVIRONMENT
from evaluation.intervals import Mean
from evaluation.plots import Dot, cost_plot
from evaluation.tables import plus_minus, signed
from evaluation.templates import TEMPLATES
from experiments.cost import COUNTED
from experiments.runner import clock
from experiments.table import Row, Section, Table
from transforms import replacing

MARKDOWN, CSV, PAGE = "table.md", "table.csv", "table.html"
COLUMNS = (
    "data", "target", "row", "external", "cells", "of", "metric", "mean", "sd", "low", "high", "cases", "difference",
    "difference_low", "difference_high", "p", "p_holm", "parameters", "macs", "latency_ms", "memory_mib", "best_epoch",
    "epochs", "seconds",
)  # fmt: skip
EXPLAINED = (
    "± is the standard deviation over folds and seeds, each cell counting once; [low, high] the 95 % interval of their"
    " mean (Student). Cells that share training images are not independent, so it is a guide",
    "differences are to the baseline, case by case: each case's mean over the cells that both rows have, with the 95 %"
    " interval of the mean over cases (BCa bootstrap, 10 000 resamples, fixed seed), and p of Wilcoxon's signed-rank"
    " test with Holm's correction over the rows",
)
TABLE = """{% extends "base" %}
{% block body %}
<header>
<h1>{{ table.title }}</h1>
<nav>{% for part in parts %}<a href="#{{ part.id }}">{{ part.title }}</a> · {% endfor %}<a href="#about">How to read
it</a></nav>
</header>
<main>
{% for part in parts %}
<h2 id="{{ part.id }}">{{ part.title }}</h2>
<p class="soft">{{ part.cases }}. Models selected by: {{ part.section.selection }}.
{% if part.section.baseline %}Baseline: {{ part.baseline }}.{% endif %}</p>
<div class="scroll" tabindex="0" role="region" aria-label="accuracy, {{ part.title }}"><table>
<thead><tr><th scope="col">network</th><th scope="col">cells</th>
{% for head in part.heads %}<th scope="col">{{ head }}</th><th scope="col">difference</th>{% endfor %}</tr></thead>
<tbody>
{% for name, marks, cells, numbers in part.lines %}
<tr><th scope="row">{{ name }}{% if marks %}<span>{{ marks }}</span>{% endif %}</th><td>{{ cells }}</td>
{% for mean, ends, change, change_ends, p in numbers %}
<td>{{ mean }}<span>{{ ends }}</span></td><td>{{ change }}<span>{{ change_ends }}</span><span>{{ p }}</span></td>
{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% if part.section.published %}
{% if part.section.published.lines %}
<div class="scroll" tabindex="0" role="region" aria-label="published, {{ part.title }}"><table>
<caption>Beside the published rows ({{ part.section.published.protocol }})</caption>
<thead><tr><th scope="col">network</th>
{% for head in part.section.published.heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in part.section.published.lines %}
<tr><th scope="row">{{ name }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
<ul>
{% for line in part.section.published.verdicts %}
<li>{{ line }}</li>
{% endfor %}
</ul>
{% endif %}
{% if part.costs %}
<div class="scroll" tabindex="0" role="region" aria-label="costs, {{ part.title }}"><table>
<caption>What it costs</caption>
<thead><tr><th scope="col">network</th>
{% for head in cost_heads %}<th scope="col">{{ head }}</th>{% endfor %}</tr></thead>
<tbody>
{% for name, cells in part.costs %}
<tr><th scope="row">{{ name }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if part.plot %}
<p class="soft">Accuracy over cost; the points have the numbers of the rows.</p>
<figure class="fit" aria-label="{{ part.heads[0] }} over GMAC">{{ part.plot | safe }}</figure>
{% endif %}
{% endfor %}
<h2 id="about">How to read it</h2>
<ul>
{% for note in notes %}
<li>{{ note }}.</li>
{% endfor %}
</ul>
<dl>
{% for name, rules in rules.items() %}
<dt>{{ name }}</dt><dd>{{ rules }}.</dd>
{% endfor %}
</dl>
</main>
{% endblock %}
"""
COST_HEADS = ("parameters M", "GMAC", "latency ms", "memory MiB", "best epoch", "time to train")


def write_table(folder: Path, table: Table) -> str:
    """Writes the three files into a folder, each whole or not at all; returns the Markdown and where they are."""
    texts = {MARKDOWN: markdown(table), CSV: as_csv(table), PAGE: page(table)}
    for name, text in texts.items():
        with replacing(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    return f"{texts[MARKDOWN]}\nwritten: {', '.join(str(folder / name) for name in texts)}"


def markdown(table: Table) -> str:
    """The table as Markdown."""
    lines = [f"# {table.title}"]
    for section in table.sections:
        baseline = f" Baseline: {_baseline(section)}." if section.baseline else ""
        lines += ["", f"## {_title(section)}", "",
                  f"{_cases(section)}. Models selected by: {section.selection}.{baseline}", ""]  # fmt: skip
        heads = ["network", "cells"]
        for metric in section.metrics:
            heads += [section.header(metric), "difference", "p (Holm)"]
        body = []
        for row in section.rows:
            marks = _marks(row, section)
            cells = [f"{row.label} ({marks})" if marks else row.label, f"{row.cells}/{row.of}"]
            for metric in section.metrics:
                mean, ends, change, change_ends, p = _cells(row, section, metric)
                cells += [f"{mean} {ends}".strip(), f"{change} {change_ends}".strip(), p.removeprefix("p ")]
            body.append(cells)
        lines += _grid(heads, body)
        if (published := section.published) is not None:
            if published.lines:
                beside = [f"published ({published.protocol})", *published.heads]
                lines += ["", *_grid(beside, [[name, *cells] for name, cells in published.lines])]
            lines += ["", *(f"- {line}" for line in published.verdicts)]
        if costs := _costs(section):
            lines += ["", *_grid(["network", *COST_HEADS], [[name, *cells] for name, cells in costs])]
    return "\n".join([*lines, "", *(f"- {note}." for note in _all_notes(table)), ""])


def _grid(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    cells = [[_escaped(cell) for cell in line] for line in (heads, *body)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def as_csv(table: Table) -> str:
    """One line for each metric of each row; fractions and pixels, an empty field where there is no number."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for section in table.sections:
        for row in section.rows:
            for metric in section.metrics:
                number = row.numbers[metric]
                line: dict[str, Any] = {
                    "data": section.data, "target": section.target, "row": row.name, "external": row.external,
                    "cells": row.cells, "of": row.of, "metric": metric, "mean": number.over_cells.mean,
                    "sd": number.over_cells.sd, "low": number.over_cells.low, "high": number.over_cells.high,
                    "best_epoch": row.best_epoch, "epochs": row.epochs, "seconds": row.seconds,
                }  # fmt: skip
                if (found := number.against) is not None:
                    line |= {"cases": found.n, "difference": found.mean, "difference_low": found.low,
                             "difference_high": found.high, "p": found.p, "p_holm": found.p_holm}  # fmt: skip
                if (cost := row.cost) is not None:
                    line |= {"parameters": cost.parameters, "macs": cost.macs, "latency_ms": cost.latency_ms,
                             "memory_mib": cost.memory_mib}  # fmt: skip
                writer.writerow(line)
    return stream.getvalue()


def page(table: Table) -> str:
    """The table as a page, with a plot of accuracy over cost for each data set."""
    parts = []
    for number, section in enumerate(table.sections, 1):
        metrics = section.metrics
        lines = [
            (f"{place}. {row.label}", _marks(row, section), f"{row.cells}/{row.of}",
             [_cells(row, section, metric) for metric in metrics])
            for place, row in enumerate(section.rows, 1)
        ]  # fmt: skip
        parts.append(
            {
                "id": f"s{number}",
                "title": _title(section),
                "section": section,
                "baseline": _baseline(section),
                "cases": _cases(section),
                "heads": [section.header(metric) for metric in metrics],
                "lines": lines,
                "costs": _costs(section),
                "plot": _plot(section, f"s{number}"),
            }
        )
    rules = {name: text for section in table.sections for name, text in section.rules.items()}
    environment = ENVIRONMENT.overlay(loader=DictLoader({**TEMPLATES, "table": TABLE}))
    return environment.get_template("table").render(
        title=table.title, table=table, parts=parts, cost_heads=COST_HEADS, notes=_all_notes(table), rules=rules
    )


def _plot(section: Section, prefix: str) -> str:
    """Over multiply-accumulates, by the numbers of the rows; those whose cost is not known are not on it."""
    metric = section.metrics[0]
    factor = COMPARED[section.kind][metric][1]
    dots = []
    for place, row in enumerate(section.rows, 1):
        mean, cost = row.numbers[metric].over_cells, row.cost
        if mean.mean is None or cost is None or not cost.macs:
            continue
        ends = (math.nan, math.nan) if mean.sd is None else (mean.mean - mean.sd, mean.mean + mean.sd)
        dots.append(Dot(str(place), cost.macs / 1e9, factor * mean.mean, *(factor * end for end in ends)))
    return cost_plot("GMAC of one image", f"{section.header(metric)}, mean ± sd", dots, prefix) if dots else ""


def _title(section: Section) -> str:
    return f"{section.data}, zero-shot on {section.target}" if section.target else section.data


def _marks(row: Row, section: Section) -> str:
    said = (("external", row.external), ("baseline", row.name == section.baseline))
    return ", ".join(word for word, applies in said if applies)


def _cases(section: Section) -> str:
    return f"{section.cases} case{'s' * (section.cases != 1)}"


def _baseline(section: Section) -> str:
    return next((row.label for row in section.rows if row.name == section.baseline), "")


def _cells(row: Row, section: Section, metric: str) -> tuple[str, str, str, str, str]:
    """Mean ± sd, its interval, difference, its interval, p."""
    number, factor = row.numbers[metric], COMPARED[section.kind][metric][1]
    against = _against(number.against, factor)
    return plus_minus(number.over_cells.mean, number.over_cells.sd, factor), _ends(number.over_cells, factor), *against


def _ends(mean: Mean, factor: float) -> str:
    if mean.low is None or mean.high is None:
        return ""
    return f"[{mean.low * factor:.2f}, {mean.high * factor:.2f}]".replace("-", "−")


def _against(found: Difference | None, factor: float) -> tuple[str, str, str]:
    if found is None:
        return "", "", ""
    change, ends = (text.replace("-", "−") for text in signed(found, factor))
    return change, ends, "" if found.p_holm is None else f"p {found.p_holm:.2g}"


def _costs(section: Section) -> list[tuple[str, list[str]]]:
    """The lines of the table of costs, which stands with a data set's own test parts."""
    if section.target:
        return []
    lines = []
    for row in section.rows:
        if row.cost is None:
            continue
        cost = row.cost
        macs = "n/a" if cost.macs is None else f"{cost.macs / 1e9:.3g}"
        best = "n/a" if row.best_epoch is None else f"{row.best_epoch:.0f} of {row.epochs}"
        lines.append((row.label, [
            f"{cost.parameters / 1e6:.3g}", macs, _rounded(cost.latency_ms), _rounded(cost.memory_mib), best,
            "n/a" if row.seconds is None else clock(row.seconds),
        ]))  # fmt: skip
    return lines


def _rounded(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _all_notes(table: Table) -> list[str]:
    notes = [*EXPLAINED, COUNTED, *table.notes]
    why = {row.label: row.cost.why for section in table.sections for row in section.rows if row.cost and row.cost.why}
    notes += [f"no MACs of {name}: {reason}" for name, reason in sorted(why.items())]
    if facts := table.machine:
        what = (
            facts.get("gpu")
            if facts["device"] == "cuda"
            else f"{facts['cpu']}, {facts['threads']} thread{'s' * (facts['threads'] != 1)}"
        )
        load = "" if facts.get("load") is None else f", load of the machine {facts['load']}"
        notes.append(
            f"latency and memory: one image, {what}, torch {facts['torch']}, all networks in one run in turns on"
            f" {facts['date']}{load}; memory is what loading the network and one forward pass add at their peak"
        )
    return notes
