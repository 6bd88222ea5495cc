"""What a network costs on this machine: parameters, multiply-accumulates, latency and memory of one image.

All networks of a table are measured in one run, in turns, as evaluation uses them: with norms folded where a network
knows how (`frozen`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from benchmarks.harness import interleaved, machine, peak_memory
from bundles.configurations import bundle_of
from bundles.settings import with_values
from experiments.plan import Cell, merged
from networks.training import prepare_network
from transforms import InputError, replacing

COUNTED = (
    "MACs: convolutions, matrix products and attention of one image as torch.utils.flop_counter counts them (two of its"
    " operations are one), and selective scans by formula, 4 N + 2 multiplications (N: size of the state) for each"
    " position, channel and direction, and the projection of their time steps; not norms, activations, pooling,"
    " interpolation and other arithmetic of single values"
)
SCANS = ("selective_scan::cpu_scan",)


@dataclass(frozen=True)
class Cost:
    """None where it cannot be said; `why` says why there are no multiply-accumulates."""

    parameters: int
    macs: int | None
    why: str
    latency_ms: float | None
    memory_mib: float | None


@dataclass(frozen=True)
class Input:
    """A network's definition as a cell has it, and the size (C, H, W) of its input."""

    definition: str
    shape: tuple[int, ...]

    def build(self) -> nn.Module:
        """The network, untrained, in eval mode.

        Raises:
            InputError: when the definition makes no network.
        """
        parser = ConfigParser(json.loads(self.definition))
        network = parser.get_parsed_content("network_def")
        if not isinstance(network, nn.Module):
            raise InputError(f"{type(network).__name__} is no network")
        return network.eval()


def input_of(cell: Cell) -> Input:
    """What is measured for a cell."""
    config = with_values(merged(cell.files)) | {key: value for key, value in cell.overrides.items() if "#" not in key}
    needed = {key: config[key] for key in ("imports", "in_channels", "classes", "label_map", "labels") if key in config}
    definition = needed | {"network_def": config["network_def"], "bundle_root": str(bundle_of(cell.files[0]))}
    for key, value in cell.overrides.items():
        if key.startswith("network_def#"):
            definition["network_def"] = {**definition["network_def"], key.partition("#")[2]: value}
    shape = (int(config.get("in_channels", 1)), *ensure_tuple_rep(config["image_size"], 2))
    return Input(json.dumps(definition, sort_keys=True), shape)


def count(network: nn.Module, image: Tensor) -> tuple[int | None, str]:
    """Multiply-accumulates of one forward pass, or None and why there are none to give.

    Example:
        >>> count(nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 16, 16))
        (55296, '')
    """
    scan = getattr(torch.ops.selective_scan, "cpu_scan", None)
    formulas: dict[Any, Callable[..., int]] = {} if scan is None else {scan: _scan_flops}
    with torch.no_grad(), _Operators() as seen, FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        network(image)
    known = {*map(str, flop_registry), *SCANS}
    if unknown := sorted(name for name in seen.names if not name.startswith("aten::") and name not in known):
        return None, f"the operator {unknown[0]} is not counted"
    if any(hasattr(module, "scan_backend") for module in network.modules()) and not seen.names & set(SCANS):
        return None, "the selective scan is counted where its native kernel is built"
    return counter.get_total_flops() // 2, ""


def _scan_flops(
    u: Sequence[int], delta: Any, B: Any, C: Any, x_dbl: Any, dt_weight: Any, A: Sequence[int], *rest: Any, **more: Any
) -> int:
    """Twice the multiplications of `selective_scan.cpu_scan`, from the shapes of its arguments."""
    state = A[1]
    if dt_weight is None:
        batch, channels, length = u
        return 2 * batch * channels * length * (4 * state + 2)
    batch, height, width, channels = u
    directions, _, rank = dt_weight
    return 2 * batch * height * width * directions * channels * (4 * state + 2 + rank)


class _Operators(TorchDispatchMode):
    """Notes the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def measured(inputs: Mapping[str, Input], file: Path, again: bool = False) -> tuple[dict[str, Cost], dict[str, Any]]:
    """The cost of each row's network, and what the figures depend on.

    Args:
        inputs: of each row.
        file: keeps what was measured; rows that are all in it are not measured again.
        again: measure though they are.
    """
    keys = {name: f"{one.definition} {list(one.shape)}" for name, one in inputs.items()}
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        known = {key: Cost(**value) for key, value in before["costs"].items()}
        facts = dict(before["machine"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        known, facts = {}, {}
    if again or not set(keys.values()) <= known.keys():
        facts = machine() | {"load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None}
        facts["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        known = _measure({keys[name]: inputs[name] for name in sorted(inputs)})
        with replacing(file) as path:
            content = {"machine": facts, "costs": {key: asdict(cost) for key, cost in known.items()}}
            path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return {name: known[key] for name, key in keys.items()}, facts


def _measure(inputs: Mapping[str, Input]) -> dict[str, Cost]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = {key: one.build() for key, one in inputs.items()}
    counts = {key: count(plain[key], torch.zeros(1, *one.shape)) for key, one in inputs.items()}
    runs = {key: _forward(plain[key], one.shape, device) for key, one in inputs.items()}
    seconds = interleaved(runs)
    return {
        key: Cost(
            sum(parameter.numel() for parameter in plain[key].parameters()),
            *counts[key],
            1e3 * seconds[key],
            _memory(one, device, runs[key]),
        )
        for key, one in inputs.items()
    }


def _forward(network: nn.Module, shape: Sequence[int], device: torch.device) -> Callable[[], None]:
    prepared = prepare_network(network, device, frozen=True)
    image = torch.rand(1, *shape, device=device)

    def run() -> None:
        with torch.inference_mode():
            prepared(image)
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def _memory(one: Input, device: torch.device, run: Callable[[], None]) -> float | None:
    """MiB of the network and one image's forward pass at their peak; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        return peak_memory(_build_and_run, one, processes=1)
    except (OSError, StopIteration):
        return None


def _build_and_run(one: Input) -> None:
    _forward(one.build(), one.shape, torch.device("cpu"))()
