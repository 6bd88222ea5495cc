from __future__ import annotations

import json
from itertools import permutations, product
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from prepare.__main__ import main
from prepare.synapse import TEST_CASES, TRAIN_CASES, load_volume, prepare_synapse
from tests.helpers import contents
from transforms import ORIENTATION, SYNAPSE_CLASSES, InputError

SHAPE = (7, 12, 9)  # D, H, W
AFFINE = np.array([[0, 0, -0.8, 40], [0, -0.7, 0, 30], [5.0, 0, 0, -60], [0, 0, 0, 1]])
PUBLISHED_IDS = {
    "aorta": 8,
    "gallbladder": 4,
    "left kidney": 3,
    "right kidney": 2,
    "liver": 6,
    "pancreas": 11,
    "spleen": 1,
    "stomach": 7,
}


def raw_case(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hounsfield = rng.integers(-1000, 1500, SHAPE).astype(np.int16)
    return hounsfield, rng.integers(0, 14, SHAPE).astype(np.uint8)


def write_pair(
    raw: Path, case: int, hounsfield: np.ndarray, label: np.ndarray, codes: str = "LAS", label_affine_shift: float = 0.0
) -> None:
    change = ornt_transform(axcodes2ornt(ORIENTATION), axcodes2ornt(codes))
    affine = AFFINE @ inv_ornt_aff(change, SHAPE)
    for kind, array, shift in (("img", hounsfield, 0.0), ("label", label, label_affine_shift)):
        (raw / kind).mkdir(parents=True, exist_ok=True)
        moved = affine.copy()
        moved[0, 3] += shift
        image = nib.Nifti1Image(apply_orientation(array, change), moved)
        nib.save(image, raw / kind / f"{kind}{case:04d}.nii.gz")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for case in (1, 2, 5):
        write_pair(tmp_path / "raw", case, *raw_case(case))
    return tmp_path / "raw"


def test_layout_values_and_classes(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_synapse(raw, out, [5, 1], [2])
    lists = {path.name: path.read_text().split() for path in (out / "lists" / "lists_Synapse").iterdir()}
    slices = [f"case{case:04d}_slice{index:03d}" for case in (1, 5) for index in range(SHAPE[0])]
    assert lists == {
        "train.txt": slices,
        "test_vol.txt": ["case0002"],
        "all.lst": ["case0001.npy.h5", "case0002.npy.h5", "case0005.npy.h5"],
    }
    assert sorted(path.stem for path in (out / "train_npz").iterdir()) == slices

    hounsfield, ids = raw_case(5)
    with np.load(out / "train_npz" / "case0005_slice003.npz", allow_pickle=False) as file:
        image, label = file["image"], file["label"]
    assert (image.dtype, label.dtype) == (np.float32, np.uint8)
    np.testing.assert_allclose(image, (np.clip(hounsfield[3], -125.0, 275) + 125) / 400, atol=1e-6)
    for number, organ in enumerate(SYNAPSE_CLASSES, start=1):
        np.testing.assert_array_equal(label == number, ids[3] == PUBLISHED_IDS[organ])
    np.testing.assert_array_equal(label == 0, ~np.isin(ids[3], list(PUBLISHED_IDS.values())))

    with h5py.File(out / "test_vol_h5" / "case0002.npy.h5") as file:
        assert file["image"].shape == file["label"].shape == SHAPE
        assert (file["image"].dtype, file["label"].dtype) == (np.float32, np.uint8)
        np.testing.assert_allclose(file.attrs["spacing_mm"], (5, 0.7, 0.8), rtol=1e-6)
        np.testing.assert_allclose(file.attrs["affine"], AFFINE, atol=1e-5)
        np.testing.assert_array_equal(file.attrs["window_hu"], (-125, 275))
        assert tuple(file.attrs["organs"]) == SYNAPSE_CLASSES
        assert file.attrs["source"] == "img0002.nii.gz"

    facts = json.loads((out / "dataset.json").read_text())
    assert (facts["train"], facts["test"], facts["in_both"]) == (["case0001", "case0005"], ["case0002"], [])
    assert facts["training_slices"] == 14
    assert facts["raw_ids"] == PUBLISHED_IDS


@pytest.mark.parametrize("codes", ["".join(c) for p in permutations(["RL", "AP", "SI"]) for c in product(*p)][::3])
def test_result_does_not_depend_on_the_inputs_axis_codes(tmp_path: Path, codes: str) -> None:
    hounsfield, ids = raw_case()
    write_pair(tmp_path, 1, hounsfield, ids, codes)
    volume = load_volume(tmp_path / "img" / "img0001.nii.gz", tmp_path / "label" / "label0001.nii.gz")
    np.testing.assert_allclose(volume.image, (np.clip(hounsfield, -125.0, 275) + 125) / 400, atol=1e-6)
    np.testing.assert_array_equal(volume.label == SYNAPSE_CLASSES.index("liver") + 1, ids == PUBLISHED_IDS["liver"])
    np.testing.assert_allclose(volume.affine, AFFINE, atol=1e-5)
    assert nib.aff2axcodes(volume.affine) == ("S", "P", "L")
    np.testing.assert_allclose(volume.spacing_mm, (5, 0.7, 0.8), rtol=1e-6)


def test_published_split() -> None:
    assert (len(TRAIN_CASES), len(TEST_CASES)) == (18, 12)
    assert not set(TRAIN_CASES) & set(TEST_CASES)


def test_missing_cases_are_named(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cases 3 4 6 7 .* 40 are missing.*--allow-missing"):
        prepare_synapse(raw, tmp_path / "out")
    with pytest.raises(InputError, match="cases 9 are missing"):
        prepare_synapse(raw, tmp_path / "out", [5, 9], [1])
    assert not (tmp_path / "out").exists()
    prepare_synapse(raw, tmp_path / "out", allow_missing=True)
    facts = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (facts["train"], facts["test"]) == (["case0005"], ["case0001", "case0002"])


def test_a_case_in_both_parts_must_be_asked_for(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="cases 1 would be in training and test"):
        prepare_synapse(raw, tmp_path / "out", train_cases=[1])
    prepare_synapse(raw, tmp_path / "out", [1], [1])
    assert "WARNING: cases 1 are in training AND test" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["in_both"] == ["case0001"]


def test_bad_pairs_are_named(raw: Path, tmp_path: Path) -> None:
    hounsfield, ids = raw_case()

    def expect(what: str, **change: Any) -> None:
        write_pair(raw, 1, **{"hounsfield": hounsfield, "label": ids} | change)
        with pytest.raises(InputError, match=what):
            prepare_synapse(raw, tmp_path / "out", [5], [1])
        assert not (tmp_path / "out").exists()

    expect(r"label0001.*shape", label=ids[:-1])
    expect(r"label0001.*affine differs", label_affine_shift=1.0)
    expect(r"label0001.*label ids .*14", label=np.where(ids == 3, 14, ids).astype(np.uint8))
    expect(r"label0001.*holds 2\.5, expected whole", label=np.where(ids == 3, 2.5, ids).astype(np.float32))
    expect(r"img0001.*not look like Hounsfield", hounsfield=(hounsfield / 1500).astype(np.float32))
    expect(r"label0001.*from -1 to 13", label=np.where(ids == 3, -1, ids.astype(np.int16)))
    expect(r"label0001.*holds NaN, expected class numbers", label=np.where(ids == 3, np.nan, ids).astype(np.float32))
    expect(r"img0001.*complex", hounsfield=hounsfield.astype(np.complex64))
    expect(r"img0001.*infinite", hounsfield=np.where(ids == 3, np.inf, hounsfield).astype(np.float32))
    expect(r"img0001.*shape", hounsfield=np.stack([hounsfield] * 2, -1))

    def expect_of_files(what: str) -> None:
        with pytest.raises(InputError, match=what):
            prepare_synapse(raw, tmp_path / "out", [5], [1])

    image, label = raw / "img" / "img0001.nii.gz", raw / "label" / "label0001.nii.gz"
    write_pair(raw, 1, hounsfield, ids)
    nib.save(nib.Nifti1Image(ids, None), label)
    expect_of_files(r"label0001.*no orientation")
    write_pair(raw, 1, hounsfield, ids)
    image.write_bytes(image.read_bytes()[: image.stat().st_size // 2])
    expect_of_files(r"img0001.*(damaged|not a readable)")
    image.unlink()
    expect_of_files(r"label0001.*image file is missing")


def test_stored_forms_that_mean_the_same_give_the_same(tmp_path: Path) -> None:
    hounsfield, ids = raw_case()
    files = tmp_path / "img" / "img0001.nii.gz", tmp_path / "label" / "label0001.nii.gz"
    write_pair(tmp_path, 1, hounsfield, ids)
    expected = load_volume(*files)
    image, label = (nib.load(file) for file in files)
    image.header["pixdim"][1:4] = image.header["pixdim"][1:4].round(1) + 0.0002  # as some programs round it
    image.set_qform(None, 0)
    nib.save(image, files[0])
    moved = label.affine.copy()
    moved[:3, 3] += 2e-3
    nib.save(nib.Nifti1Image(np.asarray(label.dataobj) - np.float32(3e-5), moved), files[1])
    for suffix, kind in ((".nii.gz", nib.Nifti1Image), (".nii", nib.Nifti2Image), (".hdr", nib.Nifti1Pair)):
        turned = nib.load(files[0])
        other = files[0].with_name(f"other{suffix}")
        nib.save(kind(np.asarray(turned.dataobj), turned.affine), other)
        for source in (files[0], other):
            volume = load_volume(source, files[1])
            np.testing.assert_array_equal(volume.image, expected.image)
            np.testing.assert_array_equal(volume.label, expected.label)
            np.testing.assert_allclose(volume.affine, expected.affine, atol=1e-5)


def test_values_that_are_no_hounsfield_units_and_nan(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hounsfield, ids = raw_case()
    files = tmp_path / "img" / "img0001.nii.gz", tmp_path / "label" / "label0001.nii.gz"
    write_pair(tmp_path, 1, hounsfield + 1024, ids)
    with pytest.raises(InputError, match="do not look like Hounsfield units"):
        load_volume(*files)
    expected = (np.clip(hounsfield + 1024, -125.0, 275) + 125) / 400
    np.testing.assert_allclose(load_volume(*files, assume_hu=True).image, expected, atol=1e-6)
    write_pair(tmp_path, 1, np.where(ids == 3, np.nan, hounsfield), ids)
    image = load_volume(*files).image
    assert (image[ids == 3] == 0).all()
    np.testing.assert_allclose(image[ids != 3], ((np.clip(hounsfield, -125.0, 275) + 125) / 400)[ids != 3], atol=1e-6)
    assert "img0001.nii.gz" in caplog.text
    assert "voxels are NaN, taken as air" in caplog.text


def test_an_earlier_result_is_replaced_whole_and_only_when_asked(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_synapse(raw, out, [5], [1])
    before = contents(out)
    with pytest.raises(InputError, match="exists already"):
        prepare_synapse(raw, out, [5], [2])
    assert contents(out) == before
    prepare_synapse(raw, out, [5], [2], overwrite=True)
    assert not (out / "test_vol_h5" / "case0001.npy.h5").exists()
    prepare_synapse(raw, out, [5], [1], overwrite=True)
    assert contents(out) == before
    hounsfield, ids = raw_case()
    write_pair(raw, 2, hounsfield, ids + 100)
    with pytest.raises(InputError, match="label ids"):
        prepare_synapse(raw, out, [5, 1], [2], overwrite=True)
    assert contents(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_folders_of_others_are_never_replaced(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("years of work")
    with pytest.raises(InputError, match="not prepared here"):
        prepare_synapse(raw, tmp_path / "thesis", [5], [1], overwrite=True)
    assert contents(tmp_path / "thesis") == {"chapter1.txt": b"years of work"}


def test_command_line(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["synapse", "--raw", str(raw), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("prepare synapse: ")
    assert error.count("\n") == 1
    assert main([*arguments, "--train-cases", "5", "--test-cases", "1", "2"]) == 0
    table = capsys.readouterr().out
    assert "case0005  train  7       12×9      5.00 × 0.70 × 0.80" in table
    assert "7 training slices, 2 test volumes, orientation SPL" in table


def test_cases_to_train_on_are_needed(raw: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the training cases is there; complete the download, or say with"):
        prepare_synapse(raw, tmp_path / "out", [9], [1], allow_missing=True)
    assert not (tmp_path / "out").exists()
