import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image

from evaluation.overlay import COLOURS, Panel, choose_slices, save_overview, save_panels, thumbnail

CLASSES = ["liver", "spleen"]


def volume() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Liver on the slices 2 to 7, spleen on 5 and 6."""
    label = np.zeros((9, 40, 60), np.uint8)
    label[2:8, 8:24, 6:30] = 1
    label[5:7, 10:20, 40:52] = 2
    return np.random.default_rng(0).random(label.shape).astype(np.float32), label


def pixels(path: Path) -> NDArray[Any]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def where(picture: NDArray[Any], colour: str) -> NDArray[np.intp]:
    """Row and column of the pixels that are nearly of a colour."""
    return np.argwhere(np.abs(picture - 255 * np.array(to_rgb(colour))).max(-1) < 12)


def count(picture: NDArray[Any], colour: str) -> int:
    return len(where(picture, colour))


def test_slices_with_most_classes_are_chosen() -> None:
    _, label = volume()
    assert choose_slices(label, 1) == [5]
    assert choose_slices(label, 3) == [2, 5, 6]
    assert choose_slices(label, 99) == [2, 3, 4, 5, 6, 7]
    assert len(choose_slices(np.zeros_like(label), 3)) == 3
    label[6, 30:] = 1  # area decides between slices of as many classes
    assert choose_slices(label, 1) == [6]


def test_predicted_and_true_outlines_are_drawn(tmp_path: Path) -> None:
    image, label = volume()
    black = np.zeros_like(image)
    save_overview(tmp_path / "both.png", black, np.roll(label, 3, 2), label, CLASSES)
    save_overview(tmp_path / "predicted.png", black, np.roll(label, 3, 2), None, CLASSES)
    save_overview(tmp_path / "nothing.png", black, np.zeros_like(label), None, CLASSES)
    both, predicted, nothing = (pixels(tmp_path / f"{name}.png") for name in ("both", "predicted", "nothing"))
    for colour in COLOURS[:2]:
        assert count(both, colour) > 200
        assert count(predicted, colour) > 200
        assert count(nothing, colour) == 0
    assert count(both, "white") > count(predicted, "white") + 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "nothing.png", "predicted.png"]


def test_proportions_are_those_of_the_body(tmp_path: Path) -> None:
    image, label = volume()
    sizes = {}
    for name, spacing in (("square", (5, 1, 1)), ("tall", (5, 2, 1))):
        save_overview(tmp_path / name, image, label, None, CLASSES, spacing_mm=spacing, slices=1)
        coloured = where(pixels(tmp_path / name), COLOURS[1])
        spleen = coloured[coloured[:, 0] < 500]  # the legend is below
        sizes[name] = np.ptp(spleen, axis=0)
    assert sizes["square"][0] / sizes["square"][1] == pytest.approx(10 / 12, rel=0.05)
    assert sizes["tall"][0] / sizes["tall"][1] == pytest.approx(20 / 12, rel=0.05)


@pytest.mark.parametrize("shape", [(30, 40), (1, 30, 40), (3, 30, 40)])
def test_single_images(tmp_path: Path, shape: tuple[int, ...]) -> None:
    mask = torch.zeros(1, 30, 40, dtype=torch.uint8)
    mask[0, 5:20, 8:25] = 1
    save_overview(tmp_path / "image.png", torch.randn(shape), mask, mask.roll(2, 1), ["lesion"], title="an image")
    assert count(pixels(tmp_path / "image.png"), COLOURS[0]) > 200


@pytest.mark.parametrize(
    ("image", "prediction"), [((4, 8, 8), (5, 8, 8)), ((3, 8, 8), (8, 9)), ((2, 4, 8, 8), (4, 8, 8)), ((8,), (8,))]
)
def test_what_does_not_belong_together_is_refused(
    tmp_path: Path, image: tuple[int, ...], prediction: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="do not belong together"):
        save_overview(tmp_path / "x.png", np.zeros(image), np.zeros(prediction), None, CLASSES)
    with pytest.raises(ValueError, match="class 3 is in the maps, but only 2"):
        save_overview(tmp_path / "x.png", np.zeros((8, 8)), np.full((8, 8), 3), None, CLASSES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["$x_1$", "$a", "50% #1", "two\nlines", "\\frac"])
def test_names_are_no_formulas(tmp_path: Path, name: str) -> None:
    mask = np.eye(8, dtype=int)
    save_overview(tmp_path / "a.png", np.zeros((8, 8)), mask, mask, [name], title=name)
    save_panels(tmp_path / "b.png", [Panel(np.zeros((4, 8, 8)), mask, mask, name)], [name], name)
    assert count(pixels(tmp_path / "b.png"), COLOURS[0]) > 0


def drawn(picture: bytes) -> NDArray[Any]:
    with Image.open(io.BytesIO(picture)) as opened:
        return np.asarray(opened.convert("RGB")).astype(int)


def test_a_thumbnail_shows_the_slice_with_most_wrong_voxels() -> None:
    image, label = volume()
    prediction = label.copy()
    image[:] = 0
    image[7] = 1
    prediction[7] = 0  # the liver is missed there
    found = drawn(thumbnail(image, prediction, label))
    # bright, and nothing is predicted
    assert np.median(found) > 200
    assert drawn(thumbnail(image, label, label)).mean() < 60
    sizes = [drawn(thumbnail(image, label, label, spacing)).shape[:2] for spacing in ((1, 1, 1), (1, 2, 1))]
    ratios = [height / width for height, width in sizes]
    assert ratios[1] == pytest.approx(2 * ratios[0], rel=0.02)
    assert max(map(max, sizes)) == 256


@pytest.mark.parametrize("image", [(30, 40), (1, 30, 40), (3, 30, 40), (4, 30, 40), None])
def test_thumbnails_of_pictures(image: tuple[int, ...] | None) -> None:
    mask = np.zeros((30, 40), np.uint8)
    mask[5:20, 8:25] = 1
    found = drawn(thumbnail(None if image is None else np.zeros(image), np.roll(mask, 4, 1), mask))
    # without an image there is nothing to see but the marked part and its margin: 23 × 29 of 30 × 40
    assert found.shape == ((203, 256, 3) if image is None else (192, 256, 3))
    assert (found.min(-1) > 200).any()  # the label, white
    assert ((found[..., 0] > 180) & (found[..., 2] < 120)).any()  # the prediction, red
    assert len(thumbnail(None, mask[None], mask[None])) == len(thumbnail(None, mask, mask))
