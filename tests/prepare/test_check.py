from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prepare.__main__ import main
from prepare.demo import prepare_demo
from prepare.output import Report
from tests.helpers import read


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("check") / "demo"
    prepare_demo(out, cases=3, slices=10, size=64, images=12)
    return out


@pytest.mark.parametrize("options", [[], ["--full"]])
@pytest.mark.parametrize(
    ("name", "counts"),
    [("synapse", ["20 of 20", "1 of 1"]), ("busi", ["7 of 7", "5 of 5"]), ("isic17", ["8 of 8", "4 of 4"])],
)
def test_every_layout_is_recognised(
    demo: Path, name: str, counts: list[str], options: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(demo / name), *options]) == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    opened = counts if options else ["8 of 20" if counts[0] == "20 of 20" else counts[0], counts[1]]
    how = "everything" if options else "a sample"
    assert lines[0] == f"data checked, {how} opened: training {opened[0]}, test {opened[1]}"
    assert any(line.startswith("errors: 0, warnings: ") for line in lines)
    assert err == ""


def test_errors_are_listed_and_end_with_1(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(demo / "busi", tmp_path / "busi")
    first, second = sorted((tmp_path / "busi/images").iterdir())[:2]
    first.write_bytes(b"no picture")
    second.write_bytes(b"")
    assert main(["check", str(tmp_path / "busi"), "--full"]) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith(f"ERROR: {first}: ")]
    assert [line for line in out.splitlines() if line.startswith(f"ERROR: {second}: ")]
    assert err.startswith("prepare check: ")
    assert err.endswith("; and 1 more error in the data, listed above\n")
    assert err.count("\n") == 1


def test_near_duplicates_are_all_listed(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(demo / "busi", tmp_path / "busi")
    images = sorted((tmp_path / "busi/images").iterdir())
    with Image.open(images[0]) as original:
        for image in images[1:4]:
            height, width, _ = read(image).shape
            original.resize((width, height)).point(lambda value: value * 0.9).save(image)
    assert main(["check", str(tmp_path / "busi"), "--full"]) == 0
    assert capsys.readouterr().out.count("nearly equal: ") == 6


def test_classes_and_their_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for number in range(4):
        for folder, array in (
            ("images", rng.integers(0, 256, (20, 30, 3), np.uint8)),
            ("masks", rng.choice(np.array([0, 85, 170], np.uint8), (20, 30))),
        ):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"{number}.png")
    command = ["check", str(tmp_path), "--classes", "cup", "disc", "--label-map", "0:0", "85:1"]
    assert main([*command, "171:2"]) == 1
    assert "holds 170" in capsys.readouterr().err
    assert main([*command, "170:2"]) == 0
    assert "training: cup in 3, disc in 3 of 3 opened" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("", ": holds no prepared data; check one of busi, isic17, synapse in it"),
        ("synapse/lists", "lists: holds no prepared data; expected lists/lists_Synapse, or images and masks, or train"),
    ],
)
def test_other_folders(demo: Path, folder: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(demo / folder)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_label_map_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(tmp_path), "--label-map", "0"])
    assert "argument --label-map: invalid" in capsys.readouterr().err


def test_a_bar_is_drawn_on_terminals_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(Report().progress(range(3), "preparing")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert list(Report().progress(range(3), "preparing")) == [0, 1, 2]
    assert "preparing: 100%" in capsys.readouterr().err
