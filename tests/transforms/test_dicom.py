"""DICOM: series and segmentations lie where positions say, for others too; what makes no grid is refused."""

from __future__ import annotations

import importlib.util
import json
import locale
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, decollate_batch
from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd

from tests.transforms.test_volumes import turn
from transforms import (
    ORIENTATION,
    PICTURE_SUFFIXES,
    VOLUME_SUFFIXES,
    InputError,
    PictureReader,
    SaveImageMaskd,
    SaveImageVolumed,
    VolumeReader,
    find_files,
)
from transforms.dicom import STRUCTURES, read_frame, read_series

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")

import SimpleITK as sitk  # noqa: E402  (after what may be missing)
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, RLELossless  # noqa: E402

from tests import dicom_files  # noqa: E402

ORGANS = [name for name in STRUCTURES if name != "lesion"]


def right_handed(columns: np.ndarray) -> np.ndarray:
    """Directions of slices, rows and columns; slices go where rows and columns do not."""
    columns = columns.copy()
    # DICOM's rows and columns may lie in any way; slices are then numbered along the normal
    columns[:, 0] = np.cross(columns[:, 2], columns[:, 1])
    return columns


AXES = {
    "".join(f"{'+-'[sign < 0]}{'xyz'[axis]}" for axis, sign in zip(order, signs, strict=True)): np.eye(3)[
        :, list(order)
    ]
    * signs
    for order in permutations(range(3))
    for signs in product((1, -1), repeat=3)
}
OBLIQUE = {
    "oblique": turn(0, 20) @ turn(2, 33),
    "halfway": turn(2, 45),
    "coronal oblique": turn(1, 12) @ np.eye(3)[[2, 0, 1]],
}
SOME = {name: AXES[name] for name in ("+z+y+x", "-z+y+x", "+y-z+x", "-x+z-y")} | OBLIQUE


def predicted(item: dict[str, Any], folder: Path, seg_type: str = "binary") -> Path:
    """The segmentation of the phantom by its values, by way of the steps of the bundle's inference."""
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
            SaveImageVolumed("pred", folder, classes=ORGANS, seg_type=seg_type, algorithm="test"),
        ]
    )
    for batch in DataLoader(Dataset([item], before), batch_size=1):
        image = batch["image"]
        batch["pred"] = sum((image == value) * number for number, value in enumerate(dicom_files.ORGANS, 1)).to(
            torch.uint8
        )
        for one in decollate_batch(batch):
            after(one)
    return folder / f"{item['name']}_seg.dcm"


def by_dcmqi(segmentation: Path, folder: Path) -> dict[str, Any]:
    """Name of each segment → its mask as dcmqi reads it."""
    program = shutil.which("segimage2itkimage", path=str(Path(sys.executable).parent)) or shutil.which(
        "segimage2itkimage"
    )
    if program is None:
        pytest.skip("dcmqi (pip install dcmqi) is not installed")
    folder.mkdir()
    command = [program, "--inputDICOM", str(segmentation), "--outputDirectory", str(folder), "--outputType", "nrrd"]
    subprocess.run(command, check=True, capture_output=True)
    meta = json.loads((folder / "meta.json").read_text())
    names = {part["labelID"]: part["SegmentLabel"] for group in meta["segmentAttributes"] for part in group}
    return {names[number]: sitk.ReadImage(str(folder / f"{number}.nrrd")) for number in names}


def check_on_phantom(segmentation: Path, files: list[Path], folder: Path) -> None:
    """Each organ lies in space where the phantom has it: compared at the places of its voxels."""
    found = by_dcmqi(segmentation, folder)
    assert sorted(found) == sorted(ORGANS)
    headers = [pydicom.dcmread(file) for file in files]
    for number, name in enumerate(ORGANS, 1):
        mask = found[name]
        marked = 0
        for header in headers:
            right, down = np.split(np.array(header.ImageOrientationPatient, float), 2)
            stored = header.pixel_array.astype(int) - 1024
            for row, column in np.argwhere(stored == dicom_files.ORGANS[number - 1]):
                place = np.array(header.ImagePositionPatient, float)
                place = place + right * column * header.PixelSpacing[1] + down * row * header.PixelSpacing[0]
                index = np.array(mask.TransformPhysicalPointToContinuousIndex(place.tolist()))
                assert np.abs(index - np.rint(index)).max() < 0.02
                assert mask[tuple(int(one) for one in np.rint(index))] == number, name
                marked += 1
        assert marked == np.count_nonzero(sitk.GetArrayFromImage(mask)) > 0


