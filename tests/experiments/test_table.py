"""What a table says of finished cells, and what it refuses to compare."""

from __future__ import annotations

import csv
import io
import json
import random
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from evaluation.intervals import interval
from evaluation.results import read_results, write_results
from evaluation.scores import VolumeScores
from experiments.__main__ import main
from experiments.page import as_csv, markdown, page
from experiments.plan import Plan, read_plan
from experiments.table import Row, Section, over_cells, tabulate, verdict
from tests.experiments.conftest import CASES, TINY, MakePlan, content, evaluated, finish
from transforms import InputError

pytestmark = pytest.mark.usefixtures("known_costs")
WRONG = {"BasicUNet": 6, "CMUNeXt": 3, "Third": 9}


def finished(plan: Plan, **more: Any) -> Plan:
    """The same plan with all cells finished; a network has as many wrong pixels as WRONG says."""
    for cell in plan.cells:
        finish(cell, WRONG[cell.network] + (cell.fold or 0), **more)
    return plan


def ious(folder: Path) -> list[float]:
    return [row.score.iou for row in read_results(folder).rows if hasattr(row.score, "iou")]


def row_of(section: Section, name: str) -> Row:
    return next(row for row in section.rows if row.name == name)


def test_rows_are_means_over_cells_and_differences_over_cases(make_plan: MakePlan) -> None:
    plan = finished(make_plan(networks=TINY | {"Third": {"_target_": "BasicUNet"}}, seeds=[41]))
    (section,) = tabulate(plan).sections
    # the best first
    assert [row.label for row in section.rows] == ["CMUNeXt", "BasicUNet", "Third"]
    by_cell = {
        name: [ious(cell.folder / "eval") for cell in plan.cells if cell.network == name] for name in WRONG
    }  # fold 1, fold 2
    means = [statistics.fmean(values) for values in by_cell["CMUNeXt"]]
    found = row_of(section, "recipe/CMUNeXt").numbers["iou"]
    assert found.over_cells.mean == pytest.approx(statistics.fmean(means))
    assert found.over_cells.sd == pytest.approx(statistics.stdev(means))
    low, high = stats.t.interval(0.95, 1, statistics.fmean(means), statistics.stdev(means) / 2**0.5)
    assert (found.over_cells.low, found.over_cells.high) == pytest.approx((low, high))
    p = []
    for name in ("CMUNeXt", "Third"):
        change = np.concatenate([np.subtract(*pair) for pair in zip(by_cell[name], by_cell["BasicUNet"], strict=True)])
        against = row_of(section, f"recipe/{name}").numbers["iou"].against
        assert against is not None
        assert against.n == 2 * CASES
        assert against.mean == pytest.approx(change.mean())
        assert (against.low, against.high) == pytest.approx(interval(tuple(change.tolist())))
        assert against.p == pytest.approx(stats.wilcoxon(change).pvalue)
        p.append((against.p, against.p_holm))
    # Holm: the smaller of two doubled
    (smaller, corrected), (larger, last) = sorted(p)
    assert corrected == pytest.approx(2 * smaller)
    assert last == pytest.approx(max(larger, 2 * smaller))
    baseline = row_of(section, "recipe/BasicUNet")
    assert baseline.numbers["iou"].against is None
    assert (baseline.best_epoch, baseline.epochs, baseline.seconds) == (3, 4, 5)


def test_a_case_that_several_cells_test_counts_once(make_plan: MakePlan) -> None:
    plan = finished(make_plan(zero_shot={"other": "other"}))
    own, other = tabulate(plan).sections
    assert (own.target, other.target) == ("", "other")
    against = row_of(other, "recipe/CMUNeXt").numbers["iou"].against
    assert against is not None
    assert against.n == CASES
    # each case's mean over both folds
    found = {(cell.network, cell.fold): np.array(ious(cell.folder / "zero_shot/other")) for cell in plan.cells}
    change = [(found["CMUNeXt", fold] - found["BasicUNet", fold]).mean() for fold in (1, 2)]
    assert against.mean == pytest.approx(np.mean(change))


def test_few_cells_have_wide_intervals() -> None:
    assert over_cells([]).mean is None
    assert over_cells([0.5]).low is None
    two = over_cells([0.5, 0.6, None])
    assert two.n == 2
    assert two.low is not None
    assert two.low < 0


