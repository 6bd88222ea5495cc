"""VM-UNet: a U-shaped network whose only token mixer is the selective scan of a vision state-space model.

Ruan, Li and Xiang, "VM-UNet: Vision Mamba UNet for Medical Image Segmentation", arXiv 2402.02491; the SS2D block is
VMamba's (Liu et al., arXiv 2401.10166), the scan Mamba's (Gu and Dao, arXiv 2312.00752).

Symbols
    c       width of a stage
    d       channels inside SS2D, 2c
    N       size of the state each of these channels keeps, `d_state`
    R       rank of the step sizes delta, ceil(c / 16)
    k       one of four directions through the image: rows, columns, and both backwards

Everything between the first and the last convolution is channels-last, (B, H, W, c): linear layers and norms read it
as it lies, and a channels-last view of it is what the depthwise convolution wants.

Differences from the publication
    - logits are returned for one class too (the released wrapper applies a sigmoid);
    - any H and W: the image is continued at its lower and right edge to a multiple of 32 and the result is cropped;
    - tensor names are the published ones without the prefix `vmunet.` (see `networks.load_weights`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from networks.selective_scan import selective_scan_2d
from networks.weights import refuse_unfit_values

PATCH = 4
DIRECTIONS = 4


class SS2D(nn.Module):
    """Two-dimensional selective scan: (B, H, W, c) → (B, H, W, c).

    Args:
        dim: c.
        d_state: N.
        scan_backend: as `backend` of `networks.selective_scan.selective_scan_2d`.

    Example:
        >>> SS2D(8, d_state=4)(torch.zeros(2, 3, 5, 8)).shape
        torch.Size([2, 3, 5, 8])
    """

    def __init__(self, dim: int, d_state: int = 16, scan_backend: str | None = None) -> None:
        super().__init__()
        d, rank = 2 * dim, math.ceil(dim / 16)
        self.scan_backend = scan_backend
        self.in_proj = nn.Linear(dim, 2 * d, bias=False)
        self.conv2d = nn.Conv2d(d, d, kernel_size=3, padding=1, groups=d)
        self.x_proj_weight = nn.Parameter(torch.empty(DIRECTIONS, rank + 2 * d_state, d))
        self.dt_projs_weight = nn.Parameter(torch.empty(DIRECTIONS, d, rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(DIRECTIONS, d))
        self.A_logs = nn.Parameter(torch.empty(DIRECTIONS * d, d_state))
        self.Ds = nn.Parameter(torch.empty(DIRECTIONS * d))
        self.out_norm = nn.LayerNorm(d)
        self.out_proj = nn.Linear(d, dim, bias=False)
        self.reset_scan_parameters()

    @torch.no_grad()
    def reset_scan_parameters(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Mamba's start: A = -(1 … N), D = 1, and softplus(dt bias) log-uniform in [dt_min, dt_max]."""
        d, rank = self.dt_projs_weight.shape[1:]
        for weight in self.x_proj_weight:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        nn.init.uniform_(self.dt_projs_weight, -(rank**-0.5), rank**-0.5)
        dt = torch.empty(DIRECTIONS, d).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=dt_floor)
        self.dt_projs_bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        self.A_logs.copy_(torch.arange(1, self.A_logs.shape[1] + 1).log().expand_as(self.A_logs))
        self.Ds.fill_(1.0)

    def forward(self, x: Tensor) -> Tensor:
        d = self.conv2d.in_channels
        w_x, w_z = self.in_proj.weight.split(d)
        z = F.silu(F.linear(x, w_z))  # (B, H, W, d), as is what follows
        x = F.linear(x, w_x).permute(0, 3, 1, 2)
        x = self.scan(F.silu(self.conv2d(x)).permute(0, 2, 3, 1))
        return self.out_proj(self.out_norm(x) * z)

    def scan(self, x: Tensor) -> Tensor:
        """The core: delta, B and C from x, and four scans: (B, H, W, d) → (B, H, W, d)."""
        x_dbl = F.linear(x, self.x_proj_weight.flatten(0, 1))  # (B, H, W, 4·(R + 2N))
        x_dbl = x_dbl.unflatten(-1, self.x_proj_weight.shape[:2])
        A = -self.A_logs.float().exp()
        return selective_scan_2d(
            x, x_dbl, self.dt_projs_weight, A, self.Ds, self.dt_projs_bias, backend=self.scan_backend
        )


