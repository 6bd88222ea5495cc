"""Each bundle's recipe, input, augmentation and loss as they were published, taken from its configuration."""

import json
import math
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.transforms import Compose
from PIL import Image
from torch import Tensor

from tests.bundles.conftest import TINY, parsed
from tests.bundles.test_learning_curves import Loss, binary, multi_class
from tests.golden import fill

RGB_MEAN, RGB_SD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SIZES = [(57, 80), (20, 31)]
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/losses_and_metrics.json").read_text())


@pytest.mark.parametrize(
    ("bundle", "published"),
    [
        ("cmunext_busi", {"image_size": 256, "batch_size": 8, "learning_rate": 1e-2, "seed": 41}),
        ("vmunet_isic", {"image_size": 256, "batch_size": 32, "learning_rate": 1e-3, "seed": 42}),
        ("vmunet_synapse", {"image_size": 224, "batch_size": 32, "learning_rate": 1e-3, "seed": 42}),
    ],
)
def test_published_numbers(bundle: str, published: dict[str, float]) -> None:
    parser = parsed(bundle)
    published |= {"max_epochs": 300, "early_stop": 0}
    assert {key: parser[key] for key in published} == published
    # the schedule steps after each step of CMUNeXt's training, after each epoch of VM-UNet's
    schedule = next(one for one in parser["train#handlers"] if one["_target_"] == "LrScheduleHandler")
    assert schedule["epoch_level"] == (bundle != "cmunext_busi")
    assert parser["network_def"].keys() == {"_target_", "in_channels", "out_channels"}
    assert parser["network_def#_target_"] == ("networks.cmunext" if bundle == "cmunext_busi" else "networks.VMUNet")


@pytest.mark.parametrize(("bundle", "period"), [("vmunet_isic", 50), ("vmunet_synapse", 100)])
def test_published_schedule_of_vmunet_over_two_periods(bundle: str, period: int) -> None:
    parser = parsed(bundle, network_def=TINY["VMUNet"])
    optimizer, scheduler = (parser.get_parsed_content(name) for name in ("optimizer", "lr_scheduler"))
    for epoch in range(2 * period):
        expected = 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / period)) / 2
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9)
        optimizer.step()
        scheduler.step()


def golden_binary() -> tuple[Tensor, Tensor]:
    logits, target = (fill._noise(name, (3, 1, 40, 56), 0) for name in ("binary_logits", "binary_target"))
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(target > 0.8, dtype=torch.float32)


def golden_multi() -> tuple[Tensor, Tensor]:
    logits = fill._noise("multi_logits", (2, 9, 32, 48), 0)
    target = np.clip(np.floor(4 * np.abs(fill._noise("multi_target", (2, 32, 48), 0))), 0, 8)
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(target, dtype=torch.long)[:, None]


LOSSES = {
    "cmunext_busi": (golden_binary, "cmunext_bce_dice"),
    "vmunet_isic": (golden_binary, "vmunet_bce_dice"),
    "vmunet_synapse": (golden_multi, "vmunet_ce_dice"),
}


@pytest.mark.parametrize("bundle", LOSSES)
def test_value_and_gradient_of_the_loss_are_the_published_ones(bundle: str) -> None:
    batch, name = LOSSES[bundle]
    logits, target = batch()
    loss = parsed(bundle).get_parsed_content("train#loss")
    value = loss(logits.requires_grad_(), target)
    value.backward()
    assert value.item() == pytest.approx(GOLDEN[name]["value"], rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.norm().item() == pytest.approx(GOLDEN[name]["grad_norm"], rel=1e-5)
    assert logits.grad.abs().sum().item() == pytest.approx(GOLDEN[name]["grad_sum_abs"], rel=1e-5)
    # and both stay finite for huge logits
    logits.grad = None
    value = loss(1e4 * logits, target)
    value.backward()
    assert value.isfinite()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize(("bundle", "formula"), [("cmunext_busi", binary(0.5, 1e-5)), ("vmunet_isic", binary(1, 1))])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3))
