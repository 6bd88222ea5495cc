"""The weights that a network has before it is trained or used."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from networks.averages import Ensemble
from networks.training.speed import check_channels
from networks.weights import load_weights

logger = logging.getLogger(__name__)


def load_trained(
    network: nn.Module, path: str | Path | Sequence[str | Path], wanted: bool = True, out_channels: int | None = None
) -> nn.Module:
    """`network` with the weights at `path`, every tensor of it; with `wanted=False` as it is.

    Args:
        path: of a checkpoint. Of several, the mean of their logits is what comes back, see `networks.Ensemble`.
        out_channels: how many channels the classes need. It is compared with what the network says of itself.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not fit, or the network's output does not fit the classes.

    Example:
        >>> load_trained(nn.Linear(2, 1), "no/model.pt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no weight file no/model.pt: train first, or name an existing checkpoint as --ckpt_path
    """
    check_channels(network, getattr(network, "out_channels", None), out_channels)
    if not isinstance(path, str | Path):
        return Ensemble([load_trained(copy.deepcopy(network), one, wanted, out_channels) for one in path])
    if wanted:
        _load(network, path, "train first, or name an existing checkpoint as --ckpt_path")
    return network


def start_from(
    network: nn.Module, pretrained: str | Path | None, new_head: bool | str = False, min_matched: float = 1.0
) -> nn.Module:
    """`network` with the weights that a training starts from; None leaves them random.

    Args:
        pretrained: a checkpoint that `load_weights` understands.
        new_head: it is of other classes. The last layer, or the layer of that name, is left out, and the log names the
            tensors that stay random.
        min_matched: least share of the network's tensors that the file must fill.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not fit.

    Example:
        >>> network = start_from(nn.Linear(2, 1), None)
    """
    if pretrained is None:
        if new_head:
            raise ValueError("--new_head is for weights to start from: name them as --pretrained too")
        logger.info("no weights to start from: they are random")
        return network
    remedy = "name an existing file as --pretrained"
    _load(network, pretrained, remedy, start=True, new_head=new_head, min_matched=float(min_matched))
    return network


def _load(network: nn.Module, path: str | Path, remedy: str, **options: Any) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"no weight file {path}: {remedy}")
    logger.info(str(load_weights(network, path, **options)))
