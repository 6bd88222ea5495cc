"""The content of an exported network's file, in each format, and a function that computes with it."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from monai.data import save_net_with_metadata
from monai.networks import convert_to_torchscript
from torch import Tensor, nn

from networks.selective_scan.onnx import to_onnx
from networks.selective_scan.pt2 import quiet, to_pt2
from transforms import InputError

Apply = Callable[[np.ndarray], np.ndarray]
# The JSON files that an exported network holds, by name.
Contents = Mapping[str, Any]
logger = logging.getLogger(__name__)


def _torchscript(network: nn.Module, example: Tensor, contents: Contents, name: str) -> tuple[bytes, Apply]:
    # in memory first: PyTorch's writer aborts the process on a full disk
    content = io.BytesIO()
    more = {name: text.encode() for name, text in _texts(contents).items() if name != "metadata.json"}
    program: Any = convert_to_torchscript(network)
    save_net_with_metadata(program, content, meta_values=contents["metadata.json"], more_extra_files=more)
    return _without_traces(content, name), lambda images: program(torch.from_numpy(images)).numpy()


def _without_traces(program: io.BytesIO, name: str) -> bytes:
    """A TorchScript archive without time and paths of this machine, in a folder called as the file, which MONAI Deploy
    looks for."""
    content = io.BytesIO()
    with zipfile.ZipFile(program) as archive, zipfile.ZipFile(content, "w") as clean:
        for entry in archive.namelist():
            _, _, rest = entry.partition("/")
            # where in the source a line of code came from, and a number made of everything
            if rest.endswith(".debug_pkl") or rest == ".data/serialization_id":
                continue
            data = archive.read(entry)
            if rest == "extra/metadata.json":
                data = json.dumps(
                    {key: value for key, value in json.loads(data).items() if key != "timestamp"}
                ).encode()
            clean.writestr(zipfile.ZipInfo(f"{name}/{rest}"), data)
    return content.getvalue()


def _onnx(network: nn.Module, example: Tensor, contents: Contents, name: str) -> tuple[bytes, Apply]:
    import onnx
    import onnxruntime

    axes = {axis: torch.export.Dim(name) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    model = to_onnx(network, example, axes).model_proto
    _remove_traces(model.graph)
    onnx.helper.set_model_props(model, _texts(contents))
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (image,) = (one.name for one in session.get_inputs())
    return content, lambda images: np.asarray(session.run(None, {image: images})[0])


def _remove_traces(graph: Any) -> None:
    """Takes off an ONNX graph what the exporter notes of each node, paths of this machine among it."""
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _remove_traces(attribute.g)


def _pt2(network: nn.Module, example: Tensor, contents: Contents, name: str) -> tuple[bytes, Apply]:
    program = to_pt2(network, example)
    smallest = _smallest(program.module(), example, getattr(network, "multiple", 1))
    contents["description.json"]["input"]["smallest"] = smallest
    if smallest > 1:
        logger.info(f"the exported program takes images of {smallest} pixels or more a side, and refuses smaller ones")
    content = io.BytesIO()
    with quiet():
        torch.export.save(program, content, extra_files=_texts(contents))
        content.seek(0)
        module = torch.export.load(content).module()
    return content.getvalue(), lambda images: module(torch.from_numpy(images)).numpy()


def _smallest(module: nn.Module, example: Tensor, multiple: int) -> int:
    """The shortest side that an exported program takes: conditions of its exporter may ask for more than one pixel."""
    for side in (1, multiple + 1):
        # a program says no by an AssertionError
        with contextlib.suppress(AssertionError):
            module(example[:1, :, :1, :1].expand(1, -1, side, side))
            return side
    raise InputError("not written: PyTorch cannot export this network for images of any size", remedy="export to ONNX")


def _texts(contents: Contents) -> dict[str, str]:
    return {name: json.dumps(content) for name, content in contents.items()}


CONTENT_OF: Mapping[str, Callable[[nn.Module, Tensor, Contents, str], tuple[bytes, Apply]]] = {
    "torchscript": _torchscript,
    "onnx": _onnx,
    "pt2": _pt2,
    "page": _onnx,
}
