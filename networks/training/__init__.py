"""What training loops share beyond MONAI's handlers; configurations name what they use as `networks.training.NAME`."""

from networks.training.averaging import WeightAverage
from networks.training.checkpoints import Checkpoints
from networks.training.log import EpochLog, Progress, ResultsLog, RunLog
from networks.training.processes import Share, is_rank_zero, process_device, start_process_group
from networks.training.provenance import Origin, RunRecord
from networks.training.speed import Autocast, computes_bfloat16, keep_freed_memory, prepare_network
from networks.training.starting import load_trained, start_from
from networks.training.steps import (
    EpochSampler,
    FiniteAverage,
    Repeatable,
    SeededDataset,
    StepGuard,
    WatchedDataset,
    poly_schedule,
)

__all__ = [
    "Autocast",
    "Checkpoints",
    "EpochLog",
    "EpochSampler",
    "FiniteAverage",
    "Origin",
    "Progress",
    "Repeatable",
    "ResultsLog",
    "RunLog",
    "RunRecord",
    "SeededDataset",
    "Share",
    "StepGuard",
    "WatchedDataset",
    "WeightAverage",
    "computes_bfloat16",
    "is_rank_zero",
    "keep_freed_memory",
    "load_trained",
    "poly_schedule",
    "prepare_network",
    "process_device",
    "start_from",
    "start_process_group",
]
