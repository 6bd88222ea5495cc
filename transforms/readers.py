"""Readers of volumes for `LoadImaged`: prepared HDF5, and NIfTI.

MONAI's `LoadImage` hides what `ImageReader.read` raises and tries its other readers; what `get_data` raises reaches the
user. So `read` looks at the suffix only, and `get_data` opens the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
from monai.config import PathLike
from monai.data import ImageReader, NibabelReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple

from transforms.files import VOLUME_SUFFIXES, has_suffix
from transforms.intensity import WINDOW_HU

# Of prepared volumes (D, H, W): slices run towards Superior, rows Posterior, columns the patient's Left.
ORIENTATION = "SPL"
# Array index (d, h, w, 1) → RAS for unit voxels in that orientation.
SPL_AFFINE = np.array([[0.0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])

ATTRIBUTES = ("affine", "spacing_mm", "window_hu")


class _OneFileReader(ImageReader):
    suffixes: tuple[str, ...]

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(has_suffix(name, self.suffixes) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Path:
        """The path itself.

        Raises:
            ValueError: when there are several files, or the suffix is not this reader's.
        """
        files = ensure_tuple(data)
        if len(files) != 1 or not self.verify_suffix(files):
            raise ValueError(f"{', '.join(map(str, files))}: expected one file ending in {', '.join(self.suffixes)}")
        return Path(files[0])


class HDF5Reader(_OneFileReader):
    """One data set of an HDF5 volume, (D, H, W), as `python -m prepare synapse` writes it or as it was released.

    Metadata: `affine` (array index → RAS mm), `window_hu` (the Hounsfield window that the values in [0, 1] stand for)
    and, where the file says so, `spacing_mm` (3,) in the order (D, H, W). Released volumes hold no attributes: they get
    unit voxels in the prepared orientation (`SPL_AFFINE`), the published window, and no `spacing_mm`.

    Args:
        dataset: name of the data set in the file, `image` or `label`.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with h5py.File(f"{folder}/case0001.npy.h5", "w") as file:
        ...         file["image"] = np.zeros((2, 3, 4))
        ...     LoadImage(HDF5Reader())(f"{folder}/case0001.npy.h5").shape
        torch.Size([2, 3, 4])
    """

    suffixes: tuple[str, ...] = (".h5", ".hdf5")

    def __init__(self, dataset: str = "image") -> None:
        super().__init__()
        self.dataset = dataset

    def get_data(self, img: Path) -> tuple[np.ndarray, dict]:
        """(array (D, H, W), metadata).

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file cannot be read or holds something else.
        """
        if not img.is_file():
            raise FileNotFoundError(f"{img}: no such file")
        try:
            with h5py.File(img, "r") as file:
                found = sorted(file)
                array = np.asarray(file[self.dataset]) if self.dataset in file else None
                attributes = {
                    name: np.asarray(file.attrs[name], dtype=float) for name in ATTRIBUTES if name in file.attrs
                }
        except OSError as error:
            raise ValueError(f"{img}: not a readable HDF5 file ({error}); prepare or copy it again") from error
        if array is None:
            raise ValueError(f"{img}: no data set '{self.dataset}', it holds {', '.join(found) or 'nothing'}")
        if array.ndim != 3:
            raise ValueError(f"{img}: data set '{self.dataset}' has shape {array.shape}, expected (D, H, W)")
        if "window_hu" not in attributes and self.dataset == "image" and not 0 <= array.min() <= array.max() <= 1:
            raise ValueError(
                f"{img}: values from {array.min():g} to {array.max():g} and no attribute 'window_hu';"
                " expected a windowed image in [0, 1], prepare the volume again from its NIfTI"
            )
        affine = attributes.get("affine", SPL_AFFINE)
        meta = {
            MetaKeys.AFFINE: affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),
            "window_hu": attributes.get("window_hu", np.asarray(WINDOW_HU)),
        }
        if "spacing_mm" in attributes:
            meta["spacing_mm"] = attributes["spacing_mm"]
        return array, meta


class VolumeReader(HDF5Reader):
    """Prepared HDF5 volumes and NIfTI through one `LoadImaged`, chosen by suffix.

    NIfTI keeps its own orientation and Hounsfield units: `Orientationd(axcodes="SPL")` and `WindowHUd` make both alike.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     nib.save(nib.Nifti1Image(np.zeros((4, 3, 2), np.int16), np.eye(4)), f"{folder}/img0001.nii.gz")
        ...     LoadImage(VolumeReader())(f"{folder}/img0001.nii.gz").shape
        torch.Size([4, 3, 2])
    """

    suffixes = VOLUME_SUFFIXES

    def get_data(self, img: Path) -> tuple[np.ndarray, dict]:
        """(array, metadata): (D, H, W) from HDF5, (X, Y, Z) from NIfTI.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file cannot be read or holds something else.
        """
        if has_suffix(img, HDF5Reader.suffixes):
            return super().get_data(img)
        if not img.is_file():
            raise FileNotFoundError(f"{img}: no such file")
        reader = NibabelReader()
        try:
            array, meta = reader.get_data(reader.read(img))
        except (OSError, EOFError, nib.filebasedimages.ImageFileError) as error:
            raise ValueError(f"{img}: not a readable NIfTI file ({error})") from error
        if array.ndim != 3:
            raise ValueError(f"{img}: shape {array.shape}, expected one volume (X, Y, Z)")
        return array, meta
