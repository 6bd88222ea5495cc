"""What every preparation shares: its error, what it prints, and an output folder that is there whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["FACTS", "PrepareError", "Report", "sha256", "staged", "write_facts"]

FACTS = "dataset.json"

T = TypeVar("T")
R = TypeVar("R")


class PrepareError(Exception):
    """Something about the input or the output folder that the user can put right; the message is one line."""


class Report:
    """Lines and progress bars, every one of them with the same mark in front.

    Args:
        mark: text before each line, such as a warning that the data are synthetic.
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
        """`function` of every item, in order, by `workers` threads; the first error ends it."""
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            futures = [pool.submit(function, item) for item in items]
            try:
                return [future.result() for future in self.progress(futures, title)]
            finally:
                pool.shutdown(cancel_futures=True)

    def table(self, header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
        """Columns as wide as their widest cell."""
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        for row in (header, *rows):
            self("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextmanager
def staged(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error.

    An interrupted run leaves `out` as it was; what it had written is removed by the next run at the latest.

    Raises:
        PrepareError: when `out` is a file, holds something and `overwrite` is false, or holds something that no
            preparation wrote (nothing of that is ever removed).
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
    """`dataset.json`: what the prepared data are, without dates or machine names, so equal data give equal files."""
    if report.mark:
        facts = {"note": report.mark} | facts
    (folder / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
