"""Networks, the operation and the losses they are trained with, and how their weights are read."""

from networks.cmunext import CMUNeXt, cmunext, cmunext_l, cmunext_s
from networks.losses import BCEDiceLoss, CEDiceLoss
from networks.selective_scan import selective_scan, selective_scan_2d
from networks.vmunet import VMUNet
from networks.weights import WeightReport, load_weights

__all__ = [
    "BCEDiceLoss",
    "CEDiceLoss",
    "CMUNeXt",
    "VMUNet",
    "WeightReport",
    "cmunext",
    "cmunext_l",
    "cmunext_s",
    "load_weights",
    "selective_scan",
    "selective_scan_2d",
]
