"""NRRD and MetaImage: read as ITK reads them, masks in the same format on the same grid, the rest refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.transforms.test_volumes import DIRECTIONS, MARK, ct, mask_of, placed
from transforms import InputError, read_volume
from transforms.itk import read_itk, write_itk

SUFFIXES = (".nrrd", ".nhdr", ".mha", ".mhd")
WRITTEN = {".nrrd": ".nrrd", ".nhdr": ".nrrd", ".mha": ".mha", ".mhd": ".mha"}
LPS = np.diag([-1.0, -1, 1, 1])


def saved(path: Path, affine: np.ndarray | None = None, array: np.ndarray | None = None, packed: bool = True) -> Path:
    """A file of ITK's own, whose voxels lie where the affine, index → RAS mm, says."""
    image = sitk.GetImageFromArray((ct() if array is None else array).T)
    lps = LPS @ (placed(DIRECTIONS["oblique"]) if affine is None else affine)
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetSpacing(spacing.tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(path), packed)
    return path


def edited(path: Path, *changes: tuple[str, str]) -> Path:
    """The file with patterns in its header replaced."""
    content = path.read_bytes()
    for old, new in changes:
        content, found = re.subn(old.encode(), new.encode(), content, count=1)
        assert found, old
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("directions", ["straight", "mirrored", "permuted", "oblique", "halfway"])
def test_volumes_lie_where_itk_sees_them_and_masks_on_them(tmp_path: Path, directions: str, suffix: str) -> None:
    affine = placed(DIRECTIONS[directions])
    file = saved(tmp_path / f"a{suffix}", affine)
    volume = read_volume(file)
    np.testing.assert_array_equal(volume.array, ct())
    np.testing.assert_allclose(volume.affine, affine, atol=1e-12)
    np.testing.assert_allclose(volume.spacing_mm or (), [0.703125, 0.8, 2.5])
    mask_of(file, tmp_path / "out")
    scan, mask = sitk.ReadImage(str(file)), sitk.ReadImage(str(tmp_path / f"out/a_pred{WRITTEN[suffix]}"))
    assert [one.name for one in (tmp_path / "out").iterdir()] == [f"a_pred{WRITTEN[suffix]}"]
    assert scan.GetSize() == mask.GetSize()
    for fact in ("GetOrigin", "GetSpacing", "GetDirection"):
        # NRRD stores direction and spacing as one product
        last_bits = 1e-15 if WRITTEN[suffix] == ".nrrd" and fact != "GetOrigin" else 0
        np.testing.assert_allclose(getattr(mask, fact)(), getattr(scan, fact)(), rtol=0, atol=last_bits, err_msg=fact)
    assert mask[MARK] == 1
    assert sitk.GetArrayFromImage(mask).sum() == 1


def test_labels_and_four_dimensions_of_one_volume_are_read(tmp_path: Path) -> None:
    labels = (ct() > 0).astype(np.uint8)
    assert (read_volume(saved(tmp_path / "label.nrrd", array=labels), "label").array == labels).all()
    four = sitk.JoinSeries([sitk.ReadImage(str(saved(tmp_path / "a.mha")))])
    sitk.WriteImage(four, str(tmp_path / "four.mha"))
    np.testing.assert_array_equal(read_volume(tmp_path / "four.mha").array, ct())


