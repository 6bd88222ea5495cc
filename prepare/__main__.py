"""`python -m prepare synapse|demo …`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from prepare.demo import MARK, prepare_demo
from prepare.output import PrepareError
from prepare.synapse import prepare_synapse


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m prepare", description="Prepare data sets for the bundles.")
    commands = parser.add_subparsers(dest="command", required=True)

    synapse = commands.add_parser("synapse", help="BTCV abdominal CT: slices to train on, volumes to test on")
    synapse.add_argument(
        "--raw", type=Path, required=True, help="folder with img/img0001.nii.gz, label/label0001.nii.gz"
    )
    synapse.add_argument("--out", type=Path, default=Path("data/Synapse"), help="folder to make (%(default)s)")
    synapse.add_argument("--train-cases", type=int, nargs="*", metavar="N", help="case numbers (the 18 published ones)")
    synapse.add_argument("--test-cases", type=int, nargs="*", metavar="N", help="case numbers (the 12 published ones)")
    synapse.add_argument("--allow-missing", action="store_true", help="go on with the cases that are there")
    synapse.set_defaults(run=prepare_synapse)

    demo = commands.add_parser("demo", help=f"demo data to try everything on: {MARK}")
    demo.add_argument("--out", type=Path, default=Path("data/demo"), help="folder to make (%(default)s)")
    demo.add_argument("--seed", type=int, default=0, help="equal seeds give equal data (%(default)s)")
    demo.add_argument("--cases", type=int, default=12, help="CT volumes, a quarter of them to test on (%(default)s)")
    demo.add_argument("--slices", type=int, default=32, help="slices of a CT volume (%(default)s)")
    demo.add_argument("--size", type=int, default=128, help="rows and columns of a CT slice (%(default)s)")
    demo.set_defaults(run=prepare_demo)

    for command in (synapse, demo):
        command.add_argument("--overwrite", action="store_true", help="replace an earlier result in --out")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The exit code: 0, or 1 after one line on stderr about what the user can put right."""
    options = vars(_parser().parse_args(arguments))
    run = options.pop("run")
    command = options.pop("command")
    try:
        run(**options)
    except (PrepareError, OSError) as error:
        print(f"prepare {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"prepare {command}: interrupted, nothing was written; run it again", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
