"""The warm process: it has imported everything once, and forks for each input, so that one takes half a second.

The child is what a shell would start: arguments, working directory, exit code, and standard output and error in one
file in their order. It has a time limit, a memory limit, and a session of its own, which ends with it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.broken.inputs import INPUTS, Input
from tests.broken.judge import Outcome, Run, Verdict, judge, lines, shape, snapshot
from tests.broken.worlds import ROOT, World, written

TIME_LIMIT_S = 30
MEMORY_LIMIT = 3 << 30
FILE_LIMIT = 1 << 30
# capget(2): version 3; CAP_DAC_OVERRIDE is number 1, CAP_DAC_READ_SEARCH number 2
CAPABILITIES, OVERRIDE = 0x20080522, 0b110


def preload() -> None:
    """Imports what the commands import, also what they import late."""
    import fire
    import ignite.handlers
    import matplotlib.pyplot
    import monai.bundle.scripts
    import PIL.Image
    import torch._dynamo
    import torch.utils.tensorboard

    import bundles
    import evaluation
    import networks.training
    import prepare.busi
    import prepare.demo
    import prepare.isic
    import prepare.synapse

    assert all((bundles, evaluation, fire, ignite, matplotlib, monai, networks, prepare, torch))
    PIL.Image.init()


def execute(
    module: str, words: Sequence[str], folder: Path, unprivileged: bool = False, limit: float = TIME_LIMIT_S
) -> Run:
    """Runs `python -m MODULE WORDS` in `folder`, in a child of this process."""
    output = folder.with_name(f"{folder.name}.txt")
    before = snapshot(folder)
    started = time.perf_counter()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _become(module, words, folder, output, unprivileged)
    code = _wait(child, started + limit)
    seconds = time.perf_counter() - started
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    printed = output.read_text(errors="replace") if output.exists() else ""
    return Run(code, printed, before, snapshot(folder), seconds)


def _wait(child: int, until: float) -> int | None:
    """The exit code; negative for a signal, None where the time ran out."""
    pause = 0.002
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.perf_counter() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)


def _become(module: str, words: Sequence[str], folder: Path, output: Path, unprivileged: bool) -> None:
    """The child: never returns."""
    code = 70
    try:
        os.setsid()
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, number in ((null, 0), (target, 1), (target, 2)):
            os.dup2(source, number)
        sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_LIMIT, size + MEMORY_LIMIT))
        resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(folder)
        if unprivileged and os.geteuid() == 0:
            _obey_permissions()
        sys.argv = [module, *words]
        code = _run_as_main(module)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _obey_permissions() -> None:
    """Takes the right from root to read what permissions forbid.

    Raises:
        OSError: when the system has no such right.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(CAPABILITIES, 0)
    # effective, permitted, inheritable: of the numbers 0 … 31, then of the others
    rights = (ctypes.c_uint32 * 6)()
    failed = libc.capget(header, rights)
    for index in range(3):
        rights[index] &= ~OVERRIDE
    if failed or libc.capset(header, rights):
        raise OSError(ctypes.get_errno(), "root cannot be held to permissions here")


def _run_as_main(module: str) -> int:
    """What the interpreter does with a module: its exit code, after what it prints of an exception."""
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as ending:
        if ending.code is None or isinstance(ending.code, int):
            return ending.code or 0
        print(ending.code, file=sys.stderr)
        return 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def _in_a_child(work: Callable[[], None]) -> None:
    """Keeps what this process forks from free of threads and states that the work leaves behind.

    Raises:
        RuntimeError: when it failed.
    """
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise RuntimeError("the good files could not be written")


def _renamed(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        key = key.replace(old, new)
    return key


class Bench:
    """Runs inputs in a temporary folder, and knows what the good files of each world give."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.good: dict[str, dict[str, Any]] = {}
        self.number = 0

    def copy_of(self, world: World) -> Path:
        """A fresh folder with the world's files."""
        template = self.folder / "templates" / world.name.replace(" ", "_").replace(":", "")
        if not template.exists():
            template.mkdir(parents=True)
            _in_a_child(lambda: world.build(template))
        self.number += 1
        # no name of a case or an option, which a line must not hold by chance
        place = self.folder / f"{self.number:05d}" / "x"
        shutil.copytree(template, place, symlinks=True)
        return place

    def good_run(self, world: World) -> dict[str, Any]:
        """Result, paths and printed lines of the world's own files.

        Raises:
            RuntimeError: when they are refused: a broken input would prove nothing.
        """
        if world.name not in self.good:
            place = self.copy_of(world)
            run = execute(world.module, world.words, place, limit=4 * TIME_LIMIT_S)
            if run.code != 0:
                raise RuntimeError(f"{world.name}: the good files are refused, exit code {run.code}:\n{run.printed}")
            self.good[world.name] = {
                "result": written(place / "out"),
                "paths": [path for path, state in run.after.items() if run.before.get(path) != state],
                "usual": {shape(line) for line in lines(run.printed)},
            }
            shutil.rmtree(place.parent)
        return self.good[world.name]

    def try_out(self, one: Input, keep: bool = False) -> Verdict:
        """The verdict on one input."""
        good = self.good_run(one.world)
        place = self.copy_of(one.world)
        one.edit(place)
        run = execute(one.world.module, one.words, place, one.unprivileged)
        good = {**good, "result": {_renamed(key, one.renamed): value for key, value in good["result"].items()}}
        verdict = judge(run, place, good, good["usual"], one.expected, one.named, one.others)
        if not keep:
            for path in place.rglob("*"):
                if path.is_dir() and not path.is_symlink():
                    path.chmod(0o755)
            shutil.rmtree(place.parent)
        return verdict


def serve() -> None:
    """Answers lines that name an input, one JSON object each, until there are no more."""
    preload()
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    # not a TemporaryDirectory, which a child would remove at its end
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    try:
        bench = Bench(folder)
        for line in sys.stdin:
            try:
                verdict = bench.try_out(INPUTS[json.loads(line)])
            except Exception:
                verdict = Verdict(Outcome.OTHER, f"the trial itself failed: {traceback.format_exc()}")
            answer = {"outcome": verdict.outcome.name, "reason": verdict.reason, "seconds": verdict.seconds}
            answers.write(json.dumps({**answer, "printed": verdict.printed}) + "\n")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Worker:
    """A warm process, seen from the one that started it."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT)}
        # MONAI says of every configuration that it executes code; these are our own
        quiet = ("-W", "ignore:parsing config_file:UserWarning")
        self.process = subprocess.Popen(
            [sys.executable, *quiet, "-m", "tests.broken", "--serve"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def verdict(self, key: str) -> Verdict:
        """The verdict on the input of that key."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps(key) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the warm process ended at {key}, exit code {self.process.wait()}")
        answer = json.loads(line)
        return Verdict(Outcome[answer.pop("outcome")], **answer)

    def close(self) -> None:
        with self.process:
            assert self.process.stdin
            self.process.stdin.close()