NOT_ONE_VOLUME: dict[str, tuple[Callable[[Path], object], str]] = {
    "two times": (
        lambda path: sitk.WriteImage(sitk.JoinSeries([sitk.GetImageFromArray(ct())] * 2), str(path)),
        r"shape \(5, 6, 7, 2\), expected one volume",
    ),
    "a picture": (lambda path: sitk.WriteImage(sitk.GetImageFromArray(ct()[0]), str(path)), "expected one volume"),
    "vectors": (
        lambda path: sitk.WriteImage(sitk.GetImageFromArray(np.zeros((5, 6, 7, 3)), isVector=True), str(path)),
        "holds 3 numbers a voxel",
    ),
    "complex": (
        lambda path: sitk.WriteImage(sitk.GetImageFromArray(ct() + 1j), str(path)),
        "complex numbers|2 numbers a voxel|not a readable",
    ),
    "no Hounsfield units": (lambda path: saved(path, array=ct() + np.int16(1024)), "Hounsfield"),
    "something else": (lambda path: path.write_bytes(b"\x89PNG" * 50), "not a readable"),
    "nothing": (lambda path: path.touch(), "not a readable"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "not there": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("name", NOT_ONE_VOLUME)
def test_other_contents_are_refused_by_name(tmp_path: Path, name: str, suffix: str) -> None:
    write, message = NOT_ONE_VOLUME[name]
    write(tmp_path / f"a{suffix}")
    with pytest.raises(InputError, match=message) as raised:
        read_volume(tmp_path / f"a{suffix}")
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith(str(tmp_path / f"a{suffix}"))


UNPLACED = {
    "no orientation": (".mha", ("TransformMatrix", "Comment"), "no orientation"),
    "no spacing": (".mha", ("ElementSpacing", "Comment"), "no orientation or no spacing"),
    "no directions": (".nrrd", ("space directions: .*", "spacings: 1 1 1"), "no orientation|not a readable"),
    "other space": (".nrrd", ("left-posterior-superior", "scanner-xyz"), "does not say where the patient's left"),
    "metres": (".nrrd", ("kinds:", 'space units: "m" "m" "m"\nkinds:'), "space units are m, expected mm"),
    "flat": (".mha", ("TransformMatrix = .*", "TransformMatrix = 1 0 0 1 0 0 0 0 1"), "orientation|not a readable"),
    "voxels of 0 mm": (".mha", ("ElementSpacing = .*", "ElementSpacing = 0 1 1"), "voxels|not a readable"),
    "voxels of 5 m": (".mha", ("ElementSpacing = .*", "ElementSpacing = 5000 1 1"), "voxels of 5000"),
}


@pytest.mark.parametrize("name", UNPLACED)
def test_headers_that_tell_no_place_are_refused(tmp_path: Path, name: str) -> None:
    suffix, change, message = UNPLACED[name]
    with pytest.raises(InputError, match=message):
        read_volume(edited(saved(tmp_path / f"a{suffix}"), change))


def test_spaces_of_nrrd_are_turned_to_ras(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.nrrd", np.diag([2.0, 3, 4, 1]))
    signs = {"left-posterior-superior": [2, 3], "right-anterior-superior": [-2, -3], "LAS": [2, -3]}
    last = "left-posterior-superior"
    for space, (x, y) in signs.items():
        affine = read_volume(edited(file, (f"space: {last}", f"space: {space}"))).affine
        assert affine.diagonal().tolist() == [x, y, 4, 1]
        last = space


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("packed", [True, False])
def test_damage_is_one_line_wherever_it_is(tmp_path: Path, suffix: str, packed: bool) -> None:
    file = saved(tmp_path / f"a{suffix}", packed=packed)
    parts = [one for one in tmp_path.iterdir() if one != file] or [file]
    whole = parts[0].read_bytes()
    for length in range(len(whole) - 400, len(whole), 7) if parts[0] == file else range(0, len(whole), 7):
        parts[0].write_bytes(whole[: max(length, 0)])
        with pytest.raises(InputError) as raised:
            read_itk(file)
        assert "\n" not in str(raised.value)
    if packed:
        data = len(whole) - 200
        for place in range(data, len(whole), 3):
            parts[0].write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
            with pytest.raises(InputError, match="not a readable"):
                read_itk(file)
    if parts[0] != file:
        parts[0].unlink()
        with pytest.raises(InputError, match=r"its voxels are in a\.z?raw(\.gz)?, which is not there"):
            read_itk(file)


def test_nothing_is_left_of_a_mask_that_could_not_be_written(tmp_path: Path) -> None:
    geometry = read_itk(saved(tmp_path / "a.nrrd"))[2]
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a_pred.nrrd").mkdir()
    with pytest.raises(OSError, match="a_pred"):
        write_itk(tmp_path / "out/a_pred", np.zeros((7, 6, 5), np.uint8), geometry)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a_pred.nrrd"]


def test_sheared_grids_keep_their_shear(tmp_path: Path) -> None:
    directions = "space directions: (1,0,0) (0.3,1,0) (0,0,1)"
    file = edited(saved(tmp_path / "a.nrrd", np.eye(4)), ("space directions: .*", directions))
    np.testing.assert_allclose(read_volume(file).affine, [[-1, -0.3, 0, 0], [0, -1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    mask_of(file, tmp_path / "out")
    mask = sitk.ReadImage(str(tmp_path / "out/a_pred.nrrd"))
    assert mask[MARK] == 1
    np.testing.assert_allclose(read_itk(tmp_path / "out/a_pred.nrrd")[1], read_itk(file)[1], atol=1e-12)
