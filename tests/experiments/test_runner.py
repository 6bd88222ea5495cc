"""Cells are trained, evaluated and tested once, whatever interrupts them."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import yaml
from monai.utils import set_determinism

import bundles
from evaluation.results import read_summary
from experiments.__main__ import main
from experiments.plan import Cell, read_plan
from experiments.runner import Runner, Step, _execute, check_recipes, clock, last_line, state_of, steps
from experiments.table import tabulate
from networks.training.stopping import FolderLock
from prepare.demo import prepare_demo
from tests.experiments.conftest import TINY, MakePlan, content, finish
from transforms import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    prepare_demo(out, cases=5, slices=8, size=48, images=12)
    return out


@pytest.fixture
def in_process() -> Iterator[Any]:
    """Runs a step's command in this process, as `python -m monai.bundle run` does; keeps what it ran."""
    ran: list[str] = []

    def execute(runner: Runner, cell: Cell, step: Step, lock: FolderLock) -> tuple[int, str]:
        ran.append(f"{cell.network} {step.name}")
        run_id, _, files, *words = step.command[6:]
        listed = yaml.safe_load(files)
        said = {key[2:]: yaml.safe_load(value) for key, value in zip(words[::2], words[1::2], strict=True)}
        try:
            monai.bundle.run(run_id, config_file=listed, **said)
        except Exception as error:
            return 1, str(bundles.one_line(error))
        return 0, ""

    execute.ran = ran  # type: ignore[attr-defined]
    yield execute
    set_determinism(None)


@pytest.mark.usefixtures("known_costs")
def test_two_tiny_networks_from_training_to_the_table(make_plan: MakePlan, data: Path, in_process: Any) -> None:
    """What experiments/demo.yaml does, smaller; stopped, extended and gone on with."""
    entry = {"recipe": {"bundle": "cmunext_busi", "data": str(data / "busi")}}
    zero_shot = {"skin": str(data / "isic17")}
    plan = make_plan(bundles=entry, folds=[1], budget={"epochs": 2})
    said: list[str] = []

    def stopped(runner: Runner, *arguments: Any) -> tuple[int, str]:
        done = in_process(runner, *arguments)
        if len(in_process.ran) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return done

    runner = Runner(plan, said.append, stopped)
    before = signal.getsignal(signal.SIGTERM)
    assert not runner.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert in_process.ran == ["BasicUNet training", "BasicUNet evaluating", "CMUNeXt training"]
    assert said[0] == "[1/2] recipe/BasicUNet/fold1-seed41"
    assert said[1].startswith("  best iou 0.")
    assert said[2].startswith("[2/2] recipe/CMUNeXt/fold1-seed41 · about ")
    assert said[-2:] == ["1 of 2 cells are finished", "stopped by SIGTERM; the same command goes on"]

    in_process.ran.clear()
    plan = make_plan(bundles=entry, folds=[1], budget={"epochs": 2}, zero_shot=zero_shot)
    assert Runner(plan, said.append, in_process).run()
    assert in_process.ran == ["BasicUNet zero-shot skin", "CMUNeXt evaluating", "CMUNeXt zero-shot skin"]
    in_process.ran.clear()
    assert Runner(plan, said.append, in_process).run()
    assert in_process.ran == []

    own, other = tabulate(plan).sections
    assert (own.cases, other.cases) == (5, 12)
    assert other.selection == "IoU on held-out training images"
    assert {row.name for row in other.rows} == {"recipe/BasicUNet", "recipe/CMUNeXt"}
    assert all(row.epochs == 2 for row in own.rows)
    summary = read_summary(plan.cells[0].folder / "zero_shot/skin")
    assert summary.selection == "IoU on held-out training images"
    assert not summary.published.values

    # images that were trained on are no zero-shot test
    plan = make_plan(bundles=entry, folds=[1], budget={"epochs": 2}, zero_shot={"same": str(data / "busi")})
    runner = Runner(plan, said.append, in_process)
    assert not runner.run()
    assert len(runner.failures) == 2
    assert all("was trained on" in line for line in runner.failures.values())


