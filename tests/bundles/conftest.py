import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Run = Callable[..., subprocess.CompletedProcess]


def monai_bundle(command: str, *arguments: str, launcher: tuple[str, ...] = (sys.executable,)) -> Run:
    """`python -m monai.bundle COMMAND …` in a process of its own, from the repository's root, as users run it."""
    # one thread: the networks are tiny, and two processes share the machine in the distributed test
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(
        [*launcher, "-m", "monai.bundle", *command.split(), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="session")
def bundle_command() -> Callable[..., str]:
    """Runs a command that must succeed and returns what it printed."""

    def run(command: str, *arguments: str, **options: tuple[str, ...]) -> str:
        done = monai_bundle(command, *arguments, **options)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


@pytest.fixture(scope="session")
def failing_command() -> Callable[..., str]:
    """Runs a command that must fail for a reason the user can mend, and returns what it printed to stderr."""

    def run(command: str, *arguments: str) -> str:
        done = monai_bundle(command, *arguments)
        assert done.returncode != 0
        assert "Traceback" not in done.stdout + done.stderr
        return done.stderr

    return run
