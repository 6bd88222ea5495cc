"""A run from its start to the use of its model: stopped, resumed, evaluated, refused where it differs, repeated."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bundles.__main__ import main
from networks.training import EpochLog, SeededDataset, WatchedDataset
from tests.bundles.conftest import (
    BUNDLES,
    DATA,
    METRIC,
    PICTURES,
    ROOT,
    Options,
    Run,
    command,
    config,
    refused,
    saved,
    succeeds,
    words,
)
from tests.helpers import contents
from transforms import image_split

Trained = Callable[[str], tuple[Path, str]]


def run_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


def same_weights(one: Path, other: Path) -> bool:
    first, second = saved(one), saved(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_is_stopped_resumed_evaluated_used_and_repeated(
    options: Options, data: Path, trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bundle = "cmunext_busi"
    whole, _ = trained(bundle)
    chosen = options(bundle, tmp_path, max_epochs=2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    typed = ["-m", "monai.bundle", "run", "training", "--config_file", *config(bundle), *words(chosen)]
    with subprocess.Popen(
        [sys.executable, *typed, "--resume", "auto"], cwd=tmp_path, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        log = ""
        for line in process.stdout:
            log += line
            if "to train on, model selected by" in line:
                process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log
    assert "Traceback" not in log
    assert re.search(r"SIGTERM: this step is finished and saved; a second signal ends at once", log)
    last = log.strip().splitlines()[-1]
    assert re.search(r"stopped (in epoch \d after step \d|after epoch \d); --resume true --ckpt_dir .* goes on$", last)
    assert run_of(tmp_path)["how_it_ended"] == "stopped by SIGTERM"
    succeeds(command("training", config(bundle), tmp_path, *words(chosen), "--resume", "auto"))
    assert same_weights(tmp_path / "model.pt", whole / "model.pt")

    run = run_of(tmp_path)
    assert run["how_it_ended"] == "completed"
    assert [set(one) for one in run["earlier_commands"]] == [{"command", "started"}]
    assert run["overrides"]["resume"] == "auto"
    assert run["best"]["metric"] == METRIC[bundle]
    assert run["configuration"]["max_epochs"] == 2
    # what both commands logged
    text = (tmp_path / "training.log").read_text()
    assert text.count("to train on, model selected by") == 2
    assert "epoch 2/2: " in text

    # the report says what the run says, whatever the evaluating command would choose
    overlaid = config(bundle, "train", "evaluate")
    done = succeeds(command("evaluating", overlaid, tmp_path, *words(chosen), "--selection", "holdout"))
    assert "model selected by: IoU on held-out training images" in done
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert summary["selection"] == "IoU on held-out training images"
    where = ["--input", str(data / "busi/images"), "--ckpt_dir", str(tmp_path), "--output_dir", str(tmp_path / "masks")]
    used = ["--image_size", "32", "--network_def", str(chosen["network_def"])]
    log = succeeds(command("inferring", config(bundle, "inference"), tmp_path, *where, *used))
    assert f"is of run {run['id'][:8]}" in log

    assert main(["runs", str(tmp_path)]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2
    assert f"iou {run['best']['score']:.4f}" in listed[1]
    assert listed[1].endswith("completed  IoU on held-out training images")

    assert main(["reproduce", str(tmp_path), "--out", str(tmp_path / "again")]) == 0
    assert "the weights are equal to the bit" in capsys.readouterr().out
    assert same_weights(tmp_path / "again/model.pt", whole / "model.pt")


DIFFERING: list[tuple[str, dict[str, Any], str]] = [
    ("cmunext_busi", {"fold": 2}, "was trained with fold 1, and it is 2 now: give what the run had, or --force true"),
    ("cmunext_busi", {"image_size": 64}, "was trained with image_size 32, and it is 64 now"),
    ("cmunext_busi", {"selection": "paper"}, "was trained with selection holdout, and it is paper now"),
    ("cmunext_busi", {"classes": ["cyst"]}, r"was trained with classes \['lesion'\], and it is \['cyst'\] now"),
    ("cmunext_busi", {"seed": 1}, "was trained with seed 41, and it is 1 now"),
    ("vmunet_isic", {"image_size": [32, 64]}, r"was trained with image_size 32, and it is \[32, 64\] now"),
    ("vmunet_isic", {"selection": "paper"}, "was trained with selection holdout, and it is paper now"),
    ("vmunet_synapse", {"image_size": 64}, "was trained with image_size 32, and it is 64 now"),
    ("vmunet_synapse", {"selection": "paper"}, "was trained with selection holdout, and it is paper now"),
]


@pytest.mark.parametrize(("bundle", "given", "line"), DIFFERING)
def test_a_configuration_that_differs_from_the_runs_is_refused(
    bundle: str, given: dict[str, Any], line: str, trained: Trained, options: Options, run: Run, tmp_path: Path
) -> None:
    folder, _ = trained(bundle)
    asked = options(bundle, folder) | {"output_dir": str(tmp_path / "eval")} | given
    with refused(line):
        run("evaluating", config(bundle, "train", "evaluate"), **asked)
    assert not (tmp_path / "eval").exists()
    # neither does a training go on with it
    shutil.copytree(folder, tmp_path / "models")
    before = (tmp_path / "models/last.pt").read_bytes()
    again = options(bundle, tmp_path / "models", max_epochs=3, resume=True) | given
    with refused(r"last\.pt is of a run with (fold|image_size|selection|classes|seed|data) "):
        run("training", config(bundle), **again)
    assert (tmp_path / "models/last.pt").read_bytes() == before


@pytest.mark.parametrize("bundle", BUNDLES)
def test_other_data_than_the_runs_are_refused_or_forced(
    bundle: str, trained: Trained, options: Options, run: Run, data: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    folder, _ = trained(bundle)
    other = tmp_path / "other"
    shutil.copytree(data / DATA[bundle], other)
    asked = options(bundle, folder) | {"output_dir": str(tmp_path / "eval"), "dataset_dir": str(other)}
    overlaid = config(bundle, "train", "evaluate")
    # the same files at another place are the same data
    run("evaluating", overlaid, **asked)
    content = run_of(folder)
    seen, test = (content["data"][part][0]["image"][0] for part in ("train", "test"))
    file = other / Path(test).relative_to(data / DATA[bundle])
    if bundle in PICTURES:
        # an image that the run trained on lies among those to test on, under another name
        shutil.copy(seen, file)
        with refused(rf"was trained on {re.escape(str(file))}, which is to be evaluated: .* or --force true"):
            run("evaluating", overlaid, **asked)
        shutil.copy(test, file)
    with file.open("ab") as end:
        end.write(b"\0")
    with refused(rf"{re.escape(str(file))} is none of the test images of the run of .*model\.pt: .* --force true"):
        run("evaluating", overlaid, **asked)
    run("evaluating", overlaid, **asked, force=True)
    assert "is none of the test images" in capsys.readouterr().out


def test_weights_alone_are_of_unknown_origin(
    trained: Trained, options: Options, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bundle = "cmunext_busi"
    folder, _ = trained(bundle)
    shutil.copy(folder / "model.pt", tmp_path)
    run("evaluating", config(bundle, "train", "evaluate"), **options(bundle, tmp_path))
    assert "model selected by: unknown: no run.json of the weights' run" in capsys.readouterr().out


def test_commands_about_runs_say_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["runs", str(tmp_path)]) == 1
    line = "no run.json in it or below; name a folder that holds checkpoints of runs"
    assert capsys.readouterr().err == f"{tmp_path}: {line}\n"
    assert main(["reproduce", str(tmp_path)]) == 1
    assert "no run.json in it; name the folder of a run's model.pt" in capsys.readouterr().err


# Guarded


class SeesNothing(torch.nn.Module):
    """Answers with the background, whatever it learns."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 9, 1)
        self.out_channels = 9

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + 1e3 * torch.eye(9)[0][:, None, None]


