from __future__ import annotations

import errno
import os
import pickle
import unicodedata
import warnings
from collections import Counter
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
    expanded,
    find_folder,
    has_suffix,
    list_files,
    log_warnings,
    made_of,
    masks_alone,
    pair_by_name,
    pair_masks,
    passed_over,
    read_list,
    replacing,
    stem,
    without_by_products,
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
    with pytest.raises(InputError, match="nowhere: does not exist$"):
        list_files(tmp_path / "nowhere", [".png"])


@given(st.lists(st.integers(0, 10**6), unique=True), DECORATIONS)
def test_each_case_finds_its_label(numbers: list[int], decoration: str) -> None:
    first = paths(*(f"p/img{number}_pred.nii.gz" for number in numbers))
    second = paths(*(f"l/label{number}{decoration}.nii" for number in sorted(numbers)))
    pairs = pair_by_name(first, second)
    assert [one for one, _ in pairs] == first
    assert all(case_name(one) == case_name(two) for one, two in pairs)


def test_equal_stems_belong_together_whatever_else_they_look_like() -> None:
    images, masks = paths("i/1.png", "i/img1.png"), paths("m/img1.bmp", "m/1.bmp")
    assert pair_by_name(images, masks) == list(zip(images, masks[::-1], strict=True))
    assert by_name(images, stem) == {"1": images[0], "img1": images[1]}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["a.png"], ["b.png"], "^no mask of the same name for a.png$"),
        (["a.png"], ["a.png", *"fedcb"], r"^no image of the same name for b, c, d … \(5 files\)$"),
        (["a.png", "a.jpg"], ["a.png"], "^a.png: has the same name as a.jpg; rename or remove one of them$"),
        (["a.png"], ["a.png", "a_mask.png"], "^a.png: has the same name as a_mask.png; rename"),
    ],
)
def test_files_without_one_partner_are_named(first: list[str], second: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
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
        ("a" * 300, r"a+…a+: cannot be written to \(File name too long\); choose another folder"),
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


def test_what_a_folder_holds_besides_is_counted(tmp_path: Path) -> None:
    for name in ("a.PNG", "._a.png", ".DS_Store", "Thumbs.db", "notes.txt", "b.txt", "README", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.png").symlink_to("nowhere")
    passed: Counter[str] = Counter()
    assert list_files(tmp_path, PICTURE_SUFFIXES, passed=passed) == [tmp_path / "a.PNG"]
    assert passed == {"hidden": 3, "*.txt": 2, "without suffix": 1, "sub-folder": 1, "link to nothing": 1}
    assert passed_over(passed).startswith("passed over: 3 hidden, 2 *.txt, ")
    assert passed_over(Counter()) == ""


def test_by_products_stay_behind_their_image(tmp_path: Path) -> None:
    made = [
        "a_mask.png",
        "a_MASK_1.png",
        "a_Segmentation.png",
        "a_superpixels.png",
        "a_probability_2.png",
        "a_pred.png",
    ]
    files = paths("a.jpg", *made, "b_mask.png", "c_superpixels.png", "d_1.png", "other/a_mask.png")
    passed: Counter[str] = Counter()
    assert [str(file) for file in without_by_products(files, passed)] == [
        "a.jpg",
        "b_mask.png",
        "d_1.png",
        "other/a_mask.png",
    ]
    assert passed == {"*_mask": 2, "*_segmentation": 1, "*_superpixels": 2, "*_probability": 1, "*_pred": 1}
    assert {made_of(name) for name in made} == {"a"}


def test_by_products_are_neither_images_nor_masks() -> None:
    names = [f"{name}.png" for name in ("a_overlay", "b_Probability_2", "c_superpixels")]
    files = paths(*names, "d.png", "d_mask.png", "e.png", "f_overlays.png")
    for alone, expected in (
        (without_by_products, ["d.png", "e.png", "f_overlays.png"]),
        (masks_alone, ["d_mask.png", "e.png", "f_overlays.png"]),
    ):
        passed: Counter[str] = Counter()
        assert [str(file) for file in alone(files, passed)] == expected
        assert {"*_overlay", "*_probability", "*_superpixels"} <= passed.keys()
        assert passed.total() == 4
    assert [str(file) for file, _ in pair_masks(paths("a.jpg"), paths("a.png", "a_overlay.png"))] == ["a.jpg"]


def test_second_masks_belong_to_their_image() -> None:
    images = paths("i/a.jpg", "i/b.jpg", "i/c.jpg")
    masks = paths(
        "m/a_mask.png", "m/a_mask_1.png", "m/a_mask_2.png", "m/b.png", "m/c_mask_7.png", "m/b_superpixels.png"
    )
    assert pair_masks(images, masks) == [
        (images[0], tuple(masks[:3])),
        (images[1], (masks[3],)),
        (images[2], (masks[4],)),
    ]


def test_images_and_masks_alone_are_refused_or_counted() -> None:
    images, masks = paths("a.jpg", "b.jpg"), paths("a_mask.png", "c_mask.png", "c_mask_1.png")
    with pytest.raises(InputError, match=r"^no mask of the same name for b\.jpg$"):
        pair_masks(images, masks)
    with pytest.raises(InputError, match=r"^no image of the same name for c_mask\.png$"):
        pair_masks(images[:1], masks)
    passed: Counter[str] = Counter()
    assert pair_masks(images, masks, allow_unpaired=True, passed=passed) == [(images[0], (masks[0],))]
    assert passed == {"image without mask": 1, "mask without image": 1}
    for twice in (["a.png", "a_mask.png"], ["a_mask_1.png", "a_mask_1.jpg"], ["a.png", "a.jpg"]):
        with pytest.raises(InputError, match=r"^a.*: has the same name as a"):
            pair_masks(images[:1], paths(*twice))
    with pytest.raises(InputError, match=r"^a\.jpg: has the same name as a\.png; rename"):
        pair_masks(paths("a.jpg", "a.png"), paths("a_mask.png"))


def test_accented_letters_may_be_written_in_either_way() -> None:
    one, two = (unicodedata.normalize(form, "é.png") for form in ("NFC", "NFD"))
    assert one != two
    assert pair_by_name([Path(one)], [Path(two)]) == [(Path(one), Path(two))]
    with pytest.raises(InputError, match="has the same name"):
        by_name([Path(one), Path(two)])


def test_lists_from_any_editor(tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_bytes("\ufeffbenign (1)\r\n\r\n  \r\nété\u2028x\r\nlast".encode())
    assert read_list(path) == ["benign (1)", "été\u2028x", "last"]
    for content in ("é".encode("latin-1"), "names".encode("utf-16"), "names".encode("utf-16-be"), b"\x89PNG\r\n\x1a\n"):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"train\.txt: is no list of names.*; save it as"):
            read_list(path)
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        read_list(tmp_path / "none.txt")
    with pytest.raises(InputError, match="cannot be read"):
        read_list(tmp_path)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", "..", ".", "./a", "x/"])
def test_names_in_lists_stay_in_their_folder(name: str, tmp_path: Path) -> None:
    path = tmp_path / "train.txt"
    path.write_text(f"a\n{name}\n")
    with pytest.raises(InputError, match=r"train\.txt: .* is no name but leads to a folder; list names alone"):
        read_list(path)


def test_a_folder_is_found_where_archives_unpack_it(tmp_path: Path) -> None:
    deep = tmp_path / "download/Data/Data"
    deep.mkdir(parents=True)
    (tmp_path / "__MACOSX/Data").mkdir(parents=True)
    assert find_folder(tmp_path, "Data") == deep
    (deep.parent / "a.png").touch()
    assert find_folder(tmp_path, "Data") == deep.parent
    assert find_folder(tmp_path, "D?ta") is None
    (tmp_path / "again/Data").mkdir(parents=True)
    with pytest.raises(InputError, match="again.Data: is there twice: .*download.Data; leave one"):
        find_folder(tmp_path, "Data")


def test_what_no_screen_can_hold_loses_its_middle() -> None:
    line = str(InputError("holds " + "x" * 10**6, path="a" * 10**6, remedy="y" * 10**6))
    assert len(line) < 2500
    assert line.startswith("aaaa")
    assert line.endswith("yyyy")
    assert str(InputError("is empty", path="b" * 200)) == f"{'b' * 200}: is empty"


def test_a_home_folder_is_meant_where_no_folder_is_called_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/data") == "/home/me/data"
    assert expanded("~") == "/home/me"
    assert expanded("a/~") == "a/~"
    (tmp_path / "~").mkdir()
    assert expanded("~/data") == "~/data"


def test_warnings_of_libraries_are_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        log_warnings()
        warnings.warn("two\nlines", stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == ["UserWarning: two lines"]
