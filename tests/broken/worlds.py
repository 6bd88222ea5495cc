"""Good files, tiny, for every entrance, and the command line that reads them. A broken input is one change to these."""

from __future__ import annotations

import csv
import json
import os
import runpy
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import safetensors.torch
import torch
from monai.bundle import ConfigParser
from PIL import Image

from prepare.phantoms import ct_phantom
from transforms import BTCV_IDS, WINDOW_HU
from transforms.intensity import WindowHU

ROOT = Path(__file__).parents[2]
SPACING_MM = (18.0, 11.0, 11.0)
SHAPE = (8, 32, 32)
SPL_MM = np.array([[0.0, 0, -11, 100], [0, -11, 0, 50], [18, 0, 0, -30], [0, 0, 0, 1]])
SMALL_VMUNET = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1, 1], "d_state": 4}
NETWORKS: dict[str, dict[str, Any]] = {
    "cmunext_busi": {"_target_": "networks.CMUNeXt", "dims": [4, 4, 8, 8, 8], "kernel_sizes": [3] * 5},
    "vmunet_isic": {"_target_": "networks.VMUNet", **SMALL_VMUNET},
    "vmunet_synapse": {"_target_": "networks.VMUNet", **SMALL_VMUNET, "out_channels": 9},
}
BUNDLES = tuple(NETWORKS)
# A name as the download has it, with what shells and patterns stumble over.
BENIGN = "benign (1)"


@dataclass(frozen=True)
class World:
    """One entrance with good files.

    Args:
        name: of the entrance and what is special about the files, such as "inferring vmunet_synapse: h5".
        build: writes the files into a folder.
        module: what `python -m` runs.
        words: the command line, relative to that folder.
    """

    name: str
    build: Callable[[Path], None]
    module: str
    words: tuple[str, ...]

    @cached_property
    def entrance(self) -> str:
        return self.name.partition(":")[0]


def draw(number: int, size: tuple[int, int] = (40, 36)) -> tuple[np.ndarray, np.ndarray]:
    """A picture (H, W, 3) uint8 with a bright ellipse, and its mask (H, W) bool."""
    rng = np.random.default_rng(number)
    y, x = np.ogrid[-1 : 1 : size[0] * 1j, -1 : 1 : size[1] * 1j]
    mask = ((x - rng.uniform(-0.3, 0.3)) / 0.5) ** 2 + ((y - rng.uniform(-0.3, 0.3)) / 0.4) ** 2 < 1
    picture = rng.integers(0, 60, (*size, 3)) + np.array([30, 50, 40])
    picture[mask] += np.array([120, 60, 90])
    return picture.astype(np.uint8), mask


def save_picture(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    Image.fromarray(array).save(path, quality=95)


def save_pair(image: Path, mask: Path, number: int) -> None:
    picture, marked = draw(number)
    save_picture(image, picture)
    save_picture(mask, marked)


def write_lines(path: Path, lines: Sequence[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))


def phantom(case: int) -> tuple[np.ndarray, np.ndarray]:
    """(Hounsfield units int16, BTCV ids uint8), both (D, H, W) in axis codes SPL."""
    return ct_phantom(np.random.default_rng(case), SHAPE, SPACING_MM)


def class_indices(ids: np.ndarray) -> np.ndarray:
    table = np.zeros(14, np.uint8)
    table[list(BTCV_IDS)] = np.arange(1, 9)
    return table[ids]


def save_nifti(path: Path, array: np.ndarray) -> None:
    """(D, H, W) in SPL as a file with axis codes LAS, the matrix in the sform alone, as nibabel writes it."""
    depth, height, width = SPACING_MM
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-width, height, depth, 1.0])
    nib.save(nib.Nifti1Image(np.ascontiguousarray(array.transpose(2, 1, 0)[:, ::-1]), affine), path)


def save_h5(path: Path, case: int) -> None:
    """A volume as `prepare synapse` writes it."""
    hounsfield, ids = phantom(case)
    path.parent.mkdir(parents=True, exist_ok=True)
    packing = {"chunks": (1, *SHAPE[1:]), "compression": "gzip", "compression_opts": 1, "shuffle": True}
    with h5py.File(path, "w") as file:
        file.create_dataset("image", data=WindowHU()(hounsfield), **packing)
        file.create_dataset("label", data=class_indices(ids), **packing)
        file.attrs["spacing_mm"] = np.array(SPACING_MM)
        file.attrs["affine"] = SPL_MM
        file.attrs["window_hu"] = WINDOW_HU


