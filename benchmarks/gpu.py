"""VM-UNet on an NVIDIA GPU: the Triton scan against mamba_ssm's kernel and `parallel`, after a check of its numbers.

Needs PyTorch's CUDA build and Triton, not MONAI; mamba_ssm's kernel is measured where it is installed. First the Triton
kernels are checked against the float64 reference; if they are wrong, nothing is measured. Then the scan of VM-UNet's
first stage, the network's forward pass and a training step are timed with the L2 cache emptied before each run, and
their peak memory is taken.

The scan's forward pass is also compared to a copy. "Four sequences" counts u, delta, B, C and y of all four directions
in float32: what a scan of four reordered copies moves. `once` counts x, x_dbl and y once: the least that any scan
moves. No scan with 16 states can be as fast as a copy of the latter: each state costs one exponential at each position
and direction, and the rate of the GPU's special function units binds first.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import Row, row
from networks import VMUNet
from networks.selective_scan import available_backends, reference, selective_scan_2d, triton_scan

STATE, WIDTH, RANK = 16, 192, 6
# the least speed-up of a large training step over mamba_ssm, and the least share of a copy's bandwidth
SPEED_UP, BANDWIDTH = 1, 0.6
# batch and side of VM-UNet's first stage for images of 256² and 224²
SCANS = ((1, 64), (8, 64), (32, 56))
# batch and side of the images
FORWARD = ((1, 256), (8, 256))
TRAINING = ((2, 224), (32, 224))
# batch, height, width and channels: odd sizes, one chunk and several
CHECKED = ((2, 20, 27, 80), (1, 8, 8, 192), (3, 7, 1, 5))

# seconds and peak MiB of a run
Figures = tuple[float, float]


def unavailable() -> str:
    """Why this part cannot be measured here; empty if it can."""
    if not torch.cuda.is_available():
        return "the gpu part needs an NVIDIA GPU and PyTorch's CUDA build; this machine has none"
    return triton_scan.unavailable()


def inputs(
    batch: int, height: int, width: int, dtype: torch.dtype, channels: int = WIDTH, device: str = "cuda"
) -> list[Tensor]:
    """x, x_dbl, dt_weight, A, D and dt_bias of a first-stage SS2D: x and x_dbl in `dtype`, parameters in float32."""
    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    return [
        noise(batch, height, width, channels).to(dtype),
        noise(batch, height, width, 4, RANK + 2 * STATE).to(dtype),
        noise(4, channels, RANK) * RANK**-0.5,
        -torch.exp(0.5 * noise(4 * channels, STATE)),
        noise(4 * channels),
        noise(4, channels) - 4,
    ]


def check(
    scan: ModuleType = triton_scan, device: str = "cuda", shapes: Sequence[tuple[int, int, int, int]] = CHECKED
) -> dict[str, float]:
    """Compares the output and all gradients of `scan` to the float64 reference.

    Args:
        scan: a backend whose functions take `segments`.
        device: where it runs.
        shapes: batch, height, width and channels of the images.

    Returns:
        The worst relative error of each kind of input.

    Raises:
        SystemExit: naming what differs.
    """
    worst: dict[str, float] = {}

    def results(function: Callable[..., Tensor], tensors: list[Tensor], dtype: Any, **options: Any) -> list[Tensor]:
        leaves = [t.to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]
        y = function(*leaves, **options)
        cotangent = torch.linspace(-1, 1, y.numel(), device=device).reshape(y.shape).to(y.dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]

    def compare(kind: str, tolerance: float, names: str, got: list[Tensor], expected: list[Tensor]) -> None:
        for name, a, b in zip(("output", *names.split()), got, expected, strict=True):
            error = float((a.double() - b).norm() / b.norm())
            # not (… <= …), so that NaN fails
            if not error <= tolerance:
                sys.exit(f"the scan is wrong: {kind}, {name} differs by {error:.1e}; nothing is measured")
            worst[kind] = max(error, worst.get(kind, 0.0))

    for batch, height, width, channels in shapes:
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)):
            tensors = inputs(batch, height, width, dtype, channels, device)
            expected = results(reference.selective_scan_2d, tensors, torch.float64)
            for segments in (0, 1, 3):
                got = results(scan.selective_scan_2d, tensors, None, segments=segments)
                kind = f"images in {str(dtype)[6:]}"
                compare(kind, tolerance, "x x_dbl dt_weight A D dt_bias", got, expected)

    generator = torch.Generator(device).manual_seed(0)
    sizes = ((2, 12, 150), (2, 12, 150), (12, 5), (2, 3, 5, 150), (2, 3, 5, 150), (12,), (12,))
    u, delta, A, *rest = (torch.randn(size, generator=generator, device=device) for size in sizes)
    tensors = [u, delta, -torch.exp(0.5 * A), *rest]
    expected = results(reference.selective_scan, tensors, torch.float64, delta_softplus=True)
    for segments in (0, 1, 2):
        got = results(scan.selective_scan, tensors, None, delta_softplus=True, segments=segments)
        compare("sequences in float32", 1e-5, "u delta A B C D delta_bias", got, expected)
    return worst


def on_gpu(run: Callable[[], Any]) -> Figures:
    """Median seconds of `run` after a warm-up, and its peak memory in MiB."""
    from triton.testing import do_bench

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    peak = torch.cuda.max_memory_allocated() / 2**20
    return do_bench(run, warmup=100, rep=300, return_mode="median") / 1e3, peak


def copied_bytes_per_s() -> float:
    """Bytes that a copy of 1 GiB reads and writes per second."""
    source = torch.randn(2**28, device="cuda")
    destination = torch.empty_like(source)
    return 2 * 2**30 / on_gpu(lambda: destination.copy_(source))[0]


def compared(
    make: Callable[[str], Callable[[], Any]],
    backends: Sequence[str],
    measure: Callable[[Callable[[], Any]], Figures] = on_gpu,
    rounds: int = 3,
) -> dict[str, Figures | None]:
    """Figures of each backend's run, medians over `rounds`; the backends take turns. None where memory ran out."""
    found: dict[str, list[Figures]] = {name: [] for name in backends}
    exhausted = set()
    for _ in range(rounds):
        for name in backends:
            if name not in exhausted:
                try:
                    found[name].append(measure(make(name)))
                except torch.OutOfMemoryError:
                    exhausted.add(name)
                torch.cuda.empty_cache()
    return {
        name: None if name in exhausted else tuple(map(statistics.median, zip(*values, strict=True)))
        for name, values in found.items()
    }


