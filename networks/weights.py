"""Reads published and own checkpoints, and says exactly what matched.

Understood are files of `torch.save` and `.safetensors`: a bare state_dict, or one nested under a usual key, as MONAI's
CheckpointSaver, Lightning, nnU-Net and the released training scripts write them. Prefixes that wrappers put before the
names are taken off (`module.`, `vmunet.`, `_orig_mod.` of torch.compile, `model.` of Lightning, `ema.` of averaged
weights). VM-UNet also starts from the checkpoint of a VMamba classifier, twice: its stages become the encoder and,
mirrored, the decoder (Ruan et al., arXiv 2402.02491).
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

NESTED_KEYS = ("model_state_dict", "state_dict", "network_weights", "model", "network", "net")
PREFIXES = ("module.", "vmunet.", "_orig_mod.", "model.", "ema.", "ema_model.")
# What profilers (thop) and averaging (torch.optim.swa_utils) leave between the weights.
BOOKKEEPING = ("total_ops", "total_params", "n_averaged")
PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SHOWN = 5


@dataclass(frozen=True)
class WeightReport:
    """What `load_weights` found. Names are the model's, those of `unexpected` the file's.

    `expected` counts the names that had to be found: the model's, or those that the published procedure copies from
    a VMamba classifier. `left_random` were not looked for: the tensors of a new head, or what a classifier lacks.

    Example:
        >>> report = WeightReport("a.pt", "0" * 64, 2, ["weight"], missing=["bias"], unexpected=[], mis_shaped=[])
        >>> report.share
        0.5
    """

    path: str
    sha256: str
    expected: int
    matched: list[str] = field(repr=False)
    missing: list[str]
    unexpected: list[str]
    mis_shaped: list[str]
    left_random: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Matched names over expected names, 0 … 1."""
        return len(self.matched) / self.expected if self.expected else 0.0

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "mis-shaped": self.mis_shaped}
        listed = "; ".join(f"{len(names)} {kind}{_first(names)}" for kind, names in kinds.items())
        head = f"; left random: {', '.join(self.left_random)}" if self.left_random else ""
        return (
            f"{self.path} (SHA-256 {self.sha256[:12]}…): {len(self.matched)} of {self.expected} tensors matched"
            f" ({100 * self.share:.1f} %); {listed}{head}"
        )


def load_weights(
    model: nn.Module, path: str | Path, *, start: bool = False, new_head: bool | str = False, min_matched: float = 1.0
) -> WeightReport:
    """Copies the tensors of the checkpoint at `path` into `model`, all of them or none.

    Files are read with `weights_only=True`: nothing in them is executed.

    Args:
        model: a network of this package (or any module).
        path: the checkpoint.
        start: a training starts from the weights. The checkpoint of a VMamba classifier is taken then, and the two
            arguments below count. Evaluation and use need every tensor.
        new_head: the checkpoint is of other classes. The model's last layer stays as it is, whatever the file holds of
            it. True takes the layer that the model names as its `head`; a name says which layer.
        min_matched: least share of the expected names that must match, 0 … 1. Below 1 the file may also hold tensors
            that the model does not have.

    Returns:
        the names that matched, and those that did not, with the file's SHA-256.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged or no checkpoint, holds values that are not finite or no floating-point
            numbers, or does not match. The model is then as it was.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "linear.pt"
        >>> torch.save({"module.weight": torch.ones(1, 2), "module.bias": torch.zeros(1)}, file)
        >>> load_weights(nn.Linear(2, 1), file).matched
        ['weight', 'bias']
    """
    if not start and (new_head or min_matched < 1):
        raise ValueError("new_head and min_matched are for starting a training: give start=True as well")
    path = Path(path)
    target = model.state_dict()
    head = _head(model, new_head, target)
    source = _without_prefixes(_state_dict(path), target, path)
    wanted = {name: name for name in target if name not in head}
    classifier = start and _is_vmamba_classifier(source, target)
    if classifier:
        wanted = _vmamba_start(source, wanted)

    found = {name: source[key] for name, key in wanted.items() if key in source}
    fitting = {name: tensor for name, tensor in found.items() if tensor.shape == target[name].shape}
    unexpected = sorted(set(source) - set(wanted.values()) - head)
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    report = WeightReport(
        path=str(path),
        sha256=sha256,
        expected=len(wanted),
        matched=list(fitting),
        missing=[name for name in wanted if name not in found],
        unexpected=unexpected,
        mis_shaped=[
            f"{name} {tuple(found[name].shape)} for {tuple(target[name].shape)}"
            for name in found
            if name not in fitting
        ],
        left_random=[name for name in target if name not in wanted],
    )
    if not fitting:
        raise ValueError(f"{report}{_differing_prefix(source, target)}")
    if report.share < min_matched:
        raise ValueError(f"{report}; {_requirement(min_matched)}{_head_hint(model, report, source, target)}")
    # a classifier's own head is not expected to be wanted
    if min_matched == 1 and not classifier and unexpected:
        raise ValueError(
            f"{report}; the model has no {unexpected[0]}: it is smaller than the network that the file is of, build it"
            " as that one was (network_def)"
        )
    for name, tensor in fitting.items():
        if reason := _unfit(name, tensor, target[name]):
            raise ValueError(f"{path}: {reason}")
    # norms have one dimension, and begin with ones
    matrices = [tensor for tensor in fitting.values() if tensor.ndim > 1]
    if matrices and not any(tensor.any() for tensor in matrices):
        raise ValueError(f"{path}: all its weights are 0: nothing was trained, or the file was made without them")
    model.load_state_dict(fitting, strict=False)
    return report