def test_the_order_of_entries_changes_nothing(make_plan: MakePlan, tmp_path: Path) -> None:
    recipes = {name: {"bundle": "cmunext_busi", "data": "d"} for name in ("a", "b")}
    outside = {name: {"results": {1: str(tmp_path / "outside")}} for name in ("nnU-Net", "Other")}
    said: dict[str, Any] = {
        "bundles": recipes,
        "baseline": "b/CMUNeXt",
        "external": outside,
        "seeds": [1, 2],
        "zero_shot": {"x": "x"},
    }
    evaluated(tmp_path / "outside", 1, 4)
    plan = finished(make_plan(**said))
    (tmp_path / "other").mkdir()
    other = tmp_path / "other/plan.yaml"
    first = tabulate(plan)
    for seed in range(2):
        rng = random.Random(seed)
        shuffled = content(tmp_path, **said)
        for key in ("bundles", "networks", "external"):
            shuffled[key] = dict(rng.sample(sorted(shuffled[key].items()), len(shuffled[key])))
        shuffled["folds"] = rng.sample([1, 2], 2)
        other.write_text(yaml.safe_dump(dict(rng.sample(sorted(shuffled.items()), len(shuffled))), sort_keys=False))
        again = tabulate(read_plan(other))
        assert [render(again) for render in (markdown, as_csv, page)] == [
            render(first) for render in (markdown, as_csv, page)
        ]


def test_what_differs_is_refused_with_a_line_that_names_it(make_plan: MakePlan) -> None:
    plan = make_plan()

    def refused(line: str) -> None:
        with pytest.raises(InputError) as caught:
            tabulate(plan)
        assert line in str(caught.value)
        assert "\n" not in str(caught.value)

    # the last cell is CMUNeXt's on the second fold
    last = finished(plan).cells[-1]
    finish(last, 3, selection="IoU on the reported test images, as published")
    refused("CMUNeXt/fold2-seed41: selected by 'IoU on the reported test images, as published', otherwise (by 'IoU on")
    finish(last, 3, train="b")
    refused("CMUNeXt/fold2-seed41: its train part has trainb.png, and so are other data than ")
    finish(last, 3, optimizer={"lr": 0.1})
    refused("CMUNeXt/fold2-seed41: optimizer#lr 0.1, other (there none) than ")
    finish(last, 3)
    evaluated(last.folder / "eval", 2, 3, shift=1)
    refused("other labels of fold2case0")
    evaluated(last.folder / "eval", 2, 3, cases=CASES - 1)
    refused("lacks fold2case7, so other cases than ")
    evaluated(last.folder / "eval", 2, 3)
    summary = json.loads((last.folder / "eval/summary.json").read_text())
    summary["protocols"]["per image"]["rules"] += "; but not quite"
    (last.folder / "eval/summary.json").write_text(json.dumps(summary))
    refused('other rules of \'per image\' ("but not quite", not "none")')
    evaluated(last.folder / "eval", 2, 3)
    tabulate(plan)


