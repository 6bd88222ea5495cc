import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import load_net_with_metadata

from networks import VMUNet
from prepare.demo import prepare_demo

CONFIGS = "bundles/vmunet_synapse/configs"
TRAIN, INFERENCE = f"{CONFIGS}/train.yaml", f"{CONFIGS}/inference.yaml"
EVALUATE = f"['{TRAIN}','{CONFIGS}/evaluate.yaml']"
SMALL = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1, 1], "d_state": 4}
TINY = [part for key, value in SMALL.items() for part in (f"--network_def#{key}", str(value))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "demo"
    prepare_demo(out, cases=5, slices=8, size=48)
    return out / "synapse"


@pytest.fixture(scope="module")
def options(data: Path) -> Callable[[Path], list[str]]:
    def for_run(folder: Path) -> list[str]:
        places = {"dataset_dir": data, "ckpt_dir": folder, "output_dir": folder / "eval", "log_dir": folder / "runs"}
        rest = {"image_size": 32, "batch_size": 4, "num_workers": 0, "val_interval": 1, "val_cases": 1}
        return TINY + [part for key, value in {**places, **rest}.items() for part in (f"--{key}", str(value))]

    return for_run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, options: Callable, bundle_command: Callable) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("trained")
    log = bundle_command("run training", "--config_file", TRAIN, "--max_epochs", "2", *options(folder))
    return folder, log


def test_training_says_what_it_does_and_saves_best_and_last(trained: tuple[Path, str]) -> None:
    folder, log = trained
    assert "scan backend " in log
    assert " s per step" in log
    assert "24 images to train on, model selected by Dice on held-out training cases" in log
    assert "loss=" in log
    assert list((folder / "runs").glob("events.out.tfevents*"))
    state = torch.load(folder / "last.pt", weights_only=True)
    assert state["trainer"]["iteration"] == 2 * 6
    VMUNet(out_channels=9, **SMALL).load_state_dict(torch.load(folder / "model.pt", weights_only=True))


def test_training_resumes(trained: tuple[Path, str], options: Callable, bundle_command: Callable, tmp_path: Path):
    (tmp_path / "last.pt").write_bytes((trained[0] / "last.pt").read_bytes())
    log = bundle_command(
        "run training", "--config_file", TRAIN, "--max_epochs", "3", "--resume", "true", *options(tmp_path)
    )
    assert "after epoch 2" in log
    before, after = (torch.load(p / "last.pt", weights_only=True) for p in (trained[0], tmp_path))
    assert after["trainer"]["iteration"] == 3 * 6
    assert after["lr_scheduler"]["last_epoch"] == 3
    assert after["selection"]["best"] >= before["selection"]["best"]
    steps = {int(state["step"]) for state in after["optimizer"]["state"].values()}
    assert steps == {18}


