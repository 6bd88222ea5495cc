"""From what a command printed, returned and left behind to a verdict."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from tests.broken.changes import EITHER, FAILS, REFUSED, SAID, SAME, Expected
from tests.broken.worlds import written

# Lines of the log, MONAI's and the bundles'.
LOG = re.compile(r"^(\d{4}-\d\d-\d\d )?\d\d:\d\d:\d\d(,\d+)? (- )?(INFO|WARNING|ERROR)\b")
COMPLAINT = re.compile(r"^\d\d:\d\d:\d\d (WARNING|ERROR)\b")
# What Python, fire and torch say, and no user asked for.
MACHINE = re.compile(
    r"^\w*(Error|Exception|Warning|Exit)\b:|ConfigExpression|^ERROR: |object has no attribute|site-packages"
)
# Of a table of results, which counts the cases.
HEADING = re.compile(r"; model selected by: |^sizes? (from )?\d")
# Results of all files together, which differ where one is left out.
OF_ALL = ("summary.json", "report.html", "volumes.csv", "overview.png")
# What is left of a bar in front of a line.
BAR = re.compile(r"\d%\|.*\d/\d")
# Where a run may leave what it had begun: TensorBoard's events, and what is asked for by a broken input itself.
LEFT_ALONE = ("runs", "executed?")


class Outcome(Enum):
    """What became of an input, the best first."""

    CLEAR = "one clear line"
    RIGHT = "accepted rightly"
    TWICE = "said twice"
    FAILED = "MONAI's own words"
    WRONG = "accepted wrongly"
    HANG = "hang"
    CRASH = "crash"
    HALF = "half-written"
    TRACEBACK = "traceback"
    OTHER = "other"

    @property
    def good(self) -> bool:
        return self in (Outcome.CLEAR, Outcome.RIGHT, Outcome.FAILED)


@dataclass(frozen=True)
class Run:
    """One command: what it printed, as on a terminal, its exit code (negative for a signal, None for a hang)."""

    code: int | None
    printed: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """The outcome, and in words what is wrong, or the line that was printed."""

    outcome: Outcome
    reason: str
    seconds: float = 0.0
    printed: str = field(default="", repr=False)


def lines(printed: str) -> list[str]:
    """What stays on the screen: of a bar its last state, and no blank lines."""
    return [line.rpartition("\r")[2].rstrip() for line in printed.replace("\r\n", "\n").split("\n") if line.strip()]


def said(printed: str, usual: set[str]) -> list[str]:
    """The lines beside the log, argparse's usage and what a good run prints as well."""
    found, in_usage = [], False
    for line in lines(printed):
        in_usage = line.startswith("usage: ") or (in_usage and line.startswith(" "))
        if not (in_usage or LOG.match(line) or HEADING.search(line) or shape(line) in usual):
            found.append(line)
    return found


def shape(line: str) -> str:
    """A line without its numbers and blanks, which differ from run to run."""
    return re.sub(r"[\d\s.█▏▎▍▌▋▊▉?:|%<>]+|\bit/s\b|\bs/it\b", "", line)


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What lies under a folder: kind, size and time of change of each path."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        is_folder = path.is_dir() and not path.is_symlink()
        found[str(path.relative_to(folder))] = (
            status.st_mode >> 12, 0 if is_folder else status.st_size, 0 if is_folder else status.st_mtime_ns,
        )  # fmt: skip
    return found


def left_behind(run: Run, allowed: set[str]) -> list[str]:
    """What a run changed or added but empty folders and what it may."""
    changed = [path for path, state in run.after.items() if run.before.get(path) != state]
    changed += [f"{path} (removed)" for path in run.before.keys() - run.after.keys()]
    kept = [path for path in changed if path not in allowed and path.split("/")[0] != "runs"]
    empty = {path for path in kept if run.after.get(path, (0,))[0] == 0o4}
    return sorted(path for path in kept if path not in empty)


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    """Where two results differ; empty if they do not."""
    if missing := sorted(set(second) ^ set(first)):
        return f"{missing[0]} is in one of them only"
    for name, value in first.items():
        other = second[name]
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
            if value.shape != other.shape or not np.allclose(value, other, rtol=1e-4, atol=1e-5, equal_nan=True):
                return f"{name} differs"
        elif isinstance(value, np.ndarray):
            if not np.array_equal(value, other):
                return f"{name} differs"
        elif value != other:
            return f"{name} differs"
    return ""


def not_finite(result: Mapping[str, Any]) -> str:
    """The first array of numbers that are not all finite; a score may be undefined."""
    for name, value in result.items():
        numbers = isinstance(value, np.ndarray) and value.dtype.kind in "fc"
        if numbers and not name.startswith("metrics.csv") and not np.isfinite(value).all():
            return name
    return ""


