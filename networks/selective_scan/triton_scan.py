"""The selective scan by Triton kernels (triton_kernels.py): PyTorch operators with fake and autograd implementations.

Nothing is built: Triton comes with PyTorch's CUDA build and compiles the kernels when they are first used, some seconds
for each rank and type, kept in its cache on disk. Reads float16, bfloat16 and float32, computes in float32.
Where gradients are wanted, the forward pass keeps the N states a channel before each chunk of 64 positions (L·N/64
values a channel and direction), and the backward pass scans each chunk again from there.

One operator serves both contracts. It takes an image (B, H, W, d), scanned in four directions that are summed, or
sequences with the channels last (B, L, G·d), scanned forwards in G groups.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda"
INSTALL = "`pip install triton` (comes with PyTorch's CUDA build for Linux)"
# of its own for each copy of this package: that of a packed bundle may be in one process with this one
NAMESPACE = __name__.rpartition(".")[0].removeprefix("networks.").replace(".", "_")
CHUNK = 64
TILE = 8
# Channels of a program. The backward pass adds over channels, which costs less the more of them a lane has.
BLOCK = 32
BLOCK_BACKWARD = 64
_CARRY = {"BLOCK": 128, "AHEAD": 8}
_MERGE = 1024


@functools.cache
def unavailable() -> str:
    """Why the kernels cannot be used and how to get them; empty if they can. Does not import Triton.

    Example:
        >>> torch.cuda.is_available() or bool(unavailable())
        True
    """
    if importlib.util.find_spec("triton") is None:
        return f"backend 'triton' is not installed (no module triton); install it: {INSTALL}"
    if not torch.cuda.is_available():
        return "backend 'triton' needs an NVIDIA GPU and a CUDA build of PyTorch"
    if torch.cuda.get_device_capability() < (8, 0):
        return "backend 'triton' needs an NVIDIA GPU of compute capability 8.0 or newer"
    return ""


def _kernels() -> ModuleType:
    return importlib.import_module(f"{__package__}.triton_kernels")


def _divide_up(a: int, b: int) -> int:
    return -(-a // b)


class _Scan:
    """What all kernels of one call share: sizes, and the tensors as they read them."""

    def __init__(
        self,
        x: Tensor,
        delta: Tensor | None,
        projected: Tensor,
        weight: Tensor,
        A: Tensor,
        D: Tensor,
        bias: Tensor,
        softplus: bool,
    ) -> None:
        self.image = delta is None
        self.batch = x.shape[0]
        self.height, self.width = (x.shape[1], x.shape[2]) if self.image else (1, x.shape[1])
        self.length = self.height * self.width
        self.groups, self.state, self.channels = A.shape
        self.rank = weight.shape[1]
        self.sequences = self.batch * self.groups
        self.x = x.contiguous()
        self.delta = self.x if delta is None else delta.contiguous()
        # Every lane reads all of it: converted once here, not once a lane.
        self.projected = projected.float().contiguous()
        self.weight = weight.contiguous()
        self.A = (A * math.log2(math.e)).contiguous()
        self.D = D.contiguous()
        self.bias = bias.contiguous()
        self.constants: dict[str, Any] = {
            "GROUPS": self.groups,
            "RANK": self.rank,
            "STATE": self.state,
            "IMAGE": self.image,
            "SOFTPLUS": softplus,
            "TILE": TILE,
            "num_warps": 1,
        }
        self.state_block = 1 << (self.state - 1).bit_length()

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.length, self.height, self.width, self.channels

    @property
    def chunks(self) -> int:
        return _divide_up(self.length, CHUNK)

    def segments(self, block: int, wanted: int) -> tuple[int, int]:
        """How many segments to cut the sequences into, and the chunks of each.

        One, if that makes a program for each of a GPU's four schedulers a multiprocessor; else three for each.
        """
        if not wanted:
            programs = self.sequences * _divide_up(self.channels, block)
            schedulers = 4 * _multiprocessors(self.x.device)
            wanted = 1 if programs >= schedulers else _divide_up(3 * schedulers, programs)
        chunks = _divide_up(self.chunks, min(wanted, self.chunks))
        return _divide_up(self.chunks, chunks), chunks

    def grid(self, block: int, segments: int) -> tuple[int, int, int]:
        return self.sequences, _divide_up(self.channels, block), segments

    def starts(self, values: Tensor, segments: int, chunks: int, adjoint: bool) -> Tensor:
        """(batch·groups, segments, N, channels): the states, or adjoints, that come into each segment."""
        shape = (self.sequences, segments, self.state, self.channels)
        if segments == 1:
            return self.projected.new_zeros(shape)
        kernels = _kernels()
        ends, starts = self.projected.new_empty(shape), self.projected.new_empty(shape)
        totals = self.projected.new_empty(self.sequences, segments, self.channels)
        kernels.segment_ends[self.grid(BLOCK, segments)](
            values,
            self.delta,
            self.projected,
            self.weight,
            self.A,
            self.bias,
            ends,
            totals,
            *self.sizes,
            segments,
            chunks * (CHUNK // TILE),
            **self.constants,
            STATE_BLOCK=self.state_block,
            ADJOINT=adjoint,
            BLOCK=BLOCK,
        )
        kernels.carry[(self.sequences, _divide_up(self.state * self.channels, _CARRY["BLOCK"]))](
            ends,
            totals,
            self.A,
            starts,
            self.channels,
            segments,
            GROUPS=self.groups,
            STATE=self.state,
            ADJOINT=adjoint,
            **_CARRY,
        )
        return starts

    def parts(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Where each direction writes for itself, (4, B, L, d) in float32, or each group its own of (B, L, G·d)."""
        if self.image:
            return self.projected.new_empty(self.groups, self.batch, self.length, self.channels)
        return torch.empty_like(like, dtype=dtype)

    def merged(self, parts: Tensor, like: Tensor) -> Tensor:
        """The sum over directions."""
        if not self.image:
            return parts
        total = torch.empty_like(like)
        size = total.numel()
        _kernels().merge[(_divide_up(size, _MERGE),)](parts, total, size, PARTS=self.groups, BLOCK=_MERGE)
        return total


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _states_shape(x: Tensor, A: Tensor, save: bool) -> tuple[int, ...]:
    length = x.shape[1] * x.shape[2] if x.dim() == 4 else x.shape[1]
    return (x.shape[0] * A.shape[0], -(-length // CHUNK), A.shape[1], A.shape[2]) if save else (0,)


@torch.library.custom_op(f"{NAMESPACE}::triton_scan", mutates_args=())
def _scan(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    softplus: bool,
    save_states: bool,
    segments: int,
) -> tuple[Tensor, Tensor]:
    """y like x, and the states before each chunk if they are to be saved.

    Args:
        x: (B, H, W, d), or (B, L, G·d) with `delta` of the same shape.
        projected: (B, L, G, R + 2N), G = 4 for an image; R = 0 with `delta`.
        weight: (G, R, d) in float32, as are A (G, N, d), D and bias (G, d).
        segments: how many the sequences are cut into, at most; 0 for as many as fill the GPU.
    """
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    states = projected.new_empty(_states_shape(x, A, save_states), dtype=torch.float32)
    if not x.numel():
        return y, states
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        scan = _Scan(x, delta, projected, weight, A, D, bias, softplus)
        segments, chunks = scan.segments(BLOCK, segments)
        starts = scan.starts(scan.x, segments, chunks, adjoint=False)
        parts = scan.parts(y, y.dtype)
        _kernels().forward[scan.grid(BLOCK, segments)](
            scan.x,
            scan.delta,
            scan.projected,
            scan.weight,
            scan.A,
            scan.D,
            scan.bias,
            starts,
            parts,
            states,
            scan.batch,
            *scan.sizes,
            segments,
            chunks,
            **scan.constants,
            STATE_BLOCK=scan.state_block,
            SAVE=save_states,
            BLOCK=BLOCK,
            CHUNK=CHUNK,
        )
        return scan.merged(parts, y), states


@torch.library.custom_op(f"{NAMESPACE}::triton_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    states: Tensor,
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    softplus: bool,
    segments: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, delta (empty without), projected, weight, A, D and bias; arguments as of the scan."""
    if not x.numel():
        inputs = (x, x.new_empty(0) if delta is None else delta, projected, weight, A, D, bias)
        return tuple(torch.zeros_like(tensor) for tensor in inputs)  # type: ignore[return-value]
    with torch.cuda.device_of(x), torch.autocast(x.device.type, enabled=False):
        scan = _Scan(x, delta, projected, weight, A, D, bias, softplus)
        grad_y = grad_y.contiguous()
        segments, chunks = scan.segments(BLOCK_BACKWARD, segments)
        adjoints = scan.starts(grad_y, segments, chunks, adjoint=True)
        blocks = _divide_up(scan.channels, BLOCK_BACKWARD)
        sequences = (scan.batch, scan.groups, segments)
        tile_states = adjoints.new_empty(*sequences, CHUNK // TILE, scan.state, scan.channels)
        grad_x = scan.parts(scan.x, x.dtype)
        grad_delta = scan.parts(scan.delta, scan.delta.dtype)
        grad_projected = adjoints.new_empty(blocks, scan.batch, scan.length, scan.groups, 2 * scan.state)
        sums = adjoints.new_zeros(*sequences, scan.state + 2, scan.channels)
        _kernels().backward[scan.grid(BLOCK_BACKWARD, segments)](
            grad_y,
            scan.x,
            scan.delta,
            scan.projected,
            scan.weight,
            scan.A,
            scan.D,
            scan.bias,
            states,
            adjoints,
            tile_states,
            grad_x,
            grad_delta,
            grad_projected,
            sums,
            scan.batch,
            *scan.sizes,
            segments,
            chunks,
            **scan.constants,
            STATE_BLOCK=scan.state_block,
            BLOCK=BLOCK_BACKWARD,
            CHUNK=CHUNK,
        )
        del tile_states, adjoints
        summed = sums.sum((0, 2))
        whole = projected.new_empty(scan.projected.shape)
        whole[..., scan.rank :] = grad_projected.sum(0)
        if scan.image:
            # (4, B·L, d) by (4, d, R), and (4, R, B·L) by (4, B·L, d).
            by_position = grad_delta.flatten(1, 2)
            dt = scan.projected[..., : scan.rank].permute(2, 0, 1, 3).flatten(1, 2)
            grad_dt = torch.bmm(by_position, scan.weight.transpose(1, 2))
            whole[..., : scan.rank] = grad_dt.unflatten(1, (scan.batch, scan.length)).permute(1, 2, 0, 3)
            grad_weight = torch.bmm(dt.transpose(1, 2), by_position)
            grad_delta = grad_delta.new_empty(0)
        else:
            grad_weight = torch.zeros_like(weight)
        return (
            scan.merged(grad_x, scan.x),
            grad_delta,
            whole,
            grad_weight,
            summed[:, :-2].clone(),
            summed[:, -2].clone(),
            summed[:, -1].clone(),
        )


@_scan.register_fake
def _scan_fake(
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    softplus: bool,
    save_states: bool,
    segments: int,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), A.new_empty(_states_shape(x, A, save_states))


@_scan_backward.register_fake
def _scan_backward_fake(
    grad_y: Tensor,
    states: Tensor,
    x: Tensor,
    delta: Tensor | None,
    projected: Tensor,
    weight: Tensor,
    A: Tensor,
    D: Tensor,
    bias: Tensor,
    softplus: bool,
    segments: int,
) -> tuple[Tensor, ...]:
    inputs = (x, x.new_empty(0) if delta is None else delta, projected, weight, A, D, bias)
    return tuple(tensor.new_empty(tensor.shape) for tensor in inputs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.softplus, ctx.saved, ctx.segments = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, states = ctx.saved_tensors
    if not ctx.saved:
        _, states = _scan(*tensors, ctx.softplus, True, ctx.segments)
    gradients = _scan_backward(grad_y, states, *tensors, ctx.softplus, ctx.segments)
    wanted = [None if tensor is None else gradient for tensor, gradient in zip(tensors, gradients, strict=True)]
    return *wanted, None, None, None


_scan.register_autograd(_backward, setup_context=_setup_context)


def _run(x: Tensor, delta: Tensor | None, *rest: Tensor, softplus: bool, segments: int) -> Tensor:
    tensors = (x, delta, *rest)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    return _scan(x, delta, *rest, softplus, save, segments)[0]


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.float()


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    segments: int = 0,
) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan`, on copies with the channels last.

    `segments` cuts the sequences into that many, where 0 leaves it to the size of the GPU.

    Raises:
        ImportError: when Triton is not there; `unavailable()` says how to get it.

    Example:
        >>> u, one = torch.tensor([[[1.0, 2.0, 3.0]]]), torch.ones(1, 1, 3)
        >>> arguments = [u, one, torch.zeros(1, 1), one[:, None], one[:, None]]
        >>> y = [[[1.0, 3.0, 6.0]]]
        >>> unavailable() != "" or selective_scan(*(t.cuda() for t in arguments), None, None, False).tolist() == y
        True
    """
    groups, channels = B.shape[1], A.shape[0] // B.shape[1]
    zeros = torch.zeros(A.shape[0], device=A.device)
    skip, bias = (zeros if row is None else row.float() for row in (D, delta_bias))
    y = _run(
        _readable(u).transpose(1, 2),
        _readable(delta).transpose(1, 2),
        torch.cat([B.float(), C.float()], 2).permute(0, 3, 1, 2),
        zeros.new_empty(groups, 0, channels),
        A.float().unflatten(0, (groups, channels)).transpose(1, 2),
        skip.unflatten(0, (groups, channels)),
        bias.unflatten(0, (groups, channels)),
        softplus=delta_softplus,
        segments=segments,
    )
    return y.transpose(1, 2).contiguous().to(u.dtype)


def selective_scan_2d(
    x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor, segments: int = 0
) -> Tensor:
    """The contract of `networks.selective_scan.selective_scan_2d`; `segments` as `selective_scan`'s.

    Raises:
        ImportError: when Triton is not there; `unavailable()` says how to get it.
    """
    directions, channels, _ = dt_weight.shape
    y = _run(
        _readable(x),
        None,
        _readable(x_dbl).flatten(1, 2),
        dt_weight.float().transpose(1, 2),
        A.float().unflatten(0, (directions, channels)).transpose(1, 2),
        D.float().unflatten(0, (directions, channels)),
        dt_bias.float(),
        softplus=True,
        segments=segments,
    )
    return y.to(x.dtype)