def save_weights(path: Path, bundle: str, sample: Path) -> None:
    """A seeded network that finds as much background as foreground, or all organs, in the file `sample`."""
    torch.manual_seed(0)
    network = ConfigParser(NETWORKS[bundle]).get_parsed_content("").eval()
    parser = ConfigParser()
    parser.read_config(str(ROOT / "bundles" / bundle / "configs/inference.yaml"))
    parser.update({"bundle_root": str(ROOT / "bundles" / bundle), "image_size": 32})
    image = parser.get_parsed_content("preprocessing")({"image": str(sample)})["image"].as_tensor()
    slices = image.transpose(0, 1) if image.ndim == 4 else image[None]
    state = network.state_dict()
    *_, bias = state
    with torch.no_grad():
        logits = network(slices.float())
        state[bias] -= logits.transpose(0, 1).flatten(1).median(dim=1).values
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)


# Raw downloads


def raw_busi(folder: Path) -> None:
    names = [BENIGN, "benign (2)", "malignant (1)", "malignant (2)"]
    for number, name in enumerate(names):
        place = folder / "raw" / name.split()[0] / name
        save_pair(Path(f"{place}.png"), Path(f"{place}_mask.png"), number)
    for part, listed in (("train", names[::2]), ("val", names[1::2])):
        write_lines(folder / f"lists/busi_{part}1.txt", listed)


def raw_isic(folder: Path) -> None:
    for number in range(3):
        part = "Training" if number < 2 else "Validation"
        place = folder / "raw" / f"ISIC-2017_{part}"
        name = f"ISIC_000000{number}"
        save_pair(Path(f"{place}_Data/{name}.jpg"), Path(f"{place}_Part1_GroundTruth/{name}_segmentation.png"), number)


def raw_synapse(suffix: str) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for case in (1, 5):
            for kind, array in zip(("img", "label"), phantom(case), strict=True):
                save_nifti(folder / f"raw/{kind}/{kind}{case:04d}{suffix}", array)

    return build


# Prepared data


def busi(folder: Path) -> None:
    names = [BENIGN, *(f"benign ({number})" for number in range(2, 8))]
    for number, name in enumerate(names):
        save_pair(folder / f"data/images/{name}.png", folder / f"data/masks/0/{name}.png", number)
    write_lines(folder / "data/busi_train1.txt", names[:4])
    write_lines(folder / "data/busi_val1.txt", names[4:])
    save_weights(folder / "weights/model.pt", "cmunext_busi", folder / f"data/images/{names[4]}.png")


def isic(folder: Path) -> None:
    for part, numbers in (("train", range(4)), ("val", range(4, 7))):
        for number in numbers:
            place, name = folder / "data" / part, f"ISIC_000000{number}"
            save_pair(place / f"images/{name}.jpg", place / f"masks/{name}.png", number)
    save_weights(folder / "weights/model.pt", "vmunet_isic", folder / "data/val/images/ISIC_0000004.jpg")


def synapse(folder: Path) -> None:
    slices = []
    for case in (5, 6):
        hounsfield, ids = phantom(case)
        for index, (image, label) in enumerate(zip(WindowHU()(hounsfield)[2:5], class_indices(ids)[2:5], strict=True)):
            slices.append(f"case{case:04d}_slice{index:03d}")
            (folder / "data/train_npz").mkdir(parents=True, exist_ok=True)
            np.savez(folder / f"data/train_npz/{slices[-1]}.npz", image=image, label=label)
    save_h5(folder / "data/test_vol_h5/case0001.npy.h5", 1)
    write_lines(folder / "data/lists/lists_Synapse/train.txt", slices)
    write_lines(folder / "data/lists/lists_Synapse/test_vol.txt", ["case0001"])
    save_weights(folder / "weights/model.pt", "vmunet_synapse", folder / "data/test_vol_h5/case0001.npy.h5")


PREPARED = dict(zip(BUNDLES, (busi, isic, synapse), strict=True))


def resumable(bundle: str) -> Callable[[Path], None]:
    """Data, and the `last.pt` of a run of one epoch."""

    def build(folder: Path) -> None:
        PREPARED[bundle](folder)
        os.chdir(folder)
        sys.argv = [MONAI, *training(bundle)]
        # in a child, whose output nobody reads
        silence = os.open(os.devnull, os.O_WRONLY)
        for number in (1, 2):
            os.dup2(silence, number)
        runpy.run_module(MONAI, run_name="__main__", alter_sys=True)
        for path in folder.glob("out/*"):
            if path.name not in ("last.pt", "run.json"):
                path.unlink()
        shutil.rmtree(folder / "runs")

    return build


def with_bundle(bundle: str, build: Callable[[Path], None]) -> Callable[[Path], None]:
    """`build`, and the bundle's configuration in the folder, as people copy it to change it."""

    def both(folder: Path) -> None:
        build(folder)
        shutil.copytree(ROOT / "bundles" / bundle / "configs", folder / "bundle/configs")

    return both


# What people predict, and what they score


