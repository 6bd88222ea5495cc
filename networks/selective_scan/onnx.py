"""The selective scan in ONNX: one standard `Scan` for all channels, groups and directions, of any length.

PyTorch's exporter knows no such operator, and would write `parallel` for one length only. So the scan is exported as a
node of a domain of our own, which `to_onnx` then turns into a `Scan` whose body takes one step of the recurrence.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .directions import from_sequences, to_sequences

OPSET = 18
DOMAIN, NAME = "selective_scan", "Recurrence"
_exporting: ContextVar[bool] = ContextVar("exporting", default=False)


def exporting() -> bool:
    """True while `to_onnx` looks at a network.

    Example:
        >>> exporting()
        False
    """
    return _exporting.get()


def to_onnx(network: nn.Module, image: Tensor, dynamic_shapes: Mapping[int, Any], input_name: str = "image") -> Any:
    """Exports a network of one input and one output; its selective scans become standard `Scan` operators.

    Args:
        network: in eval mode.
        image: an example of its input.
        dynamic_shapes: axes of the input that stay open, as `torch.onnx.export` takes them.
        input_name: what the input is called; the output is `logits`.

    Returns:
        `torch.onnx.ONNXProgram`.

    Raises:
        ModuleNotFoundError: when onnx or onnxscript is not installed.

    Example:
        >>> program = to_onnx(nn.Conv2d(1, 1, 1).eval(), torch.zeros(2, 1, 4, 4), {0: torch.export.Dim.DYNAMIC})
        >>> [node.op_type for node in program.model.graph]
        ['Conv']
    """
    token = _exporting.set(True)
    try:
        with _quiet(), torch.no_grad():
            program: Any = torch.onnx.export(
                network,
                (image,),
                dynamo=True,
                opset_version=OPSET,
                dynamic_shapes=(dict(dynamic_shapes),),
                input_names=[input_name],
                output_names=["logits"],
                verbose=False,
            )
    finally:
        _exporting.reset(token)
    _lower(program.model.graph)
    program.model.opset_imports.pop(DOMAIN, None)
    return program


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan` within `to_onnx`; elsewhere it computes nothing."""
    groups, state = B.shape[1], A.shape[1]
    width = A.shape[0] // groups
    x, delta = u.float(), delta.float()
    if delta_bias is not None:
        delta = delta + delta_bias.float()[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    # Positions come first, channels last: a step reads whole tensors, and its loops run over many channels.
    steps = delta.unflatten(1, (groups, 1, width)).permute(4, 0, 1, 2, 3)  # (L, batch, G, 1, d)
    inputs = (delta * x).unflatten(1, (groups, 1, width)).permute(4, 0, 1, 2, 3)
    y = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{NAME}",
        (
            x.new_zeros(u.shape[0], groups, state, width),
            steps,
            inputs,
            B.float().permute(3, 0, 1, 2).unsqueeze(-1),  # (L, batch, G, N, 1)
            C.float().permute(3, 0, 1, 2).unsqueeze(-2),  # (L, batch, G, 1, N)
            A.float().unflatten(0, (groups, width)).transpose(1, 2),  # (G, N, d)
        ),
        dtype=torch.float32,
        shape=steps.shape,
        version=1,
    )
    y = y.permute(1, 2, 4, 0, 3).flatten(3).flatten(1, 2)
    if D is not None:
        y = y + D.float()[:, None] * x
    return y.to(u.dtype)


def selective_scan_2d(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan_2d` within `to_onnx`; elsewhere it computes nothing."""
    u, delta, B, C = to_sequences(x.float(), x_dbl.float(), dt_weight.float(), A.shape[1])
    y = selective_scan(u, delta, A, B, C, D, dt_bias.reshape(-1), True)
    return from_sequences(y, x.shape[1], x.shape[2]).to(x.dtype)


def _lower(graph: Any) -> None:
    """Puts a `Scan` in the place of each of our nodes."""
    # comes with onnxscript
    import onnx_ir as ir

    for node in [node for node in graph if (node.domain, node.op_type) == (DOMAIN, NAME)]:
        *sequences, A = node.inputs
        scan = ir.Node(
            "",
            "Scan",
            sequences,
            [
                ir.AttrGraph("body", _body(ir, sequences, A, node.name)),
                ir.AttrInt64("num_scan_inputs", len(sequences) - 1),
            ],
            num_outputs=2,
            name=f"{node.name}_scan",
        )
        last, y = scan.outputs
        last.name = f"{node.outputs[0].name}_last"
        ir.convenience.replace_nodes_and_values(graph, node, [node], [scan], node.outputs, [y])


def _body(ir: Any, sequences: list[Any], A: Any, name: str) -> Any:
    """h = exp(Δ A) h + Δ B x, y = C h; the state first, as `Scan` wants."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    shapes = [sequences[0].shape, *(value.shape[1:] for value in sequences[1:])]
    h, delta, x, B, C = (
        ir.Value(name=f"{name}_{letter}", type=kind, shape=None if shape is None else ir.Shape(shape))
        for letter, shape in zip(("h", "delta", "x", "B", "C"), shapes, strict=True)
    )
    nodes: list[Any] = []

    def apply(operator: str, *inputs: Any) -> Any:
        node = ir.Node("", operator, inputs, name=f"{name}_{len(nodes)}")
        node.outputs[0].name, node.outputs[0].type = f"{name}_out_{len(nodes)}", kind
        nodes.append(node)
        return node.outputs[0]

    decayed = apply("Mul", apply("Exp", apply("Mul", delta, A)), h)
    state = apply("Add", decayed, apply("Mul", x, B))
    y = apply("MatMul", C, state)
    return ir.Graph([h, delta, x, B, C], [state, y], nodes=nodes, name=f"{name}_step")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own parts."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
