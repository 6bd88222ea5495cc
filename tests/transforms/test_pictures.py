from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged
from PIL import Image

from transforms import InputError, MaskReader, PictureReader, SameSized, check_sizes, pictures, read_picture

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
# What viewers do with the stored pixels.
SHOWN: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, 1),
}


def photograph(path: Path, stored: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "tiff", "webp", "PNG", "gif"])
def test_colour_and_its_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(COLOUR).save(path, **({"lossless": True} if suffix == "webp" else {}))
    np.testing.assert_array_equal(read_picture(path), COLOUR)
    np.testing.assert_array_equal(read_picture(path, "BGR"), COLOUR[..., ::-1])


def test_every_form_of_grey_becomes_the_same(tmp_path: Path) -> None:
    opaque = Image.fromarray(GREY).convert("RGBA")
    opaque.putalpha(Image.fromarray(255 - GREY))
    transparent = Image.fromarray(GREY).convert("P")
    transparent.info["transparency"] = bytes(range(256))
    forms = {
        "grey": Image.fromarray(GREY),
        "rgb": Image.fromarray(np.stack([GREY] * 3, axis=-1)),
        "rgba": opaque,
        "la": Image.fromarray(GREY).convert("LA"),
        "palette": Image.fromarray(GREY).convert("P"),
        "transparent palette": transparent,
        "sixteen": Image.fromarray(GREY.astype(np.uint16) * 257),
    }
    for name, picture in forms.items():
        picture.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_picture(tmp_path / f"{name}.png", "L"), GREY, err_msg=name)
        np.testing.assert_array_equal(read_picture(tmp_path / f"{name}.png"), np.stack([GREY] * 3, -1), err_msg=name)


@pytest.mark.parametrize(("highest", "scale"), [(65535, 65535), (4096, 65535), (4095, 4095), (700, 4095), (255, 255)])
def test_the_range_of_grey_in_16_bits_is_that_of_its_values(
    tmp_path: Path, highest: int, scale: int, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_said", set())
    stored = (np.arange(35).reshape(5, 7) * highest // 34).astype(np.uint16)
    for suffix in ("png", "tif"):
        Image.fromarray(stored).save(tmp_path / f"a.{suffix}")
        np.testing.assert_allclose(read_picture(tmp_path / f"a.{suffix}", "L"), stored * (255 / scale), atol=0.5)
    assert [f"taken for {scale.bit_length()} bits" in record.getMessage() for record in caplog.records] == [True] * (
        scale < 65535
    )


def test_four_channels_are_read_as_four(tmp_path: Path) -> None:
    four = np.dstack([COLOUR, GREY])
    Image.fromarray(four).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "RGBA"), four)
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png", "BGRA"), four[..., [2, 1, 0, 3]])
    for mode, channels, expected in (("BGR", 4, four[..., [2, 1, 0, 3]]), ("RGB", 4, four), ("RGB", 3, COLOUR)):
        load = Compose([LoadImaged("image", PictureReader(mode, channels)), EnsureChannelFirstd("image")])
        np.testing.assert_array_equal(load({"image": tmp_path / "a.png"})["image"], np.moveaxis(expected, -1, 0))
    load = Compose([LoadImaged("image", PictureReader("BGR", 1)), EnsureChannelFirstd("image")])
    assert load({"image": tmp_path / "a.png"})["image"].shape == (1, 5, 7)
    Image.fromarray(COLOUR).save(tmp_path / "three.png")
    with pytest.raises(InputError, match=r"three\.png: has no fourth channel \(RGB\); .* in_channels is 4"):
        read_picture(tmp_path / "three.png", "RGBA")
    with pytest.raises(InputError, match="1, 3 or 4 channels, not in_channels 5"):
        PictureReader("RGB", 5)


@pytest.mark.parametrize("orientation", SHOWN)
def test_a_photograph_is_read_as_viewers_show_it(tmp_path: Path, orientation: int) -> None:
    path = photograph(tmp_path / "a.png", COLOUR, orientation)
    shown = SHOWN[orientation](COLOUR)
    np.testing.assert_array_equal(read_picture(path), shown)
    item = LoadImaged("image", PictureReader())({"image": path})
    assert item["image"].meta["exif_orientation"] == orientation
    assert tuple(item["image"].meta["spatial_shape"]) == shown.shape[:2]


def load_pair(image: Path, mask: Path) -> dict[str, Any]:
    pair: Any = {"image": image, "label": mask}
    for step in (LoadImaged("image", PictureReader()), LoadImaged("label", MaskReader())):
        pair = step(pair)
    pair = SameSized()(EnsureChannelFirstd(["image", "label"])(pair))
    return pair


