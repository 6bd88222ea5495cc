"""MONAI transforms and readers for the three data sets; every array transform has a dictionary version `…d`."""

from transforms.augment import RandRotate, RandRotated, RandRotFlip, RandRotFlipd, rot_flip, rotate
from transforms.datasets import DatasetError, find_files, image_split, synapse_split
from transforms.intensity import WINDOW_HU, WindowHU, WindowHUd
from transforms.readers import (
    PICTURE_SUFFIXES,
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
    "find_files",
    "image_split",
    "read_picture",
    "rot_flip",
    "rotate",
    "spline_zoom",
    "synapse_split",
]
