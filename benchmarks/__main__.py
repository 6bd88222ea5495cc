"""`python -m benchmarks [PART …]`: measures, writes results/*.json and renews the tables of README.md."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu
from benchmarks.harness import RESULTS, Row, write

CPU_PARTS = ("vmunet", "cmunext", "volume", "loader", "evaluation", "onnx", "start")
PARTS = (*CPU_PARTS, "gpu")
README = Path(__file__).parent / "README.md"
START, END = "<!-- table -->", "<!-- end of table -->"
# what a row may say beside its times, memory and ratio
FACTS = {
    "iou": "IoU {:.5f}",
    "difference": "largest difference {:.1g}",
    "once": "{:.0%} where x, x_dbl and y count once",
    "exponentials_per_s": "{:.2g} exponentials/s",
}


def table() -> str:
    """Markdown for all results that exist, a table for each part."""
    lines = []
    for part in PARTS:
        path = RESULTS / f"{part}.json"
        if path.is_file():
            lines += render(part, json.loads(path.read_text()))
    return "\n".join(lines)


def render(part: str, result: dict[str, Any]) -> list[str]:
    """The lines of one part's table: the machine, then one line for each row."""
    where = result["machine"]
    place = f"{where['gpu']}, triton {where['triton']}, mamba_ssm {where['mamba_ssm']}, " if part == "gpu" else ""
    return [
        "",
        f"`python -m benchmarks {part}`: {place}{where['cpu']}, {where['capability']}, {where['threads']} threads,"
        f" torch {where['torch']}, {where['date']}, commit {where['commit']}",
        "",
        "| what | ours | other | ratio | goal |",
        "|---|---|---|---|---|",
        *(_line(row) for row in result["rows"]),
    ]


def _line(row: Row) -> str:
    label = ", ".join([row["what"], *(text.format(row[key]) for key, text in FACTS.items() if key in row)])
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.3g}"
    return f"| {label} | {_values(row, '')} | {_values(row, 'against_')} | {ratio} | {_goal(row)} |"


def _values(row: Row, side: str) -> str:
    values = [(row[f"{side}{key}"], unit) for key, unit in (("ms", "ms"), ("mib", "MiB")) if f"{side}{key}" in row]
    # four digits, but never 1.421e+04
    texts = [f"{value:{'.4g' if value < 1e4 else '.0f'}} {unit}" for value, unit in values if value is not None]
    return ", ".join(texts) or "out of memory"


def _goal(row: Row) -> str:
    if "goal" not in row:
        return ""
    sign = "≤" if row["better"] == "lower" else "≥"
    if row["ratio"] is None:
        verdict = ", not measured"
    else:
        met = row["ratio"] <= row["goal"] if row["better"] == "lower" else row["ratio"] >= row["goal"]
        verdict = "" if met else ", not met"
    return f"{sign} {row['goal']:g}{verdict}"


def renew() -> None:
    """Puts the tables of all results into the README."""
    text = README.read_text()
    before, rest = text.split(START)
    README.write_text(f"{before}{START}{table()}\n{END}{rest.split(END)[1]}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures the parts that `arguments` name.

    Raises:
        SystemExit: when a part is unknown, or there is no GPU for the one that needs it.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"{', '.join(PARTS)}; by default all, without gpu where there is no NVIDIA GPU",
    )
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    missing = gpu.unavailable()
    parts = options.parts or (CPU_PARTS if missing else PARTS)
    if missing and "gpu" in parts:
        sys.exit(missing)
    torch.set_num_threads(options.threads)
    if set(parts) & set(CPU_PARTS):
        # imports MONAI, which the GPU part does without
        from networks.training import keep_freed_memory

        # as `prepare_network` does, so that all alternatives have it
        keep_freed_memory()
    for part in parts:
        print(f"{part}, some minutes: ratio (goal) what", flush=True)
        rows = []
        for row in importlib.import_module(f"benchmarks.{part}").rows():
            rows.append(row)
            ratio = "-" if row["ratio"] is None else f"{row['ratio']:.3g}"
            print(f"{ratio:>8} ({row.get('goal', '-')}) {row['what']}", flush=True)
        write(part, rows)
    renew()


if __name__ == "__main__":
    main()
