"""Runs of the three bundles on small demo data, from a working directory that is not the repository's root."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import monai.bundle
import pytest
import torch
from monai.bundle import ConfigParser
from monai.utils import set_determinism

import bundles
from prepare.demo import prepare_demo

ROOT = Path(__file__).parents[2]
BUNDLES = ("cmunext_busi", "vmunet_isic", "vmunet_synapse")
PICTURES = BUNDLES[:2]
DATA = {"cmunext_busi": "busi", "vmunet_isic": "isic17", "vmunet_synapse": "synapse"}
METRIC = {"cmunext_busi": "iou", "vmunet_isic": "val_loss", "vmunet_synapse": "mean_dice"}
SMALL_VMUNET = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1, 1], "d_state": 4}
TINY: dict[str, dict[str, Any]] = {
    "CMUNeXt": {"_target_": "networks.CMUNeXt", "dims": [4, 4, 8, 8, 8], "kernel_sizes": [3] * 5},
    "VMUNet": {"_target_": "networks.VMUNet", **SMALL_VMUNET},
    "BasicUNet": {"_target_": "BasicUNet", "spatial_dims": 2, "features": [4, 4, 8, 8, 8, 4]},
}
OWN = {
    "cmunext_busi": TINY["CMUNeXt"],
    "vmunet_isic": TINY["VMUNet"],
    "vmunet_synapse": {**TINY["VMUNet"], "out_channels": 9},
}
Run = Callable[..., None]
Options = Callable[..., dict[str, Any]]


def config(bundle: str, *names: str) -> list[str]:
    """The files of a configuration and its overlays; `train` where no name is given."""
    return [str(ROOT / "bundles" / bundle / "configs" / f"{name}.yaml") for name in names or ("train",)]


def parsed(bundle: str, *names: str, **override: Any) -> ConfigParser:
    """The configuration as a parser of its own, which has to be told the bundle's folder."""
    parser = ConfigParser()
    parser.read_config(config(bundle, *names))
    parser["bundle_root"] = str(ROOT / "bundles" / bundle)
    parser.update(override)
    return parser


def words(options: dict[str, Any]) -> list[str]:
    """Overrides as they are typed."""
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def saved(path: Path) -> Any:
    return torch.load(path, weights_only=True)


def command(
    run_id: str, files: Sequence[str], cwd: Path, *arguments: str, launcher: Sequence[str] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    """`python -m monai.bundle run RUN_ID …` in a process of its own."""
    # one thread: the networks are tiny, and two processes share the machine in the distributed test
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    listed = f"[{','.join(map(repr, files))}]" if len(files) > 1 else files[0]
    return subprocess.run(
        [*launcher, "-m", "monai.bundle", "run", run_id, "--config_file", listed, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def succeeds(done: subprocess.CompletedProcess[str]) -> str:
    """What a command printed that must succeed."""
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@contextmanager
def refused(match: str) -> Iterator[None]:
    """What runs here must end with one line for the user, that `match` describes."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  (MONAI's own, around ours)
        yield
    line = bundles.one_line(caught.value)
    assert line is not None, caught.value
    assert "\n" not in line
    assert re.search(match, line), line


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images each, the lists of three splits, and five small CT volumes, one of them to test on."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    prepare_demo(out, cases=5, slices=8, size=48, images=12)
    return out


@pytest.fixture(scope="session")
def options(data: Path) -> Options:
    """Overrides for a short run of a bundle into a folder."""

    def for_run(bundle: str, folder: Path, **more: Any) -> dict[str, Any]:
        places = {"dataset_dir": data / DATA[bundle], "ckpt_dir": folder, "output_dir": folder / "eval"}
        places |= {"log_dir": folder / "runs"}
        rest = {"image_size": 32, "batch_size": 4, "num_workers": 0, "val_interval": 1, "network_def": OWN[bundle]}
        if bundle == "vmunet_synapse":
            rest["val_cases"] = 1
        return {key: str(value) for key, value in places.items()} | rest | more

    return for_run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """What `python -m monai.bundle run` does, in this process."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    yield lambda run_id, files, **override: monai.bundle.run(run_id, config_file=files, **override)
    set_determinism(None)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, options: Options) -> Callable[[str], tuple[Path, str]]:
    """(Folder, log) of a training of two epochs, one for each bundle."""
    done: dict[str, tuple[Path, str]] = {}

    def train(bundle: str) -> tuple[Path, str]:
        if bundle not in done:
            folder = tmp_path_factory.mktemp(bundle)
            chosen = words(options(bundle, folder, max_epochs=2))
            done[bundle] = folder, succeeds(command("training", config(bundle), folder, *chosen))
        return done[bundle]

    return train
