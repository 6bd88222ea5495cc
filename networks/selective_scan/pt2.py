"""Networks as PyTorch's exported programs (`.pt2`), for any number of images of any size, from one pixel up.

What `torch.export` alone would write holds for some sizes only: it notes as a condition what was true of the example
(nothing to pad, more than one image, memory in another order). So here images are padded and cropped by indices,
convolutions read contiguous memory, and the selective scan is PyTorch's own `scan` operator, which a program keeps as
a loop of any length.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config

from .directions import from_sequences, to_sequences

# Positions of a chunk; chunks are scanned side by side.
STEPS = 32
_exporting: ContextVar[bool] = ContextVar("exporting", default=False)


def exporting() -> bool:
    """True while `to_pt2` looks at a network.

    Example:
        >>> exporting()
        False
    """
    # compiled functions are not looked at so, and Dynamo cannot read the variable
    return not torch.compiler.is_dynamo_compiling() and _exporting.get()


class AnySize(nn.Module):
    """A network for any height and width, whose padding needs no condition on them: (B, C, H, W) → (B, K, H, W).

    Args:
        network: one with a `multiple` that it would pad to itself; others are taken as they are.

    Example:
        >>> AnySize(nn.Conv2d(1, 2, 1))(torch.zeros(1, 1, 5, 7)).shape
        torch.Size([1, 2, 5, 7])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.multiple = int(getattr(network, "multiple", 1))
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(_contiguous)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        for axis in (2, 3) if self.multiple > 1 else ():
            size = image.shape[axis]
            full = (size + self.multiple - 1) // self.multiple * self.multiple
            x = x.index_select(axis, torch.arange(full, device=x.device).clamp(max=size - 1))
        x = self.network(x)
        for axis in (2, 3) if self.multiple > 1 else ():
            x = x.index_select(axis, torch.arange(image.shape[axis], device=x.device))
        return x


def _contiguous(module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
    return (inputs[0].contiguous(),)


def to_pt2(network: nn.Module, image: Tensor) -> ExportedProgram:
    """Exports a network of one input and one output, with batch, height and width open.

    Args:
        network: in eval mode; it gets hooks, so give a copy.
        image: an example of its input, (B, C, H, W) with B ≥ 2.

    Example:
        >>> program = to_pt2(nn.Conv2d(1, 1, 1).eval(), torch.zeros(2, 1, 4, 4))
        >>> program.module()(torch.zeros(1, 1, 1, 3)).shape
        torch.Size([1, 1, 1, 3])
    """
    symbolic: Any = _config
    token = _exporting.set(True)
    try:
        # PyTorch's switch for sizes that may be 1
        with quiet(), torch.no_grad(), symbolic.patch(backed_size_oblivious=True):
            axes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
            return torch.export.export(AnySize(network), (image,), dynamic_shapes={"image": axes})
    finally:
        _exporting.reset(token)


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
    """The contract of `networks.selective_scan.selective_scan` in three loops; see `parallel` for the idea.

    Example:
        >>> u, one = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
        >>> selective_scan(u, one, torch.zeros(1, 1), one[:, None], one[:, None], None, None, False)
        tensor([[[1., 3., 6.]]])
    """
    from torch._higher_order_ops.scan import scan

    batch, channels, length = u.shape
    groups, state = B.shape[1], A.shape[1]
    width = channels // groups
    x, delta = u.float(), delta.float()
    if delta_bias is not None:
        delta = delta + delta_bias.float()[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    A = A.float().reshape(groups, width, state)
    # never without padding, and never one chunk: both would be conditions
    chunks = length // STEPS + 2

    def cut(values: Tensor, rows: int) -> Tensor:
        padded = F.pad(values, [0, STEPS * chunks - length])
        return padded.reshape(batch, groups, rows, chunks, STEPS).permute(4, 0, 3, 1, 2)  # (T, batch, M, G, rows)

    deltas, inputs = cut(delta, width), cut(delta * x, width)
    Bs, Cs = cut(B.float(), state), cut(C.float(), state)

    def advance(h: Tensor, at: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.exp(at[0].unsqueeze(-1) * A) * h + at[1].unsqueeze(-1) * at[2].unsqueeze(-2)
        return h, h.new_zeros(1)

    def carry(h: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return chunk[0] * h + chunk[1], h.clone()

    def read(h: Tensor, at: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        h = torch.exp(at[0].unsqueeze(-1) * A) * h + at[1].unsqueeze(-1) * at[2].unsqueeze(-2)
        return h, torch.matmul(h, at[3].unsqueeze(-1)).squeeze(-1)

    last, _ = scan(advance, x.new_zeros(batch, chunks, groups, width, state), (deltas, inputs, Bs))
    decay = torch.exp(deltas.sum(0).unsqueeze(-1) * A)
    _, first = scan(carry, x.new_zeros(batch, groups, width, state), (decay.movedim(1, 0), last.movedim(1, 0)))
    _, y = scan(read, first.movedim(0, 1).clone(memory_format=torch.contiguous_format), (deltas, inputs, Bs, Cs))
    y = y.permute(1, 3, 4, 2, 0).reshape(batch, channels, chunks * STEPS)[:, :, :length]
    if D is not None:
        y = y + D.float()[:, None] * x
    return y.to(u.dtype)


def selective_scan_2d(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan_2d`, in float32."""
    u, delta, B, C = to_sequences(x.float(), x_dbl.float(), dt_weight.float(), A.shape[1])
    y = selective_scan(u, delta, A, B, C, D, dt_bias.reshape(-1), True)
    return from_sequences(y, x.shape[1], x.shape[2]).to(x.dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the remarks of PyTorch's exporter and its serializer.

    Example:
        >>> with quiet():
        ...     logging.getLogger("torch.export").getEffectiveLevel() == logging.ERROR
        True
    """
    names = ("torch.export", "torch._export", "torch._dynamo", "torch.fx")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
