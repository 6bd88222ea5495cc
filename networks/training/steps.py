"""What surrounds a training step: the order of the data, the random numbers, the rate, and a guard against NaN.

Order, augmentation and dropout follow from the seed, the epoch, the item and the iteration alone. So a run does the
same with any number of loader workers, and goes on exactly where it was stopped without storing any random state.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import Any

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.metrics import Average
from monai.data import Dataset
from monai.engines.utils import IterationEvents
from monai.transforms import Randomizable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler, get_worker_info

from networks.training.processes import rank, world_size

logger = logging.getLogger(__name__)

# Of a loader with more processes than this, two share the place where they note their item.
WORKERS = 256


def mixed(*numbers: int) -> int:
    """A seed of 32 bits that follows from whole numbers, and differs when one of them does.

    Example:
        >>> mixed(42, 1, 7) == mixed(42, 1, 7), mixed(42, 1, 7) == mixed(42, 7, 1)
        (True, False)
    """
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class NotFinite(ValueError):
    """Several steps in a row were not finite; weights and optimizer are as before the last of them."""


class EpochSampler(Sampler[int]):
    """The items of one epoch in an order that follows from seed and epoch; each process has its share.

    Item i of epoch e comes as the number e · N + i, so that `SeededDataset` knows the epoch too. Use both together.

    Args:
        dataset: what is drawn from, N items.
        seed: of the order.
        shuffle: False keeps the dataset's order.

    Example:
        >>> sampler = EpochSampler([10, 20, 30], seed=0, shuffle=False)
        >>> sampler.set_epoch(2, skip=1)
        >>> list(sampler), len(sampler)
        ([7, 8], 3)
    """

    def __init__(self, dataset: Sized, seed: int, shuffle: bool = True) -> None:
        self.dataset = dataset
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 1
        self.skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Chooses the epoch, 1, 2, …, and how many items of it all processes together have seen already."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        """Items of this process in a whole epoch."""
        return math.ceil(len(self.dataset) / world_size())

    def __iter__(self) -> Iterator[int]:
        count, world = len(self.dataset), world_size()
        order = np.random.default_rng(mixed(self.seed, self.epoch)).permutation(count) if self.shuffle else range(count)
        # processes that would have one less see a first item again
        left = math.ceil((count - self.skip) / world) * world
        mine = np.resize(np.concatenate([order[self.skip :], order]), left)[rank() :: world]
        yield from (self.epoch * count + mine).tolist()


class WatchedDataset(Dataset):
    """MONAI's `Dataset`, which knows what each process of a loader took last, for when one is killed.

    Those processes leave SIGINT and SIGTERM to the main one: they are sent to all, and the main process decides what
    they mean.

    Args:
        data: the items.
        transform: one or several transforms.

    Example:
        >>> dataset = WatchedDataset([{"image": "a.png"}], [])
        >>> dataset[0], dataset.last_files([1])
        ({'image': 'a.png'}, [])
    """

    def __init__(self, data: Sequence[Any], transform: Callable | Sequence[Callable]) -> None:
        super().__init__(data, transform)
        # (process, item) of each loader's process, which all processes see
        self.last = torch.zeros(WORKERS, 2, dtype=torch.int64).share_memory_()

    def last_files(self, processes: Sequence[int]) -> list[str]:
        """The files that these processes of a loader took last."""
        items = {process: item for process, item in self.last.tolist()}
        return [self._file(items[process]) for process in processes if process in items]

    def _file(self, item: int) -> str:
        entry = self.data[item]
        image = entry.get("image") if isinstance(entry, dict) else None
        return str(image) if isinstance(image, str | os.PathLike | list) else f"item {item}"

    def _transform(self, index: int) -> Any:
        if (worker := get_worker_info()) is not None:
            self.last[worker.id % WORKERS] = torch.tensor([os.getpid(), index])
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return super()._transform(index)


class SeededDataset(WatchedDataset):
    """A `WatchedDataset` whose random transforms follow from seed, epoch and item when `EpochSampler` draws from it.

    A plain index, as other samplers give, leaves the transforms' random state alone. Items that are dictionaries get
    the path of their image as "file", for messages.

    Args:
        data: the items.
        transform: one or several transforms.
        seed: of the random transforms.

    Example:
        >>> from monai.transforms import RandScaleIntensity
        >>> dataset = SeededDataset([torch.ones(1)], RandScaleIntensity(0.5, prob=1.0), seed=0)
        >>> bool(dataset[1] == dataset[1]), bool(dataset[1] == dataset[2])  # item 0 of the epochs 1 and 2
        (True, False)
    """

    def __init__(self, data: Sequence[Any], transform: Callable | Sequence[Callable], seed: int) -> None:
        super().__init__(data, transform)
        self.seed = seed

    def _transform(self, index: int) -> Any:
        epoch, item = divmod(index, len(self.data))
        if epoch and isinstance(self.transform, Randomizable):
            self.transform.set_random_state(seed=mixed(self.seed, epoch, item))
        result = super()._transform(item)
        if isinstance(result, dict) and isinstance(self.data[item], dict):
            result["file"] = self._file(item)
        return result


class Repeatable:
    """Makes each training step a function of the seed and its number: the order of the data, and dropout.

    Args:
        seed: of the steps' random numbers; each process has its own.
        sampler: the training's `EpochSampler`, which is told the epoch; None leaves the order alone.

    Example:
        >>> engine, drawn = Engine(lambda engine, batch: drawn.append(torch.rand(1).item())), []
        >>> Repeatable(seed=1).attach(engine)
        >>> _ = engine.run([0, 1]), engine.run([0, 1])
        >>> drawn[:2] == drawn[2:], drawn[0] == drawn[1]
        (True, False)
    """

    def __init__(self, seed: int, sampler: EpochSampler | None = None) -> None:
        self.seed = seed
        self.sampler = sampler

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.start_epoch)
        engine.add_event_handler(Events.ITERATION_STARTED, self.start_step)

    def start_epoch(self, engine: Engine) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(engine.state.epoch)

    def start_step(self, engine: Engine) -> None:
        torch.manual_seed(mixed(self.seed, engine.state.iteration, rank()))


class StepGuard:
    """Skips a training step whose loss or gradients are not finite, and ends the run after several in a row.

    A skipped step leaves weights, momentum and the statistics of batch norms as they were. The norm of the gradients
    stands in `engine.state.metrics["grad_norm"]`, as the mean of the epoch's finite steps; where steps were skipped,
    their number in this command stands in `"skipped_steps"`.

    Args:
        network: whose gradients are looked at.
        clip_grad: largest norm of all gradients together; longer ones are scaled down. 0 leaves them alone.
        limit: so many steps in a row that are not finite end the run.

    Raises:
        NotFinite: in the run, naming the files of the batch.

    Example:
        >>> StepGuard(nn.Linear(1, 1), clip_grad=1.0).skipped
        0
    """

    def __init__(self, network: nn.Module, clip_grad: float = 0.0, limit: int = 3) -> None:
        self.network = network
        self.clip_grad = clip_grad or math.inf
        self.limit = limit
        self.skipped = 0
        self.in_a_row = 0
        self.norms: list[torch.Tensor] = []
        self.buffers: list[torch.Tensor] = []

    def attach(self, engine: Engine) -> None:
        engine.add_event_handler(Events.EPOCH_STARTED, self.norms.clear)
        engine.add_event_handler(Events.ITERATION_STARTED, self.remember)
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self.check)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.finish)

    def remember(self, engine: Engine) -> None:
        """Keeps what the forward pass changes: one image of NaN would spoil a batch norm for the rest of the run."""
        self.buffers = [buffer.detach().clone() for buffer in self.network.buffers()]

    def check(self, engine: Engine) -> None:
        """Between the backward pass and the optimizer's step; parameters without gradient are not moved by it."""
        parameters = [parameter for parameter in self.network.parameters() if parameter.grad is not None]
        if math.isfinite(self.clip_grad):
            norm = nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        else:
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        loss = engine.state.output["loss"].detach()  # type: ignore[index,call-overload]
        # with several processes the averaged gradients alone decide, so that all decide alike
        if torch.isfinite(norm) and (world_size() > 1 or torch.isfinite(loss).all()):
            self.in_a_row = 0
            self.norms.append(norm)
            return
        for parameter in parameters:
            parameter.grad = None
        with torch.no_grad():
            for buffer, before in zip(self.network.buffers(), self.buffers, strict=True):
                buffer.copy_(before)
        self.skipped += 1
        self.in_a_row += 1
        files = ", ".join(files_of(engine.state.batch))
        what = f"loss {float(loss.mean()):.3g}, gradient norm {float(norm):.3g}"
        logger.warning(f"step {engine.state.iteration} skipped, it is not finite ({what}): {files}")
        if self.in_a_row >= self.limit:
            raise NotFinite(
                f"{self.limit} steps in a row were not finite ({what}), the last with {files}: look at these files, or"
                " give a smaller --learning_rate or a --clip_grad"
            )

    def finish(self, engine: Engine) -> None:
        engine.state.metrics["grad_norm"] = float(torch.stack(self.norms).mean()) if self.norms else math.nan
        if self.skipped:
            engine.state.metrics["skipped_steps"] = self.skipped


