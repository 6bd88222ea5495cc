from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from monai.transforms import LoadImaged
from PIL import Image

from transforms import InputError, PictureReader, read_picture

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_colour_and_its_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(COLOUR).save(path)
    np.testing.assert_array_equal(read_picture(path), COLOUR)
    np.testing.assert_array_equal(read_picture(path, "BGR"), COLOUR[..., ::-1])


def test_every_form_of_grey_becomes_the_same(tmp_path: Path) -> None:
    opaque = Image.fromarray(GREY).convert("RGBA")
    opaque.putalpha(Image.fromarray(255 - GREY))
    forms = {
        "grey": Image.fromarray(GREY),
        "rgb": Image.fromarray(np.stack([GREY] * 3, axis=-1)),
        "rgba": opaque,
        "la": Image.fromarray(GREY).convert("LA"),
        "palette": Image.fromarray(GREY).convert("P"),
        "sixteen": Image.fromarray(GREY.astype(np.uint16) * 257),
    }
    for name, picture in forms.items():
        picture.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_picture(tmp_path / f"{name}.png", "L"), GREY, err_msg=name)
        np.testing.assert_array_equal(read_picture(tmp_path / f"{name}.png"), np.stack([GREY] * 3, -1), err_msg=name)


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"broken\.png"):
        read_picture(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"float\.tif"):
        read_picture(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"none\.png: no such file"):
        LoadImaged("image", reader=PictureReader())({"image": tmp_path / "none.png"})
    with pytest.raises(ValueError, match="mode"):
        PictureReader("CMYK")
    (tmp_path / "a.nii").write_bytes(b"x")
    with pytest.raises(InputError, match=r"a\.nii: not a readable picture"):
        LoadImaged("image", reader=PictureReader())({"image": tmp_path / "a.nii"})