def pictures(suffix: str, bundle: str, count: int = 1) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for number in range(count):
            save_picture(folder / f"in/lesion{number}{suffix}", draw(number)[0])
        for form in ("pt", "safetensors"):
            save_weights(folder / f"weights/model.{form}", bundle, folder / f"in/lesion0{suffix}")

    return build


def volumes(suffix: str, count: int = 1) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for case in range(1, count + 1):
            if suffix == ".h5":
                save_h5(folder / f"in/case{case:04d}.npy.h5", case)
            else:
                save_nifti(folder / f"in/img{case:04d}{suffix}", phantom(case)[0])
        save_weights(folder / "weights/model.pt", "vmunet_synapse", next((folder / "in").iterdir()))

    return build


def scored_volumes(count: int, labels: str = ".nii.gz") -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for case in range(1, count + 1):
            label = class_indices(phantom(case)[1])
            save_nifti(folder / f"pred/img{case:04d}_pred.nii.gz", np.roll(label, 1, axis=2))
            save_nifti(folder / f"true/label{case:04d}{labels}", label)

    return build


def scored_pictures(count: int) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        for number in range(count):
            mask = draw(number)[1]
            save_picture(folder / f"pred/a{number}_mask.png", np.roll(mask, 2, axis=1))
            save_picture(folder / f"true/a{number}_segmentation.png", mask)

    return build


# Command lines


def run(run_id: str, bundle: str, *overlays: str, configs: str = "", **options: Any) -> tuple[str, ...]:
    """`run RUN_ID --config_file …` with what makes it small, and overrides."""
    places = [f"{configs or ROOT / 'bundles' / bundle / 'configs'}/{name}.yaml" for name in overlays or ("train",)]
    files = places[0] if len(places) == 1 else repr(places)
    small = {"image_size": 32, "network_def": NETWORKS[bundle]}
    named = [word for key, value in {**small, **options}.items() for word in (f"--{key}", str(value))]
    return ("run", run_id, "--config_file", files, *named)


def training(bundle: str, **options: Any) -> tuple[str, ...]:
    small = {"dataset_dir": "data", "ckpt_dir": "out", "output_dir": "out/eval", "log_dir": "runs"}
    if bundle == "vmunet_synapse":
        small["val_cases"] = "['case0006']"
    counts = {"batch_size": 2, "num_workers": 0, "val_interval": 1, "max_epochs": 1}
    return run("training", bundle, **{**small, **counts, **options})


def evaluating(bundle: str, **options: Any) -> tuple[str, ...]:
    places = {"dataset_dir": "data", "output_dir": "out", "ckpt_path": "weights/model.pt", "num_workers": 0}
    if bundle == "vmunet_synapse":
        places["val_cases"] = "['case0006']"
    return run("evaluating", bundle, "train", "evaluate", **{**places, **options})


def inferring(bundle: str, source: str, **options: Any) -> tuple[str, ...]:
    places = {"input": source, "output_dir": "out", "ckpt_path": "weights/model.pt"}
    return run("inferring", bundle, "inference", **{**places, **options})


MONAI, PREPARE, SCORE = "monai.bundle", "prepare", "evaluation"
FROM_RAW = ("--raw", "raw", "--out", "out")
CASES = ("--train-cases", "5", "--test-cases", "1")


