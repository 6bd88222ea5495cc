"""Plans in a folder of their own, and cells that look as if they had been trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evaluation.results import write_results
from evaluation.scores import ImageScores
from experiments.cost import Cost
from experiments.plan import Cell, Plan, read_plan

CASES = 8
RULE = "IoU on held-out training images"
TINY = {
    "CMUNeXt": {"_target_": "networks.CMUNeXt", "dims": [4, 4, 8, 8, 8], "kernel_sizes": [3] * 5},
    "BasicUNet": {"_target_": "BasicUNet", "spatial_dims": 2, "features": [4, 4, 8, 8, 8, 4]},
}
MakePlan = Callable[..., Plan]


def content(folder: Path, **changed: Any) -> dict[str, Any]:
    """What a plan's file says: two networks on two folds."""
    return {
        "output": str(folder / "out"),
        "baseline": "BasicUNet",
        "bundles": {"recipe": {"bundle": "cmunext_busi", "data": str(folder / "data")}},
        "networks": TINY,
        "folds": [1, 2],
        "seeds": [41],
        "overrides": {"image_size": 32, "num_workers": 0},
        "budget": {"epochs": 1},
    } | changed


@pytest.fixture
def make_plan(tmp_path: Path) -> MakePlan:
    """Writes a plan's file with some entries changed, and reads it."""

    def make(scale: str | None = None, **changed: Any) -> Plan:
        file = tmp_path / "plan.yaml"
        (tmp_path / "data").mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(content(tmp_path, **changed), sort_keys=False))
        return read_plan(file, scale)

    return make


def evaluated(folder: Path, fold: int | None, wrong: int, cases: int = CASES, shift: int = 0) -> None:
    """The results of an evaluation in which each image has some wrong pixels more than the one before."""
    scores = ImageScores(["lesion"])
    for case in range(cases):
        label = np.zeros((8, 8), int)
        label[2:6, 2 : 6 + shift] = 1
        prediction = label.copy()
        prediction.flat[: wrong + case] = 1
        scores.add(f"fold{fold}case{case}", prediction, label)
    write_results(folder, scores.summary(), scores.rows())


def finish(cell: Cell, wrong: int, selection: str = RULE, train: str = "a", **configuration: Any) -> None:
    """Leaves in a cell's folder what a training and its evaluations do."""
    for target, folder in cell.targets().items():
        evaluated(folder, None if target else cell.fold, wrong)
    items = {
        part: [{"image": [f"{part}{name}.png", f"{part}{name}"], "label": [f"{name}_mask.png", f"{name}m"]}]
        for part, name in (("train", train), ("validation", "v"), ("test", f"t{cell.fold}"))
    }
    run = {
        "format": 1, "id": "0", "started": "2026-01-01T00:00:00+00:00", "how_it_ended": "completed", "command": "",
        "network": cell.network, "selection": selection, "settings": {"data": f"{train}{cell.fold}"}, "data": items,
        "configuration": {"max_epochs": 4, "fold": cell.fold, "network_def": cell.network} | configuration,
        "best": {"metric": "iou", "score": 0.59, "epoch": 3}, "epochs": 4, "device": "cpu",
    }  # fmt: skip
    (cell.folder / "run.json").write_text(json.dumps(run))
    (cell.folder / "history.csv").write_text("epoch,seconds\n1,2.0\n2,3.0\n")
    (cell.folder / "model.pt").touch()


@pytest.fixture
def known_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs that need no measuring: the first row in the order of names is the smallest."""

    def costs(inputs: dict[str, Any], file: Path, again: bool) -> tuple[dict[str, Cost], dict[str, Any]]:
        found = {
            name: Cost(1000 * number, 2_000_000 * number, "", 1.0 * number, 10.0)
            for number, name in enumerate(sorted(inputs), 1)
        }
        return found, {"device": "cpu", "cpu": "a", "threads": 1, "torch": "2", "date": "2026-01-01", "load": 0.1}

    monkeypatch.setattr("experiments.table.measured", costs)