def test_the_binary_loss_is_its_formula_with_soft_masks(bundle: str, formula: Loss, seed: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    logits, mask = torch.tensor(rng.normal(0, 3, (batch, 1, 5, 7))), torch.tensor(rng.random((batch, 1, 5, 7)))
    value = parsed(bundle).get_parsed_content("train#loss")(logits, mask)
    assert value.item() == pytest.approx(formula(logits, mask).item(), rel=1e-9)


@pytest.mark.parametrize(
    ("bundle", "formula"),
    [
        ("cmunext_busi", multi_class(0.5, 1e-5)),
        ("vmunet_isic", multi_class(1, 1)),
        ("vmunet_synapse", multi_class(1, 1e-5)),
    ],
)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), classes=st.integers(3, 5))
def test_the_loss_of_several_classes_is_its_formula(
    bundle: str, formula: Loss, seed: int, batch: int, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.normal(0, 3, (batch, classes, 4, 6)))
    label = torch.tensor(rng.integers(0, classes, (batch, 1, 4, 6))).float()
    numbers = range(classes)
    named = {"classes": list(map(str, numbers[1:])), "label_map": {index: index for index in numbers}}
    parser = parsed(bundle, **({} if bundle == "vmunet_synapse" else named))
    value = parser.get_parsed_content("train#loss")(logits, label)
    assert value.item() == pytest.approx(formula(logits, label).item(), rel=1e-6)


def picture_and_mask(folder: Path, size: tuple[int, int]) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    image = rng.integers(10, 200, (*size, 3), dtype=np.uint8)
    mask = rng.random(size) > 0.6
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "mask.png")
    return {"image": str(folder / "image.png"), "label": str(folder / "mask.png")}, image.transpose(2, 0, 1), mask


def opencv_linear(x: np.ndarray, size: int) -> np.ndarray:
    """cv2.INTER_LINEAR of the last axis by its definition: half-pixel centres, edge samples repeated."""
    at = (np.arange(size) + 0.5) * x.shape[-1] / size - 0.5
    low = np.floor(at).astype(int)
    fraction = at - low
    last = x.shape[-1] - 1
    return x[..., low.clip(0, last)] * (1 - fraction) + x[..., (low + 1).clip(0, last)] * fraction


def opencv_resize(x: np.ndarray, size: int) -> np.ndarray:
    return opencv_linear(opencv_linear(x, size).swapaxes(1, 2), size).swapaxes(1, 2)


