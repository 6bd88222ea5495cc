"""The GPU part as far as a machine without a GPU can go: to the message, and through everything but the timing."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import gpu
from benchmarks.harness import row
from networks.selective_scan import parallel, reference, triton_scan

ROOT = Path(__file__).parents[2]
MESSAGE = "the gpu part needs an NVIDIA GPU and PyTorch's CUDA build; this machine has none\n"
SMALL = ((1, 3, 5, 4),)
ROW = {"what": "a", "ms": 1.0, "against_ms": None, "ratio": None, "better": "higher"}


def with_segments(module: Any, *, spoil: Callable[[Tensor], Tensor] = lambda y: y) -> Any:
    """The backend `module` with the argument `segments` of the Triton scan, its output changed by `spoil`."""

    def scan_2d(*tensors: Tensor, segments: int) -> Tensor:
        return spoil(module.selective_scan_2d(*tensors))

    def scan(*tensors: Tensor, delta_softplus: bool, segments: int) -> Tensor:
        return module.selective_scan(*tensors, delta_softplus)

    return SimpleNamespace(selective_scan_2d=scan_2d, selective_scan=scan)


def test_it_starts_where_there_is_pytorch_only_and_asks_for_a_gpu_in_one_line() -> None:
    missing = ["monai", "ignite", "scipy", "h5py", "nibabel", "triton", "mamba_ssm"]
    start = "runpy.run_module('benchmarks', run_name='__main__', alter_sys=True)"
    block = f"import runpy, sys; sys.modules.update(dict.fromkeys({missing})); sys.argv = ['', 'gpu']; {start}"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", block], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", MESSAGE)


@pytest.mark.parametrize(
    ("missing", "asked", "parts"),
    [
        ("no GPU", [], command.CPU_PARTS),
        ("", [], command.PARTS),
        ("no GPU", ["loader"], ("loader",)),
        ("", ["gpu"], ("gpu",)),
    ],
)
def test_all_parts_are_measured_that_can_be(
    missing: str, asked: list[str], parts: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(gpu, "unavailable", lambda: missing)
    monkeypatch.setattr(command.importlib, "import_module", lambda name: SimpleNamespace(rows=lambda: [ROW]))
    monkeypatch.setattr(command, "write", lambda part, rows: written.append((part, rows)))
    monkeypatch.setattr(command, "renew", lambda: written.append("renewed"))
    command.main([*asked, "--threads", str(torch.get_num_threads())])
    assert written == [*((part, [ROW]) for part in parts), "renewed"]


def test_a_missing_gpu_is_noticed_before_other_parts_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "unavailable", lambda: "no GPU")
    monkeypatch.setattr(command, "write", lambda part, rows: pytest.fail(f"{part} was measured"))
    with pytest.raises(SystemExit, match="no GPU"):
        command.main(["loader", "gpu"])


@pytest.mark.parametrize("module", [reference, parallel], ids=["reference", "parallel"])
def test_a_right_scan_passes_the_check(module: Any) -> None:
    worst = gpu.check(with_segments(module), "cpu", SMALL)
    assert len(worst) == 4
    assert worst["sequences in float32"] < 1e-5
    assert 0 < worst["images in float32"] < 1e-5 < worst["images in bfloat16"] < 2e-2


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda y: y * 1.001, "images in float32, output differs by 1.0e-03"),
        (lambda y: y * torch.where(y > 2, torch.nan, 1), "images in float32, output differs by nan"),
        # a right output with a wrong gradient
        (lambda y: 2 * y - y.detach(), "images in float32, x differs by 1.0e+00"),
    ],
    ids=["output", "NaN", "gradient"],
)
def test_a_wrong_scan_does_not(spoil: Callable[[Tensor], Tensor], names: str) -> None:
    with pytest.raises(SystemExit) as error:
        gpu.check(with_segments(parallel, spoil=spoil), "cpu", SMALL)
    assert str(error.value) == f"the scan is wrong: {names}; nothing is measured"


def test_backends_take_turns_until_memory_runs_out() -> None:
    turns = []
    times = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, torch.OutOfMemoryError(), 4.0])}

    def measure(work: Callable[[], str]) -> gpu.Figures:
        turns.append(work())
        seconds = next(times[work()])
        if isinstance(seconds, torch.OutOfMemoryError):
            raise seconds
        return seconds, 10 * seconds

    figures = gpu.compared(lambda name: lambda: name, ["a", "b"], measure)
    assert turns == ["a", "b", "a", "b", "a"]
    assert figures == {"a": (2, 20), "b": None}


def test_the_goal_is_for_mamba_ssm() -> None:
    figures = {"triton": (1.0, 100.0), "mamba_ssm": (2.0, 50.0), "parallel": None}
    mamba, other = gpu.speed_ups("step", figures, 1)
    assert mamba == row("step: speed-up over `mamba_ssm`", 1, 2, "higher", 1, mib=100, against_mib=50)
    assert (other["ratio"], other["against_ms"], other["against_mib"], "goal" in other) == (None, None, None, False)


def once(work: Callable[[], Any]) -> gpu.Figures:
    """Runs `work`, and says that it took half a second and 7 MiB."""
    work()
    return 0.5, 7.0


def test_rows_of_the_scan() -> None:
    rows = list(gpu.scan_rows(["parallel", "reference"], 1e6, once, "cpu", [(2, 3)]))
    case = "selective scan, batch 2, 3²×192"
    assert [row["what"] for row in rows] == [
        f"{case}, {dtype}, {what}"
        for dtype in ("bfloat16", "float32")
        for what in (
            "forward: speed-up over `reference`",
            "forward: bandwidth for four sequences, share of a copy's",
            "forward and backward: speed-up over `reference`",
        )
    ]
    assert [row["ratio"] for row in rows[::3]] == [1, 1]
    bfloat16, float32 = rows[1::3]
    # 18 positions in four directions, three sequences of 192 channels and two of 16 states, 4 bytes each
    assert float32["ratio"] == bfloat16["ratio"] == pytest.approx(18 * 4 * (3 * 192 + 2 * 16) * 4 / 0.5 / 1e6)
    # x and y of 192 channels, and x_dbl of four times rank 6 and two times 16 states
    assert float32["once"] == pytest.approx(18 * (2 * 192 + 4 * 38) * 4 / 0.5 / 1e6)
    assert float32["once"] == 2 * bfloat16["once"]
    assert float32["exponentials_per_s"] == 18 * 4 * 192 * 16 / 0.5


def test_rows_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("inference_run", "training_run"):
        monkeypatch.setattr(gpu, name, lambda backend, images, amp: lambda: None)
    rows = list(gpu.network_rows(["triton", "mamba_ssm"], once, "cpu", [(1, 32)], [(1, 32), (2, 32)]))
    assert [(row["what"], row.get("goal")) for row in rows] == [
        (f"VM-UNet {what}, 32², batch {batch}, {dtype}: speed-up over `mamba_ssm`", goal)
        for dtype in ("bfloat16", "float32")
        for what, batch, goal in (("forward pass", 1, None), ("training step", 1, None), ("training step", 2, 1))
    ]


@pytest.mark.parametrize("amp", [True, False])
def test_runs_of_the_network(amp: bool) -> None:
    images = torch.randn(1, 3, 32, 32)
    logits = gpu.inference_run("parallel", images, amp)()
    assert logits.shape == (1, 1, 32, 32)
    assert not logits.requires_grad
    gpu.training_run("parallel", images, amp)()


def test_the_triton_scan_takes_what_the_check_gives() -> None:
    signature = inspect.signature(triton_scan.selective_scan_2d)
    signature.bind("x", "x_dbl", "dt_weight", "A", "D", "dt_bias", segments=3)
    signature = inspect.signature(triton_scan.selective_scan)
    signature.bind("u", "delta", "A", "B", "C", "D", "delta_bias", delta_softplus=True, segments=3)


def test_the_timer_takes_what_it_is_given() -> None:
    testing = pytest.importorskip("triton.testing", reason="triton is not installed")
    inspect.signature(testing.do_bench).bind(print, warmup=100, rep=300, return_mode="median")
