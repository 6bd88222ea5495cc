"""VM-UNet on a CPU, batch 1: native scan against the PyTorch forms, the scan's share of the network, growth, memory."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import draw, forward, interleaved, learned, mask_iou, peak_memory, step, untouched
from networks import VMUNet, selective_scan
from networks.training import prepare_network
from networks.vmunet import SS2D

CPU = torch.device("cpu")


class Floor(SS2D):
    """SS2D without its core: no projection to delta, B and C, and no scan. What no scan can be faster than."""

    def scan(self, x: Tensor) -> Tensor:
        return x


class PublishedFloor(SS2D):
    """The same floor laid out as published: one product cut in two, a channels-first convolution, copies between."""

    def forward(self, x: Tensor) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2).contiguous()))
        x = x.permute(0, 2, 3, 1).contiguous()
        return self.out_proj(self.out_norm(x) * F.silu(z))


def network(kind: type[SS2D] = SS2D, backend: str | None = None) -> VMUNet:
    torch.manual_seed(0)
    built = VMUNet(scan_backend=backend).eval()
    for module in built.modules():
        if isinstance(module, SS2D):
            module.__class__ = kind
    return built


def training_step(net: nn.Module, size: int, batch: int = 1) -> Callable[[], None]:
    return step(net, torch.optim.AdamW(net.parameters(), fused=True), size, batch)  # the optimizer of the bundles


def reference_forward() -> Callable[[], Tensor]:
    return forward(network(backend="reference"), 256)


def published_floor() -> Callable[[], Tensor]:
    return forward(network(PublishedFloor), 256)


def reference_training_step(size: int) -> Callable[[], None]:
    return training_step(network(backend="reference"), size)


def memory_of_training(kind: type[SS2D]) -> None:
    training_step(network(kind), 224, batch=4)()


def memory_of_forward(size: int) -> None:
    forward(network(), size)()


def scan() -> list[dict[str, Any]]:
    """One-dimensional scan, batch 1, 384 channels, L 1024, N 16."""
    torch.manual_seed(0)
    u, delta = torch.randn(1, 384, 1024), torch.rand(1, 384, 1024)
    A, B, C = -torch.rand(384, 16), torch.randn(1, 1, 16, 1024), torch.randn(1, 1, 16, 1024)
    seconds = interleaved(
        {
            backend: lambda backend=backend: selective_scan(u, delta, A, B, C, delta_softplus=True, backend=backend)
            for backend in ("cpu", "parallel", "reference")
        }
    )
    return [
        row("scan, 384 channels, L 1024, against `reference`", seconds["cpu"], seconds["reference"]),
        row(
            "scan, 384 channels, L 1024, against `parallel`, the faster PyTorch form",
            seconds["cpu"],
            seconds["parallel"],
            50,
        ),
    ]


def inference() -> list[dict[str, Any]]:
    net, images = learned(network()), draw(16, 256, seed=256)[0]
    halves = {"bfloat16": prepare_network(net, CPU, "bfloat16", frozen=True)}
    halves["compiled"] = prepare_network(net, CPU, "bfloat16", compiled="auto", frozen=True)
    iou = {name: mask_iou([net, half], images) for name, half in halves.items()}
    quick = {"network": forward(net, 256), "floor": forward(network(Floor), 256)}
    quick |= {name: forward(half, 256) for name, half in halves.items()}
    with untouched(published_floor) as published:
        seconds = interleaved({**quick, "published": published}, rounds=21)
    with untouched(reference_forward) as reference:
        slow = interleaved({"network": quick["network"], "reference": reference}, rounds=4, warm_up=1, turn=2)
    took = seconds["network"]
    return [
        row("VM-UNet forward, 256², against `reference`", slow["network"], slow["reference"], 60),
        row("VM-UNet forward, 256², time over the published layers without the scan", took, seconds["published"], 1.4),
        row("VM-UNet forward, 256², time over our own layers without the scan", took, seconds["floor"]),
        {
            **row("VM-UNet forward, 256², bfloat16 against float32", seconds["bfloat16"], took),
            "iou": iou["bfloat16"],
        },
        {
            **row("VM-UNet forward, 256², bfloat16 compiled against float32", seconds["compiled"], took, 1.5),
            "iou": iou["compiled"],
        },
    ]


def training() -> list[dict[str, Any]]:
    seconds = interleaved({"forward": forward(network(), 256), "step": training_step(network(), 256)}, rounds=7)
    step_96, step_128 = training_step(network(), 96), training_step(network(), 128)
    with untouched(reference_training_step, 96) as reference:
        small = interleaved({"step": step_96, "reference": reference}, rounds=3, warm_up=1, turn=2)
    with untouched(reference_training_step, 128) as reference:  # minutes a step
        middle = interleaved({"step": step_128, "reference": reference}, rounds=1, warm_up=0, turn=2)
    memory = [peak_memory(memory_of_training, kind) for kind in (SS2D, Floor)]
    return [
        row("VM-UNet training step, 256², time over the forward", seconds["step"], seconds["forward"], 4),
        row("VM-UNet training step, 96², against autograd through `reference`", small["step"], small["reference"], 100),
        row("VM-UNet training step, 128², against autograd through `reference`", middle["step"], middle["reference"]),
        memory_row(
            "VM-UNet training step, 224², batch 4, peak memory over our own layers without the scan", *memory, 2
        ),
    ]


def growth() -> list[dict[str, Any]]:
    net = network()
    seconds = interleaved({str(size): forward(net, size) for size in (256, 512)}, rounds=7)
    weights = peak_memory(memory_of_forward, 32)
    memory = {size: peak_memory(memory_of_forward, size) - weights for size in (256, 512)}
    return [
        row("VM-UNet forward, 512² time over 256²", seconds["512"], seconds["256"], 4.6),
        memory_row("VM-UNet forward, 512² extra memory over 256²", memory[512], memory[256], 4.5),
    ]


def row(what: str, ours: float, other: float, goal: float | None = None) -> dict[str, Any]:
    """`goal` is a least speed-up where the row compares "against", a greatest ratio where it says "over"."""
    ratio = ours / other if " over " in what else other / ours
    found = {"what": what, "ms": 1e3 * ours, "against_ms": 1e3 * other, "ratio": ratio}
    return found if goal is None else {**found, "goal": goal}


def memory_row(what: str, ours: float, other: float, goal: float) -> dict[str, Any]:
    return {"what": what, "mib": ours, "against_mib": other, "ratio": ours / other, "goal": goal}


def rows() -> Iterator[dict[str, Any]]:
    for measure in (scan, inference, training, growth):
        yield from measure()