def round_trip(tmp_path: Path, directions: np.ndarray) -> tuple[Path, list[Path]]:
    files = dicom_files.series(tmp_path / "in/scan", dicom_files.hounsfield(), directions)
    (item,) = find_files(tmp_path / "in", VOLUME_SUFFIXES, dicom="series", recursive=True)
    assert item["name"] == "scan"
    return predicted(item, tmp_path / "out"), files


@pytest.mark.parametrize("directions", SOME)
def test_segmentations_lie_on_the_phantom_for_dcmqi(tmp_path: Path, directions: str) -> None:
    segmentation, files = round_trip(tmp_path, SOME[directions])
    check_on_phantom(segmentation, files, tmp_path / "dcmqi")


@pytest.mark.parametrize("directions", AXES)
def test_every_orientation_of_axes(tmp_path: Path, directions: str) -> None:
    along = AXES[directions]
    files = dicom_files.series(tmp_path / "scan", dicom_files.hounsfield(), along)
    array, affine, spacing, source = read_series(files)
    assert spacing == pytest.approx(dicom_files.SPACING)
    # each voxel lies where its own file says, in whatever order slices come
    ordered = json.loads(source)
    for k in (0, len(files) // 2, len(files) - 1):
        header = pydicom.dcmread(ordered[k])
        np.testing.assert_array_equal(array[k], header.pixel_array.astype(int) - 1024)
        for row, column in ((0, 0), (3, 5)):
            right, down = np.split(np.array(header.ImageOrientationPatient, float), 2)
            place = np.array(header.ImagePositionPatient) + right * column * 0.7 + down * row * 0.8
            np.testing.assert_allclose((affine @ [k, row, column, 1])[:3], place * [-1, -1, 1], atol=1e-6)


@pytest.mark.soak
@pytest.mark.parametrize("directions", AXES)
def test_segmentations_lie_on_the_phantom_in_every_orientation(tmp_path: Path, directions: str) -> None:
    segmentation, files = round_trip(tmp_path, AXES[directions])
    check_on_phantom(segmentation, files, tmp_path / "dcmqi")


@pytest.mark.parametrize("seg_type", ["binary", "labelmap"])
def test_segments_have_names_codes_colours_and_sources(tmp_path: Path, seg_type: str) -> None:
    files = dicom_files.series(tmp_path / "scan", dicom_files.hounsfield())
    segmentation = pydicom.dcmread(
        predicted({"image": [str(file) for file in files], "name": "a/b"}, tmp_path / "out", seg_type)
    )
    assert segmentation.SegmentationType == seg_type.upper()
    described = [part for part in segmentation.SegmentSequence if part.SegmentNumber > 0]
    assert [part.SegmentLabel for part in described] == ORGANS
    for part in described:
        code = part.SegmentedPropertyTypeCodeSequence[0]
        assert (code.CodeValue, code.CodingSchemeDesignator) == (STRUCTURES[part.SegmentLabel][0], "SCT")
        assert part.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "91723000"
        assert part.SegmentationAlgorithmIdentificationSequence[0].AlgorithmName == "test"
    assert len({tuple(part.RecommendedDisplayCIELabValue) for part in described}) == len(ORGANS)
    source = pydicom.dcmread(files[0])
    for name in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert segmentation.get(name) == source.get(name)
    referenced = segmentation.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == source.SeriesInstanceUID
    told = {one.ReferencedSOPInstanceUID for one in referenced.ReferencedInstanceSequence}
    assert told <= {pydicom.dcmread(file).SOPInstanceUID for file in files}
    assert [file.name for file in (tmp_path / "out/a").iterdir()] == ["b_seg.dcm"]


def errors_of(file: Path) -> list[str]:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian dicom3tools) is not installed")
    done = subprocess.run(["dciodvfy", "-new", str(file)], capture_output=True, text=True)
    return [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("Error")]


def test_dciodvfy_has_no_complaint(tmp_path: Path) -> None:
    segmentation, _ = round_trip(tmp_path, AXES["+z+y+x"])
    assert errors_of(segmentation) == []


def test_empty_masks_and_single_slices_are_written(tmp_path: Path) -> None:
    array = dicom_files.hounsfield()
    array[array > -100] = 900
    for name, some in (("empty", array), ("single", dicom_files.hounsfield()[4:5])):
        dicom_files.series(tmp_path / name, some)
        (item,) = find_files(tmp_path / name, VOLUME_SUFFIXES, dicom="series")
        segmentation = pydicom.dcmread(predicted(item, tmp_path / "out"))
        assert len(segmentation.SegmentSequence) == 8
        assert segmentation.pixel_array.any() == (name == "single")


