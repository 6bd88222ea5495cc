"""`python -m experiments run|table FILE`: trains what a YAML file names, and makes the table of it."""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from bundles.configurations import settings_of
from bundles.run import one_line
from experiments.page import write_table
from experiments.plan import read_plan
from experiments.runner import Runner, steps, submit
from experiments.table import tabulate
from transforms import check_output, log_warnings

FILE_HELP = "YAML, see docs/experiments.md; further settings are overrides of all its cells: --pretrained FILE"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, or 1 after lines that say what to put right, 130 when stopped."""
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__.partition(": ")[2])
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, about: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=about, description=about[0].upper() + about[1:])
        added.add_argument("file", type=Path, metavar="FILE", help=FILE_HELP)
        added.add_argument("--scale", metavar="NAME", help="one of the file's scales, small for instance")
        return added

    running = command("run", "train, evaluate and test what is not finished; it executes the configurations it names")
    running.add_argument("--list", action="store_true", help="print the commands that are left, and run none")
    running.add_argument("--shard", metavar="I/N", help="only the I-th of N shares of the cells")
    running.add_argument("--launcher", choices=["here", "submitit"], default="here", help="(%(default)s)")
    running.add_argument("--cluster", choices=["slurm", "local"], help="of submitit (slurm where it is)")
    tabling = command("table", "the table of what is finished: Markdown, CSV and a page in the file's output folder")
    tabling.add_argument("--measure", action="store_true", help="measure latency and memory again")
    options, rest = parser.parse_known_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log_warnings()
    try:
        overrides = settings_of(rest)
        plan = read_plan(options.file, options.scale, overrides)
        if options.command == "table":
            table = tabulate(plan, options.measure)
            print(write_table(plan.output, table))
            return 0
        plan = plan.shard(options.shard) if options.shard else plan
        if options.list:
            for cell in plan.cells:
                print("\n".join(shlex.join(step.command) for step in steps(cell)), end="\n" * bool(steps(cell)))
            return 0
        check_output(plan.output)
        if options.launcher == "submitit":
            return 0 if submit(plan, overrides, cluster=options.cluster) else 1
        runner = Runner(plan)
        done = runner.run()
        return 130 if runner.stopped else 0 if done else 1
    except (Exception, KeyboardInterrupt) as error:
        line = one_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 1


if __name__ == "__main__":
    sys.exit(main())
