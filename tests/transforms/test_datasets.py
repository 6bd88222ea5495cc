from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transforms import (
    BTCV_IDS,
    PICTURE_SUFFIXES,
    SYNAPSE_CLASSES,
    VOLUME_SUFFIXES,
    InputError,
    LabelSet,
    find_files,
    image_split,
    synapse_split,
)

NAMES = [f"{index:02d}" for index in range(10)]
Files = Callable[..., Path]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Makes empty files: only names matter for splits."""

    def make(*names: str) -> Path:
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).touch()
        return tmp_path

    return make


def stems(items: list[dict[str, str]]) -> list[str]:
    for item in items:
        assert Path(item["label"]).name.startswith(Path(item["image"]).stem)
    return [Path(item["image"]).stem for item in items]


def test_dermoscopy_layout(files: Files) -> None:
    root = files(*(f"train/images/{n}.jpg" for n in NAMES), *(f"train/masks/{n}.png" for n in NAMES))
    files("val/images/b.jpg", "val/images/a.jpg", "val/masks/a_segmentation.png", "val/masks/b_segmentation.png")
    parts = image_split(root, val_fraction=0.3)
    assert stems(parts.test) == ["a", "b"]
    assert len(parts.validation) == 3
    assert sorted(stems(parts.train) + stems(parts.validation)) == NAMES
    assert parts.rule == "IoU on held-out training images"
    with pytest.raises(InputError, match="selection must be one of holdout, paper, not 'best'"):
        image_split(root, selection="best")
    with pytest.raises(InputError, match="a share of 1 of the 10 images"):
        image_split(root, val_fraction=1)


def test_ultrasound_lists_choose_and_order_the_images(files: Files) -> None:
    root = files(*(f"images/{n}.png" for n in NAMES), *(f"masks/0/{n}.png" for n in NAMES))
    for fold, cut in ((1, 7), (2, 4)):
        (root / f"busi_train{fold}.txt").write_text("\n".join(NAMES[:cut][::-1]) + "\n\n")
        (root / f"busi_val{fold}.txt").write_text("\n".join(NAMES[cut:]))
    parts = image_split(root, fold=2, selection="paper", metric="F1")
    assert parts.rule == "F1 on the reported test images, as published"
    assert stems(parts.train) == NAMES[:4][::-1]
    assert stems(parts.test) == NAMES[4:]
    assert parts.validation == parts.test
    assert str(root / "masks/0/00.png") in {item["label"] for item in parts.train}
    with pytest.raises(InputError, match=r"no train and val list for --fold 3; there are busi_train1\.txt, busi_val1"):
        image_split(root, fold=3)
    (root / "busi_val1.txt").write_text("99\n")
    with pytest.raises(InputError, match=r"busi_val1\.txt: 99 is listed but .*images has no such picture"):
        image_split(root, fold=1)


def test_own_folder_pairs_by_stem_whatever_the_suffixes(files: Files) -> None:
    images = ("a.PNG", "b.jpg", "c.tif", "d.bmp", "e.jpeg", "f.tiff", "g.png", "h.png", "i.x.png", "j_1.png")
    masks = ("a_mask.png", "b_segmentation.PNG", "c.bmp", "d.png", "e_mask.tif", "f.png", "g.png", "h.png", "i.x.png",
             "j_1_mask.png")  # fmt: skip
    root = files(*(f"images/{n}" for n in images), *(f"masks/{n}" for n in masks))
    files("images/.DS_Store", "images/._a.png", "images/notes.txt")
    parts = image_split(root)
    items = [*parts.train, *parts.validation, *parts.test]
    found = {Path(item["image"]).name: Path(item["label"]).name for item in items}
    assert found == dict(zip(images, masks, strict=True))
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [6, 1, 3]
    assert image_split(root) == parts
    assert image_split(root, seed=1) != parts


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r": holds no images to train on .*python -m prepare busi --raw DIR.*prepare isic.*prepare demo"),
        (["images/a.png"], r"masks: is missing"),
        (
            ["images/a.png", "masks/b.png"],
            r"masks: no mask of the same name for .*images.a\.png; .*--allow_unpaired true",
        ),
        (["images/a.png", "masks/a.png", "masks/b.png"], r"masks: no image of the same name for .*masks.b\.png; "),
        (["images/a.txt", "masks/a.png"], r"images: holds no picture \(\.png"),
        (["images/a.png", "masks/a.png", "masks/a_mask.png"], r"a\.png: has the same name as .*a_mask\.png; rename"),
        (["images/a.png", "masks/a.png"], r"a share of 0\.3 of the 1 images"),
    ],
)
def test_what_is_wrong_with_a_folder_is_one_line(files: Files, names: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        image_split(files(*names))
    assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(3, 12), share=st.floats(0.01, 0.99), seed=st.integers(0, 9))
def test_a_draw_parts_the_images_and_leaves_some_on_both_sides(
    tmp_path_factory: pytest.TempPathFactory, count: int, share: float, seed: int
) -> None:
    root = tmp_path_factory.mktemp("drawn")
    for folder in ("train/images", "train/masks", "val/images", "val/masks"):
        (root / folder).mkdir(parents=True)
        for name in NAMES[:1] if "val" in folder else range(100, 100 + count):
            (root / folder / f"{name}.png").touch()
    parts = image_split(root, val_fraction=share, seed=seed)
    drawn, rest = stems(parts.validation), stems(parts.train)
    assert (drawn, rest) == (sorted(drawn), sorted(rest))
    assert sorted(drawn + rest) == [str(name) for name in range(100, 100 + count)]
    assert 0 < len(drawn) < count
    assert abs(len(drawn) - share * count) <= 1


def test_find_files(files: Files) -> None:
    root = files("b.png", "a.JPG", "c.txt", "a.nii.gz", "a_pred.nii", "c.npy.h5")
    assert [Path(item["image"]).name for item in find_files(root, PICTURE_SUFFIXES)] == ["a.JPG", "b.png"]
    assert len(find_files(root, VOLUME_SUFFIXES)) == 2
    with pytest.raises(InputError, match=r"c\.txt: is or holds no \.png"):
        find_files(root / "c.txt", PICTURE_SUFFIXES)
    files("a.nii")
    with pytest.raises(InputError, match=r"a\.nii: has the same name as .*a\.nii\.gz; .* overwrite each other"):
        find_files(root, VOLUME_SUFFIXES)


@pytest.fixture
def synapse(files: Files) -> Path:
    slices = [f"case{case:04d}_slice{index:03d}" for case in (5, 6, 7, 9) for index in (2, 0, 1)]
    root = files(*(f"train_npz/{name}.npz" for name in slices), "test_vol_h5/case0001.npy.h5")
    (root / "lists/lists_Synapse").mkdir(parents=True)
    (root / "lists/lists_Synapse/train.txt").write_text("\n".join(slices))
    (root / "lists/lists_Synapse/test_vol.txt").write_text("case0001\n")
    return root


def test_whole_cases_are_held_out_with_their_slices_in_order(synapse: Path) -> None:
    parts = synapse_split(synapse, val_cases=["case0006"])
    (case,) = parts.validation
    assert [Path(file).stem for file in case["image"]] == [f"case0006_slice00{index}" for index in range(3)]
    assert case["label"] == case["image"]
    training = {Path(item["image"]).stem for item in parts.train}
    assert {name[:8] for name in training} == {"case0005", "case0007", "case0009"}
    assert len(training) == 9
    assert [Path(item["image"]).name for item in parts.test] == ["case0001.npy.h5"]
    drawn = [synapse_split(synapse, 2, seed=seed).validation for seed in range(6)]
    assert {len(cases) for cases in drawn} == {2}
    assert len({str(cases) for cases in drawn}) > 1
    paper = synapse_split(synapse, selection="paper")
    assert len(paper.train) == 12
    assert paper.validation == []
    assert (parts.rule, paper.rule) == ("Dice on held-out training cases", "lowest training loss, as published")


def test_what_is_wrong_with_synapse_data_is_one_line(synapse: Path) -> None:
    with pytest.raises(InputError, match=r"4 of the 4 training cases cannot .* give another --val_cases"):
        synapse_split(synapse, 4)
    with pytest.raises(InputError, match="val_cases case0001 are no training cases"):
        synapse_split(synapse, ["case0001"])
    (synapse / "train_npz/case0005_slice001.npz").unlink()
    line = r"train\.txt: names case0005_slice001, but train_npz.case0005_slice001\.npz is missing"
    with pytest.raises(InputError, match=line):
        synapse_split(synapse, 1, selection="paper")


def test_labels_say_what_follows_from_them() -> None:
    lesion, eye = LabelSet("lesion"), LabelSet(["cup", "disc"], {0: 0, 128: 1, 255: 2, 254: 2})
    assert (lesion.classes, lesion.binary, lesion.multiclass) == (("lesion",), True, False)
    assert (lesion.out_channels, lesion.mask_mode, lesion.label_map) == (1, "bilinear", None)
    assert (eye.binary, eye.multiclass, eye.out_channels, eye.mask_mode) == (False, True, 3, "nearest")
    assert eye.label_map == {0: 0, 128: 1, 255: 2, 254: 2}
    assert LabelSet(["lesion"], {0: 0, 20: 1}).label_map == {0: 0, 20: 1}
    assert LabelSet(["cup", "disc"]).label_map == {0: 0, 1: 1, 2: 2}
    assert len(set(BTCV_IDS)) == LabelSet(SYNAPSE_CLASSES).out_channels - 1 == 8


@pytest.mark.parametrize(
    ("classes", "label_map", "message"),
    [
        ([], None, r"^classes must be one or more different names, not \[\]$"),
        (["cup", "cup"], None, "^classes must be one or more different names"),
        ([1, 2], None, "^classes must be one or more different names"),
        (["cup"], {}, r"^--label_map must be \{stored number: class\} in whole numbers, not \{\}$"),
        (["cup"], {"0": 0}, "^--label_map must be .* in whole numbers"),
        (["cup"], {0: 0.5}, "^--label_map must be .* in whole numbers"),
        (["cup"], {0: True}, "^--label_map must be .* in whole numbers"),
        (["cup"], [0, 1], "^--label_map must be .* in whole numbers"),
        (["cup", "disc"], {0: 0, 128: 1, 255: 3}, "^--label_map gives class 3, but classes names 1 … 2$"),
        (["cup"], {0: -1}, "^--label_map gives class -1, but"),
        (["cup"], {"85": 1, "0": 0}, "^--label_map must be .*; write the numbers without quotes$"),
        (["cup"], {-1: 0, 0: 1}, "^--label_map lists numbers from -1 to 0, pictures hold 0 … 65535$"),
        (["cup", "disc"], {0: 0, 5: 1}, "^--label_map lists no number for class 2, disc$"),
        (["cup"], {0: 1}, "^--label_map makes 0 class 1 and lists no number for the background"),
    ],
)
def test_labels_that_do_not_fit_are_refused(classes: Any, label_map: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LabelSet(classes, label_map)


def test_input_is_a_file_a_folder_or_several(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    root = files("2018/b.png", "2018/a.jpg", "2018/a_mask.png", "2018/a_probability_1.png", "2018/notes.txt", "c.PNG")
    files("2018/._a.jpg", "2018/deep/d.png")
    folder = root / "2018"

    def names(path: Any) -> list[str]:
        return [Path(item["image"]).name for item in find_files(path, PICTURE_SUFFIXES)]

    assert names(folder) == ["a.jpg", "b.png"]
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{folder}: passed over: ")
    for part in ("1 hidden", "1 sub-folder", "1 *.txt", "1 *_mask", "1 *_probability"):
        assert part in record.getMessage()
    # as a shell expands *
    assert names(sorted(map(str, folder.glob("[!.]*")))) == ["a.jpg", "b.png", "d.png"]
    assert names([root / "c.PNG", str(folder / "b.png"), folder / "b.png"]) == ["c.PNG", "b.png"]
    assert names((root / "c.PNG",)) == ["c.PNG"]
    # asked for by its name
    assert names(folder / "a_mask.png") == ["a_mask.png"]
    with pytest.raises(InputError, match=r"d\.png: does not exist; give a file"):
        find_files([root / "c.PNG", root / "d.png"], PICTURE_SUFFIXES)
    with pytest.raises(InputError, match=r"deep: is or holds no .*\(passed over: 1 \*\.txt\)"):
        find_files(files("deep/x.txt") / "deep", PICTURE_SUFFIXES)
    with pytest.raises(InputError, match=r"is or holds no \.png"):
        find_files([], PICTURE_SUFFIXES)


def test_a_folder_whose_name_is_a_number(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files("2018/images/a.png", "2018/images/b.png", "2018/masks/a.png", "2018/masks/b.png"))
    number: Any = 2018
    assert len(image_split(number, selection="paper").train) == 1
    assert len(find_files("2018/images", PICTURE_SUFFIXES)) == 2
    with pytest.raises(InputError, match="2018: holds no prepared Synapse"):
        synapse_split(number)
    monkeypatch.chdir("2018/images")
    assert len(find_files(".", PICTURE_SUFFIXES)) == 2
    Path("~c.png").touch()
    assert [Path(item["image"]).expanduser().exists() for item in find_files(".", PICTURE_SUFFIXES)] == [True] * 3


ODD = ["a b", "#1", "50%", "a@b", "$x_1$", "été 図", "two\nlines", "'quoted'", " lead", "[1]", "*"]


def test_odd_names_are_paired(files: Files) -> None:
    root = files(*(f"images/{name}.png" for name in ODD), *(f"masks/{name}_mask.png" for name in ODD))
    split = image_split(root)
    assert len(split.train) + len(split.validation) + len(split.test) == len(ODD)
    listed = [name for name in ODD if "\n" not in name]
    (root / "x_train1.txt").write_text("\n".join(listed[:5]), encoding="utf-8")
    (root / "x_val1.txt").write_text("\n".join(f"{name}.png" for name in listed[5:]), encoding="utf-8")
    assert stems(image_split(root, selection="paper").train) == listed[:5]
    assert stems(image_split(root, selection="paper").test) == listed[5:]


def test_what_lies_beside_images_is_passed_over(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    beside = ("Thumbs.db", "a_superpixels.png", "b_mask.png", "._a.jpg")
    masks = ("a_segmentation.png", "a_superpixels.png", "b_mask.png", "b_mask_1.png")
    here = [*(f"images/{name}" for name in ("a.jpg", "b.jpg", *beside)), *(f"masks/{name}" for name in masks)]
    names = [f"{part}/{name}" for part in ("train", "val") for name in here]
    split = image_split(files(*names), selection="paper")
    assert stems([{"image": split.train[0]["image"], "label": split.train[0]["label"]}]) == ["a"]
    assert [Path(mask).name for mask in split.train[1]["label"]] == ["b_mask.png", "b_mask_1.png"]
    assert "passed over: 4 hidden, 2 *_superpixels, 2 *_mask" in caplog.text


def test_unpaired_files_are_refused_or_left_out(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    root = files(*(f"images/{n}.png" for n in "abcd"), *(f"masks/{n}.png" for n in "bcdef"))
    with pytest.raises(InputError, match=r"no mask of the same name for .*a\.png; add it.*--allow_unpaired true"):
        image_split(root)
    split = image_split(root, allow_unpaired=True, selection="paper")
    assert sorted(stems(split.train) + stems(split.test)) == ["b", "c", "d"]
    assert "passed over: 2 mask without image, 1 image without mask" in caplog.text
    with pytest.raises(InputError, match="holds no picture that has a mask in"):
        image_split(files("x/images/a.png", "x/masks/b.png") / "x", allow_unpaired=True)
    with pytest.raises(InputError, match="masks: holds a folder of masks for each of several classes"):
        image_split(files("y/images/a.png", "y/masks/0/a.png", "y/masks/1/a.png") / "y")


def test_lists_that_are_empty_or_overlap_are_refused(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    root = files(*(f"images/{n}.png" for n in NAMES), *(f"masks/{n}.png" for n in NAMES))
    train, val = root / "busi_train1.txt", root / "busi_val1.txt"

    def refused(what: str, training: str, validation: str) -> None:
        train.write_text(training)
        val.write_text(validation)
        with pytest.raises(InputError, match=what):
            image_split(root)

    refused(r"busi_train1\.txt: lists nothing", "\n", "00")
    refused(r"busi_val1\.txt: lists nothing", "00", "\r\n")
    refused(r"busi_val1\.txt: 1 images are listed for training and for testing, such as 01", "00\n01", "01\n02")
    refused(r"busi_val1\.txt: 98 is listed .* … \(2 names\)", "00\n01", "98\n99")
    val.write_text("02\n98")
    assert stems(image_split(root, selection="paper", allow_unpaired=True).test) == ["02"]
    train.write_bytes(b"\xef\xbb\xbf00\r\n\r\n01\r\n01\r\n")
    val.write_text("02.png\n03")
    split = image_split(root, selection="paper")
    assert (stems(split.train), stems(split.test)) == (["00", "01"], ["02", "03"])
    assert "1 names stand there more than once" in caplog.text
    for fold in ("*", "1*", 2, "[1]"):
        with pytest.raises(InputError, match="no train and val list for --fold"):
            image_split(root, fold=fold)  # type: ignore[arg-type]
    files("isic_train1.txt")
    with pytest.raises(InputError, match=r"busi_train1\.txt: is of the same split as isic_train1\.txt"):
        image_split(root)


def test_the_same_file_in_both_parts_is_refused(files: Files) -> None:
    names = [f"{part}/{kind}/{n}.png" for part in ("train", "val") for kind in ("images", "masks") for n in "ab"]
    root = files(*names)
    for index, name in enumerate(names):
        (root / name).write_text(str(index))
    assert len(image_split(root).test) == 2
    (root / "val/images/b.png").write_bytes((root / "train/images/b.png").read_bytes())
    with pytest.raises(InputError, match=r"val.images.b\.png: is a training image too; leave"):
        image_split(root)


def test_synapse_lists_that_are_empty_or_overlap_are_refused(synapse: Path) -> None:
    lists = synapse / "lists/lists_Synapse"
    for cases in ([], "", ["case0005", "case0006", "case0007", "case0009"]):
        with pytest.raises(InputError, match="val_cases"):
            synapse_split(synapse, cases)
    assert [case["image"][0][-21:-13] for case in synapse_split(synapse, "case0006").validation] == ["case0006"]
    (lists / "test_vol.txt").write_bytes(b"\xef\xbb\xbfcase0001\r\n")
    assert len(synapse_split(synapse, 1).test) == 1
    (lists / "test_vol.txt").write_text("case0001\ncase0005\n")
    with pytest.raises(InputError, match=r"case0005 is in train\.txt and in test_vol\.txt"):
        synapse_split(synapse)
    (lists / "test_vol.txt").write_text("\n")
    with pytest.raises(InputError, match=r"test_vol\.txt: lists nothing"):
        synapse_split(synapse)


def test_a_folder_may_be_called_like_the_home_folder(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    root = files("~/train_npz/case0005_slice000.npz", "~/test_vol_h5/case0001.npy.h5")
    (root / "~/lists/lists_Synapse").mkdir(parents=True)
    (root / "~/lists/lists_Synapse/train.txt").write_text("case0005_slice000\n")
    (root / "~/lists/lists_Synapse/test_vol.txt").write_text("case0001\n")
    monkeypatch.chdir(root)
    split = synapse_split("~", selection="paper")
    # MONAI would take a leading ~ for the home folder
    assert [Path(item["image"]) for item in (*split.train, *split.test)] == [
        root / "~/train_npz/case0005_slice000.npz",
        root / "~/test_vol_h5/case0001.npy.h5",
    ]


@pytest.mark.parametrize("between", [" ", ",", "\t", "; "])
def test_several_names_in_one_line_are_told(between: str, files: Files) -> None:
    root = files("train_npz/case0005_slice000.npz", "train_npz/case0005_slice001.npz", "test_vol_h5/case0001.npy.h5")
    (root / "lists/lists_Synapse").mkdir(parents=True)
    (root / "lists/lists_Synapse/train.txt").write_text(between.join(["case0005_slice000", "case0005_slice001"]))
    (root / "lists/lists_Synapse/test_vol.txt").write_text("case0001")
    with pytest.raises(InputError, match="write one name in a line$"):
        synapse_split(root, selection="paper")
    (root / "lists/lists_Synapse/train.txt").write_text("x" * 100_000)
    with pytest.raises(InputError, match="is missing; ") as caught:
        synapse_split(root, selection="paper")
    assert len(str(caught.value)) < 1000
