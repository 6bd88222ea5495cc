"""What of its configuration a run may change when it goes on, and what is said of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

# What chooses the best network, with all that it refers to: scores of two kinds cannot be compared.
CHOOSING = ("key_metric", "preprocessing", "postprocessing", "inferer", "evaluator#metric_cmp_fn")
# Of other weights to start from, which a run that goes on does not.
STARTING = ("pretrained", "new_head", "min_matched")
# What changes no result, and what is looked at elsewhere: the settings, the rate, what the data hold.
FREE = {
    "bundle_root", "dataset_dir", "ckpt_dir", "output_dir", "log_dir", "device", "num_workers", "batch_size",
    "learning_rate", "optimizer#lr", "split", "settings", "debug", "resume", "ckpt_interval", "ckpt_minutes",
    "on_save_error", "check_data", "record", "checkpoints", "validate#handlers", "imports", "initialize",
    "finalize", "training", "run", "_meta_", "tracking_uri", "experiment_name", "run_name",
    "save_execute_config", "is_not_rank0",
}  # fmt: skip
SAID = {"batch_size"}
REFERENCE = re.compile(r"@([\w#:]+)")
MISSING = object()
SHOWN = 60


class Changes:
    """How the configuration of a run that goes on differs from the one that it had.

    Args:
        before, now: configurations as MONAI has read them, with references and expressions as they are written.

    Example:
        >>> changes = Changes({"optimizer": {"lr": 1, "momentum": 0}, "clip_grad": 0}, {"clip_grad": 1})
        >>> changes.said
        'clip_grad 1 (0 before)'
        >>> changes.refused
        'optimizer {"lr": 1, "momentum": 0}, and it is nothing now'
    """

    def __init__(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = {path: (old, new) for path, old, new in _differing(before, now) if not _below(path, FREE - SAID)}
        choosing = {f"validate#{name}" for name in CHOOSING}
        behind = (_behind(before, choosing) | _behind(now, choosing)) - FREE
        wrong = {"lr_scheduler", "optimizer#_target_", "optimizer#params", *behind}
        refused = [path for path in differing if path == "optimizer" or _below(path, wrong)]
        # why the run cannot go on: the first difference that would make its result wrong
        self.refused = _against(refused[0], *differing[refused[0]]) if refused else ""
        # arguments of the optimizer by name; its saved state would hide them
        self.optimizer = [path.split("#")[1] for path in differing if path.startswith("optimizer#")]
        unused = [path for path in differing if path in STARTING]
        # what counts only where a run begins
        self.unused = ", ".join(f"{path} {differing[path][1]}" for path in unused)
        taken = [path for path in differing if path not in unused]
        self.said = ", ".join(
            f"{path} {_shown(differing[path][1])} ({_shown(differing[path][0])} before)" for path in taken
            if path not in refused
        )  # fmt: skip


def _differing(before: Any, now: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places where two configurations differ, as (path, before, now), as deep as they are alike in kind."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        pairs: Any = ((key, before.get(key, MISSING), now.get(key, MISSING)) for key in {**before, **now})
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = ((str(number), *pair) for number, pair in enumerate(zip(before, now, strict=True)))
    else:
        if before is MISSING or now is MISSING or before != now:
            yield path, before, now
        return
    for key, old, new in pairs:
        yield from _differing(old, new, f"{path}#{key}" if path else key)


def _behind(config: Mapping[str, Any], roots: set[str]) -> set[str]:
    """The paths that these parts of a configuration refer to, and theirs."""
    found: set[str] = set()
    todo = list(roots)
    while todo:
        path = todo.pop()
        part = _at(config, path)
        if path not in found and path not in FREE and part is not MISSING:
            found.add(path)
            todo += [name.replace("::", "#").strip("#:") for name in REFERENCE.findall(json.dumps(part, default=str))]
    return found


def _at(config: Any, path: str) -> Any:
    for key in path.split("#"):
        if isinstance(config, Mapping) and key in config:
            config = config[key]
        elif isinstance(config, list) and key.isdigit() and int(key) < len(config):
            config = config[int(key)]
        else:
            return MISSING
    return config


def _below(path: str, places: set[str]) -> bool:
    return any(path == place or path.startswith(f"{place}#") for place in places)


def _against(path: str, old: Any, new: Any) -> str:
    return f"{path} {_shown(old)}, and it is {_shown(new)} now"


def _shown(value: Any) -> str:
    if value is MISSING:
        return "nothing"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
