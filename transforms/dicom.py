"""DICOM, in and out: CT series as volumes, pictures, and masks as DICOM-SEG.

It needs the extra `dicom`. pydicom reads, highdicom decides where slices lie and writes segmentations; SimpleITK
decodes what pydicom's decoders do not know, lossless JPEG above all.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from transforms.files import (
    InputError,
    PathLike,
    printable,
    replacing,
    stem,
)
from transforms.itk import LPS_TO_RAS, import_simpleitk

INSTALL = "pip install highdicom pylibjpeg pylibjpeg-openjpeg"
COPY_AGAIN = "copy or export it again"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
# Without these nothing can be read or referred to.
NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "Rows", "Columns")
PLACE = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID")
# The standard lets these be empty, and files lack them.
MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                "AccessionNumber", "ReferringPhysicianName")  # fmt: skip
IN_HEADERS = ("SOPClassUID", "SeriesInstanceUID", "SeriesNumber", "Modality", "ImageType", "NumberOfFrames", "Rows")
# Steps of a series may differ by this share, as positions are rounded.
EVEN = 0.05
HOUNSFIELD_TYPES = ("HU", "US", "")

SEG_TYPES = ("binary", "labelmap")
# Name of a class → SNOMED CT code, what it means, and the colour to show it in.
ORGAN, ABNORMAL, TISSUE = ("AnatomicalStructure", "MorphologicallyAbnormalStructure", "Tissue")
STRUCTURES: Mapping[str, tuple[str, str, str, str]] = {
    "aorta": ("15825003", "Aorta", ORGAN, "#e0603f"),
    "gallbladder": ("28231008", "Gallbladder", ORGAN, "#8bb34a"),
    "left kidney": ("18639004", "Left kidney", ORGAN, "#d9843b"),
    "right kidney": ("9846003", "Right kidney", ORGAN, "#b9574e"),
    "liver": ("10200004", "Liver", ORGAN, "#c47a5a"),
    "pancreas": ("15776009", "Pancreas", ORGAN, "#f0c35c"),
    "spleen": ("78961009", "Spleen", ORGAN, "#9a6fb0"),
    "stomach": ("69695003", "Stomach", ORGAN, "#6fa8d6"),
    "lesion": ("52988006", "Lesion", ABNORMAL, "#f2e24b"),
}
OTHER_COLOURS = ("#4fc3c7", "#e77fb3", "#a3d977", "#b39ddb", "#ffb74d", "#90a4ae")

logger = logging.getLogger(__name__)


def dicom_items(
    files: Sequence[Path], root: Path, pictures: bool, passed: Counter[str] | None = None
) -> list[dict[str, Any]]:
    """What is to be predicted among DICOM files: {"image": file or files of one series, "name": of its result}.

    A series is known by its SeriesInstanceUID, wherever its files lie. Localizers beside other images, segmentations,
    and what holds no image are passed over. Of pictures each frame is an item, `clip.dcm[3]` the third.

    Args:
        files: DICOM files.
        root: the folder that was given; names begin below it.
        pictures: each frame by itself; otherwise series.
        passed: counts what was left out, for `passed_over`.

    Raises:
        InputError: when pydicom is not installed.

    Example:
        >>> dicom_items([], Path("scans"), pictures=False)
        []
    """
    passed = Counter() if passed is None else passed
    series: dict[str, list[tuple[Path, Any]]] = {}
    for file in files:
        header = _quick_header(file)
        if header is not None and "Rows" not in header:
            passed[str(header.get("Modality") or "DICOM without image")] += 1
            continue
        if header is not None and header.get("Modality") == "SEG":
            passed["SEG"] += 1
            continue
        # a file that cannot be read fails by its own name
        key = f"file {file}" if header is None or pictures else str(header.get("SeriesInstanceUID") or file.parent)
        series.setdefault(key, []).append((file, header))
    if pictures:
        return [item for group in series.values() for item in _frames(*group[0], root)]
    kept = {}
    for key, group in series.items():
        images = [(file, header) for file, header in group if not _is_localizer(header)]
        if images:
            passed["localizer"] += len(group) - len(images)
            kept[key] = images
    if not kept:
        kept = series
    else:
        passed["localizer"] += sum(len(group) for key, group in series.items() if key not in kept)
    names = {key: _series_name([file for file, _ in group], root) for key, group in kept.items()}
    items = []
    for key, group in kept.items():
        name, header = names[key], group[0][1]
        if list(names.values()).count(name) > 1 and header is not None:
            others = [other[0][1] for other_key, other in kept.items() if names[other_key] == name]
            number = str(header.get("SeriesNumber") or 0)
            once = [str(other.get("SeriesNumber") or 0) for other in others if other is not None].count(number) == 1
            name = f"{name}_{number}" if once else f"{name}_{number}_{key.rpartition('.')[2][-8:]}"
        paths = [str(file) for file, _ in group]
        items.append({"image": paths if len(paths) > 1 else paths[0], "name": name})
    return items


def read_series(
    paths: Sequence[PathLike], assume_hu: bool = False
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...], str]:
    """The Hounsfield units of a CT series, or of one slice, (slices, rows, columns), and how it lies.

    Where slices lie is decided by their positions and orientations, never by SliceThickness. A series is refused where
    slices are missing or doubled, steps are uneven, or the gantry was tilted: such a series is no grid.

    Args:
        paths: of one series, in any order; or one file with many frames (enhanced CT).
        assume_hu: take images of other kinds than CT, too.

    Returns:
        Array; affine, array index → RAS mm; spacing in mm; the files in the array's order as JSON.

    Raises:
        InputError: when a file is damaged or lacks what is needed, or the series is none of those.
    """
    files = [Path(path) for path in paths]
    where = files[0] if len(files) == 1 else _common(files)
    headers = [_header(file) for file in files]
    _check_ct(headers, files, assume_hu)
    if len(files) == 1 and int(headers[0].get("NumberOfFrames") or 1) > 1:
        return _enhanced(files[0])
    for header, file in zip(headers, files, strict=True):
        if lacking := [name for name in (*NEEDED, *PLACE) if not _has(header, name)]:
            raise InputError(f"lacks {', '.join(lacking)}", path=file, remedy="export it from its archive again")
    geometry, order = _geometry(headers, files, where)
    ordered = [file for _, file in sorted(zip(order, files, strict=True))]
    array = np.empty(geometry.spatial_shape, np.int16)
    for index, file in enumerate(ordered):
        values = _hounsfield(file)
        whole = bool((values == np.rint(values)).all()) and values.min() >= -32768 and values.max() <= 32767
        if array.dtype == np.int16 and not whole:
            array = array.astype(np.float32)
        array[index] = values
    affine = LPS_TO_RAS @ geometry.affine
    return array, affine, tuple(map(float, geometry.spacing)), json.dumps([str(file) for file in ordered])


def read_frame(path: PathLike, mode: str) -> np.ndarray:
    """A DICOM picture as viewers show it: (H, W, 3) RGB, or (H, W) for mode "L", uint8.

    Palettes are looked up, YBR becomes RGB, MONOCHROME1 is inverted; grey of more than 8 bits goes through the file's
    window, or is scaled from its own range of bits where it has none.

    Args:
        path: of the file; `clip.dcm[3]` is its third frame.
        mode: "L" or "RGB".

    Raises:
        InputError: when it is damaged, or has several frames and the path does not say which.
    """
    file, frame = split_frame(path)
    header = _header(file)
    frames = int(header.get("NumberOfFrames") or 1)
    if frame is None and frames > 1:
        raise InputError(f"holds {frames} frames", path=file, remedy=f"say which: {printable(file.name)}[1] …")
    if frame is not None and not 1 <= frame <= frames:
        raise InputError(f"has no frame {frame} (it holds {frames})", path=file)
    with _one_line(file):
        picture = _shown(file, header, (frame or 1) - 1)
    if mode == "L" and picture.ndim == 3:
        # as Pillow weighs colours
        picture = np.rint(picture @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    return picture if mode == "L" or picture.ndim == 3 else np.stack([picture] * 3, axis=-1)


def split_frame(path: PathLike) -> tuple[Path, int | None]:
    """The file and the number of the frame that `clip.dcm[3]` names; None where it names none.

    Example:
        >>> split_frame("clip.dcm[3]"), split_frame("a.dcm")
        ((PosixPath('clip.dcm'), 3), (PosixPath('a.dcm'), None))
    """
    text = str(path)
    name, bracket, number = text.removesuffix("]").rpartition("[")
    if bracket and text.endswith("]") and number.isdecimal() and not Path(text).exists():
        return Path(name), int(number)
    return Path(text), None


def write_segmentation(
    path: Path,
    labels: np.ndarray,
    affine: np.ndarray | None,
    source: str,
    classes: Sequence[str],
    seg_type: str = "binary",
    algorithm: str = "segmentation",
) -> Path:
    """Writes a label map as DICOM-SEG that refers to the images it was made of, whole or not at all.

    Args:
        path: of the file, which ends in .dcm.
        labels: (slices, rows, columns) for a series, however turned; (rows, columns) for a picture.
        affine: array index → RAS mm of a series' labels; None for a picture.
        source: the image's files, as `read_series` gives them.
        classes: names of the classes 1 … C. Names of organs and "lesion" get SNOMED codes.
        seg_type: "binary", which all viewers know, or "labelmap", which is much smaller.
        algorithm: its name.

    Raises:
        InputError: when the classes have no names, there is no such type, or a needed attribute is missing.
        ValueError: when the labels do not lie on the images' grid.

    Example:
        >>> write_segmentation(Path("a_seg.dcm"), np.ones((2, 2), np.uint8), None, '["a.dcm"]', ["lesion"], "colour")
        Traceback (most recent call last):
        transforms.files.InputError: --seg_type colour: expected binary or labelmap
    """
    if seg_type not in SEG_TYPES:
        raise InputError(f"--seg_type {seg_type}: expected {' or '.join(SEG_TYPES)}")
    highdicom = _library("highdicom")
    if labels.max() > len(classes):
        raise InputError(f"class {labels.max()} has no name; there are {', '.join(classes) or 'none'}")
    files = [Path(file) for file in json.loads(source)]
    headers = [_header(file) for file in files]
    for header, file in zip(headers, files, strict=True):
        if lacking := [name for name in NEEDED if not _has(header, name)]:
            fact = f"lacks {', '.join(lacking)}, so that no segmentation can refer to it"
            raise InputError(fact, path=file, remedy="export it from its archive again")
    if affine is None:
        pixels: Any = labels[None]
    else:
        mask = highdicom.Volume(labels, LPS_TO_RAS @ affine, "PATIENT", headers[0].get("FrameOfReferenceUID"))
        geometry = _source_geometry(headers, files)
        for header in headers:
            # highdicom looks for it, though it takes the step between slices
            if not _has(header, "SliceThickness"):
                header.SliceThickness = geometry.spacing_between_slices
        try:
            pixels = mask.match_geometry(geometry)
        except RuntimeError as error:
            raise ValueError(f"{path}: the labels do not lie on the grid of {files[0]}: {error}") from error
    version = _version()
    with warnings.catch_warnings(), replacing(path) as temporary:
        # of empty masks, and of names that are no valid person's
        warnings.simplefilter("ignore")
        segmentation = highdicom.seg.Segmentation(
            source_images=headers,
            pixel_array=pixels,
            segmentation_type=seg_type.upper(),
            segment_descriptions=_descriptions(classes, algorithm, version),
            series_instance_uid=highdicom.UID(),
            series_number=int(headers[0].get("SeriesNumber") or 0) + 1000,
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="monai-cmunext-vmunet",
            manufacturer_model_name=algorithm[:64],
            software_versions=version,
            device_serial_number="0",
            content_description="Predicted by a network, not reviewed",
            series_description=f"Segmentation by {algorithm}"[:64],
        )
        if affine is None:
            # must be there, and empty, where an image does not say how it lies
            segmentation.PatientOrientation = headers[0].get("PatientOrientation")
        segmentation.save_as(temporary)
    return path


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if not (error.name or "").startswith(name.partition(".")[0]):
            raise
        raise InputError(f"DICOM needs {name.partition('.')[0]}, which is not installed", remedy=INSTALL) from error


@contextmanager
def _one_line(file: Path) -> Iterator[None]:
    """What pydicom and its decoders say of a file becomes an `InputError`; what they warn of does not matter."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError("no such file", path=file) from error
    # damaged files make pydicom raise errors of nearly every kind
    except Exception as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__)
        raise InputError(f"not a readable DICOM file ({reason[:200]})", path=file, remedy=COPY_AGAIN) from error


