from __future__ import annotations

import pytest
import torch
from torch import nn

from networks.training import (
    poly_schedule,
)


def test_published_poly_schedule() -> None:
    schedule = poly_schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01), steps=50)
    rates = []
    for _ in range(54):
        rates += schedule.get_last_lr()
        schedule.optimizer.step()
        schedule.step()
    # the published loop sets the rate after each step
    assert rates[0] == 0.01
    assert rates[1:51] == pytest.approx([0.01 * (1 - i / 50) ** 0.9 for i in range(50)], rel=1e-12)
    assert rates[51:] == [0, 0, 0]