@pytest.mark.parametrize("size", SIZES)
def test_published_input_of_cmunext(size: tuple[int, int], tmp_path: Path) -> None:
    item, image, mask = picture_and_mask(tmp_path, size)
    out = parsed("cmunext_busi", image_size=48).get_parsed_content("validate#preprocessing")(item)
    resized = opencv_resize(image[::-1].astype(np.float64), 48)
    expected = (np.rint(resized) / 255 - RGB_MEAN[:, None, None]) / RGB_SD[:, None, None] / 255
    # where a half is rounded the other way, one grey value
    difference = np.abs(out["image"].numpy() - expected)
    assert difference.max() < 1.01 / 255 / 255 / RGB_SD.min()
    assert (difference < 1e-7).mean() > 0.99
    rows, columns = (np.arange(48) * old // 48 for old in size)
    np.testing.assert_array_equal(out["label"].numpy(), mask[None, rows[:, None], columns])


@pytest.mark.parametrize("size", SIZES)
def test_published_input_of_vmunet(size: tuple[int, int], tmp_path: Path) -> None:
    item, image, mask = picture_and_mask(tmp_path, size)
    out = parsed("vmunet_isic", image_size=48).get_parsed_content("validate#preprocessing")(item)
    normalised = (image.astype(np.float64) - 159.922) / 28.871
    stretched = 255 * (normalised - normalised.min()) / (normalised.max() - normalised.min())
    np.testing.assert_allclose(out["image"].numpy(), opencv_resize(stretched, 48), rtol=0, atol=5e-3)
    np.testing.assert_allclose(out["label"].numpy(), opencv_resize(mask[None].astype(float), 48), rtol=0, atol=1e-5)


def test_published_augmentation_of_cmunext(tmp_path: Path) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(np.where(pixels % 3 == 1, 255, 0).astype(np.uint8)).save(tmp_path / "label.png")
    item = {key: str(tmp_path / f"{key}.png") for key in ("image", "label")}
    steps = parsed("cmunext_busi", image_size=4).get_parsed_content("train#preprocessing").transforms
    loaded, augment = Compose(steps[:3])(item), Compose(steps[3:]).set_random_state(0)
    expected: Counter[bytes] = Counter()
    for k, axes in product(range(4), ((), (0,), (1,), (0, 1))):
        moved = np.flip(np.rot90(pixels, k), axes)
        expected[moved.tobytes()] += (0.125 if k else 0.625) * (1 / 6 if axes else 0.5)
    draws, seen = 1500, Counter()
    for _ in range(draws):
        out = augment(loaded)
        # channel 2 is red, here as everywhere grey
        grey = np.rint((out["image"][2].numpy() * 255 * RGB_SD[2] + RGB_MEAN[2]) * 255).astype(np.uint8)
        np.testing.assert_array_equal(out["label"][0].numpy(), grey % 3 == 1)
        seen[grey.tobytes()] += 1
    assert seen.keys() == expected.keys()
    for result, share in expected.items():
        assert abs(seen[result] - draws * share) < 3 * math.sqrt(draws * share * (1 - share))


def l_shape(height: int, width: int) -> np.ndarray:
    """No quarter turn and no flip takes it to itself."""
    mask = np.zeros((height, width), bool)
    mask[height // 8 : height // 2, width // 8 : width // 4] = True
    mask[height // 2 - height // 8 : height // 2, width // 8 : 3 * width // 4] = True
    return mask


def test_published_augmentation_of_vmunet(tmp_path: Path) -> None:
    shape = np.pad(l_shape(62, 62), 1, constant_values=True)
    Image.fromarray(shape.astype(np.uint8) * 255).save(tmp_path / "image.png")
    item = dict.fromkeys(("image", "label"), str(tmp_path / "image.png"))
    steps = parsed("vmunet_isic", image_size=64).get_parsed_content("train#preprocessing").transforms
    loaded, augment = Compose(steps[:3])(item), Compose(steps[3:]).set_random_state(0)
    flips = [np.flip(shape, axes) for axes in ((), (0,), (1,), (0, 1))]
    only_flipped: Counter[int] = Counter()
    draws, turned = 400, []
    for _ in range(draws):
        out = augment(loaded)
        drawn = out["label"][0].numpy()
        # nearest neighbours, turned together
        np.testing.assert_array_equal(out["image"].numpy(), np.stack([255 * drawn] * 3))
        assert set(np.unique(drawn)) <= {0, 1}
        matches = [index for index, flip in enumerate(flips) if np.array_equal(drawn, flip)]
        only_flipped.update(matches)
        if not matches:
            turned.append(drawn)
    assert abs(len(turned) - draws / 2) < 4 * math.sqrt(draws / 4)
    for count in only_flipped.values():
        assert abs(count - draws / 8) < 4 * math.sqrt(draws * 7 / 64)
    assert len(only_flipped) == 4
    # what is turned in from outside is black
    assert np.mean([drawn[0, 0] for drawn in turned]) < 0.1
    # an angle for each sample, all around
    assert len({drawn.tobytes() for drawn in turned}) > 0.95 * len(turned)
    rows, columns = np.mgrid[:64, :64] - 31.5
    angles = [math.atan2((rows * drawn).sum(), (columns * drawn).sum()) for drawn in turned]
    assert np.histogram(angles, 12, (-math.pi, math.pi))[0].min() > len(turned) / 30