def _header(file: Path) -> Any:
    """All but the pixels; what the standard lets be empty is there, and empty where the file lacks it."""
    pydicom = _library("pydicom")
    if file.is_dir():
        raise InputError("is a folder, expected a file", path=file)
    with _one_line(file):
        header = pydicom.dcmread(file, stop_before_pixels=True)
        for name in MAY_BE_EMPTY:
            if name not in header:
                setattr(header, name, None)
        if not _has(header, "SOPClassUID") and (known := header.file_meta.get("MediaStorageSOPClassUID")):
            header.SOPClassUID = known
        if not _has(header, "SOPInstanceUID") and (known := header.file_meta.get("MediaStorageSOPInstanceUID")):
            header.SOPInstanceUID = known
        # values are parsed where they are first looked at
        for name in (*NEEDED, *PLACE, *MAY_BE_EMPTY, *IN_HEADERS):
            header.get(name)
    return header


def _quick_header(file: Path) -> Any:
    """What tells series and kinds apart; None for what cannot be read."""
    pydicom = _library("pydicom")
    try:
        with _one_line(file):
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=list(IN_HEADERS))
            for name in IN_HEADERS:
                header.get(name)
            return header
    except InputError:
        return None


def _has(header: Any, name: str) -> bool:
    return header.get(name) not in (None, "", [])


