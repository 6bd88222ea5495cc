import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from evaluation.overlay import COLOURS, choose_slices, save_overview

ORGANS = ["liver", "spleen"]


def volume(depth=9):
    """Liver on the slices 2 to 7, spleen on 5 and 6."""
    label = np.zeros((depth, 40, 60), np.uint8)
    label[2:8, 8:24, 6:30] = 1
    label[5:7, 10:20, 40:52] = 2
    return np.random.default_rng(0).random(label.shape).astype(np.float32), label


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def count(picture, colour, tolerance=12):
    """Pixels that are nearly of a colour."""
    return int((np.abs(picture - 255 * np.array(to_rgb(colour))).max(-1) < tolerance).sum())


def test_slices_with_most_classes_are_chosen():
    _, label = volume()
    assert choose_slices(label, 1) == [5]
    assert choose_slices(label, 3) == [2, 5, 6]
    assert choose_slices(label, 99) == [2, 3, 4, 5, 6, 7]
    assert len(choose_slices(np.zeros_like(label), 3)) == 3


def test_area_decides_between_slices_of_as_many_classes():
    label = np.zeros((5, 8, 8), np.uint8)
    label[1:4, 2:4, 2:4] = 1
    label[2, 2:6, 2:6] = 1
    assert choose_slices(label, 1) == [2]


def test_predicted_and_true_outlines_are_drawn(tmp_path):
    image, label = volume()
    black = np.zeros_like(image)
    save_overview(tmp_path / "both.png", black, np.roll(label, 3, 2), label, ORGANS)
    save_overview(tmp_path / "predicted.png", black, np.roll(label, 3, 2), None, ORGANS)
    save_overview(tmp_path / "nothing.png", black, np.zeros_like(label), None, ORGANS)
    both, predicted, nothing = (pixels(tmp_path / f"{name}.png") for name in ("both", "predicted", "nothing"))
    for colour in COLOURS[:2]:
        assert count(both, colour) > 200
        assert count(predicted, colour) > 200
        assert count(nothing, colour) == 0
    assert count(both, "white") > count(predicted, "white") + 200
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both.png", "nothing.png", "predicted.png"]


def test_proportions_are_those_of_the_body(tmp_path):
    image, label = volume()
    sizes = {}
    for name, spacing in (("square", (5, 1, 1)), ("tall", (5, 2, 1))):
        save_overview(tmp_path / name, image, label, None, ORGANS, spacing_mm=spacing, slices=1)
        coloured = np.argwhere(np.abs(pixels(tmp_path / name) - 255 * np.array(to_rgb(COLOURS[1]))).max(-1) < 12)
        spleen = coloured[coloured[:, 0] < 500]  # the legend is below
        sizes[name] = np.ptp(spleen, axis=0)
    assert sizes["square"][0] / sizes["square"][1] == pytest.approx(10 / 12, rel=0.05)
    assert sizes["tall"][0] / sizes["tall"][1] == pytest.approx(20 / 12, rel=0.05)


@pytest.mark.parametrize("shape", [(30, 40), (1, 30, 40), (3, 30, 40)])
def test_single_images(tmp_path, shape):
    mask = torch.zeros(1, 30, 40, dtype=torch.uint8)
    mask[0, 5:20, 8:25] = 1
    save_overview(tmp_path / "image.png", torch.randn(shape), mask, mask.roll(2, 1), ["lesion"], title="an image")
    assert count(pixels(tmp_path / "image.png"), COLOURS[0]) > 200


@pytest.mark.parametrize(
    ("image", "prediction"), [((4, 8, 8), (5, 8, 8)), ((3, 8, 8), (8, 9)), ((2, 4, 8, 8), (4, 8, 8)), ((8,), (8,))]
)
def test_what_does_not_belong_together_is_refused(tmp_path, image, prediction):
    with pytest.raises(ValueError, match="do not belong together"):
        save_overview(tmp_path / "x.png", np.zeros(image), np.zeros(prediction), None, ORGANS)
    with pytest.raises(ValueError, match="class 3 is in the maps, but only 2"):
        save_overview(tmp_path / "x.png", np.zeros((8, 8)), np.full((8, 8), 3), None, ORGANS)
    assert not list(tmp_path.iterdir())