def test_cells_that_are_missing_are_said(make_plan: MakePlan, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan()
    assert main(["table", str(plan.file)]) == 1
    assert "none of its cells is finished; python -m experiments run it first" in capsys.readouterr().err
    for cell in plan.cells[:3]:
        finish(cell, WRONG[cell.network])
    table = tabulate(plan)
    assert any(note.startswith("1 of 4 cells are not finished") for note in table.notes)
    row = row_of(table.sections[0], "recipe/CMUNeXt")
    assert (row.cells, row.of) == (1, 2)
    against = row.numbers["iou"].against
    assert against is not None
    assert against.n == CASES


def test_results_from_elsewhere_are_marked_and_compared(make_plan: MakePlan, tmp_path: Path) -> None:
    for fold in (1, 2):
        evaluated(tmp_path / f"outside{fold}", fold, 2)
    results = {fold: str(tmp_path / f"outside{fold}") for fold in (1, 2)}
    plan = finished(make_plan(external={"nnU-Net": {"results": results}}))
    (section,) = tabulate(plan).sections
    row = section.rows[0]
    assert (row.label, row.external, row.cost, row.cells, row.of) == ("nnU-Net", True, None, 2, 2)
    against = row.numbers["iou"].against
    assert against is not None
    assert against.n == 2 * CASES
    assert "nnU-Net (external)" in markdown(tabulate(plan))
    # of a fold that there is not, of none where there are several, and of other cases
    for folds, line in (({3: results[1]}, "is of fold 3"), ({1: results[2]}, "so other cases")):
        with pytest.raises(InputError, match=line):
            tabulate(make_plan(external={"nnU-Net": {"results": folds}}))
    with pytest.raises(InputError, match=r"names no fold; say results: {FOLD: FOLDER}; the folds are 1, 2"):
        tabulate(make_plan(external={"nnU-Net": {"results": results[1]}}))


PUBLISHED = {
    "protocol": "per image",
    "row": "CMUNeXt",
    "rows": {"paper": {"iou": 70, "iou_sd": 30}, "other": {"f1": 5}},
}


def test_published_rows_stand_beside_ours_with_a_verdict(make_plan: MakePlan, tmp_path: Path) -> None:
    entry = {"bundle": "cmunext_busi", "data": str(tmp_path / "data"), "published": PUBLISHED}
    small = {"scales": {"small": {"expected": {"of": "best IoU", "score": [0.58, 0.6]}}}}
    plan = finished(make_plan(bundles={"recipe": entry}, **small))
    published = tabulate(plan).sections[0].published
    assert published is not None
    assert published.heads == ("IoU %", "F1 %")
    assert [name for name, _ in published.lines] == ["BasicUNet", "CMUNeXt", "paper", "other"]
    assert published.lines[2:] == (("paper", ("70.00 ± 30.00", "")), ("other", ("", "5.00")))
    (line,) = published.verdicts
    assert "(2 runs) is inside the published 70.00 ± 30.00; the published mean is outside ours" in line
    (tmp_path / "data/dataset.json").write_text('{"splits": {"seed": 41}}')
    assert "drawn here (seed 41)" in tabulate(plan).sections[0].published.verdicts[0]
    assert "drawn here (seed 41)" in markdown(tabulate(plan))
    # another scale is no reproduction
    plan = finished(make_plan("small", bundles={"recipe": entry}, **small))
    published = tabulate(plan).sections[0].published
    assert published is not None
    assert published.verdicts[0].endswith("0.5900 is inside what is expected, 0.58 … 0.6: best IoU")
    assert published.verdicts[-1] == "no verdict: the scale 'small' is not the published recipe"
    wrong = PUBLISHED | {"protocol": "strict"}
    plan = finished(make_plan(bundles={"recipe": entry | {"published": wrong}}))
    with pytest.raises(InputError, match="no iou under 'strict'"):
        tabulate(plan)


def test_volumes_are_tested_by_the_strict_protocol_and_published_by_their_own(make_plan: MakePlan) -> None:
    rows = {"paper": {"dice": 81.08, "hd95": 19.21}}
    entry = {"bundle": "vmunet_synapse", "data": "d", "published": {"protocol": "paper", "row": "Own", "rows": rows}}
    networks = {"Own": None, "BasicUNet": {"_target_": "BasicUNet", "spatial_dims": 2}}
    plan = make_plan(bundles={"recipe": entry}, networks=networks, folds=None, baseline="BasicUNet")
    for cell in plan.cells:
        finish(cell, 3)
        scores = VolumeScores(["a", "b"])
        for case in range(4):
            label = np.zeros((2, 6, 6), int)
            label[:, 1:3, 1:4], label[:, 4:, 4:] = 1, 2
            prediction = np.where(label == (2 if case else 3), 0, label)
            prediction[0, 0, : 1 + case + 2 * (cell.network == "Own")] = 1
            scores.add(f"case{case}", prediction, label, (3.0, 1.0, 1.0))
        write_results(cell.folder / "eval", scores.summary(), scores.rows())
    (section,) = tabulate(plan).sections
    assert [section.header(metric) for metric in section.metrics] == ["Dice %", "HD95 mm"]
    own = row_of(section, "recipe/Own")
    summary = read_results(plan.cells[1].folder / "eval").summary
    assert own.numbers["dice"].over_cells.mean == summary.protocols["strict"].mean["dice"].mean
    against = own.numbers["hd95"].against
    assert against is not None
    # a distance grows as it gets worse
    assert (against.n, against.better, against.worse) == (4, 0, 4)
    published = section.published
    assert published is not None
    paper = summary.protocols["paper"].mean
    assert published.heads == ("Dice %", "HD95 voxels")
    assert published.lines[1] == ("Own", (f"{100 * paper['dice'].mean:.2f}", f"{paper['hd95'].mean:.2f}"))
    assert published.verdicts[0].endswith("; one run has no sd")


def test_verdicts_say_what_can_be_said() -> None:
    one, three = over_cells([80.0]), over_cells([79.0, 80.0, 81.0])
    assert verdict(one, 81.0, None) == "ours 80.00 (1 run), published 81.00 without sd, −1.00; one run has no sd"
    assert verdict(three, 81.0, None).endswith("−1.00; the published mean is inside ours")
    assert "is outside the published 83.00 ± 2.50; the published mean is outside ours" in verdict(three, 83.0, 2.5)
    assert verdict(over_cells([]), 83.0, 2.5) == "we have no number"


def test_three_files_hold_the_same_numbers(make_plan: MakePlan, capsys: pytest.CaptureFixture[str]) -> None:
    plan = finished(make_plan(zero_shot={"other": "other"}, networks=TINY | {"Third": {"_target_": "BasicUNet"}}))
    assert main(["table", str(plan.file)]) == 0
    said = capsys.readouterr().out
    written = {file.suffix: file.read_text() for file in plan.output.glob("table.*")}
    assert said.startswith(written[".md"])
    rows = list(csv.DictReader(io.StringIO(written[".csv"])))
    assert len(rows) == 2 * 3 * 3
    one = next(row for row in rows if row["row"] == "recipe/CMUNeXt" and row["metric"] == "iou" and not row["target"])
    mean, sd = 100 * float(one["mean"]), 100 * float(one["sd"])
    for text in (written[".md"], written[".html"]):
        assert f"{mean:.2f} ± {sd:.2f}" in text
        assert "zero-shot on other" in text
    # networks are points of both plots, and nothing comes from elsewhere
    assert written[".html"].count("<svg") == 2
    assert "http" not in written[".html"].replace("http-equiv", "")
    assert one["macs"] == "4000000"
