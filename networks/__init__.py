"""Networks, and how their weights are read. The scan that VM-UNet is made of is in `networks.selective_scan`."""

from networks.averages import Ensemble, FlipAverage
from networks.cmunext import CMUNeXt, cmunext, cmunext_l, cmunext_s
from networks.vmunet import VMUNet
from networks.weights import WeightReport, load_weights

__all__ = [
    "CMUNeXt",
    "Ensemble",
    "FlipAverage",
    "VMUNet",
    "WeightReport",
    "cmunext",
    "cmunext_l",
    "cmunext_s",
    "load_weights",
]
