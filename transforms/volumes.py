"""Volumes and slices, in and out: NIfTI, NRRD, MetaImage, DICOM, HDF5, and the npz slices that networks train on.

Every command opens its files here. What is read is right, or refused by an `InputError` that names the file. What had
to be guessed is logged as a warning.

MONAI's `LoadImage` hides what `ImageReader.read` raises and tries its other readers; what `get_data` raises reaches the
user. So `read` only passes the path on, and `get_data` opens the file. MONAI's own reader of NIfTI is not used: it
replaces a valid sform where `pixdim` was rounded, and so mirrors the volume.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import logging
import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import ImageReader, MetaTensor
from monai.data.nvimgcodec_pydicom_plugin import is_nvimgcodec_available
from monai.transforms import SaveImage, SaveImaged
from monai.transforms.io.array import SUPPORTED_READERS
from monai.utils import ImageMetaKey, MetaKeys, SpaceKeys, convert_to_numpy, ensure_tuple
from nibabel.imageglobals import logger as nibabel_log
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from transforms.dicom import read_series, write_segmentation
from transforms.files import VOLUME_SUFFIXES, InputError, PathLike, has_suffix, is_dicom, replacing, stem
from transforms.intensity import WINDOW_HU
from transforms.itk import ITK_SUFFIXES, itk_shape, read_itk, write_itk
from transforms.pictures import save_items

# Of prepared volumes (D, H, W): slices run towards Superior, rows Posterior, columns the patient's Left.
ORIENTATION = "SPL"
# Array index (d, h, w, 1) → RAS for unit voxels in that orientation.
SPL_AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])

HDF5_SUFFIXES = (".h5", ".hdf5")
PAIR_SUFFIXES = (".hdr", ".img")
# Grids that are nowhere further apart than this share of a voxel are one grid: headers round.
SAME_GRID_VOXELS = 0.05
# A NIfTI file has to give some geometry. In this field it says that the one it gives is made up.
ASSUMED = b"geometry assumed"

AIR_HU, PADDING_HU, FAT_HU = -1024, -1500, -30
# Released volumes were resampled after the window, and splines overshoot.
OVERSHOOT = 0.5
LARGEST_LABEL = 65535
ROUNDING = 1e-2
NIFTI_MM = {1: 1000.0, 3: 0.001}  # metre and micron; millimetre, or nothing said, otherwise

VERSIONS = {
    True: (nib.nifti1.Nifti1PairHeader, nib.nifti2.Nifti2PairHeader),
    False: (nib.Nifti1Header, nib.Nifti2Header),
}
# Attributes of an HDF5 file, and their shapes.
ATTRIBUTES = {"affine": (4, 4), "spacing_mm": (3,), "window_hu": (2,)}

COPY_AGAIN = "copy or download it again"
PREPARE_AGAIN = "prepare or copy it again"
REPAIR = "repair its header"
# What the libraries raise over damaged files.
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    SyntaxError,
    ArithmeticError,
    MemoryError,
    RuntimeError,
    lzma.LZMAError,
    struct.error,
    tokenize.TokenError,
    zlib.error,
    zipfile.BadZipFile,
)

logger = logging.getLogger(__name__)

# Beside pydicom each LoadImage makes one of every reader, and this one warns where its library is not there.
if not is_nvimgcodec_available():
    SUPPORTED_READERS.pop("nvimgcodecpydicomreader", None)


@dataclass(frozen=True, eq=False)
class Volume:
    """An image or label map, and where it lies.

    Args:
        array: (D, H, W) from HDF5, (X, Y, Z) from the others; labels are whole numbers.
        affine: (4, 4), array index → RAS mm.
        spacing_mm: (3,) voxel size along the array's axes, or None where the file does not say.
        geometry: "file" where the file gives the affine, "assumed" where it does not.
        window_hu: the Hounsfield window that values in [0, 1] stand for; None for Hounsfield units and labels.
        source: what a mask needs to be written in the same format, under the names that the metadata have.

    Example:
        >>> Volume(np.zeros((2, 3, 4)), SPL_AFFINE, None, "assumed").array.shape
        (2, 3, 4)
    """

    array: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, ...] | None
    geometry: str
    window_hu: tuple[float, float] | None = None
    source: Mapping[str, str] = field(default_factory=dict)


def read_volume(path: PathLike, dataset: str = "image", assume_hu: bool = False) -> Volume:
    """One volume of a NIfTI file (.nii, .nii.gz, or a pair .hdr and .img), NRRD, MetaImage or HDF5 file.

    NIfTI: the affine is nibabel's, the sform before the qform. (X, Y, Z, 1) is one volume, as is (X, Y). Voxels that
    are NaN are taken as air, with a warning. HDF5: `python -m prepare synapse` gives attributes, `affine`, `spacing_mm`
    and `window_hu`. Released files have none: their orientation is assumed to be the prepared one, with unit voxels,
    and the window the published one.

    Args:
        path: of the file.
        dataset: "image" or "label": of an HDF5 file the data set, of others what they hold. Labels are rounded where
            they are within 0.01 of whole numbers.
        assume_hu: take an image that does not look like Hounsfield units for such.

    Raises:
        InputError: when the file cannot be read, is damaged, or holds something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nib.save(nib.Nifti1Image(np.ones((4, 3, 2), np.uint8), np.diag([1, 2, 3, 1])), f"{folder}/a.nii.gz")
        ...     volume = read_volume(f"{folder}/a.nii.gz", "label")
        >>> volume.array.shape, volume.spacing_mm, volume.geometry
        ((4, 3, 2), (1.0, 2.0, 3.0), 'file')
    """
    path = Path(path)
    if has_suffix(path, HDF5_SUFFIXES):
        return _read_hdf5(path, dataset)
    if not has_suffix(path, VOLUME_SUFFIXES):
        raise InputError("is no volume", path=path, remedy=f"expected {', '.join(VOLUME_SUFFIXES)}")
    volume = _read_itk(path) if has_suffix(path, ITK_SUFFIXES) else _read_nifti(path)
    if dataset == "label":
        return replace(volume, array=whole_numbers(volume.array, path))
    check_hounsfield(volume.array, path, assume_hu)
    return replace(volume, array=_without_nan(volume.array, path))


def check_hounsfield(array: np.ndarray, path: PathLike, assume_hu: bool = False) -> None:
    """Refuses an image that does not look like a CT in Hounsfield units.

    What lies below −1500 is padding. Of the rest a CT, cropped and windowed as it may be, has some voxels of fat or air
    (below −30) and some of tissue (above). Images in 0 … 1 or 0 … 255, stored numbers (HU + 1024), z-scores and MR lack
    the ones, constant images the others.

    Args:
        array: of any shape; NaN counts for nothing.
        path: of the file.
        assume_hu: refuse nothing.

    Raises:
        InputError: when not more than one voxel in a thousand is fat or air, or tissue.

    Example:
        >>> check_hounsfield(np.array([-1000, -100, 40, 60]), "ct.nii")
        >>> check_hounsfield(np.array([24, 924, 1064, 1084]), "ct.nii")
        Traceback (most recent call last):
        transforms.files.InputError: ct.nii: values from 24 to 1084 do not look like Hounsfield units; ...
    """
    if assume_hu:
        return
    counted, tissue = (np.count_nonzero(array > end) for end in (PADDING_HU, FAT_HU))
    if array.dtype.itemsize > 1 and min(tissue, counted - tissue) > counted / 1000:
        return
    known = array[~np.isnan(array)]
    found = f"values from {known.min():g} to {known.max():g}" if known.size else "voxels that are all NaN"
    raise InputError(
        f"{found} do not look like Hounsfield units",
        path=path,
        remedy="convert it from DICOM with its rescale slope and intercept, or say --assume_hu true where they are",
    )


def whole_numbers(array: np.ndarray, path: PathLike) -> np.ndarray:
    """A label map as unsigned integers; numbers within 0.01 of whole ones are rounded.

    Raises:
        InputError: when it holds fractions, NaN, negative numbers, or numbers above 65535.

    Example:
        >>> whole_numbers(np.array([0.0, 2.99997]), "label.nii")
        array([0, 3], dtype=uint8)
    """
    low, high = array.min(), array.max()
    # NaN is neither.
    if not (low > -ROUNDING and high <= LARGEST_LABEL + ROUNDING):
        raise InputError(f"{_range(low, high)}, expected class numbers from 0 up", path=path)
    rounded = array
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        off = np.abs(array - rounded) > ROUNDING
        if off.any():
            raise InputError(
                f"holds {array[off].flat[0]:g}, expected whole class numbers",
                path=path,
                remedy="resample labels with nearest neighbour, not linearly",
            )
    return rounded.astype(np.uint8 if high < 256 - ROUNDING else np.uint16)


def reoriented(volume: Volume, axcodes: str = ORIENTATION) -> Volume:
    """The volume with its axes permuted and flipped, nothing resampled, so that they run nearest to `axcodes`.

    Example:
        >>> volume = Volume(np.zeros((4, 3, 2)), np.diag([1.0, 2, 3, 1]), (1.0, 2.0, 3.0), "file")
        >>> turned = reoriented(volume)
        >>> turned.array.shape, turned.spacing_mm, nib.aff2axcodes(turned.affine)
        ((2, 3, 4), (3.0, 2.0, 1.0), ('S', 'P', 'L'))
    """
    change = ornt_transform(io_orientation(volume.affine), axcodes2ornt(axcodes))
    order = np.argsort(change[:, 0])
    spacing = volume.spacing_mm
    return replace(
        volume,
        array=apply_orientation(volume.array, change),
        affine=volume.affine @ inv_ornt_aff(change, volume.array.shape),
        spacing_mm=None if spacing is None else tuple(spacing[axis] for axis in order),
    )


def on_grid(array: np.ndarray, affine: np.ndarray, target: np.ndarray, shape: Sequence[int]) -> np.ndarray | None:
    """The array with its axes permuted and flipped so that it lies on the grid of another; None where none would do.

    Args:
        array: (D, H, W).
        affine: array index → mm.
        target: index of the other grid → mm.
        shape: of the other grid.

    Example:
        >>> array = np.arange(3).reshape(3, 1, 1)
        >>> mirrored = np.diag([-1.0, 1, 1, 1])
        >>> mirrored[0, 3] = 2
        >>> on_grid(array, mirrored, np.eye(4), (3, 1, 1)).ravel().tolist()
        [2, 1, 0]
        >>> on_grid(array, np.eye(4), np.diag([1.5, 1, 1, 1]), (3, 1, 1)) is None
        True
    """
    to_target = np.linalg.solve(target, affine)
    signs = np.rint(to_target[:3, :3])
    if not all((np.abs(signs).sum(axis) == 1).all() for axis in (0, 1)):
        return None
    change = np.stack([np.abs(signs).argmax(axis=0), signs.sum(axis=0)], axis=1)
    exact = np.linalg.inv(inv_ornt_aff(change, array.shape))
    turned = apply_orientation(array, change)
    apart = np.abs((to_target - exact) @ _corners(array.shape)).max()
    return turned if turned.shape == tuple(shape) and apart <= SAME_GRID_VOXELS else None


class VolumeReader(ImageReader):
    """Volumes for `LoadImaged`, see `read_volume`.

    All but HDF5 keep their own orientation and Hounsfield units: `Orientationd(axcodes="SPL")` and `WindowHUd` make
    them alike. Metadata beside MONAI's: `geometry`; `spacing_mm` where the file says so; `window_hu` of an HDF5 image;
    `nifti_header`, the header's bytes as hexadecimal digits, or `itk_geometry` or `dicom_files`, as JSON. A DICOM
    series is given as the list of its files.

    Args:
        dataset: "image" or "label".
        assume_hu: take an image that does not look like Hounsfield units for such.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nib.save(nib.Nifti1Image(np.ones((4, 3, 2), np.int16), np.eye(4)), f"{folder}/label0001.nii.gz")
        ...     LoadImage(VolumeReader("label"))(f"{folder}/label0001.nii.gz").shape
        torch.Size([4, 3, 2])
    """

    def __init__(self, dataset: str = "image", assume_hu: bool = False) -> None:
        super().__init__()
        self.dataset = dataset
        self.assume_hu = assume_hu

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(has_suffix(name, VOLUME_SUFFIXES) or is_dicom(name) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[Path, ...]:
        """The paths themselves."""
        return tuple(map(Path, ensure_tuple(data)))

    def get_data(self, img: Sequence[Path]) -> tuple[np.ndarray, dict]:
        """(array, metadata): (D, H, W) from HDF5, slices, rows and columns from DICOM, (X, Y, Z) from the others.

        Raises:
            InputError: when there are several files that are no DICOM series, or one that cannot be taken.
        """
        files = ensure_tuple(img)
        if files and self.dataset == "image" and all(map(is_dicom, files)):
            volume = _read_dicom(files, self.assume_hu)
        elif len(files) != 1:
            raise InputError(f"expected one file, got {', '.join(map(str, files)) or 'none'}")
        else:
            volume = read_volume(files[0], self.dataset, self.assume_hu)
        return volume.array, _metadata(volume)

    def of_array(self, array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, dict]:
        """What `get_data` gives for a NIfTI file that holds this image.

        Args:
            array: (X, Y, Z), Hounsfield units.
            affine: (4, 4), array index → RAS mm.

        Raises:
            InputError: when they are no such image.

        Example:
            >>> array, meta = VolumeReader(assume_hu=True).of_array(np.zeros((4, 3, 2)), np.diag([1.0, 2, 3, 1]))
            >>> array.shape, meta["spacing_mm"].tolist()
            ((4, 3, 2), [1.0, 2.0, 3.0])
        """
        if array.ndim != 3 or not array.size:
            raise InputError(f"the array has shape {array.shape}, expected a volume (X, Y, Z)")
        place = np.asarray(affine)
        if place.shape != (4, 4) or place.dtype.kind not in "uif":
            raise InputError(f"the affine is {place.dtype} of shape {place.shape}, expected numbers, (4, 4)")
        name = Path("array")
        _check_numbers(array.dtype, name)
        _check_affine(place.astype(float), name, "its affine", "give the one of its file")
        check_hounsfield(array, name, self.assume_hu)
        spacing = tuple(nib.affines.voxel_sizes(place).tolist())
        # a copy: the caller's stays as it is, and PyTorch takes no mirrored views
        own = np.array(_without_nan(_native(array), name), order="C")
        volume = Volume(own, place.astype(float), spacing, "file")
        return volume.array, _metadata(volume)


def _metadata(volume: Volume) -> dict[str, Any]:
    """What `VolumeReader` says of an image, see there."""
    meta = {
        MetaKeys.AFFINE: volume.affine.copy(),
        MetaKeys.ORIGINAL_AFFINE: volume.affine.copy(),
        MetaKeys.SPATIAL_SHAPE: np.asarray(volume.array.shape),
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
        "geometry": volume.geometry,
    }
    if volume.spacing_mm is not None:
        meta["spacing_mm"] = np.asarray(volume.spacing_mm)
    if volume.window_hu is not None:
        meta["window_hu"] = np.asarray(volume.window_hu)
    return meta | dict(volume.source)


class SaveImageVolume(SaveImage):
    """Writes a label map as `NAME_pred.nii.gz` on the grid of the image that it belongs to, whole or not at all.

    Of a NIfTI image the header is taken over: shape, sform, qform, their codes and units, so that every program sees
    the mask where it sees the image. Of NRRD and MetaImage the format is, as `NAME_pred.nrrd` and `NAME_pred.mha`, with
    origin, spacing and direction. Of a DICOM series the mask is a DICOM-SEG, `NAME_seg.dcm`. Of a prepared HDF5 image
    the affine is written. Of a released one, whose geometry is not known, unit voxels are, with a note in the header by
    which `read_volume` knows them. MONAI's tools know the step by its base class; its other options have no effect.

    Args:
        output_dir: folder of the masks, made if need be.
        output_postfix: what follows NAME.
        classes: names of the classes 1 … C, for DICOM.
        seg_type: of DICOM: "binary" or "labelmap".
        algorithm: its name, for DICOM.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mask = MetaTensor(np.ones((1, 2, 3, 4)), SPL_AFFINE, {"filename_or_obj": "img/a.nii.gz"})
        ...     _ = SaveImageVolume(folder)(mask)
        ...     nib.load(f"{folder}/a_pred.nii.gz").shape
        (2, 3, 4)
    """

    def __init__(
        self,
        output_dir: PathLike,
        output_postfix: str = "pred",
        classes: Sequence[str] = (),
        seg_type: str = "binary",
        algorithm: str = "segmentation",
    ) -> None:
        super().__init__(output_dir, output_postfix, ".nii.gz", np.uint8, separate_folder=False, print_log=False)
        self.output_dir = Path(output_dir)
        self.postfix = output_postfix
        self.segments: dict[str, Any] = {"classes": classes, "seg_type": seg_type, "algorithm": algorithm}

    def place(self, name: str) -> Path:
        """The path without suffix of the mask of that name."""
        return self.output_dir / f"{name}_{self.postfix}"

    def __call__(
        self, img: NdarrayOrTensor, meta_data: Mapping | None = None, filename: PathLike | None = None
    ) -> NdarrayOrTensor:
        """Writes the file and returns `img`.

        Args:
            img: class indices (1, D, H, W). Further channels are probabilities of the classes, written as
                `NAME_probability_1.nii.gz` … in 16 bits with a scale, as NIfTI knows no float16. A MetaTensor brings
                its metadata and affine; axes that were permuted and flipped since the image was read are put back.
            meta_data: of the image: "filename_or_obj", "affine" and what `VolumeReader` adds.
            filename: path without suffix to use instead.

        Raises:
            ValueError: when `img` is not one label map on the image's grid.
        """
        meta: Mapping[str, Any] = img.meta if isinstance(img, MetaTensor) else dict(meta_data or {})
        image = str(meta.get(ImageMetaKey.FILENAME_OR_OBJ, self._data_index))
        path = Path(filename or self.place(stem(image)))
        array = convert_to_numpy(img)
        # class numbers among probabilities are float16
        labels = whole_numbers(array[0].astype(np.float32) if array.dtype == np.float16 else array[0], path)
        affine = np.asarray(img.affine if isinstance(img, MetaTensor) else meta.get(MetaKeys.AFFINE, SPL_AFFINE))
        affine = affine.astype(float)
        if "dicom_files" in meta:
            path = path.with_name(f"{path.name.removesuffix(f'_{self.postfix}')}_seg.dcm")
            write_segmentation(path, labels, affine, meta["dicom_files"], **self.segments)
        else:
            write_like_input(labels, affine, meta, path)
        name = path.name.removesuffix("_seg.dcm").removesuffix(f"_{self.postfix}")
        for number, probability in enumerate(array[1:], 1):
            _write_probability(probability, affine, meta, path.with_name(f"{name}_probability_{number}"))
        self._data_index += 1
        return img


class SaveImageVolumed(SaveImaged):
    """Dictionary version of `SaveImageVolume`; an item's "name", where it has one, is NAME.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mask = MetaTensor(np.ones((1, 2, 3, 4)), SPL_AFFINE, {"filename_or_obj": "a.npy.h5"})
        ...     _ = SaveImageVolumed("pred", folder)({"pred": mask})
        ...     [file.name for file in Path(folder).iterdir()]
        ['a_pred.nii.gz']
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        output_postfix: str = "pred",
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, output_dir=output_dir, allow_missing_keys=allow_missing_keys)
        self.saver = SaveImageVolume(output_dir, output_postfix, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Writes the files and returns the item."""
        return save_items(self, data)


class SliceReader(ImageReader):
    """Training slices, npz files with the arrays `image` and `label`, for `LoadImaged`: one (H, W), several (D, H, W).

    Args:
        dataset: "image", values in 0 … 1 with some tolerance, or "label", whole numbers.
        stack: one file gives (1, H, W) too.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f"{folder}/case0005_slice000.npz"
        ...     np.savez(file, image=np.zeros((3, 4), np.float32), label=np.ones((3, 4), np.uint8))
        ...     LoadImage(SliceReader("label"))(file).shape, LoadImage(SliceReader("image"))([file, file]).shape
        (torch.Size([3, 4]), torch.Size([2, 3, 4]))
    """

    def __init__(self, dataset: str = "image", stack: bool = False) -> None:
        super().__init__()
        self.dataset = dataset
        self.stack = stack

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(has_suffix(name, [".npz"]) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> tuple[Path, ...]:
        """The paths themselves."""
        return tuple(map(Path, ensure_tuple(data)))

    def get_data(self, img: Sequence[Path]) -> tuple[np.ndarray, dict]:
        """(array, metadata).

        Raises:
            InputError: when a file cannot be read, is damaged, or holds something else.
        """
        files = ensure_tuple(img)
        slices = [self._slice(Path(file)) for file in files]
        for file, array in zip(files, slices, strict=True):
            if array.shape != slices[0].shape:
                raise InputError(f"shape {array.shape}, but {files[0].name} has {slices[0].shape}", path=file)
        array = np.stack(slices) if self.stack or len(slices) > 1 else slices[0]
        meta = {
            MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
        }
        return array, meta

    def _slice(self, path: Path) -> np.ndarray:
        _check_file(path)
        try:
            with path.open("rb") as stream:
                if stream.read(2) != b"PK":
                    raise InputError("is no npz file", path=path, remedy=PREPARE_AGAIN)
                stream.seek(0)
                file = np.load(stream, allow_pickle=False)
                if self.dataset not in file:
                    held = ", ".join(file) or "nothing"
                    raise InputError(f"no array '{self.dataset}', it holds {held}", path=path, remedy=PREPARE_AGAIN)
                array = _native(file[self.dataset])
                # Only the label pays for the comparison.
                other = _stored_shape(file, "image") if self.dataset == "label" else array.shape
        except InputError:
            raise
        except DAMAGE as error:
            raise InputError(f"not a readable npz file ({_line(error)})", path=path, remedy=PREPARE_AGAIN) from error
        if array.ndim != 2 or not array.size:
            raise InputError(f"array '{self.dataset}' has shape {array.shape}, expected (H, W)", path=path)
        if other is not None and other != array.shape:
            raise InputError(f"'image' has shape {other}, 'label' {array.shape}", path=path, remedy=PREPARE_AGAIN)
        _check_numbers(array.dtype, path, self.dataset)
        if self.dataset == "label":
            return whole_numbers(array, path)
        _check_windowed(array, path)
        return array


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _native(array: np.ndarray) -> np.ndarray:
    """In the machine's byte order and no long doubles, as PyTorch takes it."""
    long = array.dtype.kind == "f" and array.dtype.itemsize > 8
    return array.astype(np.float64 if long else array.dtype.newbyteorder("="), copy=False)


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise InputError("is a folder, expected a file", path=path)
    if not path.is_file():
        raise InputError("no such file", path=path)


def _content(path: Path, kind: str) -> bytes:
    """What is in a file, unpacked where it is gzip, whatever its name; that checks length and CRC."""
    _check_file(path)
    try:
        content = path.read_bytes()
        return gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except DAMAGE as error:
        raise InputError(f"not a readable {kind} ({_line(error)})", path=path, remedy=COPY_AGAIN) from error


def _partner(path: Path, suffix: str) -> Path:
    """The other file of a pair, in letters as large as those of the one given."""
    return path.with_suffix(suffix.upper() if path.suffix.isupper() else suffix)


def _read_nifti(path: Path) -> Volume:
    """A volume in its own numbers, all that the header tells checked."""
    # what nibabel logs of odd headers is refused here, or does not matter
    level = nibabel_log.level
    nibabel_log.setLevel(logging.CRITICAL + 1)
    try:
        return _nifti(path)
    finally:
        nibabel_log.setLevel(level)


def _nifti(path: Path) -> Volume:
    kind = "NIfTI file"
    if pair := has_suffix(path, PAIR_SUFFIXES):
        block, data = (_content(_partner(path, suffix), kind) for suffix in PAIR_SUFFIXES)
    else:
        block = data = _content(path, kind)
    version = next((one for one in VERSIONS[pair] if one.may_contain_header(block)), None)
    if version is None:
        raise InputError(f"not a readable {kind} (no NIfTI header in it)", path=path, remedy=COPY_AGAIN)
    try:
        block = block[: version.sizeof_hdr]
        header = version(block)
        shape, dtype, offset = header.get_data_shape(), header.get_data_dtype(), header.get_data_offset()
    except (*DAMAGE, nib.spatialimages.HeaderDataError, nib.wrapstruct.WrapStructError) as error:
        raise InputError(f"not a readable {kind} ({_line(error)})", path=path, remedy=COPY_AGAIN) from error
    if len(shape) < 2 or min(shape) < 1 or max(shape[3:], default=1) > 1:
        raise InputError(f"shape {shape}, expected one volume (X, Y, Z)", path=path)
    if dtype.fields is not None:
        raise InputError(f"holds RGB colours ({len(dtype.fields)} channels), expected one number a voxel", path=path)
    _check_numbers(dtype, path)
    needed = math.prod(shape) * dtype.itemsize
    if not pair and offset < header.single_vox_offset:
        fact = f"not a readable {kind} (its voxels would begin in its header, at byte {offset})"
        raise InputError(fact, path=path, remedy="set its vox_offset, or convert it again")
    if offset < 0 or len(data) - offset < needed:
        raise InputError(
            f"not a readable {kind} (shape {shape} takes {needed} bytes, it has {max(len(data) - offset, 0)})",
            path=path,
            remedy=COPY_AGAIN,
        )
    affine = _affine(header, block, path, shape)
    try:
        array = np.asarray(nib.arrayproxy.ArrayProxy(BytesIO(data), header))
    except (*DAMAGE, nib.spatialimages.HeaderDataError) as error:
        raise InputError(f"not a readable {kind} ({_line(error)})", path=path, remedy=COPY_AGAIN) from error
    array = _native(array.reshape((*shape, 1)[:3], order="F"))
    # digits, which go through data loaders
    source = {"nifti_header": header.binaryblock.hex()}
    if bytes(header["descrip"]).startswith(ASSUMED):
        return Volume(array, affine, None, "assumed", source=source)
    return Volume(array, affine, tuple(nib.affines.voxel_sizes(affine).tolist()), "file", source=source)


def _read_dicom(files: Sequence[Path], assume_hu: bool) -> Volume:
    array, affine, spacing, source = read_series(files, assume_hu)
    check_hounsfield(array, files[0], assume_hu)
    return Volume(_without_nan(array, files[0]), affine, spacing, "file", source={"dicom_files": source})


def _read_itk(path: Path) -> Volume:
    array, affine, geometry = read_itk(path)
    _check_numbers(array.dtype, path)
    _check_affine(affine, path, "its header")
    spacing = tuple(nib.affines.voxel_sizes(affine).tolist())
    return Volume(_native(array), affine, spacing, "file", source={"itk_geometry": geometry})


def _affine(header: Any, block: bytes, path: Path, shape: Sequence[int]) -> np.ndarray:
    """nibabel's affine, in mm."""
    used = "sform" if header["sform_code"] > 0 else "qform"
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        raise InputError(
            "its header tells no orientation (sform and qform codes are 0)", path=path, remedy="download it again"
        )
    try:
        # nibabel makes 1 of 0
        if used == "qform" and not type(header)(block, check=False)["pixdim"][1 : 1 + min(len(shape), 3)].all():
            raise ValueError("voxels of 0 mm")
        affine = header.get_best_affine()
    except (ValueError, nib.spatialimages.HeaderDataError) as error:
        raise InputError(f"its {used} is no orientation ({_line(error)})", path=path, remedy=REPAIR) from error
    affine = affine * np.array([[NIFTI_MM.get(int(header["xyzt_units"]) & 7, 1.0)]] * 3 + [[1.0]])
    _check_affine(affine, path, f"its {used}")
    if used == "sform" and header["qform_code"] > 0:
        with contextlib.suppress(ValueError, nib.spatialimages.HeaderDataError):
            corners = _corners(shape)
            apart = np.abs((header.get_qform() - header.get_sform()) @ corners)[:3].max()
            if apart > nib.affines.voxel_sizes(header.get_sform()).min():
                logger.warning(f"{path}: sform and qform lie up to {apart:.3g} mm apart; the sform is believed")
    return affine


def _check_affine(affine: np.ndarray, path: Path, what: str, remedy: str = REPAIR) -> None:
    """Refuses what is no place in space: not finite, flat, or voxels that no scanner makes."""
    sizes = np.linalg.norm(affine[:3, :3], axis=0) if np.isfinite(affine).all() else np.zeros(3)
    if not sizes.all() or abs(np.linalg.det(affine[:3, :3] / sizes)) < 0.05:
        raise InputError(f"{what} is no orientation ({affine[:3].tolist()})", path=path, remedy=remedy)
    if not (sizes > 1e-3).all() or not (sizes < 1e2).all():
        stated = " × ".join(f"{size:g}" for size in sizes)
        raise InputError(f"{what} gives voxels of {stated} mm", path=path, remedy=remedy)


def _check_numbers(dtype: np.dtype, path: Path, dataset: str = "") -> None:
    if dtype.kind not in "buif":
        kind = "complex numbers" if dtype.kind == "c" else f"{dtype}"
        what = f"array '{dataset}' holds" if dataset else "holds"
        raise InputError(f"{what} {kind}, expected one real number a voxel", path=path)


def _check_windowed(array: np.ndarray, path: Path, lacks: str = "") -> None:
    low, high = array.min(), array.max()
    # NaN is neither.
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise InputError(
            f"{_range(low, high)}{lacks}, expected an image windowed to [0, 1]",
            path=path,
            remedy="prepare it again from its NIfTI",
        )


def _range(low: float, high: float) -> str:
    return "holds NaN" if math.isnan(low) else f"values from {low:g} to {high:g}"


def _without_nan(array: np.ndarray, path: Path) -> np.ndarray:
    """NaN, which registration writes outside of the field of view, as air."""
    if array.dtype.kind != "f" or np.isfinite(array).all():
        return array
    if np.isinf(array).any():
        raise InputError("holds infinite values", path=path, remedy=COPY_AGAIN)
    nan = np.isnan(array)
    logger.warning(f"{path}: {np.count_nonzero(nan)} of {nan.size} voxels are NaN, taken as air ({AIR_HU} HU)")
    return np.where(nan, array.dtype.type(AIR_HU), array)


def _read_hdf5(path: Path, dataset: str) -> Volume:
    _check_file(path)
    try:
        with h5py.File(path, "r") as file:
            array = _dataset(file, path, dataset)
            attributes = {name: np.asarray(file.attrs[name]) for name in ATTRIBUTES if name in file.attrs}
    except InputError:
        raise
    except DAMAGE as error:
        raise InputError(f"not a readable HDF5 file ({_line(error)})", path=path, remedy=PREPARE_AGAIN) from error
    for name, value in attributes.items():
        if value.dtype.kind not in "uif" or value.shape != ATTRIBUTES[name] or not np.isfinite(value).all():
            raise InputError(f"attribute '{name}' is {value.tolist()}", path=path, remedy=PREPARE_AGAIN)
    known = {name: value.astype(float) for name, value in attributes.items()}
    affine, spacing, window = (known.get(name) for name in ATTRIBUTES)
    for name, usable in (("spacing_mm", spacing is None or (spacing > 0).all()), ("window_hu", _rises(window))):
        if not usable:
            raise InputError(f"attribute '{name}' is {known[name].tolist()}", path=path, remedy=PREPARE_AGAIN)
    geometry = "assumed" if affine is None else "file"
    if affine is None:
        affine = SPL_AFFINE * ([1, 1, 1, 1] if spacing is None else [*spacing, 1])
        depth, height, width = array.shape
        if depth == height != width:
            raise InputError(
                f"data set '{dataset}' has shape {array.shape}, which looks like (H, W, D)",
                path=path,
                remedy="store it as (D, H, W), or say what it is by an attribute 'affine'",
            )
    else:
        _check_affine(affine, path, "its attribute 'affine'", PREPARE_AGAIN)
        sizes = nib.affines.voxel_sizes(affine)
        if spacing is not None and np.abs(spacing / sizes - 1).max() > SAME_GRID_VOXELS:
            raise InputError(
                f"attribute 'spacing_mm' is {spacing.tolist()}, but 'affine' gives {sizes.tolist()}",
                path=path,
                remedy=PREPARE_AGAIN,
            )
        spacing = sizes if spacing is None else spacing
    spacing_mm = None if spacing is None else tuple(spacing.tolist())
    if dataset == "label":
        return Volume(whole_numbers(array, path), affine, spacing_mm, geometry)
    _check_windowed(array, path, " and no attribute 'window_hu'" if window is None else "")
    if array.min() == array.max():
        raise InputError(f"holds {array.flat[0]:g} in every voxel", path=path, remedy=PREPARE_AGAIN)
    if window is None:
        window = np.asarray(WINDOW_HU)
    return Volume(array, affine, spacing_mm, geometry, tuple(window.tolist()))


def _rises(window: np.ndarray | None) -> bool:
    return window is None or window[0] < window[1]


def _dataset(file: h5py.File, path: Path, name: str) -> np.ndarray:
    if name not in file:
        found = ", ".join(sorted(file)) or "nothing"
        raise InputError(f"no data set '{name}', it holds {found}", path=path, remedy=PREPARE_AGAIN)
    stored = file[name]
    if not isinstance(stored, h5py.Dataset):
        raise InputError(f"'{name}' is a group, expected a data set", path=path, remedy=PREPARE_AGAIN)
    if stored.ndim != 3 or not stored.size:
        raise InputError(f"data set '{name}' has shape {stored.shape}, expected (D, H, W)", path=path)
    _check_numbers(stored.dtype, path, name)
    # HDF5 gives zeros where nothing was written.
    if stored.chunks:
        places = itertools.product(*map(range, [0] * 3, stored.shape, stored.chunks))
        whole = all(stored.id.get_chunk_info_by_coord(place).byte_offset is not None for place in places)
    else:
        whole = stored.is_virtual or stored.id.get_storage_size() >= stored.nbytes
    if not whole:
        raise InputError(f"data set '{name}' was not written whole", path=path, remedy=PREPARE_AGAIN)
    return _native(np.asarray(stored))


def _stored_shape(file: np.lib.npyio.NpzFile, name: str) -> tuple[int, ...] | None:
    """The shape of an array in an npz file, from its header alone; None where there is no such array."""
    if name not in file:
        return None
    assert file.zip is not None
    with file.zip.open(f"{name}.npy") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        return read(stream)[0]


def _corners(shape: Sequence[int]) -> np.ndarray:
    """(4, 8): the indices of an array's corner voxels, as affines take them."""
    return np.array(list(itertools.product(*((0, size - 1) for size in (*shape, 1)[:3]), (1,)))).T


def write_like_input(labels: np.ndarray, affine: np.ndarray, meta: Mapping[str, Any], path: Path) -> Path:
    """Writes a label map on the grid of the image that was read, and in its format; HDF5's is NIfTI.

    Args:
        labels: (D, H, W), unsigned integers.
        affine: array index → RAS mm, the image's or that of the image turned.
        meta: of the image, from `VolumeReader`.
        path: without suffix.

    Returns:
        The file.

    Raises:
        ValueError: when the labels do not lie on the image's grid, however turned.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_like_input(np.zeros((4, 3, 2), np.uint8), SPL_AFFINE, {}, Path(folder, "a")).name
        'a.nii.gz'
    """
    if "itk_geometry" in meta:
        geometry = meta["itk_geometry"]
        return write_itk(path, _turned(labels, affine, meta, itk_shape(geometry), path), geometry)
    mask = _nifti_like_input(labels, affine, meta, path)
    file = Path(f"{path}.nii.gz")
    with replacing(file) as temporary:
        nib.save(mask, temporary)
    return file


def _write_probability(probability: np.ndarray, affine: np.ndarray, meta: Mapping[str, Any], path: Path) -> None:
    stored = np.rint(probability.astype(np.float32) * 65535).astype(np.uint16)
    image = _nifti_like_input(stored, affine, meta, path)
    # nibabel then writes the numbers as they are
    image.header.set_slope_inter(1 / 65535, 0)
    with replacing(f"{path}.nii.gz") as temporary:
        nib.save(image, temporary)


def _turned(
    labels: np.ndarray, affine: np.ndarray, meta: Mapping[str, Any], shape: Sequence[int], path: Path
) -> np.ndarray:
    """The labels on the grid of the image, which had this shape when it was read."""
    turned = on_grid(labels, affine, np.asarray(meta[MetaKeys.ORIGINAL_AFFINE], float), (*shape, 1)[:3])
    if turned is None:
        raise ValueError(f"{path}: shape {labels.shape} and affine are not those of the image, however turned")
    return turned


def _nifti_like_input(labels: np.ndarray, affine: np.ndarray, meta: Mapping[str, Any], path: Path) -> nib.Nifti1Image:
    """A NIfTI image of the labels on the grid of the image that was read."""
    if "nifti_header" not in meta:
        mask = nib.Nifti1Image(labels, affine)
        mask.set_sform(affine, code=1)
        mask.set_qform(affine, code=1)
        if meta.get("geometry") == "file":
            mask.header.set_xyzt_units("mm")
        elif meta.get("geometry") == "assumed":
            mask.header["descrip"] = ASSUMED
        return mask
    block = bytes.fromhex(meta["nifti_header"])
    kind = nib.Nifti1Image if len(block) == nib.Nifti1Header.sizeof_hdr else nib.Nifti2Image
    header = kind.header_class(block, check=False).as_byteswapped("<")
    shape = header.get_data_shape()
    turned = _turned(labels, affine, meta, shape, path)
    # What the header says of the image's numbers does not hold for the labels.
    header.set_data_dtype(labels.dtype)
    header.set_slope_inter(1, 0)
    for name in ("cal_max", "cal_min", "intent_code", "intent_p1", "intent_p2", "intent_p3", "vox_offset"):
        header[name] = 0
    header["intent_name"] = header["aux_file"] = b""
    header["magic"] = header.single_magic
    # Without an affine nibabel leaves sform and qform alone.
    return kind(turned.reshape(shape), None, header)
