"""`python benchmarks/gpu.py`, on a machine with an NVIDIA GPU: the Triton scan against mamba_ssm's kernel and PyTorch.

Needs PyTorch's CUDA build, Triton and this checkout; measures mamba_ssm's kernel where it is installed. First it checks
the Triton kernels against the float64 reference, and stops if they are wrong. Then it times, by CUDA events and as
medians with the L2 cache emptied before each run, the scan of VM-UNet's first stage, the network's forward pass and a
training step, and writes results/gpu.json and a table.

Bandwidth is that of the forward scan over that of a copy in the same run, counted in two ways: `once` counts x, x_dbl
and y once, the least that any implementation moves; `sequences` counts u, delta, B, C and y of all four directions in
float32, what a scan of four reordered copies moves. A state costs one exponential at each position and direction, which
the GPU's special function units compute at a rate of their own: with 16 states it is that rate which binds.
"""

import importlib.machinery
import importlib.util
import json
import os
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
STATE, WIDTH, RANK = 16, 192, 6
GOALS = {"training step": 1.0, "bandwidth": 0.6}


def load_networks() -> None:
    """Make `networks.vmunet` importable without running networks/__init__.py, whose losses need MONAI."""
    spec = importlib.machinery.ModuleSpec("networks", None, is_package=True)
    spec.submodule_search_locations = [str(ROOT / "networks")]
    sys.modules["networks"] = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(ROOT))


def inputs(batch: int, height: int, width: int, dtype: torch.dtype, channels: int = WIDTH) -> list[Tensor]:
    """x, x_dbl, dt_weight, A, D and dt_bias as in a first-stage SS2D: the network's type for x, float32 parameters."""
    generator = torch.Generator("cuda").manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    return [
        noise(batch, height, width, channels).to(dtype),
        noise(batch, height, width, 4, RANK + 2 * STATE).to(dtype),
        noise(4, channels, RANK) * RANK**-0.5,
        -torch.exp(0.5 * noise(4 * channels, STATE)),
        noise(4 * channels),
        noise(4, channels) - 4,
    ]


def check() -> None:
    """Stop unless the kernels give the reference's output and gradients.

    Raises:
        SystemExit: naming what differs.
    """
    from networks.selective_scan import reference, triton_scan

    def results(scan: Callable[..., Tensor], tensors: list[Tensor], dtype: torch.dtype | None, **options: Any) -> Any:
        leaves = [t.to(dtype or t.dtype, copy=True).requires_grad_() for t in tensors]
        y = scan(*leaves, **options)
        y.backward(torch.linspace(-1, 1, y.numel(), device="cuda").reshape(y.shape).to(y.dtype))
        return [y.detach(), *(t.grad for t in leaves)]

    def compare(what: str, tolerance: float, got: list[Tensor], expected: list[Tensor]) -> None:
        for name, a, b in zip(("output", *names), got, expected, strict=True):
            error = float((a.double() - b).norm() / b.norm())
            # not (… <= …), so that NaN fails
            if not error <= tolerance:
                sys.exit(f"the Triton scan is wrong on this GPU: {what}, {name} differs by {error:.1e}, not measured")
            worst[what] = max(error, worst.get(what, 0.0))

    worst: dict[str, float] = {}
    names = ("x", "x_dbl", "dt_weight", "A", "D", "dt_bias")
    for batch, height, width, channels in ((2, 20, 27, 80), (1, 8, 8, 192), (3, 7, 1, 5)):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float16, 5e-3)):
            tensors = inputs(batch, height, width, dtype, channels)
            expected = results(reference.selective_scan_2d, tensors, torch.float64)
            for segments in (0, 1, 3):
                got = results(triton_scan.selective_scan_2d, tensors, None, segments=segments)
                compare(f"image, {str(dtype)[6:]}", tolerance, got, expected)

    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((2, 12, 150), (2, 12, 150), (12, 5), (2, 3, 5, 150), (2, 3, 5, 150), (12,), (12,))
    u, delta, A, *rest = (torch.randn(shape, generator=generator, device="cuda") for shape in shapes)
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    tensors = [u, delta, -torch.exp(0.5 * A), *rest]
    expected = results(reference.selective_scan, tensors, torch.float64, delta_softplus=True)
    for segments in (0, 1, 2):
        got = results(triton_scan.selective_scan, tensors, None, delta_softplus=True, segments=segments)
        compare("sequences, float32", 1e-5, got, expected)
    print("Against the float64 reference, worst:", ", ".join(f"{what} {error:.1e}" for what, error in worst.items()))