def _is_localizer(header: Any) -> bool:
    return header is not None and "LOCALIZER" in [str(part).upper() for part in header.get("ImageType") or ()]


def _frames(file: Path, header: Any, root: Path) -> list[dict[str, Any]]:
    name = _below(file.with_name(stem(file)), root)
    count = int(header.get("NumberOfFrames") or 1) if header is not None else 1
    if count == 1:
        return [{"image": str(file), "name": name}]
    digits = len(str(count))
    return [{"image": f"{file}[{k}]", "name": f"{name}_frame{k:0{digits}}"} for k in range(1, count + 1)]


def _series_name(files: Sequence[Path], root: Path) -> str:
    """Of a file its name, of several the folder's, below the folder that was given."""
    if len(files) == 1:
        return _below(files[0].with_name(stem(files[0])), root)
    return _below(_common(files), root)


def _common(files: Sequence[Path]) -> Path:
    folders = [file.absolute().parent for file in files]
    return next(
        one for one in (folders[0], *folders[0].parents) if all(folder.is_relative_to(one) for folder in folders)
    )


def _below(path: Path, root: Path) -> str:
    path, root = path.absolute(), root.absolute()
    if path == root or not path.is_relative_to(root):
        return path.name
    return path.relative_to(root).as_posix()


def _check_ct(headers: Sequence[Any], files: Sequence[Path], assume_hu: bool) -> None:
    """Refuses what holds no Hounsfield units by its kind."""
    for header, file in zip(headers, files, strict=True):
        if not _has(header, "Rows"):
            raise InputError(f"holds no image ({header.get('Modality') or 'of no modality'})", path=file)
        if int(header.get("SamplesPerPixel") or 1) > 1:
            raise InputError("holds colours, expected a CT", path=file)
        if assume_hu:
            continue
        remedy = "give the CT itself, or say --assume_hu true where they are"
        if str(header.get("SOPClassUID") or "").startswith(SECONDARY_CAPTURE) or header.get("BitsAllocated") == 8:
            fact = "is a captured picture (Secondary Capture or 8 bits), whose values are not Hounsfield units"
            raise InputError(fact, path=file, remedy=remedy)
        if (modality := header.get("Modality") or "CT") != "CT":
            raise InputError(f"is {modality}, whose values are not Hounsfield units", path=file, remedy=remedy)
        if (kind := str(header.get("RescaleType") or "")) not in HOUNSFIELD_TYPES:
            raise InputError(f"its values are {printable(kind)}, not Hounsfield units", path=file, remedy=remedy)


