"""CMUNeXt: a U-shaped network of large-kernel depthwise convolutions, small enough for edge devices.

Tang et al., "CMUNeXt: An Efficient Medical Image Segmentation Network based on Large Kernel and Skip Fusion",
ISBI 2024, arXiv 2308.01239.

    image → stem → encoder1 … encoder5, 2×2 max-pooling between them
          → four times: enlarge ×2 (`Up`), fuse with the encoder's feature of that size (`SkipFusion`)
          → 1×1 convolution to logits

Differences from the publication
    - any H and W: the image is continued at its lower and right edge (replicated) to a multiple of 16 and the result is
      cropped; where H and W are multiples of 16 nothing is added.

Tensor names are the published ones, hence the nested `nn.Sequential` and the capitals.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from networks.weights import refuse_unfit_values

STAGES = 5


class Residual(nn.Module):
    """x + fn(x).

    Example:
        >>> Residual(nn.Identity())(torch.ones(2))
        tensor([2., 2.])
    """

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fn(x)


class ConvBNReLU(nn.Module):
    """3×3 convolution, norm, ReLU: (B, in_channels, H, W) → (B, out_channels, H, W).

    Example:
        >>> ConvBNReLU(3, 8)(torch.zeros(2, 3, 4, 6)).shape
        torch.Size([2, 8, 4, 6])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def inverted_bottleneck(in_channels: int, hidden: int, out_channels: int) -> list[nn.Module]:
    """Two 1×1 convolutions, each followed by GELU and norm: the channels are mixed through `hidden` of them.

    Example:
        >>> nn.Sequential(*inverted_bottleneck(4, 16, 2))(torch.zeros(2, 4, 3, 5)).shape
        torch.Size([2, 2, 3, 5])
    """
    return [
        nn.Conv2d(in_channels, hidden, kernel_size=1),
        nn.GELU(),
        nn.BatchNorm2d(hidden),
        nn.Conv2d(hidden, out_channels, kernel_size=1),
        nn.GELU(),
        nn.BatchNorm2d(out_channels),
    ]


class CMUNeXtBlock(nn.Module):
    """An encoder stage: `depth` times depthwise k×k and inverted bottleneck, then the change of width.

    (B, in_channels, H, W) → (B, out_channels, H, W)

    Example:
        >>> CMUNeXtBlock(4, 8, depth=2, kernel_size=7)(torch.zeros(2, 4, 3, 5)).shape
        torch.Size([2, 8, 3, 5])
    """

    def __init__(self, in_channels: int, out_channels: int, depth: int, kernel_size: int) -> None:
        super().__init__()
        c = in_channels
        self.block = nn.Sequential(
            *(
                nn.Sequential(
                    Residual(
                        nn.Sequential(
                            nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c),
                            nn.GELU(),
                            nn.BatchNorm2d(c),
                        )
                    ),
                    *inverted_bottleneck(c, 4 * c, c),
                )
                for _ in range(depth)
            )
        )
        self.up = ConvBNReLU(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.block(x))


