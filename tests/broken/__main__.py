"""`python -m tests.broken`: all broken inputs, a table of what became of them, and the list of the failures.

`python -m tests.broken WORD …` tries those whose name holds all words, and prints what the command printed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from tests.broken.inputs import INPUTS
from tests.broken.judge import Outcome, Verdict
from tests.broken.warm import Worker, serve
from tests.broken.worlds import WORLDS


def try_all(keys: list[str], processes: int) -> dict[str, Verdict]:
    """The verdicts on the inputs, in their order, from several warm processes."""
    queue: SimpleQueue[str] = SimpleQueue()
    for key in keys:
        queue.put(key)
    found: dict[str, Verdict] = {}

    def work(worker: Worker) -> None:
        while not queue.empty():
            key = queue.get()
            found[key] = worker.verdict(key)
            if sys.stderr.isatty():
                print(f"\r{len(found)} of {len(keys)}", end="", file=sys.stderr)
        worker.close()

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(work, [Worker() for _ in range(processes)]))
    return {key: found[key] for key in keys}


def table(found: dict[str, Verdict]) -> str:
    """Entrance × outcome."""
    entrances = list(dict.fromkeys(world.entrance for world in WORLDS.values()))
    count = Counter((INPUTS[key].world.entrance, verdict.outcome) for key, verdict in found.items())
    rows = [["entrance", "inputs", *(outcome.value for outcome in Outcome)]]
    for entrance in entrances:
        numbers = [count[entrance, outcome] for outcome in Outcome]
        if sum(numbers):
            rows.append([entrance, *map(str, (sum(numbers), *numbers))])
    total = [sum(count[entrance, outcome] for entrance in entrances) for outcome in Outcome]
    rows.append(["all", *map(str, (sum(total), *total))])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:-1], "-" * len(lines[0]), lines[-1]])


def failures(found: dict[str, Verdict]) -> list[str]:
    """One line for each input that came to no good, by outcome."""
    return [
        f"{outcome.value}: {key}: {verdict.reason.strip()} [must be: {INPUTS[key].expected.value}]".replace("\n", " ⏎ ")
        for outcome in Outcome
        if not outcome.good
        for key, verdict in found.items()
        if verdict.outcome is outcome
    ]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.broken", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "words", nargs="*", help="try the inputs whose name holds all of these, and show what they print"
    )
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="warm processes (%(default)s)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--list", action="store_true", help="name the inputs, and try none")
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    keys = [key for key in INPUTS if all(word in key for word in options.words)]
    if options.list:
        print("\n".join(f"{key} [{INPUTS[key].expected.value}]" for key in keys))
        return 0
    started = time.perf_counter()
    found = try_all(keys, min(options.processes, len(keys)))
    if options.words:
        for key, verdict in found.items():
            print(f"\n=== {key}\n{verdict.printed}")
            print(f"--- {verdict.outcome.value} ({verdict.seconds:.1f} s): {verdict.reason}")
    print()
    print("\n".join(failures(found)))
    print(f"\n{table(found)}\n{len(found)} inputs in {time.perf_counter() - started:.0f} s")
    return int(not all(verdict.outcome.good for verdict in found.values()))


if __name__ == "__main__":
    sys.exit(main())