def _source_geometry(headers: Sequence[Any], files: Sequence[Path]) -> Any:
    """The grid of a series, or of the frames of one file."""
    if int(headers[0].get("NumberOfFrames") or 1) > 1:
        highdicom = _library("highdicom")
        with _one_line(files[0]):
            return highdicom.Image.from_dataset(headers[0], copy=True).get_volume_geometry()
    return _geometry(headers, files, files[0])[0]


def _geometry(headers: Sequence[Any], files: Sequence[Path], where: Path) -> tuple[Any, list[int]]:
    """The grid that the slices make, and the place of each on it."""
    highdicom = _library("highdicom")
    first = headers[0]
    for name in ("Rows", "Columns", "PixelSpacing", "FrameOfReferenceUID"):
        for header, file in zip(headers, files, strict=True):
            if header.get(name) != first.get(name):
                fact = f"its {name} is {header.get(name)}, that of {printable(files[0].name)} {first.get(name)}"
                raise InputError(fact, path=file, remedy="leave only slices of one stack in the series")
    with _one_line(files[0]):
        directions = np.array([header.ImageOrientationPatient for header in headers], float)
        positions = np.array([header.ImagePositionPatient for header in headers], float)
    row, column = directions[0, :3], directions[0, 3:]
    lengths = np.linalg.norm([row, column], axis=1)
    if not np.isfinite(directions).all() or np.abs(lengths - 1).max() > 1e-2 or abs(row @ column) > 1e-2:
        raise InputError(f"its ImageOrientationPatient {directions[0].tolist()} is no orientation", path=files[0])
    if np.abs(directions - directions[0]).max() > 1e-3:
        raise InputError("its slices do not lie parallel", path=where, remedy="give one stack of slices")
    pixel = [float(size) for size in first.PixelSpacing]
    if min(pixel) <= 0 or not np.isfinite(positions).all():
        raise InputError(f"its PixelSpacing {pixel} or ImagePositionPatient is no place", path=files[0])
    normal = np.cross(row, column)
    depths = positions @ normal
    if reason := _why_no_grid(depths, positions, normal, files, max(pixel)):
        raise InputError(reason, path=where)
    with _one_line(files[0]):
        spacing, order = highdicom.spatial.get_series_volume_positions(
            list(headers), rtol=2 * EVEN, perpendicular_tol=1e-2, orientation_tol=1e-3
        )
        if order is None:
            raise InputError("its slices make no even grid", path=where)
        if len(headers) == 1:
            spacing = float(first.get("SpacingBetweenSlices") or 1)
        geometry = highdicom.VolumeGeometry.from_attributes(
            image_position=headers[order.index(0)].ImagePositionPatient,
            image_orientation=first.ImageOrientationPatient,
            rows=first.Rows,
            columns=first.Columns,
            pixel_spacing=pixel,
            spacing_between_slices=spacing,
            number_of_frames=len(headers),
            coordinate_system="PATIENT",
            frame_of_reference_uid=first.FrameOfReferenceUID,
        )
    return geometry, list(order)


