from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from prepare.__main__ import main
from prepare.busi import prepare_busi, stratified_split
from tests.helpers import read
from transforms import InputError


def picture(seed: int, shape: tuple[int, int] = (6, 8)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def marked(rows: slice, shape: tuple[int, int] = (6, 8)) -> np.ndarray:
    mask = np.zeros(shape, np.uint8)
    mask[rows] = 255
    return mask


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Ten benign, ten malignant, two normal; benign (2) has two masks, (3) is RGBA, (4) grey, (5) has a soft mask."""
    folder = tmp_path / "Dataset_BUSI_with_GT"
    for kind, count, start in (("benign", 10, 0), ("malignant", 10, 100), ("normal", 2, 200)):
        for number in range(1, count + 1):
            save(picture(start + number), folder / kind / f"{kind} ({number}).png")
            if kind != "normal":
                save(marked(slice(0, 2)), folder / kind / f"{kind} ({number})_mask.png")
    benign = folder / "benign"
    save(marked(slice(4, 5)), benign / "benign (2)_mask_1.png")
    save(np.dstack([picture(3), np.full((6, 8), 9, np.uint8)]), benign / "benign (3).png")
    save(picture(4)[..., 0], benign / "benign (4).png")
    save(np.array([[0, 90, 127, 128, 200, 255, 0, 0]] * 6, np.uint8), benign / "benign (5)_mask.png")
    Image.fromarray(marked(slice(0, 3)) > 0).save(benign / "benign (6)_mask.png")
    save(np.dstack([marked(slice(1, 2))] * 3), benign / "benign (7)_mask.png")
    return folder


def names(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_images_and_merged_masks(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_busi(raw, out)
    assert len(list((out / "images").iterdir())) == len(list((out / "masks" / "0").iterdir())) == 20
    np.testing.assert_array_equal(read(out / "images" / "benign (1).png"), picture(1))
    np.testing.assert_array_equal(read(out / "images" / "benign (3).png"), picture(3))
    np.testing.assert_array_equal(read(out / "images" / "benign (4).png"), np.dstack([picture(4)[..., 0]] * 3))
    expected = {1: [0, 1], 2: [0, 1, 4], 6: [0, 1, 2], 7: [1]}
    for number, rows in expected.items():
        np.testing.assert_array_equal(read(out / "masks" / "0" / f"benign ({number}).png"), marked(rows))
    np.testing.assert_array_equal(read(out / "masks" / "0" / "benign (5).png")[0], [0, 0, 0, 255, 255, 255, 0, 0])
    facts = json.loads((out / "dataset.json").read_text())
    assert facts["images"] == {"benign": 10, "malignant": 10}
    assert facts["several_masks"] == ["benign (2)"]


def test_splits_are_stratified_seeded_and_complete(raw: Path, tmp_path: Path) -> None:
    prepare_busi(raw, tmp_path / "a", seed=7)
    prepare_busi(raw.parent, tmp_path / "b", seed=7)
    splits = []
    for number in (1, 2, 3):
        train, val = (names(tmp_path / "a" / f"busi_{part}{number}.txt") for part in ("train", "val"))
        assert len(train) == 14
        assert sum(name.startswith("benign") for name in train) == 7
        assert set(train) | set(val) == {path.stem for path in (tmp_path / "a" / "images").iterdir()}
        assert not set(train) & set(val)
        assert train == names(tmp_path / "b" / f"busi_train{number}.txt")
        splits.append(tuple(train))
    assert len(set(splits)) == 3


def test_published_counts() -> None:
    kind_of = {f"b{n}": "benign" for n in range(437)} | {f"m{n}": "malignant" for n in range(210)}
    train, val = stratified_split([[name] for name in kind_of], kind_of, 41)
    assert (len(train), len(val)) == (452, 195)


@settings(deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=30), st.integers(0, 99))
def test_groups_are_never_divided(lengths: list[int], seed: int) -> None:
    groups = [[f"{index}/{member}" for member in range(length)] for index, length in enumerate(lengths)]
    kind_of = {name: "ab"[index % 2] for index, group in enumerate(groups) for name in group}
    train, val = stratified_split(groups, kind_of, seed)
    assert train | val == set(kind_of)
    assert not train & val
    assert all(set(group) <= train or set(group) <= val for group in groups)
    assert len(train) <= 0.7 * len(kind_of)


def test_given_split_files_are_used_as_they_are(raw: Path, tmp_path: Path) -> None:
    given_files = tmp_path / "given"
    given_files.mkdir()
    (given_files / "busi_train1.txt").write_text("benign (2)\nmalignant (1)\n")
    (given_files / "busi_val1.txt").write_text("benign (9)")
    prepare_busi(raw, tmp_path / "out", split_files=given_files)
    assert names(tmp_path / "out" / "busi_train1.txt") == ["benign (2)", "malignant (1)"]
    assert names(tmp_path / "out" / "busi_val1.txt") == ["benign (9)"]
    assert not (tmp_path / "out" / "busi_train2.txt").exists()
    (given_files / "busi_val1.txt").write_text("benign (99)\n")
    with pytest.raises(InputError, match=r"busi_val1\.txt.*benign \(99\)"):
        prepare_busi(raw, tmp_path / "other", split_files=given_files)
    (given_files / "busi_val1.txt").unlink()
    with pytest.raises(InputError, match=r"busi_val1\.txt: missing"):
        prepare_busi(raw, tmp_path / "other", split_files=given_files)
    with pytest.raises(InputError, match="no busi_train1"):
        prepare_busi(raw, tmp_path / "other", split_files=raw)


def test_duplicates_that_straddle_a_split(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(1, 6):
        save(picture(100), raw / "malignant" / f"malignant ({number}).png")
    same = {f"malignant ({number})" for number in range(1, 6)}
    prepare_busi(raw, tmp_path / "plain")
    facts = json.loads((tmp_path / "plain" / "dataset.json").read_text())
    assert [set(group) for group in facts["duplicates"]] == [same]
    straddling = [
        number for number in (1, 2, 3) if 0 < len(same & set(names(tmp_path / "plain" / f"busi_train{number}.txt"))) < 5
    ]
    assert straddling
    out = capsys.readouterr().out
    assert [f"WARNING: split {number}: the same image on both sides" in out for number in (1, 2, 3)] == [
        number in straddling for number in (1, 2, 3)
    ]
    prepare_busi(raw, tmp_path / "apart", deduplicate=True)
    for number in (1, 2, 3):
        train = set(names(tmp_path / "apart" / f"busi_train{number}.txt"))
        assert len(same & train) in (0, 5)
        assert len(list((tmp_path / "apart" / "images").iterdir())) == 20
    assert "both sides" not in capsys.readouterr().out


def test_normal_images_get_empty_masks(raw: Path, tmp_path: Path) -> None:
    prepare_busi(raw, tmp_path / "out", include_normal=True)
    assert len(list((tmp_path / "out" / "images").iterdir())) == 22
    assert not read(tmp_path / "out" / "masks" / "0" / "normal (1).png").any()


def test_bad_input_is_named(raw: Path, tmp_path: Path) -> None:
    def expect(what: str, **options: Any) -> None:
        with pytest.raises(InputError, match=what):
            prepare_busi(raw, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()

    save(marked(slice(0, 2)), raw / "normal" / "normal (1)_mask.png")
    expect(r"normal \(1\)_mask.*normal tissue", include_normal=True)
    expect("--splits 0", splits=0)
    expect("leave out", deduplicate=True, split_files=tmp_path)
    save(marked(slice(0, 2), (5, 8)), raw / "benign" / "benign (1)_mask.png")
    expect(r"benign \(1\)_mask.*8×5 pixels, the image .* 8×6")
    (raw / "benign" / "benign (1)_mask.png").write_bytes(b"no picture")
    expect(r"benign \(1\)_mask.*not a readable picture")
    (raw / "benign" / "benign (1)_mask.png").unlink()
    expect(r"no mask of the same name for .*benign \(1\)\.png$")
    (raw / "benign" / "benign (1).png").unlink()
    (raw / "benign" / "benign (2).png").unlink()
    expect(r"no image of the same name for .*benign \(2\)_mask\.png$")


def test_command_line(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["busi", "--raw", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["busi", "--raw", str(raw), "--out", str(tmp_path / "out"), "--splits", "1"]) == 0
    assert "1      train  14      7       7" in capsys.readouterr().out


def test_unpaired_files_are_left_out_where_asked_for(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (raw / "benign" / "benign (1)_mask.png").unlink()
    (raw / "benign" / "benign (8).png").unlink()
    (raw / "benign" / "._benign (3).png").touch()
    save(marked(slice(0, 0)), raw / "malignant" / "malignant (2)_mask.png")
    arguments = ["busi", "--raw", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(arguments) == 1
    assert "no mask of the same name for" in capsys.readouterr().err
    assert main([*arguments, "--allow-unpaired"]) == 0
    out = capsys.readouterr().out
    assert "passed over: 1 hidden, 1 image without mask, 1 mask without image" in out
    assert "WARNING: 1 mask is empty: malignant (2)" in out
    assert len(list((tmp_path / "out/images").iterdir())) == 18


def test_an_archive_deeper_than_expected_is_found(raw: Path, tmp_path: Path) -> None:
    (tmp_path / "download").mkdir()
    raw.rename(tmp_path / "download/Dataset_BUSI_with_GT")
    prepare_busi(tmp_path, tmp_path / "out")
    assert len(list((tmp_path / "out/images").iterdir())) == 20


def test_a_photograph_is_written_as_viewers_show_it(raw: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = raw / "benign" / "benign (1).png"
    Image.fromarray(picture(1)).save(path, exif=exif)
    with pytest.raises(InputError, match=r"benign \(1\)_mask\.png: 8×6 pixels, the image .* 6×8: .*EXIF"):
        prepare_busi(raw, tmp_path / "out")
    save(np.rot90(marked(slice(0, 2)), -1), raw / "benign" / "benign (1)_mask.png")
    prepare_busi(raw, tmp_path / "out")
    np.testing.assert_array_equal(read(tmp_path / "out/images/benign (1).png"), np.rot90(picture(1), -1))
    np.testing.assert_array_equal(read(tmp_path / "out/masks/0/benign (1).png"), np.rot90(marked(slice(0, 2)), -1))
