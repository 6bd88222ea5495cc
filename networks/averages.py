"""Networks made of networks: the mean of their logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FlipAverage(nn.Module):
    """The mean logits of an image and of its three mirror images, each mirrored back (test-time augmentation).

    Classes stay what they are: a network that was trained with mirrored images calls a left kidney left in all of them.

    Args:
        network: (B, C, H, W) → logits (B, K, H, W).

    Example:
        >>> network = FlipAverage(nn.Conv2d(3, 1, 3, padding=1))
        >>> image = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(network(image.flip(-1)), network(image).flip(-1), atol=1e-6)
        True
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.out_channels: int | None = getattr(network, "out_channels", None)

    def forward(self, x: Tensor) -> Tensor:
        total = self.network(x)
        for axes in ((-1,), (-2,), (-2, -1)):
            total = total + self.network(x.flip(axes)).flip(axes)
        return total / 4

    def frozen(self, bfloat16: bool = False) -> FlipAverage:
        """A copy for inference, see the network's own."""
        return FlipAverage(_frozen(self.network, bfloat16))


class Ensemble(nn.Module):
    """The mean logits of several networks, of one architecture or several.

    Args:
        networks: each (B, C, H, W) → logits (B, K, H, W).

    Raises:
        ValueError: when there is none, or they answer with different numbers of channels.

    Example:
        >>> one, other = nn.Conv2d(3, 1, 1), nn.Conv2d(3, 1, 1)
        >>> image = torch.rand(1, 3, 8, 8)
        >>> torch.allclose(Ensemble([one, other])(image), (one(image) + other(image)) / 2)
        True
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        channels = {getattr(network, "out_channels", None) for network in networks}
        if len(channels) != 1:
            raise ValueError(
                f"networks to average must have one number of out_channels, not {sorted(map(str, channels))}"
            )
        self.networks = nn.ModuleList(networks)
        self.out_channels: int | None = channels.pop()

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros(1, device=x.device)
        for network in self.networks:
            total = total + network(x)
        return total / len(self.networks)

    def frozen(self, bfloat16: bool = False) -> Ensemble:
        """A copy for inference, see the networks' own."""
        return Ensemble([_frozen(network, bfloat16) for network in self.networks])


def _frozen(network: nn.Module, bfloat16: bool) -> nn.Module:
    freeze = getattr(network, "frozen", None)
    return freeze(bfloat16) if freeze is not None else network.eval()
