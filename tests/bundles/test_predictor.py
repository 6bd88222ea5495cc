"""`bundles.load`: what a program gets is what `inferring` writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bundles
from bundles.predictor import Predictor
from tests.bundles.conftest import PICTURES, Run, config
from tests.bundles.test_bundles import brightness_network, each_picture_bundle
from tests.helpers import read
from transforms import InputError

CLASSES = ["cyst", "node", "shadow"]
LABEL_MAP = {0: 0, 85: 1, 170: 2, 255: 3}


def blobs(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """A smooth field from 0 to 1, of which no mirror image looks the same."""
    field = np.random.default_rng(seed).random(shape)
    for axis in range(len(shape)):
        field = sum(np.roll(field, step, axis) for step in range(-3, 4)) / 7
    return (field - field.min()) / (field.max() - field.min())


def picture(seed: int = 0, shape: tuple[int, int] = (52, 70)) -> np.ndarray:
    return np.stack([(255 * blobs(shape, seed + band)).astype(np.uint8) for band in range(3)], axis=-1)


def steps_network(path: Path, channels: int, low: float, high: float) -> dict[str, Any]:
    """A 1×1 convolution with as many classes as channels: values from low to high fall into equal steps of them."""
    network = nn.Conv2d(1, channels, 1)
    # lines that touch a parabola, each the highest around its own point
    points = torch.linspace(low, high, channels)
    with torch.no_grad():
        network.weight.copy_(20 * points.reshape(-1, 1, 1, 1) / (high - low) ** 2)
        network.bias.copy_(-10 * points**2 / (high - low) ** 2)
    torch.save(network.state_dict(), path)
    return {"_target_": "torch.nn.Conv2d", "in_channels": 1, "out_channels": channels, "kernel_size": 1}


@pytest.fixture
def volumes(tmp_path: Path) -> tuple[Predictor, dict[str, Any]]:
    """A predictor of eight organs, and its settings."""
    settings = {"image_size": 32, "network_def": steps_network(tmp_path / "model.pt", 9, 0.1, 0.9)}
    return bundles.load("vmunet_synapse", tmp_path / "model.pt", settings), settings


def saved_volume(path: Path, codes: str = "PIR") -> nib.Nifti1Image:
    """A CT of 20 × 24 × 12 voxels in an oblique place, its axes in this order."""
    array = (1200 * blobs((20, 24, 12)) - 800).astype(np.int16)
    affine = nib.affines.from_matvec(np.diag([1.5, 1.2, 3.0]) @ nib.eulerangles.euler2mat(0.1, 0.05, 0.08), [9, -7, 5])
    image = nib.Nifti1Image(array, affine)
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.orientations.axcodes2ornt(codes))
    nib.save(image.as_reoriented(turn), path)
    return nib.load(path)


@each_picture_bundle
def test_labels_of_pictures_are_the_masks_of_inferring(bundle: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    array = picture()
    Image.fromarray(array).save(tmp_path / "in/colour.png")
    Image.fromarray(array[..., 0]).save(tmp_path / "in/grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(array).save(tmp_path / "in/turned.jpg", exif=exif)
    weights = tmp_path / "model.pt"
    settings = {"image_size": 32, "network_def": brightness_network(bundle, weights), "postprocess": "largest"}
    where = {"input": str(tmp_path / "in"), "output_dir": str(tmp_path / "out"), "ckpt_path": str(weights)}
    run("inferring", config(bundle, "inference"), probabilities=True, **settings, **where)

    predictor = bundles.load(bundle, weights=weights, overrides=settings)
    assert predictor.classes == ["background", "lesion"]
    shapes = {"colour.png": (52, 70), "grey.png": (52, 70), "turned.jpg": (70, 52)}
    for name, shape in shapes.items():
        labels, mask = predictor(tmp_path / "in" / name), read(tmp_path / f"out/{Path(name).stem}_mask.png")
        assert (labels.shape, labels.dtype) == (shape, np.uint8)
        assert 0.05 < labels.mean() < 0.95
        np.testing.assert_array_equal(labels * 255, mask)
        probabilities = predictor.probabilities(str(tmp_path / "in" / name))
        assert (probabilities.shape, probabilities.dtype) == ((1, *shape), np.float32)
        stored = read(tmp_path / f"out/{Path(name).stem}_probability.png")
        np.testing.assert_array_equal((255 * probabilities[0]).round().astype(np.uint8), stored)
    given = array.copy()
    np.testing.assert_array_equal(predictor(given), predictor(tmp_path / "in/colour.png"))
    np.testing.assert_array_equal(given, array)
    np.testing.assert_array_equal(predictor(array[..., 0]), predictor(tmp_path / "in/grey.png"))
    np.testing.assert_array_equal(predictor(array[::-1, ::-1])[::-1, ::-1] > 0, predictor(array) > 0)
    assert not np.array_equal(predictor(array[..., ::-1]), predictor(array))


def test_labels_of_several_classes_are_indices_whatever_numbers_masks_hold(run: Run, tmp_path: Path) -> None:
    Image.fromarray(picture()[..., 0]).save(tmp_path / "a.png")
    weights = tmp_path / "model.pt"
    settings = {"network_def": steps_network(weights, 4, 30, 220), "in_channels": 1, "image_size": 32}
    settings |= {"classes": CLASSES, "label_map": LABEL_MAP}
    where = {"input": str(tmp_path / "a.png"), "output_dir": str(tmp_path / "out"), "ckpt_path": str(weights)}
    run("inferring", config("vmunet_isic", "inference"), **settings, **where)

    predictor = bundles.load("vmunet_isic", weights, settings)
    labels = predictor(tmp_path / "a.png")
    assert set(np.unique(labels)) == {0, 1, 2, 3}
    np.testing.assert_array_equal(np.array(list(LABEL_MAP), np.uint8)[labels], read(tmp_path / "out/a_mask.png"))
    assert predictor.classes == ["background", *CLASSES]
    probabilities = predictor.probabilities(tmp_path / "a.png")
    assert probabilities.shape == (3, 52, 70)
    sure = probabilities.max(0) > 0.5
    np.testing.assert_array_equal(labels[sure], 1 + probabilities.argmax(0)[sure])


def test_labels_of_volumes_lie_on_the_grid_of_their_file(
    volumes: tuple[Predictor, dict[str, Any]], run: Run, tmp_path: Path
) -> None:
    predictor, settings = volumes
    image = saved_volume(tmp_path / "ct.nii.gz")
    where = {"input": str(tmp_path / "ct.nii.gz"), "output_dir": str(tmp_path / "out")}
    where["ckpt_path"] = str(tmp_path / "model.pt")
    run("inferring", config("vmunet_synapse", "inference"), probabilities=True, **settings, **where)

    labels = predictor(tmp_path / "ct.nii.gz")
    assert (labels.shape, labels.dtype) == (image.shape, np.uint8)
    assert set(np.unique(labels)) == set(range(9))
    np.testing.assert_array_equal(labels, np.asarray(nib.load(tmp_path / "out/ct_pred.nii.gz").dataobj))
    probabilities = predictor.probabilities(tmp_path / "ct.nii.gz")
    assert (probabilities.shape, probabilities.dtype) == ((8, *image.shape), np.float16)
    for number, probability in enumerate(probabilities, 1):
        stored = nib.load(tmp_path / f"out/ct_probability_{number}.nii.gz").get_fdata()
        np.testing.assert_allclose(probability, stored, atol=1e-5)

    array = image.get_fdata(dtype=np.float32)
    kept = array.copy()
    np.testing.assert_array_equal(predictor(array, image.affine), labels)
    np.testing.assert_array_equal(array, kept)
    # a mirrored view with the affine that belongs to it
    mirrored = image.affine @ nib.orientations.inv_ornt_aff([[0, -1], [1, 1], [2, 1]], image.shape)
    np.testing.assert_array_equal(predictor(array[::-1], mirrored)[::-1], labels)
    np.testing.assert_array_equal(predictor.probabilities(array, image.affine), probabilities)


def test_a_dicom_series_is_its_folder_or_one_of_its_volumes(
    volumes: tuple[Predictor, dict[str, Any]], tmp_path: Path
) -> None:
    pytest.importorskip("highdicom")
    from tests import dicom_files

    dicom_files.series(tmp_path / "scan", dicom_files.hounsfield())
    labels = volumes[0](tmp_path / "scan")
    assert labels.shape == (12, 20, 24)
    assert len(np.unique(labels)) > 2
    dicom_files.series(tmp_path / "scan/second", dicom_files.hounsfield())
    saved_volume(tmp_path / "scan/ct.nii")
    with pytest.raises(InputError, match=r"scan: holds 2 images; give one at a time, .*ct.nii for instance"):
        volumes[0](tmp_path / "scan")


def test_a_frame_of_a_dicom_file_is_named_by_its_number(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from tests import dicom_files

    clip = dicom_files.ultrasound()
    frames = np.stack([picture(seed)[..., 0] for seed in (0, 5)])
    dicom_files.grey(clip, frames, 8)
    dicom_files.saved(clip, tmp_path / "clip.dcm")
    predictor = bundles.load(PICTURES[1], tmp_path / "a.pt", network_settings(PICTURES[1], tmp_path / "a.pt"))
    with pytest.raises(InputError, match=r"clip.dcm: holds 2 images; give one at a time, .*clip.dcm\[1\] for"):
        predictor(tmp_path / "clip.dcm")
    np.testing.assert_array_equal(predictor(tmp_path / "clip.dcm[2]"), predictor(frames[1]))


def network_settings(bundle: str, weights: Path, **more: Any) -> dict[str, Any]:
    return {"image_size": 32, "network_def": brightness_network(bundle, weights), **more}


def test_predictors_do_not_disturb_each_other_nor_do_threads(
    volumes: tuple[Predictor, dict[str, Any]], tmp_path: Path
) -> None:
    pictures = [picture(seed, (40 + seed, 60)) for seed in range(4)]
    image = saved_volume(tmp_path / "ct.nii")
    small, large = (
        bundles.load(bundle, file, network_settings(bundle, file, image_size=size))
        for bundle, file, size in zip(PICTURES, (tmp_path / "small.pt", tmp_path / "large.pt"), (12, 64), strict=True)
    )
    alone = [[one(array) for array in pictures] for one in (small, large)]
    volume = volumes[0](tmp_path / "ct.nii")
    assert any(not np.array_equal(first, second) for first, second in zip(*alone, strict=True))
    with ThreadPoolExecutor(4) as pool:
        again = [[pool.submit(one, array) for array in pictures * 3] for one in (small, large)]
        volume_again = pool.submit(volumes[0], tmp_path / "ct.nii")
        for expected, found in zip(alone, again, strict=True):
            for labels, future in zip(expected * 3, found, strict=True):
                np.testing.assert_array_equal(future.result(), labels)
        np.testing.assert_array_equal(volume_again.result(), volume)
    assert image.shape == volume.shape


def test_settings_and_several_checkpoints(tmp_path: Path) -> None:
    bundle, array = PICTURES[1], picture()
    settings = network_settings(bundle, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    plain = bundles.load(bundle, tmp_path / "a.pt", settings).probabilities(array)
    state["bias"] += 80
    torch.save(state, tmp_path / "b.pt")
    state["bias"] -= 40
    torch.save(state, tmp_path / "c.pt")
    mean = bundles.load(bundle, [tmp_path / "a.pt", tmp_path / "b.pt"], settings).probabilities(array)
    between = bundles.load(bundle, str(tmp_path / "c.pt"), settings).probabilities(array)
    np.testing.assert_allclose(mean, between, atol=1e-5)
    assert np.abs(mean - plain).max() > 0.1
    # from left to right: what is brighter on one side is not on the other side of a mirror
    kernel = {"network_def#kernel_size": 3, "network_def#padding": 1}
    slope = nn.Conv2d(3, 1, 3, padding=1)
    with torch.no_grad():
        slope.weight.copy_(torch.tensor([-1.0, 0, 1]).expand(1, 3, 3, 3))
        slope.bias.zero_()
    torch.save(slope.state_dict(), tmp_path / "slope.pt")
    once, flipped = (
        bundles.load(bundle, tmp_path / "slope.pt", {**settings, **kernel, "tta": tta}) for tta in ("none", "flips")
    )
    assert once.probabilities(array).std() > 0.3
    np.testing.assert_allclose(flipped.probabilities(array), 0.5, atol=1e-3)


@pytest.mark.parametrize(
    ("image", "line"),
    [
        ("nowhere.png", "nowhere.png: no such file"),
        ("notes.txt", r"notes.txt: is or holds no \.png"),
        ("damaged.png", "damaged.png: not a readable picture"),
        (".", r"holds 2 images; give one at a time, .*\.png for instance"),
        (np.zeros((8, 8), np.float32), r"the array is float32 of shape \(8, 8\), expected a picture in uint8"),
        (np.zeros((3, 8, 8), np.uint8), r"of shape \(3, 8, 8\), expected a picture in uint8"),
        (np.zeros((0, 8), np.uint8), r"of shape \(0, 8\)"),
        (torch.zeros(8, 8, dtype=torch.uint8), "expected a path or a NumPy array, got Tensor"),
        ([[0, 1]], "expected a path or a NumPy array, got list"),
    ],
)
def test_what_is_no_picture_is_one_line(image: Any, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = network_settings(PICTURES[0], tmp_path / "a.pt")
    predictor = bundles.load(PICTURES[0], "a.pt", settings)
    Path("notes.txt").write_text("no picture")
    Path("damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    Image.new("L", (8, 8)).save("sound.png")
    for call in (predictor, predictor.probabilities):
        with pytest.raises(InputError, match=line) as caught:
            call(image)
        assert "\n" not in str(caught.value)
    # it goes on with the next
    assert predictor("sound.png").shape == (8, 8)
    with pytest.raises(InputError, match="sound.png: an affine is given beside a path"):
        predictor("sound.png", np.eye(4))
    with pytest.raises(InputError, match="a picture has no affine"):
        predictor(np.zeros((8, 8), np.uint8), np.eye(4))


HU = np.linspace(-900, 200, 4 * 4 * 4).reshape(4, 4, 4)


@pytest.mark.parametrize(
    ("array", "affine", "line"),
    [
        (HU, None, "a volume without its affine; give it"),
        (HU, np.eye(3), r"the affine is float64 of shape \(3, 3\)"),
        (HU, np.full((4, 4), "a"), "the affine is <U1 of shape"),
        (HU, np.diag([1, 1, 0, 1]), "array: its affine is no orientation"),
        (HU, np.diag([1, np.nan, 1, 1]), "array: its affine is no orientation"),
        (HU[0], np.eye(4), r"shape \(4, 4\), expected a volume \(X, Y, Z\)"),
        (HU[:, :0], np.eye(4), r"shape \(4, 0, 4\)"),
        (HU / 1000, np.eye(4), "array: values from -0.9 to 0.2 do not look like Hounsfield units"),
        (np.where(HU > 150, np.inf, HU), np.eye(4), "array: holds infinite values"),
        (HU.astype(complex), np.eye(4), "array: holds complex numbers"),
        (HU.astype(object), np.eye(4), "array: holds object"),
    ],
)
def test_what_is_no_volume_is_one_line(
    array: np.ndarray, affine: Any, line: str, volumes: tuple[Predictor, dict[str, Any]]
) -> None:
    with pytest.raises(InputError, match=line) as caught:
        volumes[0](array, affine)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"bundle": "cmunext_bus"}, "cmunext_bus: no such bundle"),
        ({"weights": "nowhere.pt"}, "no weight file nowhere.pt"),
        ({"weights": "damaged.pt"}, "damaged.pt"),
        ({"weights": []}, "no weights are given"),
        ({"weights": "other.pt"}, "mis-shaped"),
        ({"weights": "part.pt"}, "1 missing"),
        ({"overrides": {"imagesize": 32}}, "--imagesize: no such setting; did you mean --image_size"),
        ({"overrides": {"image_size": 0}}, "--image_size 0: expected"),
        ({"overrides": {"ckpt_path": "a.pt"}}, "ckpt_path: no setting of a predictor"),
        ({"overrides": {"overlay": True}}, "overlay: no setting of a predictor"),
        ({"overrides": {"classes": ["a", "b"]}}, "channels"),
        ({"overrides": {"device": "cuda:99"}}, "--device cuda:99: expected a device"),
    ],
)
def test_what_cannot_be_loaded_is_one_line(
    given: dict[str, Any], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = network_settings("cmunext_busi", tmp_path / "a.pt")
    Path("damaged.pt").write_bytes(b"PK\x03\x04 damaged")
    torch.save(nn.Conv2d(3, 2, 1).state_dict(), "other.pt")
    torch.save({"weight": torch.ones(1, 3, 1, 1)}, "part.pt")
    arguments = {"bundle": "cmunext_busi", "weights": "a.pt", **given}
    arguments["overrides"] = {**settings, **given.get("overrides", {})}
    with pytest.raises(InputError, match=line) as caught:
        bundles.load(**arguments)
    assert "\n" not in str(caught.value)
    bundles.load("cmunext_busi", "a.pt", settings)


def test_the_package_has_no_other_lazy_names() -> None:
    from bundles import predictor

    assert bundles.load is predictor.load
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        bundles.lode  # noqa: B018
