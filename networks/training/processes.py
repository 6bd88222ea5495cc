"""Several processes that train one network."""

from __future__ import annotations

import os

import ignite.distributed as idist
import torch
import torch.distributed as dist


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
    return not dist.is_initialized() or dist.get_rank() == 0
