"""VM-UNet on a CPU: the native scan against the PyTorch forms, the scan's share of the network, growth and memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import (
    Row,
    draw,
    forward,
    interleaved,
    learned,
    mask_iou,
    memory_row,
    peak_memory,
    row,
    step,
    untouched,
)
from networks import VMUNet
from networks.selective_scan import selective_scan
from networks.training import prepare_network
from networks.vmunet import SS2D

CPU = torch.device("cpu")


class Floor(SS2D):
    """SS2D without its core, that is without the projection to delta, B and C and without the scan: a lower bound."""

    def scan(self, x: Tensor) -> Tensor:
        return x


class PublishedFloor(SS2D):
    """`Floor` laid out as published: one product cut in two, a channels-first convolution, copies between them."""

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


def scan() -> list[Row]:
    torch.manual_seed(0)
    u, delta = torch.randn(1, 384, 1024), torch.rand(1, 384, 1024)
    A, B, C = -torch.rand(384, 16), torch.randn(1, 1, 16, 1024), torch.randn(1, 1, 16, 1024)
    seconds = interleaved(
        {
            backend: partial(selective_scan, u, delta, A, B, C, delta_softplus=True, backend=backend)
            for backend in ("cpu", "parallel", "reference")
        }
    )
    what = "selective scan, 384 channels, length 1024: speed-up over"
    return [
        row(f"{what} `reference`", seconds["cpu"], seconds["reference"], "higher"),
        row(f"{what} `parallel`, the faster PyTorch form", seconds["cpu"], seconds["parallel"], "higher", 50),
    ]


def inference() -> list[Row]:
    net, images = learned(network()), draw(16, 256, seed=256)[0]
    bfloat16 = {"bfloat16": prepare_network(net, CPU, "bfloat16", frozen=True)}
    bfloat16["compiled"] = prepare_network(net, CPU, "bfloat16", compile="auto", frozen=True)
    iou = {name: mask_iou([net, prepared], images) for name, prepared in bfloat16.items()}
    quick = {"network": forward(net, 256), "floor": forward(network(Floor), 256)}
    quick |= {name: forward(prepared, 256) for name, prepared in bfloat16.items()}
    with untouched(published_floor) as published:
        seconds = interleaved({**quick, "published": published}, rounds=21)
    with untouched(reference_forward) as reference:
        slow = interleaved({"network": quick["network"], "reference": reference}, rounds=4, warm_up=1, turn=2)
    took = seconds["network"]
    what = "VM-UNet forward pass, 256²"
    return [
        row(f"{what}: speed-up over `reference`", slow["network"], slow["reference"], "higher", 60),
        row(
            f"{what}: time relative to the published layers without the scan", took, seconds["published"], "lower", 1.4
        ),
        row(f"{what}: time relative to our own layers without the scan", took, seconds["floor"], "lower"),
        row(f"{what}, bfloat16: speed-up over float32", seconds["bfloat16"], took, "higher", iou=iou["bfloat16"]),
        row(
            f"{what}, bfloat16, compiled: speed-up over float32",
            seconds["compiled"],
            took,
            "higher",
            1.5,
            iou=iou["compiled"],
        ),
    ]


def training() -> list[Row]:
    seconds = interleaved({"forward": forward(network(), 256), "step": training_step(network(), 256)}, rounds=7)
    step_96, step_128 = training_step(network(), 96), training_step(network(), 128)
    with untouched(reference_training_step, 96) as reference:
        small = interleaved({"step": step_96, "reference": reference}, rounds=3, warm_up=1, turn=2)
    with untouched(reference_training_step, 128) as reference:  # minutes a step
        middle = interleaved({"step": step_128, "reference": reference}, rounds=1, warm_up=0, turn=2)
    scanning, floor = (peak_memory(memory_of_training, kind) for kind in (SS2D, Floor))
    what, over = "VM-UNet training step", "speed-up over autograd through `reference`"
    return [
        row(f"{what}, 256²: time relative to the forward pass", seconds["step"], seconds["forward"], "lower", 4),
        row(f"{what}, 96²: {over}", small["step"], small["reference"], "higher", 100),
        row(f"{what}, 128²: {over}", middle["step"], middle["reference"], "higher"),
        memory_row(
            f"{what}, 224², batch 4: peak memory relative to our own layers without the scan", scanning, floor, 2
        ),
    ]


def growth() -> list[Row]:
    net = network()
    seconds = interleaved({str(size): forward(net, size) for size in (256, 512)}, rounds=7)
    weights = peak_memory(memory_of_forward, 32)
    large, small = (peak_memory(memory_of_forward, size) - weights for size in (512, 256))
    what = "VM-UNet forward pass, 512²"
    return [
        row(f"{what}: time relative to 256²", seconds["512"], seconds["256"], "lower", 4.6),
        memory_row(f"{what}: peak memory beyond the weights, relative to 256²", large, small, 4.5),
    ]


def rows() -> Iterator[Row]:
    for measure in (scan, inference, training, growth):
        yield from measure()
