"""The files that a run leaves and goes on from: `model.pt`, `last.pt` and the one before."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ignite.engine import Engine, Events
from ignite.metrics import Metric
from monai.engines import Workflow
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from networks.training.changes import Changes
from networks.training.log import hand_over_log, remember_log
from networks.training.processes import is_rank_zero, share_validation, world_size
from networks.training.provenance import RunRecord, read_run
from networks.training.states import check_optimizer, check_state
from networks.training.steps import EpochSampler, NotFinite
from networks.training.stopping import WORKER, FolderLock, StopSignals, of_worker
from networks.weights import read_checkpoint

logger = logging.getLogger(__name__)

BEST, LAST, BEFORE_LAST = "model.pt", "last.pt", "last.previous.pt"
LOG = "training.log"


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
        network: whose weights are saved and become `model.pt`: the one that is validated. The bare one, not its
            distributed wrapper.
        optimizer, lr_scheduler: what else a resumed run needs.
        more: and what else it needs, by name, with `state_dict` and `load_state_dict`. Where `network` is an average of
            weights, these are the network that is trained and the `WeightAverage`.
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
        more: Mapping[str, Any] | None = None,
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
        self.objects |= more or {}
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
        self.signals = StopSignals()
        self.lock: FolderLock | None = None
        self.log: logging.FileHandler | None = None
        self.evaluator: Workflow | None = None
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
            self.lock = FolderLock(self.ckpt_dir)
            # what a run that was killed had half written
            for name in (BEST, LAST):
                for left in self.ckpt_dir.glob(f".????????.{name}"):
                    left.unlink()
        if dist.is_initialized():
            dist.barrier()
        remember_log()
        share_validation(evaluator)
        self.evaluator = evaluator
        scored = evaluator if len(evaluator.data_loader) else trainer  # type: ignore[arg-type]
        self.metric = str(scored.state.key_metric_name)
        there = any((self.ckpt_dir / name).is_file() for name in (LAST, BEFORE_LAST))
        if self.resume == "auto":
            logger.info(f"{self.ckpt_dir} holds {'a run to go on with' if there else 'no run yet: this one starts'}")
        if self.resume is True or (self.resume == "auto" and there):
            try:
                finished = self._load(trainer)
            except Exception:
                self._release()
                raise
            if finished:
                self._release()
                trainer.add_event_handler(Events.STARTED, self._leave_finished, finished)
                return
        elif is_rank_zero():
            self._set_aside()
        if is_rank_zero():
            self._open_log()
        self.signals.listen()
        self.steps = trainer.state.iteration
        self.optimizer.register_step_post_hook(self._has_moved)
        # an evaluator has one epoch a run
        scored.add_event_handler(Events.EPOCH_COMPLETED, self._score, trainer)
        trainer.add_event_handler(Events.STARTED, self._begin)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, self._after_step)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, self._after_epoch)
        trainer.add_event_handler(Events.COMPLETED, self._say_best)
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

    def _say_best(self, trainer: Engine) -> None:
        best = self._best_line()
        if is_rank_zero():
            logger.info(best)
        self._end("completed", trainer)

    def _best_line(self) -> str:
        if self.best is None:
            reason = "not finite in any epoch" if self.since_best else "never computed, as no validation ran"
            raise ValueError(
                f"{self.metric} was {reason}: there is no model.pt, the last epoch's weights are in"
                f" {self.ckpt_dir / LAST}"
            )
        return f"best {self.metric} {self.best:.4f} in epoch {self.best_epoch}: {self.ckpt_dir / BEST}"

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
        self.signals.forget()

    def _on_error(self, trainer: Engine, error: BaseException) -> None:
        """Saves the state before the step that failed, where it is still as it was, and hands the error on."""
        # ignite hands an error on twice
        if not self.ended:
            line = of_worker(error, [trainer, self.evaluator])
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

    def _asked(self) -> tuple[bool, bool]:
        """Whether to stop, and whether it is time to save."""
        due = self.minutes > 0 and time.monotonic() - self.saved_at > 60 * self.minutes
        if not dist.is_initialized():
            return self.signals.received is not None, due
        # a signal reaches the processes at different steps, and clocks differ; all must do the same after the same step
        asked = torch.tensor([float(self.signals.received is not None), float(due)], device=_device_of(self.network))
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
        self._end(f"stopped by {self.signals.received or 'a signal to another process'}", trainer)

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
        facts = {"position": position, "metrics": metrics, "selection": selection, "settings": self.settings}
        self._save({**state, **facts, "run_id": self.record.id if self.record else ""}, LAST)
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
        hand_over_log(self.log)

    # Going on

    def _load(self, trainer: Workflow) -> str:
        """Goes on with the newest state. Where a queue asks for a run that has ended, what is left of it to say."""
        state, path = self._newest()
        remedy = "give the same to go on, or start without --resume"
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
                f" {remedy}"
            )
        changes = self._changes(state["run_id"])
        if changes.refused:
            raise ValueError(f"{path} is of a run with {changes.refused}: {remedy}")
        given = [dict(group) for group in self.optimizer.param_groups]
        try:
            self.best, self.best_epoch, self.since_best = (
                state["selection"][key] for key in ("best", "best_epoch", "since_best")
            )
            if ended := self._has_ended(trainer, state["position"], path):
                return self._finish(trainer, state, ended)
            for name, thing in self.objects.items():
                thing.load_state_dict(state[name])
            check_optimizer(self.optimizer)
            if self.record is not None:
                self.record.resume(state["run_id"])
            self._go_to(trainer, state)
        except _Ended:
            raise
        except (RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(
                line.strip() for line in str(error).splitlines()[: 2 if "state_dict" in str(error) else 1]
            )
            raise ValueError(f"{path} does not continue this run ({reason}): start without --resume") from error
        self._take_rate([group.get("initial_lr", group["lr"]) for group in given])
        for group, asked in zip(self.optimizer.param_groups, given, strict=True):
            group.update({name: asked[name] for name in changes.optimizer if name in group})
        if changes.said:
            logger.info(f"as given now, from here on: {changes.said}")
        if changes.unused:
            logger.info(f"the weights are those of {path}, this counts where a run begins: {changes.unused}")
        within = f" and {state['position']['step']} steps" if state["position"]["step"] else ""
        logger.info(f"resumed from {path} after epoch {trainer.state.epoch}{within}")
        return ""

    def _changes(self, run_id: str) -> Changes:
        """How this command's configuration differs from that of the run."""
        now = self.record.content.get("configuration") if self.record is not None else None
        if self.record is None or not isinstance(now, dict):
            return Changes({}, {})
        run = read_run(self.record.path)
        before = run.get("configuration") if run.get("id") == run_id else None
        if not isinstance(before, dict):
            logger.warning(f"{self.record.path} is not of this run, or damaged: its configuration is not compared")
            return Changes({}, {})
        return Changes(before, now)

    def _has_ended(self, trainer: Workflow, position: Mapping[str, Any], path: Path) -> str:
        """How the run has ended that would go on; nothing where it has not. Only a queue may ask for such a run."""
        if position["epoch"] >= (trainer.state.max_epochs or 0):
            ended, remedy = f"has finished its {position['epoch']} epochs", "give a larger --max_epochs"
        elif 0 < self.patience <= self.since_best:
            ended = f"has ended early, after {self.since_best} validations without a better one"
            remedy = "give a larger --early_stop, or 0"
        else:
            return ""
        if self.resume != "auto":
            raise _Ended(f"{path} {ended}: {remedy}")
        return f"{path} {ended}, nothing is left to do"

    def _finish(self, trainer: Workflow, state: dict[str, Any], ended: str) -> str:
        """Completes the record, where the run was killed just before it did; returns what to say."""
        try:
            line = f"{ended}; {self._best_line()}"
        except ValueError as error:
            raise _Ended(str(error)) from None
        if not (self.ckpt_dir / BEST).is_file():
            raise _Ended(f"{ended}, but {self.ckpt_dir / BEST} is missing: train again without --resume")
        if self.record is not None and read_run(self.record.path).get("how_it_ended") != "completed":
            self.record.resume(state["run_id"])
            position = state["position"]
            trainer.state.epoch, trainer.state.iteration = position["epoch"], position["epoch"] * position["steps"]
            self._end("completed", trainer)
            trainer.state.epoch = trainer.state.iteration = 0
        return line

    def _leave_finished(self, trainer: Engine, line: str) -> None:
        if is_rank_zero():
            logger.info(line)
        trainer.terminate(skip_completed=True)

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
                check_state(state, path)
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
            left = _batches(math.ceil((len(loader.sampler.dataset) - seen) / world_size()), loader)
        trainer.state.epoch_length = length
        trainer.state.epoch = position["epoch"]
        trainer.state.iteration = position["epoch"] * length + (length - left if seen else 0)
        before = position["epoch"] * position["steps"] + position["step"]
        if length != position["steps"]:
            logger.info(
                f"{length} steps an epoch now, {position['steps']} before: the batch size and the number of processes"
                " are this command's"
            )
            # a schedule by steps goes on from as many steps as the epochs would have had
            if self.lr_scheduler.last_epoch == before != position["epoch"]:
                self.lr_scheduler.last_epoch = trainer.state.iteration
        if seen:
            # ignite counts the epochs of the whole run
            this = Events.EPOCH_STARTED(once=position["epoch"] + 1)
            trainer.add_event_handler(this, self._go_on_within, seen, state["metrics"])

    def _go_on_within(self, trainer: Any, seen: int, metrics: dict[str, Any]) -> None:
        trainer.data_loader.sampler.set_epoch(trainer.state.epoch, skip=seen)
        self.seen, self.seen_after = seen, trainer.state.iteration % trainer.state.epoch_length
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


class _Ended(ValueError):
    """A run that has ended does not go on."""


def _batches(items: int, loader: Any) -> int:
    return items // loader.batch_size if loader.drop_last else math.ceil(items / loader.batch_size)


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device