def milliseconds(run: Callable[[], Any], budget_ms: int = 300) -> float:
    """Median time of `run` on the GPU, after a warm-up."""
    from triton.testing import do_bench

    return do_bench(run, warmup=budget_ms // 3, rep=budget_ms, return_mode="median")


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.randn(2**28, device="cuda")
    destination = torch.empty_like(source)
    return 2 * 2**30 / (milliseconds(lambda: destination.copy_(source)) / 1000)


def compared(make: Callable[[str], Callable[[], Any]], backends: list[str], rounds: int = 3) -> dict[str, Any]:
    """Milliseconds and peak MiB of each backend's run, the backends taking turns; None where memory did not suffice."""
    times: dict[str, list[float]] = {name: [] for name in backends}
    peaks: dict[str, float] = {}
    for _ in range(rounds):
        for name in backends:
            if name in peaks or not times[name]:
                try:
                    run = make(name)
                    run()
                    torch.cuda.synchronize()
                    torch.cuda.reset_peak_memory_stats()
                    run()
                    peaks[name] = torch.cuda.max_memory_allocated() / 2**20
                    times[name].append(milliseconds(run))
                except torch.cuda.OutOfMemoryError:
                    peaks.pop(name, None)
                    times[name] = [float("nan")]
                run = None
                torch.cuda.empty_cache()
    return {
        "ms": {name: statistics.median(values) if name in peaks else None for name, values in times.items()},
        "peak_mib": {name: peaks.get(name) for name in backends},
    }


def scan_rows(backends: list[str], copy_bytes_per_s: float) -> list[dict[str, Any]]:
    from networks.selective_scan import selective_scan_2d

    rows = []
    for batch, size in ((1, 256), (8, 256), (32, 224)):
        for dtype in (torch.bfloat16, torch.float32):
            side = size // 4
            tensors = inputs(batch, side, side, dtype)
            leaves = [t.clone().requires_grad_() for t in tensors]
            cotangent = torch.randn_like(tensors[0])

            def forward(name: str, tensors: list[Tensor] = tensors) -> Callable[[], Tensor]:
                return lambda: selective_scan_2d(*tensors, backend=name)

            def both(name: str, leaves: list[Tensor] = leaves, g: Tensor = cotangent) -> Callable[[], Any]:
                return lambda: torch.autograd.grad(selective_scan_2d(*leaves, backend=name), leaves, g)

            what = f"batch {batch}, {side}²·{WIDTH}, {str(dtype)[6:]}"
            row = {"what": f"scan forward, {what}", **compared(forward, backends)}
            seconds = row["ms"]["triton"] / 1000
            positions = batch * side * side
            once = sum(t.numel() * t.element_size() for t in (tensors[0], tensors[1], cotangent))
            sequences = 4 * positions * 4 * (3 * WIDTH + 2 * STATE)
            row["bandwidth_of_copy"] = {
                "once": once / seconds / copy_bytes_per_s,
                "sequences": sequences / seconds / copy_bytes_per_s,
                "goal": GOALS["bandwidth"],
            }
            row["exponentials_per_s"] = positions * 4 * WIDTH * STATE / seconds
            rows += [row, {"what": f"scan forward and backward, {what}", **compared(both, backends)}]
    return rows


def network_rows(backends: list[str]) -> list[dict[str, Any]]:
    from networks.vmunet import VMUNet

    def inference(name: str, images: Tensor, amp: bool) -> Callable[[], Tensor]:
        network = VMUNet(scan_backend=name).cuda().eval()

        def run() -> Tensor:
            with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
                return network(images)

        return run

    def training(name: str, images: Tensor, amp: bool) -> Callable[[], None]:
        network = VMUNet(scan_backend=name).cuda()
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
        target = (images[:, :1] > 0).float()

        def run() -> None:
            with torch.autocast("cuda", dtype=torch.bfloat16, enabled=amp):
                logits = network(images)
            F.binary_cross_entropy_with_logits(logits.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        return run

    rows = []
    for amp in (True, False):
        dtype = "bfloat16" if amp else "float32"
        for batch in (1, 8):
            images = torch.randn(batch, 3, 256, 256, device="cuda")
            measured = compared(lambda name, images=images, amp=amp: inference(name, images, amp), backends)
            rows.append({"what": f"VM-UNet forward, 256², batch {batch}, {dtype}", **measured})
        for batch in (2, 32):
            images = torch.randn(batch, 3, 224, 224, device="cuda")
            measured = compared(lambda name, images=images, amp=amp: training(name, images, amp), backends)
            row = {"what": f"VM-UNet training step, 224², batch {batch}, {dtype}", **measured}
            rows.append({**row, "goal": GOALS["training step"]} if batch == 32 else row)
    return rows


def table(result: dict[str, Any], backends: list[str]) -> str:
    """Markdown."""
    machine = result["machine"]
    lines = [
        f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, mamba_ssm {machine['mamba_ssm']},"
        f" {machine['date']}, commit {machine['commit']}; a copy moves {machine['copy_gb_per_s']:.0f} GB/s",
        "",
        f"| what | {' | '.join(backends)} | triton against cuda | against parallel | share of copy once, sequences |",
        f"|---|{'---|' * (len(backends) + 3)}",
    ]
    for row in result["rows"]:
        cells = [
            "out of memory" if row["ms"][name] is None else f"{row['ms'][name]:.3g} ms, {row['peak_mib'][name]:.0f} MiB"
            for name in backends
        ]
        for other in ("cuda", "parallel"):
            ours, theirs = row["ms"]["triton"], row["ms"].get(other)
            goal = f" (goal {row['goal']:g})" if other == "cuda" and "goal" in row else ""
            cells.append(f"{theirs / ours:.2f} ×{goal}" if ours and theirs else "")
        share = row.get("bandwidth_of_copy")
        cells.append(f"{share['once']:.0%}, {share['sequences']:.0%} (goal {share['goal']:.0%})" if share else "")
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs an NVIDIA GPU and PyTorch's CUDA build; this machine has none")
    load_networks()
    from benchmarks.harness import RESULTS, machine
    from networks.selective_scan import available_backends, triton_scan

    if triton_scan.unavailable():
        sys.exit(triton_scan.unavailable())
    import triton

    check()
    copy_bytes_per_s = copy_bandwidth()
    backends = [name for name in ("triton", "cuda", "parallel") if name in available_backends("cuda")]
    properties = torch.cuda.get_device_properties(0)
    about = {
        **machine(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "mamba_ssm": getattr(sys.modules.get("mamba_ssm"), "__version__", "not installed"),
        "copy_gb_per_s": copy_bytes_per_s / 1e9,
    }
    result = {"machine": about, "rows": scan_rows(backends, copy_bytes_per_s) + network_rows(backends)}
    RESULTS.mkdir(exist_ok=True)
    temporary = RESULTS / "gpu.json.tmp"
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, RESULTS / "gpu.json")
    print(table(result, backends))


if __name__ == "__main__":
    main()
