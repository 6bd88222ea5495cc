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

from tests.bundles.conftest import PICTURES, SMALL_VMUNET, parsed
from tests.golden import fill
from tests.transforms.test_pictures import opencv_linear

RGB_MEAN, RGB_SD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
GOLDEN = json.loads((Path(__file__).parents[1] / "golden/losses_and_metrics.json").read_text())


@pytest.mark.parametrize(
    ("bundle", "published"),
    [
        ("cmunext_busi", {"image_size": 256, "max_epochs": 300, "batch_size": 8, "learning_rate": 1e-2, "seed": 41}),
        ("vmunet_isic", {"image_size": 256, "max_epochs": 300, "batch_size": 32, "learning_rate": 1e-3, "seed": 42}),
        ("vmunet_synapse", {"image_size": 224, "max_epochs": 300, "batch_size": 32, "learning_rate": 1e-3, "seed": 42}),
    ],
)
def test_published_numbers(bundle: str, published: dict[str, float]) -> None:
    parser = parsed(bundle)
    assert {key: parser[key] for key in published} == published
    assert parser["early_stop"] == 0
    # the schedule steps after each step of CMUNeXt's training, after each epoch of VM-UNet's
    schedule = next(one for one in parser["train#handlers"] if one["_target_"] == "LrScheduleHandler")
    assert schedule["epoch_level"] == (bundle != "cmunext_busi")
    assert parser["network_def"].keys() == {"_target_", "in_channels", "out_channels"}


def test_published_optimiser_and_schedule_of_cmunext(data: Path) -> None:
    parser = parsed("cmunext_busi", dataset_dir=str(data / "busi"))
    assert sum(p.numel() for p in parser.get_parsed_content("network_def").parameters()) == 3149185
    optimizer = parser.get_parsed_content("optimizer")
    assert isinstance(optimizer, torch.optim.SGD)
    assert {key: optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False,
    }  # fmt: skip
    # 6 images in one batch of 8, so one step an epoch
    rates = [0.01, 0.01, 0.01 * (1 - 1 / 300) ** 0.9, 0.01 * (1 - 2 / 300) ** 0.9]
    assert learning_rates(optimizer, parser.get_parsed_content("lr_scheduler"), 4) == pytest.approx(rates, rel=1e-12)


@pytest.mark.parametrize(("bundle", "period"), [("vmunet_isic", 50), ("vmunet_synapse", 100)])
def test_published_optimiser_and_schedule_of_vmunet(bundle: str, period: int) -> None:
    parser = parsed(bundle, **{f"network_def#{key}": value for key, value in SMALL_VMUNET.items()})
    optimizer = parser.get_parsed_content("optimizer")
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {key: optimizer.defaults[key] for key in ("lr", "betas", "weight_decay")} == {
        "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2,
    }  # fmt: skip
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / period)) / 2 for epoch in range(2 * period)]
    rates = learning_rates(optimizer, parser.get_parsed_content("lr_scheduler"), 2 * period)
    assert rates == pytest.approx(cosine, rel=1e-9)


def learning_rates(
    optimizer: torch.optim.Optimizer, scheduler: torch.optim.lr_scheduler.LRScheduler, steps: int
) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


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
    value = parsed(bundle).get_parsed_content("train#loss")(logits.requires_grad_(), target)
    value.backward()
    assert value.item() == pytest.approx(GOLDEN[name]["value"], rel=1e-5)
    assert logits.grad is not None
    assert logits.grad.norm().item() == pytest.approx(GOLDEN[name]["grad_norm"], rel=1e-5)
    assert logits.grad.abs().sum().item() == pytest.approx(GOLDEN[name]["grad_sum_abs"], rel=1e-5)


@pytest.mark.parametrize("bundle", LOSSES)
def test_the_loss_stays_finite_for_huge_logits(bundle: str) -> None:
    logits, target = LOSSES[bundle][0]()
    logits = (1e4 * logits).requires_grad_()
    value = parsed(bundle).get_parsed_content("train#loss")(logits, target)
    value.backward()
    assert torch.isfinite(value)
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize(("bundle", "ce_weight", "smooth"), [("cmunext_busi", 0.5, 1e-5), ("vmunet_isic", 1, 1)])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3))
def test_the_binary_loss_is_its_formula_with_soft_masks(
    bundle: str, ce_weight: float, smooth: float, seed: int, batch: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, g = rng.normal(0, 3, (batch, 1, 5, 7)), rng.random((batch, 1, 5, 7))
    p = 1 / (1 + np.exp(-logits))
    bce = -(g * np.log(p) + (1 - g) * np.log(1 - p)).mean()
    dice = (2 * (p * g).sum((1, 2, 3)) + smooth) / (p.sum((1, 2, 3)) + g.sum((1, 2, 3)) + smooth)
    value = parsed(bundle).get_parsed_content("train#loss")(torch.tensor(logits), torch.tensor(g))
    assert value.item() == pytest.approx(ce_weight * bce + (1 - dice).mean(), rel=1e-9)


@pytest.mark.parametrize(
    ("bundle", "ce_weight", "smooth"), [("cmunext_busi", 0.5, 1e-5), ("vmunet_isic", 1, 1), ("vmunet_synapse", 1, 1e-5)]
)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), batch=st.integers(1, 3), classes=st.integers(3, 5))
def test_the_loss_of_several_classes_is_its_formula(
    bundle: str, ce_weight: float, smooth: float, seed: int, batch: int, classes: int
) -> None:
    rng = np.random.default_rng(seed)
    logits, label = rng.normal(0, 3, (batch, classes, 4, 6)), rng.integers(0, classes, (batch, 4, 6))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    g = np.moveaxis(np.eye(classes)[label], -1, 1)
    cross_entropy = -(g * np.log(p)).sum(1).mean()
    dice = (2 * (p * g).sum((0, 2, 3)) + smooth) / ((p**2).sum((0, 2, 3)) + (g**2).sum((0, 2, 3)) + smooth)
    named = {} if bundle == "vmunet_synapse" else {
        "classes": [str(index) for index in range(1, classes)],
        "label_map": {index: index for index in range(classes)},
    }  # fmt: skip
    loss = parsed(bundle, **named).get_parsed_content("train#loss")
    value = loss(torch.tensor(logits), torch.tensor(label)[:, None].float())
    assert value.item() == pytest.approx(ce_weight * cross_entropy + (1 - dice).mean(), rel=1e-6)


