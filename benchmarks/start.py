"""The first mask: one picture from a cold start, beside what importing PyTorch and MONAI takes."""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.harness import Row, row
from networks import cmunext

GOAL_S = 1.5
ROUNDS = 3
IMPORTS = "import torch, monai.bundle"
IN_PYTHON = "import sys, bundles; bundles.load('cmunext_busi', weights=sys.argv[1])(sys.argv[2])"


def rows() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights, picture = str(folder / "model.pt"), str(folder / "picture.png")
        torch.manual_seed(0)
        torch.save(cmunext().state_dict(), weights)
        pixels = np.random.default_rng(0).integers(0, 256, (480, 560), np.uint8)
        Image.fromarray(pixels).save(picture)
        files = {"ckpt_path": weights, "input": picture, "output_dir": str(folder)}
        options = [word for key, value in files.items() for word in (f"--{key}", value)]
        configuration = "bundles/cmunext_busi/configs/inference.yaml"
        commands = {
            "imports": ["-c", IMPORTS],
            "inferring": ["-m", "monai.bundle", "run", "inferring", "--config_file", configuration, *options],
            "load": ["-c", IN_PYTHON, weights, picture],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(ROUNDS):
            for name, words in commands.items():
                seconds[name].append(_cpu_seconds(words))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whats = {"inferring": "`inferring` of one PNG", "load": "`bundles.load` and one PNG"}
    for name, what in whats.items():
        beyond = median[name] - median["imports"]
        label = f"{what}, CMUNeXt, cold start, one thread: CPU seconds beyond `{IMPORTS}`, relative to {GOAL_S} s"
        yield row(label, beyond, GOAL_S, "lower", 1)


def _cpu_seconds(words: list[str]) -> float:
    """Of a program with one thread, which on an idle machine are its seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    folder = Path(__file__).parents[1]
    subprocess.run([sys.executable, *words], check=True, capture_output=True, cwd=folder, env=environment)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