class DropPath(nn.Module):
    """Drops a sample's residual branch with probability `drop_prob` while training (MONAI's cannot be scripted).

    Example:
        >>> DropPath(0.5).eval()(torch.ones(1, 1, 1, 2))
        tensor([[[[1., 1.]]]])
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0.0:
            return x
        kept = torch.rand(x.shape[0], 1, 1, 1, device=x.device) >= self.drop_prob
        return x * (kept / (1.0 - self.drop_prob)).to(x.dtype)


class VSSBlock(nn.Module):
    """x + DropPath(SS2D(LayerNorm(x))) on (B, H, W, c); with `use_checkpoint` recomputed in the backward pass.

    Example:
        >>> VSSBlock(8, d_state=4, drop_path=0.0)(torch.zeros(2, 3, 5, 8)).shape
        torch.Size([2, 3, 5, 8])
    """

    def __init__(
        self,
        dim: int,
        d_state: int,
        drop_path: float,
        use_checkpoint: bool = False,
        scan_backend: str | None = None,
    ) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = SS2D(dim, d_state, scan_backend)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting() and self.use_checkpoint and self.training:
            return checkpoint(self.residual, x, use_reentrant=False)
        return self.residual(x)

    def residual(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.self_attention(self.ln_1(x)))


class PatchEmbed(nn.Module):
    """Image (B, C, H, W) → tokens (B, H/4, W/4, c).

    Example:
        >>> PatchEmbed(3, 8)(torch.zeros(2, 3, 16, 24)).shape
        torch.Size([2, 4, 6, 8])
    """

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=PATCH, stride=PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class PatchMerging(nn.Module):
    """Halves the image, doubles the width: (B, H, W, c) → (B, H/2, W/2, 2c), H and W even.

    Example:
        >>> PatchMerging(8)(torch.zeros(2, 4, 6, 8)).shape
        torch.Size([2, 2, 3, 16])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, c = x.shape
        # channel order (column parity, row parity, c)
        x = x.view(B, H // 2, 2, W // 2, 2, c).permute(0, 1, 3, 4, 2, 5).reshape(B, H // 2, W // 2, 4 * c)
        return self.reduction(self.norm(x))


class PatchExpand(nn.Module):
    """Enlarges the image `scale` times: (B, H, W, c) → (B, sH, sW, expand·c / s²), normalised.

    Example:
        >>> PatchExpand(16, expand=2, scale=2)(torch.zeros(2, 2, 3, 16)).shape
        torch.Size([2, 4, 6, 8])
    """

    def __init__(self, dim: int, expand: int, scale: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, expand * dim, bias=False)
        self.norm = nn.LayerNorm(expand * dim // scale**2)

    def forward(self, x: Tensor) -> Tensor:
        B, H, W, _ = x.shape
        s = self.scale
        # channels are read as (row, column, c)
        x = self.expand(x).view(B, H, W, s, s, -1).transpose(2, 3).reshape(B, s * H, s * W, -1)
        return self.norm(x)


class EncoderStage(nn.Module):
    """Blocks, then patch merging (none in the last stage).

    Example:
        >>> EncoderStage([VSSBlock(8, 4, 0.0)], PatchMerging(8))(torch.zeros(2, 4, 6, 8)).shape
        torch.Size([2, 2, 3, 16])
    """

    def __init__(self, blocks: Sequence[VSSBlock], downsample: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class DecoderStage(nn.Module):
    """Patch expanding (none in the first stage), then blocks.

    Example:
        >>> DecoderStage(PatchExpand(16, 2, 2), [VSSBlock(8, 4, 0.0)])(torch.zeros(2, 2, 3, 16)).shape
        torch.Size([2, 4, 6, 8])
    """

    def __init__(self, upsample: nn.Module, blocks: Sequence[VSSBlock]) -> None:
        super().__init__()
        self.upsample = upsample
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class VMUNet(nn.Module):
    """VM-UNet for 2-D images: (B, in_channels, H, W) → logits (B, out_channels, H, W), for any H and W.

    A one-channel image is repeated to `in_channels`, as published, so that networks started from RGB weights read CT.

    Args:
        in_channels: channels of the image.
        out_channels: classes, the background included where it is one; 1 for a binary mask.
        depths: blocks in each encoder stage; the defaults are the released configuration.
        decoder_depths: blocks in each decoder stage, deepest first.
        dims: width of each stage; each twice the one before.
        d_state: N, state size of the scan.
        drop_path_rate: of the deepest block, rising linearly over the encoder and falling over the decoder.
        use_checkpoint: keep only the blocks' inputs for the backward pass and recompute the rest.
        scan_backend: as `backend` of `networks.selective_scan.selective_scan_2d`.

    Raises:
        ValueError: when the stages do not fit together, or an image has other channels than 1 or `in_channels`.

    Example:
        >>> network = VMUNet(3, 2, depths=(1, 1), decoder_depths=(1, 1), dims=(8, 16), d_state=4)
        >>> network(torch.zeros(2, 1, 30, 20)).shape
        torch.Size([2, 2, 30, 20])
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        depths: Sequence[int] = (2, 2, 2, 2),
        decoder_depths: Sequence[int] = (2, 2, 2, 1),
        dims: Sequence[int] = (96, 192, 384, 768),
        d_state: int = 16,
        drop_path_rate: float = 0.2,
        use_checkpoint: bool = False,
        scan_backend: str | None = None,
    ) -> None:
        super().__init__()
        if not len(depths) == len(decoder_depths) == len(dims):
            raise ValueError(f"depths {depths}, decoder_depths {decoder_depths} and dims {dims} differ in length")
        if any(wide != 2 * narrow for narrow, wide in pairwise(dims)):
            raise ValueError(f"each of dims must be twice the one before, got {dims}")
        self.in_channels = in_channels
        self.multiple = PATCH * 2 ** (len(dims) - 1)

        def stages(widths: Sequence[int], depths: Sequence[int], drop_paths: Sequence[float]) -> list[list[VSSBlock]]:
            rates = iter(drop_paths)
            return [
                [VSSBlock(dim, d_state, next(rates), use_checkpoint, scan_backend) for _ in range(depth)]
                for dim, depth in zip(widths, depths, strict=True)
            ]

        rising = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        falling = torch.linspace(drop_path_rate, 0, sum(decoder_depths)).tolist()
        down = [PatchMerging(dim) for dim in dims[:-1]] + [nn.Identity()]
        up = [nn.Identity()] + [PatchExpand(dim, expand=2, scale=2) for dim in reversed(dims[1:])]

        self.patch_embed = PatchEmbed(in_channels, dims[0])
        self.layers = nn.ModuleList(
            EncoderStage(blocks, merge) for blocks, merge in zip(stages(dims, depths, rising), down, strict=True)
        )
        self.layers_up = nn.ModuleList(
            DecoderStage(expand, blocks)
            for blocks, expand in zip(stages(dims[::-1], decoder_depths, falling), up, strict=True)
        )
        self.final_up = PatchExpand(dims[0], expand=PATCH, scale=PATCH)
        self.final_conv = nn.Conv2d(dims[0] // PATCH, out_channels, kernel_size=1)
        self.head = "final_conv"
        self.out_channels = out_channels
        self.apply(self._init_linear)
        self.register_load_state_dict_pre_hook(refuse_unfit_values)

    @staticmethod
    def _init_linear(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != self.in_channels:
            if x.shape[1] != 1:
                raise ValueError(f"VMUNet expects {self.in_channels} or 1 channels, got an image of {x.shape[1]}")
            x = x.expand(-1, self.in_channels, -1, -1)
        height, width = x.shape[2:]
        x = F.pad(x, (0, -width % self.multiple, 0, -height % self.multiple), mode="replicate")

        x = self.patch_embed(x)
        skips: list[Tensor] = []
        for stage in self.layers:
            x = stage(x)
            skips.append(x)
        skips.pop()  # the deepest one goes on as it is
        for i, stage in enumerate(self.layers_up):
            x = stage(x if i == 0 else x + skips.pop())
        x = self.final_conv(self.final_up(x).permute(0, 3, 1, 2))
        return x[:, :, :height, :width]

    @torch.no_grad()
    def frozen(self, bfloat16: bool = False) -> VMUNet:
        """A copy for inference, in eval mode.

        Args:
            bfloat16: store linear layers, convolutions and SS2D's projections in bfloat16, what the scan itself reads
                in float32; the copy then runs under autocast.

        Example:
            >>> network = VMUNet(dims=(8, 16), depths=(1, 1), decoder_depths=(1, 1)).frozen(bfloat16=True)
            >>> block = network.layers[0].blocks[0].self_attention
            >>> block.x_proj_weight.dtype, block.dt_projs_weight.dtype
            (torch.bfloat16, torch.float32)
        """
        network = copy.deepcopy(self).eval()
        if bfloat16:
            for module in network.modules():
                if isinstance(module, (nn.Linear, nn.Conv2d)):
                    module.bfloat16()
                elif isinstance(module, SS2D):
                    module.x_proj_weight.data = module.x_proj_weight.bfloat16()
        return network
