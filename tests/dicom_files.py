"""DICOM files that tests make: CT series of a phantom, lying in the patient as they are told, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# tests that need it are skipped where it is missing
pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    ExplicitVRLittleEndian,
    UltrasoundImageStorage,
    generate_uid,
)

SPACING = (2.5, 0.8, 0.7)  # of slices, rows and columns in mm
# Hounsfield units of the phantom's boxes, the classes 1 … 8
ORGANS = (40, 80, 120, 160, 200, 240, 280, 320)


def labels(shape: tuple[int, int, int] = (12, 20, 24)) -> np.ndarray:
    """(slices, rows, columns): eight boxes of different sizes, none where a mirrored one would be."""
    array = np.zeros(shape, np.uint8)
    corners = [(1, 1, 1), (1, 8, 2), (1, 14, 12), (4, 2, 14), (6, 9, 9), (6, 3, 5), (8, 14, 3), (9, 8, 17)]
    for number, (slice_, row, column) in enumerate(corners, 1):
        array[slice_ : slice_ + 2 + number % 2, row : row + 3 + number % 3, column : column + 4 + number % 4] = number
    return array


def hounsfield(shape: tuple[int, int, int] = (12, 20, 24)) -> np.ndarray:
    """The phantom: organs of their own values in fat and air."""
    known = labels(shape)
    array = np.where(np.indices(shape).sum(0) % 2, -1000, -100).astype(np.int16)
    for number, value in enumerate(ORGANS, 1):
        array[known == number] = value
    return array


def series(
    folder: Path,
    array: np.ndarray,
    directions: np.ndarray | None = None,
    shift: Sequence[float] = (0, 0, 0),
    step: float = SPACING[0],
    seed: int = 0,
    **attributes: Any,
) -> list[Path]:
    """Writes the slices of a CT, their files named in random order.

    Args:
        directions: columns are the LPS directions of slices, rows and columns; right-handed.
        shift: added to the position with each slice, in mm.
        attributes: of all files; None leaves one out.
    """
    directions = np.eye(3)[:, [2, 1, 0]] * [1, 1, 1] if directions is None else directions
    along, down, right = directions.T
    study, uid, frame = generate_uid(), generate_uid(), generate_uid()
    folder.mkdir(parents=True, exist_ok=True)
    names = np.random.default_rng(seed).permutation(len(array))
    files = []
    for k, pixels in enumerate(array):
        file = new_file(CTImageStorage)
        file.StudyInstanceUID, file.SeriesInstanceUID, file.FrameOfReferenceUID = study, uid, frame
        file.Modality, file.SeriesNumber, file.InstanceNumber = "CT", 3, k + 1
        file.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        file.PatientName, file.PatientID, file.PatientBirthDate, file.PatientSex = "Phantom^Box", "P1", "19700101", "O"
        file.StudyDate, file.StudyTime, file.AccessionNumber, file.StudyID = "20260101", "120000", "1", "1"
        file.ReferringPhysicianName = file.PositionReferenceIndicator = file.Manufacturer = ""
        file.PatientPosition = "HFS"
        file.KVP, file.AcquisitionNumber, file.ContentDate, file.ContentTime = 120, 1, "20260101", "120000"
        file.ImagePositionPatient = [
            f"{value:.10g}"[:16] for value in np.array([-20.5, 31.25, -400.0]) + k * (step * along + np.array(shift))
        ]
        file.ImageOrientationPatient = [f"{value:.10f}"[:16] for value in (*right, *down)]
        file.PixelSpacing, file.SliceThickness = [SPACING[1], SPACING[2]], 3
        file.RescaleSlope, file.RescaleIntercept, file.RescaleType = 1, -1024, "HU"
        grey(file, (pixels.astype(np.int32) + 1024).astype(np.uint16), bits=12)
        for name, value in attributes.items():
            if value is None:
                delattr(file, name)
            else:
                setattr(file, name, value)
        path = folder / f"IM{names[k]:04d}"
        file.save_as(path, enforce_file_format=True)
        files.append(path)
    return files


def new_file(kind: str, syntax: str = ExplicitVRLittleEndian) -> FileDataset:
    """An empty file with its identifiers."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = kind
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = syntax
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    return file


def grey(file: Any, pixels: np.ndarray, bits: int, kind: str = "MONOCHROME2") -> None:
    """Puts (H, W) or (frames, H, W) into the file."""
    size = pixels.dtype.itemsize * 8
    file.Rows, file.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        file.NumberOfFrames = len(pixels)
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, kind
    file.BitsAllocated, file.BitsStored, file.HighBit = size, bits, bits - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    file.PixelData = pixels.tobytes()
    file["PixelData"].VR = "OW" if size > 8 else "OB"


def colours(file: Any, pixels: np.ndarray, kind: str = "RGB", planar: int = 0) -> None:
    """Puts (H, W, 3) or (frames, H, W, 3) into the file."""
    file.Rows, file.Columns = pixels.shape[-3:-1]
    if pixels.ndim == 4:
        file.NumberOfFrames = len(pixels)
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PlanarConfiguration = 3, kind, planar
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
    file.PixelData = (np.moveaxis(pixels, -1, -3) if planar else pixels).tobytes()
    file["PixelData"].VR = "OB"


def ultrasound(**attributes: Any) -> FileDataset:
    """A file of ultrasound without pixels."""
    file = new_file(UltrasoundImageStorage)
    file.Modality, file.StudyInstanceUID, file.SeriesInstanceUID = "US", generate_uid(), generate_uid()
    file.SeriesNumber, file.InstanceNumber = 1, 1
    for name, value in attributes.items():
        setattr(file, name, value)
    return file


def saved(file: FileDataset, path: Path) -> Path:
    """Writes the file in the byte order of its transfer syntax."""
    pydicom.dcmwrite(path, file, enforce_file_format=True)
    return path
