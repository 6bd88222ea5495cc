"""CMUNeXt base on a CPU, 256²: bfloat16, channels-last, folded norms and compiling against eager float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Row, draw, forward, interleaved, learned, mask_iou, row, step, untouched
from networks import cmunext
from networks.training import prepare_network

SIZE = 256
CPU = torch.device("cpu")


def build() -> nn.Module:
    torch.manual_seed(0)
    return cmunext()


def training_step(network: nn.Module) -> Callable[[], None]:
    return step(network, torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9), SIZE, batch=8)


def plain_forward() -> Callable[[], Any]:
    return forward(build().eval(), SIZE)


def plain_training_step() -> Callable[[], Any]:
    return training_step(build())


def inference() -> list[Row]:
    network, images = learned(build()), draw(16, SIZE, seed=SIZE)[0]
    float32 = prepare_network(network, CPU, compile="auto", frozen=True)
    bfloat16 = prepare_network(network, CPU, "bfloat16", compile="auto", frozen=True)
    with torch.inference_mode():
        difference = float((float32(images[:1]) - network(images[:1])).abs().max())
    iou = mask_iou([network, bfloat16], images)
    with untouched(plain_forward) as plain:
        seconds = interleaved(
            {"plain": plain, "float32": forward(float32, SIZE), "bfloat16": forward(bfloat16, SIZE)}, rounds=21
        )
    what = f"CMUNeXt forward pass, {SIZE}², {{}}, norms folded, channels-last, compiled: speed-up over eager float32"
    return [
        row(what.format("float32"), seconds["float32"], seconds["plain"], "higher", 1.8, difference=difference),
        row(what.format("bfloat16"), seconds["bfloat16"], seconds["plain"], "higher", 2.5, iou=iou),
    ]


def training() -> list[Row]:
    bfloat16 = training_step(prepare_network(build(), CPU, "bfloat16"))
    with untouched(plain_training_step) as plain:
        seconds = interleaved({"plain": plain, "bfloat16": bfloat16}, rounds=5, warm_up=1)
    what = f"CMUNeXt training step, {SIZE}², batch 8, bfloat16, channels-last: speed-up over eager float32"
    return [row(what, seconds["bfloat16"], seconds["plain"], "higher", 2.5)]


def rows() -> Iterator[Row]:
    for measure in (inference, training):
        yield from measure()
