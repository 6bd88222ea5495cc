"""The files that a run leaves and starts from."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.engines import Workflow
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from networks.training.processes import is_rank_zero
from networks.training.speed import check_channels
from networks.weights import load_weights, read_checkpoint

logger = logging.getLogger(__name__)


class Checkpoints:
    """Writes `last.pt` after each epoch and `model.pt` whenever the score is the best so far; resumes from `last.pt`.

    `model.pt` is the network's bare state_dict. An interrupted run never leaves half a file. Attach it to the trainer
    when that is complete (in `training`): an epoch is saved after all other handlers have seen its end.

    Args:
        ckpt_dir: folder of both files.
        network: whose weights are saved; the bare one, not its distributed wrapper.
        optimizer, lr_scheduler: what else a resumed run needs.
        replacing: `transforms.replacing`, the context manager that writes a file whole or not at all.
        resume: continue the run that `last.pt` holds.
        patience: end the training after so many validations in a row without a better score; 0 never does.
        seed: a resumed run draws from seed + epoch, so that it does not repeat the first epochs' shuffling.

    Example:
        >>> from contextlib import nullcontext
        >>> network = nn.Linear(1, 1)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        >>> checkpoints = Checkpoints("models", network, optimizer, schedule, replacing=nullcontext)
        >>> checkpoints.best is None
        True
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        network: nn.Module,
        optimizer: Optimizer,
        lr_scheduler: LRScheduler,
        replacing: Callable[[Path], AbstractContextManager[Path]],
        resume: bool = False,
        patience: int = 0,
        seed: int = 0,
    ) -> None:
        self.ckpt_dir = Path(ckpt_dir)
        self.network = network
        self.objects: dict[str, Any] = {"model": network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.replacing = replacing
        self.resume = resume
        self.patience = patience
        self.seed = seed
        self.best: float | None = None
        self.best_epoch = 0
        self.since_best = 0

    def attach(self, trainer: Workflow, evaluator: Workflow) -> None:
        """Saves after the epochs of `trainer`.

        The key metric of `evaluator` chooses the best network, by its `metric_cmp_fn`. Where nothing is held out, that
        is where the evaluator's data are empty, the trainer's key metric does.

        Raises:
            ValueError: when a run is to be resumed and cannot be.
        """
        if self.resume:
            self._load(trainer)
        scored = evaluator if len(evaluator.data_loader) else trainer  # type: ignore[arg-type]
        # an evaluator has one epoch a run
        scored.add_event_handler(Events.EPOCH_COMPLETED, self._score, trainer)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._save_last)
        trainer.add_event_handler(Events.COMPLETED, self._say_best, scored)

    def _score(self, scored: Workflow, trainer: Engine) -> None:
        score = float(scored.state.metrics[scored.state.key_metric_name])
        # a network whose score is not a number is never the best
        if math.isfinite(score) and (self.best is None or scored.metric_cmp_fn(score, self.best)):
            self.best, self.best_epoch, self.since_best = score, trainer.state.epoch, 0
            self._save(self.network.state_dict(), "model.pt")
            return
        self.since_best += 1
        if 0 < self.patience <= self.since_best:
            name = scored.state.key_metric_name
            logger.info(f"no better {name} in {self.since_best} validations: training ends early")
            trainer.terminate()

    def _say_best(self, trainer: Engine, scored: Workflow) -> None:
        if self.best is None:
            reason = "not finite in any epoch" if self.since_best else "never computed, as no validation ran"
            raise ValueError(
                f"{scored.state.key_metric_name} was {reason}: there is no model.pt, the last epoch's weights are in"
                f" {self.ckpt_dir / 'last.pt'}"
            )
        if is_rank_zero():
            name = scored.state.key_metric_name
            logger.info(f"best {name} {self.best:.4f} in epoch {self.best_epoch}: {self.ckpt_dir / 'model.pt'}")

    def _save_last(self, trainer: Engine) -> None:
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        selection = {"best": self.best, "best_epoch": self.best_epoch, "since_best": self.since_best}
        self._save({**state, "trainer": dict(trainer.state_dict()), "selection": selection}, "last.pt")

    def _save(self, content: Any, name: str) -> None:
        if is_rank_zero():
            self.ckpt_dir.mkdir(parents=True, exist_ok=True)
            with self.replacing(self.ckpt_dir / name) as path:
                torch.save(content, path)

    def _load(self, trainer: Engine) -> None:
        path = self.ckpt_dir / "last.pt"
        if not path.is_file():
            raise ValueError(f"{path} does not exist: start without --resume, or name the run's --ckpt_dir")
        max_epochs = trainer.state.max_epochs or 0
        try:
            state = read_checkpoint(path)
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
            self.best, self.best_epoch, self.since_best = (
                state["selection"][key] for key in ("best", "best_epoch", "since_best")
            )
            trainer.load_state_dict(state["trainer"])
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"{path} does not continue this run ({reason}): start without --resume") from error
        trainer.state.max_epochs = max_epochs
        if trainer.state.epoch >= max_epochs:
            raise ValueError(f"{path} has finished its {trainer.state.epoch} epochs: give a larger --max_epochs")
        torch.manual_seed(self.seed + trainer.state.epoch)
        logger.info(f"resumed from {path} after epoch {trainer.state.epoch}")


def load_trained(
    network: nn.Module, path: str | Path, wanted: bool = True, out_channels: int | None = None
) -> nn.Module:
    """`network` with the weights at `path`, every tensor of it; with `wanted=False` as it is.

    Args:
        out_channels: how many channels the classes need. It is compared with what the network says of itself.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not fit, or the network's output does not fit the classes.

    Example:
        >>> load_trained(nn.Linear(2, 1), "no/model.pt")
        Traceback (most recent call last):
        ...
        FileNotFoundError: no weight file no/model.pt: train first, or name an existing checkpoint as --ckpt_path
    """
    check_channels(network, getattr(network, "out_channels", None), out_channels)
    if wanted:
        _load(network, path, "train first, or name an existing checkpoint as --ckpt_path")
    return network


def start_from(
    network: nn.Module, pretrained: str | Path | None, new_head: bool | str = False, min_matched: float = 1.0
) -> nn.Module:
    """`network` with the weights that a training starts from; None leaves them random.

    Args:
        pretrained: a checkpoint that `load_weights` understands.
        new_head: it is of other classes. The last layer, or the layer of that name, is left out, and the log names the
            tensors that stay random.
        min_matched: least share of the network's tensors that the file must fill.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when it does not fit.

    Example:
        >>> network = start_from(nn.Linear(2, 1), None)
    """
    if pretrained is None:
        logger.info("no weights to start from: they are random")
        return network
    remedy = "name an existing file as --pretrained"
    _load(network, pretrained, remedy, start=True, new_head=new_head, min_matched=float(min_matched))
    return network


def _load(network: nn.Module, path: str | Path, remedy: str, **options: Any) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"no weight file {path}: {remedy}")
    logger.info(str(load_weights(network, path, **options)))
