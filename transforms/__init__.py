"""MONAI transforms and readers for the three data sets; every array transform has a dictionary version `…d`."""

from transforms.augment import RandRotate, RandRotated, RandRotFlip, RandRotFlipd, rot_flip, rotate
from transforms.datasets import DatasetError, find_files, image_split, synapse_split
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
    SPL_AFFINE,
    HDF5Reader,
    MaskReader,
    PictureReader,
    VolumeReader,
    read_picture,
)
from transforms.writers import SaveMasks, SaveMasksd
from transforms.zoom import SplineZoom, SplineZoomd, spline_zoom

__all__ = [
    "PICTURE_SUFFIXES",
    "SPL_AFFINE",
    "VOLUME_SUFFIXES",
    "WINDOW_HU",
    "DatasetError",
    "HDF5Reader",
    "MaskReader",
    "PictureReader",
    "RandRotFlip",
    "RandRotFlipd",
    "RandRotate",
    "RandRotated",
    "SaveMasks",
    "SaveMasksd",
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
