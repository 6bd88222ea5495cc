"""Volumes and slices: what comes in lies where other programs see it, masks lie on it, the rest is refused."""

from __future__ import annotations

import gzip
import io
import logging
import zipfile
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, decollate_batch
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImage, LoadImaged, Orientationd
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, ornt_transform

from transforms import (
    ORIENTATION,
    SPL_AFFINE,
    InputError,
    SaveImageVolumed,
    SliceReader,
    VolumeReader,
    WindowHUd,
    check_hounsfield,
    on_grid,
    read_volume,
    whole_numbers,
)

AFFINE = np.array([[0.1, 0, -2, 40], [0, -1.5, 0, 30], [5, 0, 0.1, -60], [0, 0, 0, 1]])
SPACING = np.sqrt((AFFINE[:3, :3] ** 2).sum(axis=0))
SHAPE = (7, 6, 5)
MARK = (2, 3, 1)  # the one voxel of 2000 HU
ORDER = ["".join(c) for p in permutations(["RL", "AP", "SI"]) for c in product(*p)]


def turn(axis: int, degrees: float) -> np.ndarray:
    others = [other for other in range(3) if other != axis]
    cos, sin = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.eye(3)
    matrix[np.ix_(others, others)] = [[cos, -sin], [sin, cos]]
    return matrix


def placed(directions: np.ndarray) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = directions @ np.diag([0.703125, 0.8, 2.5])
    affine[:3, 3] = -120.3, 55.1, -700.7
    return affine


TILT = np.eye(3)
TILT[1, 2] = np.tan(np.deg2rad(20))  # of the gantry
DIRECTIONS = {
    "straight": np.eye(3),
    "mirrored": np.diag([-1.0, 1, 1]),
    "permuted": np.eye(3)[[2, 0, 1]],
    "oblique": turn(0, 20) @ turn(2, 33),
    "halfway": turn(2, 45),
    "halfway twice": turn(0, 45) @ turn(1, 45),
    "tilted": TILT,
    "tilted and oblique": turn(0, 10) @ TILT,
}


