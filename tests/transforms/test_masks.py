from __future__ import annotations

import logging
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import LoadImaged
from PIL import Image
from scipy import ndimage

from transforms import InputError, MaskReader, merged_masks, pictures, read_mask

DRAWN = np.array([[0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]], np.uint8)
# An area, large enough for compression and for edges.
AREA = np.zeros((48, 64), np.uint8)
AREA[10:30, 12:44] = 1
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0]


def saved(folder: Path, picture: Image.Image | np.ndarray, name: str = "mask.png", **options: Any) -> Path:
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    picture.save(folder / name, **options)
    return folder / name


def palette(indices: np.ndarray, colours: list[int]) -> Image.Image:
    picture = Image.fromarray(indices)
    picture.putpalette(colours)
    return picture


def coloured(foreground: tuple[int, ...], background: tuple[int, ...]) -> Image.Image:
    return Image.fromarray(np.where(DRAWN[..., None] == 1, foreground, background).astype(np.uint8))


TWO_VALUES = {
    "0 and 255": 255 * DRAWN,
    "RGB": Image.fromarray(255 * DRAWN).convert("RGB"),
    "1 bit": Image.fromarray(255 * DRAWN).convert("1"),
    "0 and 1": DRAWN,
    "0 and 2": 2 * DRAWN,
    "0 and 100": 100 * DRAWN,
    "0 and 127": 127 * DRAWN,
    "not quite 0 and 255": 3 + 247 * DRAWN,
    "16 bits, 0 and 65535": 65535 * DRAWN.astype(np.uint16),
    "16 bits, 0 and 1": DRAWN.astype(np.uint16),
    "16 bits, 0 and 300": 300 * DRAWN.astype(np.uint16),
    "palette of VOC": palette(DRAWN, VOC),
    "palette, white and red": palette(DRAWN, [255, 255, 255, 255, 0, 0]),
    "palette, black last": palette(1 - DRAWN, [255, 255, 255, 0, 0, 0]),
    "palette, equal colours": palette(DRAWN, [9, 9, 9, 9, 9, 9]),
    "palette, index 0 unused": palette(1 + DRAWN, [7, 7, 7, 0, 0, 0, 128, 0, 0]),
    "colour of VOC": coloured((128, 0, 0), (0, 0, 0)),
    "red": coloured((255, 0, 0), (0, 0, 0)),
    "blue": coloured((0, 0, 255), (0, 0, 0)),
    "dark blue": coloured((0, 0, 40), (0, 0, 0)),
    "red on white": coloured((255, 0, 0), (255, 255, 255)),
    "black on red": coloured((255, 0, 0), (0, 0, 0)),
    "black, drawn in the alpha channel": coloured((0, 0, 0, 255), (0, 0, 0, 0)),
    "black on transparent white": coloured((0, 0, 0, 255), (255, 255, 255, 0)),
    "white, drawn in the alpha channel": coloured((255, 255, 255, 255), (255, 255, 255, 0)),
    "red on transparent": coloured((255, 0, 0, 255), (255, 255, 255, 0)),
    "white on black, alpha everywhere alike": coloured((255, 255, 255, 7), (0, 0, 0, 7)),
    "white on black, transparent everywhere": coloured((255, 255, 255, 0), (0, 0, 0, 0)),
    "LA": Image.fromarray(255 * DRAWN).convert("LA"),
    "LA, drawn in the alpha channel": Image.merge("LA", [Image.new("L", (4, 3)), Image.fromarray(255 * DRAWN)]),
}


@pytest.mark.parametrize("form", TWO_VALUES)
def test_of_two_values_the_one_that_is_not_background_is_the_class(tmp_path: Path, form: str) -> None:
    classes, meta = MaskReader().get_data([saved(tmp_path, TWO_VALUES[form])])
    np.testing.assert_array_equal(classes, DRAWN)
    assert classes.dtype == np.uint8
    assert list(meta["spatial_shape"]) == [3, 4]


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint16])
@pytest.mark.parametrize("number", [1, 200, 20000])
def test_two_values_of_a_tiff(tmp_path: Path, dtype: Any, number: int) -> None:
    np.testing.assert_array_equal(read_mask(saved(tmp_path, number * DRAWN.astype(dtype), "m.tif")), DRAWN)


def test_the_number_0_is_background_beside_a_negative_one(tmp_path: Path) -> None:
    np.testing.assert_array_equal(read_mask(saved(tmp_path, -1 * DRAWN.astype(np.int32), "m.tif")), DRAWN)


@pytest.mark.parametrize(
    ("picture", "what"),
    [
        (1 + DRAWN, "of the values 1 and 2 the lower one is taken for the background"),
        (coloured((255, 0, 0), (255, 255, 255)), r"\(255, 255, 255\) and \(255, 0, 0\) the former is taken"),
        (coloured((255, 255, 0), (0, 0, 255)), r"\(0, 0, 255\) and \(255, 255, 0\) the former is taken"),
    ],
)
def test_a_guess_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, picture: Any, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pictures, "_said", set())
    for _ in range(2):
        np.testing.assert_array_equal(read_mask(saved(tmp_path, picture)), DRAWN)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(what, record.getMessage())