class Up(nn.Module):
    """Bilinear enlargement, then 3×3 convolution, norm, ReLU: (B, in_channels, H, W) → (B, out_channels, 2H, 2W).

    Example:
        >>> Up(8, 4)(torch.zeros(2, 8, 3, 5)).shape
        torch.Size([2, 4, 6, 10])
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.up = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
            nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.up(x)


class SkipFusion(nn.Module):
    """Skip and decoder features, twice (B, c, H, W) → (B, c, H, W).

    A 3×3 convolution in two groups looks at each of the two by itself, then the inverted bottleneck mixes them.

    Example:
        >>> SkipFusion(4)(torch.zeros(2, 4, 3, 5), torch.zeros(2, 4, 3, 5)).shape
        torch.Size([2, 4, 3, 5])
    """

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * c, 2 * c, kernel_size=3, padding=1, groups=2),
            nn.GELU(),
            nn.BatchNorm2d(2 * c),
            *inverted_bottleneck(2 * c, 4 * c, c),
        )

    def forward(self, skip: Tensor, x: Tensor) -> Tensor:
        return self.conv(torch.cat((skip, x), dim=1))


class CMUNeXt(nn.Module):
    """CMUNeXt: (B, in_channels, H, W) → logits (B, out_channels, H, W), for any H and W.

    Args:
        in_channels: channels of the image.
        out_channels: classes, the background included where it is one; 1 for a binary mask.
        dims: width of the five stages, shallowest first; the defaults are the published base variant.
        depths: repetitions inside each encoder stage.
        kernel_sizes: of the depthwise convolution of each encoder stage; odd.

    Raises:
        ValueError: when there are not five stages or a kernel size is even.

    Example:
        >>> network = CMUNeXt(1, 3, dims=(2, 2, 2, 2, 2), depths=(1, 1, 1, 1, 1), kernel_sizes=(3, 3, 3, 3, 3))
        >>> network(torch.zeros(2, 1, 30, 20)).shape
        torch.Size([2, 3, 30, 20])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        dims: Sequence[int] = (16, 32, 128, 160, 256),
        depths: Sequence[int] = (1, 1, 1, 3, 1),
        kernel_sizes: Sequence[int] = (3, 3, 7, 7, 7),
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(kernel_sizes) == STAGES:
            raise ValueError(
                f"CMUNeXt has {STAGES} stages, got dims {dims}, depths {depths}, kernel_sizes {kernel_sizes}"
            )
        if any(k % 2 == 0 for k in kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd, got {kernel_sizes}")
        d1, d2, d3, d4, d5 = dims
        self.multiple = 2 ** (STAGES - 1)

        self.stem = ConvBNReLU(in_channels, d1)
        self.encoder1 = CMUNeXtBlock(d1, d1, depths[0], kernel_sizes[0])
        self.encoder2 = CMUNeXtBlock(d1, d2, depths[1], kernel_sizes[1])
        self.encoder3 = CMUNeXtBlock(d2, d3, depths[2], kernel_sizes[2])
        self.encoder4 = CMUNeXtBlock(d3, d4, depths[3], kernel_sizes[3])
        self.encoder5 = CMUNeXtBlock(d4, d5, depths[4], kernel_sizes[4])
        self.Up5 = Up(d5, d4)
        self.Up_conv5 = SkipFusion(d4)
        self.Up4 = Up(d4, d3)
        self.Up_conv4 = SkipFusion(d3)
        self.Up3 = Up(d3, d2)
        self.Up_conv3 = SkipFusion(d2)
        self.Up2 = Up(d2, d1)
        self.Up_conv2 = SkipFusion(d1)
        self.Conv_1x1 = nn.Conv2d(d1, out_channels, kernel_size=1)
        self.head = "Conv_1x1"
        self.out_channels = out_channels
        self.register_load_state_dict_pre_hook(refuse_unfit_values)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        # four poolings halve the image exactly
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")

        x1 = self.encoder1(self.stem(x))  # (B, d1, H, W)
        x2 = self.encoder2(F.max_pool2d(x1, 2))  # (B, d2, H/2, W/2)
        x3 = self.encoder3(F.max_pool2d(x2, 2))
        x4 = self.encoder4(F.max_pool2d(x3, 2))
        x5 = self.encoder5(F.max_pool2d(x4, 2))  # (B, d5, H/16, W/16)

        x = self.Up_conv5(x4, self.Up5(x5))
        x = self.Up_conv4(x3, self.Up4(x))
        x = self.Up_conv3(x2, self.Up3(x))
        x = self.Up_conv2(x1, self.Up2(x))  # (B, d1, H, W)
        return self.Conv_1x1(x)[..., :height, :width]

    @torch.no_grad()
    def frozen(self, bfloat16: bool = False) -> CMUNeXt:
        """A copy for inference: in eval mode, norms merged into the convolutions before or after them.

        The copy computes the same up to rounding. The norms at the end of `Residual`, of `CMUNeXtBlock.block` and of
        all but the last `SkipFusion` stay: what follows them pads with zeros, which a norm's shift does not reach.

        Args:
            bfloat16: store the convolutions in bfloat16; the copy then runs under autocast.

        Example:
            >>> network = cmunext_s().frozen()
            >>> network(torch.zeros(1, 3, 32, 32)).shape
            torch.Size([1, 1, 32, 32])
        """
        network = copy.deepcopy(self).eval()
        for chain in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
            follows = network.Conv_1x1 if chain is network.Up_conv2.conv else nn.Identity()
            modules = [*chain, follows]
            for i, norm in enumerate(modules):
                if not isinstance(norm, nn.BatchNorm2d):
                    continue
                before, after = modules[i - 1], modules[i + 1]
                if isinstance(before, nn.Conv2d):
                    chain[i - 1] = fuse_conv_bn_eval(before, norm)
                elif isinstance(after, nn.Conv2d):
                    _absorb(norm, after)
                else:
                    continue
                chain[i] = nn.Identity()
        if bfloat16:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):
                    module.bfloat16()
        return network


def cmunext_s(in_channels: int = 3, out_channels: int = 1) -> CMUNeXt:
    """The small variant, 0.4 M parameters.

    Example:
        >>> sum(parameter.numel() for parameter in cmunext_s().parameters())
        417505
    """
    return CMUNeXt(in_channels, out_channels, (8, 16, 32, 64, 128), (1, 1, 1, 1, 1), (3, 3, 7, 7, 9))


def cmunext(in_channels: int = 3, out_channels: int = 1) -> CMUNeXt:
    """The base variant, 3.1 M parameters.

    Example:
        >>> sum(parameter.numel() for parameter in cmunext().parameters())
        3149185
    """
    return CMUNeXt(in_channels, out_channels)


def cmunext_l(in_channels: int = 3, out_channels: int = 1) -> CMUNeXt:
    """The large variant, 8.3 M parameters.

    Example:
        >>> sum(parameter.numel() for parameter in cmunext_l().parameters())
        8286721
    """
    return CMUNeXt(in_channels, out_channels, (32, 64, 128, 256, 512), (1, 1, 1, 6, 3), (3, 3, 7, 7, 7))


def _absorb(norm: nn.BatchNorm2d, conv: nn.Conv2d) -> None:
    """Lets the 1×1 convolution after a norm do the norm's work."""
    scale = norm.weight * torch.rsqrt(norm.get_buffer("running_var") + norm.eps)
    shift = norm.bias - norm.get_buffer("running_mean") * scale
    conv.get_parameter("bias").add_(conv.weight[:, :, 0, 0] @ shift)
    conv.weight.mul_(scale[:, None, None])
