"""Changes of volumes in HDF5 and of training slices in npz."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import torch

from tests.broken.changes import (
    ANY,
    EITHER,
    REFUSED,
    SAID,
    SAME,
    Change,
    Edit,
    any_file,
    damage,
    expecting,
    flipped,
    rewrite,
)


def h5(edit: Callable[[h5py.File], Any]) -> Edit:
    def open_and_edit(path: Path) -> None:
        with h5py.File(path, "r+") as file:
            edit(file)

    return open_and_edit


def h5_data(key: str, function: Callable[[np.ndarray], Any]) -> Edit:
    """Another data set of that name."""

    def edit(file: h5py.File) -> None:
        array = file[key][()]
        del file[key]
        file[key] = function(array)

    return h5(edit)


def h5_voxel(key: str, value: float, dtype: str = "f4") -> Edit:
    def changed(array: np.ndarray) -> np.ndarray:
        array = array.astype(dtype)
        array[tuple(size // 2 for size in array.shape)] = value
        return array

    return h5_data(key, changed)


def _attribute(name: str, value: Any) -> Edit:
    return h5(lambda file: file.attrs.__setitem__(name, value))


def _in_chunk(edit: Callable[[bytes, int, int], bytes]) -> Edit:
    """Changes the bytes of the fifth chunk of the image, which has a checksum of its own."""

    def change(path: Path) -> None:
        with h5py.File(path) as file:
            stored = file["image"].id.get_chunk_info(4)
        path.write_bytes(edit(path.read_bytes(), stored.byte_offset, stored.size))

    return change


def _claims(file: h5py.File) -> None:
    del file["image"]
    file.create_dataset("image", (30000, 30000, 30000), "f4", chunks=(1, 32, 32))


def _replaced(key: str, make: Callable[[h5py.File], Any]) -> Edit:
    def edit(file: h5py.File) -> None:
        del file[key]
        make(file)

    return h5(edit)


def _unknown_filter(file: h5py.File) -> None:
    shape = file["image"].shape
    del file["image"]
    file.create_dataset(
        "image", shape, "f4", chunks=(1, *shape[1:]), compression=32001, allow_unknown_filter=True
    )  # fmt: skip
    for index in range(shape[0]):
        file["image"].id.write_direct_chunk((index, 0, 0), b"packed by a plugin")


def h5_image() -> list[Change]:
    """Of a volume's file, its image and its attributes."""
    nan = float("nan")
    return [
        *any_file(),
        *expecting(damage(flips=ANY, blocks=ANY, end=ANY), {"first byte flipped": EITHER, "cut by one byte": EITHER}),
        Change(
            "a bit flipped in a slice", _in_chunk(lambda data, start, size: flipped(data, start + size // 2)), EITHER
        ),
        Change(
            "zeros in a slice",
            _in_chunk(lambda data, start, size: data[: start + 20] + bytes(20) + data[start + 40 :]),
            EITHER,
        ),
        Change(
            "a slice's checksum flipped", _in_chunk(lambda data, start, size: flipped(data, start + size - 1)), EITHER
        ),
        Change("no image", h5(lambda file: file.__delitem__("image")), REFUSED),
        Change("image by another name", h5(lambda file: file.move("image", "img")), REFUSED),
        Change("a group for the image", _replaced("image", lambda file: file.create_group("image")), REFUSED),
        Change(
            "a dangling link for the image",
            _replaced("image", lambda file: file.__setitem__("image", h5py.SoftLink("/nowhere"))),
            REFUSED,
        ),
        Change(
            "an image in a missing file",
            _replaced("image", lambda file: file.__setitem__("image", h5py.ExternalLink("nowhere.h5", "/image"))),
            REFUSED,
        ),
        Change("claims 30000³ voxels", h5(_claims), REFUSED),
        Change("an unknown filter", h5(_unknown_filter), REFUSED),
        Change("image of one slice's shape", h5_data("image", lambda array: array[0]), REFUSED),
        Change("image with four axes", h5_data("image", lambda array: np.stack([array, array])), REFUSED),
        Change("image of no slices", h5_data("image", lambda array: array[:0]), REFUSED),
        Change("image of one number", h5_data("image", lambda array: 0.5), REFUSED),
        Change(
            "image without data", _replaced("image", lambda file: file.__setitem__("image", h5py.Empty("f4"))), REFUSED
        ),
        Change("complex image", h5_data("image", lambda array: array.astype(np.complex64)), REFUSED),
        Change("image of words", h5_data("image", lambda array: np.full(array.shape, b"0.5")), REFUSED),
        Change("image of records", h5_data("image", lambda array: np.zeros(array.shape, [("a", "f4")])), REFUSED),
        Change(
            "image of lists",
            _replaced("image", lambda file: file.create_dataset("image", (8, 32, 32), h5py.vlen_dtype("f4"))),
            REFUSED,
        ),
        Change("float64 image", h5_data("image", lambda array: array.astype(np.float64)), SAME),
        Change("one NaN in the image", h5_voxel("image", nan), SAID),
        Change("one Inf in the image", h5_voxel("image", np.inf), SAID),
        Change("NaN everywhere in the image", h5_data("image", lambda array: array * nan), REFUSED),
        Change("Hounsfield units under a window", h5_data("image", lambda array: array * 400 - 125), REFUSED),
        Change("image from 0 to 255", h5_data("image", lambda array: (array * 255).round()), REFUSED),
        Change("affine of NaN", _attribute("affine", np.full((4, 4), nan)), REFUSED),
        Change("affine of zeros", _attribute("affine", np.zeros((4, 4))), REFUSED),
        Change("affine of words", _attribute("affine", "identity"), REFUSED),
        Change("affine 3 × 3", _attribute("affine", np.eye(3)), REFUSED),
        Change("spacing of NaN", _attribute("spacing_mm", [nan, 1, 1]), REFUSED),
        Change("spacing of zeros", _attribute("spacing_mm", [0.0, 0, 0]), REFUSED),
        Change("spacing negative", _attribute("spacing_mm", [-18.0, 11, 11]), REFUSED),
        Change("spacing of two numbers", _attribute("spacing_mm", [11.0, 11.0]), REFUSED),
        Change("spacing that is not the affine's", _attribute("spacing_mm", [1.0, 2, 3]), REFUSED),
        Change("window of NaN", _attribute("window_hu", [nan, nan]), REFUSED),
        Change("window that falls", _attribute("window_hu", [275.0, -125.0]), REFUSED),
        Change("another window", _attribute("window_hu", [-160.0, 240.0]), REFUSED),
        Change("window of words", _attribute("window_hu", "abdomen"), REFUSED),
        Change("NIfTI by another name", _as_nifti, REFUSED),
        Change("npz by another name", as_npz, REFUSED),
    ]


def _as_nifti(path: Path) -> None:
    path.write_bytes(nib.Nifti1Image(np.zeros((4, 4, 4), "i2"), np.eye(4)).to_bytes())


def as_npz(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, image=np.zeros((8, 32, 32), "f4"), label=np.zeros((8, 32, 32), "u1"))


def h5_label() -> list[Change]:
    return [
        Change("no label", h5(lambda file: file.__delitem__("label")), REFUSED),
        Change("image and label exchanged", _exchanged, REFUSED),
        Change("label of another shape", h5_data("label", lambda array: array[1:]), REFUSED),
        Change("label of one slice's shape", h5_data("label", lambda array: array[0]), REFUSED),
        Change("label with an id of 9", h5_voxel("label", 9, "u1"), REFUSED),
        Change("label with an id of −1", h5_voxel("label", -1, "i2"), REFUSED),
        Change("label with a fraction", h5_voxel("label", 2.5), REFUSED),
        Change("label with NaN", h5_voxel("label", np.nan), REFUSED),
        Change("complex label", h5_data("label", lambda array: array.astype(np.complex64)), REFUSED),
        Change("label of words", h5_data("label", lambda array: np.full(array.shape, b"1")), REFUSED),
        Change("label with 2.99997 for 3", h5_data("label", lambda array: (array * (1 - 1e-5)).astype("f4")), SAME),
        Change("label int64", h5_data("label", lambda array: array.astype(np.int64)), SAME),
    ]


def _exchanged(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file.move("image", "other")
        file.move("label", "image")
        file.move("other", "label")


# Slices to train on


def npz(function: Callable[[dict[str, Any]], Any]) -> Edit:
    """Other arrays in a whole archive."""

    def edit(path: Path) -> None:
        with np.load(path) as file:
            arrays = dict(file)
        changed = function(arrays)
        np.savez(path, **(arrays if changed is None else changed))

    return edit


def slice_pixel(key: str, value: float, dtype: str = "f4") -> Edit:
    def changed(arrays: dict[str, Any]) -> None:
        array = arrays[key].astype(dtype)
        array[16, 16] = value
        arrays[key] = array

    return npz(changed)


def slice_array(key: str, function: Callable[[np.ndarray], Any]) -> Edit:
    return npz(lambda arrays: {**arrays, key: function(arrays[key])})


def zip_part(part: str, function: Callable[[bytes], bytes], **options: Any) -> Edit:
    """Another part in an archive that is whole."""

    def edit(path: Path) -> None:
        with zipfile.ZipFile(path) as file:
            parts = {info.filename: file.read(info) for info in file.infolist()}
        with zipfile.ZipFile(path, "w", **options) as file:
            for name, content in parts.items():
                file.writestr(name, function(content) if name.endswith(part) else content)

    return edit


def in_zip_part(part: str, shift: float = 0.5, bit: int = 4) -> Edit:
    """A bit flipped in the stored bytes of a part, whose checksum is then wrong."""

    def edit(path: Path) -> None:
        with zipfile.ZipFile(path) as file:
            info = next(info for info in file.infolist() if info.filename.endswith(part))
        data = path.read_bytes()
        name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
        start = info.header_offset + 30 + name + extra
        path.write_bytes(flipped(data, start + int(shift * (info.compress_size - 1)), bit))

    return edit


def _npy_header(text: bytes) -> Callable[[bytes], bytes]:
    """Another header before the numbers of an npy file."""

    def edit(data: bytes) -> bytes:
        length = struct.unpack("<H", data[8:10])[0]
        header = text.ljust(len(text) + (-(10 + len(text) + 1)) % 64) + b"\n"
        return data[:8] + struct.pack("<H", len(header)) + header + data[10 + length :]

    return edit


def _marked(bit: int) -> Edit:
    """A flag in every local and central header."""

    def edit(data: bytes) -> bytes:
        for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            start = data.find(signature)
            while start >= 0:
                data = data[: start + offset] + bytes([data[start + offset] | bit]) + data[start + offset + 1 :]
                start = data.find(signature, start + 4)
        return data

    return rewrite(edit)


def slices() -> list[Change]:
    nan = float("nan")
    huge = b"{'descr': '<f4', 'fortran_order': False, 'shape': (30000, 30000, 30000), }"
    code = b"{'descr': __import__('os').system('touch executed'), 'fortran_order': False, 'shape': (32, 32), }"
    return [
        *any_file(),
        *damage(),
        Change("a bit flipped in the image", in_zip_part("image.npy"), EITHER),
        Change("a bit flipped in the label", in_zip_part("label.npy"), EITHER),
        Change("no image", npz(lambda arrays: {"label": arrays["label"]}), REFUSED),
        Change("no label", npz(lambda arrays: {"image": arrays["image"]}), REFUSED),
        Change("no arrays", npz(lambda arrays: {}), REFUSED),
        Change("other names", npz(lambda arrays: {"img": arrays["image"], "mask": arrays["label"]}), REFUSED),
        Change("one array more", npz(lambda arrays: {**arrays, "spacing": np.ones(3)}), SAME),
        Change("image and label exchanged", npz(lambda a: {"image": a["label"], "label": a["image"]}), REFUSED),
        Change("compressed", lambda path: _compressed(path), SAME),
        Change("claims 30000³ pixels", zip_part("image.npy", _npy_header(huge)), REFUSED),
        Change("a header that is code", zip_part("image.npy", _npy_header(code)), REFUSED),
        Change("a header of noise", zip_part("image.npy", lambda data: data[:10] + bytes(60) + data[70:]), REFUSED),
        Change("half an image", zip_part("image.npy", lambda data: data[: len(data) // 2]), REFUSED),
        Change("marked as encrypted", _marked(1), REFUSED),
        Change("image of objects", npz(lambda a: {**a, "image": np.array([{"a": 1}, None], object)}), REFUSED),
        Change("label of objects", slice_array("label", lambda array: array.astype(object)), REFUSED),
        Change("complex image", slice_array("image", lambda array: array.astype(np.complex64)), REFUSED),
        Change("image of words", slice_array("image", lambda array: np.full(array.shape, "0.5")), REFUSED),
        Change("image of dates", slice_array("image", lambda array: array.astype("i8").astype("M8[s]")), REFUSED),
        Change("float64 image", slice_array("image", lambda array: array.astype(np.float64)), SAME),
        Change("image in columns", slice_array("image", np.asfortranarray), SAME),
        Change("one NaN in the image", slice_pixel("image", nan), REFUSED),
        Change("one Inf in the image", slice_pixel("image", np.inf), REFUSED),
        Change("NaN everywhere in the image", slice_array("image", lambda array: array * nan), REFUSED),
        Change("Hounsfield units", slice_array("image", lambda array: array * 400 - 125), REFUSED),
        Change("image from 0 to 255", slice_array("image", lambda array: (array * 255).round()), REFUSED),
        Change("image with three axes", slice_array("image", lambda array: np.stack([array] * 3)), REFUSED),
        Change("image with one axis", slice_array("image", np.ravel), REFUSED),
        Change("image of no pixels", slice_array("image", lambda array: array[:0]), REFUSED),
        Change("image of one number", slice_array("image", lambda array: np.float32(0.5)), REFUSED),
        Change("label of another shape", slice_array("label", lambda array: array[1:]), REFUSED),
        Change("label with three axes", slice_array("label", lambda array: array[..., None]), REFUSED),
        Change("label with an id of 9", slice_pixel("label", 9), REFUSED),
        Change("label with an id of 255", slice_pixel("label", 255), REFUSED),
        Change("label with an id of −1", slice_pixel("label", -1), REFUSED),
        Change("label with a fraction", slice_pixel("label", 2.5), REFUSED),
        Change("label with NaN", slice_pixel("label", nan), REFUSED),
        Change("complex label", slice_array("label", lambda array: array.astype(np.complex64)), REFUSED),
        Change("label int64", slice_array("label", lambda array: array.astype(np.int64)), SAME),
        Change("label of whole floats", slice_array("label", lambda array: array.astype("f4")), SAME),
        Change("npy by another name", lambda path: _as_one_array(path), REFUSED),
        Change("weights by another name", lambda path: torch.save({"a": torch.zeros(1)}, path), REFUSED),
    ]


def _compressed(path: Path) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez_compressed(path, **arrays)


def _as_one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros((32, 32), "f4"))