def test_enhanced_ct_is_a_volume_in_one_file(tmp_path: Path) -> None:
    files = dicom_files.series(tmp_path / "scan", dicom_files.hounsfield(), SOME["oblique"])
    headers = [pydicom.dcmread(file) for file in files]
    uid = pydicom.uid.generate_uid
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        enhanced = highdicom.legacy.LegacyConvertedEnhancedCTImage(headers, uid(), 5, uid(), 1)
    enhanced.save_as(tmp_path / "enhanced.dcm")
    (item,) = find_files(tmp_path / "enhanced.dcm", VOLUME_SUFFIXES, dicom="series")
    array, affine, spacing, _ = read_series([item["image"]])
    known = read_series(files)
    np.testing.assert_array_equal(array, known[0])
    np.testing.assert_allclose(affine, known[1], atol=1e-6)
    assert spacing == pytest.approx(known[2])
    check_on_phantom(predicted(item, tmp_path / "out"), files, tmp_path / "dcmqi")


def moved(files: list[Path], index: int, name: str, value: Any) -> None:
    header = pydicom.dcmread(files[index])
    setattr(header, name, value)
    header.save_as(files[index])


def position(files: list[Path], index: int) -> list[float]:
    return [float(value) for value in pydicom.dcmread(files[index]).ImagePositionPatient]