def _head(model: nn.Module, new_head: bool | str, target: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors of the last layer, where it is to be a new one."""
    if not new_head:
        return set()
    layer = new_head if isinstance(new_head, str) else getattr(model, "head", None)
    names = {name for name in target if isinstance(layer, str) and name.startswith(f"{layer}.")}
    if not names:
        last = list(target)[-1].rpartition(".")[0]
        raise ValueError(
            f"{type(model).__name__} has no layer {layer!r}" if isinstance(layer, str) else
            f"{type(model).__name__} does not say which layer is its head: name it, --new_head {last} for instance"
        )  # fmt: skip
    return names


def _state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of the file, by name; raises ValueError when it is damaged or holds none."""
    content = read_checkpoint(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state_dict")
    best: dict[str, Tensor] = {}
    # a counter may lie beside the nested state_dict: the level with most tensors holds the weights
    for _ in range(len(NESTED_KEYS)):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        best = max(best, tensors, key=len)
        inner = [key for key in NESTED_KEYS if isinstance(content.get(key), dict)]
        sets = [key for key in inner if _bare_names(content[key])]
        if sets:
            # averaged weights, for instance, lie under a name of each program's own
            names = _bare_names(content[sets[0]])
            sets += [
                str(key)
                for key, value in content.items()
                if key not in sets and isinstance(value, dict) and names <= _bare_names(value)
            ]
        if len(sets) > 1:
            raise ValueError(
                f"{path} holds several sets of weights, under {sets[0]} and {', '.join(sets[1:])}: save the one that is"
                " meant in a file of its own"
            )
        if not inner:
            break
        content = content[(sets or inner)[0]]
    if not best:
        raise ValueError(f"{path} holds no tensors under any of the keys {', '.join(NESTED_KEYS)}")
    return {name: tensor for name, tensor in best.items() if name.split(".")[-1] not in BOOKKEEPING}


def _bare_names(content: Mapping[Any, Any]) -> set[str]:
    """Names of the tensors in it, without prefixes."""
    return {list(_peeled(str(name)))[-1] for name, value in content.items() if isinstance(value, Tensor)}


def read_checkpoint(path: str | Path, tensors: bool = True) -> Any:
    """What `torch.save` or safetensors wrote into a file, told apart by the content. Nothing in it is executed.

    Args:
        tensors: False leaves their values out, and with them the look at the checksums: the file is hardly read.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it is damaged, or holds more than plain tensors and numbers.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "a.pt"
        >>> torch.save({"epoch": 3}, file)
        >>> read_checkpoint(file)
        {'epoch': 3}
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no weight file {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder: name the file in it" if path.is_dir() else f"{path} is no file")
    with path.open("rb") as file:
        start = file.read(16)
    if not start:
        raise ValueError(f"{path} is empty: copy it again")
    try:
        # safetensors begin with the length of their header, which is JSON
        if path.suffix.lower() == ".safetensors" or start[8:9] == b"{":
            return safetensors.torch.load_file(path) if tensors else {}
        archive = zipfile.is_zipfile(path)
        reason = _unfit_archive(path) if archive and tensors else ""
        where: dict[str, Any] = (
            {"map_location": "cpu"} if tensors or not archive else {"map_location": "meta", "mmap": True}
        )
        content = None if reason else torch.load(path, weights_only=True, **where)
    # what they raise for damaged files is not specified
    except Exception as error:
        if foreign := re.search(r"(?:GLOBAL|class|global:?) ([\w.]+)", str(error)):
            raise ValueError(
                f"{path} holds Python objects ({foreign[1]}), which are never loaded: save the network's state_dict()"
            ) from error
        raise ValueError(f"{path} is damaged, or no checkpoint of torch.save or safetensors: copy it again") from error
    if reason:
        raise ValueError(f"{path} {reason}")
    return content


def _unfit_archive(path: Path) -> str:
    """What `torch.load` does not look at: whether the archive is a program, and its checksums. Empty if all is well."""
    with zipfile.ZipFile(path) as archive:
        if any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return "is a TorchScript program: name the checkpoint it was exported from"
        damaged = archive.testzip()
        return f"is damaged: the checksum of its part {damaged} is wrong; copy it again" if damaged else ""


def _peeled(name: str) -> Iterator[str]:
    """`name`, and what is left of it as one prefix after the other is taken off."""
    yield name
    while prefix := next((prefix for prefix in PREFIXES if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
        yield name


def _without_prefixes(source: dict[str, Tensor], target: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Takes prefixes off until the name is one of the model's; names that never are lose all of them.

    Name by name, because profilers add unprefixed entries to published checkpoints.
    """
    result: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for name, tensor in source.items():
        versions = list(_peeled(name))
        short = next((version for version in versions if version in target), versions[-1])
        if short in result:
            raise ValueError(
                f"{path} holds two sets of weights, {origin[short]} and {name} for instance: keep the one that is meant"
            )
        result[short], origin[short] = tensor, name
    return result


def _is_vmamba_classifier(source: dict[str, Tensor], target: dict[str, Tensor]) -> bool:
    def has(names: dict[str, Tensor], start: str) -> bool:
        return any(name.startswith(start) for name in names)

    return has(target, "layers_up.") and has(source, "layers.") and not has(source, "layers_up.")


def _vmamba_start(source: Mapping[str, Tensor], target: Mapping[str, Any]) -> dict[str, str]:
    """Model name → file name for every tensor that the published procedure copies.

    The encoder takes its own names; decoder stage S − 1 − i takes the blocks of the file's stage i. The released
    decoder is as deep as its mirrored encoder or shallower, so each of its blocks has one to start from unless the
    file is shallower: blocks the file cannot have are not expected.
    """
    stages = 1 + max(int(name.split(".")[1]) for name in target if name.startswith("layers."))
    wanted = {}
    for name in target:
        if name.startswith(("patch_embed.", "layers.")):
            wanted[name] = name
        elif match := re.fullmatch(r"layers_up\.(\d+)\.(blocks\..+)", name):
            mirrored = f"layers.{stages - 1 - int(match[1])}.{match[2]}"
            if mirrored in target or mirrored in source:
                wanted[name] = mirrored
    return wanted


def refuse_unfit_values(module: nn.Module, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
    """Lets `module.load_state_dict` refuse what cannot be weights, whoever calls it, MONAI's commands for instance.

    Register it with `register_load_state_dict_pre_hook`.

    Example:
        >>> network = nn.Linear(1, 1)
        >>> hook = network.register_load_state_dict_pre_hook(refuse_unfit_values)
        >>> network.load_state_dict({"weight": torch.full((1, 1), torch.nan), "bias": torch.zeros(1)})
        Traceback (most recent call last):
        ...
        RuntimeError: Error(s) in loading state_dict for Linear:
            weight holds values that are not finite: the training diverged
    """
    error_messages: list[str] = others[-1]
    for name, expected in module.state_dict().items():
        tensor = state_dict.get(f"{prefix}{name}")
        if isinstance(tensor, Tensor) and (reason := _unfit(name, tensor, expected)):
            error_messages.append(reason)


def _unfit(name: str, tensor: Tensor, expected: Tensor) -> str:
    """Why a tensor that fits by name cannot be a weight; empty if it can."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        return f"{name} is a sparse, quantized or empty tensor, expected a plain one"
    if tensor.dtype not in PRECISIONS if expected.is_floating_point() else tensor.is_floating_point():
        return f"{name} is {tensor.dtype}, expected {expected.dtype}"
    # as the network will hold it: a float64 may be too large for a float32
    if tensor.is_floating_point() and not tensor.to(expected.dtype).isfinite().all():
        return f"{name} holds values that are not finite: the training diverged"
    return ""


def _requirement(min_matched: float) -> str:
    return "all must match" if min_matched == 1 else f"at least {100 * min_matched:g} % must match"


def _head_hint(model: nn.Module, report: WeightReport, source: dict[str, Tensor], target: dict[str, Tensor]) -> str:
    """What to do where the head alone does not fit."""
    head = {name for name in target if name.startswith(f"{getattr(model, 'head', None)}.")}
    odd = {text.split(" ")[0] for text in report.mis_shaped}
    if not odd or report.missing or not odd <= head:
        return ""
    theirs, ours = (tensors[max(odd)].shape[0] for tensors in (source, target))
    return (
        f"; the file is of {theirs} output channels, the model of {ours}: give it the same classes, or start a training"
        " with a new head (--new_head true)"
    )


def _differing_prefix(source: dict[str, Tensor], target: dict[str, Tensor]) -> str:
    """Where all names differ by one prefix, which."""
    for long, short, whose in ((source, target, "the file's"), (target, source, "the model's")):
        first = next(iter(short))
        for name in long:
            prefix = name.removesuffix(first)
            if prefix and prefix != name and all(f"{prefix}{other}" in long for other in short):
                return f"; {whose} names begin with {prefix!r}, the others do not"
    theirs, ours = next(iter(source), "none"), next(iter(target))
    return f"; the file names {theirs!r} for instance, the model {ours!r}: it is of another network"


def _first(names: list[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"
