"""Changes that break a good file, or only look as if they did, each with what must come of it."""

from __future__ import annotations

import os
import random
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

Edit = Callable[[Path], None]
HTML = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head><body>Not found</body></html>\n"


class Expected(Enum):
    """What must come of a changed input."""

    REFUSED = "one line that names it, exit code above 0, nothing written"
    SAME = "the result of the good input"
    EITHER = "refused, or the result of the good input"
    SAID = "refused, or a whole result and a line that names it"
    ANY = "refused, or a whole result: nothing in the file tells that it changed"
    FAILS = "exit code above 0, nothing written: MONAI reads it before a line of ours runs, and has its own words"


REFUSED, SAME, EITHER, SAID, ANY, FAILS = Expected


@dataclass(frozen=True)
class Change:
    """One change of one file.

    Args:
        name: of the kind, in a few words.
        edit: applies it to the file at a path.
        expected: what must come of it.
        gone: no such file is left, so that a line may name its case or its partner instead.
        unprivileged: the command must not run as root, which may read anything.
        also: other words that a line may name.
    """

    name: str
    edit: Edit
    expected: Expected
    gone: bool = False
    unprivileged: bool = False
    also: tuple[str, ...] = ()


def expecting(changes: Iterable[Change], expected: Mapping[str, Expected]) -> list[Change]:
    """`changes` with other expectations where `expected` has the name; a name that no change has is an error."""
    known = list(changes)
    if unknown := set(expected) - {change.name for change in known}:
        raise KeyError(f"no such change: {', '.join(sorted(unknown))}")
    return [replace(change, expected=expected.get(change.name, change.expected)) for change in known]


def without(changes: Iterable[Change], *names: str) -> list[Change]:
    """`changes` but those of these names."""
    known = list(changes)
    if unknown := set(names) - {change.name for change in known}:
        raise KeyError(f"no such change: {', '.join(sorted(unknown))}")
    return [change for change in known if change.name not in names]


# Bytes


def rewrite(function: Callable[[bytes], bytes]) -> Edit:
    return lambda path: _put(path, function(path.read_bytes()))


def _put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def cut(share: float) -> Edit:
    return rewrite(lambda data: data[: int(share * len(data))])


def cut_end(count: int) -> Edit:
    return rewrite(lambda data: data[:-count])


def flip(share: float, bit: int = 4) -> Edit:
    return rewrite(lambda data: flipped(data, int(share * (len(data) - 1)), bit))


def flipped(data: bytes, position: int, bit: int = 4) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def zero_block(share: float, length: int = 64) -> Edit:
    def zeroed(data: bytes) -> bytes:
        start = int(share * len(data))
        size = min(length, len(data) - start)
        return data[:start] + bytes(size) + data[start + size :]

    return rewrite(zeroed)


def append(content: bytes) -> Edit:
    return rewrite(lambda data: data + content)


def at(position: int, form: str, *values: Any) -> Callable[[bytes], bytes]:
    """Puts packed values at a position."""

    def put(data: bytes) -> bytes:
        packed = struct.pack(form, *values)
        return data[:position] + packed + data[position + len(packed) :]

    return put


# Any file


def _instead(make: Edit) -> Edit:
    def edit(path: Path) -> None:
        path.unlink()
        make(path)

    return edit


def any_file() -> list[Change]:
    """Not the file at all, or something in its place."""
    noise = random.Random(0).randbytes(3000)
    return [
        Change("empty", rewrite(lambda data: b""), REFUSED),
        Change("one byte", rewrite(lambda data: data[:1]), REFUSED),
        Change("a web page", rewrite(lambda data: HTML), REFUSED),
        Change("noise", rewrite(lambda data: noise), REFUSED),
        Change("all zeros", rewrite(lambda data: bytes(len(data))), REFUSED),
        Change("missing", Path.unlink, REFUSED, gone=True),
        Change("a folder", _instead(Path.mkdir), REFUSED, gone=True),
        Change("a dangling link", _instead(lambda path: path.symlink_to("nowhere")), REFUSED, gone=True),
        Change("a link to itself", _instead(lambda path: path.symlink_to(path.name)), REFUSED, gone=True),
        Change("a pipe", _instead(os.mkfifo), REFUSED, gone=True),
        Change("not readable", lambda path: path.chmod(0), REFUSED, gone=True, unprivileged=True),
        Change("a link to the file", _linked, SAME),
    ]


def _linked(path: Path) -> None:
    elsewhere = path.parents[1] / "elsewhere"
    elsewhere.mkdir()
    shutil.move(path, elsewhere / path.name)
    path.symlink_to(Path("../elsewhere") / path.name)


def damage(
    cuts: Expected = REFUSED, end: Expected = EITHER, flips: Expected = EITHER, blocks: Expected = EITHER
) -> list[Change]:
    """Truncated, flipped and zeroed at several places."""
    return [
        *(Change(f"cut to {100 * share:.0f} %", cut(share), cuts) for share in (0.1, 0.5)),
        # of a small file this may be nothing but its end
        Change("cut to 90 %", cut(0.9), cuts if end is not EITHER else EITHER),
        Change("cut by one byte", cut_end(1), end),
        *(Change(f"a bit flipped at {100 * share:.0f} %", flip(share), flips) for share in (0.4, 0.6, 0.8)),
        Change("first byte flipped", flip(0), flips),
        Change("last byte flipped", flip(1), end),
        *(Change(f"64 zeros at {100 * share:.0f} %", zero_block(share), blocks) for share in (0.3, 0.7)),
        Change("1000 zeros appended", append(bytes(1000)), EITHER),
    ]
