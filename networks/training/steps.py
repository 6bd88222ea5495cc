"""What happens around a training step: the rate."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def poly_schedule(optimizer: Optimizer, steps: int, power: float = 0.9) -> LambdaLR:
    """lr · (1 − i / steps)^power, set after step i = 0, 1, …: the first two steps both run at the full rate.

    The schedule of CMUNeXt's training (arXiv 2308.01239), to be stepped after each step.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
        >>> poly_schedule(optimizer, steps=100).get_last_lr()
        [0.01]
    """
    return LambdaLR(optimizer, lambda step: max(1 - max(step - 1, 0) / steps, 0.0) ** power)