def test_evaluating_reports_both_protocols(
    trained: tuple[Path, str], options: Callable, bundle_command: Callable, data: Path
) -> None:
    folder, _ = trained
    log = bundle_command("run evaluating", "--config_file", EVALUATE, *options(folder))
    assert "gallbladder" in log
    with (folder / "eval/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    cases = (data / "lists/lists_Synapse/test_vol.txt").read_text().split()
    assert {row["case"] for row in rows} == set(cases)
    assert {row["protocol"] for row in rows} == {"paper", "strict"}
    summary = json.dumps(json.loads((folder / "eval/summary.json").read_text()))
    assert "held-out training cases" in summary
    assert "NaN" not in summary


def test_inferring_keeps_the_geometry_whatever_the_orientation(
    trained: tuple[Path, str], bundle_command: Callable, data: Path, tmp_path: Path
) -> None:
    source = nib.load(sorted((data / "raw/img").iterdir())[0])
    folder = tmp_path / "in"
    folder.mkdir()
    for codes in ("LPS", "RAS", "SAR"):
        to_codes = nib.orientations.ornt_transform(
            nib.io_orientation(source.affine), nib.orientations.axcodes2ornt(codes)
        )
        nib.save(source.as_reoriented(to_codes), folder / f"{codes}.nii.gz")
    prepared = sorted((data / "test_vol_h5").iterdir())[0]
    (folder / "prepared.npy.h5").write_bytes(prepared.read_bytes())

    out = tmp_path / "out"
    inference = ["--config_file", INFERENCE, "--ckpt_dir", str(trained[0]), "--image_size", "32", *TINY]
    bundle_command("run inferring", *inference, "--input", str(folder), "--output_dir", str(out))

    canonical = []
    for file in sorted(folder.glob("*.nii.gz")):
        image, mask = nib.load(file), nib.load(out / file.name.replace(".nii.gz", "_pred.nii.gz"))
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
        assert mask.get_data_dtype() == np.uint8
        canonical.append(np.asarray(nib.as_closest_canonical(mask).dataobj))
    assert all(np.array_equal(canonical[0], other) for other in canonical[1:])
    with h5py.File(prepared) as file:
        affine = file.attrs["affine"]
    from_h5 = nib.load(next(out.glob("prepared*")))
    np.testing.assert_allclose(from_h5.affine, affine, atol=1e-4)
    assert np.array_equal(np.asarray(nib.as_closest_canonical(from_h5).dataobj), canonical[0])
    assert canonical[0].any()


def test_torchscript_export_answers_as_the_network(trained: tuple[Path, str], bundle_command: Callable, tmp_path: Path):
    files = {"filepath": tmp_path / "model.ts", "ckpt_file": trained[0] / "model.pt", "config_file": INFERENCE}
    files["meta_file"] = f"{CONFIGS}/metadata.json"
    bundle_command(
        "ckpt_export", "--net_id", "network_def", *(s for k, v in files.items() for s in (f"--{k}", str(v))), *TINY
    )
    exported, metadata, _ = load_net_with_metadata(tmp_path / "model.ts")
    assert metadata["name"].startswith("VM-UNet")
    eager = VMUNet(out_channels=9, **SMALL).eval()
    eager.load_state_dict(torch.load(trained[0] / "model.pt", weights_only=True))
    image = torch.rand(2, 1, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(exported(image), eager(image), atol=1e-4, rtol=1e-4)


def test_two_processes_train_one_network(options: Callable, bundle_command: Callable, tmp_path: Path) -> None:
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    log = bundle_command(
        "run training",
        "--config_file",
        f"['{TRAIN}','{CONFIGS}/multi_gpu.yaml']",
        *("--max_epochs", "1", *options(tmp_path)),
        launcher=torchrun,
    )
    assert log.count("images to train on") == 1
    # 24 slices, two processes, batches of 4
    assert torch.load(tmp_path / "last.pt", weights_only=True)["trainer"]["iteration"] == 3
    assert (tmp_path / "model.pt").is_file()


def test_published_selection_is_labelled(options: Callable, bundle_command: Callable, tmp_path: Path) -> None:
    options_ = ["--max_epochs", "1", "--selection", "paper", "--amp_dtype", "bfloat16", *options(tmp_path)]
    log = bundle_command("run training", "--config_file", TRAIN, *options_)
    assert "32 images to train on, model selected by lowest training loss, as published" in log
    assert "best train_loss so far" in log
    assert (tmp_path / "model.pt").is_file()


def test_missing_data_is_one_line_with_the_remedy(failing_command: Callable, tmp_path: Path) -> None:
    printed = failing_command("run training", "--config_file", TRAIN, "--dataset_dir", str(tmp_path))
    assert printed.strip().splitlines()[-1].startswith(f"{tmp_path} holds no prepared Synapse data")
    assert "python -m prepare synapse --raw DIR" in printed
    assert "python -m prepare demo" in printed


def test_missing_checkpoint_is_one_line_with_the_remedy(failing_command: Callable, data: Path, tmp_path: Path) -> None:
    printed = failing_command(
        "run inferring", "--config_file", INFERENCE, "--ckpt_dir", str(tmp_path), "--dataset_dir", str(data), *TINY
    )
    assert f"no weight file {tmp_path / 'model.pt'}: train first" in printed


@pytest.mark.parametrize("overlays", [[], ["evaluate"], ["multi_gpu"]])
def test_every_training_config_names_only_what_exists(overlays: list[str], data: Path) -> None:
    parser = ConfigParser()
    parser.read_config([TRAIN, *(f"{CONFIGS}/{name}.yaml" for name in overlays)])
    parser["dataset_dir"] = str(data)
    parser["val_cases"] = 1
    for key in ("train#dataloader", "validate#evaluator", "checkpoints"):
        if "multi_gpu" not in overlays:
            assert parser.get_parsed_content(key) is not None
    missing = {
        reference
        for item in parser.ref_resolver.items.values()
        if isinstance(item.get_config(), str)
        for reference in parser.ref_resolver.match_refs_pattern(item.get_config())
        if reference not in parser.ref_resolver.items
    }
    assert not missing


def test_published_recipe() -> None:
    parser = ConfigParser()
    parser.read_config(TRAIN)
    published = {"image_size": 224, "max_epochs": 300, "batch_size": 32, "learning_rate": 1e-3, "seed": 42}
    assert {key: parser[key] for key in published} == published
    optimizer = parser.get_parsed_content("optimizer")
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["weight_decay"] == 1e-2
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    scheduler = parser.get_parsed_content("lr_scheduler")
    assert (scheduler.T_max, scheduler.eta_min) == (100, 1e-5)