def _why_no_grid(
    depths: np.ndarray, positions: np.ndarray, normal: np.ndarray, files: Sequence[Path], pixel: float
) -> str:
    """What is wrong with the places of slices, in words; empty where nothing is."""
    if len(depths) == 1:
        return ""
    order = np.argsort(depths)
    steps = np.diff(depths[order])
    step = float(np.median(steps))
    names = [printable(files[index].name) for index in order]
    if doubled := [k for k, one in enumerate(steps) if one < 1e-3 or one < step / 20]:
        k = doubled[0]
        more = f", and {len(doubled) - 1} others" * (len(doubled) > 1)
        return (
            f"has doubled slices: {names[k]} and {names[k + 1]} lie at the same place{more}; give a series with each"
            " slice once"
        )
    uneven = np.abs(steps - step) > max(EVEN * step, 0.011)
    if uneven.any():
        ratios = steps / step
        gaps = [k for k in np.flatnonzero(uneven) if ratios[k] > 1.5 and abs(ratios[k] - round(ratios[k])) < 2 * EVEN]
        if len(gaps) == np.count_nonzero(uneven):
            k = int(gaps[0])
            missing = int(sum(np.rint(ratios[gaps]) - 1))
            return (
                f"lacks {missing} slice{'s' * (missing > 1)}: {steps[k]:.4g} mm between {names[k]} and {names[k + 1]},"
                f" {step:.4g} mm elsewhere; export the whole series"
            )
        return (
            f"has uneven steps between slices, from {steps.min():.4g} to {steps.max():.4g} mm; give a series with even"
            " steps, or resample it first"
        )
    offsets = positions[order] - positions[order[0]]
    aside = np.linalg.norm(offsets - np.outer(offsets @ normal, normal), axis=1)
    if aside.max() > pixel / 2:
        degrees = math.degrees(math.atan2(aside[-1], depths[order[-1]] - depths[order[0]]))
        if aside[-1] > pixel / 2:
            return (
                f"was taken with a tilted gantry: slices are shifted against each other by {degrees:.1f}°; resample it"
                " to a straight grid first"
            )
        return f"has slices that lie beside each other, by up to {aside.max():.3g} mm; give one stack of slices"
    return ""


