"""From a YAML file to cells and their commands."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.__main__ import main
from experiments.plan import HERE, read_plan
from tests.experiments.conftest import TINY, MakePlan, content
from transforms import InputError

FILES = sorted([*HERE.glob("*.yaml"), *HERE.glob("papers/*.yaml")])


def test_cells_are_networks_by_recipes_folds_and_seeds(make_plan: MakePlan, tmp_path: Path) -> None:
    entry = {"bundle": "cmunext_busi", "data": "d", "overrides": {"learning_rate": "1e-3"}, "networks": {"Own": None}}
    recipes = {"plain": {"bundle": "cmunext_busi", "data": "d"}, "slow": entry}
    plan = make_plan(bundles=recipes, folds=[2, 1], seeds=[41, 42], baseline="plain/BasicUNet")
    assert {cell.row for cell in plan.cells} == {"plain/CMUNeXt", "plain/BasicUNet", "slow/Own"}
    assert len(plan.cells) == 3 * 2 * 2
    # all rows on one fold and seed before the next
    assert [(cell.fold, cell.seed) for cell in plan.cells[::3]] == [(1, 41), (1, 42), (2, 41), (2, 42)]
    slow = next(cell for cell in plan.cells if cell.row == "slow/Own")
    assert slow.folder == tmp_path / "out/slow/Own/fold1-seed41"
    assert slow.overrides["learning_rate"] == "1e-3"
    assert "network_def" not in slow.overrides
    # channels are the bundle's
    other = next(cell for cell in plan.cells if cell.network == "BasicUNet")
    assert other.overrides["network_def"] == TINY["BasicUNet"] | {
        "in_channels": "@in_channels",
        "out_channels": "$@labels.out_channels",
    }


def test_each_data_set_has_its_baseline(make_plan: MakePlan) -> None:
    recipes = {name: {"bundle": "cmunext_busi", "data": name, "networks": {name: None, **TINY}} for name in "ab"}
    assert make_plan(bundles=recipes).baselines == {"a": "a/BasicUNet", "b": "b/BasicUNet"}
    assert make_plan(bundles=recipes, baseline="b/CMUNeXt").baselines == {"b": "b/CMUNeXt"}


def test_channels_can_be_said_and_left_out(make_plan: MakePlan) -> None:
    networks = {"A": {"_target_": "a.B", "in_channels": 1, "out_channels": None}}
    (cell,) = make_plan(networks=networks, folds=[1], baseline="A").cells
    assert cell.overrides["network_def"] == {"_target_": "a.B", "in_channels": 1}


def test_commands_are_those_of_the_bundle(make_plan: MakePlan, tmp_path: Path) -> None:
    plan = make_plan(zero_shot={"all": "other", "part": {"data": "third", "part": "test"}})
    cell = plan.cells[0]
    training, evaluating = cell.training(), cell.evaluating()
    assert training[3:7] == ["-m", "monai.bundle", "run", "training"]
    said = dict(zip(training[9::2], training[10::2], strict=True))
    assert said["--max_epochs"] == "1"
    assert said["--resume"] == "auto"
    assert said["--dataset_dir"] == str(tmp_path / "data")
    assert said["--ckpt_dir"] == str(cell.folder)
    assert "evaluate.yaml" in evaluating[8]
    assert "zero_shot.yaml" not in evaluating[8]
    everything, test = cell.evaluating("all"), cell.evaluating("part")
    assert everything[everything.index("--dataset_dir") + 1] == "other"
    assert everything[everything.index("--output_dir") + 1] == str(cell.folder / "zero_shot/all")
    assert "--validate#dataset#data" not in everything
    assert test[test.index("--validate#dataset#data") + 1] == "$@split.test"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"network": TINY}, "the file: network: not known; did you mean networks?"),
    ({"output": None}, "names no output"),
    ({"bundles": {}}, "names no bundle to train"),
    ({"bundles": {"a": {"bundle": "cmunext_busi"}}}, "bundles: a names no data"),
    ({"bundles": {"a": {"bundle": "cmunext", "data": "d"}}}, "no such bundle"),
    ({"bundles": {"../a": {"bundle": "cmunext_busi", "data": "d"}}}, "no name"),
    ({"baseline": "UNet"}, "baseline: UNet: no such row; there are recipe/BasicUNet, recipe/CMUNeXt"),
    ({"baseline": None}, "names no baseline"),
    ({"overrides": {"max_epoch": 3}}, "--max_epoch: no such setting; did you mean --max_epochs?"),
    ({"overrides": {"batch_size": 0}}, "--batch_size 0: expected a whole number above 0"),
    ({"overrides": {"resume": True}}, "resume is not for a file of experiments to say"),
    (
        {"bundles": {name: {"bundle": "cmunext_busi", "data": "d"} for name in "ab"}},
        "baseline: BasicUNet: several rows",
    ),
    ({"budget": {"hours": 3}}, "budget: hours: not known"),
    ({"budget": {"minutes": -1}}, "expected a number above 0"),
    ({"folds": [1, 1]}, "a fold or a seed is named twice"),
    ({"folds": ["one"]}, "--fold one: expected the number of a split"),
    ({"networks": {"A": {"dims": 3}}}, "networks: A is no network"),
    ({"zero_shot": {"a": {"data": "d", "part": "some"}}}, "zero_shot: a: expected a folder"),
    ({"external": {"a": {"results": "r", "data": "other"}}}, "external: a: data other: no bundle has these"),
    ({"external": {"a": {"results": {"x": "r"}}}}, "external: a: expected results"),
    ({"expected": {"of": "IoU", "score": 3}}, "expected: wants of: WORDS and score"),
]


@pytest.mark.parametrize(("changed", "line"), REFUSED)
def test_what_cannot_be_is_refused_with_a_line(changed: dict[str, Any], line: str, make_plan: MakePlan) -> None:
    with pytest.raises(InputError) as caught:
        make_plan(**changed)
    assert line in str(caught.value)
    assert "plan.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["a: [", "- a", "3", "\0", ""])
def test_what_is_no_plan_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(text)
    assert main(["run", str(file)]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error: {file}: ")
    assert said.count("\n") == 1
    assert main(["run", str(tmp_path / "none.yaml")]) == 1
    assert "none.yaml: cannot be read" in capsys.readouterr().err


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1000))
def test_the_order_of_entries_changes_no_cell(seed: int, make_plan: MakePlan, tmp_path: Path) -> None:
    recipes = {name: {"bundle": "cmunext_busi", "data": "d"} for name in ("a", "b", "c")}
    said = {"bundles": recipes, "zero_shot": {"x": "x", "y": "y"}, "baseline": "b/CMUNeXt"}
    plan = make_plan(**said)
    shuffled = _shuffled(content(tmp_path, **said), random.Random(seed))
    other = tmp_path / "plan.yaml"
    other.write_text(yaml.safe_dump(shuffled, sort_keys=False))
    assert read_plan(other).cells == plan.cells


def _shuffled(value: Any, rng: random.Random) -> Any:
    if not isinstance(value, dict):
        return rng.sample(value, len(value)) if isinstance(value, list) and set(value) in ({1, 2}, {41}) else value
    keys = rng.sample(sorted(value), len(value))
    return {key: _shuffled(value[key], rng) for key in keys}


def test_shards_are_all_cells(make_plan: MakePlan) -> None:
    plan = make_plan(folds=[1, 2, 3])
    shares = [plan.shard(f"{number}/4").cells for number in (1, 2, 3, 4)]
    assert sorted(cell.name for share in shares for cell in share) == sorted(cell.name for cell in plan.cells)
    for word in ("0/4", "5/4", "1", "a/b", "1/0"):
        with pytest.raises(InputError, match="expected i/n"):
            plan.shard(word)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_files_that_come_with_it_can_be_read_at_every_scale(file: Path) -> None:
    if file.name == "zero_shot.yaml":
        return
    full = read_plan(file)
    for scale in yaml.safe_load(file.read_text()).get("scales", {}):
        small = read_plan(file, scale)
        assert small.output != full.output
        assert small.cells
    with pytest.raises(InputError, match="--scale huge: not in it"):
        read_plan(file, "huge")


@pytest.mark.parametrize(
    ("paper", "bundle", "year"),
    [("cmunext", "cmunext_busi", ""), ("vmunet-isic", "vmunet_isic", "2017"), ("vmunet-isic18", "vmunet_isic", "2018"),
     ("vmunet-synapse", "vmunet_synapse", "")],
)  # fmt: skip
def test_published_rows_are_those_of_the_bundle(paper: str, bundle: str, year: str) -> None:
    plan = read_plan(HERE / "papers" / f"{paper}.yaml")
    (published,) = plan.published.values()
    row = yaml.safe_load((HERE.parent / "bundles" / bundle / "configs/evaluate.yaml").read_text())["published"]
    row = row[year] if year else row
    expected = {key: value["mean"] if isinstance(value, dict) else value for key, value in row.items() if key != "name"}
    assert next(iter(published["rows"].values())) == expected


def test_the_commands_are_listed(make_plan: MakePlan, capsys: pytest.CaptureFixture[str]) -> None:
    plan = make_plan(zero_shot={"other": "other"})
    assert main(["run", str(plan.file), "--list", "--shard", "1/2", "--batch_size", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * 3
    assert all(" --batch_size 2 " in line for line in lines)
    assert main(["run", str(plan.file), "--bach_size", "2"]) == 1
    assert "did you mean --batch_size?" in capsys.readouterr().err
