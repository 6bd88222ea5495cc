"""`python -m evaluation compare`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from evaluation.__main__ import main
from evaluation.cases import Measuring
from evaluation.compare import compare, holm
from evaluation.intervals import interval
from evaluation.results import read_results, write_results
from evaluation.scores import ImageScores, Scores, VolumeScores
from evaluation.tables import comparison_table
from tests.evaluation.test_scores import label_map
from transforms import InputError

CASES = 14


def write(folder: Path, noise: float, scores: Scores | None = None, cases: int = CASES, shift: int = 0) -> Path:
    """Evaluates noisy copies of the same labels; the more noise, the worse."""
    scores = scores or VolumeScores(["a", "b"])
    rng = np.random.default_rng(1)
    for case in range(cases):
        label = np.roll(label_map(case, (4, 16, 16), 2), shift, 2)
        label = label[0] if scores.kind == "images" else label
        prediction = np.where(rng.random(label.shape) < noise * (1 + case % 3), 0, label)
        scores.add(f"case{case:02d}", prediction, label)
    write_results(folder, scores.summary(), scores.rows())
    return folder


def dices(folder: Path, name: str) -> np.ndarray:
    rows = [
        row
        for row in read_results(folder).rows
        if row.structure == name and getattr(row.score, "protocol", "") != "paper"
    ]
    return np.array([row.score.dice for row in rows])


def test_differences_are_those_of_the_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write(tmp_path / "A", 0.2), write(tmp_path / "B", 0.05)
    main(["compare", str(first), str(second), "--output", str(tmp_path / "C")])
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "C" / "comparison.json").read_text())
    (comparison,) = found["comparisons"]
    assert found["format"] == 1
    one, other = (one for one in comparison["differences"] if one["metric"] == "dice")
    p = []
    for difference, name in ((one, "a"), (other, "b")):
        change = dices(second, name) - dices(first, name)
        p.append(stats.wilcoxon(change).pvalue)
        assert difference["structure"] == name
        assert (difference["n"], difference["mean"]) == (CASES, pytest.approx(change.mean()))
        assert (difference["low"], difference["high"]) == pytest.approx(interval(tuple(change.tolist())))
        assert difference["p"] == pytest.approx(p[-1])
        assert (difference["better"], difference["worse"]) == ((change > 0).sum(), (change < 0).sum())
        assert difference["better"] > difference["worse"]
    assert [one["p_holm"], other["p_holm"]] == pytest.approx(holm(p))
    sizes = [abs(change["after"] - change["before"]) for change in comparison["changes"]]
    assert len(sizes) == 10
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == max(np.abs(dices(second, name) - dices(first, name)).max() for name in "ab")
    assert "Dice %, a" in printed
    assert "Caution: with fewer than 50 cases" in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 120


def test_shorter_distances_are_better(tmp_path: Path) -> None:
    scores = [VolumeScores(["a"]), VolumeScores(["a"])]
    label = np.zeros((4, 20, 20), int)
    label[:, 5:9, 5:9] = 1
    for case in range(5):
        for each, shift in zip(scores, (4, 1), strict=True):
            each.add(str(case), np.roll(label, shift, 2), label)
    for each, folder in zip(scores, "AB", strict=True):
        write_results(tmp_path / folder, each.summary(), each.rows())
    (found,) = compare([read_results(tmp_path / folder) for folder in "AB"])
    (hd95,) = (one for one in found.differences if one.metric == "hd95")
    assert (hd95.mean, hd95.better, hd95.worse) == (-3, 5, 0)


def test_equal_results_have_no_p(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, third = write(tmp_path / "A", 0.2), write(tmp_path / "B", 0.2), write(tmp_path / "C", 0.1)
    same, other = compare([read_results(folder) for folder in (first, second, third)])
    assert {(one.p, one.better, one.worse) for one in same.differences} == {(None, 0, 0)}
    assert {one.mean for one in same.differences if one.metric == "dice"} == {0}
    assert "Dice % is the same in every case" in comparison_table(same)
    assert all(one.p is not None for one in other.differences if one.metric == "dice")


def test_a_structure_that_only_one_finds_is_counted(tmp_path: Path) -> None:
    scores = [VolumeScores(["a"]), VolumeScores(["a"])]
    label = label_map(0, (4, 16, 16), 1)
    for each, factor in zip(scores, (0, 1), strict=True):
        each.add("x", label * factor, label)
        write_results(tmp_path / str(factor), each.summary(), each.rows())
    (found,) = compare([read_results(tmp_path / folder) for folder in "01"])
    by_metric = {one.metric: one for one in found.differences}
    assert (by_metric["dice"].n, by_metric["hd95"].n, by_metric["hd95"].mean) == (1, 0, None)
    assert "one of the two has no such number: 3 values" in comparison_table(found)  # precision, HD95, ASSD


def test_images_are_compared_too(tmp_path: Path) -> None:
    first, second = (write(tmp_path / name, noise, ImageScores(["a", "b"])) for name, noise in (("A", 0.2), ("B", 0)))
    (found,) = compare([read_results(first), read_results(second)])
    assert found.differences[0].metric == "iou"
    assert found.differences[0].worse == 0


OTHERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "cases": (lambda path: write(path, 0.1, cases=CASES - 1), "lacks case13, so other cases"),
    "labels": (lambda path: write(path, 0.1, shift=1), "other labels of case00, case01, case02 … (14 cases)"),
    "classes": (lambda path: write(path, 0.1, VolumeScores(["a", "c"])), "classes a, c, others"),
    "kind": (lambda path: write(path, 0.1, ImageScores(["a", "b"])), "an evaluation of images, another kind"),
    "rules": (
        lambda path: write(path, 0.1, VolumeScores(["a", "b"], missed_distance="diagonal")),
        "other rules of 'strict' (\"in the label only (missed): Dice 0, HD95 and ASSD the image's diagonal\", not",
    ),
    "tolerance": (
        lambda path: write(path, 0.1, VolumeScores(["a", "b"], measuring=Measuring((1.0,)))),
        "other rules of 'strict' (\"surface Dice at 1 mm",
    ),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_was_made_otherwise_is_refused(other: str, tmp_path: Path) -> None:
    make, message = OTHERS[other]
    first, second = write(tmp_path / "A", 0.2), make(tmp_path / "B")
    with pytest.raises(SystemExit) as error:
        main(["compare", str(first), str(second)])
    assert str(error.value).startswith(f"error: {second}: {message}")
    assert f"than {first}" in str(error.value)


def test_post_processing_and_engine_may_differ_and_are_said(tmp_path: Path) -> None:
    first = write(tmp_path / "A", 0.2)
    second = write(tmp_path / "B", 0.2, VolumeScores(["a", "b"], measuring=Measuring((2.0,), "medpy", "largest")))
    (found,) = compare([read_results(first), read_results(second)])
    assert f"{second}: post-processed, largest component of each class" in comparison_table(found)


def shifted(spacings: list[tuple[float, ...] | None], shift: int) -> VolumeScores:
    scores = VolumeScores(["a"])
    label = label_map(0, (4, 16, 16), 1)
    for case, spacing in enumerate(spacings):
        scores.add(str(case), np.roll(label, shift, 2), label, spacing)
    return scores


def test_other_voxel_sizes_are_refused_and_units_are_not_mixed(tmp_path: Path) -> None:
    sizes: dict[str, list[tuple[float, ...] | None]] = {
        "none": [None, None], "mm": [(3, 1, 1), (3, 1, 1)], "others": [(3, 1, 1), (2, 1, 1)],
        "mixed": [(3, 1, 1), None],
    }  # fmt: skip
    for name, spacings in sizes.items():
        for shift in (1, 2):
            scores = shifted(spacings, shift)
            write_results(tmp_path / f"{name}{shift}", scores.summary(), scores.rows())
    results = {path.name: read_results(path) for path in tmp_path.iterdir()}
    for other, what in (("none2", "voxel sizes of 0, 1"), ("others2", "voxel sizes of 1"), ("mixed2", "rules")):
        with pytest.raises(InputError, match=f"other {what}"):
            compare([results["mm1"], results[other]])
    (mixed,), (none,) = (compare([results[f"{name}1"], results[f"{name}2"]]) for name in ("mixed", "none"))
    counts = {one.metric: one.n for one in mixed.differences}
    assert (mixed.unit, counts["dice"], counts["hd95"]) == ("mm", 2, 1)
    assert (none.unit, {one.metric: one.n for one in none.differences}["hd95"]) == ("voxels", 2)
    with pytest.raises(InputError, match="named twice"):
        compare([results["mm1"], results["mm1"]])


def test_what_cannot_be_compared_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="error: .*A.summary.json: does not exist"):
        main(["compare", str(tmp_path / "A"), str(tmp_path / "B")])
    with pytest.raises(SystemExit, match="two or more result folders"):
        main(["compare", str(write(tmp_path / "A", 0.1))])


def test_holm() -> None:
    assert holm([]) == []
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])


@pytest.mark.parametrize("cases", [1, 2])
@pytest.mark.parametrize("kind", [VolumeScores, ImageScores])
def test_one_or_two_cases_are_compared_too(kind: type[Scores], cases: int, tmp_path: Path) -> None:
    folders = [write(tmp_path / name, noise, kind(["a", "b"]), cases) for name, noise in (("A", 0.2), ("B", 0.05))]
    main(["compare", *map(str, folders), "--output", str(tmp_path)])
    (comparison,) = json.loads((tmp_path / "comparison.json").read_text())["comparisons"]
    one = comparison["differences"][0]
    assert (one["n"], one["better"], one["worse"]) == (cases, cases, 0)
    if cases == 1:
        assert (one["low"], one["high"], one["p"]) == (None, None, 1.0)
    else:
        assert one["low"] < one["mean"] < one["high"]
        # no smaller one is possible
        assert one["p"] == 0.5
    assert "too narrow" in (tmp_path / "comparison.html").read_text()
