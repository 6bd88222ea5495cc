"""Reads published and own checkpoints, and says exactly what matched.

Understood are a bare state_dict, one nested under a usual key (`model`, `model_state_dict`, `state_dict`, `network`,
as MONAI's CheckpointSaver and the released training scripts write them), the prefixes `module.` and `vmunet.`, and the
checkpoint of a VMamba classifier, from which VM-UNet starts twice: its stages become the encoder and, mirrored, the
decoder (Ruan et al., arXiv 2402.02491).
"""

import hashlib
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

NESTED_KEYS = ("model_state_dict", "state_dict", "model", "network", "net")
PREFIXES = ("module.", "vmunet.")
SHOWN = 5


@dataclass(frozen=True)
class WeightReport:
    """What `load_weights` found. Names are the model's, those of `unexpected` the file's.

    `expected` counts the names that had to be found: the model's, or those that the published procedure copies from
    a VMamba classifier.
    """

    path: str
    sha256: str
    expected: int
    matched: list[str] = field(repr=False)
    missing: list[str]
    unexpected: list[str]
    mis_shaped: list[str]

    @property
    def share(self) -> float:
        """Matched names over expected names, 0 … 1."""
        return len(self.matched) / self.expected if self.expected else 0.0

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "mis-shaped": self.mis_shaped}
        listed = "; ".join(f"{len(names)} {kind}{_first(names)}" for kind, names in kinds.items())
        return (
            f"{self.path} (SHA-256 {self.sha256[:12]}…): {len(self.matched)} of {self.expected} tensors matched"
            f" ({100 * self.share:.1f} %); {listed}"
        )


def load_weights(model: nn.Module, path: str | Path, *, min_matched: float = 0.99) -> WeightReport:
    """Copies the tensors of the checkpoint at `path` into `model` where name and shape agree.

    Files are read with `weights_only=True`: nothing in them is executed.

    Args:
        model: a network of this package (or any module).
        path: the checkpoint.
        min_matched: least share of the expected names that must match, 0 … 1.

    Returns:
        the names that matched, and those that did not, with the file's SHA-256.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is no checkpoint, or fewer names match; the model is then as it was.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    source = _strip_prefixes(_state_dict(path))
    target = model.state_dict()
    wanted = {name: name for name in target}
    if _is_vmamba_classifier(source, target):
        wanted = _vmamba_start(source, target)

    found = {name: source[key] for name, key in wanted.items() if key in source}
    fitting = {name: tensor for name, tensor in found.items() if tensor.shape == target[name].shape}
    report = WeightReport(
        path=str(path),
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        expected=len(wanted),
        matched=list(fitting),
        missing=[name for name in wanted if name not in found],
        unexpected=sorted(set(source) - set(wanted.values())),
        mis_shaped=[
            f"{name} {tuple(found[name].shape)} for {tuple(target[name].shape)}"
            for name in found
            if name not in fitting
        ],
    )
    if report.share < min_matched:
        raise ValueError(f"{report}; at least {100 * min_matched:g} % must match (min_matched={min_matched:g})")
    model.load_state_dict(fitting, strict=False)
    return report


def _state_dict(path: Path) -> dict[str, Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} is not a checkpoint of plain tensors, and nothing else is read: {reason}") from error
    while isinstance(content, dict) and not any(isinstance(value, Tensor) for value in content.values()):
        inner = next((content[key] for key in NESTED_KEYS if isinstance(content.get(key), dict)), None)
        if inner is None:
            raise ValueError(f"{path} holds no tensors under any of the keys {', '.join(NESTED_KEYS)}")
        content = inner
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state_dict")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _strip_prefixes(source: dict[str, Tensor]) -> dict[str, Tensor]:
    # name by name: profilers add unprefixed entries to published checkpoints
    for prefix in PREFIXES:
        source = {name.removeprefix(prefix): tensor for name, tensor in source.items()}
    return source


def _is_vmamba_classifier(source: dict[str, Tensor], target: dict[str, Tensor]) -> bool:
    def has(names: dict[str, Tensor], start: str) -> bool:
        return any(name.startswith(start) for name in names)

    return has(target, "layers_up.") and has(source, "layers.") and not has(source, "layers_up.")


def _vmamba_start(source: dict[str, Tensor], target: dict[str, Tensor]) -> dict[str, str]:
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


def _first(names: list[str]) -> str:
    if not names:
        return ""
    return f" ({', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''})"