def _hounsfield(file: Path) -> np.ndarray:
    """(rows, columns) float32."""
    pydicom = _library("pydicom")
    with _one_line(file):
        dataset = pydicom.dcmread(file)
        if "PixelData" not in dataset:
            raise InputError("has no pixels", path=file, remedy=COPY_AGAIN)
        stored = _decoded(file, dataset, None)
        if stored is None:
            return _by_itk(file, dataset)[0].astype(np.float32)
        if "ModalityLUTSequence" in dataset:
            return np.asarray(pydicom.pixels.apply_modality_lut(stored, dataset), np.float32)
        if "RescaleSlope" not in dataset or "RescaleIntercept" not in dataset:
            logger.warning(f"{file.parent}: lacks a rescale slope and intercept, taken for 1 and 0")
        slope, intercept = (float(dataset.get(name, usual)) for name, usual in
                            (("RescaleSlope", 1), ("RescaleIntercept", 0)))  # fmt: skip
        return (stored.astype(np.float32) * np.float32(slope) + np.float32(intercept)).astype(np.float32)


def _decoded(file: Path, dataset: Any, frame: int | None) -> np.ndarray | None:
    """The stored pixels, YBR as RGB; None where no decoder of pydicom's is there for their compression."""
    pydicom = _library("pydicom")
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is not None and syntax.is_compressed and syntax.is_encapsulated:
        decoder = pydicom.pixels.get_decoder(syntax)
        if not decoder.is_available:
            return None
    return np.asarray(pydicom.pixels.pixel_array(dataset, index=frame))


def _by_itk(file: Path, dataset: Any) -> np.ndarray:
    """(frames, rows, columns[, 3]) decoded and rescaled by SimpleITK."""
    sitk = import_simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(file))
    array = np.asarray(sitk.GetArrayFromImage(reader.Execute()))
    channels = 4 if int(dataset.get("SamplesPerPixel") or 1) > 1 else 3
    return array if array.ndim == channels else array[None]


def _enhanced(file: Path) -> tuple[np.ndarray, np.ndarray, tuple[float, ...], str]:
    """The frames of one file."""
    highdicom = _library("highdicom")
    with _one_line(file):
        image = highdicom.imread(file)
        geometry = image.get_volume_geometry()
        if geometry is None:
            raise InputError("its frames make no even grid", path=file, remedy="give a series with even steps")
        volume = image.get_volume(dtype=np.float32, apply_voi_transform=False, apply_real_world_transform=False)
    affine = LPS_TO_RAS @ volume.affine
    return volume.array, affine, tuple(map(float, volume.spacing)), json.dumps([str(file)])