def test_failures_are_listed_and_tried_again(make_plan: MakePlan) -> None:
    plan = make_plan()
    said: list[str] = []
    broken = {"CMUNeXt"}

    def execute(runner: Runner, cell: Cell, step: Step, lock: FolderLock) -> tuple[int, str]:
        if cell.network in broken:
            return 1, "no good"
        finish(cell, 1)
        return 0, ""

    runner = Runner(plan, said.append, execute)
    assert not runner.run()
    assert runner.failures == {cell.name: "training: no good" for cell in plan.cells if cell.network == "CMUNeXt"}
    assert f"failed: {plan.cells[1].name}: training: no good" in said
    assert state_of(plan.cells[1])["error"] == "training: no good"
    broken.clear()
    runner = Runner(plan, said.append, execute)
    assert runner.run()
    assert runner.failures == {}
    assert state_of(plan.cells[1])["error"] is None
    # a training that ends well without a model has failed
    (plan.cells[0].folder / "model.pt").unlink()
    runner = Runner(plan, said.append, lambda *arguments: (0, "done"))
    assert not runner.run()
    assert list(runner.failures) == [plan.cells[0].name]


def test_another_recipe_is_refused(make_plan: MakePlan, tmp_path: Path) -> None:
    def execute(runner: Runner, cell: Cell, step: Step, lock: FolderLock) -> tuple[int, str]:
        finish(cell, 1)
        return 0, ""

    assert Runner(make_plan(), str, execute).run()
    changes: list[tuple[dict[str, Any], str]] = [
        ({"budget": {"epochs": 2}}, "was begun with max_epochs 1, and it is 2 now"),
        ({"overrides": {"image_size": 32, "num_workers": 0, "batch_size": 2}}, "batch_size none, and it is 2 now"),
        ({"networks": {"CMUNeXt": TINY["BasicUNet"]}, "baseline": "CMUNeXt"}, "was begun with network_def "),
        ({"bundles": {"recipe": {"bundle": "cmunext_busi", "data": "other"}}}, "was begun with data "),
    ]
    for changed, line in changes:
        with pytest.raises(InputError) as caught:
            Runner(make_plan(**changed), str, execute).run()
        assert line in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path / 'out/recipe'}/")
    check_recipes(make_plan())
    (make_plan().cells[0].folder / "cell.json").unlink()
    with pytest.raises(InputError, match="holds a run that is none of "):
        check_recipes(make_plan())


def test_missing_data_are_refused_before_anything_starts(make_plan: MakePlan, capsys: pytest.CaptureFixture) -> None:
    plan = make_plan(zero_shot={"other": "nowhere"})
    assert main(["run", str(plan.file)]) == 1
    assert capsys.readouterr().err.startswith("error: nowhere: no such folder; prepare the data first")
    assert not (plan.output / "recipe").exists()


def test_cells_in_use_are_left_to_the_other_command(make_plan: MakePlan) -> None:
    plan = make_plan()
    held = FolderLock(plan.cells[0].folder / "logs")
    order: list[str] = []

    def execute(runner: Runner, cell: Cell, step: Step, lock: FolderLock) -> tuple[int, str]:
        order.append(cell.name)
        if len(order) == 3:
            held.release()
        finish(cell, 1)
        return 0, ""

    said: list[str] = []
    assert Runner(plan, said.append, execute).run(wait=0.1)
    assert order[-1] == plan.cells[0].name
    assert f"1 cells are in use by another command: waiting for {plan.cells[0].name}" in said


