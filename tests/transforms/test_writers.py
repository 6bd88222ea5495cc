from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import SaveImage, SaveImaged

from tests.helpers import read
from transforms import SaveImageMask, SaveImageMaskd, read_mask

RNG = np.random.default_rng(0)


def probabilities(channels: int, name: str = "a.b.jpg") -> MetaTensor:
    values = torch.from_numpy(RNG.random((channels, 7, 5), dtype=np.float32))
    return MetaTensor(values / values.sum(0) if channels > 1 else values, meta={"filename_or_obj": f"/in/{name}"})


def test_one_class_is_cut_at_one_half(tmp_path: Path) -> None:
    p = probabilities(1)
    p[0, 0, :2] = torch.tensor([0.5, 0.5001])
    assert SaveImageMask(tmp_path / "new/folder")(p) is p
    mask = read(tmp_path / "new/folder/a.b_mask.png")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, np.where(p[0].numpy() > 0.5, 255, 0))
    assert mask[0, :2].tolist() == [0, 255]
    assert [file.name for file in (tmp_path / "new/folder").iterdir()] == ["a.b_mask.png"]


@pytest.mark.parametrize(
    "label_map", [None, {0: 0, 85: 1, 170: 2, 255: 3}, {7: 0, 3: 2, 1: 3, 5: 1}, {0: 0, 999: 1, 1: 2, 2: 3}]
)
def test_of_several_classes_the_largest_wins_and_gets_its_number(
    tmp_path: Path, label_map: dict[int, int] | None
) -> None:
    p = probabilities(4)
    SaveImageMask(tmp_path, label_map)(p)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.b_mask.png", label_map, classes=3), p.numpy().argmax(0))


def test_numbers_that_share_a_class_and_one_class_with_its_number(tmp_path: Path) -> None:
    p = probabilities(1)
    SaveImageMask(tmp_path, {0: 0, 1: 0, 20: 1, 30: 1})(p)
    np.testing.assert_array_equal(read(tmp_path / "a.b_mask.png"), np.where(p[0].numpy() > 0.5, 20, 0))


def test_probabilities_on_request(tmp_path: Path) -> None:
    one, several = probabilities(1, "one.png"), probabilities(3, "several.png")
    save = SaveImageMaskd("pred", tmp_path, probabilities=True)
    for p in (one, several):
        assert save({"pred": p, "image": 1})["image"] == 1
    expected = {"one_probability.png": one[0], "several_probability_1.png": several[1],
                "several_probability_2.png": several[2]}  # fmt: skip
    assert {file.name for file in tmp_path.iterdir()} == {*expected, "one_mask.png", "several_mask.png"}
    for name, p in expected.items():
        assert np.abs(read(tmp_path / name) / 255 - p.numpy()).max() <= 0.5 / 255 + 1e-6


def test_monais_tools_know_the_writer_and_how_to_call_it(tmp_path: Path) -> None:
    save = SaveImageMaskd(["pred", "other"], tmp_path, allow_missing_keys=True)
    assert isinstance(save, SaveImaged)
    assert isinstance(save.saver, SaveImage)
    assert "SaveImage" in type(save).__name__
    array = probabilities(1).numpy()
    save({"pred": array, "pred_meta_dict": {"filename_or_obj": "in/c.png"}})
    save.saver(array, filename=tmp_path / "d")
    for _ in range(2):
        save({"pred": array})
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{name}_mask.png" for name in "23cd"]
    with pytest.raises(KeyError):
        SaveImageMaskd("other", tmp_path)({"pred": array})