def _worlds() -> Iterator[World]:
    yield World("prepare busi", raw_busi, PREPARE, ("busi", *FROM_RAW, "--splits", "1", "--workers", "1"))
    lists = ("--split-files", "lists", "--workers", "1")
    yield World("prepare busi: lists", raw_busi, PREPARE, ("busi", *FROM_RAW, *lists))
    isic_words = ("isic", *FROM_RAW, "--year", "2017", "--workers", "1")
    yield World("prepare isic", raw_isic, PREPARE, isic_words)
    yield World("prepare isic: resized", raw_isic, PREPARE, (*isic_words, "--size", "24", "20"))
    for suffix in (".nii.gz", ".nii"):
        name = "prepare synapse" + ": nii" * (suffix == ".nii")
        yield World(name, raw_synapse(suffix), PREPARE, ("synapse", *FROM_RAW, *CASES))
    for bundle, build in PREPARED.items():
        kind = bundle.partition("_")[2]
        yield World(f"prepare check: {kind}", build, PREPARE, ("check", "data", "--full"))
    yield World("prepare check: quick", busi, PREPARE, ("check", "data"))
    for bundle, build in PREPARED.items():
        yield World(f"training {bundle}", build, MONAI, training(bundle))
        yield World(f"evaluating {bundle}", build, MONAI, evaluating(bundle))
    for suffix in (".pt", ".safetensors"):
        start = training("cmunext_busi", pretrained=f"weights/model{suffix}")

        def both(folder: Path) -> None:
            busi(folder)
            sample = folder / "data/images/benign (5).png"
            save_weights(folder / "weights/model.safetensors", "cmunext_busi", sample)

        yield World(f"training cmunext_busi: from {suffix}", both, MONAI, start)
    again = training("cmunext_busi", resume="true", max_epochs=2)
    yield World("training cmunext_busi: resumed", resumable("cmunext_busi"), MONAI, again)
    copied = training("cmunext_busi")
    copied = (*copied[:3], "bundle/configs/train.yaml", *copied[4:])
    yield World("training cmunext_busi: copied", with_bundle("cmunext_busi", busi), MONAI, copied)
    for bundle, suffix in (("cmunext_busi", ".png"), ("vmunet_isic", ".jpg"), ("cmunext_busi", ".tif")):
        name, file = f"inferring {bundle}", f"in/lesion0{suffix}"
        special = ": tif" * (suffix == ".tif")
        yield World(f"{name}{special}", pictures(suffix, bundle), MONAI, inferring(bundle, file))
        if not special:
            yield World(f"{name}: folder", pictures(suffix, bundle, 3), MONAI, inferring(bundle, "in"))
    tensors = inferring("cmunext_busi", "in", ckpt_path="weights/model.safetensors")
    yield World("inferring cmunext_busi: safetensors", pictures(".png", "cmunext_busi"), MONAI, tensors)
    for suffix, file in ((".nii.gz", "img0001.nii.gz"), (".nii", "img0001.nii"), (".h5", "case0001.npy.h5")):
        name = "inferring vmunet_synapse" + f": {suffix[1:]}" * (suffix != ".nii.gz")
        yield World(name, volumes(suffix), MONAI, inferring("vmunet_synapse", f"in/{file}"))
    several = inferring("vmunet_synapse", "in")
    yield World("inferring vmunet_synapse: folder", volumes(".nii.gz", 3), MONAI, several)
    classes = ("--classes", *"abcdefgh", "--output", "out")
    yield World("evaluation", scored_volumes(1), SCORE, ("pred", "true", *classes))
    yield World("evaluation: folder", scored_volumes(3), SCORE, ("pred", "true", *classes))
    yield World("evaluation: pictures", scored_pictures(1), SCORE, ("pred", "true", "--output", "out"))
    yield World("evaluation: folder of pictures", scored_pictures(3), SCORE, ("pred", "true", "--output", "out"))


WORLDS = {world.name: world for world in _worlds()}


# What a command wrote


def written(folder: Path) -> dict[str, Any]:
    """{file and part of it: value} of what a command has written under `folder`, in a form that can be compared."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            for part, value in _parts(path):
                found[f"{path.relative_to(folder)} {part}".strip()] = value
    return found


# Pictures, and what names times or folders.
WITHOUT_RESULT = (
    "overview.png",
    "curves.png",
    "training.log",
    "dataset.json",
    "run.json",
    "report.html",
    "volumes.csv",
)


def _parts(path: Path) -> Iterator[tuple[str, Any]]:
    name = path.name.lower()
    if "tfevents" in name or name in WITHOUT_RESULT:
        yield "", None
    elif name == "last.pt":
        # what the held-out images say of the model
        yield "best", np.array(torch.load(path, weights_only=True)["selection"]["best"] or np.nan)
    elif name.endswith(".pt") and name != "model.pt":
        yield "", None
    elif name.endswith((".png", ".jpg")):
        yield "", np.asarray(Image.open(path))
    elif name.endswith((".nii", ".nii.gz")):
        image = nib.load(path)
        array = np.asarray(image.dataobj)
        # one volume may be stored as the first of one
        yield "array", array[..., 0] if array.ndim == 4 and array.shape[-1] == 1 else array
        yield "affine", image.affine
    elif name.endswith(".npz"):
        with np.load(path) as file:
            yield from ((key, file[key]) for key in file.files)
    elif name.endswith(".h5"):
        with h5py.File(path) as file:
            yield from ((key, file[key][()]) for key in file)
            yield from ((key, value) for key, value in file.attrs.items() if key not in ("source", "organs"))
    elif name.endswith(".pt"):
        yield from ((key, value.numpy()) for key, value in torch.load(path, weights_only=True).items())
    elif name == "history.csv":
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                measured = {key: value for key, value in row.items() if key not in ("seconds", "memory_gb")}
                yield f"epoch {row['epoch']}", np.array([_number(value) for value in measured.values()])
    elif name == "metrics.csv":
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                key = " ".join(str(row.get(part)) for part in ("case", "protocol", "class"))
                yield key, np.array([_number(row[name]) for name in sorted(row) if name != "case"])
    elif name == "summary.json":
        summary = json.loads(path.read_text())
        yield "", json.dumps([summary["protocols"], summary["cases"]])
    else:
        yield "", path.read_text()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return np.nan