def _shown(file: Path, header: Any, frame: int) -> np.ndarray:
    """A frame as viewers show it, (H, W) or (H, W, 3) uint8."""
    pydicom = _library("pydicom")
    dataset = pydicom.dcmread(file)
    if "PixelData" not in dataset:
        raise InputError("has no pixels", path=file, remedy=COPY_AGAIN)
    kind = str(header.get("PhotometricInterpretation") or "MONOCHROME2")
    frames = int(header.get("NumberOfFrames") or 1)
    stored = _decoded(file, dataset, frame)
    if stored is None:
        stored = _by_itk(file, dataset)[frame if frames > 1 else 0]
    if kind == "PALETTE COLOR":
        colours = np.asarray(pydicom.pixels.apply_color_lut(stored, dataset))[..., :3]
        # 16 bits, of which some fill the lower half only
        return (colours >> 8 if colours.max() > 255 else colours).astype(np.uint8)
    if stored.ndim == 3:
        if stored.dtype.itemsize > 1:
            raise InputError(f"holds colours of {8 * stored.dtype.itemsize} bits, expected 8", path=file)
        return stored
    bits = int(header.get("BitsStored") or 8)
    values = np.asarray(pydicom.pixels.apply_modality_lut(stored, dataset))
    if bits > 8 and ("WindowCenter" in dataset or "VOILUTSequence" in dataset):
        grey = np.asarray(pydicom.pixels.apply_voi_lut(values, dataset), float)
        low, high = _window_range(dataset, grey)
    else:
        grey, (low, high) = values.astype(float), _stored_range(dataset, bits)
    grey = ((grey - low) / max(high - low, 1e-6)).clip(0, 1)
    if kind == "MONOCHROME1" or header.get("PresentationLUTShape") == "INVERSE":
        grey = 1 - grey
    return np.rint(255 * grey).astype(np.uint8)


def _stored_range(dataset: Any, bits: int) -> tuple[float, float]:
    """The lowest and highest value that the bits can hold, rescaled."""
    slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
    signed = bool(dataset.get("PixelRepresentation"))
    ends = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    low, high = sorted(end * slope + intercept for end in ends)
    return low, high


def _window_range(dataset: Any, grey: np.ndarray) -> tuple[float, float]:
    """Between which values a window or its table puts black and white."""
    if "VOILUTSequence" in dataset:
        return 0.0, float(2 ** int(dataset.VOILUTSequence[0].LUTDescriptor[2]) - 1)
    return _stored_range(dataset, int(dataset.get("BitsStored") or 8))


def _descriptions(classes: Sequence[str], algorithm: str, version: str) -> list[Any]:
    """Name, codes, colour and algorithm of each class."""
    highdicom = _library("highdicom")
    codes = _library("pydicom.sr.codedict").codes
    identification = highdicom.AlgorithmIdentificationSequence(
        name=algorithm[:64], version=version, family=codes.DCM.ArtificialIntelligence
    )
    described = []
    for number, name in enumerate(classes, 1):
        other = ("85756007", "Tissue", TISSUE, OTHER_COLOURS[number % len(OTHER_COLOURS)])
        value, meaning, category, colour = STRUCTURES.get(name.lower().replace("_", " "), other)
        described.append(
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:64],
                segmented_property_category=getattr(codes.SCT, category),
                segmented_property_type=highdicom.sr.CodedConcept(value, "SCT", meaning),
                algorithm_type="AUTOMATIC",
                algorithm_identification=identification,
                display_color=highdicom.color.CIELabColor.from_string(colour),
            )
        )
    return described


def _version() -> str:
    try:
        return importlib.metadata.version("monai-cmunext-vmunet")
    except importlib.metadata.PackageNotFoundError:
        return "from a checkout"
