"""Metrics, protocols, volume assembly and reports for segmentation: what the bundles evaluate with."""

from evaluation.distances import hd95
from evaluation.handlers import ImageMetric, ImageReport, MeanLoss, VolumeDice, VolumeReport
from evaluation.inferers import FileEvaluator, ItemOrReason, SliceToVolume
from evaluation.metrics import dice
from evaluation.overlay import save_overview
from evaluation.predictions import ClassIndicesd, LargestComponentd, Overlays, VolumesTable

__all__ = [
    "ClassIndicesd",
    "FileEvaluator",
    "ImageMetric",
    "ImageReport",
    "ItemOrReason",
    "LargestComponentd",
    "MeanLoss",
    "Overlays",
    "SliceToVolume",
    "VolumeDice",
    "VolumeReport",
    "VolumesTable",
    "dice",
    "hd95",
    "save_overview",
]