WORKS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
print("begun", flush=True)
time.sleep(60)
"""


def test_minutes_end_a_training_which_saves_itself(make_plan: MakePlan) -> None:
    (cell, *_) = make_plan(budget={"minutes": 1 / 60}).cells
    lock = FolderLock(cell.folder / "logs")
    runner = Runner(make_plan(), str)
    assert _execute(runner, cell, Step("training", [sys.executable, "-c", WORKS]), lock) == (0, "saved")
    assert state_of(cell)["spent"]
    assert 1 <= state_of(cell)["trained_seconds"] < 30
    lock.release()
    # the best network so far is the result
    finish(cell, 1)
    run = json.loads((cell.folder / "run.json").read_text()) | {"how_it_ended": "stopped by SIGTERM"}
    (cell.folder / "run.json").write_text(json.dumps(run))
    assert steps(cell) == []


def test_a_command_that_outlives_its_runner_keeps_the_cell(make_plan: MakePlan) -> None:
    (cell, *_) = make_plan().cells
    lock = FolderLock(cell.folder / "logs")
    runner = Runner(make_plan(), str)
    step = Step("training", [sys.executable, "-c", WORKS])
    thread = threading.Thread(target=_execute, args=(runner, cell, step, lock))
    thread.start()
    log = cell.folder / "logs/training.txt"
    while not log.is_file() or "\nbegun" not in log.read_text():
        time.sleep(0.05)
    # as when the runner is killed
    lock.release()
    with pytest.raises(ValueError, match="in use"):
        FolderLock(cell.folder / "logs")
    runner.stop()
    thread.join(30)
    FolderLock(cell.folder / "logs").release()
    assert last_line(log) == "saved"


def test_words_for_people(tmp_path: Path) -> None:
    assert [clock(seconds) for seconds in (3, 3600, 86400 * 3)] == ["3 s", "1 h 0 min", "3 d 0 h"]
    assert last_line(tmp_path / "none") == ""


submitted = pytest.mark.skipif(importlib.util.find_spec("submitit") is None, reason="submitit is not installed")


@pytest.fixture
def one_cell(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the file of a single cell says; its processes find this checkout."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    entry = {"recipe": {"bundle": "cmunext_busi", "data": str(data / "busi")}}
    return content(tmp_path, bundles=entry, folds=[1], networks={"CMUNeXt": TINY["CMUNeXt"]}, baseline="CMUNeXt")


@submitted
def test_jobs_of_submitit_say_why_they_failed(
    one_cell: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(one_cell | {"zero_shot": {"other": "nowhere"}}))
    command = ["run", str(file), "--launcher", "submitit", "--cluster", "local"]
    assert main(command) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("job ")
    assert printed[1] == "failed: recipe/CMUNeXt/fold1-seed41 (0 left)"
    assert "recipe/CMUNeXt/fold1-seed41: " in printed[2]
    assert "nowhere: no such folder" in printed[2]
    file.write_text(yaml.safe_dump(one_cell | {"submitit": {"gpus": 1}}))
    assert main(command) == 1
    assert "plan.yaml: submitit: " in capsys.readouterr().err


@submitted
@pytest.mark.soak
def test_jobs_of_submitit_run_the_commands(
    one_cell: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(one_cell))
    assert main(["run", str(file), "--launcher", "submitit", "--cluster", "local", "--batch_size", "4"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "finished: recipe/CMUNeXt/fold1-seed41 (0 left)"
    cell = read_plan(file, overrides={"batch_size": 4}).cells[0]
    assert steps(cell) == []
    assert {log.name for log in (cell.folder / "logs").iterdir()} == {"training.txt", "evaluating.txt"}


@pytest.mark.soak
def test_killed_at_any_moment_it_goes_on(data: Path, tmp_path: Path) -> None:
    entry = {"recipe": {"bundle": "cmunext_busi", "data": str(data / "busi")}}
    file = tmp_path / "plan.yaml"
    file.write_text(yaml.safe_dump(content(tmp_path, bundles=entry, folds=[1], budget={"epochs": 20})))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-u", "-m", "experiments", "run", str(file)]
    cell = read_plan(file).cells[0]
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGTERM):
        log = cell.folder / "logs/training.txt"
        known = log.read_text().count("epoch ") if log.is_file() else 0
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            while not (log.is_file() and log.read_text().count("epoch ") > known) and steps(cell):
                time.sleep(0.2)
            process.send_signal(number)
            process.wait(120)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("2 of 2 cells are finished\n")
    assert all(steps(replace(one)) == [] for one in read_plan(file).cells)
