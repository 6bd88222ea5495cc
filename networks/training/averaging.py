"""Weights that are the average of those of many steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

Tensors = tuple[Tensor, ...] | list[Tensor]


class WeightAverage:
    """A copy of a network whose weights follow those that are trained, as their exponential moving average.

    After each step the average moves by 1 − decay towards the network's weights and statistics of batch norms. While
    there have been few steps it moves faster, decay (1 + n) / (10 + n) after n of them at most, so that the random
    weights of the start do not linger. It is PyTorch's `AveragedModel`.

    Validate `network`, give it to `Checkpoints` as what `model.pt` holds, and give `Checkpoints` the trained network
    and this object as what else a run goes on from.

    Args:
        network: the bare one that is trained.
        decay: share of the average that a step leaves. 1 / (1 − decay) is about how many steps it reaches back.

    Example:
        >>> trained = nn.Linear(1, 1)
        >>> average = WeightAverage(trained, decay=0.9)
        >>> average.update()
        >>> bool(average.network.weight == trained.weight)  # one step has no others to be averaged with
        True
    """

    def __init__(self, network: nn.Module, decay: float = 0.99) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of an average is at least 0 and below 1, not {decay}")
        self.trained = network
        self.decay = decay
        self.average = AveragedModel(network, multi_avg_fn=self._move, use_buffers=True)

    @property
    def network(self) -> nn.Module:
        """The network with the averaged weights."""
        return self.average.module

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.update)

    def update(self) -> None:
        """Takes the weights of now in."""
        self.average.update_parameters(self.trained)

    def state_dict(self) -> dict[str, Any]:
        """How many steps were taken in; the weights are the network's to save."""
        return {"steps": int(self.average.n_averaged)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.average.n_averaged.fill_(state["steps"])

    def _move(self, averaged: Tensors, current: Tensors, steps: Tensor | int) -> None:
        decay = min(self.decay, (1 + int(steps)) / (10 + int(steps)))
        get_ema_multi_avg_fn(decay)(averaged, current, steps)  # type: ignore[no-untyped-call]
