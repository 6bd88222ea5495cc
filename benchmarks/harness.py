"""How the benchmarks measure: alternatives in turns within one run, medians, and memory in processes of their own.

MONAI is imported inside the functions that need it: the GPU part runs where there is PyTorch and Triton only.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
# what results/*.json hold of one comparison; see `row`
Row = dict[str, Any]
Better = Literal["lower", "higher"]


def row(
    what: str, ours: float | None, other: float | None, better: Better, goal: float | None = None, **facts: Any
) -> Row:
    """Compares two times.

    Args:
        what: the label, which says what the ratio is.
        ours, other: seconds; None where memory ran out.
        better: "higher" for a speed-up, other / ours; "lower" for a relative cost, ours / other.
        goal: the least speed-up, or the greatest cost.
        facts: what else the row tells, for instance `iou`.
    """
    times = {"ms": None if ours is None else 1e3 * ours, "against_ms": None if other is None else 1e3 * other}
    return {"what": what, **times, **_verdict(ours, other, better, goal), **facts}


def memory_row(what: str, ours: float, other: float, goal: float | None = None) -> Row:
    """Compares two amounts of memory in MiB, the lower the better."""
    return {"what": what, "mib": ours, "against_mib": other, **_verdict(ours, other, "lower", goal)}


def _verdict(ours: float | None, other: float | None, better: Better, goal: float | None) -> Row:
    ratio = None if ours is None or other is None else ours / other if better == "lower" else other / ours
    return {"ratio": ratio, "better": better, **({} if goal is None else {"goal": goal})}


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": _commit(),
        "date": date.today().isoformat(),
        **(_gpu() if torch.cuda.is_available() else {}),
    }


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory_gib": round(properties.total_memory / 2**30),
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "mamba_ssm": _version("mamba_ssm"),
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def interleaved(
    alternatives: Mapping[str, Callable[[], Any]], rounds: int = 7, warm_up: int = 2, turn: float = 0.05
) -> dict[str, float]:
    """Median seconds of each alternative, which take turns so that a slow moment of the machine hits all of them.

    A turn lasts at least `turn` seconds: a quick alternative runs several times in it, and each run counts.
    """
    repeats = {}
    for name, run in alternatives.items():
        for _ in range(warm_up):
            run()
        repeats[name] = 1 + int(turn / _seconds(run))
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            seconds[name] += [_seconds(run) for _ in range(repeats[name])]
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def forward(network: nn.Module, size: int) -> Callable[[], Tensor]:
    """The forward pass of one image."""
    image = torch.rand(1, 3, size, size)

    def run() -> Tensor:
        with torch.inference_mode():
            return network(image)

    return run


def step(network: nn.Module, optimizer: torch.optim.Optimizer, size: int, batch: int) -> Callable[[], None]:
    """One training step, with a loss that costs next to nothing."""
    image = torch.rand(batch, 3, size, size)
    network.train()

    def run() -> None:
        optimizer.zero_grad()
        network(image).square().mean().backward()
        optimizer.step()

    return run


def learned(network: nn.Module, steps: int = 300, size: int = 128) -> nn.Module:
    """`network` after a short training on phantoms, so that its masks in two precisions can be compared."""
    from monai.losses import DiceCELoss

    from networks.training import prepare_network

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps)
    loss = DiceCELoss(sigmoid=True, smooth_nr=1.0, smooth_dr=1.0)
    prepared = prepare_network(network.train(), torch.device("cpu"))
    for seed in range(steps):
        images, masks = draw(4, size, seed)
        optimizer.zero_grad()
        loss(prepared(images), masks).backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def draw(count: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images (count, 3, size, size) of mean 0 and sd 1, and their masks (count, 1, size, size)."""
    from prepare.phantoms import dermoscopy_phantom

    rng = np.random.default_rng(seed)
    images, masks = zip(*(dermoscopy_phantom(rng, (size, size)) for _ in range(count)), strict=True)
    x = torch.stack([torch.from_numpy(image).float() for image in images]).movedim(-1, 1)
    x = (x - x.mean((1, 2, 3), keepdim=True)) / x.std((1, 2, 3), keepdim=True)
    return x, torch.stack([torch.from_numpy(mask).float() for mask in masks])[:, None]


def mask_iou(networks: Sequence[Callable[[Tensor], Tensor]], images: Tensor) -> float:
    """IoU of two networks' masks, pooled over all images, which pass one at a time."""
    with torch.inference_mode():
        a, b = (torch.cat([network(image[None]) for image in images]) > 0 for network in networks)
    return float((a & b).sum() / (a | b).sum())


@contextmanager
def untouched(build: Callable[..., Callable[[], Any]], *arguments: Any) -> Iterator[Callable[[], Any]]:
    """Yields a function that runs `build(*arguments)` in a process whose memory allocator has its default settings.

    The process builds once. A call costs a fraction of a millisecond more than the run.
    """
    with _process() as process:
        yield lambda: process.submit(_run_built, build, *arguments).result()


def _process() -> ProcessPoolExecutor:
    """A new process with as many threads as this one; unlike a Pool it raises where it cannot start."""
    threads = torch.get_num_threads()
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,))


@functools.cache
def _built(build: Callable[..., Callable[[], Any]], *arguments: Any) -> Callable[[], Any]:
    return build(*arguments)


def _run_built(build: Callable[..., Callable[[], Any]], *arguments: Any) -> None:
    _built(build, *arguments)()


def peak_memory(work: Callable[[Any], Any], argument: Any, processes: int = 3) -> float:
    """MiB that `work(argument)` adds at its peak to a process that has imported everything it needs (Linux).

    The least of several processes, since the allocator's placement adds up to a tenth by chance.
    """
    found = []
    for _ in range(processes):
        with _process() as process:
            found.append(process.submit(_added_memory, work, argument).result())
    return min(found)


def _added_memory(work: Callable[[Any], Any], argument: Any) -> float:
    from networks.training import keep_freed_memory

    keep_freed_memory()
    # writing 5 there resets the peak to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work(argument)
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def write(name: str, rows: list[Row]) -> None:
    """Writes benchmarks/results/NAME.json: the machine and the rows."""
    # not by `transforms.replacing`, which imports MONAI; git has the version before
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
