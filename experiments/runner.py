"""Trains, evaluates and tests the cells of a plan one after the other, and can be interrupted at any moment.

What is finished is read from the cells' folders, never remembered: a cell goes on where it ended, however it did.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from bundles.configurations import load_configuration
from evaluation.results import read_summary
from experiments.plan import Cell, Plan
from networks.training.log import HISTORY
from networks.training.provenance import FILE, read_run
from networks.training.stopping import FolderLock
from transforms import InputError, replacing, shortened

logger = logging.getLogger(__name__)

CELL_FILE, LOGS = "cell.json", "logs"
TRAINING, EVALUATING = "training", "evaluating"
# seconds between two looks at a run, and between two lines of a log file about it
LOOK, LINE = 0.5, 60.0
LONGEST = 300
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Step(NamedTuple):
    """One command of a cell."""

    name: str
    command: list[str]


def steps(cell: Cell) -> list[Step]:
    """What is left to do for a cell, in order.

    Example:
        >>> from experiments.plan import HERE, read_plan
        >>> [step.name for step in steps(read_plan(HERE / "demo.yaml").cells[0])][0]
        'training'
    """
    left = [] if is_trained(cell) else [Step(TRAINING, cell.training())]
    for target, folder in cell.targets().items():
        if left or not _is_evaluated(folder):
            left.append(Step(f"zero-shot {target}" if target else EVALUATING, cell.evaluating(target)))
    return left


def is_trained(cell: Cell) -> bool:
    """True where the training is completed, or its minutes are spent."""
    if not (cell.folder / "model.pt").is_file():
        return False
    return read_run(cell.folder / FILE).get("how_it_ended") == "completed" or bool(state_of(cell).get("spent"))


def _is_evaluated(folder: Path) -> bool:
    try:
        return bool(read_summary(folder).cases)
    except InputError:
        return False


def state_of(cell: Cell) -> dict[str, Any]:
    """What earlier commands noted of a cell: the recipe it was begun with, seconds, and the last failure."""
    try:
        found = json.loads((cell.folder / CELL_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def recipe(cell: Cell) -> dict[str, Any]:
    """What must be the same while a cell is worked on: the configuration's files by content, overrides and budget."""
    files = {file.name: _fingerprint(load_configuration(file)) for file in cell.files}
    said = json.loads(json.dumps(dict(cell.overrides)))
    return {"files": files, "overrides": said, "data": cell.data, "minutes": cell.minutes}


