"""What the settings of a configuration may be, and which there are.

MONAI takes any word for an override, and adds one that no configuration knows. So `--max_epoch 5` would train for 300
epochs. These functions find that out before any work.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS
from monai.utils import ensure_tuple

from transforms import InputError, expanded, printable, shortened

SHOWN = 3
WORDS = {"true": True, "false": False, "null": None}
Rule = Callable[[Any], Any]


def _number(value: Any) -> float:
    """A number, from a word too: YAML takes 1e-4 for one."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError
    return value if isinstance(value, int | float) else float(value)


def _whole(least: int, most: float = math.inf) -> Rule:
    def check(value: Any) -> int:
        number = _number(value)
        if number != int(number) or not least <= number <= most:
            raise ValueError
        return int(number)

    return check


def _between(least: float, most: float) -> Rule:
    def check(value: Any) -> float:
        number = _number(value)
        if not least < number <= most:
            raise ValueError
        return number

    return check


def _at_least_0(value: Any) -> float:
    number = _number(value)
    if not 0 <= number < math.inf:
        raise ValueError
    return number


def _one_of(*choices: Any) -> Rule:
    def check(value: Any) -> Any:
        return {str(choice): choice for choice in choices}[str(value)]

    return check


def _image_size(value: Any) -> Any:
    size = [_whole(1, 16384)(one) for one in ensure_tuple(value)]
    if len(size) > 2:
        raise ValueError
    # one setting has one form: runs are compared by it
    return size if len(set(size)) == 2 else size[0]


def _names(value: Any) -> list[str]:
    names = [value] if isinstance(value, str) else list(value)
    if not names or len(set(names)) < len(names) or not all(isinstance(name, str) and name for name in names):
        raise ValueError
    return names


def _path(value: Any) -> Any:
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise ValueError
    return expanded(str(value))


def _paths(value: Any) -> Any:
    """One or several, or none; whoever opens them says what is wrong."""
    if isinstance(value, list | tuple):
        return [_paths(one) for one in value]
    # an empty one would be the working directory
    return _path(value) if isinstance(value, str | os.PathLike) else value


def _checkpoints(value: Any) -> Any:
    """A path, or a list of several: [a.pt, b.pt], which arrives as text where its names have dots."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]") and not os.path.lexists(value):
        value = [one.strip().strip("'\"") for one in value[1:-1].split(",")]
    if isinstance(value, list | tuple):
        if not value:
            raise ValueError
        return [_path(one) for one in value]
    return _path(value)


def _device(value: Any) -> str:
    device = torch.device(value)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError
    torch.empty(0, device=device)
    return f"$torch.device({str(device)!r})"


SWITCHES = (
    *(
        "allow_overlap",
        "allow_unpaired",
        "assume_hu",
        "debug",
        "deterministic",
        "force",
        "load_pretrain",
        "probabilities",
    ),
    "sync_batch_norm",
)
# What each setting may be, in words, and the function that takes it or raises an exception.
RULES: Mapping[str, tuple[str, Rule]] = {
    "image_size": ("a whole number of pixels above 0, or rows and columns: [192, 256]", _image_size),
    **dict.fromkeys(("batch_size", "max_epochs", "val_interval"), ("a whole number above 0", _whole(1))),
    **dict.fromkeys(("num_workers", "early_stop", "seed"), ("a whole number, 0 or above", _whole(0, 2**32 - 1))),
    "in_channels": ("1, 3 or 4", _one_of(1, 3, 4)),
    "fold": ("the number of a split: 1, 2, …", _whole(1)),
    "learning_rate": ("a number above 0 and up to 10", _between(0, 10)),
    "val_fraction": ("a share above 0 and below 1", _between(0, 1 - 1e-9)),
    "min_matched": ("a share above 0 and up to 1", _between(0, 1)),
    "selection": ("holdout or paper", _one_of("holdout", "paper")),
    "amp_dtype": ("float32, bfloat16 or auto", _one_of("float32", "bfloat16", "auto")),
    **dict.fromkeys(("channels_last", "compile"), ("true, false or auto", _one_of(True, False, "auto"))),
    **dict.fromkeys(
        (
            "force",
            "deterministic",
            "sync_batch_norm",
            "load_pretrain",
            "probabilities",
            "assume_hu",
            "allow_unpaired",
            "debug",
            "overlay",
        ),
        ("true or false", _one_of(True, False)),
    ),
    "seg_type": ("binary or labelmap", _one_of("binary", "labelmap")),
    "resume": ("true, false or auto", _one_of(True, False, "auto")),
    "ckpt_interval": ("a whole number above 0", _whole(1)),
    **dict.fromkeys(("ckpt_minutes", "clip_grad"), ("a number, 0 or above", _at_least_0)),
    "on_save_error": ("stop or continue", _one_of("stop", "continue")),
    "check_data": ("true, false, quick or full", _one_of(True, False, "quick", "full")),
    **dict.fromkeys(("ckpt_dir", "output_dir", "log_dir", "filepath"), ("a path", _path)),
    **dict.fromkeys(("dataset_dir", "input", "pretrained"), ("a path", _paths)),
    "ckpt_path": ("a path, or a list of paths: [a.pt, b.pt]", _checkpoints),
    "tta": ("none or flips", _one_of("none", "flips")),
    "normalisation": ("published or plain", _one_of("published", "plain")),
    "postprocess": ("none or largest", _one_of("none", "largest")),
    "year": ("2017 or 2018", _one_of(2017, 2018)),
    "classes": ("a list of different names: ['cup', 'disc']", _names),
    "device": ("a device that this machine has: cpu, cuda, cuda:1 …", _device),
}


def with_values(config: Any) -> Any:
    """The configuration with the words true, false and null as values.

    Example:
        >>> with_values({"train": {"amp": "False"}, "pretrained": "null", "name": "true north"})
        {'train': {'amp': False}, 'pretrained': None, 'name': 'true north'}
    """
    if isinstance(config, dict):
        return {key: with_values(value) for key, value in config.items()}
    if isinstance(config, list):
        return [with_values(value) for value in config]
    return WORDS.get(config.lower(), config) if isinstance(config, str) else config


def checked(name: str, value: Any) -> Any:
    """The value of a setting in the form that configurations need; settings without a rule stay as they are.

    Raises:
        InputError: when the value cannot be taken.

    Example:
        >>> checked("image_size", [192, 256]), checked("learning_rate", "1e-4"), checked("classes", "lesion")
        ([192, 256], 0.0001, ['lesion'])
        >>> checked("batch_size", 0)
        Traceback (most recent call last):
        transforms.files.InputError: --batch_size 0: expected a whole number above 0
    """
    if name not in RULES or (isinstance(value, str) and value.startswith(("$", "@", "%"))):
        return value
    words, rule = RULES[name]
    try:
        return rule(value)
    # a rule says no with whatever its conversion raises
    except Exception as error:
        raise InputError(f"--{name} {shortened(printable(str(value)))}: expected {words}") from error


def close(word: str, names: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names that are most like a word; none for what is too long to be a slip.

    Example:
        >>> close("infering", ["training", "inferring"])
        ['inferring']
    """
    return difflib.get_close_matches(word, list(names), count, cutoff) if len(word) < 100 else []


