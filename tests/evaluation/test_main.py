import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import h5py
import nibabel as nib
import numpy as np
import pytest
from medpy.metric import binary
from monai.data import MetaTensor
from numpy.typing import NDArray
from PIL import Image

from evaluation import files
from evaluation.__main__ import main
from evaluation.metrics import confusion
from evaluation.protocols import pooled
from evaluation.results import read_pictures
from transforms import SPL_AFFINE, SaveImageVolume, read_volume

SPL = np.array([[0.0, 0, -0.8, 9], [0, -0.9, 0, 5], [3, 0, 0, -7], [0, 0, 0, 1]])  # 3 × 0.9 × 0.8 mm


def blobs(seed: int, shape: tuple[int, ...] = (6, 16, 20), classes: int = 2) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for index in range(1, classes + 1):
        corner = [rng.integers(0, size // 2) for size in shape]
        label[tuple(slice(start, start + size // 3 + 1) for start, size in zip(corner, shape, strict=True))] = index
    return label


def save_h5(path: Path, label: NDArray[Any], affine: NDArray[Any] | None = None) -> None:
    with h5py.File(path, "w") as file:
        file["image"], file["label"] = np.zeros(label.shape, np.float32), label
        if affine is not None:
            file.attrs["affine"], file.attrs["spacing_mm"] = affine, np.linalg.norm(affine[:3, :3], axis=0)


def save_nifti(path: Path, label: NDArray[Any], affine: NDArray[Any] = SPL) -> None:
    """Saved in the orientation that NIfTI files usually have, not in that of the array."""
    nib.save(nib.as_closest_canonical(nib.Nifti1Image(label, affine)), path)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    for name in ("predictions", "labels"):
        (tmp_path / name).mkdir()
    return tmp_path / "predictions", tmp_path / "labels"


def protocols(*arguments: object) -> dict[str, Any]:
    """What summary.json says of each protocol."""
    *_, output = arguments
    main([str(argument) for argument in arguments])
    return json.loads(Path(str(output), "summary.json").read_text())["protocols"]


def failure(*arguments: object) -> str:
    with pytest.raises(SystemExit) as error:
        main([str(argument) for argument in arguments])
    message = str(error.value)
    assert message.startswith("error: ")
    assert "\n" not in message
    return message


def test_volumes_of_two_formats_and_orientations(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    predictions, labels = folders
    pairs = [(blobs(i), blobs(i + 10)) for i in range(2)]
    for i, (prediction, label) in enumerate(pairs):
        save_nifti(predictions / f"case000{i}.npy_pred.nii.gz", prediction)
        save_h5(labels / f"case000{i}.npy.h5", label, SPL)
    options = "--classes", "liver", "spleen", "--title", "two", "--output", tmp_path / "report"
    strict = protocols(predictions, labels, *options)["strict"]
    printed = capsys.readouterr().out
    assert "two: 2 cases" in printed
    assert f"written: {tmp_path / 'report' / 'metrics.csv'}" in printed
    for index, name in enumerate(("liver", "spleen"), start=1):
        masks = [(p == index, t == index) for p, t in pairs]
        assert strict["classes"][name]["dice"]["mean"] == pytest.approx(np.mean([binary.dc(*m) for m in masks]))
        mm = np.mean([binary.hd95(*m, (3, 0.9, 0.8)) for m in masks])
        assert strict["classes"][name]["hd95"]["mean"] == pytest.approx(mm)


def test_labels_may_number_their_classes_in_another_way(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    label = blobs(1)
    raw = np.array([0, 11, 4], np.uint8)[label]
    raw[0, 0, 0] = 7  # an organ that is not asked for
    (predictions / "img0001").mkdir()
    save_nifti(predictions / "img0001" / "img0001_trans.nii.gz", label)
    save_nifti(labels / "label0001.nii.gz", raw)
    message = failure(predictions, labels)
    assert "the labels hold classes up to 11, the predictions up to 2" in message
    assert "--label-ids" in message
    strict = protocols(predictions, labels, "--label-ids", 11, 4, "--output", tmp_path)["strict"]
    assert {name: value["dice"]["mean"] for name, value in strict["classes"].items()} == {"class 1": 1, "class 2": 1}
    save_nifti(predictions / "img0001" / "img0001_trans.nii.gz", raw)
    message = failure(predictions, labels, "--label-ids", 11, 4)
    assert "img0001_trans.nii.gz: holds classes up to 11, --label-ids numbers 2; leave --label-ids out" in message
    assert protocols(predictions, labels, "--output", tmp_path)["strict"]["mean"]["dice"]["mean"] == 1
    assert "--classes names 1 classes, --label-ids numbers 2" in failure(
        predictions, labels, "--classes", "liver", "--label-ids", 11, 4
    )


def test_btcv_stands_for_the_numbers_and_names_of_its_labels(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    label = np.repeat(np.arange(9, dtype=np.uint8), 60).reshape(9, 6, 10)
    save_nifti(predictions / "img0001_pred.nii.gz", label)
    save_nifti(labels / "label0001.nii.gz", np.array([0, 8, 4, 3, 2, 6, 11, 1, 7], np.uint8)[label])
    strict = protocols(predictions, labels, "--label-ids", "btcv", "--output", tmp_path)["strict"]
    assert (strict["mean"]["dice"]["mean"], strict["mean"]["dice"]["classes"]) == (1, 8)
    assert list(strict["classes"])[-2:] == ["spleen", "stomach"]
    for words in (["btvc"], ["btcv", 1], [1, 0], [3, 3], [-1]):
        assert "--label-ids takes btcv, or different numbers above 0" in failure(
            predictions, labels, "--label-ids", *words
        )


def test_released_volumes_take_the_spacing_that_is_given(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    pair = blobs(0), blobs(1)
    for folder, label in zip(folders, pair, strict=True):
        save_h5(folder / "a.npy.h5", label)
    for spacing, options in ((None, ()), ((3, 1, 1), ("--spacing", 3, 1, 1))):
        strict = protocols(predictions, labels, *options, "--output", tmp_path)["strict"]
        assert strict["distance_unit"] == ("mm" if spacing else "voxels")
        expected = binary.hd95(*(label == 1 for label in pair), spacing)
        assert strict["classes"]["class 1"]["hd95"]["mean"] == pytest.approx(expected)
    for wrong in (0, -1, "nan", "inf"):
        assert "--spacing takes three sizes above 0 mm" in failure(predictions, labels, "--spacing", 3, wrong, 1)


def test_one_millimetre_is_a_known_spacing(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pair = blobs(0), blobs(1)
    for folder, label in zip(folders, pair, strict=True):
        save_nifti(folder / "a.nii.gz", label, np.diag([1, 1, 1, 1]))
    strict = protocols(*folders, "--output", tmp_path)["strict"]
    assert strict["distance_unit"] == "mm"
    assert "left out" not in strict["rules"]
    expected = binary.hd95(*(label == 1 for label in pair), (1, 1, 1))
    assert strict["classes"]["class 1"]["hd95"]["mean"] == pytest.approx(expected)


def test_masks_of_released_volumes_claim_no_millimetres(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    label = blobs(0)
    save_h5(labels / "case0001.npy.h5", label)
    item = MetaTensor(label[None], SPL_AFFINE, {"filename_or_obj": "case0001.npy.h5", "geometry": "assumed"})
    SaveImageVolume(predictions)(item)
    strict = protocols(predictions, labels, "--output", tmp_path)["strict"]
    assert strict["distance_unit"] == "voxels"
    # and lie nowhere, so that they can be compared with the raw label too
    save_nifti(labels / "case0001.nii.gz", label)
    (labels / "case0001.npy.h5").unlink()
    assert protocols(predictions, labels, "--output", tmp_path)["strict"]["mean"]["dice"]["mean"] == 1


def test_labels_between_whole_numbers(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prediction, label = (folder / "a.nii.gz" for folder in folders)
    save_nifti(prediction, blobs(0) * 0.99999)
    save_nifti(label, blobs(0) * np.float32(1.000011))
    strict = protocols(prediction, label, "--output", tmp_path)["strict"]
    assert strict["mean"]["dice"]["mean"] == 1
    for wrong in (blobs(0) * 0.9, blobs(0) - 1.0, np.where(blobs(0), np.nan, 0), blobs(0) * 1e6):
        for file in (prediction, label):
            save_nifti(prediction, blobs(0))
            save_nifti(label, blobs(0))
            save_nifti(file, wrong)
            message = failure(prediction, label, "--classes", "a", "b")
            assert f"{file}: " in message
            assert "class numbers" in message


def test_one_bad_pair_does_not_stop_the_others(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    predictions, labels = folders
    for case in range(5):
        save_nifti(predictions / f"{case}_pred.nii.gz", blobs(case))
        save_nifti(labels / f"{case}.nii.gz", blobs(case + 1))
    (predictions / "1_pred.nii.gz").write_bytes((labels / "1.nii.gz").read_bytes()[:-5])
    save_nifti(labels / "3.nii.gz", blobs(4, classes=2) * 7)
    for name in ("._0.nii.gz", "notes.txt", "picture.png"):
        (labels / name).touch()
    arguments = [str(folder) for folder in folders] + ["--classes", "a", "b", "--output", str(tmp_path / "report")]
    with pytest.raises(SystemExit) as error, caplog.at_level("INFO"):
        main(arguments)
    first, *lines = str(error.value).splitlines()
    assert first == "error: 2 cases could not be scored:"
    assert [line.partition(": ")[0] for line in lines] == [
        str(predictions / "1_pred.nii.gz"),
        str(labels / "3.nii.gz"),
    ]
    assert "Evaluation: 3 cases, 2 more could not be scored" in capsys.readouterr().out
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert (summary["cases"], list(summary["failures"])) == (3, [str(labels / f"{case}.nii.gz") for case in (1, 3)])
    found = [binary.dc(blobs(case) == 1, blobs(case + 1) == 1) for case in (0, 2, 4)]
    assert summary["protocols"]["strict"]["classes"]["a"]["dice"]["mean"] == pytest.approx(np.mean(found))
    assert "passed over: 1 hidden, 1 *.txt, 1 *.png" in caplog.text
    # Without --classes too, where the labels are read for their number.
    save_nifti(labels / "3.nii.gz", blobs(4))
    with pytest.raises(SystemExit, match="error: .*1_pred.nii.gz: not a readable"):
        main(arguments[:2])
    for case in range(5):
        (predictions / f"{case}_pred.nii.gz").write_bytes(b"no volume")
    with pytest.raises(SystemExit, match="0_pred.nii.gz: not a readable"):
        main(arguments[:2])
    with pytest.raises(SystemExit, match="5 cases could not be scored"):
        main(arguments)


def test_files_of_a_pair_are_one_volume(folders: tuple[Path, Path], tmp_path: Path) -> None:
    label = blobs(0)
    for folder in folders:
        nib.save(nib.Nifti1Pair(label, SPL), folder / "a.hdr")
        assert len(list(folder.iterdir())) == 2
    assert protocols(*folders, "--output", tmp_path)["strict"]["mean"]["dice"]["mean"] == 1


def test_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    pairs = [(blobs(i, (30, 40), 1), blobs(i + 5, (30, 40), 1)) for i in range(3)]
    for i, (prediction, label) in enumerate(pairs):
        Image.fromarray(prediction * 255).save(predictions / f"ISIC_000{i}.png")
        Image.fromarray(label * 255).convert("RGB").save(labels / f"ISIC_000{i}_segmentation.png")
    found = protocols(predictions, labels, "--output", tmp_path)["pooled"]["classes"]["lesion"]
    expected = pooled([confusion(p == 1, t == 1) for p, t in pairs])
    assert {key: found[key]["mean"] for key in expected} == pytest.approx(expected)
    for option in (("--label-ids", 1), ("--spacing", 3, 1, 1)):
        assert "--label-ids and --spacing are for volumes" in failure(predictions, labels, *option)


def test_label_maps_of_images(folders: tuple[Path, Path], tmp_path: Path) -> None:
    files = [folders[0] / "mine.png", folders[1] / "eye.png"]  # two files need no common name
    pair = blobs(0, (30, 40)), blobs(1, (30, 40))
    for file, label in zip(files, pair, strict=True):
        Image.fromarray(label).save(file)
    found = protocols(*files, "--classes", "cup", "disc", "--output", tmp_path)["pooled"]["classes"]
    for index, name in enumerate(("cup", "disc"), start=1):
        expected = pooled([confusion(*(label == index for label in pair))])
        assert found[name]["iou"]["mean"] == pytest.approx(expected["iou"])
    colours = np.zeros((30, 40, 3), np.uint8)
    colours[:9, :9], colours[9:, 9:] = (255, 0, 0), (0, 255, 0)
    Image.fromarray(colours).save(files[1])
    # the option as this command spells it, in what is kept too
    assert "say with --label-map which is which" in failure(*files)
    assert "say with --label-map which class" in failure(files[0], files[0], "--label-map", "0:0", "1:1")


def test_missing_and_unpaired_files_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    assert "does not exist" in failure(predictions, tmp_path / "nowhere")
    assert f"{labels}: is or holds no" in failure(predictions, labels)
    save_nifti(labels / "a.nii", blobs(0))
    assert f"{predictions}: is or holds no" in failure(predictions, labels)
    for name in ("a", "b"):
        save_nifti(predictions / f"{name}.nii.gz", blobs(1))
    assert f"no label of the same name for {predictions / 'b.nii.gz'}" in failure(predictions, labels)


def test_affines_are_compared_in_voxels(folders: tuple[Path, Path], tmp_path: Path) -> None:
    prediction, label = (folder / "a.nii.gz" for folder in folders)
    for affine in (SPL, SPL / [3, 0.9, 0.8, 1]):  # the second has voxels of 1 mm
        for row, column, change, fits in [
            (0, 3, 4, False),
            (0, 3, 0.1, False),
            (0, 3, 2e-3, True),
            (2, 3, 2e-3, True),
            (1, 1, 0.01, False),
            (1, 1, 1e-3, True),
        ]:
            other = affine.copy()
            other[row, column] += change
            save_nifti(prediction, blobs(0), other)
            save_nifti(label, blobs(0), affine)
            if fits:
                assert protocols(*folders, "--output", tmp_path)["strict"]["mean"]["dice"]["mean"] == 1
            else:
                assert "lies elsewhere in space than" in failure(*folders)


def test_another_voxel_size_is_named(folders: tuple[Path, Path]) -> None:
    save_nifti(folders[0] / "a.nii.gz", blobs(0), SPL * [2, 1, 1, 1])
    save_nifti(folders[1] / "a.nii.gz", blobs(0), SPL)
    line = failure(*folders)
    assert "voxels of 6 × 0.9 × 0.8 mm, not 3 × 0.9 × 0.8; resample it to the label's grid" in line


@pytest.mark.parametrize("both", [False, True])
def test_huge_numbers_are_no_classes(folders: tuple[Path, Path], tmp_path: Path, both: bool) -> None:
    for number, folder in enumerate(folders):
        save_nifti(folder / "a.nii.gz", blobs(0))
        label = blobs(1).astype(np.int32)
        label[label == 2] = 30_000 if both or number == 0 else 2
        save_nifti(folder / "b.nii.gz", label)
    line = failure(*folders, "--output", tmp_path)
    assert "b.nii.gz: holds class numbers up to 30000, unnamed ones may go up to 255; number the classes 1, 2" in line
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["cases"], summary["classes"]) == (1, ["class 1", "class 2"])


def test_affines_between_two_orientations(folders: tuple[Path, Path], tmp_path: Path) -> None:
    half = np.sqrt(0.5)
    affine = np.array([[half, -half, 0, 0], [half, half, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for tilt in (-1e-5, 1e-5):  # which axis is nearest to left and right hangs on the last digits
        for folder, change in zip(folders, (tilt, -tilt), strict=True):
            nib.save(nib.Nifti1Image(blobs(0), affine + np.diag([change, -change, 0, 0])), folder / "a.nii.gz")
        assert protocols(*folders, "--output", tmp_path)["strict"]["mean"]["dice"]["mean"] == 1


def test_what_does_not_fit_is_named(folders: tuple[Path, Path]) -> None:
    prediction, label = (folder / "a.nii.gz" for folder in folders)
    save_nifti(label, blobs(0))
    save_nifti(prediction, blobs(0, (7, 16, 20)))
    assert "shape" in failure(*folders)
    save_nifti(prediction, blobs(0))
    assert "holds values from 0 to 2; with 1 named" in failure(*folders, "--classes", "liver")
    prediction.write_bytes(b"no volume")
    assert "a.nii.gz: not a readable NIfTI file" in failure(*folders)


def test_only_the_output_is_written_and_named_where_it_cannot_be(folders: tuple[Path, Path], tmp_path: Path) -> None:
    for folder in folders:
        save_nifti(folder / "a.nii.gz", blobs(0))
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    assert str(tmp_path / "file") in failure(*folders, "--output", tmp_path / "file")
    main([str(folder) for folder in folders])
    assert sorted(tmp_path.rglob("*")) == before


def save_masks(folder: Path, masks: Sequence[NDArray[Any]], name: str = "{}.png") -> None:
    for index, mask in enumerate(masks):
        Image.fromarray(mask.astype(np.uint8)).save(folder / name.format(index))


@pytest.mark.parametrize("numbers", [(0, 1, 2), (0, 85, 170), (0, 128, 255)])
def test_pictures_of_several_classes_are_not_one_class(
    folders: tuple[Path, Path], tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    predictions, labels = folders
    stored = np.array(numbers)
    masks = [blobs(i, (30, 40)) for i in range(3)]
    assert all(mask.max() == 2 for mask in masks)
    save_masks(labels, [stored[mask] for mask in masks])
    save_masks(predictions, [stored[np.where(mask == 1, 1, 0)] for mask in masks])  # the second class is never found
    with pytest.raises(SystemExit) as error:
        main([str(predictions), str(labels)])
    assert "3 cases could not be scored" in str(error.value)
    names = "--classes", "cup", "disc", "--label-map", *(f"{number}:{index}" for index, number in enumerate(numbers))
    found = protocols(predictions, labels, *names, "--output", tmp_path)["per image"]["classes"]
    assert found["cup"]["iou"]["mean"] == pytest.approx(1)
    assert found["disc"]["iou"]["mean"] < 0.01
    named = protocols(predictions, labels, *names[3:], "--output", tmp_path)["per image"]["classes"]
    assert list(named) == ["class 1", "class 2"]


def test_pictures_that_hold_one_class_each_are_not_one_class(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    mask = blobs(0, (30, 40), 1)
    for numbers in ((85, 170), (1, 2), (1, 255)):
        save_masks(labels, [mask * number for number in numbers])
        save_masks(predictions, [mask * 255 for _ in numbers])
        line = failure(predictions, labels)
        assert re.search(rf"the labels hold {numbers[0]} \(\S+\), {numbers[1]} \(\S+\) beside the background", line)
    found = protocols(predictions, labels, "--classes", "lesion", "--output", tmp_path)["pooled"]
    assert found["classes"]["lesion"]["iou"]["mean"] == 1


def test_label_files_of_one_picture_are_merged(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    parts = np.zeros((2, 20, 30), np.uint8)
    parts[0, 2:8, 2:9], parts[1, 11:17, 15:25] = 255, 255
    save_masks(labels, [parts[0], parts[0]], "benign ({})_mask.png")
    save_masks(labels, [parts[1]], "benign ({})_mask_1.png")
    save_masks(predictions, [parts.max(0), parts[0]], "benign ({}).png")
    found = protocols(predictions, labels, "--output", tmp_path)["per image"]["classes"]["lesion"]
    assert (found["iou"]["mean"], found["iou"]["n"]) == (pytest.approx(1), 2)


def test_files_without_a_partner_are_listed_and_the_others_scored(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, labels = folders
    save_masks(predictions, [blobs(i, (20, 30), 1) * 255 for i in range(4)], "{}_pred.png")
    save_masks(labels, [blobs(i, (20, 30), 1) * 255 for i in range(5)])
    (labels / "0.png").unlink()
    with pytest.raises(SystemExit) as error:
        main([str(predictions), str(labels), "--output", str(tmp_path / "report")])
    assert str(error.value).splitlines() == [
        "error: 2 cases could not be scored:",
        f"no label of the same name for {predictions / '0_pred.png'}",
        f"no prediction of the same name for {labels / '4.png'}",
    ]
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert (summary["cases"], len(summary["failures"])) == (3, 2)
    assert "3 cases, 2 more could not be scored" in capsys.readouterr().out


def test_every_file_is_read_once(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(3):
        for folder, seed in zip(folders, (0, 1), strict=True):
            save_nifti(folder / f"{index}.nii.gz", blobs(index + seed))
    read = []
    monkeypatch.setattr(files, "read_volume", lambda path, *rest: (read.append(path), read_volume(path, *rest))[1])
    main([str(folder) for folder in folders])
    assert sorted(read) == sorted(path for folder in folders for path in folder.iterdir())


def test_processes_and_engines_give_the_same(folders: tuple[Path, Path], tmp_path: Path) -> None:
    predictions, labels = folders
    for index in range(3):
        save_nifti(predictions / f"{index}.nii.gz", blobs(index))
        save_nifti(labels / f"{index}.nii.gz", blobs(index + 1))
    (predictions / "1.nii.gz").write_bytes(b"no volume")
    written = []
    for options in (["--jobs", "1"], ["--jobs", "2"], ["--engine", "medpy"]):
        with pytest.raises(SystemExit, match="1.nii.gz: not a readable"):
            main([str(predictions), str(labels), *options, "--output", str(tmp_path / "report")])
        summary = json.loads((tmp_path / "report" / "summary.json").read_text())
        assert summary["engine"] == ("medpy" if "medpy" in options else "fast")
        written.append((tmp_path / "report" / "metrics.csv").read_text())
    assert written[0] == written[1]
    for one, other in zip(written[0].splitlines()[1:], written[2].splitlines()[1:], strict=True):
        for fast, slow in zip(one.split(","), other.split(","), strict=True):
            assert fast == slow or float(fast) == pytest.approx(float(slow), abs=1e-6)


def test_options_reach_the_rules(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predictions, labels = folders
    prediction, label = np.zeros((2, 6, 16, 20), np.uint8)
    prediction[1:3, 2:6, 2:6] = label[1:3, 2:6, 2:6] = 1
    prediction[5, 15, 19], label[4, 8:12, 8:12] = 1, 2
    save_nifti(predictions / "a.nii.gz", prediction)
    save_nifti(labels / "a.nii.gz", label)
    names, tolerances = ("--classes", "liver", "left kidney"), ("--tolerance", "1", "left kidney:3")
    options = *names, *tolerances, "--missed-distance", "diagonal", "--postprocess", "largest", "--output", tmp_path
    strict = protocols(predictions, labels, *options)["strict"]
    assert "liver 1 mm, left kidney 3 mm" in strict["rules"]
    assert strict["classes"]["liver"]["dice"]["mean"] == 1
    size = np.linalg.norm(np.multiply(label.shape, (3, 0.9, 0.8)))
    assert strict["classes"]["left kidney"]["hd95"]["mean"] == pytest.approx(size)
    assert "Post-processed" in capsys.readouterr().out
    assert "a tolerance for spleen" in failure(predictions, labels, *names, "--tolerance", "spleen:3")
    assert "--tolerance of a class needs --classes" in failure(predictions, labels, "--tolerance", "spleen:3")
    assert "--tolerance takes numbers" in failure(predictions, labels, "--tolerance", "-1")
    assert "--label-map is for pictures" in failure(predictions, labels, "--label-map", "0:0", "1:1")


def test_probabilities_and_images_beside_their_masks_are_passed_over(
    folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    masks = [blobs(seed, (20, 24), 1) for seed in range(2)]
    mine, theirs = folders
    save_masks(mine, masks, "{}_mask.png")
    expected = protocols_of_raw(folders, masks, tmp_path / "plain")
    for number in range(2):
        # what `inferring --probabilities true --overlay true` writes, and a raw download
        save_masks(mine, [np.full((20, 24), 77, np.uint8)] * 2, "{}_probability.png")
        save_masks(mine, [np.full((20, 24, 3), 88, np.uint8)] * 2, "{}_overlay.png")
        save_masks(theirs, [np.full((20, 24, 3), 9 + number, np.uint8)] * 2, "{}.png")
    caplog.set_level("INFO")
    assert protocols_of_raw(folders, masks, tmp_path / "with") == expected
    assert "2 *_probability" in caplog.text
    assert "2 *_overlay" in caplog.text
    assert "2 image beside its mask" in caplog.text


def protocols_of_raw(folders: tuple[Path, Path], masks: Sequence[NDArray[Any]], output: Path) -> dict[str, Any]:
    """The results against labels in two files each, as BUSI has them."""
    above = np.arange(20)[:, None] < 10
    save_masks(folders[1], [mask * above for mask in masks], "{}_mask.png")
    save_masks(folders[1], [mask * ~above for mask in masks], "{}_mask_1.png")
    main([*map(str, folders), "--output", str(output)])
    return json.loads((output / "summary.json").read_text())["protocols"]


def test_an_output_that_cannot_be_is_refused_before_the_work(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_nifti(folders[0] / "a.nii.gz", blobs(0))
    save_nifti(folders[1] / "a.nii.gz", blobs(0))
    monkeypatch.setattr("evaluation.__main__.evaluate", lambda options: pytest.fail("the work was begun"))
    for words in ((*folders,), ("compare", *folders)):
        line = failure(*words, "--output", folders[0] / "a.nii.gz" / "o")
        assert "a.nii.gz: is a file, not a folder to write to" in line


def test_images_are_shown_on_the_grid_of_the_labels(tmp_path: Path) -> None:
    label = np.zeros((30, 20), np.uint8)
    label[5:15, 4:14] = 255
    image = np.zeros((30, 20), np.uint8)
    image[:, 10:] = 200
    for folder, name, array in (("P", "a.png", label), ("L", "a_mask.png", label), ("I", "a.png", image)):
        (tmp_path / folder).mkdir()
        Image.fromarray(array).save(tmp_path / folder / name)
    Image.fromarray(label).save(tmp_path / "I" / "a_mask.png")
    arguments = [str(tmp_path / "P"), str(tmp_path / "L"), "--output", str(tmp_path / "R"), "--images"]
    main([*arguments, str(tmp_path / "I")])
    (picture,) = read_pictures(tmp_path / "R").values()
    shown = np.asarray(Image.open(io.BytesIO(picture)).convert("L")).astype(int)
    # the whole image, dark at the left, bright at the right
    assert shown.shape == (256, 171)
    assert shown[200:, :70].mean() < 30
    assert shown[200:, 100:].mean() > 170
    Image.fromarray(image[:20]).save(tmp_path / "I" / "a.png")
    with pytest.raises(SystemExit, match=r"I.a.png: shape \(20, 20\), but .*a_mask.png has \(30, 20\)"):
        main([*arguments, str(tmp_path / "I")])
    (tmp_path / "O").mkdir()
    Image.fromarray(image).save(tmp_path / "O" / "b.png")
    with pytest.raises(SystemExit, match="no image of the same name"):
        main([*arguments, str(tmp_path / "O")])


def test_volumes_are_shown_over_their_image_whatever_its_orientation(tmp_path: Path) -> None:
    label = np.zeros((20, 24, 6), np.uint8)
    label[4:12, 5:15, 1:4] = 1
    image = np.where(np.arange(20)[:, None, None] < 10, -1000, 400) + np.zeros(label.shape)
    affine = np.diag([2.0, 2, 3, 1])
    for folder, array in (("P", label), ("L", label), ("I", image.astype(np.int16))):
        (tmp_path / folder).mkdir()
        volume = nib.Nifti1Image(array, affine)
        if folder == "I":
            volume = volume.as_reoriented([[1, -1], [0, 1], [2, -1]])
        nib.save(volume, tmp_path / folder / "c.nii.gz")
    main([str(tmp_path / one) for one in "PL"] + ["--output", str(tmp_path / "R"), "--images", str(tmp_path / "I")])
    (picture,) = read_pictures(tmp_path / "R").values()
    shown = np.asarray(Image.open(io.BytesIO(picture)).convert("L")).astype(int)
    # the patient's right, where the air is, lies on the left
    halves = shown[:8].mean(0)
    assert sorted((halves[:20].mean() < 60, halves[-20:].mean() < 60)) == [False, True]
