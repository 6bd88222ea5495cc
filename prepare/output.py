"""What all preparations share: their printed lines, and an output folder written whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from transforms import InputError, check_output, looks_inverted

FACTS = "dataset.json"
# Lies in folders that are not complete, or no longer needed.
MARK = ".prepare"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

T = TypeVar("T")
R = TypeVar("R")


class Report:
    """Prints lines and progress bars, all with the same mark in front.

    Args:
        mark: text before each line, such as a warning that the data are synthetic.

    Example:
        >>> Report("synthetic").table(("part", "images"), [("train", "8")])
        [synthetic] part   images
        [synthetic] train  8
    """

    def __init__(self, mark: str = "") -> None:
        self.mark = mark
        self.prefix = f"[{mark}] " if mark else ""

    def __call__(self, text: str) -> None:
        for line in text.splitlines():
            tqdm.write(f"{self.prefix}{line}")

    def progress(self, items: Iterable[T], title: str) -> Iterable[T]:
        """The items, with a bar on stderr where that is a terminal."""
        return tqdm(items, desc=f"{self.prefix}{title}", dynamic_ncols=True, disable=None)

    def map(self, function: Callable[[T], R], items: Sequence[T], title: str, workers: int | None = None) -> list[R]:
        """The results of `function` for all items, in order, from `workers` threads; the first error ends it."""
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in self.progress(futures, title)]
            finally:
                pool.shutdown(cancel_futures=True)

    def odd_masks(self, empty: Sequence[str], inverted: Sequence[str]) -> None:
        """Prints the names of masks that mark nothing, and of those that may mark the background."""
        for names, what in ((empty, "empty"), (inverted, "full, or all border: inverted perhaps")):
            if names:
                self(f"WARNING: {len(names)} mask{'s are' if len(names) > 1 else ' is'} {what}: {', '.join(names)}")

    def table(self, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        """Prints columns as wide as their widest cell."""
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            self("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def check_workers(workers: int | None) -> None:
    """Refuses less than one thread.

    Example:
        >>> check_workers(-1)
        Traceback (most recent call last):
        transforms.files.InputError: --workers -1: expected a whole number above 0
    """
    if workers is not None and workers < 1:
        raise InputError(f"--workers {workers}: expected a whole number above 0")


def oddities(mask: np.ndarray) -> str:
    """What is odd about a mask: "empty", "inverted" as far as that can be seen, or nothing.

    Example:
        >>> oddities(np.zeros((2, 2))), oddities(np.ones((2, 2)))
        ('empty', 'inverted')
    """
    return "inverted" if looks_inverted(mask) else "" if mask.any() else "empty"


@contextmanager
def staged(out: Path, overwrite: bool = False, bytes_needed: int = 0) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` when the block ends without an error and wrote `dataset.json`.

    Until then `out` stays as it was, whatever ends the run; the next run removes what a killed one left. The folder
    lies beside `out`, or in it where `out` cannot be moved: a mount point, the working directory, a parent that is
    read-only. Links are followed.

    Args:
        out: the folder.
        overwrite: replace what an earlier preparation wrote there.
        bytes_needed: about how much will be written.

    Raises:
        InputError: when `out` cannot be written to, lacks room, is being written to by another preparation, holds
            something and `overwrite` is false, or holds something that no preparation wrote, which is never removed.
            And when the disk is full before the block ends.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with staged(Path(parent) / "data") as folder:
        ...         write_facts(folder, {"dataset": "demo"}, Report())
        ...     [str(file.relative_to(parent)) for file in Path(parent).rglob("*")]
        ['data', 'data/dataset.json']
    """
    check_output(out, bytes_needed)
    out = out.resolve()
    new_parents = [parent for parent in out.parents if not parent.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    beside, inside = out.parent / f".{out.name}", out / MARK
    movable = not out.exists() or _movable(out)
    partial, replaced = (Path(f"{beside if movable else inside}.{what}") for what in ("partial", "replaced"))
    lock = Path(f"{beside if os.access(out.parent, os.W_OK) else inside}.prepare-lock")
    try:
        with _locked(lock, out):
            _recover(partial, replaced, out)
            if any(_content(out)):
                if not overwrite:
                    raise InputError("exists already", path=out, remedy="choose another --out, or --overwrite it")
                if not _is_prepared(out):
                    fact = f"holds files that were not prepared here (no {FACTS} of a preparation)"
                    raise InputError(fact, path=out, remedy="choose another --out")
            partial.mkdir()
            try:
                (partial / MARK).touch()
                yield partial
                if not _is_prepared(partial):
                    raise RuntimeError(f"{partial}: the preparation wrote no {FACTS}")
                (partial / MARK).unlink()
                _publish(partial, replaced, out, movable)
            except OSError as error:
                # Within a folder that is staged itself, that one's name means something to the user.
                if error.errno not in DISK_FULL or (out.parent / MARK).exists():
                    raise
                remedy = "free some room, or choose another --out"
                raise InputError("the disk is full", path=out, remedy=remedy) from error
            finally:
                if not replaced.exists():
                    _remove(partial)
    finally:
        for parent in new_parents:
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _locked(lock: Path, out: Path) -> Iterator[None]:
    """Keeps other preparations away from `out`; the system itself unlocks the file when the process ends.

    Raises:
        InputError: when another preparation is at it.
    """
    mine = FileLock(lock)
    try:
        mine.acquire(blocking=False)
    except Timeout as error:
        raise InputError(
            "another preparation is writing to it", path=out, remedy="wait, or choose another --out"
        ) from error
    try:
        yield
    finally:
        # Removed while it is still locked: whoever opened the file in between finds it gone and makes a new one.
        with suppress(OSError):
            lock.unlink()
        mine.release()


def _movable(out: Path) -> bool:
    """True if the folder `out` can give its place to another one."""
    with suppress(OSError):
        if Path.cwd().is_relative_to(out):
            return False
    mounts = ""
    with suppress(OSError):
        # Python does not see a mount of a folder of the same file system.
        mounts = os.fsdecode(Path("/proc/self/mountinfo").read_bytes())
    return not (os.path.ismount(out) or f" {out} " in mounts) and os.access(out.parent, os.W_OK)


def _content(folder: Path) -> Iterator[Path]:
    """What a folder holds, without what preparations use while they run and what systems put everywhere."""
    passed_over = (MARK, "lost+found", ".DS_Store")
    if folder.is_dir():
        yield from (path for path in folder.iterdir() if not path.name.startswith(passed_over))


def _is_prepared(folder: Path) -> bool:
    """True if a preparation wrote the folder. Other programs too write a `dataset.json`, but not with this in it."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(facts, dict) and isinstance(facts.get("dataset"), str)


def _recover(partial: Path, replaced: Path, out: Path) -> None:
    """Ends what a killed run began: a move of the entries goes on, other leftovers are removed.

    Raises:
        InputError: when something of these names is not a preparation's.
    """
    for folder in (partial, replaced):
        if not os.path.lexists(folder):
            continue
        ours = folder.is_dir() and not folder.is_symlink()
        if not ours or not ((folder / MARK).exists() or _is_prepared(folder) or not any(folder.iterdir())):
            raise InputError("is in the way and was not made by a preparation", path=folder, remedy="move it elsewhere")
    if replaced.exists():
        _move_entries(partial, replaced, out)
    _remove(partial)


def _publish(partial: Path, replaced: Path, out: Path, movable: bool) -> None:
    """Puts the complete folder in the place of `out`: in one step where the system can, else entry by entry."""
    if movable:
        with suppress(OSError):
            if out.exists():
                shutil.copymode(out, partial)
            if not out.exists() or not any(out.iterdir()):
                os.replace(partial, out)
                return
            if _exchange(partial, out):
                return
    _move_entries(partial, replaced, out)


def _exchange(first: Path, second: Path) -> bool:
    """Gives each of two folders the other's name in one step. False where the system cannot."""
    if sys.platform != "linux":
        return False
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    return call is not None and not call(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange)


def _move_entries(partial: Path, replaced: Path, out: Path) -> None:
    """Moves the entries of `out` to `replaced`, then those of `partial` to `out`; `out` never holds some of both.

    `replaced` exists for as long as this takes, and each folder's `dataset.json` is moved last. So what a kill left
    tells where to go on.
    """
    replaced.mkdir(exist_ok=True)
    (replaced / MARK).touch()
    moved = []
    try:
        for source, target in ((out, replaced), (partial, out)):
            if not (partial / FACTS).exists() or (source is out and not (out / FACTS).exists()):
                continue
            for path in sorted(_content(source), key=lambda path: path.name == FACTS):
                os.rename(path, target / path.name)
                moved.append((path, target / path.name))
    except BaseException:
        for path, there in reversed(moved):
            os.rename(there, path)
        if not any(_content(replaced)):
            _remove(replaced)
        raise
    _remove(replaced)


def _remove(folder: Path) -> None:
    """Removes a folder of a preparation as far as possible; what tells that it is one goes last."""
    with suppress(OSError):
        for path in sorted(folder.iterdir(), key=lambda path: path.name in (MARK, FACTS)):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        folder.rmdir()


def write_facts(folder: Path, facts: dict[str, Any], report: Report) -> None:
    """Writes `dataset.json`: what the prepared data are. It names no date or machine, so equal data give equal files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_facts(Path(folder), {"dataset": "demo"}, Report("synthetic"))
        ...     json.loads((Path(folder) / FACTS).read_text())
        {'note': 'synthetic', 'dataset': 'demo'}
    """
    if report.mark:
        facts = {"note": report.mark} | facts
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
