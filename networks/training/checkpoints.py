"""The files that a run leaves and starts from: `model.pt`, `last.pt` and the one before, and weights of other runs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import signal
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.engines import Workflow
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from networks.training.processes import is_rank_zero, world_size
from networks.training.provenance import RunRecord
from networks.training.speed import check_channels
from networks.training.steps import EpochSampler, NotFinite, SeededDataset
from networks.weights import load_weights, read_checkpoint

logger = logging.getLogger(__name__)

BEST, LAST, BEFORE_LAST = "model.pt", "last.pt", "last.previous.pt"
LOG = "training.log"
# Slurm sends SIGUSR1 ahead of the end where a job asks for it: --signal=USR1@120
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_SIGNAL_SECONDS = 3


class Checkpoints:
    """Writes `last.pt` while a run goes on and `model.pt` whenever its score is the best so far; resumes a run.

    `model.pt` is the network's bare state_dict; under "__run__" its metadata name the run that it is of. Every file is
    written whole or not at all. `last.pt` is what a run goes on from, to the same bits on a CPU, at the end of an epoch
    or within one; the one before stays as `last.previous.pt`, in case the newest is damaged. A signal to stop, SIGTERM,
    SIGINT or SIGUSR1, lets the step be finished and the state be saved. What is logged stands in `training.log` too.

    Attach it to the trainer when that is complete (in `training`): an epoch is saved after all other handlers have seen
    its end.

    Args:
        ckpt_dir: folder of the files. One run at a time may use it.
        network: whose weights are saved; the bare one, not its distributed wrapper.
        optimizer, lr_scheduler: what else a resumed run needs.
        replacing: `transforms.replacing`, the context manager that writes a file whole or not at all.
        metrics: the trainer's metrics by name, which go on within an epoch.
        record: of the run. Its settings must be the same when the run goes on: the data, the classes, the seed.
        resume: True goes on with the run in `ckpt_dir`, "auto" does where there is one, False starts anew and moves the
            files of an earlier run into a folder `earlier-1`, `earlier-2` …
        patience: end the training after so many validations in a row without a better score; 0 never does.
        interval: epochs from one `last.pt` to the next.
        minutes: also after so many minutes within an epoch; 0 never does.
        on_save_error: "stop" ends the run when a file cannot be written, "continue" logs it and goes on.

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
        metrics: Mapping[str, Metric] | None = None,
        record: RunRecord | None = None,
        resume: bool | str = False,
        patience: int = 0,
        interval: int = 1,
        minutes: float = 0,
        on_save_error: str = "stop",
    ) -> None:
        if on_save_error not in ("stop", "continue"):
            raise ValueError(f"on_save_error must be stop or continue, not {on_save_error!r}")
        self.ckpt_dir = Path(ckpt_dir)
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.objects: dict[str, Any] = {"model": network, "optimizer": optimizer, "lr_scheduler": lr_scheduler}
        self.replacing = replacing
        self.metrics = dict(metrics or {})
        self.record = record
        self.settings = dict(record.settings) if record else {}
        self.resume = resume
        self.patience = patience
        self.interval = interval
        self.minutes = minutes
        self.on_save_error = on_save_error
        self.best: float | None = None
        self.best_epoch = 0
        self.since_best = 0
        self.saved_at = time.monotonic()
        self.metric = ""
        self.stopped_by: str | None = None
        self.stopped_at = 0.0
        self.lock: _Lock | None = None
        self.log: logging.FileHandler | None = None
        self.handlers: dict[int, Any] = {}
        self.steps = 0
        self.moved = False
        self.ended = False
        # items of the epoch that had been seen after so many of its steps, when it went on
        self.seen, self.seen_after = 0, 0

    def attach(self, trainer: Workflow, evaluator: Workflow) -> None:
        """Saves after the epochs of `trainer`.

        The key metric of `evaluator` chooses the best network, by its `metric_cmp_fn`. Where nothing is held out, that
        is where the evaluator's data are empty, the trainer's key metric does.

        Raises:
            ValueError: when another run uses the folder, or a run is to be resumed and cannot be.
        """
        if is_rank_zero():
            self.lock = _Lock(self.ckpt_dir)
            # what a run that was killed had half written
            for name in (BEST, LAST):
                for left in self.ckpt_dir.glob(f".????????.{name}"):
                    left.unlink()
        if dist.is_initialized():
            dist.barrier()
        there = any((self.ckpt_dir / name).is_file() for name in (LAST, BEFORE_LAST))
        if self.resume == "auto":
            logger.info(f"{self.ckpt_dir} holds {'a run to go on with' if there else 'no run yet: this one starts'}")
        if self.resume is True or (self.resume == "auto" and there):
            try:
                self._load(trainer)
            except Exception:
                self._release()
                raise
        elif is_rank_zero():
            self._set_aside()
        if is_rank_zero():
            self._open_log()
        self._listen()
        self.steps = trainer.state.iteration
        self.optimizer.register_step_post_hook(self._has_moved)
        scored = evaluator if len(evaluator.data_loader) else trainer  # type: ignore[arg-type]
        self.metric = str(scored.state.key_metric_name)
        # an evaluator has one epoch a run
        scored.add_event_handler(Events.EPOCH_COMPLETED, self._score, trainer)
        trainer.add_event_handler(Events.STARTED, self._begin)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
        trainer.add_event_handler(Events.COMPLETED, self._say_best, scored)
        trainer.add_event_handler(Events.EXCEPTION_RAISED, self._on_error)

    # Choosing

    def _score(self, scored: Workflow, trainer: Engine) -> None:
        score = float(scored.state.metrics[scored.state.key_metric_name])
        # a score that is not a number, or of a network that is none, is never the best
        better = math.isfinite(score) and (self.best is None or scored.metric_cmp_fn(score, self.best))
        if better and all(tensor.isfinite().all() for tensor in self.network.state_dict().values()):
            self.best, self.best_epoch, self.since_best = score, trainer.state.epoch, 0
            self._save(self._named(self.network.state_dict()), BEST)
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
                f" {self.ckpt_dir / LAST}"
            )
        if is_rank_zero():
            name = scored.state.key_metric_name
            logger.info(f"best {name} {self.best:.4f} in epoch {self.best_epoch}: {self.ckpt_dir / BEST}")
        self._end("completed", trainer)

    # Stopping

    def _end(self, how: str, trainer: Engine) -> None:
        """Completes the run's record and gives the folder back."""
        if self.record is not None:
            best = (
                {"metric": self.metric, "score": self.best, "epoch": self.best_epoch} if self.best is not None else None
            )
            self.record.end(how, epochs=trainer.state.epoch, iterations=trainer.state.iteration, best=best)
        self.ended = True
        self._release()

    def _release(self) -> None:
        if self.lock is not None:
            self.lock.release()
        if self.log is not None:
            logging.getLogger().removeHandler(self.log)
            self.log.close()
            self.log = None
        # once stopped, further signals change nothing: the program is about to end
        while self.handlers and self.stopped_by is None:
            signal.signal(*self.handlers.popitem())

    def _on_error(self, trainer: Engine, error: BaseException) -> None:
        """Saves the state before the step that failed, where it is still as it was, and hands the error on."""
        # ignite hands an error on twice
        if not self.ended:
            line = _of_worker(error, trainer)
            reason = line or str(error).strip().partition("\n")[0] or type(error).__name__
            if self._is_as_after_the_last_step(trainer, error):
                trainer.state.iteration = self.steps
                try:
                    self._save_last(trainer)
                except ValueError as another:
                    logger.warning(str(another))
            if self.log is not None:
                self.log.handle(logger.makeRecord(logger.name, logging.ERROR, __file__, 0, reason, (), None))
            self._end(f"failed: {reason}", trainer)
            if line:
                raise ValueError(line) from error
        raise error

    def _is_as_after_the_last_step(self, trainer: Engine, error: BaseException) -> bool:
        """True where nothing has changed the state since: the data failed, or the step was found not to be finite."""
        within_an_epoch = trainer.state.epoch * (trainer.state.epoch_length or 1) > self.steps > 0
        if not isinstance(error, Exception) or not within_an_epoch or self.moved:
            return False
        if isinstance(error, NotFinite):
            return trainer.state.iteration == self.steps + 1
        # of several processes this one may be alone with its error, and saving takes all
        return trainer.state.iteration == self.steps and not dist.is_initialized()

    def _has_moved(self, *_: Any) -> None:
        self.moved = True

    def _begin(self, trainer: Engine) -> None:
        if self.record is not None:
            self.record.write()

    def _listen(self) -> None:
        """From here on a signal to stop is obeyed after the step. Handlers are the main thread's to set."""
        with contextlib.suppress(ValueError):
            for number in SIGNALS:
                self.handlers[number] = signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stopped_by is not None:
            # torchrun sends on to its processes what the terminal or the queue has sent to all of them
            if not dist.is_initialized() or time.monotonic() - self.stopped_at > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)
            return
        self.stopped_by = signal.Signals(number).name
        self.stopped_at = time.monotonic()
        logger.info(f"{self.stopped_by}: this step is finished and saved; a second signal ends at once")

    def _asked(self) -> tuple[bool, bool]:
        """Whether to stop, and whether it is time to save."""
        due = self.minutes > 0 and time.monotonic() - self.saved_at > 60 * self.minutes
        if not dist.is_initialized():
            return self.stopped_by is not None, due
        # a signal reaches the processes at different steps, and clocks differ; all must do the same after the same step
        asked = torch.tensor([float(self.stopped_by is not None), float(due)], device=_device_of(self.network))
        dist.all_reduce(asked)
        stop, save = asked.tolist()
        return bool(stop), bool(save)

    def _after_step(self, trainer: Engine) -> None:
        self.steps, self.moved = trainer.state.iteration, False
        if trainer.state.iteration % (trainer.state.epoch_length or 1) == 0:
            return
        stop, save = self._asked()
        if stop or save:
            self._save_last(trainer)
        if stop:
            self._say_stopped(trainer)

    def _after_epoch(self, trainer: Engine) -> None:
        self.seen, self.seen_after = 0, 0
        last = trainer.state.epoch == trainer.state.max_epochs or trainer.should_terminate
        stop, _ = self._asked()
        if last or stop or trainer.state.epoch % self.interval == 0:
            self._save_last(trainer)
        if stop and not last:
            self._say_stopped(trainer)

    def _say_stopped(self, trainer: Engine) -> None:
        step = trainer.state.iteration % (trainer.state.epoch_length or 1)
        where = f"in epoch {trainer.state.epoch} after step {step}" if step else f"after epoch {trainer.state.epoch}"
        if is_rank_zero():
            logger.info(f"stopped {where}; --resume true --ckpt_dir {self.ckpt_dir} goes on")
        trainer.terminate(skip_completed=True)
        self._end(f"stopped by {self.stopped_by or 'a signal to another process'}", trainer)

    # Saving

    def _save_last(self, trainer: Engine) -> None:
        length = trainer.state.epoch_length or 1
        epoch, within = divmod(trainer.state.iteration, length)
        position = {"epoch": epoch, "step": within, "steps": length, "seen": 0}
        if within:
            batch = (trainer.data_loader.batch_size or 1) * world_size()  # type: ignore[attr-defined]
            position["seen"] = self.seen + (within - self.seen_after) * batch
        metrics = {name: metric.state_dict() for name, metric in self.metrics.items()} if within else {}
        selection = {"best": self.best, "best_epoch": self.best_epoch, "since_best": self.since_best}
        state = {name: thing.state_dict() for name, thing in self.objects.items()}
        state["model"] = self._named(state["model"])
        more = {"position": position, "metrics": metrics, "selection": selection, "settings": self.settings}
        self._save({**state, **more, "run_id": self.record.id if self.record else ""}, LAST)
        self.saved_at = time.monotonic()

    def _named(self, state: dict[str, Any]) -> dict[str, Any]:
        if self.record is not None:
            state._metadata["__run__"] = {"id": self.record.id}  # type: ignore[attr-defined]
        return state

    def _save(self, content: Any, name: str) -> None:
        if not is_rank_zero():
            return
        path = self.ckpt_dir / name
        try:
            with self.replacing(path) as temporary:
                torch.save(content, temporary)
                if name == LAST and path.is_file():
                    os.replace(path, self.ckpt_dir / BEFORE_LAST)
        # torch reports a full disk as a RuntimeError of its writer
        except (OSError, RuntimeError) as error:
            if WORKER.search(str(error)):
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else "the disk is full or failed"
            before = "the file before it is whole" if path.is_file() else "there is none of before"
            line = f"{path} cannot be written ({reason}); {before}"
            if self.on_save_error == "stop":
                raise ValueError(f"{line}: make room, and go on with --resume true") from error
            logger.warning(line)

    def _set_aside(self) -> None:
        """Moves the files of an earlier run into a folder of their own."""
        names = [BEST, LAST, BEFORE_LAST, LOG, "run.json", "history.csv", "curves.png"]
        files = [self.ckpt_dir / name for name in names if (self.ckpt_dir / name).is_file()]
        if not any(file.name in (BEST, LAST) for file in files):
            return
        number = next(n for n in range(1, 10**6) if not (self.ckpt_dir / f"earlier-{n}").exists())
        folder = self.ckpt_dir / f"earlier-{number}"
        folder.mkdir()
        for file in files:
            os.replace(file, folder / file.name)
        logger.info(f"an earlier run's files are now in {folder}; --resume true would have gone on with it")

    def _open_log(self) -> None:
        self.log = logging.FileHandler(self.ckpt_dir / LOG, encoding="utf-8")
        self.log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logging.getLogger().addHandler(self.log)

    # Going on

    def _load(self, trainer: Workflow) -> None:
        state, path = self._newest()
        differing = [name for name in self.settings if state["settings"].get(name) != self.settings[name]]
        if differing == ["data"]:
            raise ValueError(
                f"{path} is of a run with other data, or with the same divided in another way: give the --dataset_dir,"
                " --fold, --val_fraction or --val_cases that it had, or start without --resume"
            )
        if differing:
            name = next(name for name in differing if name != "data")
            raise ValueError(
                f"{path} is of a run with {name} {state['settings'].get(name)}, and it is {self.settings[name]} now:"
                " give the same to go on, or start without --resume"
            )
        given = [(group["lr"], group.get("initial_lr")) for group in self.optimizer.param_groups]
        try:
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
            _check_optimizer(self.optimizer)
            self.best, self.best_epoch, self.since_best = (
                state["selection"][key] for key in ("best", "best_epoch", "since_best")
            )
            if self.record is not None:
                self.record.resume(state["run_id"])
            self._go_to(trainer, state)
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(
                line.strip() for line in str(error).splitlines()[: 2 if "state_dict" in str(error) else 1]
            )
            raise ValueError(f"{path} does not continue this run ({reason}): start without --resume") from error
        self._take_rate([initial if initial is not None else rate for rate, initial in given])
        if trainer.state.epoch >= (trainer.state.max_epochs or 0):
            raise ValueError(f"{path} has finished its {trainer.state.epoch} epochs: give a larger --max_epochs")
        if 0 < self.patience <= self.since_best:
            raise ValueError(
                f"{path} has ended early, after {self.since_best} validations without a better one: give a larger"
                " --early_stop, or 0"
            )
        within = f" and {state['position']['step']} steps" if state["position"]["step"] else ""
        logger.info(f"resumed from {path} after epoch {trainer.state.epoch}{within}")

    def _newest(self) -> tuple[dict[str, Any], Path]:
        """The newest state that can be read, and its file."""
        if not any((self.ckpt_dir / name).is_file() for name in (LAST, BEFORE_LAST)):
            raise ValueError(
                f"{self.ckpt_dir / LAST} does not exist: start without --resume, or name the run's --ckpt_dir"
            )
        reasons = []
        for path in (self.ckpt_dir / LAST, self.ckpt_dir / BEFORE_LAST):
            try:
                state = read_checkpoint(path)
                _check_state(state, path)
            except (OSError, ValueError) as error:
                reasons.append(str(error))
                continue
            if reasons:
                logger.warning(f"{reasons[0]}; the one before it is taken: {path}")
            return state, path
        raise ValueError(f"{reasons[0]}; no older state can be read either: start without --resume")

    def _go_to(self, trainer: Workflow, state: dict[str, Any]) -> None:
        """Sets the trainer to the place where the run stopped, for the batch size of now."""
        position = state["position"]
        loader: Any = trainer.data_loader
        length, seen = len(loader), position["seen"]
        left = 0
        if seen:
            if not isinstance(loader.sampler, EpochSampler):
                raise ValueError("only EpochSampler goes on within an epoch")
            # processes that are more or fewer than before see a few items again
            seen //= world_size()
            left = _batches(len(loader.sampler) - seen, loader)
        trainer.state.epoch_length = length
        trainer.state.epoch = position["epoch"]
        trainer.state.iteration = position["epoch"] * length + (length - left if seen else 0)
        before = position["epoch"] * position["steps"] + position["step"]
        if length != position["steps"]:
            logger.info(f"{length} steps an epoch now, {position['steps']} before: the batch size is this command's")
            # a schedule by steps goes on from as many steps as the epochs would have had
            if self.lr_scheduler.last_epoch == before != position["epoch"]:
                self.lr_scheduler.last_epoch = trainer.state.iteration
        if seen:
            # ignite counts the epochs of the whole run
            this = Events.EPOCH_STARTED(once=position["epoch"] + 1)
            trainer.add_event_handler(this, self._go_on_within, seen, state["metrics"])

    def _go_on_within(self, trainer: Any, seen: int, metrics: dict[str, Any]) -> None:
        trainer.data_loader.sampler.set_epoch(trainer.state.epoch, skip=seen)
        self.seen, self.seen_after = seen * world_size(), trainer.state.iteration % trainer.state.epoch_length
        try:
            for name, metric in self.metrics.items():
                metric.load_state_dict(metrics[name])
        # other metrics, or another number of processes
        except (ValueError, KeyError):
            logger.warning("the training's metrics of this epoch are of the steps from here on")

    def _take_rate(self, given: list[float]) -> None:
        """Takes this command's learning rate where it differs from the one that the run began with."""
        for index, (group, rate) in enumerate(zip(self.optimizer.param_groups, given, strict=True)):
            before = group.get("initial_lr", group["lr"])
            if rate != before:
                logger.info(f"learning rate {rate:g} from here on, as given now; the run began with {before:g}")
                group["lr"] *= rate / before
                group["initial_lr"] = rate
                if index < len(self.lr_scheduler.base_lrs):
                    self.lr_scheduler.base_lrs[index] = rate