def speed_ups(what: str, figures: dict[str, Figures | None], goal: float | None = None) -> Iterator[Row]:
    """A row for each backend after the first, which is ours; the goal is for mamba_ssm."""
    ours, *others = figures
    seconds, mib = figures[ours] or (None, None)
    for name in others:
        other_seconds, other_mib = figures[name] or (None, None)
        yield row(
            f"{what}: speed-up over `{name}`",
            seconds,
            other_seconds,
            "higher",
            goal if name == "mamba_ssm" else None,
            mib=mib,
            against_mib=other_mib,
        )


def scan_rows(
    backends: Sequence[str],
    copied: float,
    measure: Callable[[Callable[[], Any]], Figures] = on_gpu,
    device: str = "cuda",
    cases: Sequence[tuple[int, int]] = SCANS,
) -> Iterator[Row]:
    """The scan of VM-UNet's first stage, beside a copy, which moves `copied` bytes per second."""
    for batch, side in cases:
        for dtype in (torch.bfloat16, torch.float32):
            tensors = inputs(batch, side, side, dtype, device=device)
            x, x_dbl, *_ = tensors
            case = f"batch {batch}, {side}²×{WIDTH}, {str(dtype)[6:]}"
            figures = compared(partial(scan_run, tensors=tensors), backends, measure)
            yield from speed_ups(f"selective scan, {case}, forward", figures)
            if ours := figures[backends[0]]:
                positions = batch * side * side
                sequences = 4 * positions * (3 * WIDTH + 2 * STATE) * 4
                once = 2 * x.nbytes + x_dbl.nbytes
                yield row(
                    f"selective scan, {case}, forward: bandwidth for four sequences, share of a copy's",
                    ours[0],
                    sequences / copied,
                    "higher",
                    BANDWIDTH,
                    once=once / copied / ours[0],
                    exponentials_per_s=positions * 4 * WIDTH * STATE / ours[0],
                )
            figures = compared(partial(gradient_run, tensors=tensors), backends, measure)
            yield from speed_ups(f"selective scan, {case}, forward and backward", figures)


def scan_run(backend: str, tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
    """The forward scan."""
    return lambda: selective_scan_2d(*tensors, backend=backend)


def gradient_run(backend: str, tensors: Sequence[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    """The scan and the gradients of all its inputs."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    cotangent = torch.randn_like(tensors[0])
    return lambda: torch.autograd.grad(selective_scan_2d(*leaves, backend=backend), leaves, cotangent)


def network_rows(
    backends: Sequence[str],
    measure: Callable[[Callable[[], Any]], Figures] = on_gpu,
    device: str = "cuda",
    forward: Sequence[tuple[int, int]] = FORWARD,
    training: Sequence[tuple[int, int]] = TRAINING,
) -> Iterator[Row]:
    """VM-UNet's forward pass and training step."""
    for amp in (True, False):
        dtype = "bfloat16" if amp else "float32"
        for batch, side in forward:
            images = torch.randn(batch, 3, side, side, device=device)
            figures = compared(partial(inference_run, images=images, amp=amp), backends, measure)
            yield from speed_ups(f"VM-UNet forward pass, {side}², batch {batch}, {dtype}", figures)
        for batch, side in training:
            images = torch.randn(batch, 3, side, side, device=device)
            figures = compared(partial(training_run, images=images, amp=amp), backends, measure)
            goal = SPEED_UP if (batch, side) == training[-1] else None
            yield from speed_ups(f"VM-UNet training step, {side}², batch {batch}, {dtype}", figures, goal)


def inference_run(backend: str, images: Tensor, amp: bool) -> Callable[[], Tensor]:
    """The forward pass of a new VM-UNet on the device of `images`."""
    network = VMUNet(scan_backend=backend).to(images.device).eval()

    def run() -> Tensor:
        with torch.no_grad(), torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp):
            return network(images)

    return run


def training_run(backend: str, images: Tensor, amp: bool) -> Callable[[], None]:
    """A training step of a new VM-UNet on the device of `images`."""
    network = VMUNet(scan_backend=backend).to(images.device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
    target = (images[:, :1] > 0).float()

    def run() -> None:
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=amp):
            logits = network(images)
        F.binary_cross_entropy_with_logits(logits.float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def rows() -> Iterator[Row]:
    worst = check()
    print("relative error to the float64 reference, at worst:", *(f"{kind} {worst[kind]:.1e};" for kind in worst))
    backends = [name for name in ("triton", "mamba_ssm", "parallel") if name in available_backends("cuda")]
    copied = copied_bytes_per_s()
    yield from scan_rows(backends, copied)
    yield from network_rows(backends)
