from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from PIL import Image

from tests.helpers import read
from transforms import (
    DataReport,
    DataSplit,
    InputError,
    LabelSet,
    check_data,
    check_split,
    checks,
    image_split,
    synapse_split,
)
from transforms.checks import NEAR, fingerprint

SIZE = (48, 64)


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Smooth noise: no two are alike."""
    small = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC))


def disc(value: int = 255, size: tuple[int, int] = SIZE) -> np.ndarray:
    rows, columns = np.indices(size)
    return np.where((rows - 20) ** 2 + (columns - 30) ** 2 < 100, value, 0).astype(np.uint8)


def save(array: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pairs to train on, t0 … t11, and four to test on, v0 … v3."""
    for part, first, count in (("train", "t", 12), ("val", "v", 4)):
        for number in range(count):
            save(picture(number + 100 * (part == "val")), tmp_path / part / "images" / f"{first}{number}.png")
            save(disc(), tmp_path / part / "masks" / f"{first}{number}.png")
    return tmp_path


def checked(folder: Path, full: bool = True, labels: LabelSet | None = None) -> DataReport:
    return check_split(image_split(folder, selection="paper"), labels or LabelSet(["lesion"]), full)


def test_good_pictures_are_summed_up(pictures: Path) -> None:
    report = checked(pictures)
    assert (report.errors, report.warnings, report.near) == ((), (), ())
    assert report.lines == (
        "data checked, everything opened: training 12 of 12, test 4 of 4",
        "training: lesion in 12 of 12 opened",
        "test: lesion in 4 of 4 opened",
        "size 48 × 64",
        "empty masks: 0, full or inverted ones: 0",
        "images that show nothing: 0",
        "groups of equal images: 0, in different parts: 0",
        "pairs of nearly equal images: 0, in different parts: 0",
        "errors: 0, warnings: 0",
    )
    quick = checked(pictures, full=False)
    assert (quick.errors, quick.warnings) == ((), ())
    assert quick.lines[0] == "data checked, a sample opened: training 8 of 12, test 4 of 4"


