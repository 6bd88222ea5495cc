"""Metrics, protocols, volume assembly and reports for segmentation: what the bundles evaluate with."""

from evaluation.handlers import VolumeDice, VolumeReport
from evaluation.metrics import dice, hd95
from evaluation.volume import SliceToVolume

__all__ = ["SliceToVolume", "VolumeDice", "VolumeReport", "dice", "hd95"]