def test_an_image_and_a_mask_of_different_size_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_said", set())
    mask = tmp_path / "a_mask.png"
    Image.fromarray((GREY > 127).astype(np.uint8)).save(mask)
    turned = photograph(tmp_path / "a.jpg", COLOUR, 6)
    what = r"a_mask\.png: 7×5 pixels, the image a\.jpg 5×7: it fits the stored .*EXIF.*\(6\)"
    with pytest.raises(InputError, match=what):
        load_pair(turned, mask)
    Image.fromarray(np.rot90((GREY > 127).astype(np.uint8), -1)).save(mask)
    assert load_pair(turned, mask)["label"].shape == (1, 7, 5)
    assert not caplog.records
    Image.fromarray(GREY[:4]).save(tmp_path / "small.png")
    with pytest.raises(InputError, match=r"small\.png: 7×4 pixels, the image a\.jpg 5×7; image and mask must"):
        check_sizes(turned, (7, 5), 6, tmp_path / "small.png", (4, 7))
    mirrored = photograph(tmp_path / "b.jpg", COLOUR, 3)
    Image.fromarray((GREY > 127).astype(np.uint8)).save(mask)
    for _ in range(2):
        load_pair(mirrored, mask)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "b.jpg: its EXIF orientation (3) turns or mirrors it" in record.getMessage()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(header: bytes, pixels: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def flipped(content: bytes) -> bytes:
    middle = content.index(b"IDAT") + 20
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def saved(**options: Any) -> Callable[[Path], None]:
    return lambda path: Image.fromarray(COLOUR).save(path, **options)


def cut() -> Callable[[Path], None]:
    def write(path: Path) -> None:
        Image.fromarray(RNG.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return write


FRAMES = [Image.fromarray(COLOUR), Image.fromarray(COLOUR[::-1])]
REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no picture": ("a.png", lambda path: path.write_bytes(b"no picture at all"), "damaged, or none of PNG, JPEG"),
    "PNG head only": ("a.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n no more"), "not a readable picture"),
    "empty": ("a.png", lambda path: path.write_bytes(b""), "is empty"),
    "cut PNG": ("a.png", cut(), r"not a readable picture \(it ends too early\)"),
    "cut JPEG": ("a.jpg", cut(), r"not a readable picture \(image file is truncated"),
    "cut TIFF": ("a.tif", cut(), "not a readable picture"),
    "cut WebP": ("a.webp", cut(), "not a readable picture"),
    "cut BMP": ("a.bmp", cut(), "not a readable picture"),
    "damage in the pixels": (
        "a.png",
        lambda path: (saved()(path), path.write_bytes(flipped(path.read_bytes()))),
        r"not a readable picture \(its checksum is wrong\)",
    ),
    "bomb": (
        "a.png",
        lambda path: path.write_bytes(png(struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0), b"\0" * 60001)),
        "its header claims 3600060000 bytes of pixels, it holds 60001",
    ),
    "folder": ("a.png", lambda path: path.mkdir(), "not a readable picture \\(Is a directory\\)"),
    "missing": ("a.png", lambda path: None, "no such file"),
    "dangling link": ("a.png", lambda path: path.symlink_to("nowhere.png"), "no such file"),
    "pages": ("a.tif", lambda path: FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:]), "holds 2 pictures"),
    "animated GIF": (
        "a.gif",
        lambda path: FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:]),
        "holds 2 pictures; save each in a file of its own",
    ),
    "animated PNG": ("a.png", lambda path: FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:]), "holds 2"),
    "animated WebP": ("a.webp", lambda path: FRAMES[0].save(path, save_all=True, append_images=FRAMES[1:]), "holds 2"),
    "float": (
        "a.tif",
        lambda path: Image.fromarray(GREY / np.float32(255)).save(path),
        "values from 0.* expected 8 or 16 bits",
    ),
    "NaN": ("a.tif", lambda path: Image.fromarray(np.full((3, 3), np.nan, np.float32)).save(path), "values from nan"),
    "negative": (
        "a.tif",
        lambda path: Image.fromarray(GREY.astype(np.int32) - 1000).save(path),
        "values from -.* without a sign",
    ),
    "12 bits for each colour": (
        "a.png",
        lambda path: path.write_bytes(
            png(
                struct.pack(">IIBBBBB", 7, 5, 16, 2, 0, 0, 0),
                b"".join(b"\0" + (row.astype(np.uint16) * 16).astype(">u2").tobytes() for row in COLOUR.reshape(5, 21)),
            )
        ),
        "16 bits for each colour, of which the highest 4 are used up to 15",
    ),
    "PostScript": ("a.png", lambda path: saved(format="EPS")(path), "none of PNG, JPEG"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_read_is_one_line(tmp_path: Path, kind: str) -> None:
    name, write, what = REFUSED[kind]
    write(tmp_path / name)
    # Masks may hold what images may not.
    readers = [PictureReader()] + [MaskReader()] * (kind not in ("float", "NaN", "negative", "12 bits for each colour"))
    for reader in readers:
        with pytest.raises(InputError, match=rf"{name}: .*{what}") as caught:
            LoadImaged("image", reader)({"image": tmp_path / name})
        assert "\n" not in str(caught.value)
        assert "0x" not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path: Path) -> None:
    saved()(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(InputError, match=r"a\.png: not a readable picture \(Permission denied\)"):
        read_picture(tmp_path / "a.png")


def test_printing_colours_are_turned_into_light_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_said", set())
    Image.new("CMYK", (3, 3), (255, 0, 0, 0)).save(tmp_path / "a.tif")
    assert read_picture(tmp_path / "a.tif")[0, 0].tolist() == [0, 255, 255]
    assert "CMYK" in caplog.text


def test_a_wrong_mode_and_several_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mode must be one of L, RGB, BGR, RGBA, BGRA, got 'CMYK'"):
        PictureReader("CMYK")
    with pytest.raises(InputError, match=r"expected one picture, got a\.png, b\.png"):
        PictureReader().get_data([Path("a.png"), Path("b.png")])


@pytest.mark.parametrize("name", ["a b", "#1", "50%", "a@b", "$x_1$", "été 図", "two\nlines", "'a'", "~home", "2018"])
def test_odd_names(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(COLOUR).save(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(read_picture(f"{name}.png"), COLOUR)
    with pytest.raises(InputError) as caught:
        read_picture(f"{name}.jpg")
    assert "\n" not in str(caught.value)


def interlaced(grey: np.ndarray, height: int) -> bytes:
    """A PNG of Adam7's seven passes that claims a height."""
    passes = [grey[y::down, x::across] for x, y, across, down in pictures.ADAM7]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    return png(struct.pack(">IIBBBBB", grey.shape[1], height, 8, 0, 0, 0, 1), rows)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 5), (16, 17)])