def _fingerprint(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def check_recipes(plan: Plan) -> None:
    """Refuses cells that were begun with another recipe than the plan's now.

    Raises:
        InputError: naming the first difference.
    """
    for cell in plan.cells:
        before, now = state_of(cell).get("recipe"), recipe(cell)
        if before is None and read_run(cell.folder / FILE):
            raise InputError(
                f"holds a run that is none of {plan.file}", path=cell.folder, remedy="move it, or say another output"
            )
        if before is not None and before != now:
            raise InputError(
                f"was begun with {_difference(before, now)} now",
                path=cell.folder,
                remedy="move that folder, say what it had, or another output",
            )


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    for part, new in now.items():
        old = before.get(part)
        if old == new:
            continue
        if not isinstance(new, dict) or not isinstance(old, dict):
            return f"{part} {old}, and it is {new}"
        name = next(key for key in sorted({*old, *new}) if old.get(key) != new.get(key))
        if part == "files":
            return f"another {name} than there is" if name in old and name in new else f"{name} not alike, as it is"
        was, is_now = (shortened(str(one[name])) if name in one else "none" for one in (old, new))
        return f"{name} {was}, and it is {is_now}"
    return "other settings than there are"


@dataclass
class Runner:
    """Works on the cells of a plan.

    Args:
        plan: what to do.
        say: takes each line for people.
        execute: starts a command, its output into a file, and returns how it ended: (exit code, last line).

    `failures` and `busy` name the cells that failed and those that another command works on; `stopped` is the signal
    that ended it.
    """

    plan: Plan
    say: Callable[[str], None] = print
    execute: Callable[[Runner, Cell, Step, FolderLock], tuple[int, str]] | None = None
    failures: dict[str, str] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)
    stopped: str | None = None
    process: subprocess.Popen[bytes] | None = None

    def run(self, wait: float = 5.0) -> bool:
        """Works on all cells; those that another command has in use are looked at again at the end.

        Returns:
            True when all cells are finished.

        Raises:
            InputError: before anything starts, when data are missing or a cell was begun with another recipe.
        """
        check_recipes(self.plan)
        waiting = [cell for cell in self.plan.cells if steps(cell)]
        for folder in sorted({data for cell in waiting for data in _data(cell)}):
            if not Path(folder).is_dir():
                raise InputError(
                    "no such folder", path=folder, remedy="prepare the data first, see its bundle's README"
                )
        done = len(self.plan.cells) - len(waiting)
        if done:
            self.say(f"{done} of {len(self.plan.cells)} cells are finished already")
        with self._signals():
            while waiting and not self.stopped:
                self.busy = []
                for cell in waiting:
                    if self.stopped:
                        break
                    self._work(cell)
                waiting = [cell for cell in waiting if cell.name in self.busy and steps(cell)]
                if waiting and not self.stopped:
                    self.say(f"{len(waiting)} cells are in use by another command: waiting for {waiting[0].name}")
                    deadline = time.monotonic() + wait
                    while time.monotonic() < deadline and not self.stopped:
                        time.sleep(LOOK)
        self._conclude()
        return not self.failures and not any(steps(cell) for cell in self.plan.cells)

    def _work(self, cell: Cell) -> None:
        try:
            lock = FolderLock(cell.folder / LOGS)
        except ValueError:
            self.busy.append(cell.name)
            return
        state, started = state_of(cell), time.monotonic()
        state |= {"recipe": recipe(cell)}
        self._note(cell, state)
        number = self.plan.cells.index(cell) + 1
        self.say(f"[{number}/{len(self.plan.cells)}] {cell.name}{self._left(cell)}")
        error = None
        try:
            for step in steps(cell):
                code, line = (self.execute or _execute)(self, cell, step, lock)
                if self.stopped:
                    return
                trained = step.name != TRAINING or is_trained(cell)
                if code or not trained:
                    how = read_run(cell.folder / FILE).get("how_it_ended", "it ended without a model")
                    error = f"{step.name}: {shortened(line, LONGEST) if code else how}"
                    break
        finally:
            state = state_of(cell) | {"error": error}
            state["seconds"] = state.get("seconds", 0.0) + time.monotonic() - started
            self._note(cell, state)
            lock.release()
        if error:
            self.failures[cell.name] = error
            self.say(f"  failed: {error}")
            return
        self.failures.pop(cell.name, None)
        self.say(f"  {self._result(cell)}")

    def _note(self, cell: Cell, state: Mapping[str, Any]) -> None:
        with replacing(cell.folder / CELL_FILE) as path:
            path.write_text(json.dumps(state, indent=1) + "\n", encoding="utf-8")

    def _left(self, cell: Cell) -> str:
        """How long the rest takes, from the cells that are finished: those of the same row where there are some."""
        took: dict[str, list[float]] = {}
        waiting = []
        for other in self.plan.cells:
            if steps(other):
                waiting.append(other)
            elif seconds := state_of(other).get("seconds"):
                took.setdefault(other.row, []).append(seconds)
        known = [seconds for row in took.values() for seconds in row]
        if not known:
            return ""
        per_row = {row: sum(found) / len(found) for row, found in took.items()}
        left = sum(per_row.get(other.row, sum(known) / len(known)) for other in waiting)
        return f" · about {clock(left)} left for {len(waiting)} cells"

    def _result(self, cell: Cell) -> str:
        best = read_run(cell.folder / FILE).get("best") or {}
        known = f"best {best['metric']} {best['score']:.4f} in epoch {best['epoch']}" if best else "finished"
        return f"{known} ({clock(state_of(cell).get('seconds', 0.0))})"

    def _conclude(self) -> None:
        unfinished = sum(bool(steps(cell)) for cell in self.plan.cells)
        self.say(f"{len(self.plan.cells) - unfinished} of {len(self.plan.cells)} cells are finished")
        for name, error in self.failures.items():
            self.say(f"failed: {name}: {error}")
        if self.failures:
            self.say(f"what they printed is in {self.plan.output}/CELL/{LOGS}; the same command tries them again")
        if self.stopped:
            self.say(f"stopped by {self.stopped}; the same command goes on")

    # Processes and signals

    @contextmanager
    def _signals(self) -> Any:
        """While cells are worked on, a signal is handed to the command that runs, which saves its state first."""
        before = {}
        with suppress(ValueError):  # handlers are the main thread's to set
            for number in SIGNALS:
                before[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.stopped is None:
            self.stopped = signal.Signals(number).name
            self.say(f"{self.stopped}: the step that is going on is finished and saved; a second signal ends at once")
        self.stop()

    def stop(self) -> None:
        """Asks the command that is running to save and end; a second time, to end at once."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)


def _data(cell: Cell) -> list[str]:
    return [cell.data, *(one.data for one in cell.zero_shot.values())]


def _execute(runner: Runner, cell: Cell, step: Step, lock: FolderLock) -> tuple[int, str]:
    """Runs a command, and shows how far it is. The lock is its too: it outlives a killed runner, and holds the cell."""
    log = cell.folder / LOGS / f"{step.name.replace(' ', '-')}.txt"
    held = () if lock.descriptor is None else (lock.descriptor,)
    limit = None
    if step.name == TRAINING and cell.minutes:
        limit = max(1.0, 60 * cell.minutes - float(state_of(cell).get("trained_seconds", 0.0)))
    started, said, shown = time.monotonic(), time.monotonic(), ""
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(step.command)}\n".encode())
        output.flush()
        runner.process = subprocess.Popen(
            step.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, pass_fds=held,
            start_new_session=True,
        )  # fmt: skip
    spent = False
    while runner.process.poll() is None:
        time.sleep(LOOK)
        elapsed = time.monotonic() - started
        if limit is not None and elapsed > limit and not spent and not runner.stopped:
            spent = True
            runner.stop()
        now = f"  {step.name}{_epoch(cell) if step.name == TRAINING else ''}"
        if sys.stdout.isatty() and now != shown:
            print(f"\r{now.ljust(len(shown))}", end="", flush=True)
            shown = now
        elif not sys.stdout.isatty() and time.monotonic() - said > LINE:
            said = time.monotonic()
            runner.say(now)
    code = runner.process.wait()
    runner.process = None
    if shown:
        print("\r" + " " * len(shown) + "\r", end="", flush=True)
    if step.name == TRAINING and cell.minutes:
        trained = float(state_of(cell).get("trained_seconds", 0.0)) + time.monotonic() - started
        runner._note(cell, state_of(cell) | {"trained_seconds": trained, "spent": spent})
    return code, last_line(log)


def _epoch(cell: Cell) -> str:
    """How far a training is, as its history says."""
    rows = history(cell.folder)
    if not rows:
        return ""
    last, epochs = int(rows[-1]["epoch"]), cell.epochs
    recent = [row["seconds"] for row in rows[-5:]]
    left = sum(recent) / len(recent) * (epochs - last)
    return f", epoch {last}/{epochs}, about {clock(left)} left"


def history(folder: Path) -> list[dict[str, float]]:
    """The epochs of a run in numbers; none where there are none to read.

    Example:
        >>> history(Path("nowhere"))
        []
    """
    try:
        with (folder / HISTORY).open(newline="", encoding="utf-8") as lines:
            rows = [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(lines)]
    except (OSError, ValueError, TypeError, csv.Error):
        return []
    return [row for row in rows if "epoch" in row and "seconds" in row]


def last_line(log: Path) -> str:
    """The last line of a file that says something, which is where commands put their errors."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def clock(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> clock(42), clock(600), clock(7800), clock(200_000)
        ('42 s', '10 min', '2 h 10 min', '2 d 7 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


class Job:
    """One cell as a job of submitit: pickled there, run wherever the queue starts it.

    Args:
        file, scale, overrides: of the plan.
    """

    def __init__(self, file: Path, scale: str | None, overrides: Mapping[str, Any]) -> None:
        self.file, self.scale, self.overrides = file, scale, dict(overrides)
        self.runner: Runner | None = None

    def __call__(self, name: str) -> None:
        from dataclasses import replace

        from experiments.plan import read_plan

        plan = read_plan(self.file, self.scale, self.overrides)
        self.runner = Runner(replace(plan, cells=tuple(cell for cell in plan.cells if cell.name == name)))
        if not self.runner.run():
            raise RuntimeError(self.runner.failures.get(name) or f"stopped by {self.runner.stopped}")

    def checkpoint(self, name: str) -> Any:
        """What submitit does when the queue takes the machine away: the run saves itself, and queues again."""
        import submitit

        if self.runner is not None:
            self.runner.stop()
        return submitit.helpers.DelayedSubmission(Job(self.file, self.scale, self.overrides), name)


def submit(
    plan: Plan, overrides: Mapping[str, Any], say: Callable[[str], None] = print, cluster: str | None = None
) -> bool:
    """Sends each cell that is not finished to Slurm through submitit, and waits for them.

    Args:
        plan: `submitit` are parameters of the jobs: timeout_min, gpus_per_node, cpus_per_task, slurm_partition …
        overrides: that the plan was read with.
        say: takes each line for people.
        cluster: "local" starts them all at once on this machine; None takes Slurm where it is.

    Returns:
        True when all cells are finished. Interrupted, it leaves the jobs in the queue.

    Raises:
        InputError: when submitit is not installed, or takes no such parameter.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError("--launcher submitit needs submitit: pip install submitit") from error
    check_recipes(plan)
    # the training saves itself on this one, as on Slurm's --signal=USR1
    os.environ.setdefault("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    waiting = [cell.name for cell in plan.cells if steps(cell)]
    executor = submitit.AutoExecutor(folder=plan.output / "submitit", cluster=cluster)
    try:
        executor.update_parameters(**{"name": plan.output.name, "timeout_min": 1440, **plan.submitit})
    except (NameError, ValueError, TypeError) as error:
        raise InputError(f"submitit: {' '.join(str(error).split())}", path=plan.file) from error
    job = Job(plan.file.resolve(), plan.scale, overrides)
    jobs = dict(zip(waiting, executor.map_array(job, waiting) if waiting else [], strict=True))
    for name, sent in jobs.items():
        say(f"job {sent.job_id}: {name}")
    failures: dict[str, str] = {}
    while jobs:
        for name, sent in list(jobs.items()):
            if sent.done():
                del jobs[name]
                if failed := sent.exception():
                    failures[name] = _reason(str(failed))
                say(f"{'failed' if name in failures else 'finished'}: {name} ({len(jobs)} left)")
        time.sleep(LOOK)
    for name, line in failures.items():
        say(f"failed: {name}: {line}")
    return not failures


def _reason(text: str) -> str:
    """The error in what submitit says of a job that failed: a traceback, and where its logs lie."""
    errors = re.findall(r"^[\w.]*(?:Error|Exception): (.+)$", text, re.MULTILINE)
    return errors[-1] if errors else " ".join(text.split())[-LONGEST:]