def _check_state(state: Any, path: Path) -> None:
    """Refuses what no run can go on from: another kind of file, or numbers that it cannot have.

    Raises:
        ValueError: saying which.
    """
    parts = {
        **dict.fromkeys(("position", "settings", "selection", "model", "optimizer", "lr_scheduler", "metrics"), dict),
        "run_id": str,
    }
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in parts.items()):
        raise ValueError(f"{path} is no run's state")
    counts = [state["position"].get(name) for name in ("epoch", "step", "steps", "seen")]
    counts += [state["selection"].get(name) for name in ("best_epoch", "since_best")]
    if not all(isinstance(count, int) and count >= 0 for count in counts) or not state["position"]["steps"]:
        raise ValueError(f"{path} is no run's state (it counts {', '.join(map(str, counts))} epochs and steps)")
    best = state["selection"].get("best")
    if best is not None and not (isinstance(best, float) and math.isfinite(best)):
        raise ValueError(f"{path} is no run's state (its best score is {best})")
    rates = {name: state["lr_scheduler"].get(name) for name in ("base_lrs", "_last_lr")}
    if name := _not_finite({"optimizer": state["optimizer"], "lr_scheduler": rates}):
        raise ValueError(f"{path} holds numbers that are not finite ({name}): no run goes on from them")


