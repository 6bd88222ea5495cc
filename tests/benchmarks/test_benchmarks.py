"""What the benchmarks write, and the tools they measure with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import CPU_PARTS, END, PARTS, README, START, render, table
from benchmarks.harness import RESULTS, draw, interleaved, mask_iou, memory_row, peak_memory, row, untouched

MACHINE = {"cpu": "C", "capability": "AVX2", "threads": 2, "torch": "2", "date": "today", "commit": "abc"}


def test_the_table_is_what_was_measured() -> None:
    assert README.read_text().split(START)[1].split(END)[0] == f"{table()}\n"


def test_every_part_that_needs_no_gpu_has_results() -> None:
    assert set(CPU_PARTS) <= {path.stem for path in RESULTS.glob("*.json")} <= set(PARTS)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_and_when_and_what_is_better(path: Path) -> None:
    results = json.loads(path.read_text())
    assert results["machine"].keys() >= {"cpu", "threads", "torch", "date", "commit"}
    for found in results["rows"]:
        ours, other = (found["ms"], found["against_ms"]) if "ms" in found else (found["mib"], found["against_mib"])
        if ours is None or other is None:
            assert found["ratio"] is None
        else:
            ratio = {"lower": ours / other, "higher": other / ours}[found["better"]]
            assert found["ratio"] == pytest.approx(ratio, rel=1e-12)


def test_a_row_is_a_speed_up_or_a_relative_cost() -> None:
    expected = {"what": "a", "ms": 500, "against_ms": 2000, "ratio": 4, "better": "higher", "goal": 3, "iou": 0.9}
    assert row("a", 0.5, 2, "higher", 3, iou=0.9) == expected
    assert row("a", 0.5, 2, "lower") == {"what": "a", "ms": 500, "against_ms": 2000, "ratio": 0.25, "better": "lower"}
    memory = {"what": "a", "mib": 3, "against_mib": 2, "ratio": 1.5, "better": "lower", "goal": 1}
    assert memory_row("a", 3, 2, 1) == memory
    exhausted = row("a", 0.5, None, "higher", 1)
    assert (exhausted["ms"], exhausted["against_ms"], exhausted["ratio"]) == (500, None, None)


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (row("share over", 0.1, 0.2, "higher", 2), "| share over | 100 ms | 200 ms | 2 | ≥ 2 |"),
        (row("against", 0.1, 0.2, "higher", 2.1), "| against | 100 ms | 200 ms | 2 | ≥ 2.1, not met |"),
        (row("against", 12.3456, 0.2, "lower", 62), "| against | 12346 ms | 200 ms | 61.7 | ≤ 62 |"),
        (row("a", 0.1, 0.2, "lower", 0.4), "| a | 100 ms | 200 ms | 0.5 | ≤ 0.4, not met |"),
        (row("a", 0.1, 0.2, "lower", iou=0.5), "| a, IoU 0.50000 | 100 ms | 200 ms | 0.5 |  |"),
        (memory_row("a", 1, 2, 1), "| a | 1 MiB | 2 MiB | 0.5 | ≤ 1 |"),
        (
            row("a", 0.1, None, "higher", 1, mib=7.5, against_mib=None),
            "| a | 100 ms, 7.5 MiB | out of memory |  | ≥ 1, not measured |",
        ),
        (
            row("a", 1, 0.6, "higher", 0.6, once=0.05, exponentials_per_s=2.5e12),
            "| a, 5% where x, x_dbl and y count once, 2.5e+12 exponentials/s | 1000 ms | 600 ms | 0.6 | ≥ 0.6 |",
        ),
    ],
)
def test_a_line_of_the_table(found: dict[str, object], line: str) -> None:
    *head, last = render("cmunext", {"machine": MACHINE, "rows": [found]})
    assert head[1] == "`python -m benchmarks cmunext`: C, AVX2, 2 threads, torch 2, today, commit abc"
    assert last == line


def test_the_gpu_table_names_the_gpu() -> None:
    where = {**MACHINE, "gpu": "G", "triton": "3", "mamba_ssm": "not installed"}
    assert "gpu`: G, triton 3, mamba_ssm not installed, C," in render("gpu", {"machine": where, "rows": []})[1]


def test_quick_alternatives_run_as_long_as_slow_ones() -> None:
    calls = {"quick": 0, "slow": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    seconds = interleaved({"quick": lambda: run("quick", 0.001), "slow": lambda: run("slow", 0.1)}, rounds=3)
    assert 0.001 <= seconds["quick"] < seconds["slow"]
    assert calls["slow"] == 2 + 1 + 3
    assert calls["quick"] > 3 * calls["slow"]


def _allocate(mebibytes: int) -> None:
    torch.ones(mebibytes << 18)


def _counting() -> Callable[[], None]:
    counts = []

    def run() -> None:
        counts.append(1)
        if len(counts) == 3:
            raise ValueError("built once, run three times")

    return run


def test_peak_memory_is_what_was_added() -> None:
    assert peak_memory(_allocate, 200) == pytest.approx(200, abs=20)


def test_untouched_builds_once() -> None:
    with untouched(_counting) as run:
        run()
        run()
        with pytest.raises(ValueError, match="built once"):
            run()


def test_masks_are_compared_pooled() -> None:
    images, masks = draw(2, 16, seed=0)
    assert images.shape == (2, 3, 16, 16)
    assert 0 < float(masks.mean()) < 1
    both = [nn.Identity(), lambda x: torch.ones_like(x)]
    positive = float((images > 0).float().mean())
    assert mask_iou(both, images) == pytest.approx(positive)
