import json

import h5py
import nibabel as nib
import numpy as np
import pytest
from medpy.metric import binary
from PIL import Image

from evaluation.__main__ import main, pair_files
from evaluation.metrics import confusion
from evaluation.protocols import pooled

SPL = np.array([[0.0, 0, -0.8, 9], [0, -0.9, 0, 5], [3, 0, 0, -7], [0, 0, 0, 1]])  # 3 × 0.9 × 0.8 mm


def blobs(seed, shape=(6, 16, 20), classes=2):
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for index in range(1, classes + 1):
        corner = [rng.integers(0, size // 2) for size in shape]
        label[tuple(slice(start, start + size // 3 + 1) for start, size in zip(corner, shape, strict=True))] = index
    return label


def save_h5(path, label, affine=None):
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = np.zeros(label.shape, np.float32), label
        if affine is not None:
            file.attrs["affine"], file.attrs["spacing_mm"] = affine, np.linalg.norm(affine[:3, :3], axis=0)


def save_nifti(path, label, affine=SPL):
    """Saved in the orientation that NIfTI files usually have, not in that of the array."""
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(label, affine)), path)


@pytest.fixture
def folders(tmp_path):
    for name in ("predictions", "labels"):
        (tmp_path / name).mkdir()
    return tmp_path / "predictions", tmp_path / "labels"


def run(capsys, *arguments):
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def failure(*arguments):
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    message = str(error.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_volumes_of_two_formats_and_orientations(folders, capsys, tmp_path):
    predictions, labels = folders
    pairs = [(blobs(i), blobs(i + 10)) for i in range(2)]
    for i, (prediction, label) in enumerate(pairs):
        save_nifti(predictions / f"case000{i}.npy_pred.nii.gz", prediction)
        save_h5(labels / f"case000{i}.npy.h5", label, SPL)
    out = run(
        capsys, predictions, labels, "--organs", "liver", "spleen", "--output", tmp_path / "report", "--title", "two"
    )
    assert "two: 2 cases" in out
    strict = json.loads((tmp_path / "report" / "summary.json").read_text())["protocols"]["strict"]
    for index, organ in enumerate(("liver", "spleen"), start=1):
        masks = [(p == index, t == index) for p, t in pairs]
        assert strict["organs"][organ]["dice"]["mean"] == pytest.approx(np.mean([binary.dc(*m) for m in masks]))
        mm = np.mean([binary.hd95(*m, (3, 0.9, 0.8)) for m in masks])
        assert strict["organs"][organ]["hd95"]["mean"] == pytest.approx(mm)


def test_raw_names_are_paired_and_classes_numbered(folders, capsys):
    predictions, labels = folders
    (predictions / "img0001").mkdir()
    save_nifti(predictions / "img0001" / "img0001_trans.nii.gz", blobs(0))
    save_nifti(labels / "label0001.nii.gz", blobs(1))
    out = run(capsys, predictions, labels)
    assert "class 2" in out
    assert "class 3" not in out


def test_labels_may_number_their_classes_in_another_way(folders, capsys):
    predictions, labels = folders
    label = blobs(1)
    raw = np.array([0, 11, 4], np.uint8)[label]
    raw[0, 0, 0] = 7  # an organ that is not asked for
    save_nifti(predictions / "img0001_pred.nii.gz", label)
    save_nifti(labels / "label0001.nii.gz", raw)
    message = failure(predictions, labels)
    assert "the labels hold classes up to 11, the predictions up to 2" in message
    assert "--label-ids" in message
    out = run(capsys, predictions, labels, "--label-ids", 11, 4)
    assert out.count("100.00") > 3
    assert "class 3" not in out
    assert "--organs names 1 classes, --label-ids numbers 2" in failure(
        predictions, labels, "--organs", "liver", "--label-ids", 11, 4
    )


def test_released_volumes_take_the_spacing_that_is_given(folders, capsys):
    predictions, labels = folders
    save_h5(predictions / "a.npy.h5", blobs(0))
    save_h5(labels / "a.npy.h5", blobs(1))
    assert "HD95 mm" not in run(capsys, predictions, labels)
    assert "HD95 mm" in run(capsys, predictions, labels, "--spacing", 3, 1, 1)


def test_images(folders, capsys, tmp_path):
    predictions, labels = folders
    pairs = [(blobs(i, (30, 40), 1), blobs(i + 5, (30, 40), 1)) for i in range(3)]
    for i, (prediction, label) in enumerate(pairs):
        Image.fromarray(prediction * 255).save(predictions / f"ISIC_000{i}.png")
        Image.fromarray(label * 255).convert("RGB").save(labels / f"ISIC_000{i}_segmentation.png")
    out = run(capsys, predictions, labels, "--output", tmp_path / "report")
    assert "3 cases" in out
    found = json.loads((tmp_path / "report" / "summary.json").read_text())["protocols"]["pooled"]["classes"]["lesion"]
    expected = pooled([confusion(p == 1, t == 1) for p, t in pairs])
    assert {key: value["mean"] for key, value in found.items()} == pytest.approx(expected)


def test_label_maps_of_images(folders, capsys):
    predictions, labels = folders
    Image.fromarray(blobs(0, (30, 40))).save(predictions / "eye.png")
    Image.fromarray(blobs(1, (30, 40))).save(labels / "eye.png")
    assert "disc: IoU %" in run(capsys, predictions / "eye.png", labels / "eye.png", "--organs", "cup", "disc")


def test_unpaired_files_are_named(folders):
    predictions, labels = folders
    save_nifti(predictions / "a.nii.gz", blobs(0))
    for name in ("a", "b"):
        save_nifti(labels / f"{name}.nii.gz", blobs(1))
    assert "1 files without a prediction of the same name" in failure(predictions, labels)
    assert "b.nii.gz" in failure(predictions, labels)
    assert "without a label" in failure(labels, predictions)


def test_ambiguous_names_are_refused(folders):
    predictions, labels = folders
    for name in ("a.nii.gz", "a_pred.nii.gz"):
        save_nifti(predictions / name, blobs(0))
    save_nifti(labels / "a.nii.gz", blobs(0))
    assert "have the same name" in failure(predictions, labels)


def test_missing_and_empty_folders(folders, tmp_path):
    predictions, labels = folders
    assert "does not exist" in failure(predictions, tmp_path / "nowhere")
    assert "is or holds no" in failure(predictions, labels)
    save_nifti(labels / "a.nii", blobs(0))
    assert f"{predictions} is or holds no" in failure(predictions, labels)


def test_geometry_must_agree(folders):
    predictions, labels = folders
    shifted = SPL.copy()
    shifted[0, 3] += 4
    save_nifti(predictions / "a.nii.gz", blobs(0), shifted)
    save_nifti(labels / "a.nii.gz", blobs(0))
    assert "their affines differ" in failure(predictions, labels)
    save_nifti(predictions / "a.nii.gz", blobs(0, (7, 16, 20)))
    assert "shape" in failure(predictions, labels)


def test_unreadable_files_and_unknown_classes_are_named(folders):
    predictions, labels = folders
    save_nifti(labels / "a.nii.gz", blobs(0))
    (predictions / "a.nii.gz").write_bytes(b"no volume")
    assert "a.nii.gz: not a readable NIfTI file" in failure(predictions, labels)
    save_nifti(predictions / "a.nii.gz", blobs(0))
    assert "holds values from 0 to 2; with 1 named" in failure(predictions, labels, "--organs", "liver")


def test_two_files_need_no_common_name(folders):
    predictions, labels = folders
    save_nifti(predictions / "mine.nii.gz", blobs(0))
    save_h5(labels / "case0001.npy.h5", blobs(0))
    pair = predictions / "mine.nii.gz", labels / "case0001.npy.h5"
    assert pair_files(*pair) == [pair]