def test_interlaced_pictures_hold_what_they_claim(size: tuple[int, int], tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    file = tmp_path / "a.png"
    file.write_bytes(interlaced(grey, len(grey)))
    assert np.array_equal(read_picture(file, "L"), grey)
    for height in (len(grey) + 1, len(grey) - 1):
        file.write_bytes(interlaced(grey, height))
        with pytest.raises(InputError, match=r"a\.png: not a readable picture"):
            read_picture(file)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16"])
@pytest.mark.parametrize(("wider", "higher"), [(0, 1), (0, -1), (8, 0), (-8, 0)])
def test_a_png_that_claims_more_or_less_than_it_holds_is_refused(
    mode: str, wider: int, higher: int, tmp_path: Path
) -> None:
    picture = Image.fromarray(COLOUR).resize((37, 40))
    picture = picture.convert(mode) if mode != "I;16" else Image.fromarray(np.full((40, 37), 999, np.uint16))
    file = tmp_path / "a.png"
    picture.save(file)
    assert read_picture(file).shape == (40, 37, 3)
    content = file.read_bytes()
    header = struct.pack(">II", 37 + wider, 40 + higher) + content[24:29]
    file.write_bytes(content[:8] + chunk(b"IHDR", header) + content[33:])
    with pytest.raises(InputError, match=r"its header claims \d+ bytes of pixels, it holds (more|\d+)"):
        read_picture(file)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_claims_far_more_than_it_holds_is_refused(progressive: bool, tmp_path: Path) -> None:
    # one grey is as small as a JPEG gets
    for number, colour in enumerate(((0, 0, 0), (120, 130, 140))):
        good = tmp_path / f"good{number}.jpg"
        Image.new("RGB", (2000, 3000), colour).save(good, progressive=progressive, optimize=True, quality=1)
        assert read_picture(good).shape == (3000, 2000, 3)
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "bad.jpg", progressive=progressive)
    content = bytearray((tmp_path / "bad.jpg").read_bytes())
    frame = content.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    content[frame + 5 : frame + 9] = (9000).to_bytes(2, "big") * 2
    (tmp_path / "bad.jpg").write_bytes(content)
    with pytest.raises(InputError, match=r"bad\.jpg: .* claims 9000 × 9000 pixels, it holds fewer"):
        read_picture(tmp_path / "bad.jpg")