@pytest.mark.parametrize(
    ("value", "marked"),
    [(0, 0), (1, 1), (255, 1), ((0, 0, 0), 0), ((128, 0, 0), 1), ((0, 0, 0, 0), 0), ((0, 0, 0, 255), 0)],
)
def test_one_value_marks_nothing_or_everything(tmp_path: Path, value: Any, marked: int) -> None:
    mode = "L" if isinstance(value, int) else "RGBA"[: len(value)]
    np.testing.assert_array_equal(read_mask(saved(tmp_path, Image.new(mode, (4, 3), value))), np.full((3, 4), marked))
    assert not read_mask(saved(tmp_path, palette(0 * DRAWN, [200, 0, 0]))).any()
    assert read_mask(saved(tmp_path, palette(0 * DRAWN + 1, VOC))).all()


def soft(scale: float = 255.0) -> np.ndarray:
    return np.asarray(scale * ndimage.gaussian_filter(AREA.astype(float), 1.2)).round().astype(np.uint8)


@pytest.mark.parametrize("colour", ["grey", "red", "alpha", "16 bits", "float"])
def test_an_antialiased_mask_is_cut_at_half_of_the_range(tmp_path: Path, colour: str) -> None:
    grey = soft()
    nothing = np.zeros_like(grey)
    forms: dict[str, Any] = {
        "grey": grey,
        "red": np.dstack([grey, nothing, nothing]),
        "alpha": np.dstack([nothing, nothing, nothing, grey]),
        "16 bits": grey.astype(np.uint16) * 257,
        "float": grey.astype(np.float32) / 255,
    }
    path = saved(tmp_path, forms[colour], "m.tif" if colour == "float" else "m.png")
    np.testing.assert_array_equal(read_mask(path), grey > 127)


@pytest.mark.parametrize("quality", [30, 75, 95])
@pytest.mark.parametrize("mode", ["L", "RGB", "red"])
def test_a_jpeg_mask_is_cut_at_half_of_the_range(tmp_path: Path, quality: int, mode: str) -> None:
    picture = Image.fromarray(255 * AREA)
    if mode == "red":
        picture = Image.merge("RGB", [picture, Image.new("L", picture.size), Image.new("L", picture.size)])
    elif mode == "RGB":
        picture = picture.convert("RGB")
    path = saved(tmp_path, picture, "m.jpg", quality=quality)
    assert (read_mask(path) != AREA).mean() < 0.01
    again = saved(tmp_path, Image.open(path), "from_jpeg.png")
    np.testing.assert_array_equal(read_mask(again), read_mask(path))
    assert not read_mask(saved(tmp_path, 0 * AREA, "empty.jpg")).any()
    assert read_mask(saved(tmp_path, 0 * AREA + 255, "full.jpg", quality=quality)).all()


def test_half_of_the_range_is_the_border(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(read_mask(saved(tmp_path, ramp)).ravel(), np.arange(256) >= 128)


LABELS = AREA.copy()
LABELS[14:20, 20:30] = 2


@pytest.mark.parametrize(
    ("numbers", "what"),
    [
        ((0, 1, 2), "holds the values 0, 1, 2: more than"),
        ((0, 85, 170), "holds the values 0, 85, 170: more than"),
        ((0, 128, 255), "holds the values 0, 128, 255: more than"),
        ((0, 1, 255), "holds the values 0, 1, 255: more than"),
        ((0, 254, 255), "holds the values 0, 254, 255: more than"),
    ],
)
def test_more_values_need_a_label_map(tmp_path: Path, numbers: tuple[int, ...], what: str) -> None:
    stored = np.array(numbers, np.uint8)[LABELS]
    forms = [stored, palette(stored, [n for i in range(256) for n in (i, i, i)]), stored.astype(np.uint16)]
    if numbers[1] > 100:
        forms.append(np.dstack([stored] * 3))
    for form in forms:
        with pytest.raises(InputError, match=rf"mask\.png: {what} background and one class; say with --label_map"):
            read_mask(saved(tmp_path, form))
        if not isinstance(form, np.ndarray) or form.ndim == 2:
            label_map = {number: index for index, number in enumerate(numbers)}
            np.testing.assert_array_equal(read_mask(saved(tmp_path, form), label_map), LABELS)


def test_more_colours_need_numbers(tmp_path: Path) -> None:
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)[LABELS]
    for name in ("m.png", "m.jpg"):
        with pytest.raises(InputError, match=rf"{name}: holds the colours \(0, 0, 0\), .*more than background"):
            read_mask(saved(tmp_path, colours, name))
    with pytest.raises(InputError, match="more than background and one class"):
        read_mask(saved(tmp_path, palette(LABELS, VOC)))
    with pytest.raises(InputError, match="more than background and one class"):
        read_mask(saved(tmp_path, np.array([0, 128, 255], np.uint8)[LABELS], "m.jpg"))
    with pytest.raises(InputError, match="more than background and one class"):
        read_mask(saved(tmp_path, 100 * AREA, "m.jpg"))


