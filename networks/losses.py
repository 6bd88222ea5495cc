"""The losses CMUNeXt and VM-UNet were trained with: cross-entropy plus Dice, on logits.

| published recipe              | here                                          |
|-------------------------------|-----------------------------------------------|
| CMUNeXt on ultrasound         | `BCEDiceLoss(bce_weight=0.5, smooth=1e-5)`    |
| VM-UNet on dermoscopy         | `BCEDiceLoss()`                               |
| VM-UNet on multi-organ CT     | `CEDiceLoss()`                                |

p is the predicted probability, g the reference mask, s the smoothing term. The Dice parts are MONAI's; what is added
here is the pairing the papers use, float32 arithmetic whatever the autocast, and shape errors that name the shapes.
"""

import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import nn


class BCEDiceLoss(nn.Module):
    """`bce_weight` · BCE + mean over samples of 1 − (2Σpg + s) / (Σp + Σg + s), p the sigmoid of the logits.

    With several channels (overlapping labels) each channel of each sample has its own Dice term.
    """

    def __init__(self, bce_weight: float = 1.0, smooth: float = 1.0) -> None:
        super().__init__()
        self.bce_weight = bce_weight
        self.dice = DiceLoss(sigmoid=True, smooth_nr=smooth, smooth_dr=smooth)

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """logits and target (B, C, H, W), target in [0, 1], soft edges allowed -> scalar.

        Raises ValueError where the shapes differ.
        """
        if logits.shape != target.shape:
            raise ValueError(f"BCEDiceLoss: logits {tuple(logits.shape)} and target {tuple(target.shape)} must agree")
        with torch.autocast(logits.device.type, enabled=False):
            logits = _at_least_float32(logits)
            target = target.to(logits.dtype)
            return self.bce_weight * F.binary_cross_entropy_with_logits(logits, target) + self.dice(logits, target)


class CEDiceLoss(nn.Module):
    """Cross-entropy + mean over all classes, background included, of 1 − (2Σpg + s) / (Σp² + Σg² + s).

    p is the softmax of the logits, g the one-hot label, s = 1e-5; the sums run over every pixel of the whole batch.
    """

    def __init__(self, smooth: float = 1e-5) -> None:
        super().__init__()
        self.dice = DiceLoss(
            softmax=True, to_onehot_y=True, squared_pred=True, batch=True, smooth_nr=smooth, smooth_dr=smooth
        )

    def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """logits (B, C, H, W) with C ≥ 2, target (B, 1, H, W) or (B, H, W) class indices 0 … C − 1 -> scalar.

        Raises ValueError where the shapes do not match or there is one class only.
        """
        if logits.shape[1] < 2:
            raise ValueError(f"CEDiceLoss: logits {tuple(logits.shape)} need two channels or more; one: BCEDiceLoss")
        if target.ndim == logits.ndim - 1:
            target = target.unsqueeze(1)
        if target.shape != logits[:, :1].shape:
            raise ValueError(
                f"CEDiceLoss: target {tuple(target.shape)} must hold one class index for each pixel of logits "
                f"{tuple(logits.shape)}"
            )
        with torch.autocast(logits.device.type, enabled=False):
            logits = _at_least_float32(logits)
            target = target.long()
            return F.cross_entropy(logits, target.squeeze(1)) + self.dice(logits, target)


def _at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
