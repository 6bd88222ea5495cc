"""Changes of NIfTI files: of their bytes, of what their headers claim, and of voxels."""

from __future__ import annotations

import gzip
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np

from tests.broken.changes import (
    ANY,
    EITHER,
    REFUSED,
    SAID,
    SAME,
    Change,
    Edit,
    any_file,
    at,
    cut_end,
    damage,
    expecting,
    flipped,
    rewrite,
)


def nifti_bytes(function: Callable[[bytes], bytes]) -> Edit:
    """Changes what a NIfTI file holds, below its compression, which stays whole."""

    def edit(path: Path) -> None:
        packed = path.name.endswith(".gz")
        data = function(gzip.decompress(path.read_bytes()) if packed else path.read_bytes())
        path.write_bytes(gzip.compress(data, mtime=0) if packed else data)

    return edit


def nifti_array(function: Callable[[np.ndarray], np.ndarray], kind: type = nib.Nifti1Image) -> Edit:
    """Other voxels in the same place."""

    def edit(path: Path) -> None:
        image = nib.load(path)
        array = function(np.asarray(image.dataobj))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            changed = kind(array, image.affine, dtype=array.dtype)
        target = path.with_name(f"new{''.join(path.suffixes)}")
        nib.save(changed, target)
        target.replace(path)

    return edit


