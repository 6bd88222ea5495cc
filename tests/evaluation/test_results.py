"""What is written, and what docs/formats.md says of it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluation.html import page, pictures_of
from evaluation.plots import anchor
from evaluation.results import read_results, write_results
from evaluation.scores import FORMAT, ImageScores, Scores, VolumeScores
from tests.evaluation.test_html import evaluated
from tests.helpers import rows_of
from transforms import InputError

TEXT = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()


def documented(heading: str) -> list[str]:
    """The names in the first column of the table below a line."""
    table = TEXT.split(f"\n{heading}\n", 1)[1].strip().partition("\n\n")[0]
    return [name for line in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])]


def written(folder: Path, scores: Scores) -> dict[str, Any]:
    for index in range(3):
        maps = np.random.default_rng(index).integers(0, 3, (2, 4, 9, 8)[: 3 + (scores.kind == "volumes")])
        scores.add(f"{index}.png", *maps, (3, 1, 1) if scores.kind == "volumes" else None)
    scores.failures["3.x"] = "3.x: no such file"
    write_results(folder, scores.summary(), scores.rows())
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.parametrize("kind", [VolumeScores, ImageScores])
def test_files_hold_what_formats_md_says(kind: type[Scores], tmp_path: Path) -> None:
    published = {"name": "paper", "dice": {"mean": 80.0}}
    summary = written(tmp_path, kind(["a", "b"], published=published))
    rows = rows_of(tmp_path)
    assert set(rows[0]) == set(documented("Volumes:" if kind is VolumeScores else "Images:"))
    assert {row["format"] for row in rows} == {str(summary["format"])} == {str(FORMAT)}
    assert f"which is {FORMAT} here" in TEXT
    (keys,) = re.findall(r"## summary.json\n\n(.*?)\n\n", TEXT, re.DOTALL)
    assert set(summary) == {
        name for line in keys.splitlines()[2:] for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    for name, protocol in summary["protocols"].items():
        assert f"`{name}`" in TEXT
        assert set(protocol) == set(documented("Of each protocol:"))
        counts = {"missed", "false_alarms", "absent"}
        assert set(protocol["classes"]) == {"a", "b"}
        for result in protocol["classes"].values():
            assert counts < set(result)
            for metric in set(result) - counts:
                assert set(result[metric]) == {"mean", "sd", "n", "low", "high"}
                assert name == "pooled" or metric in rows[0]
        for metric in set(protocol["mean"]) - counts:
            assert set(protocol["mean"][metric]) == {"mean", "classes", "sd_over_cases", "cases", "low", "high"}
    assert summary["published"] == {"name": "paper", "values": {"dice": {"mean": 80.0}}}
    assert summary["failures"] == {"3.x": "3.x: no such file"}
    assert list(summary["labels"]) == ["0", "1", "2"]


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    written(tmp_path, ImageScores(["a", "b"]))
    assert read_results(tmp_path).summary.classes == ("a", "b")
    lines = (tmp_path / "metrics.csv").read_text()
    (tmp_path / "metrics.csv").write_text(lines.replace(f",{FORMAT}\n", ",0\n"))
    with pytest.raises(ValueError, match="not of format"):
        read_results(tmp_path)
    (tmp_path / "metrics.csv").unlink()
    with pytest.raises(ValueError, match=r"metrics.csv: not readable"):
        read_results(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"format": 0}))
    with pytest.raises(ValueError, match="no summary of format"):
        read_results(tmp_path)


@pytest.mark.parametrize("kind", [VolumeScores, ImageScores])
def test_what_is_read_is_what_was_written(kind: type[Scores], tmp_path: Path) -> None:
    scores = kind(["a", "b"], published={"name": "paper", "dice": {"mean": 80.0}})
    written(tmp_path, scores)
    found = read_results(tmp_path)
    assert found.summary == scores.summary()
    # NaN is not equal to itself
    assert [repr(row) for row in found.rows] == [repr(row) for row in scores.rows()]


CHANGES: dict[str, Any] = {
    "versions": None, "classes": 7, "labels": [1], "protocols": {}, "published": {"nmae": "x"}, "cases": "x",
    "extra": 1, "kind": "films",
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_damaged_summaries_are_refused(key: str, tmp_path: Path) -> None:
    summary = written(tmp_path, VolumeScores(["a", "b"]))
    (tmp_path / "summary.json").write_text(json.dumps(summary | {key: CHANGES[key]}))
    with pytest.raises(InputError, match=r"summary.json: (not what an evaluation writes|lacks)"):
        read_results(tmp_path)


@pytest.mark.parametrize("damage", ["twice", "short", "word", "bytes"])
def test_damaged_tables_are_refused(damage: str, tmp_path: Path) -> None:
    written(tmp_path, VolumeScores(["a", "b"]))
    file = tmp_path / "metrics.csv"
    lines = file.read_text().splitlines(keepends=True)
    text = {
        "twice": "".join(lines + lines[1:]),
        "short": "".join(lines[:-1]),
        "word": "".join(lines).replace("0.", "one.", 1),
        "bytes": "\udcff",
    }
    file.write_text(text[damage], errors="surrogateescape")
    with pytest.raises(InputError, match=r"metrics.csv: (holds other cases|not what|not a readable table)"):
        read_results(tmp_path)


def test_pictures_come_back_from_a_report() -> None:
    scores, pictures = evaluated(VolumeScores)
    # a case without picture takes none from its neighbour
    left_out = sorted(pictures)[1]
    text = page(scores.summary(), scores.rows(), {name: one for name, one in pictures.items() if name != left_out})
    assert pictures_of(text) == {anchor(name): one for name, one in pictures.items() if name != left_out}


def test_equal_labels_have_equal_hashes_however_they_are_stored() -> None:
    maps = np.random.default_rng(0).integers(0, 2, (2, 5, 6))
    hashes = set()
    for kind in (np.uint8, np.int16, np.int64, np.float32):
        scores = ImageScores(["a"])
        scores.add("x", maps[0], maps[1].astype(kind))
        hashes |= set(scores.summary().labels.values())
    scores.add("x", maps[0], maps[1].T.copy().reshape(maps[1].shape))
    scores.add("y", maps[0].reshape(6, 5), maps[1].reshape(6, 5))
    assert len(hashes) == 1
    assert len(hashes | set(scores.summary().labels.values())) == 3
