"""How the benchmarks measure: alternatives side by side in one run, medians, and memory in processes of their own."""

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TURN = 0.05


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
    }


def interleaved(alternatives: Mapping[str, Callable[[], Any]], rounds: int = 7, warm_up: int = 2) -> dict[str, float]:
    """Median seconds of each alternative, taking turns so that a slow moment of the machine hits all of them.

    A turn lasts at least TURN seconds: what is quicker runs several times, as in use, and each run counts.
    """
    repeats = {}
    for name, run in alternatives.items():
        for _ in range(warm_up):
            run()
        repeats[name] = 1 + int(TURN / _seconds(run))
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, run in alternatives.items():
            seconds[name] += [_seconds(run) for _ in range(repeats[name])]
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_memory(work: Callable[[Any], Any], argument: Any) -> float:
    """MiB that `work(argument)` adds at its peak to a process that has imported everything it needs (Linux)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_added_memory, (work, argument, torch.get_num_threads()))


def _added_memory(work: Callable[[Any], Any], argument: Any, threads: int) -> float:
    torch.set_num_threads(threads)
    # writing 5 there resets the peak to what is resident now
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    work(argument)
    return _status("VmHWM") - before


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """benchmarks/results/NAME.json, with the machine."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=2) + "\n")
    os.replace(temporary, path)


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
