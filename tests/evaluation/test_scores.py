import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from medpy.metric import binary
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from evaluation.intervals import Mean
from evaluation.metrics import Confusion, confusion
from evaluation.protocols import per_image, pooled
from evaluation.results import as_dict, write_results
from evaluation.scores import ImageScores, VolumeScores
from evaluation.tables import grid, table
from tests.golden import fill
from tests.helpers import rows_of

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "losses_and_metrics.json").read_text())
CLASSES = ["liver", "spleen", "aorta"]
SPACING = (3.0, 0.8, 0.9)


def label_map(seed: int, shape: tuple[int, ...] = (6, 20, 24), classes: int = 3) -> NDArray[np.uint8]:
    """Blobs of the classes 0 … `classes`, all of which occur."""
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal(shape), 2)
    return np.digitize(noise, np.quantile(noise, np.linspace(0.6, 0.9, classes))).astype(np.uint8)


PAIRS = [(label_map(2 * i), label_map(2 * i + 1)) for i in range(2)]


def odd_pair() -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Spleen missed, aorta a false alarm, liver in neither."""
    prediction, label = np.zeros((2, 6, 20, 24), np.uint8)
    prediction[2, 3:9, 3:9], label[3, 4:8, 4:8] = 3, 2
    return prediction, label


@pytest.fixture
def volumes() -> VolumeScores:
    scores = VolumeScores(CLASSES, title="three volumes", selection="mean Dice of other cases")
    for i, pair in enumerate([*PAIRS, odd_pair()]):
        scores.add(f"/data/case{i}.nii.gz", *pair, SPACING)
    return scores


@pytest.fixture
def images() -> ImageScores:
    prediction = fill._noise("binary_logits", (3, 1, 40, 56), 0)[:, 0] > 0
    label = fill._noise("binary_target", (3, 1, 40, 56), 0)[:, 0] > 0.8
    scores = ImageScores(["lesion"])
    for i in range(3):
        scores.add(f"/data/image{i}.png", prediction[i].astype(np.uint8), label[i].astype(np.uint8))
    return scores


def test_class_means_are_those_of_medpy(volumes: VolumeScores) -> None:
    strict, paper = (as_dict(volumes.summary())["protocols"][key] for key in ("strict", "paper"))
    for index, name in enumerate(CLASSES, start=1):
        dice = [binary.dc(p == index, t == index) for p, t in PAIRS]
        mm = [binary.hd95(p == index, t == index, SPACING) for p, t in PAIRS]
        voxels = [binary.hd95(p == index, t == index) for p, t in PAIRS]
        scored = dice if name == "liver" else [*dice, 0]  # the odd case
        assert strict["classes"][name]["dice"]["mean"] == pytest.approx(statistics.mean(scored))
        assert strict["classes"][name]["dice"]["sd"] == pytest.approx(statistics.stdev(scored))
        assert strict["classes"][name]["hd95"]["mean"] == pytest.approx(statistics.mean(mm))
        published = [*dice, 1 if name == "aorta" else 0]
        assert paper["classes"][name]["dice"]["mean"] == pytest.approx(statistics.mean(published))
        assert paper["classes"][name]["hd95"]["mean"] == pytest.approx(statistics.mean([*voxels, 0]))
    assert (strict["distance_unit"], paper["distance_unit"]) == ("mm", "voxels")


def test_counts_are_stated(volumes: VolumeScores) -> None:
    strict, paper = (as_dict(volumes.summary())["protocols"][key] for key in ("strict", "paper"))
    assert [strict["classes"][name]["dice"]["n"] for name in CLASSES] == [2, 3, 3]
    assert [strict["classes"][name]["hd95"]["n"] for name in CLASSES] == [2, 2, 2]
    assert [paper["classes"][name][key]["n"] for name in CLASSES for key in ("dice", "hd95")] == [3] * 6
    for result in (strict, paper):
        assert [result["classes"][name]["missed"] for name in CLASSES] == [0, 1, 0]
        assert [result["classes"][name]["false_alarms"] for name in CLASSES] == [0, 0, 1]
        assert [result["classes"][name]["absent"] for name in CLASSES] == [1, 0, 0]


def test_mean_is_over_classes_after_cases(volumes: VolumeScores) -> None:
    mean = as_dict(volumes.summary())["protocols"]["strict"]["mean"]["dice"]
    classes = as_dict(volumes.summary())["protocols"]["strict"]["classes"]
    assert mean["mean"] == pytest.approx(statistics.mean(classes[name]["dice"]["mean"] for name in CLASSES))
    assert (mean["classes"], mean["cases"]) == (3, 3)
    cases = [statistics.mean(binary.dc(p == i, t == i) for i in (1, 2, 3)) for p, t in PAIRS]
    assert mean["sd_over_cases"] == pytest.approx(statistics.stdev([*cases, 0]))


def test_millimetres_and_voxels_are_not_averaged_together() -> None:
    scores = VolumeScores(CLASSES)
    scores.add("a", *PAIRS[0], SPACING)
    scores.add("b", *PAIRS[1])
    result = scores.summary().protocols["strict"]
    assert result.distance_unit == "mm"
    assert "left out of the means of HD95 and ASSD: 1" in result.rules
    prediction, label = PAIRS[0]
    expected = binary.hd95(prediction == 1, label == 1, SPACING)
    assert result.classes["liver"].metrics["hd95"] == Mean(pytest.approx(expected), None, 1)
    assert {row.score.distance_unit for row in scores.rows() if row.case == "b"} == {"voxels"}


def test_without_any_spacing_strict_is_in_voxels_and_says_so() -> None:
    scores = VolumeScores(CLASSES)
    scores.add("a", *PAIRS[0])
    strict, paper = (as_dict(scores.summary())["protocols"][key] for key in ("strict", "paper"))
    assert strict["distance_unit"] == "voxels"
    for key in ("dice", "hd95"):
        assert [strict["classes"][name][key] for name in CLASSES] == [paper["classes"][name][key] for name in CLASSES]
    assert "HD95 mm" not in table(scores.summary())


def test_nothing_scored_is_no_number() -> None:
    empty = np.zeros((2, 4, 4), np.uint8)
    scores = VolumeScores(["liver"])
    scores.add("a", empty, empty)
    strict = scores.summary().protocols["strict"]
    assert strict.mean["dice"].mean is None
    assert strict.classes["liver"].metrics["dice"] == Mean(None, None, 0)
    assert "n/a" in table(scores.summary())


def test_files_hold_what_was_scored(volumes: VolumeScores, tmp_path: Path) -> None:
    write_results(tmp_path / "new", volumes.summary(), volumes.rows())
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["metrics.csv", "report.html", "summary.json"]
    rows = rows_of(tmp_path / "new")
    assert list(rows[0])[:7] == ["case", "class", "protocol", "dice", "hd95", "distance_unit", "status"]
    assert len(rows) == 3 * len(CLASSES) * 2
    absent = next(row for row in rows if row["status"] == "absent" and row["protocol"] == "strict")
    assert (absent["case"], absent["class"], absent["dice"], absent["hd95"]) == ("case2", "liver", "", "")
    summary = json.loads((tmp_path / "new" / "summary.json").read_text())
    assert summary["selection"] == "mean Dice of other cases"
    assert summary["cases"] == 3
    assert summary["protocols"]["paper"]["rules"] != summary["protocols"]["strict"]["rules"]
    assert {"torch", "monai", "medpy"} <= summary["versions"].keys()


def test_tables_name_classes_rules_and_the_published_row() -> None:
    published = {"name": "VM-UNet", "dice": {"liver": 94.17, "mean": 81.08}}
    scores = VolumeScores(CLASSES, published=published)
    scores.add("a", *PAIRS[0], SPACING)
    lines = table(scores.summary()).splitlines()
    assert next(line for line in lines if line.startswith("liver")).endswith("94.17")
    assert next(line for line in lines if line.startswith("mean of classes")).endswith("81.08")
    assert all(any(line.startswith(name) for line in lines) for name in CLASSES)
    assert any(line.startswith("strict: ") for line in lines)
    assert any(line.startswith("paper: ") for line in lines)
    assert max(map(len, lines)) < 140
    scores = ImageScores(["lesion"], published={"name": "CMUNeXt", "iou": 71.56})
    scores.add("a", *(label_map(seed, (20, 24), 1) for seed in (0, 1)))
    assert next(line for line in table(scores.summary()).splitlines() if line.startswith("IoU")).endswith("71.56")


def test_equal_names_are_told_apart_by_their_folders() -> None:
    scores = VolumeScores(CLASSES)
    for file in ("/a/case.h5", "/b/case.h5", "/b/other.npy.h5"):
        scores.add(file, *PAIRS[0])
    assert [row.case for row in scores.rows()][:: 2 * len(CLASSES)] == ["/a/case.h5", "/b/case.h5", "other"]


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (np.full((2, 4, 4), 4, np.uint8), np.zeros((2, 4, 4), np.uint8), "prediction holds values from 4 to 4"),
        (np.zeros((2, 4, 4), np.uint8), np.full((2, 4, 4), -1), "label holds values from -1 to -1"),
        (np.full((2, 4, 4), 0.5), np.zeros((2, 4, 4), np.uint8), "prediction holds fractions"),
        (np.full((2, 4, 4), np.nan), np.zeros((2, 4, 4), np.uint8), "prediction holds values from nan"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros((3, 4, 4), np.uint8), r"shape \(2, 4, 4\), the label \(3, 4, 4\)"),
        (np.zeros((0, 4, 4), np.uint8), np.zeros((0, 4, 4), np.uint8), "prediction holds values from nan"),
    ],
)
def test_maps_that_do_not_fit_are_refused(prediction: NDArray[Any], label: NDArray[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^case7.nii.gz: .*{message}"):
        VolumeScores(CLASSES).add("case7.nii.gz", prediction, label)


def test_whole_numbers_may_come_as_floats_and_tensors() -> None:
    scores = VolumeScores(CLASSES)
    prediction, label = PAIRS[0]
    rows = scores.add("a", torch.from_numpy(prediction).float(), label.astype(np.float64))
    assert str(rows) == str(scores.add("a", *PAIRS[0]))


def test_classes_need_names() -> None:
    for classes in ([], ["liver", "liver"]):
        with pytest.raises(ValueError, match="different names"):
            VolumeScores(classes)


def test_golden_image_protocols(images: ImageScores) -> None:
    protocols = as_dict(images.summary())["protocols"]
    for key, expected in GOLDEN["cmunext_metrics_per_image_mean"].items():
        assert protocols["per image"]["classes"]["lesion"][key]["mean"] == pytest.approx(expected, rel=1e-12), key
        assert protocols["per image"]["mean"][key]["mean"] == pytest.approx(expected, rel=1e-12)
    names = {"f1_or_dsc": "dice", "miou": "iou"}
    for key, expected in GOLDEN["vmunet_isic_pooled"].items():
        found = protocols["pooled"]["classes"]["lesion"][names.get(key, key)]
        assert found["mean"] == pytest.approx(expected, rel=1e-12), key
        assert found["n"] == 3
    total = Confusion(*(sum(getattr(row.score, key) for row in images.rows()) for key in Confusion._fields))
    assert per_image(total) == pytest.approx(GOLDEN["cmunext_metrics_batch"], rel=1e-12)


def test_empty_images() -> None:
    empty, full = Confusion(0, 0, 0, 9), Confusion(0, 0, 9, 0)
    assert per_image(empty)["iou"] == 1
    assert per_image(empty)["f1"] == 0
    assert per_image(full)["iou"] == pytest.approx(0, abs=1e-5)
    assert pooled([empty]) == {"iou": 0, "dice": 0, "sensitivity": 0, "specificity": 1, "accuracy": 1}


def test_surface_metrics_leave_out_what_is_undefined() -> None:
    scores = ImageScores(["lesion"])
    mask, empty = np.zeros((9, 12), np.uint8), np.zeros((9, 12), np.uint8)
    mask[2:6, 3:8] = 1
    for i, pair in enumerate([(mask, mask), (empty, mask), (mask, empty), (empty, empty)]):
        scores.add(str(i), *pair)
    surface = scores.summary().protocols["surface"].classes["lesion"]
    assert surface.metrics["hd95_px"] == Mean(0, None, 1)
    share = surface.metrics["surface_dice"]
    assert (share.mean, share.sd, share.n) == (pytest.approx(1 / 3), pytest.approx(1 / math.sqrt(3)), 3)
    assert (surface.missed, surface.false_alarms, surface.absent) == (1, 1, 1)


def test_several_classes_of_images_are_averaged() -> None:
    scores = ImageScores(["cup", "disc"])
    pairs = [(label_map(i, (20, 30), 2), label_map(i + 9, (20, 30), 2)) for i in range(3)]
    for i, pair in enumerate(pairs):
        scores.add(str(i), *pair)
    counts = [[confusion(p == index, t == index) for p, t in pairs] for index in (1, 2)]
    expected = np.mean([[per_image(one)["f1"] for one in of_class] for of_class in counts])
    protocols = scores.summary().protocols
    assert protocols["per image"].mean["f1"].mean == pytest.approx(expected)
    assert protocols["pooled"].mean["iou"].mean == pytest.approx(
        np.mean([pooled(of_class)["iou"] for of_class in counts])
    )
    assert "cup: IoU %" in table(scores.summary())
    assert "disc: IoU %" in table(scores.summary())


def test_grid_aligns_columns() -> None:
    groups = [
        ("", [("class", ["liver", "", "all"])]),
        ("long heading", [("a", ["1", "", "22"]), ("b", ["3", "", "4"])]),
        ("", [("c", ["", "", "5"])]),
    ]
    assert grid(groups).splitlines() == [
        "        long heading",
        "class           a  b   c",
        "------------------------",
        "liver           1  3",
        "------------------------",
        "all            22  4   5",
    ]
