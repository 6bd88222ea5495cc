from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prepare.__main__ import main
from prepare.folds import prepare_folds, stratified_folds
from transforms import InputError, image_split


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Nine benign, six malignant images with lesions of 1 … 9 rows; the first benign one comes twice."""
    folder = tmp_path / "pairs"
    for kind, count in (("benign", 9), ("malignant", 6)):
        for number in range(1, count + 1):
            noise = np.random.default_rng([len(kind), number]).integers(0, 256, (16, 16), dtype=np.uint8)
            mask = np.zeros((16, 16), np.uint8)
            mask[2 : 2 + number, 2:12] = 255
            save(noise, folder / "images" / f"{kind} ({number}).png")
            save(mask, folder / "masks" / f"{kind} ({number})_mask.png")
    for sub, suffix in (("images", ""), ("masks", "_mask")):
        Image.open(folder / sub / f"benign (1){suffix}.png").save(folder / sub / f"benign (10){suffix}.png")
    return folder


def lists(folder: Path, part: str) -> list[list[str]]:
    return [file.read_text().splitlines() for file in sorted(folder.glob(f"*_{part}?.txt"))]


def test_every_image_is_held_out_once_and_a_bundle_reads_the_folds(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_folds(pairs, out)
    held_out, training = lists(out, "val"), lists(out, "train")
    everything = sorted(file.stem for file in (pairs / "images").iterdir())
    assert sorted(chain(*held_out)) == everything
    assert all(sorted(one + other) == everything for one, other in zip(held_out, training, strict=True))
    for number, names in enumerate(held_out, 1):
        split = image_split(out, fold=number)
        assert sorted(Path(item["image"]).stem for item in split.test) == sorted(names)
        assert sum(name.startswith("malignant") for name in names) == 2
    assert sum({"benign (1)", "benign (10)"} <= set(names) for names in held_out) == 1
    facts = json.loads((out / "dataset.json").read_text())
    assert facts["together"] == [["benign (1)", "benign (10)"]]
    same = [(file, out / file.relative_to(pairs)) for file in pairs.rglob("*.png")]
    assert all(one.read_bytes() == other.read_bytes() for one, other in same)


def test_folds_follow_from_the_seed(pairs: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 41), ("b", 41), ("c", 42)):
        prepare_folds(pairs, tmp_path / name, seed=seed)
    assert lists(tmp_path / "a", "val") == lists(tmp_path / "b", "val") != lists(tmp_path / "c", "val")


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), folds=st.integers(2, 5), count=st.integers(10, 60), doubles=st.integers(0, 4))
def test_folds_are_alike_in_number_kind_and_size(seed: int, folds: int, count: int, doubles: int) -> None:
    rng = np.random.default_rng(seed)
    sizes = {f"{rng.choice(['benign', 'malignant'])} ({n})": float(rng.random()) for n in range(count)}
    kinds = {name: name.split()[0] for name in sizes}
    names = list(sizes)
    groups = [names[2 * n : 2 * n + 2] for n in range(doubles)] + [[name] for name in names[2 * doubles :]]
    parts = stratified_folds(groups, kinds, sizes, folds, seed)
    assert sorted(chain(*parts)) == sorted(names)
    assert all(any(set(group) <= set(part) for part in parts) for group in groups)
    if not doubles:
        assert max(map(len, parts)) - min(map(len, parts)) <= 2
        for kind in set(kinds.values()):
            found = [Counter(kinds[name] for name in part)[kind] for part in parts]
            assert max(found) - min(found) <= 1
            ordered = sorted((name for name in names if kinds[name] == kind), key=lambda name: sizes[name])
            smaller = [len(set(part) & set(ordered[: len(ordered) // 2])) for part in parts]
            assert max(smaller) - min(smaller) <= 2


def test_names_without_kinds_are_divided_by_size_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for number, name in enumerate("abcdefgh"):
        mask = np.zeros((16, 16), np.uint8)
        mask[: number + 1, 2:9] = 255
        save(np.random.default_rng(number).integers(0, 256, (16, 16), np.uint8), tmp_path / f"raw/images/{name}.png")
        save(mask, tmp_path / f"raw/masks/{name}.png")
    prepare_folds(tmp_path / "raw", tmp_path / "out", folds=2)
    assert "kinds are not told apart" in capsys.readouterr().out
    assert [sum(name in "abcd" for name in names) for names in lists(tmp_path / "out", "val")] == [2, 2]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--folds", "1"], "--folds 1: at least two folds are needed"),
        (["--folds", "9"], "16 images are too few for 9 folds"),
        (["--label-map", "0:0", "128:1"], "255"),
    ],
)
def test_what_cannot_be_divided_is_refused(
    options: list[str], line: str, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["folds", "--raw", str(pairs), "--out", str(out), *options]) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_images_that_are_all_alike_are_refused(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (16, 16), np.uint8)
    for number in range(4):
        save(picture, tmp_path / f"raw/images/{number}.png")
        save((picture > 128).astype(np.uint8) * 255, tmp_path / f"raw/masks/{number}.png")
    with pytest.raises(InputError, match="nearly all images are alike: nothing is left for fold 2|for fold 1"):
        prepare_folds(tmp_path / "raw", tmp_path / "out", folds=2)