class FiniteAverage(Average):
    """ignite's `Average` over the values that are finite: a skipped step counts nowhere. NaN where none is finite.

    Example:
        >>> average = FiniteAverage()
        >>> for value in (1.0, math.nan, 3.0):
        ...     average.update(torch.tensor(value))
        >>> float(average.compute())
        2.0
    """

    def update(self, output: Any) -> None:
        if torch.as_tensor(output).isfinite().all():
            super().update(output)

    def compute(self) -> Any:
        total, count = idist.all_reduce(self.accumulator.clone()), idist.all_reduce(self.num_examples)
        return total / count if count else math.nan


def files_of(batch: Any) -> list[str]:
    """The files that a batch of a `SeededDataset` comes from; [] where it does not say.

    Example:
        >>> files_of({"image": torch.zeros(1, 1), "file": ["a.png"]})
        ['a.png']
    """
    return [str(name) for name in batch.get("file", [])] if isinstance(batch, dict) else []


def poly_schedule(optimizer: Optimizer, steps: int, power: float = 0.9) -> LambdaLR:
    """lr · (1 − i / steps)^power, set after step i = 0, 1, …: the first two steps both run at the full rate.

    The schedule of CMUNeXt's training (arXiv 2308.01239), to be stepped after each step.

    Example:
        >>> optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.01)
        >>> poly_schedule(optimizer, steps=100).get_last_lr()
        [0.01]
    """
    if steps < 1:
        raise ValueError("an epoch has no step: fewer images to train on than --batch_size, with drop_last")
    return LambdaLR(optimizer, lambda step: max(1 - max(step - 1, 0) / steps, 0.0) ** power)


@atexit.register
def _end_workers() -> None:
    """Ends loader processes when this one ends: Python's own way, SIGTERM, is what they ignore."""
    # PyTorch takes the end of a loader process for a failure, which it is not any more
    with contextlib.suppress(ValueError, AttributeError):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
