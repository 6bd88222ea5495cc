"""`python -m benchmarks [PART …]`: measures, writes results/*.json, renews README.md's table."""

import argparse
import importlib
import json
from pathlib import Path

import torch

from benchmarks.harness import RESULTS, write
from networks.training import keep_freed_memory

PARTS = ("vmunet", "cmunext", "volume", "loader")
README = Path(__file__).parent / "README.md"
START, END = "<!-- table -->", "<!-- end of table -->"


def table() -> str:
    lines = []
    for part in PARTS:
        path = RESULTS / f"{part}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text())
        where = result["machine"]
        lines += [
            "",
            f"`make bench` ({part}): {where['cpu']}, {where['capability']}, {where['threads']} threads,"
            f" torch {where['torch']}, {where['date']}, commit {where['commit']}",
            "",
            "| what | ours | other | ratio | goal |",
            "|---|---|---|---|---|",
        ]
        for row in result["rows"]:
            at_most = " over " in row["what"] or "share" in row["what"]
            values = [f"{row[k]:.4g} {u}" for k, u in (("ms", "ms"), ("mib", "MiB")) if k in row]
            others = [f"{row[k]:.4g} {u}" for k, u in (("against_ms", "ms"), ("against_mib", "MiB")) if k in row]
            extra = f", IoU {row['iou']:.5f}" if "iou" in row else ""
            extra += f", largest difference {row['difference']:.1g}" if "difference" in row else ""
            goal = ""
            if "goal" in row:
                met = row["ratio"] <= row["goal"] if at_most else row["ratio"] >= row["goal"]
                goal = f"{'≤' if at_most else '≥'} {row['goal']:g}{'' if met else ', not met'}"
            lines.append(
                f"| {row['what']}{extra} | {''.join(values)} | {''.join(others)} | {row['ratio']:.3g} | {goal} |"
            )
    return "\n".join(lines)


def renew() -> None:
    """Puts the table of what lies in results/ into the README."""
    text = README.read_text()
    before, rest = text.split(START)
    README.write_text(f"{before}{START}{table()}\n{END}{rest.split(END)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--threads", type=int, default=2, help="(%(default)s)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as `prepare_network` does, so that all alternatives have it
    for part in options.parts or PARTS:
        print(f"{part}, some minutes: ratio (goal) what", flush=True)
        rows = []
        for row in importlib.import_module(f"benchmarks.{part}").rows():
            rows.append(row)
            print(f"{row['ratio']:8.3g} ({row.get('goal', '-')}) {row['what']}", flush=True)
        write(part, rows)
    renew()


if __name__ == "__main__":
    main()
