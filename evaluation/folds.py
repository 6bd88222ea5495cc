"""`python -m evaluation.folds DIR DIR …`: mean ± sd over runs, as on several splits, beside the published row.

Each DIR holds the `summary.json` of one evaluation of single images.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evaluation.intervals import spread
from evaluation.results import read_summary
from evaluation.scores import METRICS, Published, Summary
from evaluation.tables import LINE_LENGTH, Group, grid, plus_minus, published_metrics
from transforms import InputError, replacing

PROTOCOLS = ("per image", "pooled")
SPREAD = "± is the sample standard deviation (n − 1) over the runs, each counting once, and N their number."


def summarise(folders: Sequence[Path]) -> dict[str, Any]:
    """What the runs in `folders` have in common, and for each protocol the metrics' mean, sd and n over the runs.

    Raises:
        InputError: when a summary is missing, unreadable, or of another evaluation than the first; it names the folder.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from evaluation.results import write_results
        >>> from evaluation.scores import ImageScores
        >>> with TemporaryDirectory() as folder:
        ...     scores = ImageScores(["lesion"])
        ...     _ = scores.add("a.png", np.array([[1, 0]]), np.array([[1, 0]]))
        ...     write_results(folder, scores.summary(), scores.rows())
        ...     summarise([Path(folder)])["protocols"]["pooled"]["metrics"]["iou"]
        {'mean': 1.0, 'sd': None, 'n': 1}
    """
    summaries = [_read(folder) for folder in folders]
    first = summaries[0]
    for folder, summary in zip(folders, summaries, strict=True):
        for key in ("classes", "selection", "published"):
            own, other = getattr(summary, key), getattr(first, key)
            if own != other:
                raise InputError(f"{key} {own!r} differs from {other!r} of {folders[0]}", path=folder)
    protocols = {}
    for name in PROTOCOLS:
        means = [summary.protocols[name].mean for summary in summaries]
        metrics = {key: _spread([mean[key].mean for mean in means]) for key in METRICS if key in means[0]}
        protocols[name] = {"rules": first.protocols[name].rules, "metrics": metrics}
    runs = [
        {"folder": str(folder), "title": summary.title, "cases": summary.cases}
        for folder, summary in zip(folders, summaries, strict=True)
    ]
    common = {"classes": first.classes, "selection": first.selection, "published": asdict(first.published)}
    return {"runs": runs, **common, "spread": SPREAD, "unit": "fraction", "protocols": protocols}


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal, in per cent."""
    heading = f"{len(summary['runs'])} runs; model selected by: {summary['selection']}"
    lines = [f"  {run['folder']}: {run['title']}, {run['cases']} cases" for run in summary["runs"]]
    groups: list[Group] = [("", [("metric", list(METRICS.values()))])]
    for name, result in summary["protocols"].items():
        values = [result["metrics"].get(key) for key in METRICS]
        cells = [plus_minus(value["mean"], value["sd"], 100) if value else "" for value in values]
        groups.append((name, [("mean ± sd", cells), ("N", [str(value["n"]) if value else "" for value in values])]))
    published = Published(**summary["published"])
    if published.values and len(summary["classes"]) == 1:
        groups.append((published.name, [("", published_metrics(published, with_sd=True))]))
    notes = [f"{name}: {result['rules']}." for name, result in summary["protocols"].items()]
    wrapped = [textwrap.fill(note, LINE_LENGTH, subsequent_indent="  ") for note in [SPREAD, *notes]]
    return "\n".join(["", heading, *lines, "", grid(groups), "", *wrapped])


def _spread(means: Sequence[float | None]) -> dict[str, Any]:
    """Of three runs or so there is no interval to give."""
    found = spread([mean for mean in means if mean is not None])
    return {"mean": found.mean, "sd": found.sd, "n": found.n}


def _read(folder: Path) -> Summary:
    summary = read_summary(folder)
    if summary.kind != "images":
        raise InputError("no summary of an evaluation of single images", path=folder / "summary.json")
    return summary


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m evaluation.folds", description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="folder with the summary.json of one run")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the numbers there, as JSON")
    options = parser.parse_args(arguments)
    try:
        if len({folder.resolve() for folder in options.folders}) < len(options.folders):
            raise InputError("a folder is named twice: each run counts once")
        summary = summarise(options.folders)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(table(summary))
    if options.output:
        with replacing(options.output) as path:
            path.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