def ct(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> np.ndarray:
    image = np.random.default_rng(seed).integers(-1000, 300, shape).astype(np.int16)
    image[tuple(min(at, size - 1) for at, size in zip(MARK, shape, strict=False)) + (0,) * (len(shape) - 3)] = 2000
    return image


def nifti(
    path: Path, array: np.ndarray, affine: np.ndarray | None, kind: type = nib.Nifti1Image, **header: Any
) -> Path:
    image = kind(array, affine)
    for field, value in header.items():
        image.header[field] = value
    nib.save(image, path)
    return path


def patched(path: Path, *edits: tuple[int, bytes]) -> Path:
    """A NIfTI file with some of its bytes replaced."""
    content = bytearray(path.read_bytes())
    for at, new in edits:
        content[at : at + len(new)] = new
    path.write_bytes(content)
    return path


def floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


def shorts(*values: int) -> bytes:
    return np.array(values, "<i2").tobytes()


def mask_of(path: Path, folder: Path) -> Path:
    """The mask of the marked voxel, by way of the steps of the bundle's inference."""
    before = Compose(
        [
            LoadImaged("image", reader=VolumeReader()),
            EnsureChannelFirstd("image", channel_dim="no_channel"),
            Orientationd("image", axcodes=ORIENTATION, labels=[["L", "R"], ["P", "A"], ["I", "S"]]),
        ]
    )
    after = Compose(
        [
            Invertd("pred", before, "image", nearest_interp=True, to_tensor=True),
            SaveImageVolumed("pred", folder),
        ]
    )
    for batch in DataLoader(Dataset([{"image": str(path)}], before), batch_size=1):
        batch["pred"] = (batch["image"] == batch["image"].max()).to(torch.uint8)
        for item in decollate_batch(batch):
            after(item)
    return folder / f"{path.name.partition('.')[0]}_pred.nii.gz"


def check_on_image(path: Path, mask: Path) -> None:
    image, label = nib.load(path), nib.load(mask)
    assert image.shape == label.shape
    assert label.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(np.asarray(label.dataobj) == 1, np.asarray(image.dataobj) == 2000)
    np.testing.assert_array_equal(label.affine, image.affine)
    for field in ("sform_code", "qform_code", "pixdim", "xyzt_units", "srow_x", "srow_y", "srow_z", "quatern_b"):
        np.testing.assert_array_equal(label.header[field], image.header[field])


FORMS: dict[str, Callable[[nib.Nifti1Image, np.ndarray], None]] = {
    "both": lambda image, affine: None,
    "sform, pixdim rounded": lambda image, affine: (
        image.set_sform(affine, 1),
        image.set_qform(None, 0),
        image.header.__setitem__("pixdim", [1, 0.7031, 0.8, 2.5, 0, 0, 0, 0]),
    ),
    "qform": lambda image, affine: (image.set_sform(None, 0), image.set_qform(affine, 1)),
    "unlike codes": lambda image, affine: (image.set_sform(affine, 4), image.set_qform(affine, 1)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directions", DIRECTIONS)
def test_masks_lie_on_their_image(tmp_path: Path, directions: str, form: str) -> None:
    image = nib.Nifti1Image(ct(), placed(DIRECTIONS[directions]))
    FORMS[form](image, placed(DIRECTIONS[directions]))
    image.header.set_xyzt_units("mm")
    nib.save(image, tmp_path / "a.nii.gz")
    check_on_image(tmp_path / "a.nii.gz", mask_of(tmp_path / "a.nii.gz", tmp_path / "out"))
    # nothing of MONAI's is asked here: the marked voxel lies where nibabel and the header say
    volume = read_volume(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(volume.affine, nib.load(tmp_path / "a.nii.gz").affine)
    if form != "qform" or "tilted" not in directions:  # a qform cannot hold the tilt
        np.testing.assert_allclose(volume.affine, placed(DIRECTIONS[directions]), atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directions", ["mirrored", "permuted", "oblique", "halfway"])
def test_itk_sees_the_mask_on_the_image(tmp_path: Path, directions: str, form: str) -> None:
    sitk = pytest.importorskip("SimpleITK")
    image = nib.Nifti1Image(ct(), placed(DIRECTIONS[directions]))
    FORMS[form](image, placed(DIRECTIONS[directions]))
    nib.save(image, tmp_path / "a.nii.gz")
    scan, mask = (
        sitk.ReadImage(str(file)) for file in (tmp_path / "a.nii.gz", mask_of(tmp_path / "a.nii.gz", tmp_path))
    )
    for fact in ("GetSize", "GetOrigin", "GetSpacing", "GetDirection"):
        assert getattr(scan, fact)() == getattr(mask, fact)(), fact
    assert mask[MARK] == 1
    right_anterior = np.array(mask.TransformIndexToPhysicalPoint(MARK)) * (-1, -1, 1)  # ITK counts to left, posterior
    np.testing.assert_allclose(right_anterior, (placed(DIRECTIONS[directions]) @ (*MARK, 1))[:3], atol=1e-3)


def test_where_sform_and_qform_differ_the_sform_is_believed_and_the_mask_has_both(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = nib.Nifti1Image(ct(), placed(np.eye(3)))
    image.set_qform(placed(np.diag([-1.0, -1, 1])), 2)
    nib.save(image, tmp_path / "a.nii.gz")
    check_on_image(tmp_path / "a.nii.gz", mask_of(tmp_path / "a.nii.gz", tmp_path))
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii.gz").affine, placed(np.eye(3)), atol=1e-4)
    assert "a.nii.gz: sform and qform lie up to" in caplog.text
    mask = nib.load(tmp_path / "a_pred.nii.gz")
    np.testing.assert_allclose(mask.get_qform(), placed(np.diag([-1.0, -1, 1])), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("a.nii", SHAPE, nib.Nifti1Image),
        ("a.NII.GZ", SHAPE, nib.Nifti1Image),
        ("a.nii.gz", SHAPE, nib.Nifti2Image),
        ("a.hdr", SHAPE, nib.Nifti1Pair),
        ("a.img", SHAPE, nib.Nifti2Pair),
        ("a.nii.gz", (*SHAPE, 1), nib.Nifti1Image),
        ("a.nii.gz", (7, 6, 1), nib.Nifti1Image),
        ("a.nii.gz", (7, 6), nib.Nifti1Image),
    ],
)
def test_every_form_of_nifti_gives_a_mask_of_its_shape(tmp_path: Path, name: str, shape: tuple, kind: type) -> None:
    written = nifti(tmp_path / name.lower(), ct(shape), placed(DIRECTIONS["oblique"]), kind).rename(tmp_path / name)
    check_on_image(tmp_path / name, mask_of(written, tmp_path))
    volume = read_volume(tmp_path / name)
    assert volume.array.shape == (*shape, 1)[:3]
    np.testing.assert_allclose(volume.spacing_mm, (0.703125, 0.8, 2.5), rtol=1e-6)
    assert volume.geometry == "file"


@pytest.mark.parametrize("dtype", ["<i2", ">i2", "<f4", ">f4", "<f8", "<i4", ">i8", "scaled", "zipped .nii"])
def test_values_are_read_in_any_type(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "a.nii"
    if dtype[0] in "<>":
        nib.save(nib.Nifti1Image(ct().astype(dtype), placed(np.eye(3)), nib.Nifti1Header(endianness=dtype[0])), path)
    else:
        nifti(path, ct(), placed(np.eye(3)))
    if dtype == "scaled":
        patched(path, (112, floats(0.5, -1024)), (352, ((ct() + 1024) * 2).astype("<i2").tobytes("F")))
    if dtype == "zipped .nii":
        path.write_bytes(gzip.compress(path.read_bytes()))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.array, ct())
    assert volume.array.dtype.isnative
    if dtype != "zipped .nii":
        check_on_image(path, mask_of(path, tmp_path))


def test_one_millimetre_is_a_known_spacing_and_units_count(tmp_path: Path) -> None:
    volume = read_volume(nifti(tmp_path / "a.nii", ct(), np.eye(4)))
    assert (volume.spacing_mm, volume.geometry) == ((1, 1, 1), "file")
    volume = read_volume(nifti(tmp_path / "a.nii", ct(), np.diag([0.001, 0.002, 0.003, 1]), xyzt_units=1))
    np.testing.assert_allclose(volume.spacing_mm, (1, 2, 3), rtol=1e-6)
    check_on_image(tmp_path / "a.nii", mask_of(tmp_path / "a.nii", tmp_path))


def test_headers_that_tell_no_place_are_refused(tmp_path: Path) -> None:
    sform, codes, quaternion = 280, 252, 256
    cases: list[tuple[list[tuple[int, bytes]], str]] = [
        ([(codes, shorts(0, 0))], "tells no orientation .sform and qform codes are 0"),
        ([(codes, shorts(1, 0)), (quaternion, floats(0.9, 0.9, 0.9))], "its qform is no orientation"),
        ([(codes, shorts(1, 0)), (80, floats(0, 1, 1))], "its qform is no orientation"),
        ([(sform, floats(*[0] * 12))], "its sform is no orientation"),
        ([(sform, floats(*[np.nan] * 12))], "its sform is no orientation"),
        ([(sform + 12, floats(np.nan))], "its sform is no orientation"),
        ([(sform + 32, floats(0, 0, 0, 0))], "its sform is no orientation"),
        ([(sform, floats(1, 1, 0, 0, 1, 1, 0, 0))], "its sform is no orientation"),
        ([(123, b"\x01")], "voxels of 703.125"),
        ([(123, b"\x03")], "voxels of 0.000703125"),
    ]
    for edits, what in cases:
        path = patched(nifti(tmp_path / "a.nii", ct(), placed(np.eye(3))), *edits)
        with pytest.raises(InputError, match=f"a.nii: .*{what}.*; ") as error:
            read_volume(path)
        assert "\n" not in str(error.value)
    # what is not used may be broken
    path = patched(nifti(tmp_path / "a.nii", ct(), placed(np.eye(3))), (quaternion, floats(0.9, 0.9, 0.9)))
    check_on_image(path, mask_of(path, tmp_path))


def test_other_contents_are_refused_by_name(tmp_path: Path) -> None:
    rgb, rgba = ([(name, "u1") for name in names] for names in (("R", "G", "B"), ("R", "G", "B", "A")))
    for array, what in [
        (np.zeros((4, 4, 4), rgb), "RGB colours .3 channels"),
        (np.zeros((4, 4, 4), rgba), "RGB colours .4 channels"),
        (ct().astype(np.complex64), "complex numbers"),
        (np.stack([ct()] * 2, -1), r"shape \(7, 6, 5, 2\), expected one volume"),
        (np.zeros((7, 6, 5, 1, 3), np.int16), "shape"),
        (np.where(ct() > 0, np.inf, ct()), "infinite"),
    ]:
        with pytest.raises(InputError, match=f"a.nii.gz: .*{what}"):
            read_volume(nifti(tmp_path / "a.nii.gz", array, np.eye(4)))


def test_damage_is_an_error_wherever_it_is(tmp_path: Path) -> None:
    good = nifti(tmp_path / "good.nii.gz", ct((16, 16, 16)), placed(np.eye(3))).read_bytes()
    path = tmp_path / "a.nii.gz"
    refused = 0
    for at in range(10, len(good), 61):
        path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
        try:
            np.testing.assert_array_equal(read_volume(path).array, ct((16, 16, 16)))
        except InputError:
            refused += 1
    assert refused > len(good) / 61 - 3
    for content, what in [
        (good[:-4], "ended before the end-of-stream"),
        (good[: len(good) // 2], "ended before the end-of-stream"),
        (good + b"more", "not a readable NIfTI file"),
        (b"text", "no NIfTI header"),
        (b"", "no NIfTI header"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"a.nii.gz: not a readable NIfTI file .*{what}|{what}"):
            read_volume(path)
    for edits, what in [
        ([(40, shorts(3, 30000, 30000, 30000))], "takes 54000000000000 bytes, it has 420"),
        ([(40, shorts(3, -7, 6, 5))], "shape"),
        ([(40, shorts(0))], "shape"),
        ([(40, shorts(9))], "not a readable"),
        ([(70, shorts(77))], "data code 77"),
        ([(108, floats(1e9))], "it has 0"),
        ([(108, floats(np.nan))], "not a readable"),
        ([(112, floats(1, np.inf))], "invalid intercept"),
    ]:
        plain = patched(nifti(tmp_path / "a.nii", ct(), placed(np.eye(3))), *edits)
        with pytest.raises(InputError, match=f"a.nii: .*{what}"):
            read_volume(plain)
    (tmp_path / "folder.nii").mkdir()
    (tmp_path / "link.nii").symlink_to("nowhere")
    nifti(tmp_path / "half.hdr", ct(), np.eye(4), nib.Nifti1Pair)
    (tmp_path / "half.img").unlink()
    for name, what in [
        ("none.nii", "no such file"),
        ("none.h5", "no such file"),
        ("link.nii", "no such file"),
        ("folder.nii", "is a folder"),
        ("half.hdr", "half.img: no such file"),
        ("scan.mgz", "is no volume"),
    ]:
        with pytest.raises(InputError, match=what):
            # Through MONAI's loader too, which tries its other readers when `read` raises.
            LoadImage(VolumeReader())(tmp_path / name)


@pytest.mark.parametrize("codes", ORDER[::5])
def test_nifti_in_any_orientation_and_h5_come_out_alike(tmp_path: Path, codes: str) -> None:
    hounsfield = ct((4, 5, 6))
    change = ornt_transform(axcodes2ornt(ORIENTATION), axcodes2ornt(codes))
    turned = apply_orientation(hounsfield, change)
    nifti(tmp_path / "case.nii.gz", turned, AFFINE @ inv_ornt_aff(change, hounsfield.shape))
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


def test_arrays_are_put_on_a_grid_by_turning_only() -> None:
    array, target = ct(), placed(DIRECTIONS["tilted and oblique"])
    for codes in ORDER:
        change = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(codes))
        turned, affine = apply_orientation(array, change), target @ inv_ornt_aff(change, SHAPE)
        np.testing.assert_array_equal(on_grid(turned, affine, target, SHAPE), array)
    rounded = target.copy()
    rounded[:3] = rounded[:3].round(4)
    rounded[2, 3] += 2e-3
    assert on_grid(array, rounded, target, SHAPE) is not None
    for edit in ((0, 3, 0.1), (2, 2, 0.05), (0, 1, 0.05)):
        off = target.copy()
        off[edit[:2]] += edit[2]
        assert on_grid(array, off, target, SHAPE) is None
    assert on_grid(array, target, target, (7, 6, 4)) is None
    assert on_grid(array, np.eye(4), placed(turn(2, 45)), SHAPE) is None


# Values


def scaled(image: np.ndarray) -> np.ndarray:
    return (image - image.min()) / np.ptp(image)


OUTSIDE = np.hypot(*np.ogrid[-1:1:40j, -1:1:40j])[..., None] > 1
BODY = np.random.default_rng(1).normal(np.where(np.arange(20) < 6, -100, 50), 15, (40, 40, 20))
SCAN = np.where(OUTSIDE, -1000, BODY)
COMPUTED = {
    "whole": SCAN,
    "cropped": SCAN[10:30, 10:30],
    "whole numbers": SCAN.astype(np.int16),
    "padded by −2000": np.where(OUTSIDE, -2000, BODY),
    "padded by −3024": np.where(OUTSIDE, -3024, BODY),
    "windowed to −200 … 300": SCAN.clip(-200, 300),
    "windowed to −57 … 164": SCAN.clip(-57, 164),
    "lungs": np.where(BODY > 0, -850, 20.0),
    "head": np.where(OUTSIDE, -1000, np.where(BODY > 0, 35, 1200)),
    "metal": np.where(BODY > 90, 30000, SCAN),
    "one slice": SCAN[..., 9:10],
    "not a number outside": np.where(OUTSIDE, np.nan, BODY),
}
OTHER = {
    "0 … 1": scaled(SCAN),
    "0 … 255": (255 * scaled(SCAN)).astype(np.uint8),
    "int8": (255 * scaled(SCAN) - 128).astype(np.int8),
    "−1 … 1": 2 * scaled(SCAN) - 1,
    "stored numbers": SCAN + 1024,
    "stored numbers, padded": np.where(OUTSIDE, -2000, BODY + 1024),
    "HU + 1000": SCAN + 1000,
    "z-scored": (SCAN - SCAN.mean()) / SCAN.std(),
    "constant": np.full(SCAN.shape, -100.0),
    "air": np.full(SCAN.shape, -1000.0),
    "MR": np.abs(np.random.default_rng(2).normal(600, 300, SCAN.shape)),
    "not a number, and 0 … 1": np.where(OUTSIDE, np.nan, scaled(BODY)),
    "no number": np.full(SCAN.shape, np.nan),
}


@pytest.mark.parametrize("kind", COMPUTED)
def test_ct_is_taken(kind: str) -> None:
    check_hounsfield(COMPUTED[kind], "a.nii")


@pytest.mark.parametrize("kind", OTHER)
def test_what_is_not_hounsfield_units_is_refused_unless_told(kind: str, tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", OTHER[kind], np.eye(4))
    with pytest.raises(InputError, match="a.nii: .* do not look like Hounsfield units; .*--assume_hu true"):
        LoadImage(VolumeReader())(path)
    assert LoadImage(VolumeReader(assume_hu=True))(path).isfinite().all()


def test_nan_is_taken_as_air_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = nifti(tmp_path / "a.nii", np.where(OUTSIDE, np.nan, BODY).astype(np.float32), np.eye(4))
    image = read_volume(path).array
    np.testing.assert_array_equal(image, np.where(OUTSIDE, -1024, BODY.astype(np.float32)))
    count = np.broadcast_to(OUTSIDE, BODY.shape).sum()
    assert f"a.nii: {count} of {BODY.size} voxels are NaN, taken as air" in caplog.text


def test_labels_are_whole_numbers_or_refused(tmp_path: Path) -> None:
    stored = np.array([0, 1, 2.99997, 13.009, 0.001, -0.004]).reshape(1, 2, 3)
    for path in (nifti(tmp_path / "a.nii", stored, np.eye(4)), write_h5(tmp_path / "a.h5", label=stored)):
        label = read_volume(path, "label").array
        assert label.dtype == np.uint8
        assert label.ravel().tolist() == [0, 1, 3, 13, 0, 0]
    assert whole_numbers(np.array([300]), "a").tolist() == [300]
    for value in (2.5, 2.98, -1, np.nan, np.inf, 1e9):
        with pytest.raises(InputError, match=r"a\.(nii|h5): .*expected (whole )?class numbers"):
            read_volume(nifti(tmp_path / "a.nii", np.where(stored == 1, value, stored), np.eye(4)), "label")
        with pytest.raises(InputError, match=r"a\.(nii|h5): .*expected (whole )?class numbers"):
            read_volume(write_h5(tmp_path / "a.h5", label=np.where(stored == 1, value, stored)), "label")


# HDF5


def windowed(hounsfield: np.ndarray) -> np.ndarray:
    return ((hounsfield.clip(-125, 275) + 125) / 400).astype(np.float32)


def write_h5(path: Path, attributes: dict[str, Any] | None = None, **datasets: np.ndarray) -> Path:
    """As `python -m prepare synapse` writes it, or with other attributes."""
    prepared = {"affine": AFFINE, "spacing_mm": SPACING, "window_hu": (-125.0, 275.0), "source": "x"}
    with h5py.File(path, "w") as file:
        for name, array in datasets.items():
            file[name] = array
        file.attrs.update(prepared if attributes is None else attributes)
    return path


def test_prepared_files_know_their_geometry(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "case0001.npy.h5", image=windowed(ct()), label=(ct() > 0).astype(np.uint8))
    image = LoadImaged("image", reader=VolumeReader())({"image": path})["image"]
    np.testing.assert_array_equal(image, windowed(ct()))
    np.testing.assert_allclose(image.affine, AFFINE)
    np.testing.assert_allclose(image.meta["spacing_mm"], SPACING)
    np.testing.assert_array_equal(LoadImage(VolumeReader("label"))(path), ct() > 0)
    mask = mask_of(path, tmp_path).with_name("case0001_pred.nii.gz")
    np.testing.assert_allclose(nib.load(mask).affine, AFFINE, atol=1e-5)
    assert nib.load(mask).header.get_xyzt_units()[0] == "mm"
    again = read_volume(mask, "label")
    assert again.geometry == "file"
    np.testing.assert_array_equal(again.array == 1, windowed(ct()) == 1)


def test_released_files_do_not_and_nor_do_their_masks(tmp_path: Path) -> None:
    path = write_h5(tmp_path / "case0001.npy.h5", {}, image=windowed(ct()))
    mask = mask_of(path, tmp_path).with_name("case0001_pred.nii.gz")
    for volume in (read_volume(path), read_volume(mask, "label")):
        assert (volume.geometry, volume.spacing_mm) == ("assumed", None)
        np.testing.assert_array_equal(volume.affine, SPL_AFFINE)
        assert "".join(nib.aff2axcodes(volume.affine)) == ORIENTATION == "SPL"
    assert read_volume(path).window_hu == (-125, 275)
    told = read_volume(write_h5(path, {"spacing_mm": (3, 0.9, 0.8)}, image=windowed(ct())))
    assert (told.geometry, told.spacing_mm) == ("assumed", (3, 0.9, 0.8))
    np.testing.assert_allclose(nib.affines.voxel_sizes(told.affine), (3, 0.9, 0.8))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-0.1, 1.16), (0, 1.000001)])
def test_released_files_overshoot(tmp_path: Path, low: float, high: float) -> None:
    image = (low + (high - low) * scaled(ct().clip(-125, 275))).astype(np.float32)
    np.testing.assert_array_equal(read_volume(write_h5(tmp_path / "a.h5", {}, image=image)).array, image)
    np.savez(tmp_path / "a.npz", image=image[0], label=np.zeros(image.shape[1:], np.uint8))
    np.testing.assert_array_equal(LoadImage(SliceReader())(tmp_path / "a.npz"), image[0])


def test_other_hdf5_files_are_refused(tmp_path: Path) -> None:
    image, path = windowed(ct()), tmp_path / "a.h5"
    nan = np.where(image == 1, np.nan, image)
    for attributes, array, what in [
        ({}, ct().astype(np.float32), "-.* to 2000 and no attribute 'window_hu'"),
        ({"window_hu": (-125, 275)}, ct().astype(np.float32), "from -.* to 2000"),
        ({}, 255 * image, "window_hu"),
        ({}, 6 * image - 3, "window_hu"),
        ({}, nan, "holds NaN"),
        (None, nan, "holds NaN"),
        ({}, 0 * image, "holds 0 in every voxel"),
        ({}, image * 1j, "complex numbers"),
        ({}, np.full(SHAPE, b"a"), "S1"),
        ({}, image[0], "shape"),
        ({}, image[None], "shape"),
        ({}, image[:0], "shape"),
        ({}, np.stack([image[:6, 0]] * 6), r"\(6, 6, 5\), which looks like \(H, W, D\)"),
        ({"affine": np.eye(3)}, image, "'affine' is"),
        ({"affine": AFFINE * np.nan}, image, "'affine' is"),
        ({"affine": AFFINE * 0}, image, "'affine' is no orientation"),
        ({"affine": "x"}, image, "'affine' is x"),
        ({"spacing_mm": (3, -1, 1)}, image, "'spacing_mm' is"),
        ({"spacing_mm": (3, 1, 1), "affine": SPL_AFFINE}, image, "'affine' gives"),
        ({"window_hu": (275, -125)}, image, "'window_hu' is"),
    ]:
        with pytest.raises(InputError, match=f"a.h5: .*{what}") as error:
            read_volume(write_h5(path, attributes, image=array))
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="no data set 'label', it holds image"):
        LoadImage(VolumeReader("label"))(write_h5(path, image=image))
    with h5py.File(path, "w") as file:
        file.create_group("image")
    with pytest.raises(InputError, match="'image' is a group"):
        read_volume(path)
    with h5py.File(path, "w") as file:
        file["image"] = h5py.SoftLink("/nowhere")
    with pytest.raises(InputError, match="not a readable HDF5 file"):
        read_volume(path)


def test_half_written_and_cut_hdf5_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    for claimed, chunks in (((7, 6, 5), (1, 6, 5)), ((10**5,) * 3, (1, 1000, 1000)), ((10**4,) * 3, None)):
        with h5py.File(path, "w") as file:
            data = file.create_dataset("image", claimed, np.float32, chunks=chunks)
            if claimed == SHAPE:
                data[:4] = windowed(ct())[:4]
        with pytest.raises(InputError, match="a.h5: data set 'image' was not written whole"):
            read_volume(path)
    content = write_h5(path, image=windowed(ct())).read_bytes()
    for part in (content[:10], content[: len(content) // 2], b"text", b""):
        path.write_bytes(part)
        with pytest.raises(InputError, match="a.h5: not a readable HDF5 file"):
            read_volume(path)


# Slices


def write_slice(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_slices_one_and_several(tmp_path: Path) -> None:
    images, labels = windowed(ct()), (ct() > 0).astype(np.uint8)
    files = [
        write_slice(tmp_path / f"{index}.npz", image=image, label=label)
        for index, (image, label) in enumerate(zip(images, labels, strict=True))
    ]
    np.testing.assert_array_equal(LoadImage(SliceReader())(files[2]), images[2])
    np.testing.assert_array_equal(LoadImage(SliceReader("label"))(files[2]), labels[2])
    np.testing.assert_array_equal(LoadImage(SliceReader())(files), images)
    np.testing.assert_array_equal(LoadImage(SliceReader("label", stack=True))(files), labels)
    # a case of one slice is a volume too
    np.testing.assert_array_equal(LoadImage(SliceReader(stack=True))(files[:1]), images[:1])
    write_slice(files[1], image=images[1, 1:], label=labels[1, 1:])
    with pytest.raises(InputError, match=r"1.npz: shape \(5, 5\), but 0.npz has \(6, 5\)"):
        LoadImage(SliceReader())(files)


IMAGE, LABEL = windowed(ct())[3], (ct()[3] > 0).astype(np.uint8)


@pytest.mark.parametrize(
    ("dataset", "arrays", "what"),
    [
        ("image", {"label": LABEL}, "no array 'image', it holds label"),
        ("label", {"image": IMAGE}, "no array 'label', it holds image"),
        ("label", {"image": IMAGE, "label": LABEL + 0.3}, "expected whole class numbers"),
        ("label", {"image": IMAGE, "label": LABEL - 1.0}, "from -1 to 0"),
        ("label", {"image": IMAGE, "label": LABEL * np.nan}, "holds NaN"),
        ("label", {"image": IMAGE, "label": LABEL[1:]}, r"'image' has shape \(6, 5\), 'label' \(5, 5\)"),
        ("label", {"image": IMAGE, "label": LABEL.astype(object)}, "not a readable npz file"),
        ("image", {"image": IMAGE.astype(object), "label": LABEL}, "not a readable npz file"),
        ("image", {"image": IMAGE * 1j, "label": LABEL}, "complex"),
        ("image", {"image": ct()[3], "label": LABEL}, r"expected an image windowed to \[0, 1\]"),
        ("image", {"image": IMAGE * 255, "label": LABEL}, r"expected an image windowed to \[0, 1\]"),
        ("image", {"image": np.where(IMAGE > 0.5, np.nan, IMAGE), "label": LABEL}, "holds NaN"),
        ("image", {"image": np.where(IMAGE > 0.5, np.inf, IMAGE), "label": LABEL}, "to inf"),
        ("image", {"image": IMAGE[None], "label": LABEL[None]}, "shape"),
        ("image", {"image": IMAGE[:0], "label": LABEL[:0]}, "shape"),
    ],
)
def test_other_slices_are_refused(tmp_path: Path, dataset: str, arrays: dict[str, np.ndarray], what: str) -> None:
    path = write_slice(tmp_path / "case0005_slice000.npz", **arrays)
    with pytest.raises(InputError, match=f"case0005_slice000.npz: .*{what}") as error:
        LoadImage(SliceReader(dataset))(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_slices_are_refused(tmp_path: Path, save: Callable[..., None]) -> None:
    path = tmp_path / "a.npz"
    save(path, image=IMAGE, label=LABEL)
    content = path.read_bytes()
    refused = 0
    for at in range(0, len(content), 3):
        path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
        for dataset, true in (("image", IMAGE), ("label", LABEL)):
            reader = SliceReader(dataset)
            try:
                np.testing.assert_array_equal(reader.get_data(reader.read(path))[0], true)
            except InputError:
                refused += 1
    assert refused > len(content) / 6
    np.save(tmp_path / "b.npy", IMAGE)
    for part in (content[:10], content[:-5], b"text", b"", (tmp_path / "b.npy").read_bytes()):
        path.write_bytes(part)
        with pytest.raises(InputError, match=r"a\.npz: (not a readable|is no) npz file"):
            LoadImage(SliceReader())(path)
    with pytest.raises(InputError, match="none.npz: no such file"):
        LoadImage(SliceReader())(tmp_path / "none.npz")


# Writing


def test_masks_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nifti(tmp_path / "a.nii.gz", ct(), placed(np.eye(3)))
    before = mask_of(path, tmp_path / "out").read_bytes()

    def full(image: nib.Nifti1Image, file: str | Path) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(nib, "save", full)
    with pytest.raises(RuntimeError):
        mask_of(path, tmp_path / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == {"a_pred.nii.gz": before}


def test_what_is_not_on_the_images_grid_is_not_written(tmp_path: Path) -> None:
    image = LoadImage(VolumeReader())(nifti(tmp_path / "a.nii.gz", ct(), placed(np.eye(3))))
    label = (image[None] > 0).to(torch.uint8)
    for wrong in (label[:, 1:], label.clone()):
        if wrong.shape == label.shape:
            wrong.affine = torch.diag(torch.tensor([1.0, 2, 3, 1]))
        with pytest.raises(ValueError, match="are not those of the image"):
            SaveImageVolumed("pred", tmp_path / "out")({"pred": wrong})
    assert not list((tmp_path / "out").glob("*"))


def test_logging_is_quiet_about_good_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        mask_of(nifti(tmp_path / "a.nii.gz", ct(), placed(DIRECTIONS["oblique"])), tmp_path)
    assert not caplog.records


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("dataset", ["image", "label"])
def test_noise_in_the_header_of_an_array_is_one_line(seed: int, dataset: str, tmp_path: Path) -> None:
    arrays = {name: io.BytesIO() for name in ("image", "label")}
    for name, stream in arrays.items():
        np.save(stream, np.zeros((4, 5), np.float32 if name == "image" else np.uint8))
    rng = np.random.default_rng(seed)
    content = bytearray(arrays["image"].getvalue())
    letters = np.frombuffer(b"(){}[]'\\\"#,:= \n\t0x\0\xff", np.uint8)
    content[10:60] = rng.choice(letters, 50).tobytes() if seed % 2 else rng.bytes(50)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", bytes(content))
        archive.writestr("label.npy", arrays["label"].getvalue())
    with pytest.raises(InputError, match=r"a\.npz: not a readable npz file"):
        SliceReader(dataset).get_data((tmp_path / "a.npz",))
