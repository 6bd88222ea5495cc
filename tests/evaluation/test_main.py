import json
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
from medpy.metric import binary
from numpy.typing import NDArray
from PIL import Image

from evaluation.__main__ import main
from evaluation.metrics import confusion
from evaluation.protocols import pooled

SPL = np.array([[0.0, 0, -0.8, 9], [0, -0.9, 0, 5], [3, 0, 0, -7], [0, 0, 0, 1]])  # 3 × 0.9 × 0.8 mm


def blobs(seed: int, shape: tuple[int, ...] = (6, 16, 20), classes: int = 2) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for index in range(1, classes + 1):
        corner = [rng.integers(0, size // 2) for size in shape]
        label[tuple(slice(start, start + size // 3 + 1) for start, size in zip(corner, shape, strict=True))] = index
    return label


def save_h5(path: Path, label: NDArray[Any], affine: NDArray[Any] | None = None) -> None:
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = np.zeros(label.shape, np.float32), label
        if affine is not None:
            file.attrs["affine"], file.attrs["spacing_mm"] = affine, np.linalg.norm(affine[:3, :3], axis=0)


def save_nifti(path: Path, label: NDArray[Any], affine: NDArray[Any] = SPL) -> None:
    """Saved in the orientation that NIfTI files usually have, not in that of the array."""
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(label, affine)), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("predictions", "labels"):
        (tmp_path / name).mkdir()
    return tmp_path / "predictions", tmp_path / "labels"


def protocols(*arguments: object) -> dict[str, Any]:
    """What summary.json says of each protocol."""
    *_, output = arguments
    main([str(argument) for argument in arguments])
    return json.loads(Path(str(output), "summary.json").read_text())["protocols"]


def failure(*arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    message = str(error.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_volumes_of_two_formats_and_orientations(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    predictions, labels = folders
    pairs = [(blobs(i), blobs(i + 10)) for i in range(2)]
    for i, (prediction, label) in enumerate(pairs):
        save_nifti(predictions / f"case000{i}.npy_pred.nii.gz", prediction)
        save_h5(labels / f"case000{i}.npy.h5", label, SPL)
    options = "--classes", "liver", "spleen", "--title", "two", "--output", tmp_path / "report"
    strict = protocols(predictions, labels, *options)["strict"]
    printed = capsys.readouterr().out
    assert "two: 2 cases" in printed
    assert f"written: {tmp_path / 'report' / 'metrics.csv'}" in printed
    for index, name in enumerate(("liver", "spleen"), start=1):
        masks = [(p == index, t == index) for p, t in pairs]
        assert strict["classes"][name]["dice"]["mean"] == pytest.approx(np.mean([binary.dc(*m) for m in masks]))
        mm = np.mean([binary.hd95(*m, (3, 0.9, 0.8)) for m in masks])
        assert strict["classes"][name]["hd95"]["mean"] == pytest.approx(mm)


def test_labels_may_number_their_classes_in_another_way(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    label = blobs(1)
    raw = np.array([0, 11, 4], np.uint8)[label]
    raw[0, 0, 0] = 7  # an organ that is not asked for
    (predictions / "img0001").mkdir()
    save_nifti(predictions / "img0001" / "img0001_trans.nii.gz", label)
    save_nifti(labels / "label0001.nii.gz", raw)
    message = failure(predictions, labels)
    assert "the labels hold classes up to 11, the predictions up to 2" in message
    assert "--label-ids" in message
    strict = protocols(predictions, labels, "--label-ids", 11, 4, "--output", tmp_path)["strict"]
    assert {name: value["dice"]["mean"] for name, value in strict["classes"].items()} == {"class 1": 1, "class 2": 1}
    assert "--classes names 1 classes, --label-ids numbers 2" in failure(
        predictions, labels, "--classes", "liver", "--label-ids", 11, 4
    )


def test_btcv_stands_for_the_numbers_and_names_of_its_labels(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    label = np.repeat(np.arange(9, dtype=np.uint8), 60).reshape(9, 6, 10)
    save_nifti(predictions / "img0001_pred.nii.gz", label)
    save_nifti(labels / "label0001.nii.gz", np.array([0, 8, 4, 3, 2, 6, 11, 1, 7], np.uint8)[label])
    strict = protocols(predictions, labels, "--label-ids", "btcv", "--output", tmp_path)["strict"]
    assert (strict["mean"]["dice"]["mean"], strict["mean"]["dice"]["classes"]) == (1, 8)
    assert list(strict["classes"])[-2:] == ["spleen", "stomach"]
    for words in (["btvc"], ["btcv", 1], [1, 0], [3, 3], [-1]):
        assert "--label-ids takes btcv, or different numbers above 0" in failure(
            predictions, labels, "--label-ids", *words
        )


def test_released_volumes_take_the_spacing_that_is_given(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    pair = blobs(0), blobs(1)
    for folder, label in zip(folders, pair, strict=True):
        save_h5(folder / "a.npy.h5", label)
    for spacing, options in ((None, ()), ((3, 1, 1), ("--spacing", 3, 1, 1))):
        strict = protocols(predictions, labels, *options, "--output", tmp_path)["strict"]
        assert strict["hd95_unit"] == ("mm" if spacing else "voxels")
        expected = binary.hd95(*(label == 1 for label in pair), spacing)
        assert strict["classes"]["class 1"]["hd95"]["mean"] == pytest.approx(expected)


def test_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    pairs = [(blobs(i, (30, 40), 1), blobs(i + 5, (30, 40), 1)) for i in range(3)]
    for i, (prediction, label) in enumerate(pairs):
        Image.fromarray(prediction * 255).save(predictions / f"ISIC_000{i}.png")
        Image.fromarray(label * 255).convert("RGB").save(labels / f"ISIC_000{i}_segmentation.png")
    found = protocols(predictions, labels, "--output", tmp_path)["pooled"]["classes"]["lesion"]
    expected = pooled([confusion(p == 1, t == 1) for p, t in pairs])
    assert {key: value["mean"] for key, value in found.items()} == pytest.approx(expected)
    for option in (("--label-ids", 1), ("--spacing", 3, 1, 1)):
        assert "--label-ids and --spacing are for volumes" in failure(predictions, labels, *option)


def test_label_maps_of_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files = [folders[0] / "mine.png", folders[1] / "eye.png"]  # two files need no common name
    pair = blobs(0, (30, 40)), blobs(1, (30, 40))
    for file, label in zip(files, pair, strict=True):
        Image.fromarray(label).save(file)
    found = protocols(*files, "--classes", "cup", "disc", "--output", tmp_path)["pooled"]["classes"]
    for index, name in enumerate(("cup", "disc"), start=1):
        expected = pooled([confusion(*(label == index for label in pair))])
        assert found[name]["iou"]["mean"] == pytest.approx(expected["iou"])


def test_missing_and_unpaired_files_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    assert "does not exist" in failure(predictions, tmp_path / "nowhere")
    assert f"{labels} is or holds no" in failure(predictions, labels)
    save_nifti(labels / "a.nii", blobs(0))
    assert f"{predictions} is or holds no" in failure(predictions, labels)
    for name in ("a", "b"):
        save_nifti(predictions / f"{name}.nii.gz", blobs(1))
    assert f"no label of the same name for {predictions / 'b.nii.gz'}" in failure(predictions, labels)


def test_what_does_not_fit_is_named(folders: tuple[Path, Path]) -> None:
    prediction, label = (folder / "a.nii.gz" for folder in folders)
    for affine in (SPL, SPL / [3, 0.9, 0.8, 1]):  # the second has voxels of 1 mm
        shifted = affine.copy()
        shifted[0, 3] += 4
        save_nifti(prediction, blobs(0), shifted)
        save_nifti(label, blobs(0), affine)
        assert "their affines differ" in failure(*folders)
    save_nifti(label, blobs(0))
    save_nifti(prediction, blobs(0, (7, 16, 20)))
    assert "shape" in failure(*folders)
    save_nifti(prediction, blobs(0))
    assert "holds values from 0 to 2; with 1 named" in failure(*folders, "--classes", "liver")
    prediction.write_bytes(b"no volume")
    assert "a.nii.gz: not a readable NIfTI file" in failure(*folders)


def test_only_the_output_is_written_and_named_where_it_cannot_be(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in folders:
        save_nifti(folder / "a.nii.gz", blobs(0))
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert str(tmp_path / "file") in failure(*folders, "--output", tmp_path / "file")
    main([str(folder) for folder in folders])
    assert sorted(tmp_path.rglob("*")) == before
