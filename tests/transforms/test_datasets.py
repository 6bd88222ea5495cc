from __future__ import annotations

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
    with pytest.raises(InputError, match=r"no train and val list for --fold 3; there are busi_train1\.txt, busi_tr"):
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
    with pytest.raises(InputError, match=r"case0005_slice001\.npz: is listed but missing"):
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
        (["cup"], {}, r"^label_map must be \{stored number: class\} in whole numbers, not \{\}$"),
        (["cup"], {"0": 0}, "^label_map must be .* in whole numbers"),
        (["cup"], {0: 0.5}, "^label_map must be .* in whole numbers"),
        (["cup"], {0: True}, "^label_map must be .* in whole numbers"),
        (["cup"], [0, 1], "^label_map must be .* in whole numbers"),
        (["cup", "disc"], {0: 0, 128: 1, 255: 3}, "^label_map gives class 3, but classes names 1 … 2$"),
        (["cup"], {0: -1}, "^label_map gives class -1, but"),
        (["cup"], {"85": 1, "0": 0}, "^label_map must be .*; write the numbers without quotes$"),
        (["cup"], {-1: 0, 0: 1}, "^label_map lists numbers from -1 to 0, pictures hold 0 … 65535$"),
        (["cup", "disc"], {0: 0, 5: 1}, "^label_map lists no number for class 2, disc$"),
        (["cup"], {0: 1}, "^label_map makes 0 class 1 and lists no number for the background"),
    ],
)
def test_labels_that_do_not_fit_are_refused(classes: Any, label_map: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        LabelSet(classes, label_map)