# TensorBoard's pictures of predictions that are not numbers
@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")
@pytest.mark.parametrize("bundle", BUNDLES)
def test_a_network_that_diverged_never_replaces_the_best(
    bundle: str, options: Options, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first epoch's validation one weight of the network becomes NaN, as after a step too far."""
    log = EpochLog.log

    def spoil(self: EpochLog, engine: Any) -> None:
        log(self, engine)
        if engine.state.epoch == 1:
            with torch.no_grad():
                for parameter in engine.network.parameters():
                    parameter.fill_(torch.nan)

    monkeypatch.setattr(EpochLog, "log", spoil)
    chosen = options(bundle, tmp_path, max_epochs=2, batch_size=16)
    run("training", config(bundle), **chosen)
    content = run_of(tmp_path)
    assert content["best"]["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path / "model.pt").values())
    assert "skipped" in (tmp_path / "training.log").read_text()
    assert not all(tensor.isfinite().all() for tensor in saved(tmp_path / "last.pt")["model"].values())


def test_held_out_cases_without_any_organ_are_not_applicable(
    options: Options, data: Path, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(data / "synapse", tmp_path / "data")
    slices = sorted((tmp_path / "data/train_npz").iterdir())
    case = slices[0].name.split("_")[0]
    for file in slices:
        if file.name.startswith(f"{case}_"):
            with np.load(file) as content:
                image, label = content["image"], content["label"]
            np.savez(file, image=image, label=np.zeros_like(label))
    chosen = options("vmunet_synapse", tmp_path / "models", max_epochs=2, val_cases=[case])
    chosen |= {"dataset_dir": str(tmp_path / "data"), "network_def": {"_target_": f"{__name__}.SeesNothing"}}
    with refused(r"mean_dice was not finite in any epoch: there is no model\.pt, the last epoch's weights are in"):
        run("training", config("vmunet_synapse"), **chosen)
    log = (tmp_path / "models/training.log").read_text()
    assert log.count("mean_dice n/a") == 2
    assert saved(tmp_path / "models/last.pt")["position"]["epoch"] == 2
    # beside a case that has organs it is left out
    other = next(file.name.split("_")[0] for file in slices if not file.name.startswith(case))
    run("training", config("vmunet_synapse"), **chosen | {"val_cases": [case, other], "max_epochs": 1})
    assert run_of(tmp_path / "models")["best"]["metric"] == "mean_dice"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_nothing_to_learn_is_refused_before_the_training(
    bundle: str, options: Options, data: Path, run: Run, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data / DATA[bundle], folder)
    for file in folder.rglob("*"):
        if file.suffix == ".npz":
            with np.load(file) as content:
                image, label = content["image"], content["label"]
            np.savez(file, image=image, label=np.zeros_like(label))
        elif file.is_file() and "masks" in str(file.parent.relative_to(folder)):
            with Image.open(file) as mask:
                empty = Image.new("L", mask.size)
            empty.save(file)
    chosen = options(bundle, tmp_path / "models", max_epochs=1) | {"dataset_dir": str(folder)}
    with refused("no training mask marks anything: there is nothing to learn"):
        run("training", config(bundle), **chosen)
    assert not list(tmp_path.glob("models/*.pt"))


@pytest.mark.parametrize("bundle", PICTURES)
def test_a_last_batch_of_one_image_does_no_harm(bundle: str, options: Options, run: Run, tmp_path: Path) -> None:
    """Batch norms take their statistics over the image then; only where it has become one pixel they cannot."""
    seed = {"cmunext_busi": 41, "vmunet_isic": 42}[bundle]
    count = len(image_split(options(bundle, tmp_path)["dataset_dir"], seed=seed).train)
    batch = next(size for size in range(2, count) if count % size == 1)
    run("training", config(bundle), **options(bundle, tmp_path, max_epochs=2, batch_size=batch))
    assert all(tensor.isfinite().all() for tensor in saved(tmp_path / "model.pt").values())
    assert "skipped" not in (tmp_path / "training.log").read_text()


def test_one_pixel_of_one_image_is_refused_with_the_remedy(options: Options, run: Run, tmp_path: Path) -> None:
    chosen = options("cmunext_busi", tmp_path, max_epochs=1, batch_size=1, image_size=16)
    with refused(r"batch norms cannot learn from one pixel: give a larger --image_size, or a --batch_size that leaves"):
        run("training", config("cmunext_busi"), **chosen)


def test_a_killed_loader_names_its_file(
    options: Options, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = SeededDataset._transform

    def killed(self: SeededDataset, index: int) -> Any:
        result = transform(self, index)
        if index >= 2 * len(self.data):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(SeededDataset, "_transform", killed)
    chosen = options("cmunext_busi", tmp_path, max_epochs=3, num_workers=1)
    with refused(r"a process that loads images was killed, its last file was \S.*\.png; .*try --num_workers 0"):
        run("training", config("cmunext_busi"), **chosen)
    assert run_of(tmp_path)["how_it_ended"].startswith("failed: a process that loads images was killed")


# Going on with another configuration


@pytest.mark.parametrize(
    ("bundle", "given", "line"),
    [
        (
            "cmunext_busi",
            {"validate#key_metric#iou#metric": "dice"},
            r"validate#key_metric#iou#metric iou, and it is dice",
        ),
        ("vmunet_isic", {"train#loss#lambda_ce": 0.5}, r"train#loss#lambda_ce 1\.0, and it is 0\.5 now"),
        ("vmunet_isic", {"lr_scheduler#T_max": 9}, r"lr_scheduler#T_max 50, and it is 9 now"),
        (
            "cmunext_busi",
            {"optimizer#_target_": "torch.optim.RMSprop"},
            r"_target_ torch\.optim\.SGD, and it is",
        ),
    ],
)
def test_a_run_does_not_go_on_as_another(
    bundle: str, given: dict[str, Any], line: str, trained: Trained, options: Options, run: Run, tmp_path: Path
) -> None:
    shutil.copytree(trained(bundle)[0], tmp_path / "models")
    before = contents(tmp_path / "models")
    asked = options(bundle, tmp_path / "models", max_epochs=3, log_dir=str(tmp_path / "runs"))
    with refused(rf"last\.pt is of a run with .*{line}.*: give the same to go on, or start without --resume"):
        run("training", config(bundle), **asked, resume=True, **given)
    assert contents(tmp_path / "models") == before


def test_what_a_run_takes_from_where_is_said(trained: Trained, options: Options, run: Run, tmp_path: Path) -> None:
    bundle = "cmunext_busi"
    shutil.copytree(trained(bundle)[0], tmp_path / "models")
    asked = options(
        bundle, tmp_path / "models", max_epochs=3, resume=True, pretrained=str(tmp_path / "models/model.pt")
    )
    given = {"train#loss#lambda_ce": 0.25, "optimizer#weight_decay": 0.5, "clip_grad": 1.0}
    run("training", config(bundle), **asked, **given)
    log = (tmp_path / "models/training.log").read_text()
    line = (
        "as given now, from here on: max_epochs 3 (2 before), clip_grad 1.0 (0.0 before), "
        "optimizer#weight_decay 0.5 (0.0001 before), train#loss#lambda_ce 0.25 (0.5 before)"
    )
    assert log.count(f"INFO {line}\n") == 1
    assert f"this counts where a run begins: pretrained {tmp_path / 'models/model.pt'}" in log
    assert saved(tmp_path / "models/last.pt")["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_queue_may_start_a_finished_run_again(
    trained: Trained, options: Options, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    bundle, models = "cmunext_busi", tmp_path / "models"
    shutil.copytree(trained(bundle)[0], models)
    before = contents(models)
    asked = options(bundle, models, max_epochs=2, log_dir=str(tmp_path / "runs"), resume="auto")
    run("training", config(bundle), **asked)
    said = r"last\.pt has finished its 2 epochs, nothing is left to do; best iou 0\.\d+ in epoch \d: .*model\.pt$"
    assert re.search(said, capsys.readouterr().out.strip().splitlines()[-1])
    assert contents(models) == before
    # killed after its last state and before its record was completed
    content = run_of(models)
    (models / "run.json").write_text(json.dumps({key: content[key] for key in content if key != "best"} | {
        "how_it_ended": "running, or killed"
    }))  # fmt: skip
    run("training", config(bundle), **asked)
    after = run_of(models)
    assert (after["id"], after["how_it_ended"], after["epochs"]) == (content["id"], "completed", 2)
    assert after["best"] == content["best"]
    # what is asked for is not there
    (models / "model.pt").unlink()
    with refused(r"has finished its 2 epochs, .*model\.pt is missing: train again without --resume"):
        run("training", config(bundle), **asked)


def test_the_log_begins_with_the_command(trained: Trained) -> None:
    lines = (trained("cmunext_busi")[0] / "training.log").read_text().splitlines()
    early = [number for number, line in enumerate(lines) if "no weights to start from: they are random" in line]
    first = next(number for number, line in enumerate(lines) if "images to train on" in line)
    assert len(early) == 1
    assert early[0] < first
    assert sum("freed memory is kept" in line or "cannot keep freed memory" in line for line in lines) == 1


def test_a_loader_that_is_killed_while_validating_or_evaluating_names_its_file(
    trained: Trained, options: Options, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    transform = WatchedDataset._transform

    def killed(self: WatchedDataset, index: int) -> Any:
        result = transform(self, index)
        if type(self) is WatchedDataset:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(WatchedDataset, "_transform", killed)
    chosen = options("cmunext_busi", tmp_path, max_epochs=2, num_workers=1)
    line = r"a process that loads images was killed, its last file was [^,;]+\.png; .*try --num_workers 0"
    with refused(line):
        run("training", config("cmunext_busi"), **chosen)
    assert "its last file was" in run_of(tmp_path)["how_it_ended"]
    chosen |= {"ckpt_dir": str(trained("cmunext_busi")[0])}
    with refused(line):
        run("evaluating", config("cmunext_busi", "train", "evaluate"), **chosen)
