import logging
import math
import operator
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import PicklingError
from typing import Any

import pytest
import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from torch import nn
from torch.profiler import profile

from networks import VMUNet, cmunext_s, training
from networks.training import (
    Autocast,
    Checkpoints,
    EpochLog,
    Progress,
    RunLog,
    as_bool,
    load_trained,
    poly_schedule,
    prepare_network,
    start_from,
)
from tests.golden import fill
from transforms import replacing

BATCHES = [None] * 3


class Run:
    """A trainer that moves one weight a step, scored after each epoch by an evaluator that follows `scores`."""

    def __init__(
        self, folder: Path, scores: list[float], lowest: bool = False, epochs: int = 0, **options: Any
    ) -> None:
        self.network = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.network.weight)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=1.0, momentum=0.5)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.5)
        self.trainer, self.evaluator = Engine(self.step), Engine(lambda engine, batch: None)
        self.trainer.state.max_epochs = epochs or len(scores)
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.scheduler.step())
        self.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: self.evaluator.run([None]))
        self.evaluator.add_event_handler(Events.EPOCH_COMPLETED, self.score)
        self.scores = scores
        for engine, batches in ((self.trainer, BATCHES), (self.evaluator, [None])):
            engine.state.key_metric_name = "score"
            engine.metric_cmp_fn = operator.lt if lowest else operator.gt
            engine.data_loader = batches
        self.checkpoints = Checkpoints(
            folder, self.network, self.optimizer, self.scheduler, replacing=replacing, **options
        )

    def step(self, engine: Engine, batch: None) -> None:
        self.optimizer.zero_grad()
        self.network(-torch.ones(1, 1)).sum().backward()
        self.optimizer.step()

    def score(self, engine: Engine) -> None:
        engine.state.metrics["score"] = self.scores[self.trainer.state.epoch - 1]

    def __call__(self) -> "Run":
        self.checkpoints.attach(self.trainer, self.evaluator)
        self.trainer.run(BATCHES, max_epochs=self.trainer.state.max_epochs)
        return self

    @property
    def weight(self) -> float:
        return self.network.weight.item()


def saved(path: Path) -> Any:
    return torch.load(path, weights_only=True)


NAN = math.nan
UP_AND_DOWN = [0.1, 0.5, 0.4, 0.5, 0.6, 0.1, 0.1, 0.7]


@pytest.mark.parametrize(
    ("scores", "options", "epochs", "selection"),
    [
        ([0.5, 0.2, 0.9, 0.9, NAN, 0.4], {}, 6, (0.9, 3, 3)),
        ([0.5, 0.2, 0.9, 0.9, NAN, 0.4], {"lowest": True}, 6, (0.2, 2, 4)),
        ([NAN, NAN], {}, 2, (None, 0, 2)),
        (UP_AND_DOWN, {"patience": 2}, 4, (0.5, 2, 2)),
        (UP_AND_DOWN, {"patience": 3}, 8, (0.7, 8, 0)),
    ],
)
def test_the_best_epoch_is_kept_beside_the_last_until_patience_ends(
    tmp_path: Path, scores: list[float], options: dict[str, Any], epochs: int, selection: tuple[float | None, int, int]
) -> None:
    run = Run(tmp_path / "new", scores, **options)
    if selection[0] is None:
        with pytest.raises(ValueError, match=r"score was not finite in any epoch: there is no model\.pt, .*last\.pt"):
            run()
    else:
        run()
    last = saved(tmp_path / "new/last.pt")
    assert last["model"]["weight"].item() == run.weight
    assert last["trainer"]["iteration"] == epochs * len(BATCHES)
    assert last["selection"] == dict(zip(("best", "best_epoch", "since_best"), selection, strict=True))
    if best_epoch := selection[1]:
        until_best = Run(tmp_path / "other", scores[:best_epoch])()
        assert saved(tmp_path / "new/model.pt")["weight"].item() == until_best.weight
    assert sorted(os.listdir(tmp_path / "new")) == ["last.pt", "model.pt"][: 2 if best_epoch else 1]


def test_a_training_that_never_validates_says_so(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.1, 0.2])
    run.evaluator.run = lambda data: None
    with pytest.raises(ValueError, match=r"score was never computed, as no validation ran: there is no model\.pt"):
        run()
    assert os.listdir(tmp_path) == ["last.pt"]


def test_the_training_chooses_where_nothing_is_held_out(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.5, 0.7, 0.6], lowest=True)
    run.evaluator.data_loader = []
    run.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda: run.score(run.trainer))
    run()
    assert saved(tmp_path / "last.pt")["selection"] == {"best": 0.5, "best_epoch": 1, "since_best": 2}


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    scores = [0.1, 0.8, 0.5, 0.3, 0.2, 0.9]
    whole = Run(tmp_path / "whole", scores)()
    Run(tmp_path / "parts", scores[:3])()
    resumed = Run(tmp_path / "parts", scores, resume=True, seed=7)()
    assert torch.initial_seed() == 7 + 3
    assert resumed.weight == whole.weight
    for name in ("last.pt", "model.pt"):
        one, other = (saved(tmp_path / part / name) for part in ("whole", "parts"))
        assert str(one) == str(other)
    assert resumed.scheduler.last_epoch == 6


