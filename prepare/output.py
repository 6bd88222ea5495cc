"""What all preparations share: their error, their printed lines, and an output folder written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

FACTS = "dataset.json"

T = TypeVar("T")
R = TypeVar("R")


class PrepareError(Exception):
    """The input or the output folder is not as it must be; the message is one line that the user can act on."""


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
        return tqdm(items, desc=f"{self.prefix}{title}", dynamic_ncols=True)

    def map(self, function: Callable[[T], R], items: Sequence[T], title: str, workers: int | None = None) -> list[R]:
        """The results of `function` for all items, in order, from `workers` threads; the first error ends it."""
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in self.progress(futures, title)]
            finally:
                pool.shutdown(cancel_futures=True)

    def table(self, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        """Prints columns as wide as their widest cell."""
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            self("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error.

    An interrupted run leaves `out` as it was; the next run at the latest removes what it had written.

    Args:
        out: the folder.
        overwrite: replace what an earlier preparation wrote there.

    Raises:
        PrepareError: when `out` is a file, holds something and `overwrite` is false, or holds something that no
            preparation wrote. Such files are never removed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as parent:
        ...     with staged(Path(parent) / "data") as folder:
        ...         write_facts(folder, {"images": 8}, Report())
        ...     [str(file.relative_to(parent)) for file in Path(parent).rglob("*")]
        ['data', 'data/dataset.json']
    """
    out = out.absolute()
    if out.exists() and not out.is_dir():
        raise PrepareError(f"{out}: is a file, expected a folder to write to")
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise PrepareError(f"{out}: exists already; choose another --out, or --overwrite to make it anew")
        if not (out / FACTS).is_file():
            raise PrepareError(f"{out}: holds files that were not prepared here (no {FACTS}); choose another --out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if out.is_dir():
            replaced = out.with_name(f".{out.name}.replaced")
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(out, replaced)
            os.replace(partial, out)
            shutil.rmtree(replaced)
        else:
            os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_facts(folder: Path, facts: dict[str, Any], report: Report) -> None:
    """Writes `dataset.json`: what the prepared data are. It names no date or machine, so equal data give equal files.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_facts(Path(folder), {"images": 8}, Report("synthetic"))
        ...     json.loads((Path(folder) / FACTS).read_text())
        {'note': 'synthetic', 'images': 8}
    """
    if report.mark:
        facts = {"note": report.mark} | facts
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
