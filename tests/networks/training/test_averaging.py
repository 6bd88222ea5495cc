from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from torch import nn

from networks.training import WeightAverage


def test_the_average_is_its_formula_with_a_fast_start_and_statistics() -> None:
    """Weights and batch norms' statistics by hand: the decay after n steps is (1 + n) / (10 + n), 0.3 at most."""
    trained = nn.BatchNorm1d(1)
    average = WeightAverage(trained, decay=0.3)
    expected = None
    seen = []

    def step(engine: Engine, batch: float) -> None:
        with torch.no_grad():
            trained.weight.fill_(batch)
        trained(torch.tensor([[batch], [3 * batch]]))
        seen.append((batch, trained.running_mean.item()))

    engine = Engine(step)
    average.attach(engine)
    engine.run([1.0, 4.0, -2.0, 8.0, 3.0])
    for number, values in enumerate(seen):
        decay = min(0.3, (1 + number) / (10 + number))
        if expected is None:
            expected = list(values)
        else:
            expected = [decay * old + (1 - decay) * new for old, new in zip(expected, values, strict=True)]
    assert average.state_dict() == {"steps": 5}
    assert average.network.weight.item() == pytest.approx(expected[0])
    assert average.network.running_mean.item() == pytest.approx(expected[1])
    assert trained.weight.item() == 3


def test_it_begins_with_the_weights_that_training_starts_from() -> None:
    """Weights are loaded into the network after the average has been made."""
    trained = nn.Linear(1, 1)
    average = WeightAverage(trained, decay=0.9)
    with torch.no_grad():
        trained.weight.fill_(7.0)
    average.update()
    assert average.network.weight.item() == 7


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_what_is_no_decay_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        WeightAverage(nn.Linear(1, 1), decay)
