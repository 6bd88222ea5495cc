"""From files to network input and back; every array transform has a dictionary version `…d`."""

from transforms.augment import RandRotateDegrees, RandRotateDegreesd, RandRotFlip, RandRotFlipd, rot_flip, rotate
from transforms.datasets import (
    BTCV_IDS,
    SYNAPSE_CLASSES,
    DatasetError,
    DataSplit,
    LabelSet,
    find_files,
    image_split,
    synapse_split,
)
from transforms.files import (
    PICTURE_SUFFIXES,
    VOLUME_SUFFIXES,
    by_name,
    case_name,
    has_suffix,
    list_files,
    pair_by_name,
    replacing,
    sha256,
    stem,
)
from transforms.intensity import WINDOW_HU, WindowHU, WindowHUd
from transforms.readers import (
    ORIENTATION,
    SPL_AFFINE,
    HDF5Reader,
    MaskReader,
    PictureReader,
    VolumeReader,
    read_picture,
)
from transforms.writers import SaveImageMask, SaveImageMaskd
from transforms.zoom import SplineZoom, SplineZoomd, spline_zoom

__all__ = [
    "BTCV_IDS",
    "ORIENTATION",
    "PICTURE_SUFFIXES",
    "SPL_AFFINE",
    "SYNAPSE_CLASSES",
    "VOLUME_SUFFIXES",
    "WINDOW_HU",
    "DataSplit",
    "DatasetError",
    "HDF5Reader",
    "LabelSet",
    "MaskReader",
    "PictureReader",
    "RandRotFlip",
    "RandRotFlipd",
    "RandRotateDegrees",
    "RandRotateDegreesd",
    "SaveImageMask",
    "SaveImageMaskd",
    "SplineZoom",
    "SplineZoomd",
    "VolumeReader",
    "WindowHU",
    "WindowHUd",
    "by_name",
    "case_name",
    "find_files",
    "has_suffix",
    "image_split",
    "list_files",
    "pair_by_name",
    "read_picture",
    "replacing",
    "rot_flip",
    "rotate",
    "sha256",
    "spline_zoom",
    "stem",
    "synapse_split",
]
