"""How a run ends before its time: signals, loader processes that are killed, and the lock of a folder in use."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from networks.training.steps import WatchedDataset

logger = logging.getLogger(__name__)

# Slurm sends SIGUSR1 ahead of the end where a job asks for it: --signal=USR1@120
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SIGNAL_SECONDS = 3


class StopSignals:
    """Remembers a signal to stop, so that the step can be finished and saved first; a second one ends the program.

    Example:
        >>> signals = StopSignals()
        >>> signals.listen()
        >>> signals.received is None
        True
        >>> signals.forget()
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.received_at = 0.0
        self.handlers: dict[int, Any] = {}

    def listen(self) -> None:
        """From here on signals are remembered. Handlers are the main thread's to set."""
        with contextlib.suppress(ValueError):
            for number in SIGNALS:
                self.handlers[number] = signal.signal(number, self._receive)

    def forget(self) -> None:
        """Gives the signals back; once stopped, further ones change nothing: the program is about to end."""
        while self.handlers and self.received is None:
            signal.signal(*self.handlers.popitem())

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            # torchrun sends on to its processes what the terminal or the queue has sent to all of them
            if not dist.is_initialized() or time.monotonic() - self.received_at > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)
            return
        self.received = signal.Signals(number).name
        self.received_at = time.monotonic()
        logger.info(f"{self.received}: this step is finished and saved; a second signal ends at once")


class FolderLock:
    """Holds a folder until it is released or the process ends, however it does. It leaves no file.

    Raises:
        ValueError: when another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptor: int | None = None
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return
        self.descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ValueError(f"{folder} is in use by another run: wait for it, or give another --ckpt_dir") from error
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
        _held.add(self)

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    __del__ = release


# Forked loader workers would inherit the lock, and they outlive a killed run by seconds.
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _release_all() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)


# What PyTorch says of a loader's process that has ended, from wherever the program is then.
WORKER = re.compile(r"DataLoader worker \(pids?(?:\(s\))? ([\d, ]+)\)")


def of_worker(error: BaseException, engines: Sequence[Any]) -> str:
    """What to say where a loader's process was killed, with the files that it was at; else nothing.

    Args:
        engines: those whose loaders it may be of.
    """
    found = WORKER.search(str(error))
    if found is None:
        return ""
    numbers = [int(number) for number in found[1].split(",")]
    datasets = [getattr(getattr(engine, "data_loader", None), "dataset", None) for engine in engines]
    watched = list(dict.fromkeys(one for one in datasets if isinstance(one, WatchedDataset)))
    files = [file for one in watched for file in one.last_files(numbers)]
    at = f", its last file was {', '.join(files)}" if files else ""
    memory = (
        "there may be too little memory (/dev/shm)" if "shared memory" in str(error) else "there may be no memory left"
    )
    return f"a process that loads images was killed{at}; {memory}, or the file crashes its reader: try --num_workers 0"