def _check_optimizer(optimizer: Optimizer) -> None:
    """Refuses what PyTorch loads into an optimizer and fails over at the next step.

    Raises:
        ValueError: saying what.
    """
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], float | int) or group["lr"] < 0:
            raise ValueError(f"its learning rate is {group['lr']!r}")
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            tensors = state.values() if isinstance(state, dict) else [None]
            for value in tensors:
                if value is None or (isinstance(value, torch.Tensor) and value.ndim and value.shape != parameter.shape):
                    raise ValueError("the optimizer's state is of other weights")


def _not_finite(value: Any, name: str = "") -> str:
    """Where in nested lists and dictionaries a number or a tensor is not finite; empty where none is."""
    if isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        return next(filter(None, (_not_finite(inner, f"{name} {key}".strip()) for key, inner in pairs)), "")
    if isinstance(value, torch.Tensor):
        return "" if value.isfinite().all() else name
    return name if isinstance(value, float) and not math.isfinite(value) else ""


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
        if new_head:
            raise ValueError("--new_head is for weights to start from: name them as --pretrained too")
        logger.info("no weights to start from: they are random")
        return network
    remedy = "name an existing file as --pretrained"
    _load(network, pretrained, remedy, start=True, new_head=new_head, min_matched=float(min_matched))
    return network


