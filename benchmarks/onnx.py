"""Networks as ONNX files in onnxruntime against the same networks in eager PyTorch, on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Row, forward, interleaved, row
from networks import VMUNet, cmunext
from networks.selective_scan.onnx import to_onnx

SIZE = 256
AXES = {axis: torch.export.Dim(name) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}


def in_onnxruntime(network: nn.Module) -> Callable[[], Any]:
    """The forward pass of one image through the network's ONNX file, with as many threads as PyTorch has."""
    import onnxruntime

    model = to_onnx(network, torch.zeros(2, 3, 96, 64), AXES).model_proto
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    image = torch.rand(1, 3, SIZE, SIZE).numpy()
    return lambda: session.run(None, {"image": image})


def rows() -> Iterator[Row]:
    for name, build, goal in (("CMUNeXt", cmunext, 1.2), ("VM-UNet", VMUNet, 6)):
        torch.manual_seed(0)
        network = build().eval()
        seconds = interleaved({"onnx": in_onnxruntime(network.frozen()), "eager": forward(network, SIZE)})
        what = f"{name} forward pass, {SIZE}², onnxruntime: time relative to eager float32"
        yield row(what, seconds["onnx"], seconds["eager"], "lower", goal)
