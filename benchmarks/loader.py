"""The Synapse training pipeline on 512² slices: its throughput, and its arithmetic against scipy's."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from monai.bundle import ConfigParser
from monai.data import DataLoader, Dataset
from scipy import ndimage

from benchmarks.harness import Row, interleaved, row
from transforms import rot_flip, rotate, spline_zoom

SLICES, SIZE, TARGET = 128, 512, 224
# the published mix: half the slices turned and flipped, a quarter rotated, a quarter left as they are
KINDS = ("rot_flip", "rot_flip", "rotate", "none")
CONFIG = Path(__file__).parents[1] / "bundles" / "vmunet_synapse" / "configs" / "train.yaml"


def published(image: np.ndarray, label: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The published chain of one slice (H, W); `kind` stands for its random choice."""
    if kind == "rot_flip":
        image, label = (np.flip(np.rot90(x, 1), axis=0).copy() for x in (image, label))
    elif kind == "rotate":
        image, label = (ndimage.rotate(x, 13, order=0, reshape=False) for x in (image, label))
    factors = [TARGET / n for n in image.shape]
    return ndimage.zoom(image, factors, order=3), ndimage.zoom(label, factors, order=0)


def ours(image: torch.Tensor, label: torch.Tensor, kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same chain by this project's functions, on (1, H, W)."""
    if kind == "rot_flip":
        image, label = (rot_flip(x, 1, 0) for x in (image, label))
    elif kind == "rotate":
        image, label = (rotate(x, 13) for x in (image, label))
    return spline_zoom(image, (TARGET, TARGET), 3), spline_zoom(label, (TARGET, TARGET), 0)


def arithmetic() -> Row:
    rng = np.random.default_rng(0)
    image = ndimage.gaussian_filter(rng.random((SIZE, SIZE)), 2).astype(np.float32)
    label = (image > image.mean()).astype(np.uint8) * rng.integers(1, 9, (SIZE, SIZE), dtype=np.uint8)
    tensors = torch.from_numpy(image)[None], torch.from_numpy(label)[None]
    difference = 0.0
    for kind in set(KINDS):
        expected, got = published(image, label, kind), ours(*tensors, kind)
        difference = max(difference, float(np.abs(expected[0] - got[0][0].numpy()).max()))
        if not np.array_equal(expected[1], got[1][0].numpy()):
            raise AssertionError(f"labels differ from scipy's for {kind}")
    seconds = interleaved(
        {
            "ours": lambda: [ours(*tensors, kind) for kind in KINDS],
            "published": lambda: [published(image, label, kind) for kind in KINDS],
        }
    )
    per_slice = {name: value / len(KINDS) for name, value in seconds.items()}
    what = f"augmentation and zoom of a {SIZE}² slice to {TARGET}²: speed-up over scipy"
    return row(what, per_slice["ours"], per_slice["published"], "higher", 4, difference=difference)


def published_item(item: dict[str, str]) -> dict[str, np.ndarray]:
    """The published chain of one item, with its reading and its random choice."""
    with np.load(item["image"], allow_pickle=False) as file:
        image, label = published(file["image"], file["label"], random.choice(KINDS))
    return {"image": image[None], "label": label[None]}


def seconds_per_sample(dataset: Dataset) -> float:
    loader = DataLoader(dataset, batch_size=32, shuffle=True, num_workers=2, persistent_workers=True)
    for _ in loader:
        pass
    start = time.perf_counter()
    for _ in loader:
        pass
    return (time.perf_counter() - start) / len(dataset)


def throughput() -> Row:
    """The bundle's own preprocessing and the published chain, in the same loader."""
    rng = np.random.default_rng(0)
    parser = ConfigParser()
    parser.read_config(CONFIG)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder, f"case0001_slice{index:03d}.npz")) for index in range(SLICES)]
        for file in files:
            label = rng.integers(0, 9, (SIZE, SIZE)).astype(np.float32)
            np.savez(file, image=rng.random((SIZE, SIZE), dtype=np.float32), label=label)
        items = [{"image": file, "label": file} for file in files]
        chains = (parser.get_parsed_content("train#preprocessing"), published_item)
        bundle, published = (seconds_per_sample(Dataset(items, chain)) for chain in chains)
    what = f"Synapse training loader, {SIZE}² slices, 2 workers, time per sample: speed-up over the published chain"
    return row(what, bundle, published, "higher")


def rows() -> Iterator[Row]:
    yield throughput()
    yield arithmetic()
