from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest

from prepare.__main__ import main
from prepare.demo import MARK, prepare_demo
from prepare.phantoms import ct_phantom
from tests.helpers import contents, read
from transforms import BTCV_IDS, InputError

SMALL = {"cases": 3, "slices": 10, "size": 64, "images": 12}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo") / "data"
    prepare_demo(out, **SMALL)
    return out


def test_equal_seeds_give_equal_files(demo: Path, tmp_path: Path) -> None:
    prepare_demo(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(demo)
    prepare_demo(tmp_path / "other", **SMALL, seed=1)
    other = contents(tmp_path / "other")
    assert all(other[name] != data for name, data in contents(demo).items() if name.endswith((".h5", ".npz", ".jpg")))


def test_every_line_says_that_these_are_no_patients(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--cases", "2", "--slices", "8", "--size", "32", "--images", "8"]
    assert main(["demo", "--out", str(tmp_path / "out"), *options]) == 0
    out, err = capfd.readouterr()
    lines = [line for line in (out + err).replace("\r", "\n").split("\n") if line.strip()]
    assert len(lines) > 10
    assert all(MARK in line for line in lines)
    for facts in tmp_path.rglob("dataset.json"):
        assert MARK in facts.read_text()


def test_every_organ_is_in_every_phantom() -> None:
    sizes = []
    for seed in range(6):
        hounsfield, label = ct_phantom(np.random.default_rng(seed), (16, 64, 64), (10.0, 5.6, 5.6))
        sizes.append([(label == number).sum() for number in BTCV_IDS])
        assert hounsfield.dtype == np.int16
    aorta, gallbladder, left, right, liver, pancreas, spleen, stomach = np.array(sizes).T
    assert min(aorta.min(), gallbladder.min(), pancreas.min()) > 60
    assert (liver > 4 * spleen).all()
    assert (liver > 4 * stomach).all()
    assert (spleen > gallbladder).all()
    assert (np.abs(left - right) < 0.6 * left).all()


def test_the_liver_is_on_the_patients_right(demo: Path) -> None:
    path = next((demo / "synapse" / "test_vol_h5").iterdir())
    with h5py.File(path) as file:
        label, affine = file["label"][:], file.attrs["affine"]
        assert file.attrs["spacing_mm"][0] > file.attrs["spacing_mm"][1]

    def world(number: int) -> np.ndarray:
        return affine[:3, :3] @ np.argwhere(label == number).mean(axis=0) + affine[:3, 3]

    aorta, liver, spleen = world(1), world(5), world(7)
    assert liver[0] > aorta[0] > spleen[0]  # x grows to the right
    assert liver[1] > aorta[1]  # y grows to the front
    assert world(8)[2] > world(3)[2]  # the stomach lies above the left kidney


def test_pictures_have_odd_sizes_and_one_marked_lesion(demo: Path) -> None:
    busi, isic = demo / "busi", demo / "isic17" / "train"
    pairs = [(path, busi / "masks" / "0" / path.name) for path in (busi / "images").iterdir()]
    pairs += [(path, isic / "masks" / f"{path.stem}.png") for path in (isic / "images").iterdir()]
    assert len(pairs) == 12 + 8
    sizes = set()
    for image_path, mask_path in pairs:
        image, mask = (read(path).astype(float) for path in (image_path, mask_path))
        sizes.add(mask.shape)
        assert image.shape == (*mask.shape, 3)
        inside = mask > 0
        assert 0.02 < inside.mean() < 0.4
        assert image[inside].mean() < image[~inside].mean() - 15
    assert len(sizes) > 4


def test_numbers_out_of_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({"cases": 1}, {"cases": 19}, {"slices": 3}, {"size": 8}, {"images": 3}, {"cases": 0, "images": 0}):
        with pytest.raises(InputError, match="expected"):
            prepare_demo(tmp_path / "out", **(SMALL | options))
    assert main(["demo", "--out", str(tmp_path / "out"), "--cases", "1"]) == 1
    assert not (tmp_path / "out").exists()
