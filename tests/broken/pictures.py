"""Changes of pictures and masks: PNG, JPEG, TIFF."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.broken.changes import (
    ANY,
    EITHER,
    REFUSED,
    SAID,
    SAME,
    Change,
    Edit,
    any_file,
    at,
    damage,
    expecting,
    flipped,
    rewrite,
)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG with the right checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width: int | None = None, height: int | None = None, colour: int | None = None) -> Edit:
    """Another IHDR with the right checksum."""

    def edit(data: bytes) -> bytes:
        old = struct.unpack(">IIBBBBB", data[16:29])
        new = (old[0] if width is None else width, old[1] if height is None else height, *old[2:])
        if colour is not None:
            new = (*new[:3], colour, *new[4:])
        return data[:8] + chunk(b"IHDR", struct.pack(">IIBBBBB", *new)) + data[33:]

    return rewrite(edit)


def png_chunk(kind: bytes, content: bytes) -> Edit:
    """One more chunk after the header."""
    return rewrite(lambda data: data[:33] + chunk(kind, content) + data[33:])


def saved_as(kind: str, change: Callable[[np.ndarray], Any] = lambda array: array, **options: Any) -> Edit:
    """The pixels, changed, in another format under the same name."""

    def edit(path: Path) -> None:
        array = np.asarray(Image.open(path))
        changed = change(array)
        picture = changed if isinstance(changed, Image.Image) else Image.fromarray(changed)
        with path.open("wb") as file:
            picture.save(file, kind, **options)

    return edit


def as_npy(path: Path) -> None:
    array = np.asarray(Image.open(path))
    with path.open("wb") as file:
        np.save(file, array)


def png() -> list[Change]:
    bomb = zlib.compress(bytes(200_000_000), 9)
    return [
        *any_file(),
        *damage(),
        Change("claims 30000 × 30000", png_header(30000, 30000), REFUSED),
        Change("claims 10000 × 10000", png_header(10000, 10000), REFUSED),
        Change("claims 2³¹ − 1 columns", png_header(2**31 - 1), REFUSED),
        Change("claims no columns", png_header(0), REFUSED),
        Change("claims one row more", rewrite(_one_row_more), REFUSED),
        Change("checksum of the header flipped", rewrite(lambda data: flipped(data, 30)), EITHER),
        Change("unknown colour type", png_header(colour=7), REFUSED),
        Change("a text of 200 MB", png_chunk(b"zTXt", b"comment\0\0" + bomb), EITHER),
        Change("a profile of noise", png_chunk(b"iCCP", b"profile\0\0" + bytes(range(100))), EITHER),
        Change(
            "a chunk that claims 2 GB", rewrite(lambda data: data[:33] + b"\x7f\xff\xff\xfftEXt" + data[33:]), EITHER
        ),
        Change("a bitmap by another name", saved_as("BMP"), EITHER),
        Change("an array by another name", as_npy, REFUSED),
        Change("a bitmap of 60000 × 60000", rewrite(lambda data: _huge_bitmap()), REFUSED),
    ]


def _one_row_more(data: bytes) -> bytes:
    height = struct.unpack(">I", data[20:24])[0]
    return data[:8] + chunk(b"IHDR", data[16:20] + struct.pack(">I", height + 1) + data[24:29]) + data[33:]


def _huge_bitmap() -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4)).save(file, "BMP")
    return at(18, "<ii", 60000, 60000)(file.getvalue())


def jpg_size(height: int, width: int) -> Edit:
    """Another size in the frame header."""

    def edit(data: bytes) -> bytes:
        frame = data.index(b"\xff\xc0")
        return at(frame + 5, ">HH", height, width)(data)

    return rewrite(edit)


def jpg() -> list[Change]:
    """A JPEG has no checksums: what is flipped in its pixels cannot be told."""
    return [
        *any_file(),
        *expecting(damage(flips=ANY, blocks=ANY), {"first byte flipped": REFUSED}),
        Change("claims 65000 × 65000", jpg_size(65000, 65000), REFUSED),
        Change("claims 9000 × 9000", jpg_size(9000, 9000), REFUSED),
        Change("claims no rows", jpg_size(0, 36), REFUSED),
        Change("no frame header", rewrite(lambda data: data.replace(b"\xff\xc0", b"\xff\xfe")), REFUSED),
        Change("no tables", rewrite(lambda data: data.replace(b"\xff\xdb", b"\xff\xfe")), REFUSED),
        Change("EXIF of noise", rewrite(lambda data: data[:2] + b"\xff\xe1\x00\x0eExif\0\0noise!" + data[2:]), EITHER),
        Change("a PNG by another name", saved_as("PNG"), EITHER),
        Change("an array by another name", as_npy, REFUSED),
        Change("progressive", saved_as("JPEG", quality=95, progressive=True), ANY),
    ]


def tif() -> list[Change]:
    def pages(path: Path) -> None:
        picture = Image.open(path).copy()
        picture.save(path, save_all=True, append_images=[Image.fromarray(255 - np.asarray(picture))] * 2)

    def of_floats(value: float) -> Edit:
        def changed(array: np.ndarray) -> np.ndarray:
            grey = array[..., 0].astype(np.float32)
            grey[3, 3] = value
            return grey

        return saved_as("TIFF", changed)

    return [
        *damage(flips=ANY, blocks=ANY),
        Change("floats with NaN", of_floats(np.nan), REFUSED),
        Change("floats with Inf", of_floats(np.inf), REFUSED),
        Change("floats", of_floats(0), REFUSED),
        Change("negative numbers", saved_as("TIFF", lambda array: array[..., 0].astype(np.int32) - 99), REFUSED),
        Change("three pages", pages, REFUSED),
        Change("a directory that points to itself", rewrite(_tif_loop), EITHER),
    ]


def _tif_loop(data: bytes) -> bytes:
    start = struct.unpack("<I", data[4:8])[0]
    count = struct.unpack("<H", data[start : start + 2])[0]
    return at(start + 2 + 12 * count, "<I", start)(data)


def size_of_a_pair() -> list[Change]:
    """Of an image or a mask that has a partner."""
    return [
        Change("one row less", saved_as("PNG", lambda array: array[1:]), REFUSED),
        Change("turned", saved_as("PNG", lambda array: np.ascontiguousarray(array.swapaxes(0, 1))), REFUSED),
        Change("claims fewer rows", png_header(height=20), REFUSED),
    ]


def masks() -> list[Change]:
    """What masks hold beside damage: other ways to draw the same mask, and what is none."""

    def palette(array: np.ndarray) -> Image.Image:
        picture = Image.fromarray((array > 0).astype(np.uint8), "P")
        picture.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
        return picture

    def alpha(array: np.ndarray) -> np.ndarray:
        return np.dstack([np.zeros_like(array)] * 3 + [array])

    def photo(array: np.ndarray) -> np.ndarray:
        return np.random.default_rng(0).integers(0, 256, (*array.shape, 3)).astype(np.uint8)

    return [
        Change("0 and 1", saved_as("PNG", lambda array: (array > 0).astype(np.uint8)), SAME),
        Change("0 and 100", saved_as("PNG", lambda array: (array > 0).astype(np.uint8) * 100), SAME),
        Change("0 and 1 in 16 bits", saved_as("PNG", lambda array: (array > 0).astype(np.uint16)), SAME),
        Change("0 and 1 in 32 bits", saved_as("TIFF", lambda array: (array > 0).astype(np.int32)), SAME),
        Change("bilevel", saved_as("PNG", lambda array: Image.fromarray(array > 0)), SAME),
        Change("dark red by palette", saved_as("PNG", palette), SAME),
        Change("in the alpha channel", saved_as("PNG", alpha), SAME),
        Change("a photo", saved_as("PNG", photo), REFUSED),
        Change("no foreground", saved_as("PNG", np.zeros_like), SAID),
        Change("floats with NaN", saved_as("TIFF", lambda array: np.where(array > 0, np.nan, 0).astype("f4")), REFUSED),
    ]