def judge(
    run: Run,
    folder: Path,
    good: Mapping[str, Any],
    usual: set[str],
    expected: Expected,
    named: tuple[str, ...],
    others: tuple[str, ...] = (),
) -> Verdict:
    """The verdict on one input.

    Args:
        run: the command.
        folder: where it ran.
        good: what the good input's run wrote.
        usual: the shapes of the lines that the good input's run printed.
        expected: what must come of the input.
        named: words of which the line must hold one.
        others: the results of the other files: they must be there, and nothing else.
    """

    def verdict(outcome: Outcome, reason: str) -> Verdict:
        return Verdict(outcome, reason, run.seconds, run.printed)

    if run.code is None:
        return verdict(Outcome.HANG, f"no end after {run.seconds:.0f} s")
    if run.code < 0:
        return verdict(Outcome.CRASH, f"ended by signal {-run.code}")
    if run.code == 0:
        return verdict(*_accepted(run, folder, good, expected, named))
    return verdict(*_refused(run, folder, good, usual, expected, named, others))


def _accepted(
    run: Run, folder: Path, good: Mapping[str, Any], expected: Expected, named: tuple[str, ...]
) -> tuple[Outcome, str]:
    try:
        result = written(folder / "out")
    except Exception as error:
        return Outcome.WRONG, f"exit code 0, a result that cannot be read ({error})"
    difference = differing(result, good["result"])
    if expected in (REFUSED, FAILS):
        return Outcome.WRONG, f"exit code 0, {difference or 'the result is that of the good input'}"
    if litter := [path for path in left_behind(run, set(good["paths"])) if not path.startswith("out/")]:
        return Outcome.HALF, f"left behind: {', '.join(litter[:3])}"
    if expected in (SAME, EITHER) and difference:
        return Outcome.WRONG, f"exit code 0, {difference}"
    if set(result) != set(good["result"]):
        return Outcome.WRONG, f"exit code 0, {difference}"
    if name := not_finite(result):
        return Outcome.WRONG, f"exit code 0, {name} is not finite"
    if expected is SAID and not any(name in line for line in lines(run.printed) for name in named):
        return Outcome.WRONG, "exit code 0, and not a word about it"
    return Outcome.RIGHT, ""


def _refused(
    run: Run, folder: Path, good: Mapping[str, Any], usual: set[str], expected: Expected, named: tuple[str, ...],
    others: tuple[str, ...],
) -> tuple[Outcome, str]:  # fmt: skip
    left = left_behind(
        run,
        {*(f"out/{name}" for name in OF_ALL), *(f"out/{other.split(' ')[0]}" for other in others)} if others else set(),
    )
    if expected is FAILS:
        return (Outcome.HALF, f"left behind: {', '.join(left[:3])}") if left else (Outcome.FAILED, "")
    last = lines(run.printed)[-1] if lines(run.printed) else ""
    if "Traceback (most recent call last)" in run.printed:
        return Outcome.TRACEBACK, f"{len(lines(run.printed))} lines: {last[:200]}"
    if left:
        return Outcome.HALF, f"left behind: {', '.join(left[:3])}"
    spoken = said(run.printed, usual)
    complaints = [line for line in lines(run.printed) if COMPLAINT.match(line) and shape(line) not in usual]
    naming = [line for line in spoken + complaints if _names(line, named)]
    if expected is SAME:
        return Outcome.OTHER, f"refused, and is good: {last[:200]}"
    if not spoken:
        return Outcome.OTHER, "no line says why"
    if len(spoken) > 1 + bool(others):
        return Outcome.OTHER, f"{len(spoken)} lines: {' ⏎ '.join(spoken)[:300]}"
    if not _names(spoken[-1], named) or spoken[-1] != last:
        return Outcome.OTHER, f"the last line does not name it: {last[:200]}"
    if BAR.search(spoken[-1]):
        return Outcome.OTHER, f"behind a bar: {spoken[-1][:200]}"
    if MACHINE.search(spoken[-1]) or len(spoken[-1].split()) < 3 or len(spoken[-1]) > 1000:
        return Outcome.OTHER, f"no line for people: {spoken[-1][:200]}"
    if others and (difference := _of_the_rest(folder, others, good)):
        return Outcome.OTHER, f"the rest: {difference}"
    if len(naming) > 1:
        return Outcome.TWICE, f"said {len(naming)} times: {naming[0][:200]}"
    return Outcome.CLEAR, spoken[-1]


def _names(line: str, named: tuple[str, ...]) -> bool:
    return any(name in line for name in named)


def _of_the_rest(folder: Path, others: tuple[str, ...], good: Mapping[str, Any]) -> str:
    """Where the results of the other files differ from those of the good run; empty if they do not."""
    found = {key: value for key, value in written(folder / "out").items() if not key.startswith(OF_ALL)}
    return differing(found, {key: value for key, value in good["result"].items() if key.startswith(others)})