def test_several_classes_are_the_stored_numbers_as_they_are(tmp_path: Path) -> None:
    forms: dict[str, Any] = {
        "L": LABELS,
        "16 bits": LABELS.astype(np.uint16),
        "RGB": np.dstack([LABELS] * 3),
        "P": palette(LABELS, VOC),
        "RGBA": np.dstack([LABELS] * 3 + [0 * LABELS + 255]),
        "LA": Image.fromarray(LABELS).convert("LA"),
    }
    for name, form in forms.items():
        np.testing.assert_array_equal(read_mask(saved(tmp_path, form), classes=2), LABELS, err_msg=name)
        assert MaskReader(classes=2).get_data([tmp_path / "mask.png"])[0].max() == 2
    for dtype in (np.int32, np.float32):
        np.testing.assert_array_equal(read_mask(saved(tmp_path, LABELS.astype(dtype), "m.tif"), classes=2), LABELS)
    with pytest.raises(
        InputError, match=r"mask\.png: holds 3, 4, which --label_map \{0: 0, 1: 1, 2: 2\} does not list"
    ):
        read_mask(saved(tmp_path, LABELS + (LABELS > 0) * np.uint8(2)), classes=2)
    with pytest.raises(InputError, match=r"m\.tif: holds 0, 0\.5, 1, expected whole numbers"):
        read_mask(saved(tmp_path, LABELS / np.float32(2), "m.tif"), classes=2)


@given(st.dictionaries(st.integers(0, 255), st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 99))
def test_several_classes_by_their_stored_numbers(
    tmp_path_factory: pytest.TempPathFactory, label_map: dict[int, int], seed: int
) -> None:
    stored = np.random.default_rng(seed).choice(np.array(list(label_map), np.uint8), (6, 5))
    classes = read_mask(saved(tmp_path_factory.mktemp("mask"), stored), label_map)
    assert classes.tolist() == [[label_map[number] for number in row] for row in stored.tolist()]


def test_a_palettes_indices_are_mapped_not_its_colours(tmp_path: Path) -> None:
    path = saved(tmp_path, palette(DRAWN, [9, 9, 9, 200, 0, 0]))
    np.testing.assert_array_equal(read_mask(path, {0: 0, 1: 3}), 3 * DRAWN)


def test_numbers_without_a_class_are_named_with_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, 85 * DRAWN)
    with pytest.raises(InputError, match=r"mask\.png: holds 85, which --label_map \{0: 0, 170: 1\} does not list; say"):
        LoadImaged("label", reader=MaskReader({0: 0, 170: 1}))({"label": path})
    with pytest.raises(InputError, match=r"rgb\.png: holds RGB pixels, expected one whole number for each"):
        read_mask(saved(tmp_path, Image.new("RGB", (3, 3), "red"), "rgb.png"), {0: 0})
    with pytest.raises(InputError, match=r"m\.tif: holds values that are not finite"):
        read_mask(saved(tmp_path, np.full((3, 3), np.nan, np.float32), "m.tif"))


def test_the_masks_of_an_image_are_merged(tmp_path: Path) -> None:
    one, two = saved(tmp_path, 255 * DRAWN, "a_mask.png"), saved(tmp_path, 2 * DRAWN[::-1], "a_mask_1.png")
    item = LoadImaged("label", reader=MaskReader())({"label": [str(one), str(two)]})
    np.testing.assert_array_equal(item["label"], DRAWN | DRAWN[::-1])
    assert item["label"].meta["filename_or_obj"] == str(one)
    with pytest.raises(InputError, match=r"a_mask_1\.png: 4×2 pixels, but .*a_mask\.png 4×3"):
        merged_masks([one, saved(tmp_path, DRAWN[1:], "a_mask_1.png")])
    both = [saved(tmp_path, number * DRAWN, f"b_mask_{number}.png") for number in (1, 2)]
    with pytest.raises(InputError, match=r"b_mask_2\.png: gives pixels another class than .*b_mask_1\.png"):
        merged_masks(both, classes=2)


@pytest.mark.parametrize("suffix", ["gif", "webp", "bmp", "tif"])
def test_masks_of_other_formats(tmp_path: Path, suffix: str) -> None:
    options = {"lossless": True} if suffix == "webp" else {}
    np.testing.assert_array_equal(read_mask(saved(tmp_path, 255 * DRAWN, f"m.{suffix}", **options)), DRAWN)


def test_a_mask_is_turned_as_viewers_show_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = saved(tmp_path, 255 * DRAWN, "m.png", exif=exif)
    np.testing.assert_array_equal(read_mask(turned), np.rot90(DRAWN, -1))
    buffer = BytesIO()
    Image.fromarray(255 * AREA).save(buffer, "JPEG", exif=exif)
    (tmp_path / "m.jpg").write_bytes(buffer.getvalue())
    np.testing.assert_array_equal(read_mask(tmp_path / "m.jpg"), np.rot90(AREA, -1))
