from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from unittest.mock import Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transforms import (
    PICTURE_SUFFIXES,
    VOLUME_SUFFIXES,
    InputError,
    by_name,
    case_name,
    check_output,
    has_suffix,
    list_files,
    pair_by_name,
    replacing,
    stem,
)

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
SUFFIXES = st.sampled_from([*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, ".npz"])
DECORATIONS = st.sampled_from(["_segmentation", "_seg", "_mask", "_mask_12", "_label", "_pred", "_trans", "_lesion"])


def paths(*names: str) -> list[Path]:
    return [Path(name) for name in names]


@given(NAMES, SUFFIXES)
def test_a_stem_and_its_suffix_make_the_name(name: str, suffix: str) -> None:
    for written in (suffix, suffix.upper()):
        assert has_suffix(name + written, [suffix])
        npy = suffix in VOLUME_SUFFIXES and name.lower().endswith(".npy") and len(name) > 4
        assert stem(Path("folder.png") / (name + written)) == (name[:-4] if npy else name)


@given(NAMES, st.lists(DECORATIONS, max_size=3), SUFFIXES, SUFFIXES)
def test_decoration_and_suffix_do_not_tell_cases_apart(name: str, decorations: list[str], one: str, two: str) -> None:
    assert case_name(f"{name}-{''.join(decorations)}{one}") == case_name(f"{name}-{two}")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("case0001.npy_pred.nii.gz", "case0001"),
        ("j_1_mask.png", "j_1"),
        ("imgage.png", "imgage"),
        ("_mask.png", "_mask"),
        ("folder.nii/notes.txt", "notes.txt"),
        (".png", ".png"),
        ("a.h5.txt", "a.h5.txt"),
    ],
)
def test_case_names(file: str, name: str) -> None:
    assert case_name(file) == name


def test_files_are_listed_sorted_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.txt", ".d.png", "sub/e.png", ".cache/f.png", "folder.png/g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_files(tmp_path, PICTURE_SUFFIXES) == [tmp_path / "a.JPG", tmp_path / "b.png"]
    everywhere = list_files(str(tmp_path), PICTURE_SUFFIXES, recursive=True)
    assert everywhere == [tmp_path / "a.JPG", tmp_path / "b.png", tmp_path / "sub/e.png"]
    assert list_files(tmp_path / ".d.png", [".png"]) == [tmp_path / ".d.png"]
    assert list_files(tmp_path / "c.txt", [".png"]) == []
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        list_files(tmp_path / "nowhere", [".png"])


@given(st.lists(st.integers(0, 10**6), unique=True), DECORATIONS)
def test_each_case_finds_its_label(numbers: list[int], decoration: str) -> None:
    first = paths(*(f"p/img{number}_pred.nii.gz" for number in numbers))
    second = paths(*(f"l/label{number}{decoration}.nii" for number in sorted(numbers)))
    pairs = pair_by_name(first, second)
    assert [one for one, _ in pairs] == first
    assert all(case_name(one) == case_name(two) for one, two in pairs)
    assert pair_by_name(first[1:], second, spare=True) == pairs[1:]


def test_equal_stems_belong_together_whatever_else_they_look_like() -> None:
    images, masks = paths("i/1.png", "i/img1.png"), paths("m/img1.bmp", "m/1.bmp")
    assert pair_by_name(images, masks) == list(zip(images, masks[::-1], strict=True))
    assert by_name(images, stem) == {"1": images[0], "img1": images[1]}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["a.png"], ["b.png"], "^no mask of the same name for a.png$"),
        (["a.png"], ["a.png", *"fedcb"], r"^no image of the same name for b, c, d … \(5 files\)$"),
        (["a.png", "a.jpg"], ["a.png"], "^a.png and a.jpg have the same name: rename or remove one of them$"),
        (["a.png"], ["a.png", "a_mask.png"], "^a.png and a_mask.png have the same name"),
    ],
)
def test_files_without_one_partner_are_named(first: list[str], second: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_by_name(paths(*first), paths(*second), ("image", "mask"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new/folder/a.nii.gz"
    for content in ("first", "second"):
        with replacing(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.name.startswith(".")
            assert temporary.name.endswith("a.nii.gz")
            temporary.write_text(content)
            assert path.exists() == (content == "second")
        assert path.read_text() == content

    def interrupted() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["a.nii.gz"]


def test_content_and_folder_are_flushed_around_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.listdir(tmp_path)))
    with replacing(tmp_path / "a") as temporary:
        temporary.touch()
    assert flushed == [[temporary.name], ["a"]]


def test_a_file_system_that_cannot_flush_folders_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with replacing(tmp_path / "a") as temporary:
        temporary.touch()
        monkeypatch.setattr(os, "open", Mock(side_effect=OSError))
    assert (tmp_path / "a").exists()


@given(NAMES, st.sampled_from(["", "rename it"]))
def test_an_input_error_is_one_line_and_survives_other_processes(name: str, remedy: str) -> None:
    error = InputError("cannot be read", path=name, remedy=remedy)
    assert str(error).isprintable()
    assert str(error).endswith(f": cannot be read{'; rename it' * bool(remedy)}")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_folder_to_write_to_may_exist_or_not_and_stays_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for folder in (tmp_path, tmp_path / "new" / "deep", tmp_path / "link" / "new", str(tmp_path)):
        check_output(folder, bytes_needed=1000)
    assert os.listdir(tmp_path) == ["link"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file", "file: is a file, not a folder to write to; choose another folder"),
        ("file/results/deep", "file: is a file, not a folder to write to; choose another folder"),
        ("dangling", "dangling: is a link to nowhere, which does not exist; choose another folder"),
        ("dangling/results", "dangling: is a link to nowhere, which does not exist; choose another folder"),
        ("loop", "loop: is a link to loop, which does not exist; choose another folder"),
        ("a" * 300, r"a+: cannot be written to \(File name too long\); choose another folder"),
        ("a\0b", r"a\\x00b: cannot be written to \(embedded null byte\); choose another folder"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(InputError, match=f"^{tmp_path}/{message}$"):
        check_output(tmp_path / name)


def test_a_folder_without_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refused)
    with pytest.raises(InputError, match=r"new: cannot be written to \(Permission denied\); choose another folder$"):
        check_output(tmp_path / "new")


def test_too_little_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: Mock(free=2_340_000))
    check_output(tmp_path, 2_340_000)
    message = r": 2 MB are free, about 70,000 MB needed; free some, or choose another folder$"
    with pytest.raises(InputError, match=message):
        check_output(tmp_path, 70_000_000_000)
