from __future__ import annotations

import copy
from typing import Any

import pytest

from networks.training.changes import Changes

CONFIG: dict[str, Any] = {
    "ckpt_dir": "models",
    "num_workers": 2,
    "batch_size": 8,
    "learning_rate": 0.01,
    "clip_grad": 0.0,
    "max_epochs": 3,
    "pretrained": None,
    "threshold": 0.5,
    "optimizer": {"_target_": "torch.optim.SGD", "lr": "@learning_rate", "momentum": 0.9},
    "lr_scheduler": {"_target_": "CosineAnnealingLR", "T_max": 50},
    "train": {
        "loss": {"_target_": "DiceCELoss", "lambda_ce": 0.5},
        "transforms": [{"_target_": "RandFlipd", "prob": 0.5}],
        "handlers": [{"_target_": "StepGuard", "clip_grad": "@clip_grad"}],
    },
    "validate": {
        "key_metric": {"val_loss": {"_target_": "MeanLoss", "loss": "$@train#loss"}},
        "postprocessing": {"_target_": "AsDiscreted", "threshold": "@threshold"},
        "dataloader": {"num_workers": "@num_workers"},
        "handlers": [{"_target_": "TensorBoardStatsHandler"}],
        "evaluator": {"_target_": "SupervisedEvaluator", "metric_cmp_fn": "$operator.lt"},
    },
}


def with_value(path: str, value: Any) -> dict[str, Any]:
    config = copy.deepcopy(CONFIG)
    *parents, last = path.split("#")
    place: Any = config
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    place[int(last) if isinstance(place, list) else last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("optimizer#_target_", "torch.optim.AdamW", "torch.optim.SGD, and it is torch.optim.AdamW now"),
        ("lr_scheduler#_target_", "ConstantLR", "CosineAnnealingLR, and it is ConstantLR now"),
        ("lr_scheduler#T_max", 9, "50, and it is 9 now"),
        ("lr_scheduler#eta_min", 0.1, "nothing, and it is 0.1 now"),
        ("validate#key_metric#val_loss#_target_", "MeanDice", "MeanLoss, and it is MeanDice now"),
        ("validate#evaluator#metric_cmp_fn", "$operator.gt", "$operator.lt, and it is $operator.gt now"),
        # what the score is computed with, however far behind
        ("train#loss#lambda_ce", 1.0, "0.5, and it is 1.0 now"),
        ("train#loss#_target_", "FocalLoss", "DiceCELoss, and it is FocalLoss now"),
        ("threshold", 0.4, "0.5, and it is 0.4 now"),
    ],
)
def test_what_makes_the_result_wrong_is_refused(path: str, value: Any, line: str) -> None:
    assert Changes(CONFIG, with_value(path, value)).refused == f"{path} {line}"


@pytest.mark.parametrize(
    ("path", "value", "line"),
    [
        ("clip_grad", 1.0, "clip_grad 1.0 (0.0 before)"),
        ("max_epochs", 9, "max_epochs 9 (3 before)"),
        ("batch_size", 4, "batch_size 4 (8 before)"),
        ("optimizer#momentum", 0.5, "optimizer#momentum 0.5 (0.9 before)"),
        ("optimizer#nesterov", True, "optimizer#nesterov true (nothing before)"),
        ("train#transforms#0#prob", 0.1, "train#transforms#0#prob 0.1 (0.5 before)"),
        ("train#transforms", [], 'train#transforms [] ([{"_target_": "RandFlipd", "prob": 0.5}] before)'),
    ],
)
def test_what_may_change_is_said(path: str, value: Any, line: str) -> None:
    changes = Changes(CONFIG, with_value(path, value))
    assert (changes.refused, changes.said, changes.unused) == ("", line, "")
    assert changes.optimizer == ([path.split("#")[1]] if path.startswith("optimizer") else [])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("ckpt_dir", "elsewhere"),
        ("num_workers", 0),
        ("learning_rate", 1.0),
        ("optimizer#lr", 1.0),
        ("validate#handlers", []),
        ("max_epochs", 3.0),
    ],
)
def test_what_changes_nothing_or_is_said_elsewhere_is_passed_over(path: str, value: Any) -> None:
    changes = Changes(CONFIG, with_value(path, value))
    assert (changes.refused, changes.said, changes.unused) == ("", "", "")


def test_weights_to_start_from_are_not_used() -> None:
    changes = Changes(CONFIG, with_value("pretrained", "a.pt"))
    assert (changes.refused, changes.said, changes.unused) == ("", "", "pretrained a.pt")


def test_a_loss_that_does_not_choose_may_change() -> None:
    before = with_value("validate#key_metric", {"iou": {"_target_": "ImageMetric"}})
    now = copy.deepcopy(before)
    now["train"]["loss"] = {"_target_": "FocalLoss" * 9}
    changes = Changes(before, now)
    assert not changes.refused
    assert "train#loss#_target_" in changes.said
    assert "… (" in changes.said
    # references in a circle, to nothing, and into a list
    before["validate"]["key_metric"] = "$@validate#key_metric + @nowhere + @train#transforms#0"
    now["validate"]["key_metric"] = before["validate"]["key_metric"]
    assert not Changes(before, now).refused
    now["train"]["transforms"][0]["prob"] = 1
    assert Changes(before, now).refused == "train#transforms#0#prob 0.5, and it is 1 now"