def _load(network: nn.Module, path: str | Path, remedy: str, **options: Any) -> None:
    if not Path(path).exists():
        raise FileNotFoundError(f"no weight file {path}: {remedy}")
    logger.info(str(load_weights(network, path, **options)))


class _Lock:
    """Holds a folder until it is released or the process ends, however it does. It leaves no file.

    Raises:
        ValueError: when another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.descriptor: int | None = None
        try:
            import fcntl
        except ImportError:  # Windows has no such locks
            return
        self.descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise ValueError(f"{folder} is in use by another run: wait for it, or give another --ckpt_dir") from error
        except OSError as error:
            logger.warning(f"{folder} cannot be locked ({error.strerror}): start no second run in it")
        _held.add(self)

    def release(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    __del__ = release


# Forked loader workers would inherit the lock, and they outlive a killed run by seconds.
_held: weakref.WeakSet[_Lock] = weakref.WeakSet()


def _release_all() -> None:
    for lock in list(_held):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_all)


# What PyTorch says of a loader's process that has ended, from wherever the program is then.
WORKER = re.compile(r"DataLoader worker \(pids?(?:\(s\))? ([\d, ]+)\)")


def _of_worker(error: BaseException, trainer: Any) -> str:
    """What to say where a loader's process was killed, with the files that it was at; else nothing."""
    found = WORKER.search(str(error))
    if found is None:
        return ""
    dataset = getattr(getattr(trainer, "data_loader", None), "dataset", None)
    numbers = [int(number) for number in found[1].split(",")]
    files = dataset.last_files(numbers) if isinstance(dataset, SeededDataset) else []
    at = f", its last file was {', '.join(files)}" if files else ""
    memory = (
        "there may be too little memory (/dev/shm)" if "shared memory" in str(error) else "there may be no memory left"
    )
    return f"a process that loads images was killed{at}; {memory}, or the file crashes its reader: try --num_workers 0"


def _batches(items: int, loader: Any) -> int:
    return items // loader.batch_size if loader.drop_last else math.ceil(items / loader.batch_size)


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
