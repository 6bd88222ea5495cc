"""A sample of the broken inputs; `make soak` tries all."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import pytest

from tests.broken.inputs import INPUTS
from tests.broken.warm import Worker

EVERY = 60


def sample() -> list[str]:
    """Every so many inputs, and of each entrance one with each kind of file at least."""
    chosen = set(islice(INPUTS, 0, None, EVERY))
    groups = {(INPUTS[key].world.entrance, INPUTS[key].kind) for key in chosen}
    for key, one in INPUTS.items():
        group = one.world.entrance, one.kind
        if group not in groups:
            groups.add(group)
            chosen.add(key)
    return [key for key in INPUTS if key in chosen]


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


@pytest.mark.parametrize("key", sample())
def test_a_broken_input_is_refused_in_one_line_or_gives_what_the_good_one_gives(key: str, worker: Worker) -> None:
    verdict = worker.verdict(key)
    assert verdict.outcome.good, f"{verdict.outcome.value}: {verdict.reason}\n{verdict.printed}"


def test_there_are_inputs_of_every_kind() -> None:
    kinds = {one.kind for one in INPUTS.values()}
    assert len(INPUTS) > 300
    assert {"png", "jpg", "nii", "nii.gz", "h5", "npz", "pt", "safetensors", "list", "yaml", "option"} <= kinds
