from __future__ import annotations

from itertools import permutations, product
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, Orientationd
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from transforms import ORIENTATION, SPL_AFFINE, InputError, VolumeReader, WindowHUd

AFFINE = np.array([[0.1, 0, -2, 40], [0, -1.5, 0, 30], [5, 0, 0.1, -60], [0, 0, 0, 1]])
SPACING = np.sqrt((AFFINE[:3, :3] ** 2).sum(axis=0))


@pytest.fixture
def hounsfield() -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)


def windowed(hounsfield: np.ndarray) -> np.ndarray:
    return ((hounsfield.clip(-125, 275) + 125) / 400).astype(np.float32)


def write_h5(path: Path, attributes: bool = True, **datasets: np.ndarray) -> Path:
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file[name] = array
        if attributes:
            file.attrs.update({"affine": AFFINE, "spacing_mm": SPACING, "window_hu": (-125.0, 275.0), "source": "x"})
    return path


def test_reads_image_label_and_geometry(tmp_path: Path, hounsfield: np.ndarray) -> None:
    label = (hounsfield > 0).astype(np.uint8)
    path = write_h5(tmp_path / "case.npy.h5", image=windowed(hounsfield), label=label)
    load = LoadImaged("image", reader=VolumeReader())
    image = load({"image": path})["image"]
    np.testing.assert_array_equal(image, windowed(hounsfield))
    np.testing.assert_allclose(image.affine, AFFINE)
    np.testing.assert_allclose(image.meta["spacing_mm"], SPACING)
    assert EnsureChannelFirstd("image")({"image": image})["image"].shape == (1, 4, 5, 6)
    read = LoadImaged("label", reader=VolumeReader("label"), dtype=np.uint8)({"label": path})["label"]
    np.testing.assert_array_equal(read, label)


def test_released_files_have_no_spacing(tmp_path: Path, hounsfield: np.ndarray) -> None:
    path = write_h5(tmp_path / "case.h5", attributes=False, image=windowed(hounsfield))
    image = LoadImaged("image", reader=VolumeReader())({"image": path})["image"]
    assert "spacing_mm" not in image.meta
    np.testing.assert_array_equal(image.affine, SPL_AFFINE)
    assert "".join(nib.aff2axcodes(SPL_AFFINE)) == ORIENTATION == "SPL"
    np.testing.assert_array_equal(image.meta["window_hu"], [-125, 275])


@pytest.mark.parametrize("codes", ["".join(c) for p in permutations(["RL", "AP", "SI"]) for c in product(*p)][::5])
def test_nifti_in_any_orientation_and_h5_come_out_alike(tmp_path: Path, hounsfield: np.ndarray, codes: str) -> None:
    change = ornt_transform(axcodes2ornt(ORIENTATION), axcodes2ornt(codes))
    turned = apply_orientation(hounsfield, change)
    nib.save(nib.Nifti1Image(turned, AFFINE @ inv_ornt_aff(change, hounsfield.shape)), tmp_path / "case.nii.gz")
    write_h5(tmp_path / "case.h5", image=windowed(hounsfield))
    chain = Compose(
        [
            LoadImaged("image", reader=VolumeReader()),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes=ORIENTATION, labels=None),
            WindowHUd("image"),
        ]
    )
    from_nifti, from_h5 = (chain({"image": tmp_path / name})["image"] for name in ("case.nii.gz", "case.h5"))
    np.testing.assert_array_equal(from_h5[0], windowed(hounsfield))
    np.testing.assert_allclose(from_nifti, from_h5, atol=1e-6)
    np.testing.assert_allclose(from_nifti.affine, from_h5.affine, atol=1e-5)


def test_errors_name_the_file(tmp_path: Path, hounsfield: np.ndarray) -> None:
    good = write_h5(tmp_path / "good.h5", image=windowed(hounsfield))
    flat = write_h5(tmp_path / "flat.h5", image=windowed(hounsfield)[0])
    raw = write_h5(tmp_path / "raw.h5", attributes=False, image=hounsfield)
    broken = tmp_path / "broken.h5"
    broken.write_bytes(good.read_bytes()[:500])
    no_gzip, four = tmp_path / "no_gzip.nii.gz", tmp_path / "four.nii"
    no_gzip.write_bytes(b"no gzip")
    nib.save(nib.Nifti1Image(np.zeros((2, 2, 2, 3), np.uint8), np.eye(4)), four)
    for reader, path, what in [
        (VolumeReader("label"), good, "good.h5: no data set 'label', it holds image"),
        (VolumeReader(), flat, "flat.h5.*shape"),
        (VolumeReader(), raw, "raw.h5.*window_hu"),
        (VolumeReader(), broken, "broken.h5: not a readable HDF5"),
        (VolumeReader(), no_gzip, "no_gzip.nii.gz: not a readable NIfTI"),
        (VolumeReader(), four, "four.nii: shape"),
        (VolumeReader(), tmp_path / "none.h5", "none.h5: no such file"),
        (VolumeReader(), tmp_path / "none.nii", "none.nii: no such file"),
        (VolumeReader(), tmp_path / "case.png", "case.png: is no volume"),
    ]:
        with pytest.raises(InputError, match=what):
            reader.get_data(reader.read(path))
    # Through MONAI's loader too, which hides what `read` raises.
    with pytest.raises(ValueError, match="no data set 'label'"):
        LoadImaged("label", reader=VolumeReader("label"))({"label": good})