BROKEN: dict[str, tuple[Callable[[list[Path]], object], str]] = {
    "missing": (lambda files: files.pop(5).unlink(), r"lacks 1 slice: 5 mm between IM00\d\d and IM00\d\d, 2\.5 mm"),
    "two missing": (lambda files: [files.pop(k).unlink() for k in (8, 3)], "lacks 2 slices"),
    "doubled": (lambda files: files.append(Path(shutil.copy(files[4], files[4].with_name("copy")))), "doubled slices"),
    "shifted onto another": (
        lambda files: moved(files, 3, "ImagePositionPatient", position(files, 4)),
        "doubled slices",
    ),
    "uneven": (lambda files: moved(files, 11, "ImagePositionPatient", [-20.5, 31.25, -371.5]), "uneven steps"),
    "turned": (lambda files: moved(files, 5, "ImageOrientationPatient", [0, 1, 0, 1, 0, 0]), "do not lie parallel"),
    "other size": (lambda files: moved(files, 5, "PixelSpacing", [1, 1]), "PixelSpacing"),
    "no position": (lambda files: moved(files, 2, "ImagePositionPatient", None), "lacks ImagePositionPatient"),
    "other kind": (lambda files: moved(files, 2, "Modality", "MR"), "is MR, whose values are not Hounsfield units"),
    "cut": (lambda files: files[6].write_bytes(files[6].read_bytes()[:-100]), "not a readable DICOM file"),
    "headless": (lambda files: files[6].write_bytes(b"\0" * 50), "not a readable DICOM file"),
    "captured": (lambda files: moved(files, 0, "SOPClassUID", "1.2.840.10008.5.1.4.1.1.7"), "captured picture"),
    "energies": (lambda files: moved(files, 0, "RescaleType", "MGML"), "its values are MGML"),
    "flat pixels": (lambda files: moved(files, 0, "PixelSpacing", [0, 1]), "PixelSpacing"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_series_that_make_no_grid_are_refused_by_name(tmp_path: Path, name: str) -> None:
    files = dicom_files.series(tmp_path / "scan", dicom_files.hounsfield())
    change, message = BROKEN[name]
    change(files)
    with pytest.raises(InputError, match=message) as raised:
        read_series(files)
    assert str(raised.value).startswith(str(tmp_path / "scan"))
    assert "\n" not in str(raised.value)


def test_tilted_gantries_are_refused_and_rounded_positions_are_not(tmp_path: Path) -> None:
    tilted = dicom_files.series(tmp_path / "tilted", dicom_files.hounsfield(), shift=(0, 0.5, 0))
    with pytest.raises(InputError, match=r"tilted gantry: slices are shifted against each other by 11\.3°"):
        read_series(tilted)
    rounded = dicom_files.series(tmp_path / "rounded", dicom_files.hounsfield(), step=0.625)
    for k in range(len(rounded)):
        x, y, z = position(rounded, k)
        moved(rounded, k, "ImagePositionPatient", [x, y, round(z, 2)])
    assert read_series(rounded)[2][0] == pytest.approx(0.625, abs=0.002)


def test_attributes_that_may_be_empty_may_be_missing(tmp_path: Path) -> None:
    missing = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
               "AccessionNumber", "ReferringPhysicianName", "SeriesNumber", "PositionReferenceIndicator",
               "Manufacturer", "InstanceNumber", "SliceThickness", "SOPClassUID")  # fmt: skip
    files = dicom_files.series(tmp_path / "scan", dicom_files.hounsfield(), **dict.fromkeys(missing))
    item = {"image": [str(file) for file in files], "name": "scan"}
    check_on_phantom(predicted(item, tmp_path / "out"), files, tmp_path / "dcmqi")


def test_series_of_one_folder_are_told_apart(tmp_path: Path) -> None:
    folder = tmp_path / "study"
    for number in (2, 3):
        files = dicom_files.series(folder, dicom_files.hounsfield()[: 4 + number], seed=number, SeriesNumber=number)
        for file in files:
            file.rename(folder / f"{number}_{file.name}.dcm")
    dicom_files.series(folder / "scout", dicom_files.hounsfield()[:1], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    dicom_files.series(folder / "deep/er", dicom_files.hounsfield()[:3])
    (folder / "notes.txt").touch()
    items = find_files(folder, VOLUME_SUFFIXES, dicom="series", recursive=True)
    assert sorted((item["name"], len(item["image"])) for item in items) == [
        ("deep/er", 3),
        ("study_2", 6),
        ("study_3", 7),
    ]


@contextmanager
def locale_kept() -> Iterator[None]:
    """GDCM's writer leaves the program with the locale C, and files are read as ASCII from then on."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def test_lossless_jpeg_and_jpeg_2000_are_decoded(tmp_path: Path) -> None:
    pixels = dicom_files.hounsfield()
    for name, compressor in (("jpeg", "JPEG"), ("j2k", "JPEG2000")):
        files = dicom_files.series(tmp_path / name, pixels)
        for file in files:
            image = sitk.ReadImage(str(file))
            writer = sitk.ImageFileWriter()
            writer.SetImageIO("GDCMImageIO")
            writer.KeepOriginalImageUIDOn()
            writer.SetUseCompression(True)
            writer.SetCompressor(compressor)
            # without the keys that describe pixels, which GDCM writes itself
            writer.SetFileName(str(file.with_suffix(".dcm")))
            with locale_kept():
                writer.Execute(image)
            compressed, plain = pydicom.dcmread(file.with_suffix(".dcm")), pydicom.dcmread(file)
            plain.PixelData = compressed.PixelData
            plain.file_meta.TransferSyntaxUID = compressed.file_meta.TransferSyntaxUID
            for attribute in ("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "RescaleIntercept"):
                setattr(plain, attribute, compressed.get(attribute))
            file.with_suffix(".dcm").unlink()
            plain["PixelData"].is_undefined_length = True
            plain.save_as(file)
            assert plain.file_meta.TransferSyntaxUID.is_compressed
        array = read_series(files)[0]
        assert {tuple(map(tuple, one)) for one in array[:, :2, :8]} == {
            tuple(map(tuple, one)) for one in pixels[:, :2, :8]
        }


COLOURS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
GREY = COLOURS[..., 0]


def palette(file: Any) -> None:
    dicom_files.grey(file, GREY // 2, 8, "PALETTE COLOR")
    for index, name in enumerate(("Red", "Green", "Blue")):
        table = (np.arange(128, dtype=np.uint16) * (index + 1) % 256) << 8
        setattr(file, f"{name}PaletteColorLookupTableDescriptor", [128, 0, 16])
        setattr(file, f"{name}PaletteColorLookupTableData", table.tobytes())
        file[f"{name}PaletteColorLookupTableData"].VR = "OW"


def windowed(file: Any) -> None:
    dicom_files.grey(file, GREY.astype(np.uint16) * 16, 12)
    file.WindowCenter, file.WindowWidth = 1024, 2048


PALETTE = np.stack([GREY // 2 * (k + 1) for k in range(3)], axis=-1)
AS_GREY = np.stack([GREY] * 3, axis=-1)
PICTURES: dict[str, tuple[Callable[[Any], object], np.ndarray, int]] = {
    "RGB": (lambda file: dicom_files.colours(file, COLOURS), COLOURS, 0),
    "planes": (lambda file: dicom_files.colours(file, COLOURS, planar=1), COLOURS, 0),
    "grey": (lambda file: dicom_files.grey(file, GREY, 8), AS_GREY, 0),
    "inverted": (lambda file: dicom_files.grey(file, GREY, 8, "MONOCHROME1"), 255 - AS_GREY, 0),
    "12 bits": (lambda file: dicom_files.grey(file, GREY.astype(np.uint16) * 16, 12), AS_GREY, 1),
    "window": (windowed, (AS_GREY.astype(int) * 2).clip(0, 255), 1),
    "palette": (palette, PALETTE, 0),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_look_as_in_viewers(tmp_path: Path, name: str) -> None:
    fill, expected, tolerance = PICTURES[name]
    file = dicom_files.ultrasound()
    fill(file)
    path = dicom_files.saved(file, tmp_path / "a.dcm")
    shown = read_frame(path, "RGB")
    assert shown.dtype == np.uint8
    assert np.abs(shown.astype(int) - expected).max() <= tolerance
    assert read_frame(path, "L").shape == (6, 8)
    array, _ = PictureReader("BGR").get_data([path])
    np.testing.assert_array_equal(array, shown[..., ::-1])


def test_ybr_big_endian_and_compressed_pictures(tmp_path: Path) -> None:
    flat = np.broadcast_to(np.array([200, 60, 30], np.uint8), (16, 16, 3))
    ybr = np.array(pydicom.pixels.convert_color_space(flat.copy(), "RGB", "YBR_FULL"))
    file = dicom_files.ultrasound()
    dicom_files.colours(file, ybr, "YBR_FULL")
    assert np.abs(read_frame(dicom_files.saved(file, tmp_path / "ybr.dcm"), "RGB").astype(int) - flat).max() <= 2
    for name, syntax in (("rle", RLELossless), ("j2k", JPEG2000Lossless)):
        file = dicom_files.ultrasound()
        dicom_files.colours(file, np.tile(COLOURS, (16, 8, 1)))
        file.compress(syntax)
        shown = read_frame(dicom_files.saved(file, tmp_path / f"{name}.dcm"), "RGB")
        np.testing.assert_array_equal(shown, np.tile(COLOURS, (16, 8, 1)))
    big = dicom_files.ultrasound()
    big.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    dicom_files.grey(big, (GREY.astype(np.uint16) * 257).astype(">u2"), 16)
    assert (read_frame(dicom_files.saved(big, tmp_path / "big.dcm"), "L") == GREY).all()


def test_every_frame_is_an_item_and_a_mask_of_its_own(tmp_path: Path) -> None:
    file = dicom_files.ultrasound()
    clip = np.random.default_rng(1).integers(0, 256, (11, 6, 8, 3), dtype=np.uint8)
    dicom_files.colours(file, clip)
    dicom_files.saved(file, tmp_path / "clip.dcm")
    items = find_files(tmp_path, PICTURE_SUFFIXES, dicom="frames")
    assert [item["name"] for item in items][::5] == ["clip_frame01", "clip_frame06", "clip_frame11"]
    for item, frame in zip(items, clip, strict=True):
        np.testing.assert_array_equal(LoadImaged("image", reader=PictureReader("RGB"))(item)["image"], frame)
    for wrong in ("clip.dcm", "clip.dcm[0]", "clip.dcm[12]"):
        with pytest.raises(InputError, match="11 frames|no frame"):
            read_frame(tmp_path / wrong, "RGB")


@pytest.mark.parametrize("name", ["RGB", "palette", "inverted"])
def test_pictures_get_segmentations(tmp_path: Path, name: str) -> None:
    file = dicom_files.ultrasound()
    PICTURES[name][0](file)
    dicom_files.saved(file, tmp_path / "a.dcm")
    (item,) = find_files(tmp_path / "a.dcm", PICTURE_SUFFIXES, dicom="frames")
    steps = Compose([LoadImaged("image", reader=PictureReader("RGB")), EnsureChannelFirstd("image")])
    loaded = steps(item)
    pred = loaded["image"][:1] * 0
    pred[0, 2:4, 1:6] = 1
    SaveImageMaskd("pred", tmp_path / "out", classes=["lesion"])({**loaded, "pred": pred})
    segmentation = pydicom.dcmread(tmp_path / "out/a_seg.dcm")
    np.testing.assert_array_equal(np.squeeze(segmentation.pixel_array), pred[0].numpy())
    part = segmentation.SegmentSequence[0]
    assert part.SegmentedPropertyTypeCodeSequence[0].CodeValue == "52988006"
    source = segmentation.ReferencedSeriesSequence[0].ReferencedInstanceSequence[0]
    assert source.ReferencedSOPInstanceUID == file.SOPInstanceUID
    assert errors_of(tmp_path / "out/a_seg.dcm") == []


def test_without_the_extra_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = dicom_files.series(tmp_path / "scan", dicom_files.hounsfield())
    for name in ("pydicom", "highdicom"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"DICOM needs pydicom, which is not installed; pip install highdicom"):
        find_files(tmp_path / "scan", VOLUME_SUFFIXES, dicom="series")
    with pytest.raises(InputError, match="pip install"):
        read_series(files)
    assert importlib.util.find_spec("transforms.dicom")
