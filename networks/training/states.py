"""What a run can go on from: saved states with numbers that a run can have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer


def check_state(state: Any, path: Path) -> None:
    """Refuses what no run can go on from: another kind of file, or numbers that it cannot have.

    Raises:
        ValueError: saying which.
    """
    parts = {
        **dict.fromkeys(("position", "settings", "selection", "model", "optimizer", "lr_scheduler", "metrics"), dict),
        "run_id": str,
    }
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"{path} is no run's state")
    counts = [state["position"].get(name) for name in ("epoch", "step", "steps", "seen")]
    counts += [state["selection"].get(name) for name in ("best_epoch", "since_best")]
    if not all(isinstance(count, int) and count >= 0 for count in counts) or not state["position"]["steps"]:
        raise ValueError(f"{path} is no run's state (it counts {', '.join(map(str, counts))} epochs and steps)")
    best = state["selection"].get("best")
    if best is not None and not (isinstance(best, float) and math.isfinite(best)):
        raise ValueError(f"{path} is no run's state (its best score is {best})")
    rates = {name: state["lr_scheduler"].get(name) for name in ("base_lrs", "_last_lr")}
    if name := _not_finite({"optimizer": state["optimizer"], "lr_scheduler": rates}):
        raise ValueError(f"{path} holds numbers that are not finite ({name}): no run goes on from them")


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuses what PyTorch loads into an optimizer and fails over at the next step.

    Raises:
        ValueError: saying what.
    """
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], float | int) or group["lr"] < 0:
            raise ValueError(f"its learning rate is {group['lr']!r}")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            tensors = state.values() if isinstance(state, dict) else [None]
            for value in tensors:
                if value is None or (isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape):
                    raise ValueError("the optimizer's state is of other weights")


def _not_finite(value: Any, name: str = "") -> str:
    """Where in nested lists and dictionaries a number or a tensor is not finite; empty where none is."""
    if isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return next(filter(None, (_not_finite(inner, f"{name} {key}".strip()) for key, inner in pairs)), "")
    if isinstance(value, torch.Tensor):
        return "" if value.isfinite().all() else name
    return name if isinstance(value, float) and not math.isfinite(value) else ""