def picture_and_mask(folder: Path, size: tuple[int, int]) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    image = rng.integers(10, 200, (*size, 3), dtype=np.uint8)
    mask = rng.random(size) > 0.6
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "mask.png")
    return {"image": str(folder / "image.png"), "label": str(folder / "mask.png")}, image.transpose(2, 0, 1), mask


def opencv_resize(x: np.ndarray, size: int) -> np.ndarray:
    return opencv_linear(opencv_linear(x, size).swapaxes(1, 2), size).swapaxes(1, 2)


def test_published_input_of_cmunext(tmp_path: Path) -> None:
    item, image, mask = picture_and_mask(tmp_path, (57, 80))
    out = parsed("cmunext_busi", image_size=48).get_parsed_content("validate#preprocessing")(item)
    resized = opencv_resize(image[::-1].astype(np.float64), 48)
    expected = (np.rint(resized) / 255 - RGB_MEAN[:, None, None]) / RGB_SD[:, None, None] / 255
    # where a half is rounded the other way, one grey value
    difference = np.abs(out["image"].numpy() - expected)
    assert difference.max() < 1.01 / 255 / 255 / RGB_SD.min()
    assert (difference < 1e-7).mean() > 0.99
    rows, columns = np.arange(48) * 57 // 48, np.arange(48) * 80 // 48
    np.testing.assert_array_equal(out["label"].numpy(), mask[None, rows[:, None], columns])


def test_published_input_of_vmunet(tmp_path: Path) -> None:
    item, image, mask = picture_and_mask(tmp_path, (57, 80))
    out = parsed("vmunet_isic", image_size=48).get_parsed_content("validate#preprocessing")(item)
    normalised = (image.astype(np.float64) - 159.922) / 28.871
    stretched = 255 * (normalised - normalised.min()) / (normalised.max() - normalised.min())
    np.testing.assert_allclose(out["image"].numpy(), opencv_resize(stretched, 48), rtol=0, atol=5e-3)
    np.testing.assert_allclose(out["label"].numpy(), opencv_resize(mask[None].astype(float), 48), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bundle", PICTURES)
def test_training_and_inference_see_the_same_input(bundle: str, tmp_path: Path) -> None:
    item, _, _ = picture_and_mask(tmp_path, (57, 80))
    alone = parsed(bundle, "inference").get_parsed_content("preprocessing")({"image": item["image"]})["image"]
    assert torch.equal(alone.as_tensor(), parsed(bundle).get_parsed_content("validate#preprocessing")(item)["image"])


def orientations(x: np.ndarray) -> dict[bytes, list[str]]:
    """Pixels after every quarter turn and then every flip of CMUNeXt's augmentation, and which of these give them."""
    found: dict[bytes, list[str]] = {}
    for k, axes in product(range(4), ((), (0,), (1,), (0, 1))):
        found.setdefault(np.flip(np.rot90(x, k), axes).tobytes(), []).append(f"{k}{axes}")
    return found


def test_published_augmentation_of_cmunext(tmp_path: Path) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(np.where(pixels % 3 == 1, 255, 0).astype(np.uint8)).save(tmp_path / "label.png")
    item = {key: str(tmp_path / f"{key}.png") for key in ("image", "label")}
    steps = parsed("cmunext_busi", image_size=4).get_parsed_content("train#preprocessing").transforms
    loaded, augment = Compose(steps[:3])(item), Compose(steps[3:]).set_random_state(0)
    expected: Counter[bytes] = Counter()
    for result, ways in orientations(pixels).items():
        for way in ways:
            k, flipped = way[0], len(way) > len("0()")
            expected[result] += (0.625 if k == "0" else 0.125) * (1 / 6 if flipped else 0.5)
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