def test_all_errors_are_collected_and_name_their_files(pictures: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = pictures / "train"
    (train / "images/t1.png").write_bytes(b"no picture")
    (train / "masks/t2.png").write_bytes((train / "masks/t2.png").read_bytes()[:60])
    save(disc(size=(48, 60)), train / "masks/t3.png")
    (pictures / "val/images/v1.png").write_bytes(b"")
    report = checked(pictures)
    assert len(report.errors) == 4
    bad = ["train/images/t1", "train/masks/t2", "train/masks/t3", "val/images/v1"]
    assert [line.split(".png: ")[0] for line in report.errors] == [f"{pictures}/{name}" for name in bad]
    assert (
        report.errors[2]
        == f"{train}/masks/t3.png: 60×48 pixels, the image t3.png 64×48; image and mask must have the same size"
    )
    split = image_split(pictures, selection="paper")
    with pytest.raises(InputError, match=r"t1\.png: .*; and 3 more errors in the data, listed above$"):
        check_data(split, ["lesion"], "full")
    assert [record.message for record in caplog.records if record.levelno == logging.ERROR] == list(report.errors[1:])


def test_the_quick_form_misses_no_file_and_opens_a_few(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    original = checks.PictureReader.get_data

    def counting(reader: object, files: list[Path]) -> object:
        opened.append(files[0])
        return original(reader, files)

    split = image_split(pictures, selection="paper")
    for item in split.train[1:]:
        Path(item["image"]).write_bytes(b"")
    Path(split.train[1]["label"]).unlink()
    monkeypatch.setattr(checks.PictureReader, "get_data", counting)
    report = check_split(split, ["lesion"])
    assert {line.split(": ")[0] for line in report.errors} == {
        *(item["image"] for item in split.train[1:]),
        split.train[1]["label"],
    }
    assert len(opened) == 8 + 4


@pytest.mark.parametrize(
    ("label_map", "values", "message"),
    [
        ({0: 0, 100: 1, 200: 2}, [0, 100, 200], None),
        ({0: 0, 100: 1, 200: 2}, [0, 100, 150], "holds 150"),
        (None, [0, 1, 2], None),
        (None, [0, 1, 3], "holds 3"),
    ],
)
def test_label_numbers_fit_the_classes(
    pictures: Path, label_map: dict[int, int] | None, values: list[int], message: str | None
) -> None:
    for file in pictures.rglob("masks/*.png"):
        save(np.choose(np.arange(64) * 3 // 64, values).astype(np.uint8) * np.ones((48, 1), np.uint8), file)
    report = checked(pictures, labels=LabelSet(["cup", "disc"], label_map))
    if message is None:
        assert report.errors == ()
        assert report.lines[1] == "training: cup in 12, disc in 12 of 12 opened"
    else:
        assert len(report.errors) == 16
        assert all(message in line for line in report.errors)


def test_masks_that_mark_nothing_and_classes_without_an_image(pictures: Path) -> None:
    for number in (1, 2):
        save(disc(0), pictures / f"train/masks/t{number}.png")
    shutil.move(pictures / "train/images/t2.png", pictures / "train/images/normal (2).png")
    shutil.move(pictures / "train/masks/t2.png", pictures / "train/masks/normal (2).png")
    report = checked(pictures)
    assert report.errors == ()
    assert report.warnings == ("t1 (training): the mask marks nothing",)
    assert "empty masks: 2, full or inverted ones: 0" in report.lines
    for file in pictures.glob("train/masks/*.png"):
        save(disc(0), file)
    assert "no training image shows lesion" in checked(pictures).warnings
    assert "no training image shows lesion" not in checked(pictures, full=False).warnings


@pytest.mark.parametrize("full", [True, False])
def test_a_training_part_without_anything_marked_is_refused(full: bool, pictures: Path) -> None:
    masks = sorted((pictures / "train/masks").iterdir())
    for mask in masks:
        save(disc(0), mask)
    line = "no training mask marks anything: there is nothing to learn"
    assert checked(pictures, full).errors == (line,)
    with pytest.raises(InputError, match=line):
        check_data(image_split(pictures, selection="paper"), ["lesion"], "full" if full else "quick")
    # of twelve, the quick form opens eight
    for mask in masks:
        save(disc(), mask)
        assert checked(pictures, full).errors == ()
        save(disc(0), mask)


def test_all_masks_of_an_image_count(pictures: Path) -> None:
    split = image_split(pictures, selection="paper")
    first, second = split.train[0]["label"], pictures / "second.png"
    save(disc(0), Path(first))
    several = [{"image": split.train[0]["image"], "label": [first, str(second)]}, *split.train[1:]]
    assert check_split(DataSplit(several, [], split.test, ""), ["lesion"]).errors == (f"{second}: no such file",)
    save(disc(), second)
    assert check_split(DataSplit(several, [], split.test, ""), ["lesion"]).warnings == ()
    save(disc(size=(40, 64)), second)
    report = check_split(DataSplit(several, [], split.test, ""), ["lesion"])
    assert report.errors == (f"{second}: 64×40 pixels, the image t0.png 64×48; image and mask must have the same size",)


def test_images_that_show_nothing(pictures: Path) -> None:
    colours = np.ones((*SIZE, 1), np.uint8) * np.array([250, 0, 3], np.uint8)
    save(colours, pictures / "train/images/t1.png")
    save(colours + np.random.default_rng(0).integers(0, 2, colours.shape, np.uint8), pictures / "val/images/v2.png")
    report = checked(pictures)
    assert report.warnings == ("t1 (training), v2 (test): the image shows nothing, all its values are nearly equal",)


def test_equal_images_within_and_across_parts(pictures: Path) -> None:
    train, val = pictures / "train/images", pictures / "val/images"
    shutil.copy(train / "t1.png", train / "t2.png")
    shutil.copy(train / "t3.png", val / "v1.png")
    expected = (
        "the same image more than once, in two parts: t3 (training) = v1 (test)",
        "the same image more than once, in one part: t1 (training) = t2 (training)",
    )
    assert checked(pictures, full=False).warnings == checked(pictures).warnings == expected
    # the same pixels in another file
    Image.fromarray(read(train / "t1.png")).save(train / "t2.png", compress_level=0)
    assert checked(pictures).warnings == expected
    assert checked(pictures, full=False).warnings == expected[:1]


def test_nearly_equal_images_are_listed(pictures: Path) -> None:
    train, val = pictures / "train/images", pictures / "val/images"
    first = read(train / "t1.png")
    marked = (first * 0.8).astype(np.uint8)
    marked[40:44, 50:56] = 255
    save(marked, val / "v1.png")
    save(np.asarray(Image.fromarray(read(train / "t3.png")).resize((100, 80))), train / "t4.png")
    save(disc(size=(80, 100)), pictures / "train/masks/t4.png")
    report = checked(pictures)
    assert {frozenset(map(str, two)) for two in report.near} == {
        frozenset(["t1 (training)", "v1 (test)"]),
        frozenset(["t3 (training)", "t4 (training)"]),
    }
    assert report.errors == ()
    assert report.warnings == (
        "nearly the same image twice, in two parts: t1 (training) ≈ v1 (test)",
        "nearly the same image twice, in one part: t3 (training) ≈ t4 (training)",
    )
    assert "pairs of nearly equal images: 2, in different parts: 1" in report.lines


def test_a_fingerprint_knows_a_picture_again_and_others_apart() -> None:
    original = picture(0, (240, 320))
    similar = {
        "grey": original.mean(axis=2).astype(np.uint8),
        "smaller": np.asarray(Image.fromarray(original).resize((130, 100))),
        "darker": (original * 0.5).astype(np.uint8),
        "noisy": np.clip(original + np.random.default_rng(0).normal(0, 20, original.shape), 0, 255).astype(np.uint8),
        "cropped": original[2:, 3:],
    }
    for change, array in similar.items():
        assert fingerprint(array) @ fingerprint(original) > NEAR, change
    # a dark spot in the middle is what lesions have in common
    shade = np.hypot(*(axis[:, :, None] - half for axis, half in zip(np.indices((240, 320)), (120, 160), strict=True)))
    lesions = [fingerprint((picture(seed, (240, 320)) * 0.3 + shade * 0.7).astype(np.uint8)) for seed in range(20)]
    assert np.triu(np.stack(lesions) @ np.stack(lesions).T, k=1).max() < NEAR


def test_one_file_in_two_parts_is_an_error_and_twice_in_one_a_warning(pictures: Path) -> None:
    split = image_split(pictures, selection="paper")
    leaking = DataSplit(split.train, split.train[3:4], split.test, "")
    assert check_split(leaking, ["lesion"]).errors == (
        f"{split.train[3]['image']}: is in the training and the validation part",
    )
    twice = check_split(DataSplit(split.train + split.train[3:4], [], split.test, ""), ["lesion"])
    assert (twice.errors, twice.warnings[0]) == ((), "t11: more than once in the same part")
    # as published, the model is chosen on the test part
    assert check_split(split, ["lesion"]).errors == ()


def test_empty_parts() -> None:
    report = check_split(DataSplit([], [], [], ""), ["lesion"], full=True)
    assert report.errors == ("there is nothing to train on",)
    assert report.warnings == ("there is nothing to test on",)


@pytest.mark.parametrize(
    ("mode", "opens"), [("quick", True), (True, True), ("full", True), ("FALSE", False), (False, False)]
)
def test_modes(mode: str | bool, opens: bool, caplog: pytest.LogCaptureFixture, pictures: Path) -> None:
    caplog.set_level(logging.INFO)
    check_data(image_split(pictures, selection="paper"), LabelSet(["lesion"]), mode)
    assert bool(caplog.records) == opens
    if opens:
        everything = "everything" if mode == "full" else "a sample"
        assert caplog.messages[0].startswith(f"data checked, {everything} opened: training")


@pytest.mark.parametrize("mode", ["fast", None, 1])
def test_unknown_modes_are_refused(mode: Any) -> None:
    with pytest.raises(InputError, match="check_data must be one of quick, full, false, true, not "):
        check_data(DataSplit([], [], [], ""), ["lesion"], mode)


# CT


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    """Three cases of four slices to train on, two volumes to test on; the first slice of each shows air only."""
    for folder in ("train_npz", "test_vol_h5", "lists/lists_Synapse"):
        (tmp_path / folder).mkdir(parents=True)
    slices, volumes = [], []
    for case in range(1, 6):
        image = np.random.default_rng(case).random((4, 16, 20)).astype(np.float32)
        label = np.zeros(image.shape, np.uint8)
        image[0] = 0
        label[2, 3:9, 3:9] = 1 + case % 2
        name = f"case000{case}"
        if case < 4:
            slices += [f"{name}_slice{index:03d}" for index in range(4)]
            for file, one, classes in zip(slices[-4:], image, label, strict=True):
                np.savez(tmp_path / "train_npz" / f"{file}.npz", image=one, label=classes)
        else:
            volumes.append(name)
            with h5py.File(tmp_path / "test_vol_h5" / f"{name}.npy.h5", "w") as file:
                file["image"], file["label"] = image, label
    (tmp_path / "lists/lists_Synapse/train.txt").write_text("\n".join(slices))
    (tmp_path / "lists/lists_Synapse/test_vol.txt").write_text("\n".join(volumes))
    return tmp_path


def ct_report(folder: Path, full: bool = True) -> DataReport:
    return check_split(synapse_split(folder, val_cases=1), ["liver", "spleen"], full)


def test_good_ct_is_summed_up(ct: Path) -> None:
    report = ct_report(ct)
    assert (report.errors, report.warnings) == ((), ())
    assert report.lines[0] == "data checked, everything opened: training 8 of 8, validation 4 of 4, test 2 of 2"
    assert report.lines[3] == "test: liver in 1, spleen in 1 of 2 opened"
    assert "images that show nothing: 3" in report.lines
    assert ct_report(ct, full=False).warnings == ()


def test_bad_slices_and_volumes_are_errors(ct: Path) -> None:
    slices, (first, second) = sorted(ct.glob("train_npz/*")), sorted(ct.glob("test_vol_h5/*"))
    image, label = np.zeros((16, 20), np.float32), np.zeros((16, 20), np.uint8)
    np.savez(slices[0], label=label)
    np.savez(slices[1], image=image - 700, label=label)
    np.savez(slices[2], image=image, label=label + 3)
    np.savez(slices[3], image=image, label=label[1:])
    first.write_bytes(first.read_bytes()[:1000])
    with h5py.File(second, "r+") as file:
        file["label"][2, 0, 0] = 7
    report = ct_report(ct)
    assert len(report.errors) == 6
    for file in (*slices[:4], first, second):
        assert sum(line.startswith(f"{file}: ") for line in report.errors) == 1, file
    assert f"{slices[2]}: holds 3, the classes are 1 … 2" in report.errors
    assert f"{second}: holds 7, the classes are 1 … 2" in report.errors


def test_one_case_under_two_names(ct: Path) -> None:
    split = synapse_split(ct, selection="paper")
    with h5py.File(split.test[0]["image"], "r+") as file:
        for index, item in enumerate(split.train[:4]):
            file["image"][index] = np.load(item["image"])["image"]
    report = check_split(split, ["liver", "spleen"], full=True)
    assert report.warnings == (
        "the same image more than once, in two parts: case0001_slice001 (training) = case0004 (test)",
    )


def test_one_case_in_two_parts(ct: Path) -> None:
    split = synapse_split(ct, selection="paper")
    volume = ct / "test_vol_h5/case0001.npy.h5"
    shutil.copy(split.test[0]["image"], volume)
    both = DataSplit(split.train, [], [{"image": str(volume), "label": str(volume)}], "")
    for full in (False, True):
        warnings = check_split(both, ["liver", "spleen"], full).warnings
        assert warnings == ("case0001 (test, training): the same case in two parts, results on it mean nothing",)


def test_a_case_without_any_organ(ct: Path) -> None:
    for file in sorted(ct.glob("train_npz/case0002*")):
        np.savez(file, image=np.load(file)["image"], label=np.zeros((16, 20), np.uint8))
    with h5py.File(ct / "test_vol_h5/case0005.npy.h5", "r+") as file:
        file["label"][...] = 0
    split = synapse_split(ct, selection="paper")
    nothing = "case0002 (training), case0005 (test): the mask marks nothing"
    assert check_split(split, ["liver", "spleen"], full=True).warnings == (nothing, "no training image shows liver")
    assert check_split(split, ["liver", "spleen"]).warnings == ("case0005 (test): the mask marks nothing",)


def test_masks_that_may_be_inverted_are_named(pictures: Path) -> None:
    for number in (1, 2):
        file = pictures / f"train/masks/t{number}.png"
        mask = np.asarray(Image.open(file))
        save(255 - mask if number == 1 else np.full_like(mask, 255), file)
    for full in (True, False):
        split = image_split(pictures, selection="paper")
        chosen = [item for item in split.train if Path(item["image"]).stem in ("t1", "t2", "t3")]
        report = check_split(DataSplit(chosen, [], split.test, ""), ["lesion"], full)
        (line,) = [line for line in report.warnings if "inverted" in line]
        assert line.startswith("t1 (training), t2 (training): ")


def test_a_turn_that_sizes_do_not_tell_is_said(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("transforms.pictures._said", set())
    file = pictures / "train/images/t1.png"
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(file).save(file, exif=exif)
    checked(pictures)
    assert "its EXIF orientation (3) turns or mirrors it" in caplog.text
