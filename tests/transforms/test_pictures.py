from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, NormalizeIntensityd, Resize, ScaleIntensity
from PIL import Image

from transforms import PictureReader, read_picture

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
    palette = Image.fromarray(GREY)
    palette = palette.convert("P")
    forms = {
        "grey": Image.fromarray(GREY),
        "rgb": Image.fromarray(np.stack([GREY] * 3, axis=-1)),
        "rgba": opaque,
        "la": Image.fromarray(GREY).convert("LA"),
        "palette": palette,
        "sixteen": Image.fromarray(GREY.astype(np.uint16) * 257),
    }
    for name, picture in forms.items():
        picture.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read_picture(tmp_path / f"{name}.png", "L"), GREY, err_msg=name)
        np.testing.assert_array_equal(read_picture(tmp_path / f"{name}.png"), np.stack([GREY] * 3, -1), err_msg=name)


def test_ids_are_the_stored_numbers(tmp_path: Path) -> None:
    ids = GREY % 4
    palette = Image.fromarray(ids)
    palette.putpalette([200, 10, 10, 0, 255, 0, 3, 4, 5, 90, 90, 90])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "palette.png", "ids"), ids)
    Image.fromarray(ids > 0).save(tmp_path / "binary.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "binary.png", "ids"), ids > 0)
    Image.fromarray(COLOUR).save(tmp_path / "colour.png")
    with pytest.raises(ValueError, match=r"colour\.png.*RGB"):
        read_picture(tmp_path / "colour.png", "ids")


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no more")
    Image.fromarray(np.full((4, 4), 0.5, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"broken\.png"):
        read_picture(tmp_path / "broken.png")
    with pytest.raises(ValueError, match=r"float\.tif"):
        read_picture(tmp_path / "float.tif")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        LoadImaged("image", reader=PictureReader())({"image": tmp_path / "none.png"})
    with pytest.raises(ValueError, match="mode"):
        PictureReader("CMYK")
    with pytest.raises(ValueError, match=r"a\.nii"):
        PictureReader().read(tmp_path / "a.nii")


def test_published_ultrasound_input_with_monais_transforms(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.png")
    mean, sd = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    chain = Compose(
        [
            LoadImaged("image", reader=PictureReader("BGR")),
            EnsureChannelFirstd("image"),
            NormalizeIntensityd(
                "image", subtrahend=[255 * m for m in mean], divisor=[255 * 255 * s for s in sd], channel_wise=True
            ),
        ]
    )
    out = chain({"image": tmp_path / "a.png"})["image"]
    expected = ((COLOUR[..., ::-1] / 255 - mean) / sd / 255).transpose(2, 0, 1)
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-7)
    assert out.shape == (3, 5, 7)


def test_published_dermoscopy_input_with_monais_transforms() -> None:
    image = torch.from_numpy(COLOUR.transpose(2, 0, 1).astype(np.float32) / 2 + 40)
    normalised = (image - 157.561) / 26.706
    expected = (normalised - normalised.min()) / (normalised.max() - normalised.min()) * 255
    torch.testing.assert_close(ScaleIntensity(0, 255)(image).as_tensor(), expected, rtol=0, atol=1e-3)


def opencv_linear(x: np.ndarray, size: int) -> np.ndarray:
    """cv2.INTER_LINEAR of the last axis by its definition: half-pixel centres, edge samples repeated."""
    at = (np.arange(size) + 0.5) * x.shape[-1] / size - 0.5
    low = np.floor(at).astype(int)
    fraction = at - low
    last = x.shape[-1] - 1
    return x[..., low.clip(0, last)] * (1 - fraction) + x[..., (low + 1).clip(0, last)] * fraction


@pytest.mark.parametrize(("source", "target"), [((61, 47), (32, 32)), ((20, 31), (64, 64)), ((471, 562), (256, 256))])
def test_monais_resize_is_opencvs(source: tuple[int, int], target: tuple[int, int]) -> None:
    x = RNG.random((1, *source), dtype=np.float32)
    linear = Resize(target, mode="bilinear", align_corners=False)(torch.from_numpy(x))
    expected = opencv_linear(opencv_linear(x, target[1]).swapaxes(1, 2), target[0]).swapaxes(1, 2)
    np.testing.assert_allclose(linear, expected, rtol=0, atol=1e-5)
    rows, columns = (np.arange(new) * old // new for new, old in zip(target, source, strict=True))
    np.testing.assert_array_equal(Resize(target, mode="nearest")(torch.from_numpy(x)), x[:, rows[:, None], columns])