def refuse_unknown(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuses overrides that the configuration has no place for.

    A setting may be added where something refers to it, or as an argument of a component.

    Args:
        given: the overrides by name, `train#trainer#max_epochs` for instance.
        known: the configuration without them.

    Raises:
        InputError: naming the setting that comes nearest.

    Example:
        >>> refuse_unknown({"max_epoch": 5}, {"max_epochs": 300})
        Traceback (most recent call last):
        transforms.files.InputError: --max_epoch: no such setting; did you mean --max_epochs?
    """
    for name in given:
        text = json.dumps([known, {other: value for other, value in given.items() if other != name}], default=str)
        *parents, last = name.replace("::", "#").split("#")
        place: Any = known
        for depth, parent in enumerate(parents):
            inner = place[int(parent)] if isinstance(place, list) else (place or {}).get(parent)
            if inner is None and isinstance(place, dict):
                # the first part that there is not
                parents, last = parents[:depth], parent
                break
            place = inner
        new = isinstance(place, dict) and last not in place and "_target_" not in place
        if new and not last.startswith("_") and not re.search(rf"[@%]{re.escape(last)}\b", text):
            near = close(last, place) or close(last, known)
            where = "#".join([*parents, near[0]]) if near and near[0] in place else "".join(near)
            nearest = close(last, [key for key in place if key[:1] not in "_+"], SHOWN, cutoff=0)
            remedy = f"did you mean --{where}?" if near else f"the nearest are {', '.join(nearest)}" * bool(nearest)
            raise InputError(f"--{shortened(printable(name))}: no such setting", remedy=remedy)


def refuse_no_component(given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuses words and numbers where the configuration has components: a network by its name alone.

    Args:
        given: the overrides by name.
        known: the configuration without them.

    Raises:
        InputError: naming the setting, and the component that it has.

    Example:
        >>> refuse_no_component({"network_def": "unet"}, {"network_def": {"_target_": "networks.CMUNeXt"}})
        Traceback (most recent call last):
        transforms.files.InputError: --network_def unet: expected a component, {'_target_': 'networks.CMUNeXt', ...
    """
    for name, value in given.items():
        place: Any = known
        for part in name.replace("::", "#").split("#"):
            try:
                place = place[int(part)] if isinstance(place, list) else place[part]
            except (KeyError, ValueError, IndexError, TypeError):
                break
        else:
            is_word = isinstance(value, str) and value[:1] not in tuple("$@%") and value.lower() != "null"
            fact = f"--{name} {shortened(printable(str(value)))}: expected"
            if isinstance(place, dict) and "_target_" in place:
                lacks = isinstance(value, dict) and "_target_" not in value
                if is_word or lacks or isinstance(value, int | float | list):
                    raise InputError(f"{fact} a component, {{'_target_': {place['_target_']!r}, …}} for instance")
            listed = isinstance(place, list) and any(isinstance(one, dict) and "_target_" in one for one in place)
            if listed and (is_word or isinstance(value, int | float | dict)):
                raise InputError(f"{fact} a list of components, [{{'_target_': …}}, …]")


def refuse_no_python(config: Any, name: str = "") -> None:
    """Refuses expressions that Python cannot read, wherever they stand.

    Args:
        config: the configuration.
        name: what it is the part of.

    Raises:
        InputError: naming the setting.

    Example:
        >>> refuse_no_python({"train": {"batch_size": "$("}})
        Traceback (most recent call last):
        transforms.files.InputError: --train#batch_size $(: no Python expression ('(' was never closed)
    """
    if isinstance(config, dict | list):
        for key, value in config.items() if isinstance(config, dict) else enumerate(config):
            refuse_no_python(value, f"{name}#{key}" if name else str(key))
    elif isinstance(config, str) and config.startswith("$") and not os.path.lexists(config):
        try:
            # MONAI replaces references by code
            ast.parse(re.sub(r"@\w+((#|::)\w+)*", "_", config[1:].strip()))
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            reason = getattr(error, "msg", None) or error
            fact = f"--{name} {shortened(printable(config))}: no Python expression ({reason})"
            raise InputError(fact) from error


# What `--tracking` brings along.
TRACKING: set[str] = {*dict(DEFAULT_MLFLOW_SETTINGS["configs"])}  # type: ignore[call-overload]