def one_voxel(value: float, dtype: str = "f4") -> Edit:
    """The value in a voxel inside the body."""

    def changed(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array[tuple(size // 2 for size in array.shape)] = value
        return array

    return nifti_array(changed)


def nifti_affine(function: Callable[[np.ndarray], np.ndarray]) -> Edit:
    def edit(data: bytes) -> bytes:
        rows = np.frombuffer(data[280:328], "<f4").reshape(3, 4)
        return data[:280] + function(rows.copy()).astype("<f4").tobytes() + data[328:]

    return nifti_bytes(edit)


def _chain(*functions: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    def all_of_them(data: bytes) -> bytes:
        for function in functions:
            data = function(data)
        return data

    return all_of_them


DIM, DATATYPE, BITPIX, PIXDIM, VOX_OFFSET, SLOPE, INTER, QFORM, SFORM, QUATERNION = (
    40, 70, 72, 76, 108, 112, 116, 252, 254, 256,
)  # fmt: skip
QFORM_ALONE = _chain(at(QFORM, "<h", 1), at(SFORM, "<h", 0))


def _rgb(array: np.ndarray) -> np.ndarray:
    coloured = np.zeros(array.shape, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    coloured["R"] = array.astype(int) % 256
    return coloured


def nifti_headers() -> list[Change]:
    """Headers that claim too much, too little, or nonsense; the compression around them is whole."""
    nan = float("nan")
    return [
        Change("voxels cut by half", nifti_bytes(lambda data: data[: 352 + (len(data) - 352) // 2]), REFUSED),
        Change("header without voxels", nifti_bytes(lambda data: data[:352]), REFUSED),
        Change("half a header", nifti_bytes(lambda data: data[:200]), REFUSED),
        Change("sizeof_hdr 0", nifti_bytes(at(0, "<i", 0)), EITHER),
        Change("another magic", nifti_bytes(at(344, "4s", b"nope")), EITHER),
        Change("claims 30000³ voxels", nifti_bytes(at(DIM, "<4h", 3, 30000, 30000, 30000)), REFUSED),
        Change("claims one slice more", nifti_bytes(_more_slices(1)), REFUSED),
        Change("claims seven axes", nifti_bytes(at(DIM, "<8h", 7, 32, 32, 8, 9, 9, 9, 9)), REFUSED),
        Change("dim[0] = 0", nifti_bytes(at(DIM, "<h", 0)), REFUSED),
        Change("dim[0] = 9", nifti_bytes(at(DIM, "<h", 9)), REFUSED),
        Change("no rows", nifti_bytes(at(DIM + 4, "<h", 0)), REFUSED),
        Change("−4 rows", nifti_bytes(at(DIM + 4, "<h", -4)), REFUSED),
        Change("two volumes", nifti_array(lambda array: np.stack([array, array], -1)), REFUSED),
        Change("(X, Y, Z, 1)", nifti_array(lambda array: array[..., None]), SAME),
        Change("two axes", nifti_array(lambda array: array[..., 3]), REFUSED),
        Change("unknown datatype", nifti_bytes(at(DATATYPE, "<h", 9999)), REFUSED),
        Change("datatype binary", nifti_bytes(at(DATATYPE, "<h", 1)), REFUSED),
        Change("complex", nifti_array(lambda array: array.astype(np.complex64)), REFUSED),
        Change("colours", nifti_array(_rgb), REFUSED),
        Change("bitpix 7", nifti_bytes(at(BITPIX, "<h", 7)), EITHER),
        Change("vox_offset 10⁹", nifti_bytes(at(VOX_OFFSET, "<f", 1e9)), REFUSED),
        Change("vox_offset NaN", nifti_bytes(at(VOX_OFFSET, "<f", nan)), EITHER),
        Change("vox_offset 0", nifti_bytes(at(VOX_OFFSET, "<f", 0)), EITHER),
        Change("vox_offset −352", nifti_bytes(at(VOX_OFFSET, "<f", -352)), EITHER),
        Change("scl_slope NaN", nifti_bytes(at(SLOPE, "<f", nan)), SAME),
        Change("scl_slope 0", nifti_bytes(at(SLOPE, "<f", 0)), SAME),
        Change("scl_slope Inf", nifti_bytes(at(SLOPE, "<ff", float("inf"), 0)), EITHER),
        Change("scl_inter NaN", nifti_bytes(at(SLOPE, "<ff", 1, nan)), EITHER),
        Change("an extension of 2 GB", nifti_bytes(_extension(2**31 - 16)), EITHER),
        Change("an extension of no length", nifti_bytes(_extension(0)), EITHER),
        Change("sform of zeros", nifti_affine(np.zeros_like), REFUSED),
        Change("sform of NaN", nifti_affine(lambda rows: rows * nan), REFUSED),
        Change("sform with an Inf", nifti_affine(lambda rows: np.where(rows == rows[2, 2], np.inf, rows)), REFUSED),
        Change("sform of rank 2", nifti_affine(lambda rows: rows[[0, 0, 2]]), REFUSED),
        Change("no orientation", nifti_bytes(at(QFORM, "<hh", 0, 0)), REFUSED),
        Change("quaternion of length 2", nifti_bytes(_chain(QFORM_ALONE, at(QUATERNION, "<f", 2))), REFUSED),
        Change("qform alone, pixdim 0", nifti_bytes(_chain(QFORM_ALONE, at(PIXDIM + 4, "<3f", 0, 0, 0))), REFUSED),
        Change("qform alone, pixdim NaN", nifti_bytes(_chain(QFORM_ALONE, at(PIXDIM + 4, "<f", nan))), REFUSED),
        Change("pixdim rounded", nifti_bytes(at(PIXDIM + 4, "<3f", 11.0004, 11.0004, 18.001)), SAME),
        Change("pixdim NaN", nifti_bytes(at(PIXDIM + 4, "<f", nan)), EITHER),
        Change("pixdim 0", nifti_bytes(at(PIXDIM + 4, "<f", 0)), EITHER),
        Change("pixdim negative", nifti_bytes(at(PIXDIM + 4, "<f", -11)), EITHER),
        Change("sform code 77", nifti_bytes(at(SFORM, "<h", 77)), EITHER),
        Change("big endian", _big_endian, SAME),
        Change("NIfTI-2", nifti_array(lambda array: array, nib.Nifti2Image), SAME),
        Change("float64", nifti_array(lambda array: array.astype(np.float64)), SAME),
    ]


def _more_slices(count: int) -> Callable[[bytes], bytes]:
    return lambda data: at(DIM + 6, "<h", struct.unpack("<h", data[DIM + 6 : DIM + 8])[0] + count)(data)


def _extension(size: int) -> Callable[[bytes], bytes]:
    def edit(data: bytes) -> bytes:
        inserted = struct.pack("<4B2i", 1, 0, 0, 0, size, 4) + bytes(8)
        return at(VOX_OFFSET, "<f", 368)(data[:348]) + inserted + data[352:]

    return edit


def _big_endian(path: Path) -> None:
    image = nib.load(path)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(np.asarray(image.dataobj).dtype.newbyteorder(">"))
    changed = nib.Nifti1Image(np.asarray(image.dataobj), image.affine, header)
    target = path.with_name(f"new{''.join(path.suffixes)}")
    nib.save(changed, target)
    target.replace(path)


def nifti_gz() -> list[Change]:
    """Below gzip's checksum, above it, and without it."""
    return [
        *any_file(),
        *damage(),
        Change("checksum flipped", rewrite(lambda data: flipped(data, len(data) - 6)), EITHER),
        Change("no trailer", cut_end(8), EITHER),
        Change("not compressed", rewrite(gzip.decompress), EITHER),
        Change("compressed twice", rewrite(lambda data: gzip.compress(data, mtime=0)), EITHER),
        Change("an archive by another name", _as_zip, REFUSED),
        Change("HDF5 by another name", _as_h5, REFUSED),
        *nifti_headers(),
    ]


def nifti_plain() -> list[Change]:
    """Without checksum: a bit flipped in the voxels cannot be told."""
    return [
        *any_file(),
        *expecting(damage(flips=ANY, blocks=ANY), {"cut by one byte": REFUSED, "last byte flipped": ANY}),
        Change("compressed", rewrite(lambda data: gzip.compress(data, mtime=0)), EITHER),
    ]


def _as_zip(path: Path) -> None:
    content = path.read_bytes()
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(path.name, content)


def _as_h5(path: Path) -> None:
    path.unlink()
    with h5py.File(path, "w") as file:
        file["image"] = np.zeros((2, 3, 4))


def ct_values() -> list[Change]:
    """What are no Hounsfield units, or not finite."""
    return [
        Change("one NaN", one_voxel(np.nan), SAID),
        Change("one Inf", one_voxel(np.inf), SAID),
        Change("NaN everywhere", nifti_array(lambda array: np.full(array.shape, np.nan, "f4")), REFUSED),
        Change("Inf everywhere", nifti_array(lambda array: np.full(array.shape, np.inf, "f4")), REFUSED),
        Change("constant", nifti_array(lambda array: np.full_like(array, 40)), REFUSED),
        Change("0 … 1", nifti_array(lambda array: ((array + 1024) / 2600).clip(0, 1).astype("f4")), REFUSED),
        Change("0 … 255", nifti_array(lambda array: ((array + 200) / 2).clip(0, 255).astype("u1")), REFUSED),
        Change("HU + 1024", nifti_array(lambda array: array + np.int16(1024)), REFUSED),
        Change("HU wrapped in 16 bits", nifti_array(lambda array: array.astype("u2")), REFUSED),
        Change("mean 0, sd 1", nifti_array(lambda array: ((array - array.mean()) / array.std()).astype("f4")), REFUSED),
    ]


def pair_geometry() -> list[Change]:
    """A label, prediction or image that does not lie on its partner."""

    def moved(rows: np.ndarray) -> np.ndarray:
        rows[2, 3] += 100
        return rows

    def mirrored(rows: np.ndarray) -> np.ndarray:
        rows[0, 0] *= -1
        return rows

    return [
        Change("one slice less", nifti_array(lambda array: array[..., 1:]), REFUSED),
        Change("axes exchanged", nifti_array(lambda array: np.ascontiguousarray(array.transpose(0, 2, 1))), REFUSED),
        Change("moved by 100 mm", nifti_affine(moved), REFUSED),
        Change("mirrored affine", nifti_affine(mirrored), REFUSED),
    ]


def label_values(highest: int) -> list[Change]:
    return [
        Change("one NaN", one_voxel(np.nan), REFUSED),
        Change(f"an id of {highest + 1}", one_voxel(highest + 1), REFUSED),
        Change("an id of 200", one_voxel(200), REFUSED),
        Change("an id of −1", one_voxel(-1), REFUSED),
        Change("a fraction", one_voxel(2.5), REFUSED),
        Change("2.99997 for 3", nifti_array(lambda array: (array * (1 - 1e-5)).astype("f4")), SAME),
        Change("int64", nifti_array(lambda array: array.astype(np.float64)), SAME),
        Change("a CT in its place", nifti_array(lambda array: array.astype("i2") * 150 - 1000), REFUSED),
    ]
