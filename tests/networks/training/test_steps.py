from __future__ import annotations

import logging
import math
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from monai.data import DataLoader
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import from_engine
from monai.transforms import Compose, RandGaussianNoised, ToTensord
from torch import nn

from networks.training import (
    Checkpoints,
    EpochSampler,
    FiniteAverage,
    Repeatable,
    SeededDataset,
    StepGuard,
    poly_schedule,
)
from transforms import replacing


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


# Order and randomness


def drawn(count: int, epoch: int, seed: int = 0, skip: int = 0, shuffle: bool = True) -> list[int]:
    sampler = EpochSampler(range(count), seed, shuffle)
    sampler.set_epoch(epoch, skip)
    return list(sampler)


def test_an_epoch_is_every_item_once_in_an_order_of_its_own() -> None:
    orders = {(seed, epoch): [n % 20 for n in drawn(20, epoch, seed)] for seed in (0, 1) for epoch in (1, 2, 3)}
    assert all(sorted(order) == list(range(20)) for order in orders.values())
    assert len(set(map(tuple, orders.values()))) == len(orders)
    assert all(n // 20 == 3 for n in drawn(20, epoch=3))
    assert drawn(20, 2) == drawn(20, 2)
    assert drawn(20, 2, skip=7) == drawn(20, 2)[7:]
    assert drawn(3, 1, shuffle=False) == [3, 4, 5]
    assert drawn(3, 1, skip=3) == []


@pytest.mark.parametrize(("count", "world"), [(7, 2), (8, 3), (1, 4), (9, 3)])
def test_processes_share_an_epoch(count: int, world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(drawn(count, epoch=1))
        assert drawn(count, epoch=1, skip=world) == shares[-1][1:]
    # as many steps for each, or the others would wait for ever
    assert len({len(share) for share in shares}) == 1
    seen = [n - count for share in shares for n in share]
    assert set(seen) == set(range(count))
    assert len(seen) - count < world


@pytest.mark.parametrize(("count", "world", "skip"), [(7, 2, 3), (8, 3, 4), (9, 4, 8), (9, 2, 0), (5, 4, 4)])
def test_processes_share_what_others_have_left_of_an_epoch(
    count: int, world: int, skip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = drawn(count, epoch=1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        shares.append(drawn(count, epoch=1, skip=skip))
    assert len({len(share) for share in shares}) == 1
    assert {n for share in shares for n in share} >= set(order[skip:])
    assert sum(map(len, shares)) - (count - skip) < world


def noisy(count: int = 6, seed: int = 0) -> SeededDataset:
    noise = Compose([ToTensord("image", track_meta=False), RandGaussianNoised("image", prob=1.0, std=1.0)])
    data = [{"image": np.full((1, 2, 2), index, np.float32)} for index in range(count)]
    return SeededDataset(data, noise, seed)


def test_random_transforms_follow_from_seed_epoch_and_item() -> None:
    dataset = noisy()
    first = dataset[6]["image"]
    torch.manual_seed(5)
    assert dataset[13]["image"] is not None
    assert torch.equal(dataset[6]["image"], first)
    assert torch.equal(noisy()[6]["image"], first)
    others = [dataset[12], dataset[7], noisy(seed=1)[6]]
    assert not any(torch.equal(other["image"] - index, first) for index, other in zip((0, 1, 0), others, strict=True))
    # a plain index goes on with the transforms' own random numbers
    assert not torch.equal(dataset[0]["image"], dataset[0]["image"])


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_draw_what_one_process_does(workers: int) -> None:
    def epoch(workers: int) -> list[torch.Tensor]:
        dataset = noisy()
        sampler = EpochSampler(dataset, seed=3)
        loader = DataLoader(dataset, batch_size=4, sampler=sampler, num_workers=workers)
        return [batch["image"] for batch in loader]

    assert all(map(torch.equal, epoch(0), epoch(workers)))


def test_items_say_which_file_they_are_of() -> None:
    items = [{"image": Path("a.png")}, {"image": ["b1.npz", "b2.npz"]}, {"label": 3}]
    dataset = SeededDataset(items, lambda item: dict(item), seed=0)
    assert [dataset[index]["file"] for index in range(3)] == ["a.png", "['b1.npz', 'b2.npz']", "item 2"]
    assert SeededDataset([5], lambda item: item + 1, seed=0)[0] == 6
    # the items themselves stay as they are
    assert items[0].keys() == {"image"}


def test_dropout_follows_from_seed_and_step() -> None:
    def run(seed: int, start: int = 0) -> list[float]:
        numbers: list[float] = []

        def step(engine: Engine, batch: Any) -> None:
            numbers.append(torch.rand(1).item())
            # what else draws does not matter
            torch.rand(int(batch) + 1)

        engine = Engine(step)
        Repeatable(seed).attach(engine)
        engine.run(range(4), max_epochs=2)
        return numbers[start:]

    assert run(1) == run(1)
    assert len({*run(1), *run(2)}) == 16


# The guard


class Scripted(nn.Module):
    """A network whose answer is what the image says: NaN and infinity go through it into loss and gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def training(
    folder: Path, bad: dict[int, float], epochs: int = 2, items: int = 6, resume: bool = False, **options: Any
) -> tuple[SupervisedTrainer, nn.Module, StepGuard, list[dict[str, torch.Tensor]]]:
    """One image a step, in order; items in `bad` hold that value. The states after each step are collected."""
    torch.manual_seed(0)
    network = Scripted()
    images = torch.rand(items, 1, 4, 4, generator=torch.Generator().manual_seed(1))

    def read(item: dict[str, str]) -> dict[str, torch.Tensor]:
        number = int(item["image"].removesuffix(".png"))
        image = torch.full((1, 4, 4), bad[number]) if number in bad else images[number]
        return {"image": image, "label": (images[number] > 0.5).float()}

    dataset = SeededDataset([{"image": f"{number}.png"} for number in range(items)], read, seed=0)
    sampler = EpochSampler(dataset, seed=0, shuffle=False)
    loader = DataLoader(dataset, batch_size=1, sampler=sampler)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    guard = StepGuard(network, **options)
    metric = {"loss": FiniteAverage(output_transform=from_engine(["loss"], first=True))}
    trainer = SupervisedTrainer(
        "cpu", epochs, loader, network, optimizer, nn.BCEWithLogitsLoss(), key_train_metric=metric,
        metric_cmp_fn=operator.lt, train_handlers=[Repeatable(0, sampler), guard],
    )  # fmt: skip
    states: list[dict[str, torch.Tensor]] = []

    def collect() -> None:
        momentum = {
            f"momentum {n}": state["momentum_buffer"].clone()
            for n, state in optimizer.state_dict()["state"].items()
            if state.get("momentum_buffer") is not None
        }
        states.append({name: value.clone() for name, value in network.state_dict().items()} | momentum)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, collect)
    evaluator = SupervisedEvaluator("cpu", DataLoader([]), network)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    Checkpoints(folder, network, optimizer, schedule, replacing, metrics=metric, resume=resume).attach(
        trainer, evaluator
    )
    return trainer, network, guard, states


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_skipped_step_moves_nothing(value: float, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer, network, guard, states = training(tmp_path, {2: value, 4: value})
    with caplog.at_level(logging.WARNING):
        trainer.run()
    assert guard.skipped == 4
    # weights, momentum, and what batch norms have seen
    for step in (2, 4, 8, 10):
        assert same(states[step], states[step - 1]), step
        assert not same(states[step], states[step + 1])
    assert all(tensor.isfinite().all() for tensor in network.state_dict().values())
    assert [line for line in caplog.messages if "step 3 skipped" in line and line.endswith("): 2.png")]
    # a skipped step counts in no mean, but is counted
    assert math.isfinite(trainer.state.metrics["loss"])
    assert math.isfinite(trainer.state.metrics["grad_norm"])
    assert trainer.state.metrics["skipped_steps"] == 4
    clean, *_ = training(tmp_path / "clean", {})
    clean.run()
    assert "skipped_steps" not in clean.state.metrics


@pytest.mark.parametrize("first", range(6))
def test_three_in_a_row_end_the_run_with_the_state_before(
    first: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wherever in the epoch it is: the first and the last step of one are no exceptions."""
    bad = {number % 6: math.nan for number in range(first, first + 3)}
    # no image is bad in the first epoch
    trainer, _network, _guard, states = training(tmp_path, bad, epochs=3)
    good = {**bad}
    bad.clear()

    def turn(engine: Engine) -> None:
        if engine.state.iteration == 6 + first:
            bad.update(good)

    trainer.add_event_handler(Events.ITERATION_COMPLETED, turn)
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match="3 steps in a row") as caught:
        trainer.run()
    line = str(caught.value)
    assert "\n" not in line
    assert f"the last with {(first + 2) % 6}.png" in line
    skipped = [message for message in caplog.messages if "skipped" in message]
    assert [message.split("): ")[1] for message in skipped] == [f"{(first + n) % 6}.png" for n in range(3)]
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    position = saved["position"]
    done = position["epoch"] * 6 + position["step"]
    assert done == 6 + first + 2
    assert same(saved["model"], {name: states[done - 1][name] for name in saved["model"]})
    # it can be resumed, here with the files put right
    again, _, _, more = training(tmp_path, {}, epochs=3, resume=True)
    again.run()
    assert len(more) == 18 - done
    assert again.state.epoch == 3


def test_an_epoch_without_a_finite_step_is_said(tmp_path: Path) -> None:
    trainer, *_ = training(tmp_path, {0: math.nan, 1: math.nan}, items=2, epochs=1)
    with pytest.raises(ValueError, match=r"loss was not finite in any epoch: there is no model\.pt"):
        trainer.run()
    assert math.isnan(trainer.state.metrics["loss"])
    assert math.isnan(trainer.state.metrics["grad_norm"])


def gradients(clip: float) -> Iterator[tuple[float, float]]:
    network = nn.Linear(3, 1, bias=False)
    guard = StepGuard(network, clip_grad=clip)
    for size in (0.1, 1.0, 50.0):
        network.weight.grad = torch.full((1, 3), size)
        engine = Engine(lambda engine, batch: None)
        engine.state.output = {"loss": torch.ones(1)}
        guard.check(engine)
        yield network.weight.grad.norm().item(), guard.norms[-1].item()


def test_gradients_are_clipped_to_a_norm_that_is_logged_unclipped() -> None:
    norms = [size * math.sqrt(3) for size in (0.1, 1.0, 50.0)]
    assert list(gradients(0.0)) == [pytest.approx((norm, norm)) for norm in norms]
    assert list(gradients(1.0)) == [pytest.approx((min(norm, 1.0), norm), rel=1e-5) for norm in norms]


@pytest.mark.parametrize(
    ("values", "mean"),
    [([1.0, math.nan, 3.0], 2.0), ([math.inf, 4.0], 4.0), ([math.nan], math.nan), ([], math.nan)],
)
def test_means_of_what_is_finite(values: list[float], mean: float) -> None:
    average = FiniteAverage()
    for _ in range(2):
        average.reset()
        for value in values:
            average.update(torch.tensor(value))
        for _ in range(2):
            assert float(average.compute()) == pytest.approx(mean, nan_ok=True)
