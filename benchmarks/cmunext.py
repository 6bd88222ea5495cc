"""CMUNeXt base on a CPU, batch 1, 256²: the switches of the bundles against the plain eager float32 network."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.harness import draw, forward, interleaved, learned, mask_iou, step, untouched
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


def inference() -> list[dict[str, Any]]:
    network, images = learned(build()), draw(16, SIZE, seed=SIZE)[0]
    single = prepare_network(network, CPU, compiled="auto", frozen=True)
    half = prepare_network(network, CPU, "bfloat16", compiled="auto", frozen=True)
    with torch.inference_mode():
        difference = float((single(images[:1]) - network(images[:1])).abs().max())
    iou = mask_iou([network, half], images)
    with untouched(plain_forward) as plain:
        seconds = interleaved(
            {"plain": plain, "float32": forward(single, SIZE), "bfloat16": forward(half, SIZE)}, rounds=21
        )
    return [
        {
            **compare("CMUNeXt forward, float32 folded, channels-last, compiled", seconds, "float32", 1.8),
            "difference": difference,
        },
        {**compare("CMUNeXt forward, bfloat16 folded, channels-last, compiled", seconds, "bfloat16", 2.5), "iou": iou},
    ]


def training() -> list[dict[str, Any]]:
    half = training_step(prepare_network(build(), CPU, "bfloat16"))
    with untouched(plain_training_step) as plain:
        seconds = interleaved({"plain": plain, "bfloat16": half}, rounds=5, warm_up=1)
    return [compare("CMUNeXt training step, batch 8, channels-last and bfloat16", seconds, "bfloat16", 2.5)]


def compare(what: str, seconds: dict[str, float], name: str, goal: float) -> dict[str, Any]:
    return {
        "what": f"{what}, against plain eager float32",
        "ms": 1e3 * seconds[name],
        "against_ms": 1e3 * seconds["plain"],
        "ratio": seconds["plain"] / seconds[name],
        "goal": goal,
    }


def rows() -> Iterator[dict[str, Any]]:
    for measure in (inference, training):
        yield from measure()
