from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prepare.__main__ import main
from prepare.isic import FOLDERS, Pair, prepare_isic, split_parts
from tests.helpers import read
from transforms import InputError


def write_part(raw: Path, year: int, part: str, count: int, start: int = 0, shape: tuple[int, int] = (40, 60)) -> None:
    images, masks = (raw / name for name in FOLDERS[year][part])
    images.mkdir(parents=True)
    masks.mkdir()
    for number in range(start, start + count):
        rng = np.random.default_rng(number)
        name = f"ISIC_{number:07d}"
        Image.fromarray(rng.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(images / f"{name}.jpg")
        mask = np.zeros(shape, np.uint8)
        mask[10:30, 20:50] = 255
        mask[10, 20:50] = 100
        mask[29, 20:50] = 200
        Image.fromarray(mask).save(masks / f"{name}_segmentation.png")
    Image.fromarray(np.zeros(shape, np.uint8)).save(images / f"ISIC_{start:07d}_superpixels.png")
    (images / "ISIC_metadata.csv").write_text("not a picture")


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_part(tmp_path / "raw", 2017, "train", 7)
    write_part(tmp_path / "raw", 2017, "val", 3, start=100)
    return tmp_path / "raw"


def ids(path: Path) -> list[str]:
    return path.read_text().split()


def test_official_split_keeps_the_downloaded_pixels(raw: Path, tmp_path: Path) -> None:
    write_part(raw, 2017, "test", 2, start=200)
    out = tmp_path / "out"
    prepare_isic(raw, out, year=2017)
    for part, expected in (("train", range(7)), ("val", range(100, 103)), ("test", range(200, 202))):
        names = [f"ISIC_{number:07d}" for number in expected]
        assert ids(out / f"{part}.txt") == names
        for kind in ("images", "masks"):
            assert sorted(path.stem for path in (out / part / kind).iterdir()) == names
    source = raw / FOLDERS[2017]["train"][0] / "ISIC_0000003.jpg"
    assert (out / "train" / "images" / "ISIC_0000003.jpg").read_bytes() == source.read_bytes()
    mask = read(out / "train" / "masks" / "ISIC_0000003.png")
    assert set(np.unique(mask)) == {0, 255}
    assert (mask == 255).sum() == 19 * 30


def test_resized_as_the_published_loaders_do(raw: Path, tmp_path: Path) -> None:
    prepare_isic(raw, tmp_path / "out", year=2017, size=(20, 15))
    image = read(tmp_path / "out" / "train" / "images" / "ISIC_0000003.png")
    source = read(raw / FOLDERS[2017]["train"][0] / "ISIC_0000003.jpg").astype(float)
    # Factors 2 and 4: every output pixel is the mean of the 2 × 2 pixels around its centre.
    rows, columns = 2 * np.arange(20), 4 * np.arange(15) + 1
    expected = sum(source[rows + i][:, columns + j] for i in (0, 1) for j in (0, 1)) / 4
    assert image.shape == (20, 15, 3)
    np.testing.assert_allclose(image, expected, atol=0.51)
    mask = read(tmp_path / "out" / "train" / "masks" / "ISIC_0000003.png")
    assert set(np.unique(mask)) == {0, 255}
    assert mask.shape == (20, 15)


def test_2018_and_a_new_split(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_part(raw, 2018, "train", 8)
    write_part(raw, 2018, "val", 2, start=50)
    prepare_isic(raw, out, year=2018, split="7:3", seed=1)
    train, val = ids(out / "train.txt"), ids(out / "val.txt")
    assert (len(train), len(val)) == (7, 3)
    assert len(set(train) | set(val)) == 10
    prepare_isic(raw, tmp_path / "again", year=2018, split="7:3", seed=1, workers=1)
    prepare_isic(raw, tmp_path / "other", year=2018, split="7:3", seed=2)
    assert ids(tmp_path / "again" / "train.txt") == train
    assert ids(tmp_path / "other" / "train.txt") != train
    assert json.loads((out / "dataset.json").read_text())["split"] == {"7:3": {"seed": 1}}


@pytest.mark.parametrize(("train", "val", "counts"), [(2000, 150, (1500, 650)), (2594, 100, (1886, 808))])
def test_published_counts(tmp_path: Path, train: int, val: int, counts: tuple[int, int]) -> None:
    pair: Pair = (tmp_path, (tmp_path,))
    parts = {"train": {f"a{n}": pair for n in range(train)}, "val": {f"b{n}": pair for n in range(val)}}
    drawn = split_parts(parts, "7:3", 42)
    assert (len(drawn["train"]), len(drawn["val"])) == counts


def test_bad_input_is_named(raw: Path, tmp_path: Path) -> None:
    images, masks = (raw / name for name in FOLDERS[2017]["val"])

    def expect(what: str, **options: Any) -> None:
        with pytest.raises(InputError, match=what):
            prepare_isic(raw, tmp_path / "out", **({"year": 2017} | options))
        assert not (tmp_path / "out").exists()

    expect("no pictures in ISIC2018", year=2018)
    expect("--size 0 5", size=(0, 5))
    Image.fromarray(np.zeros((40, 59), np.uint8)).save(masks / "ISIC_0000100_segmentation.png")
    expect("ISIC_0000100_segmentation.*59×40 pixels, the image .* 60×40")
    expect("ISIC_0000100_segmentation.*59×40 pixels, the image .* 60×40", size=(8, 8))
    (masks / "ISIC_0000100_segmentation.png").unlink()
    expect(r"val: no mask of the same name for .*ISIC_0000100\.jpg$")
    (images / "ISIC_0000100.jpg").unlink()
    (images / "ISIC_0000101.jpg").unlink()
    expect(r"val: no image of the same name for .*ISIC_0000101_segmentation\.png$")
    for path in masks.iterdir():
        path.unlink()
    masks.rmdir()
    expect("GroundTruth: missing")
    images.rename(raw / "elsewhere")
    expect("official split lacks val.*7:3")


def test_command_line(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["isic", "--raw", str(raw), "--out", str(tmp_path / "out"), "--size", "16", "16"]
    assert main([*arguments, "--year", "2018"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main([*arguments, "--year", "2017", "--workers", "2"]) == 0
    assert "train  7" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "--year", "2016"])


def test_an_archive_one_level_too_deep_is_found(raw: Path, tmp_path: Path) -> None:
    for number, name in enumerate(FOLDERS[2017]["train"]):
        deeper = raw / (name if number else "download")
        (raw / name).rename(raw / "moved")
        deeper.mkdir()
        (raw / "moved").rename(deeper / name)
    prepare_isic(raw, tmp_path / "out", year=2017)
    assert len(ids(tmp_path / "out" / "train.txt")) == 7
    folder = raw / FOLDERS[2017]["val"][0]
    (folder / "images").mkdir()
    for path in folder.glob("ISIC*.*"):
        path.rename(folder / "images" / path.name)
    with pytest.raises(InputError, match="val: no image of the same name for"):
        prepare_isic(raw, tmp_path / "other", year=2017)
    with pytest.raises(InputError, match="Validation_Data: no pictures with masks in it; unpack"):
        prepare_isic(raw, tmp_path / "other", year=2017, allow_unpaired=True)


def test_a_damaged_image_ends_the_preparation(raw: Path, tmp_path: Path) -> None:
    path = raw / FOLDERS[2017]["train"][0] / "ISIC_0000003.jpg"
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(InputError, match=r"ISIC_0000003\.jpg: not a readable picture"):
        prepare_isic(raw, tmp_path / "out", year=2017)
    assert not (tmp_path / "out").exists()


def test_empty_masks_and_several(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = raw / FOLDERS[2017]["train"][1]
    Image.fromarray(np.zeros((40, 60), np.uint8)).save(masks / "ISIC_0000001_segmentation.png")
    second = np.zeros((40, 60), np.uint8)
    second[:5] = 1
    (masks / "ISIC_0000002_segmentation.png").rename(masks / "ISIC_0000002_mask.png")
    Image.fromarray(second).save(masks / "ISIC_0000002_mask_1.png")
    prepare_isic(raw, tmp_path / "out", year=2017)
    assert "WARNING: 1 mask is empty: train/ISIC_0000001" in capsys.readouterr().out
    assert (read(tmp_path / "out/train/masks/ISIC_0000002.png") == 255).sum() == 19 * 30 + 5 * 60


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--workers", "-1"), "--workers -1: expected a whole number above 0"),
        (("--workers", "0"), "--workers 0: expected a whole number above 0"),
        (("--size", "10000000", "20"), "--size 10000000 20: expected rows and columns, from 1 to 16384 pixels"),
        (("--size", "20", "0"), "--size 20 0: expected rows and columns, from 1 to 16384 pixels"),
    ],
)
def test_numbers_that_cannot_be_are_one_line(
    words: tuple[str, ...], line: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["isic", "--raw", str(raw), "--out", str(tmp_path / "out"), "--year", "2017", *words]) == 1
    assert capsys.readouterr().err == f"prepare isic: {line}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes")])
def test_too_little_memory_is_one_line(
    error: Exception, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("prepare.isic.interpolate", fail)
    words = ["isic", "--raw", str(raw), "--out", str(tmp_path / "out"), "--year", "2017", "--size", "20", "20"]
    assert main(words) == 1
    assert capsys.readouterr().err.startswith("prepare isic: there is not enough memory; give less --workers")
    assert not (tmp_path / "out").exists()


def test_masks_that_may_be_inverted_are_named(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = raw / FOLDERS[2017]["val"][1] / "ISIC_0000101_segmentation.png"
    Image.fromarray(255 - read(file)).save(file)
    prepare_isic(raw, tmp_path / "out", year=2017)
    line = "WARNING: 1 mask is full, or all border: inverted perhaps: val/ISIC_0000101"
    assert line in capsys.readouterr().out.splitlines()