def test_patience_counts_across_a_resumption(tmp_path: Path) -> None:
    scores = [0.9, 0.5, 0.5, 0.5, 0.5, 0.5]
    Run(tmp_path, scores[:3])()
    assert Run(tmp_path, scores, resume=True, patience=3)().trainer.state.epoch == 4
    # a smaller patience that has run out already
    assert Run(tmp_path, scores, resume=True, patience=1)().trainer.state.epoch == 5


def test_what_cannot_be_resumed_is_one_line(tmp_path: Path) -> None:
    def message(**options: Any) -> str:
        with pytest.raises((OSError, ValueError), match=r"last\.pt") as caught:
            Run(tmp_path, [0.1, 0.2], resume=True, **options)()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    path = tmp_path / "last.pt"
    assert message() == f"{path} does not exist: start without --resume, or name the run's --ckpt_dir"
    Run(tmp_path, [0.1, 0.2])()
    assert message() == f"{path} has finished its 2 epochs: give a larger --max_epochs"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "does not continue this run" in message(epochs=5)
    path.write_bytes(b"")
    assert "does not continue this run" in message(epochs=5)
    torch.save(nn.Linear(3, 1).state_dict(), path)
    assert "does not continue this run ('model'): start without --resume" in message(epochs=5)
    torch.save({"model": nn.Linear(3, 1).state_dict()}, path)
    assert "does not continue this run (Error(s) in loading state_dict for Linear:)" in message(epochs=5)


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    run = Run(tmp_path, [0.1])()
    before = (tmp_path / "last.pt").read_bytes()
    run.scheduler.unsaveable = lambda: None
    with pytest.raises((AttributeError, PicklingError), match="pickle"):
        run()
    assert (tmp_path / "last.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "model.pt"]


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


class SeesPlainTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not isinstance(x, MetaTensor)
        self.autocast = torch.is_autocast_enabled("cpu")
        y = self.layer(x)
        self.dtype = y.dtype
        return y


@pytest.mark.parametrize(("amp", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_keeps_metadata_and_returns_float32(amp: str, dtype: torch.dtype) -> None:
    network = SeesPlainTensors()
    prepared = prepare_network(network, torch.device("cpu"), amp)
    image = MetaTensor(torch.randn(2, 3), meta={"filename_or_obj": "a.png"})
    image.is_batch = True
    out = prepared(image)
    assert network.dtype == dtype
    assert network.autocast == (amp == "bfloat16")
    assert out.dtype == torch.float32
    assert out.meta["filename_or_obj"] == "a.png"
    assert out.is_batch
    plain = prepared(image.as_tensor())
    assert type(plain) is torch.Tensor
    torch.testing.assert_close(plain, network.layer(image.as_tensor()), atol=0.05 if amp == "bfloat16" else 0, rtol=0)
    out.sum().backward()
    torch.testing.assert_close(network.layer.weight.grad, image.as_tensor().sum(0).expand(3, 3), atol=0.05, rtol=0)


def test_an_outer_autocast_is_left_alone() -> None:
    network = SeesPlainTensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Autocast(network, bfloat16=False)(torch.ones(2, 3))
    assert network.dtype == torch.bfloat16


def test_words_that_a_switch_may_be() -> None:
    assert [as_bool(word) for word in ("true", "True", "false", "False")] == [True, True, False, False]
    with pytest.raises(ValueError, match="expected true or false, not 'yes'"):
        as_bool("yes")
    with pytest.raises(ValueError, match="amp_dtype must be float32, bfloat16 or auto, not 'half'"):
        prepare_network(nn.Linear(1, 1), "cpu", "half")


@pytest.mark.parametrize("load", [load_trained, start_from])
def test_weights_are_loaded_left_out_or_refused_in_one_line(load: Callable[..., nn.Module], tmp_path: Path) -> None:
    network, other, path = nn.Linear(2, 2), nn.Linear(2, 2), tmp_path / "model.pt"
    assert start_from(network, None) is load_trained(network, path, wanted="false") is network
    torch.save(other.state_dict(), path)
    assert torch.equal(load(network, path).weight, other.weight)
    with pytest.raises(ValueError, match=r"model\.pt.*mis-shaped"):
        load(nn.Linear(2, 3), path)


@pytest.mark.parametrize(("channels", "needed"), [(1, 3), (3, 1), (3, 9)])
@pytest.mark.parametrize("says", [True, False])
def test_an_output_that_does_not_fit_the_classes_is_refused(channels: int, needed: int, says: bool) -> None:
    """A network of this project says what it answers with; any other shows it when it runs."""
    network = cmunext_s(out_channels=channels) if says else nn.Conv2d(3, channels, 1)
    with pytest.raises(ValueError, match=rf"answers with {channels} channels?, and the classes need {needed}"):
        prepare_network(network, "cpu", out_channels=needed)(torch.zeros(1, 3, 32, 32))
    assert prepare_network(network, "cpu", out_channels=channels)(torch.zeros(1, 3, 32, 32)).shape[1] == channels
    if says:
        with pytest.raises(ValueError, match=f"the classes need {needed}"):
            load_trained(network, "model.pt", wanted=False, out_channels=needed)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"--compile true needs a C\+\+ compiler"):
        prepare_network(nn.Linear(1, 1), "cpu", compile="true")


def test_processes_are_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="multi_gpu.yaml runs under torchrun --standalone --nproc_per_node=N"):
        training.start_process_group()


def test_the_log_says_what_is_trained_and_how_long_it_takes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer = Engine(lambda engine, batch: [{"loss": 4}])
    RunLog(nn.Linear(999, 1000), "cpu", "7 images").attach(trainer)
    trainer.run([None] * 4, max_epochs=3)
    first, second = (record.message for record in caplog.records if record.name == training.__name__)
    assert first == "Linear (1.00 M parameters) on cpu. 7 images"
    assert second.endswith("s per step, 4 steps per epoch, about 0 min for 2 epochs")


def test_the_log_has_one_line_an_epoch(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    trainer, validator = Engine(lambda engine, batch: None), Engine(lambda engine, batch: None)

    def validate() -> None:
        trainer.state.metrics["train_loss"] = trainer.state.epoch / 10
        if trainer.state.epoch == 2:
            validator.run([None])
            validator.state.metrics["iou"] = 0.5
            validator.state.best_metric, validator.state.best_metric_epoch = 0.5, 2

    trainer.add_event_handler(Events.EPOCH_COMPLETED, validate)
    EpochLog(validator).attach(trainer)
    trainer.run([None], max_epochs=3)
    lines = [record.message.rpartition(" (")[0] for record in caplog.records if record.name == training.__name__]
    assert lines == [
        "epoch 1/3: train_loss 0.1000",
        "epoch 2/3: train_loss 0.2000, iou 0.5000, best 0.5000 in epoch 2",
        "epoch 3/3: train_loss 0.3000",
    ]


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_is_for_terminals(
    terminal: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    engine = Engine(lambda engine, batch: [{"loss": 4}])
    Progress(desc="Steps").attach(engine)
    engine.run(BATCHES, max_epochs=1)
    shown = capsys.readouterr().err
    assert ("Steps" in shown) == ("loss=4" in shown) == terminal


@pytest.mark.parametrize("switches", [{"channels_last": True}, {"frozen": True}, {"channels_last": "false"}])
def test_switches_change_how_not_what(switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network, image = cmunext_s().eval(), torch.randn(2, 3, 32, 48)
    fill.fill(network.state_dict())
    with torch.no_grad():
        expected = network(image)
        torch.testing.assert_close(
            prepare_network(network, torch.device("cpu"), **switches)(image), expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("network", [cmunext_s(), VMUNet(dims=(8, 16, 32, 64))], ids=["conv", "scan"])
def test_frozen_bfloat16_is_autocast_without_casting_weights(network: nn.Module) -> None:
    fill.fill(network.state_dict())
    network.eval()
    image, cpu = torch.randn(1, 3, 32, 32), torch.device("cpu")
    with torch.no_grad():
        # norms folded, weights in float32 as they are
        expected = prepare_network(network.frozen(), cpu, "bfloat16")(image)
        prepared = prepare_network(network, cpu, "bfloat16", frozen=True)
        assert torch.equal(prepared(image), expected)
    assert any(parameter.dtype is torch.bfloat16 for parameter in prepared.parameters())
    assert all(parameter.dtype is torch.float32 for parameter in network.parameters())


class OneConvolution(nn.Module):  # a plain nn.Conv2d or nn.Sequential is not compiled
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


@pytest.mark.skipif(
    shutil.which("c++") is None or not torch.backends.mkldnn.is_available(),
    reason="torch.compile needs a C++ compiler, and x86 or Arm for oneDNN",
)
def test_compiled_frozen_network_computes_the_same() -> None:
    network, image = OneConvolution().eval(), torch.randn(1, 3, 16, 16)
    prepared = prepare_network(network, torch.device("cpu"), channels_last=True, compile=True, frozen=True)
    with torch.inference_mode():
        expected = network(image)
        torch.testing.assert_close(prepared(image), expected)
        with profile() as seen:
            prepared(image)
    # PyTorch chooses the layout of weights that it may take for constants
    assert any(event.key.startswith("mkldnn::_convolution_pointwise") for event in seen.key_averages())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_freed_memory_is_kept() -> None:
    code = """if True:
        import resource, torch
        from networks.training import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(4):
                torch.ones(7 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        given_back = faults()
        took_effect = keep_freed_memory()
        faults()
        print(took_effect, given_back, faults())
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    took_effect, given_back, kept = out.split()
    assert took_effect == "True"
    assert int(kept) < int(given_back) / 2
