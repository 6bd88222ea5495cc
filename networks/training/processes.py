"""Several processes that train one network, or share out what is to be evaluated or predicted."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sized
from typing import Any

import ignite.distributed as idist
import torch
import torch.distributed as dist
from ignite.engine import Events
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler


def start_process_group() -> None:
    """Joins the processes that torchrun started: through NCCL where there are GPUs, else through gloo.

    Raises:
        ValueError: when torchrun did not start this process.
    """
    if "RANK" not in os.environ:
        raise ValueError("multi_gpu.yaml runs under torchrun --standalone --nproc_per_node=N -m monai.bundle run …")
    dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo")
    # ignite's first look at the group is a collective: all processes must take it, not only those that save
    idist.sync()


def process_device() -> torch.device:
    """This process's GPU, or the CPU where there is none.

    Example:
        >>> process_device().type in ("cpu", "cuda")
        True
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def is_rank_zero() -> bool:
    """True for rank 0, which alone writes files and prints.

    Example:
        >>> is_rank_zero()  # one process
        True
    """
    return rank() == 0


def rank() -> int:
    """This process's number, 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


class Share(Sampler[int]):
    """The items of a data set in order; of several processes each gets its own, and none is left out or repeated.

    The shares one after the other are the data set in its order: values that are gathered of them have it too, so that
    their mean has the same bits as in one process.

    Args:
        dataset: what is shared out.
        few: what to do with fewer items than processes, "refuse", or "all" for every process to have all of them.

    Raises:
        ValueError: in use, when there are more processes than items.

    Example:
        >>> list(Share("abc"))  # one process
        [0, 1, 2]
    """

    def __init__(self, dataset: Sized, few: str = "refuse") -> None:
        if few not in ("refuse", "all"):
            raise ValueError(f"few must be refuse or all, not {few!r}")
        self.dataset = dataset
        self.few = few

    def _mine(self) -> range:
        count, world = len(self.dataset), world_size()
        if count >= world:
            return range(rank() * count // world, (rank() + 1) * count // world)
        if self.few == "refuse":
            raise ValueError(f"there are {count} to share out: start as many processes, not {world}")
        return range(count)

    def __len__(self) -> int:
        return len(self._mine())

    def __iter__(self) -> Iterator[int]:
        return iter(self._mine())


def share_validation(evaluator: Any) -> None:
    """Lets an evaluator have another number of cases in each process.

    The wrapper of a network that several processes train sends buffers from rank 0 to all with every image, even when
    it is not trained, and waits for those who have fewer. Here they are sent once, when a validation starts.

    Example:
        >>> from types import SimpleNamespace
        >>> share_validation(SimpleNamespace(network=nn.Linear(1, 1)))  # one process: nothing to do
    """
    if isinstance(wrapper := getattr(evaluator, "network", None), DistributedDataParallel):
        evaluator.network = wrapper.module
        evaluator.add_event_handler(Events.STARTED, _send_buffers, wrapper.module)


def _send_buffers(network: nn.Module) -> None:
    for buffer in network.buffers():
        dist.broadcast(buffer, 0)


class _SumOfProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.contiguous().clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch norm over the batches of all processes together, on any device.

    PyTorch's `SyncBatchNorm` does the same on GPUs alone. All processes must have batches of one size.

    Example:
        >>> SharedBatchNorm(4)(torch.zeros(2, 4, 3, 3)).shape  # one process: a plain batch norm
        torch.Size([2, 4, 3, 3])
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized()):
            return super().forward(x)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        mean = _SumOfProcesses.apply(x.sum((0, 2, 3))) / count
        centred = x - mean[:, None, None]
        variance = _SumOfProcesses.apply(centred.square().sum((0, 2, 3))) / count
        self._follow(mean.detach(), variance.detach() * count / max(count - 1, 1))
        scale = self.weight * (variance + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, factor)
        self.running_var.lerp_(variance, factor)


def share_batch_norms(network: nn.Module) -> nn.Module:
    """`network` with batch norms over all processes; parameters and buffers stay the same objects.

    Example:
        >>> network = share_batch_norms(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
        >>> type(network[1]).__name__
        'SharedBatchNorm'
    """
    if torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm
    return network
