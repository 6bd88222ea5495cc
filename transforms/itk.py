"""Volumes in the formats of ITK: NRRD (.nrrd, or .nhdr beside its voxels) and MetaImage (.mha, or .mhd likewise).

SimpleITK reads and writes them. It takes for granted what a header leaves out, and does not compare checksums; so the
header's text is looked at here as well.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from transforms.files import InputError, PathLike, has_suffix, replacing

NRRD_SUFFIXES = (".nrrd", ".nhdr")
META_SUFFIXES = (".mha", ".mhd")
ITK_SUFFIXES = NRRD_SUFFIXES + META_SUFFIXES

# ITK's millimetres run towards Left, Posterior and Superior, NIfTI's towards Right, Anterior and Superior.
LPS_TO_RAS = np.diag([-1.0, -1, 1, 1])
SPACES = ("left-posterior-superior", "lps", "right-anterior-superior", "ras", "left-anterior-superior", "las")
LONGEST_HEADER = 1 << 20
COPY_AGAIN = "copy or download it again"
SAVE_AGAIN = "save it again from the program that made it, with its orientation"


def read_itk(path: Path) -> tuple[np.ndarray, np.ndarray, str]:
    """The voxels (X, Y, Z) of a volume, its affine, array index → RAS mm, and its geometry as `write_itk` takes it.

    Raises:
        InputError: when the file is damaged, holds something else than one volume, or does not say how it lies.

    Example:
        >>> import tempfile, SimpleITK
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     image = SimpleITK.GetImageFromArray(np.zeros((2, 3, 4), np.int16))
        ...     SimpleITK.WriteImage(image, f"{folder}/a.mha")
        ...     array, affine, _ = read_itk(Path(folder, "a.mha"))
        >>> array.shape, affine.diagonal().tolist()
        ((4, 3, 2), [-1.0, -1.0, 1.0, 1.0])
    """
    kind = "NRRD" if has_suffix(path, NRRD_SUFFIXES) else "MetaImage"
    if path.is_dir():
        raise InputError("is a folder, expected a file", path=path)
    if not path.is_file():
        raise InputError("no such file", path=path)
    sitk = import_simpleitk()
    reader = sitk.ImageFileReader()
    reader.SetImageIO("NrrdImageIO" if kind == "NRRD" else "MetaImageIO")
    reader.SetFileName(str(path))
    try:
        fields, start = _header(path, kind)
        data = _voxel_file(path, fields)
        reader.ReadImageInformation()
        size, channels = reader.GetSize(), reader.GetNumberOfComponents()
        if channels > 1:
            raise InputError(f"holds {channels} numbers a voxel, expected one", path=path)
        if len(size) < 3 or max(size[3:], default=1) > 1:
            raise InputError(f"shape {size}, expected one volume (X, Y, Z)", path=path)
        _check_geometry(path, kind, fields)
        _check_sums(data, start if data == path else 0, fields)
        image = reader.Execute()
    except (OSError, EOFError, zlib.error, RuntimeError) as error:
        raise InputError(f"not a readable {kind} file ({_reason(error)})", path=path, remedy=COPY_AGAIN) from error
    if len(size) > 3:
        image = image[(slice(None),) * 3 + (0,) * (len(size) - 3)]
    array = sitk.GetArrayFromImage(image).T
    geometry = {"suffix": (NRRD_SUFFIXES if kind == "NRRD" else META_SUFFIXES)[0], "shape": image.GetSize()}
    geometry |= {"origin": image.GetOrigin(), "spacing": image.GetSpacing(), "direction": image.GetDirection()}
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(geometry["direction"], (3, 3)) * geometry["spacing"]
    affine[:3, 3] = geometry["origin"]
    return array, LPS_TO_RAS @ affine, json.dumps(geometry)


def write_itk(path: PathLike, array: np.ndarray, geometry: str) -> Path:
    """Writes voxels (X, Y, Z) with the origin, spacing and direction of the volume that `read_itk` read.

    Args:
        path: without suffix: that of the volume's format is added, NRRD's or MetaImage's own for one file.
        geometry: from `read_itk`.

    Returns:
        The file, written whole or not at all.

    Example:
        >>> import tempfile
        >>> geometry = '{"suffix": ".nrrd", "origin": [0, 0, 0], "spacing": [1, 1, 3],'
        >>> geometry += '"direction": [1, 0, 0, 0, 1, 0, 0, 0, 1]}'
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = write_itk(f"{folder}/a_pred", np.zeros((4, 3, 2), np.uint8), geometry)
        ...     file.name, read_itk(file)[1].diagonal().tolist()
        ('a_pred.nrrd', [-1.0, -1.0, 3.0, 1.0])
    """
    sitk = import_simpleitk()
    known = json.loads(geometry)
    image = sitk.GetImageFromArray(array.T)
    image.SetOrigin(known["origin"])
    image.SetSpacing(known["spacing"])
    image.SetDirection(known["direction"])
    file = Path(f"{path}{known['suffix']}")
    with replacing(file) as temporary:
        sitk.WriteImage(image, str(temporary), useCompression=True)
    return file


def itk_shape(geometry: str) -> tuple[int, ...]:
    """The shape (X, Y, Z) of the volume that `read_itk` read.

    Example:
        >>> itk_shape('{"shape": [4, 3, 2]}')
        (4, 3, 2)
    """
    return tuple(json.loads(geometry)["shape"])


def import_simpleitk() -> Any:
    """SimpleITK without its own warnings. It is loaded where it is needed, as that takes a while.

    Example:
        >>> import_simpleitk().__name__
        'SimpleITK'
    """
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def _header(path: Path, kind: str) -> tuple[dict[str, str], int]:
    """The fields of a header, names in lower case without spaces, and where the voxels begin."""
    with path.open("rb") as file:
        block = file.read(LONGEST_HEADER)
    if kind == "NRRD":
        if not block.startswith(b"NRRD"):
            raise OSError("no NRRD header in it")
        blank = re.search(rb"\r?\n\r?\n", block)
        end = blank.end() if blank else len(block)
        separator = ":"
    else:
        last = re.search(rb"^ElementDataFile\s*=.*\n?", block, re.MULTILINE)
        if last is None:
            raise OSError("no MetaImage header in it")
        end = last.end()
        separator = "="
    fields = {}
    for line in block[:end].decode("latin-1").splitlines():
        name, found, value = line.partition(separator)
        if found and not line.startswith("#"):
            fields[name.lower().replace(" ", "")] = value.strip()
    return fields, end


def _voxel_file(path: Path, fields: dict[str, str]) -> Path | None:
    """Where the voxels are; None where they lie in several files."""
    name = fields.get("datafile") or fields.get("elementdatafile") or "LOCAL"
    if name == "LOCAL":
        return path
    if name.startswith("LIST") or "%" in name:
        return None
    file = path.parent / name
    if not file.is_file():
        raise InputError(f"its voxels are in {name}, which is not there", path=path, remedy="copy both files")
    return file


def _check_geometry(path: Path, kind: str, fields: dict[str, str]) -> None:
    """Refuses a header that does not say how the volume lies in the patient, in millimetres."""
    if kind == "NRRD":
        told = "space" in fields and "spacedirections" in fields
        if told and fields["space"].lower() not in SPACES:
            fact = f"its space is {fields['space']}, which does not say where the patient's left is"
            raise InputError(fact, path=path, remedy=SAVE_AGAIN)
        units = set(re.findall(r'"([^"]*)"', fields.get("spaceunits", ""))) - {"mm", ""}
        if units:
            raise InputError(f"its space units are {', '.join(sorted(units))}, expected mm", path=path)
    else:
        told = bool({"transformmatrix", "rotation", "orientation"} & fields.keys())
        told = told and bool({"elementspacing", "elementsize"} & fields.keys())
    if not told:
        raise InputError("its header tells no orientation or no spacing", path=path, remedy=SAVE_AGAIN)


def _check_sums(data: Path | None, start: int, fields: dict[str, str]) -> None:
    """Unpacks what is packed, which compares length and checksum."""
    packed = fields.get("encoding", "").lower() in ("gzip", "gz")
    if not (packed or fields.get("compresseddata", "").lower() == "true") or data is None:
        return
    if {"byteskip", "lineskip"} & fields.keys():
        return
    with data.open("rb") as file:
        file.seek(start)
        if packed:
            with gzip.open(file) as unpacked:
                while unpacked.read(1 << 22):
                    pass
            return
        unpacker = zlib.decompressobj()
        while block := file.read(1 << 20):
            unpacker.decompress(block)
        if not unpacker.eof:
            raise EOFError("its voxels end too early")


def _reason(error: Exception) -> str:
    """What the system or ITK says, without where in ITK's code it says so."""
    lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
    text = next((line for line in reversed(lines) if not line.startswith("Exception thrown")), type(error).__name__)
    return re.sub(r"^ITK ERROR: \w+\(0x[0-9a-f]+\): ", "", text)
