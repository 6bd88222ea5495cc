"""CMUNeXt base on a CPU, batch 1, 256²: the switches of the bundles against the plain eager float32 network."""

from typing import Any

import torch
from torch import nn

from benchmarks.harness import interleaved
from networks import cmunext
from networks.training import prepare_network

SIZE = 256


def build() -> nn.Module:
    """Random weights, and norms that have seen something, so that folding them changes more than nothing."""
    torch.manual_seed(0)
    network = cmunext()
    for _ in range(3):
        network(torch.rand(2, 3, 64, 64))
    return network.eval()


def inference() -> list[dict[str, Any]]:
    cpu, image = torch.device("cpu"), torch.rand(1, 3, SIZE, SIZE)
    networks = {
        "plain": build(),
        "float32": prepare_network(build(), cpu, compiled="auto", frozen=True),
        "bfloat16": prepare_network(build(), cpu, "bfloat16", compiled="auto", frozen=True),
    }
    with torch.inference_mode():
        logits = {name: network(image) for name, network in networks.items()}
        seconds = interleaved({name: lambda n=network: n(image) for name, network in networks.items()}, rounds=21)
    difference = float((logits["float32"] - logits["plain"]).abs().max())
    masks = [logits[name] > logits["plain"].median() for name in ("plain", "bfloat16")]
    iou = float((masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum())
    return [
        {
            **compare("CMUNeXt forward, float32 folded, channels-last, compiled", seconds, "float32", 1.8),
            "difference": difference,
        },
        {**compare("CMUNeXt forward, bfloat16 folded, channels-last, compiled", seconds, "bfloat16", 2.5), "iou": iou},
    ]


def training() -> list[dict[str, Any]]:
    image = torch.rand(8, 3, SIZE, SIZE)

    def step(network: nn.Module) -> Any:
        network.train()
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

        def run() -> None:
            optimizer.zero_grad()
            network(image).square().mean().backward()
            optimizer.step()

        return run

    cpu = torch.device("cpu")
    alternatives = {"plain": step(build()), "bfloat16": step(prepare_network(build(), cpu, "bfloat16"))}
    seconds = interleaved(alternatives, rounds=5, warm_up=1)
    return [compare("CMUNeXt training step, batch 8, channels-last and bfloat16", seconds, "bfloat16", 2.5)]


def compare(what: str, seconds: dict[str, float], name: str, goal: float) -> dict[str, Any]:
    return {
        "what": f"{what}, against plain eager float32",
        "ms": 1e3 * seconds[name],
        "against_ms": 1e3 * seconds["plain"],
        "ratio": seconds["plain"] / seconds[name],
        "goal": goal,
    }


def rows() -> list[dict[str, Any]]:
    return inference() + training()
