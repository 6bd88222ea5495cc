from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from monai.transforms import LoadImaged
from PIL import Image

from transforms import MaskReader, read_mask

DRAWN = np.array([[0, 1, 1, 0], [0, 0, 1, 0], [1, 0, 0, 0]], np.uint8)


def saved(folder: Path, picture: Image.Image | np.ndarray, name: str = "mask.png") -> Path:
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(folder / name)
    return folder / name


def test_one_class_whatever_the_picture_stores(tmp_path: Path) -> None:
    forms = {
        "grey": Image.fromarray(255 * DRAWN),
        "RGB": Image.fromarray(255 * DRAWN).convert("RGB"),
        "bilevel": Image.fromarray(255 * DRAWN).convert("1"),
        "zero and one": Image.fromarray(DRAWN),
        "not quite 0 and 255": Image.fromarray(3 + 247 * DRAWN),
        "16 bits": Image.fromarray(65535 * DRAWN.astype(np.uint16)),
        "empty": Image.fromarray(0 * DRAWN),
    }
    for name, picture in forms.items():
        classes, meta = MaskReader().get_data([saved(tmp_path, picture)])
        np.testing.assert_array_equal(classes, 0 * DRAWN if name == "empty" else DRAWN, err_msg=name)
        assert classes.dtype == np.uint8
        assert list(meta["spatial_shape"]) == [3, 4]


def test_half_of_the_range_is_the_border(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    classes = read_mask(saved(tmp_path, ramp))
    np.testing.assert_array_equal(classes.ravel(), np.arange(256) >= 128)


@given(st.dictionaries(st.integers(0, 255), st.integers(0, 5), min_size=1, max_size=8), st.integers(0, 99))
def test_several_classes_by_their_stored_numbers(
    tmp_path_factory: pytest.TempPathFactory, label_map: dict[int, int], seed: int
) -> None:
    stored = np.random.default_rng(seed).choice(np.array(list(label_map), np.uint8), (6, 5))
    classes = read_mask(saved(tmp_path_factory.mktemp("mask"), stored), label_map)
    assert classes.tolist() == [[label_map[number] for number in row] for row in stored.tolist()]


def test_a_palettes_indices_are_mapped_not_its_colours(tmp_path: Path) -> None:
    picture = Image.fromarray(DRAWN)
    picture.putpalette([9, 9, 9, 200, 0, 0])
    np.testing.assert_array_equal(read_mask(saved(tmp_path, picture), {0: 0, 1: 3}), 3 * DRAWN)


def test_numbers_without_a_class_are_named_with_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, 85 * DRAWN)
    with pytest.raises(ValueError, match=r"mask\.png: holds 85, which label_map \{0: 0, 170: 1\} does not list"):
        LoadImaged("label", reader=MaskReader({0: 0, 170: 1}))({"label": path})
    with pytest.raises(ValueError, match=r"rgb\.png: holds RGB pixels, expected one whole number for each"):
        read_mask(saved(tmp_path, Image.new("RGB", (3, 3), "red"), "rgb.png"), {0: 0})
