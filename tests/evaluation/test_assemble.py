"""`python -m evaluation assemble`."""

from __future__ import annotations

from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from evaluation.__main__ import main
from tests.evaluation.test_main import SPL, blobs, failure, protocols, save_h5
from transforms import read_volume

LABEL = blobs(0)
AFFINES = {
    "SPL": SPL,
    "RAS": np.diag([0.8, 0.9, 3.0, 1.0]),
    "PIR": np.array([[0.0, 0, 0.8, 0], [-0.9, 0, 0, 9], [0, -3, 0, 4], [0, 0, 0, 1]]),
}


def oriented(label: np.ndarray, name: str) -> nib.Nifti1Image:
    """The label, (D, H, W) in SPL, as an image whose array runs otherwise."""
    codes = nib.orientations.axcodes2ornt(nib.aff2axcodes(AFFINES[name]))
    image = nib.Nifti1Image(label, SPL)
    change = nib.orientations.ornt_transform(nib.io_orientation(SPL), codes)
    return image.as_reoriented(change)


def write(folder: Path, label: np.ndarray, first: int = 0, name: str = "case1_slice{:03d}_pred.png") -> Path:
    folder.mkdir()
    for number, mask in enumerate(label, first):
        Image.fromarray(mask).save(folder / name.format(number))
    return folder


def run(*words: object) -> None:
    main(["assemble", *map(str, words)])


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("first", [0, 1])
def test_slices_lie_where_they_were_cut(
    name: str, first: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, output = tmp_path / "label.nii.gz", tmp_path / "new" / "pred.nii.gz"
    image = oriented(LABEL, name)
    nib.save(image, reference)
    run(write(tmp_path / "slices", LABEL, first), "--reference", reference, "--output", output)
    assert f"written: {output}, 6 slices of 16 × 20" in capsys.readouterr().out
    found = nib.load(output)
    np.testing.assert_array_equal(np.asarray(found.dataobj), np.asarray(image.dataobj))
    np.testing.assert_allclose(found.affine, image.affine, atol=1e-5)
    assert protocols(output, reference, "--output", tmp_path / "eval")["strict"]["mean"]["dice"]["mean"] == 1


def test_images_and_hdf5_are_references_too(tmp_path: Path) -> None:
    slices = write(tmp_path / "slices", LABEL)
    image = nib.Nifti1Image(np.random.default_rng(0).normal(0, 400, LABEL.shape).astype(np.float32), SPL)
    nib.save(image, tmp_path / "ct.nii.gz")
    save_h5(tmp_path / "case.npy.h5", LABEL, SPL)
    with h5py.File(tmp_path / "case.npy.h5", "a") as file:
        file["image"][...] = 0.5
    for reference in ("ct.nii.gz", "case.npy.h5"):
        run(slices, "--reference", tmp_path / reference, "--output", tmp_path / "out.nii.gz")
        found = read_volume(tmp_path / "out.nii.gz", "label")
        np.testing.assert_array_equal(found.array, LABEL)
        np.testing.assert_allclose(found.affine, SPL, atol=1e-5)


def test_numbers_of_classes(tmp_path: Path) -> None:
    save_h5(tmp_path / "case.h5", LABEL, SPL)
    output = tmp_path / "out.nii.gz"
    bright = write(tmp_path / "bright", (LABEL == 1).astype(np.uint8) * 255)
    run(bright, "--reference", tmp_path / "case.h5", "--output", output)
    np.testing.assert_array_equal(read_volume(output, "label").array, LABEL == 1)
    mapped = write(tmp_path / "mapped", np.array([0, 85, 170], np.uint8)[LABEL])
    words = "--reference", tmp_path / "case.h5", "--output", output, "--label-map"
    run(mapped, *words, "0:0", "85:1", "170:2")
    np.testing.assert_array_equal(read_volume(output, "label").array, LABEL)
    assert "170" in failure("assemble", mapped, *words, "0:0", "85:1")
    for wrong in (["1"], ["a:1"], ["0:0", "0:1"]):
        assert "--label-map takes NUMBER:CLASS" in failure("assemble", mapped, *words, *wrong)
    assert "leaves out a class" in failure("assemble", mapped, *words, "0:0", "85:2")


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_h5(tmp_path / "case.h5", LABEL, SPL)
    output = tmp_path / "out.nii.gz"
    words = "--reference", tmp_path / "case.h5", "--output", output
    slices = write(tmp_path / "slices", LABEL)
    (slices / "case1_slice002_pred.png").rename(slices / "case1_slice006_pred.png")
    assert "6 slices for 6, it lacks 2" in failure("assemble", slices, *words)
    Image.fromarray(LABEL[2]).save(slices / "case1_slice002_pred.png")
    assert "7 slices for 6, it adds 6; number the slices 0 to 5" in failure("assemble", slices, *words)
    (slices / "case1_slice006_pred.png").rename(slices / "slice2.png")
    assert "has the same number as" in failure("assemble", slices, *words)
    (slices / "slice2.png").unlink()
    Image.fromarray(LABEL[0][:, 1:]).save(slices / "case1_slice004_pred.png")
    assert "16 × 19 pixels, the slices of" in failure("assemble", slices, *words)
    (slices / "case1_slice004_pred.png").rename(slices / "pred.png")
    assert "has no number in its name" in failure("assemble", slices, *words)
    assert "is no folder" in failure("assemble", tmp_path / "nowhere", *words)
    assert "no such file" in failure("assemble", slices, "--reference", tmp_path / "no.nii", "--output", output)
    assert "ends in .nii.gz" in failure("assemble", slices, *words[:3], tmp_path / "out.mha")
    assert not output.exists()
