"""What an evaluation leaves in a folder, written whole or not at all, and read again into the same types.

docs/formats.md describes metrics.csv, summary.json and comparison.json for other programs.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from evaluation.compare import CHANGES, Comparison
from evaluation.html import comparison_page, page, pictures_of
from evaluation.intervals import Mean, MeanOfClasses
from evaluation.protocols import ImageScore, Score
from evaluation.scores import FORMAT, Protocol, Published, Results, Row, StructureResult, Summary
from transforms import InputError, replacing

METRICS_FILE, SUMMARY_FILE, REPORT = "metrics.csv", "summary.json", "report.html"
COMPARISON_FILE, COMPARISON_PAGE = "comparison.json", "comparison.html"
PROTOCOLS = {"volumes": {"strict", "paper"}, "images": {"per image", "pooled", "threshold", "surface"}}
COUNTS = ("missed", "false_alarms", "absent")


def write_results(
    directory: str | Path, summary: Summary, rows: Sequence[Row], pictures: Mapping[str, bytes] | None = None
) -> None:
    """Write `metrics.csv`, where an empty field is a value that is not defined, `summary.json` and `report.html`.

    `pictures` of cases are for the page, by the cases' names.
    """
    folder = Path(directory)
    lines = [row.cells() for row in rows]
    with replacing(folder / METRICS_FILE) as path, path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(lines[0]) if lines else ["case"])
        writer.writeheader()
        writer.writerows({key: "" if value != value else value for key, value in line.items()} for line in lines)
    _write_json(folder / SUMMARY_FILE, as_dict(summary))
    with replacing(folder / REPORT) as path:
        path.write_text(page(summary, rows, pictures), encoding="utf-8")


def write_comparisons(directory: Path, comparisons: Sequence[Comparison], results: Sequence[Results]) -> None:
    """Write `comparison.json` and `comparison.html`, with the pictures of the compared reports."""
    found = [asdict(one) | {"changes": [asdict(change) for change in one.changes[:CHANGES]]} for one in comparisons]
    _write_json(directory / COMPARISON_FILE, {"format": FORMAT, "comparisons": found})
    pictures = [read_pictures(one.folder) for one in results]
    with replacing(directory / COMPARISON_PAGE) as path:
        path.write_text(comparison_page(comparisons, results, pictures), encoding="utf-8")


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    with replacing(file) as path:
        path.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def as_dict(summary: Summary) -> dict[str, Any]:
    """What `summary.json` holds: the summary, metrics and counts of a class side by side."""
    found = asdict(summary)
    for protocol in found["protocols"].values():
        for result in protocol["classes"].values():
            result |= result.pop("metrics")
        for count in COUNTS:
            protocol["mean"][count] = sum(result[count] for result in protocol["classes"].values())
    return found


def read_summary(folder: Path) -> Summary:
    """The summary in a result folder.

    Raises:
        InputError: when there is none, or none of this format.
    """
    path = folder / SUMMARY_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError("does not exist", path=path, remedy="name a folder that an evaluation has written") from error
    except (OSError, ValueError) as error:
        raise InputError(f"not a readable summary ({error})", path=path) from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(f"no summary of format {FORMAT}", path=path, remedy="evaluate that run again")
    try:
        return _summary(found)
    except KeyError as error:
        raise InputError(f"lacks {error}", path=path, remedy="evaluate that run again") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(f"not what an evaluation writes ({error})", path=path) from error


def _summary(found: Mapping[str, Any]) -> Summary:
    """The inverse of `as_dict`."""
    protocols = {}
    for name, protocol in found["protocols"].items():
        classes = {
            structure: StructureResult(
                {key: Mean(**_numbers(value)) for key, value in result.items() if key not in COUNTS},
                *(int(result[count]) for count in COUNTS),
            )
            for structure, result in protocol["classes"].items()
        }
        mean = {key: MeanOfClasses(**_numbers(value)) for key, value in protocol["mean"].items() if key not in COUNTS}
        protocols[name] = Protocol(str(protocol["rules"]), str(protocol["distance_unit"]), classes, mean)
    if set(protocols) != PROTOCOLS[found["kind"]]:
        raise ValueError(f"protocols {', '.join(protocols)}")
    changed = {
        "cases": int(found["cases"]),
        "failures": dict(found["failures"]),
        "versions": dict(found["versions"]),
        "classes": tuple(found["classes"]),
        "files": tuple(found["files"]),
        "labels": dict(found["labels"]),
        "protocols": protocols,
        "published": Published(**found["published"]),
        "weights": {str(name): str(value) for name, value in found.get("weights", {}).items()},
        "data": str(found.get("data", "")),
    }
    return Summary(**dict(found) | changed)


def _numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: None if value is None else value + 0 for key, value in values.items()}


def read_results(folder: Path) -> Results:
    """A result folder.

    Raises:
        InputError: when a file is missing, or of another format.
    """
    summary = read_summary(folder)
    path = folder / METRICS_FILE
    kind = Score if summary.kind == "volumes" else ImageScore
    try:
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"not readable ({error.strerror})", path=path, remedy="evaluate that run again") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"not a readable table ({error})", path=path, remedy="evaluate that run again") from error
    if {line.get("format") for line in lines} - {str(FORMAT)}:
        raise InputError(f"not of format {FORMAT}", path=path, remedy="evaluate that run again")
    try:
        rows = tuple(Row(line["case"], line["class"], _score(kind, line)) for line in lines)
    except KeyError as error:
        raise InputError(f"lacks the column {error}", path=path, remedy="evaluate that run again") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"not what an evaluation writes ({error})", path=path) from error
    protocols = ("strict", "paper") if summary.kind == "volumes" else ("",)
    expected = {(case, name, one) for case in summary.labels for name in summary.classes for one in protocols}
    found = [(row.case, row.structure, getattr(row.score, "protocol", "")) for row in rows]
    if set(found) != expected or len(found) != len(expected):
        raise InputError(f"holds other cases than {SUMMARY_FILE}", path=path, remedy="evaluate that run again")
    return Results(folder, summary, rows)


def _score(kind: type[Score] | type[ImageScore], line: Mapping[str, str]) -> Score | ImageScore:
    readers: dict[Any, Callable[[str], Any]] = {"float": lambda text: float(text or "nan"), "int": int}
    return kind(**{field.name: readers.get(field.type, str)(line[field.name]) for field in fields(kind)})


def read_pictures(folder: Path) -> Mapping[str, bytes]:
    """The pictures of a folder's report, by the cases' anchors; none where there is no report to read."""
    try:
        return pictures_of((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
