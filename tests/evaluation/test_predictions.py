"""What inferring does beside writing masks."""

from __future__ import annotations

import pytest
import torch

from evaluation import LargestComponentd
from evaluation.predictions import class_indices
from transforms import InputError


def test_the_largest_piece_of_each_class_stays() -> None:
    labels = torch.zeros(1, 3, 4, 9, dtype=torch.uint8)
    labels[0, :, :2, :2], labels[0, 0, 0, 5] = 1, 1
    labels[0, 1, 3, 8], labels[0, 1, :2, 6:] = 2, 2
    expected = labels.clone()
    expected[0, 0, 0, 5] = expected[0, 1, 3, 8] = 0
    assert torch.equal(LargestComponentd("pred", "largest")({"pred": labels})["pred"], expected)
    assert torch.equal(LargestComponentd("pred", "none")({"pred": labels})["pred"], labels)
    with pytest.raises(InputError, match="--postprocess all"):
        LargestComponentd("pred", "all")


@pytest.mark.parametrize("channels", [1, 3])
def test_of_probabilities_what_is_removed_becomes_background(channels: int) -> None:
    probabilities = torch.full((channels, 6, 6), 0.1)
    probabilities[0] = 0.1 if channels == 1 else 0.8
    for part in ((slice(0, 2), slice(0, 3)), (slice(4, 6), slice(4, 6))):
        probabilities[0][part], probabilities[-1][part] = 0.1, 0.8
    kept = class_indices(LargestComponentd("pred")({"pred": probabilities})["pred"])
    before = class_indices(probabilities)
    number = max(channels - 1, 1)
    assert (before == number).sum() == 10
    assert (kept == number).sum() == 6
    assert (kept[:2, :3] == number).all()
    assert not kept[3:].any()
