import json
import time

import pytest
import torch
from torch import nn

from benchmarks.__main__ import END, PARTS, README, START, table
from benchmarks.harness import RESULTS, draw, interleaved, mask_iou, peak_memory, untouched


def test_the_table_is_what_was_measured() -> None:
    assert README.read_text().split(START)[1].split(END)[0] == f"{table()}\n"


@pytest.mark.parametrize("part", PARTS)
def test_results_say_where_and_when(part: str) -> None:
    results = json.loads((RESULTS / f"{part}.json").read_text())
    assert results["machine"].keys() >= {"cpu", "threads", "torch", "date", "commit"}
    for row in results["rows"]:
        ours, other = (row[key] if key in row else row[key.replace("ms", "mib")] for key in ("ms", "against_ms"))
        assert row["ratio"] == pytest.approx(other / ours) or row["ratio"] == pytest.approx(ours / other)


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


def _counting() -> object:
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
