"""What the three bundles do: train, evaluate, predict, export; and what their configurations promise."""

import copy
import csv
import html
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import h5py
import jsonschema
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import yaml
from monai.bundle import ConfigParser
from monai.data import load_net_with_metadata
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from networks import CMUNeXt, FlipAverage, VMUNet
from tests.bundles.conftest import (
    BUNDLES,
    DATA,
    METRIC,
    OWN,
    PICTURES,
    ROOT,
    SMALL_VMUNET,
    TINY,
    Options,
    Run,
    command,
    config,
    parsed,
    refused,
    saved,
    succeeds,
    words,
)
from tests.bundles.test_recipes import RGB_MEAN, RGB_SD, l_shape
from tests.helpers import read, rows_of
from transforms import image_split, read_volume, reoriented

Trained = Callable[[str], tuple[Path, str]]
each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
each_picture_bundle = pytest.mark.parametrize("bundle", PICTURES)
SELECTION = {
    "cmunext_busi": "6 images to train on, model selected by IoU on held-out training images",
    "vmunet_isic": "7 images to train on, model selected by lowest loss on held-out training images",
    "vmunet_synapse": "24 images to train on, model selected by Dice on held-out training cases",
}
INPUT = {"cmunext_busi": "busi/images", "vmunet_isic": "isic17/val/images", "vmunet_synapse": "synapse/test_vol_h5"}
TEST_LIST = dict(zip(BUNDLES, ("busi_val1.txt", "val.txt", "lists/lists_Synapse/test_vol.txt"), strict=True))
ORGANS = ("aorta", "gallbladder", "left kidney", "right kidney", "liver", "pancreas", "spleen", "stomach")
STEPS = {"cmunext_busi": 2, "vmunet_isic": 2, "vmunet_synapse": 6}


# Training


@each_bundle
def test_training_says_what_it_does_and_leaves_checkpoints_and_curves(bundle: str, trained: Trained) -> None:
    folder, log = trained(bundle)
    assert SELECTION[bundle] in log
    assert len(re.findall(r"epoch [12]/2: train_loss \d", log)) == 2
    assert re.search(rf"best {METRIC[bundle]} \d\.\d+ in epoch [12]: .*model\.pt", log)
    # a log file gets no bar
    assert "\r" not in log
    last = saved(folder / "last.pt")
    assert last["position"] == {"epoch": 2, "step": 0, "steps": STEPS[bundle], "seen": 0}
    assert last["model"].keys() == saved(folder / "model.pt").keys()
    files = ["curves.png", "history.csv", "last.previous.pt", "last.pt", "model.pt", "run.json", "runs", "training.log"]
    assert sorted(file.name for file in folder.iterdir()) == files
    events = EventAccumulator(str(folder / "runs"), size_guidance={"images": 0})
    events.Reload()
    assert {"train_loss", METRIC[bundle]} <= set(events.Tags()["scalars"])
    shown = [events.Images(tag)[-1] for tag in events.Tags()["images"]]
    assert [(image.width, image.height) for image in shown] == [(32, 32)] * (3 if bundle in PICTURES else 0)


@each_bundle
def test_training_resumes(bundle: str, trained: Trained, options: Options, run: Run, tmp_path: Path) -> None:
    shutil.copy(trained(bundle)[0] / "last.pt", tmp_path)
    run("training", config(bundle), **options(bundle, tmp_path, max_epochs=3, resume="true"))
    before, after = saved(trained(bundle)[0] / "last.pt"), saved(tmp_path / "last.pt")
    assert after["position"]["epoch"] == 3
    assert after["lr_scheduler"]["last_epoch"] == (3 * STEPS[bundle] if bundle == "cmunext_busi" else 3)
    best = min if METRIC[bundle] == "val_loss" else max
    assert after["selection"]["best"] == best(before["selection"]["best"], after["selection"]["best"])


def test_training_ends_early(options: Options, run: Run, tmp_path: Path) -> None:
    still = {"optimizer#lr": 0.0, "lr_scheduler#eta_min": 0.0, "early_stop": 2, "max_epochs": 30}
    run("training", config("vmunet_isic"), **options("vmunet_isic", tmp_path, **still))
    assert saved(tmp_path / "last.pt")["position"]["epoch"] == 3


@each_bundle
def test_published_selection_is_labelled(
    bundle: str, options: Options, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("training", config(bundle), **options(bundle, tmp_path, max_epochs=1, selection="paper", amp_dtype="bfloat16"))
    log = capsys.readouterr().out
    assert re.search(r"model selected by .*, as published", log)
    assert ("best train_loss" if bundle == "vmunet_synapse" else f"best {METRIC[bundle]}") in log
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize(
    ("bundle", "name"),
    [(bundle, name) for bundle in BUNDLES for name in TINY if OWN[bundle]["_target_"] != TINY[name]["_target_"]],
)
def test_every_network_trains_on_every_data_set_by_its_definition_alone(
    bundle: str, name: str, options: Options, run: Run, tmp_path: Path
) -> None:
    channels = {"in_channels": 1, "out_channels": 9} if bundle == "vmunet_synapse" else {}
    if name == "BasicUNet":
        channels = channels or {"in_channels": 3, "out_channels": 1}
    run("training", config(bundle), **options(bundle, tmp_path, max_epochs=1, network_def={**TINY[name], **channels}))
    assert all(value.isfinite().all() for value in saved(tmp_path / "model.pt").values())


@each_bundle
def test_images_need_not_be_square(bundle: str, options: Options, run: Run, data: Path, tmp_path: Path) -> None:
    chosen = options(bundle, tmp_path, max_epochs=1, image_size=[33, 47])
    run("training", config(bundle), **chosen)
    run("evaluating", config(bundle, "train", "evaluate"), **chosen)
    row, *_ = rows_of(tmp_path / "eval")
    if bundle in PICTURES:
        assert sum(int(row[key]) for key in ("tp", "fp", "fn", "tn")) == 33 * 47
    kept = {key: chosen[key] for key in ("image_size", "ckpt_dir", "network_def")}
    source = next((data / INPUT[bundle]).iterdir())
    run("inferring", config(bundle, "inference"), **kept, input=str(source), output_dir=str(tmp_path / "out"))
    (mask,) = (tmp_path / "out").glob("*.png" if bundle in PICTURES else "*.nii.gz")
    if bundle in PICTURES:
        assert read(mask).shape == read(source).shape[:2]
    else:
        assert sorted(nib.load(mask).shape) == [8, 48, 48]


def test_a_training_may_start_from_weights_of_other_classes(
    trained: Trained, options: Options, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = "vmunet_isic"
    three = {"classes": ["a", "b", "c"], "label_map": {0: 0, 85: 1, 170: 2, 255: 3}}
    start = {"pretrained": str(trained(bundle)[0] / "model.pt"), "max_epochs": 1}
    chosen = options(bundle, tmp_path, network_def={**OWN[bundle], "out_channels": 4}, **start, **three)
    with refused(r"1 output channels, the model of 4: .*\(--new_head true\)"):
        run("training", config(bundle), **chosen)
    run("training", config(bundle), **chosen, new_head="true", selection="paper")
    assert "left random: final_conv.weight, final_conv.bias" in capsys.readouterr().out


# Evaluation


@each_bundle
def test_evaluating_reports_under_both_rules(
    bundle: str, trained: Trained, options: Options, run: Run, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = trained(bundle)
    run("evaluating", config(bundle, "train", "evaluate"), **options(bundle, folder))
    published = {"cmunext_busi": "71.56", "vmunet_isic": "80.23", "vmunet_synapse": "81.08"}
    assert published[bundle] in capsys.readouterr().out
    rows = rows_of(folder / "eval")
    assert {row["case"] for row in rows} == set((data / DATA[bundle] / TEST_LIST[bundle]).read_text().splitlines())
    summary = json.loads((folder / "eval/summary.json").read_text())
    assert SELECTION[bundle].endswith(summary["selection"])
    if bundle == "vmunet_synapse":
        assert set(summary["protocols"]) == {"paper", "strict"}
        return
    each, pooled = (summary["protocols"][name]["classes"]["lesion"] for name in ("per image", "pooled"))
    assert each["iou"]["mean"] == pytest.approx(np.mean([float(row["iou"]) for row in rows]))
    tp, wrong = (sum(int(row[key]) for row in rows for key in keys) for keys in (("tp",), ("fp", "fn")))
    assert pooled["iou"]["mean"] == pytest.approx(tp / (tp + wrong))


@each_bundle
def test_bad_cases_do_not_stop_an_evaluation(
    bundle: str, trained: Trained, options: Options, run: Run, data: Path, tmp_path: Path
) -> None:
    shutil.copytree(data / DATA[bundle], tmp_path / "data")
    # without run.json, which would refuse files that have changed
    shutil.copy(trained(bundle)[0] / "model.pt", tmp_path)
    chosen = options(bundle, tmp_path) | {"dataset_dir": str(tmp_path / "data")}
    if bundle == "vmunet_synapse":
        file = tmp_path / "data/test_vol_h5/case0001.npy.h5"
        bad = [str(shutil.copy(file, file.with_name(f"case000{number}.npy.h5"))) for number in (2, 3)]
        (tmp_path / "data" / TEST_LIST[bundle]).write_text("case0001\ncase0002\ncase0003\n")
        Path(bad[0]).write_bytes(file.read_bytes()[:-1000])
        with h5py.File(bad[1], "a") as volume:
            volume["label"][0, 0, 0] = 12
        good, reasons = ["case0001"], ["not a readable HDF5 file", "the label holds values from 0 to 12; with 8 named"]
    else:
        first, second, *rest = image_split(tmp_path / "data").test
        label = second["label"] if isinstance(second["label"], str) else second["label"][0]
        for file in (first["image"], label):
            Path(file).write_bytes(b"no picture")
        bad, reasons = [first["image"], second["image"]], [first["image"], label]
        good = [Path(item["image"]).stem for item in rest]
    names = ", ".join(Path(file).name for file in bad)
    with refused(rf"^2 of {len(good) + 2} files failed: {re.escape(names)}; the lines above say why$"):
        run("evaluating", config(bundle, "train", "evaluate"), **chosen)
    assert {row["case"] for row in rows_of(tmp_path / "eval")} == set(good)
    failures = json.loads((tmp_path / "eval/summary.json").read_text())["failures"]
    assert list(failures) == bad
    page = html.unescape((tmp_path / "eval/report.html").read_text())
    for line, reason in zip(failures.values(), reasons, strict=True):
        assert reason in line
        assert line in page


# Inference


def brightness_network(bundle: str, path: Path) -> dict[str, Any]:
    """Behind the bundle's input, a 1×1 convolution whose logit is the picture's red value, 0 … 255, minus 127.5."""
    network = torch.nn.Conv2d(3, 1, 1)
    weight, bias = torch.tensor([1.0, 0.0, 0.0]), -127.5
    if bundle == "cmunext_busi":
        weight, bias = torch.tensor([0.0, 0.0, 255 * 255 * RGB_SD[2]]), 255 * RGB_MEAN[2] - 127.5
    with torch.no_grad():
        network.weight.copy_(weight[None, :, None, None])
        network.bias.fill_(bias)
    torch.save(network.state_dict(), path)
    return {"_target_": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 1, "kernel_size": 1}


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@each_picture_bundle
def test_masks_have_the_size_and_the_orientation_of_their_pictures(
    bundle: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "in"
    pictures.mkdir()
    drawn = {}
    kinds = {"grey.png": "L", "rgba.png": "RGBA", "photo.JPG": "RGB", "palette.bmp": "P", "bilevel.tif": "1"}
    for (name, mode), size in zip(kinds.items(), ((96, 70), (64, 128), (90, 90), (33, 47), (64, 40)), strict=True):
        drawn[Path(name).stem] = l_shape(*size)
        Image.fromarray(l_shape(*size).astype(np.uint8) * 255).convert(mode).save(pictures / name)
    red = np.zeros((50, 60, 3), np.uint8)
    red[l_shape(50, 60), 0] = 255
    red[..., 2] = 255 - red[..., 0]
    Image.fromarray(red).save(pictures / "red on blue.png")
    drawn["red on blue"] = l_shape(50, 60)
    pydicom = pytest.importorskip("pydicom")
    from tests import dicom_files

    scan = dicom_files.ultrasound()
    dicom_files.grey(scan, l_shape(64, 80).astype(np.uint8) * 255, 8)
    (pictures / "deep").mkdir()
    dicom_files.saved(scan, pictures / "deep/scan.dcm")

    network = brightness_network(bundle, tmp_path / "model.pt")
    where = {"input": str(pictures), "output_dir": str(tmp_path / "out"), "ckpt_dir": str(tmp_path)}
    run(
        "inferring",
        config(bundle, "inference"),
        **where,
        image_size=64,
        network_def=network,
        probabilities=True,
        overlay=True,
        postprocess="largest",
        tta="flips",
        ckpt_path=f"[{tmp_path}/model.pt, '{tmp_path}/model.pt']",
    )
    assert f"masks of 7 files written to {tmp_path / 'out'}" in capsys.readouterr().out
    names = {f"{stem}_{kind}.png" for stem, kind in product(drawn, ("mask", "probability", "overlay"))}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names | {"deep", "volumes.csv"}
    with (tmp_path / "out/volumes.csv").open(newline="") as table:
        rows = {row["case"]: row for row in csv.DictReader(table)}
    assert set(rows) == {*drawn, "deep/scan"}
    for stem in drawn:
        mask = read(tmp_path / "out" / f"{stem}_mask.png") > 0
        assert (rows[stem]["class"], int(rows[stem]["pixels"])) == ("lesion", mask.sum())
        assert float(rows[stem]["percent"]) == pytest.approx(100 * mask.mean(), abs=1e-4)
    segmentation = pydicom.dcmread(tmp_path / "out/deep/scan_seg.dcm")
    assert segmentation.SegmentSequence[0].SegmentLabel == "lesion"
    assert overlap(np.squeeze(segmentation.pixel_array) > 0, l_shape(64, 80)) > 0.85
    for stem, shape in drawn.items():
        mask = read(tmp_path / "out" / f"{stem}_mask.png")
        assert mask.shape == shape.shape
        assert set(np.unique(mask)) == {0, 255}
        assert overlap(mask > 0, shape) > 0.85, stem
        assert max(overlap(mask > 0, shape[::-1]), overlap(mask > 0, shape[:, ::-1])) < 0.5
        probability = read(tmp_path / "out" / f"{stem}_probability.png")
        # 127 and 128 are what a probability of one half becomes
        np.testing.assert_array_equal(mask[probability > 128], 255)
        np.testing.assert_array_equal(mask[probability < 127], 0)


def test_volumes_keep_their_geometry_whatever_the_orientation(
    trained: Trained, options: Options, run: Run, data: Path, tmp_path: Path
) -> None:
    source = nib.load(sorted((data / "synapse/raw/img").iterdir())[0])
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for codes in ("LPS", "RAS", "SAR"):
        change = nib.orientations.ornt_transform(
            nib.io_orientation(source.affine), nib.orientations.axcodes2ornt(codes)
        )
        nib.save(source.as_reoriented(change), folder / f"{codes}.nii.gz")
    prepared = sorted((data / "synapse/test_vol_h5").iterdir())[0]
    shutil.copy(prepared, folder / "prepared.npy.h5")
    highdicom = pytest.importorskip("highdicom")
    from tests import dicom_files

    slices = read_volume(folder / "RAS.nii.gz")
    array = reoriented(slices).array.astype(np.int16)
    dicom_files.series(folder / "deep/scan", array)
    nrrd = sitk.ReadImage(str(folder / "LPS.nii.gz"))
    sitk.WriteImage(nrrd, str(folder / "slicer.nrrd"))
    where = {"ckpt_dir": str(trained("vmunet_synapse")[0]), "input": str(folder), "output_dir": str(out)}
    where |= {"probabilities": True, "overlay": True}
    run("inferring", config("vmunet_synapse", "inference"), image_size=32, network_def=OWN["vmunet_synapse"], **where)

    canonical = []
    for file in sorted(folder.glob("*.nii.gz")):
        image, mask = nib.load(file), nib.load(out / file.name.replace(".nii.gz", "_pred.nii.gz"))
        assert mask.shape == image.shape
        np.testing.assert_allclose(mask.affine, image.affine, atol=1e-4)
        assert mask.get_data_dtype() == np.uint8
        canonical.append(np.asarray(nib.as_closest_canonical(mask).dataobj))
    assert all(np.array_equal(canonical[0], other) for other in canonical[1:])
    with h5py.File(prepared) as file:
        affine = file.attrs["affine"]
    from_h5 = nib.load(out / "prepared_pred.nii.gz")
    np.testing.assert_allclose(from_h5.affine, affine, atol=1e-4)
    assert np.array_equal(np.asarray(nib.as_closest_canonical(from_h5).dataobj), canonical[0])
    assert canonical[0].any()
    mask = sitk.ReadImage(str(out / "slicer_pred.nrrd"))
    assert mask.GetOrigin() == pytest.approx(nrrd.GetOrigin())
    lps = np.asarray(nib.load(out / "LPS_pred.nii.gz").dataobj)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(mask).T, lps)
    with (out / "volumes.csv").open(newline="") as table:
        rows = {(row["case"], row["class"]): row for row in csv.DictReader(table)}
    assert len(rows) == 6 * 8
    voxel = np.prod(nrrd.GetSpacing()) / 1000
    for number, organ in enumerate(ORGANS, 1):
        for case in ("LPS", "RAS", "slicer", "prepared"):
            row = rows[case, organ]
            assert int(row["voxels"]) == np.count_nonzero(lps == number)
            assert float(row["ml"]) == pytest.approx(voxel * int(row["voxels"]), rel=1e-3, abs=1e-3)
        probability = nib.load(out / f"RAS_probability_{number}.nii.gz")
        np.testing.assert_allclose(probability.affine, nib.load(folder / "RAS.nii.gz").affine, atol=1e-4)
        values = probability.get_fdata()
        assert 0 <= values.min() < values.max() <= 1
        # where an organ is most probable by far, it is what the mask says
        sure = np.asarray(nib.load(out / "RAS_pred.nii.gz").dataobj)[values > 0.6]
        assert np.count_nonzero(sure != number) <= 0.1 * len(sure)
    assert {file.name for file in out.glob("*_overlay.png")} == {
        f"{name}_overlay.png" for name in ("LPS", "RAS", "SAR", "prepared", "slicer")
    }
    segmentation = highdicom.seg.segread(out / "deep/scan_seg.dcm").get_volume(combine_segments=True)
    assert np.bincount(segmentation.array.ravel())[1:].tolist() == np.bincount(lps.ravel())[1:].tolist()


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Three kinds of things, drawn in stored numbers 85, 170 and 255, in pictures of several kinds."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "own" / folder).mkdir(parents=True)
    for index in range(10):
        stored = np.repeat(np.repeat(rng.choice(np.array([0, 85, 170, 255], np.uint8), (4, 5)), 9, 0), 9, 1)
        noisy = (stored * 0.8 + rng.integers(0, 40, stored.shape)).astype(np.uint8)
        suffix = (".png", ".jpg", ".bmp", ".tif")[index % 4]
        Image.fromarray(noisy).convert("RGB" if index % 2 else "L").save(tmp_path / f"own/images/a{index}{suffix}")
        decoration = ("", "_mask", "_segmentation")[index % 3]
        Image.fromarray(stored).save(tmp_path / f"own/masks/a{index}{decoration}.png")
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("bundle", "network"),
    [
        ("cmunext_busi", {"network_def#_target_": "networks.cmunext_s"}),
        ("vmunet_isic", {f"network_def#{key}": value for key, value in SMALL_VMUNET.items()}),
    ],
)
def test_a_folder_of_ones_own_with_several_classes(
    bundle: str, network: dict[str, Any], own_folder: Path, options: Options, run: Run, tmp_path: Path
) -> None:
    classes = {"classes": ["cyst", "node", "shadow"], "label_map": {0: 0, 85: 1, 170: 2, 255: 3}, **network}
    chosen = options(bundle, tmp_path, max_epochs=1, **classes) | {"dataset_dir": str(own_folder)}
    del chosen["network_def"]
    run("training", config(bundle), **chosen)
    assert next(reversed(saved(tmp_path / "model.pt").values())).shape[0] == 4
    run("evaluating", config(bundle, "train", "evaluate"), **chosen)
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert summary["cases"] == 3
    assert set(summary["protocols"]["pooled"]["classes"]) == {"cyst", "node", "shadow"}
    inference = {"input": str(own_folder / "images/a1.jpg"), "output_dir": str(tmp_path / "out"), "probabilities": True}
    run("inferring", config(bundle, "inference"), image_size=32, ckpt_dir=str(tmp_path), **inference, **classes)
    mask = read(tmp_path / "out/a1_mask.png")
    assert mask.shape == (36, 45)
    assert set(np.unique(mask)) <= {0, 85, 170, 255}
    assert len(list((tmp_path / "out").glob("a1_probability_[123].png"))) == 3


# Weights


@each_bundle
@pytest.mark.parametrize("damage", ["other head", "missing tensor", "not a number"])
def test_weights_that_do_not_fit_are_refused(
    bundle: str, damage: str, trained: Trained, options: Options, run: Run, data: Path, tmp_path: Path
) -> None:
    state = saved(trained(bundle)[0] / "model.pt")
    *_, head, bias = state
    if damage == "other head":
        state[head], state[bias] = (torch.cat([state[name]] * 3) for name in (head, bias))
    elif damage == "missing tensor":
        del state[bias]
    else:
        state[bias][0] = torch.nan
    torch.save(state, tmp_path / "model.pt")
    chosen = options(bundle, tmp_path)
    reason = {"other head": "mis-shaped", "missing tensor": "1 missing", "not a number": "not finite"}[damage]
    with refused(reason):
        run("evaluating", config(bundle, "train", "evaluate"), **chosen)
    small = {"network_def": OWN[bundle], "ckpt_dir": str(tmp_path), "input": str(data / INPUT[bundle])}
    for run_id in ("inferring", "exporting"):
        with refused(reason):
            run(run_id, config(bundle, "inference"), **small)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pt"]


@each_bundle
def test_torchscript_export_answers_as_the_network(bundle: str, trained: Trained, run: Run, tmp_path: Path) -> None:
    weights = trained(bundle)[0] / "model.pt"
    where = {"ckpt_path": str(weights), "filepath": str(tmp_path / "new/model.ts")}
    run("exporting", config(bundle, "inference"), network_def=OWN[bundle], image_size=32, **where)
    exported, metadata, files = load_net_with_metadata(tmp_path / "new/model.ts", more_extra_files=("inference.json",))
    assert metadata["name"] == json.loads((ROOT / f"bundles/{bundle}/configs/metadata.json").read_text())["name"]
    stored = ConfigParser(json.loads(files["inference.json"]))
    assert stored.get_parsed_content("preprocessing") is not None
    eager = stored.get_parsed_content("network_def").eval()
    assert isinstance(eager, (CMUNeXt, VMUNet))
    eager.load_state_dict(saved(weights))
    image = torch.rand(2, 3, 40, 56)
    with torch.no_grad():
        torch.testing.assert_close(exported(image), eager(image), atol=1e-4, rtol=1e-4)


# The stronger recipe


@each_bundle
def test_a_run_goes_on_with_its_average(bundle: str, options: Options, run: Run, tmp_path: Path) -> None:
    """It ends with the same bits as one that was not stopped; `model.pt` is the average, not what is trained."""
    for folder, first in (("whole", 2), ("stopped", 1)):
        chosen = options(bundle, tmp_path / folder, max_epochs=2, check_data="false")
        run("training", config(bundle, "train", "strong"), **chosen, **{"train#trainer#max_epochs": first})
    run("training", config(bundle, "train", "strong"), **chosen, resume="true")
    whole, stopped = (saved(tmp_path / folder / "last.pt") for folder in ("whole", "stopped"))
    for name in ("model", "trained"):
        assert all(torch.equal(tensor, stopped[name][key]) for key, tensor in whole[name].items()), name
    assert whole["average"] == stopped["average"] == {"steps": 2 * STEPS[bundle]}
    model = saved(tmp_path / "whole/model.pt")
    of_average, of_trained = (
        all(torch.equal(tensor, whole[name][key]) for key, tensor in model.items()) for name in ("model", "trained")
    )
    assert of_average == (whole["selection"]["best_epoch"] == 2)
    assert not of_trained


def test_what_the_stronger_recipe_trained_is_used_as_it_was_trained(
    options: Options, run: Run, data: Path, tmp_path: Path
) -> None:
    """Evaluated are the weights of `model.pt` on its own input, mirrored; with another input they are refused."""
    chosen = options("cmunext_busi", tmp_path, max_epochs=1)
    run("training", config("cmunext_busi", "train", "strong"), **chosen)
    # weights that mark something, in place of those of two steps
    content = saved(tmp_path / "model.pt")
    torch.manual_seed(0)
    for key, tensor in content.items():
        if key.endswith("weight") and tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape) / tensor[0].numel() ** 0.5)
    torch.save(content, tmp_path / "model.pt")
    run("evaluating", config("cmunext_busi", "train", "strong", "evaluate"), **chosen)
    parser = parsed("cmunext_busi", "train", "strong", **chosen)
    network = parser.get_parsed_content("network_def")
    network.load_state_dict(content)
    flips = FlipAverage(network.eval())
    prepare = parser.get_parsed_content("validate#preprocessing")
    items = {Path(item["image"]).stem: prepare(item) for item in parser.get_parsed_content("split").test}
    ious = {}
    for name, item in items.items():
        predicted, true = flips(item["image"].as_tensor()[None])[0] > 0, item["label"] > 0
        ious[name] = float(((predicted & true).sum() + 1e-5) / ((predicted | true).sum() + 1e-5))
    assert len(set(ious.values())) > 3
    assert {row["case"]: float(row["iou"]) for row in rows_of(tmp_path / "eval")} == pytest.approx(ious, abs=1e-4)

    used = {key: chosen[key] for key in ("ckpt_dir", "image_size", "network_def")} | {"output_dir": str(tmp_path / "p")}
    used |= {"input": str(data / INPUT["cmunext_busi"])}
    with refused("was trained with normalisation plain, and it is published now"):
        run("inferring", config("cmunext_busi", "inference"), **used)
    run("inferring", config("cmunext_busi", "inference"), **used, normalisation="plain")


# Several processes


@each_bundle
def test_two_processes_train_one_network(bundle: str, options: Options, tmp_path: Path) -> None:
    log = succeeds(
        command(
            "training", config(bundle, "train", "multi_gpu"), tmp_path,
            *words(options(bundle, tmp_path, max_epochs=1, batch_size=2)),
            launcher=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
        )
    )  # fmt: skip
    assert log.count("images to train on") == 1
    assert "Grad strides do not match" not in log
    # each process has half of the images, the last one twice where they are odd in number, in batches of 2
    assert saved(tmp_path / "last.pt")["position"]["steps"] == {6: 2, 7: 2, 24: 6}[int(SELECTION[bundle].split()[0])]
    assert (tmp_path / "model.pt").is_file()


# What a user can get wrong


@each_bundle
def test_missing_data_input_and_checkpoint_are_one_line(bundle: str, run: Run, data: Path, tmp_path: Path) -> None:
    small = {"network_def": OWN[bundle], "ckpt_dir": str(tmp_path)}
    with refused(rf"^{tmp_path}: holds no .* `python -m prepare demo .*$"):
        run("training", config(bundle), **small, dataset_dir=str(tmp_path))
    with refused(r"no weight file .*model\.pt: train first, or name an existing checkpoint"):
        run("inferring", config(bundle, "inference"), **small, input=str(data / INPUT[bundle]))
    with refused(r"nowhere: does not exist; give a file or a folder of them as --input"):
        run("inferring", config(bundle, "inference"), **small, load_pretrain=False, input=str(tmp_path / "nowhere"))


# The configurations


def leaves(value: Any, path: str = "") -> Iterator[str]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if not items:
        yield path
    for key, inner in items:
        yield from leaves(inner, f"{path}#{key}" if path else str(key))


OVERLAID = [("train", "strong"), ("train", "strong", "evaluate")]
FILES = [*product(BUNDLES, [("train",), ("train", "evaluate"), ("train", "multi_gpu"), ("inference",), *OVERLAID])]


@pytest.mark.parametrize(("bundle", "names"), FILES)
def test_every_leaf_can_be_overridden(bundle: str, names: tuple[str, ...]) -> None:
    plain = parsed(bundle, *names).get()
    ids = [leaf for leaf in leaves({key: value for key, value in plain.items() if key != "_meta_"})]
    assert len(ids) > 40
    for leaf in ids:
        parser = ConfigParser(copy.deepcopy(plain))
        parser.update({leaf: "other"})
        parser.parse()
        assert parser.get_parsed_content(leaf, instantiate=False, eval_expr=False) == "other", leaf


@pytest.mark.parametrize(("bundle", "names"), FILES)
def test_configurations_are_plain(bundle: str, names: tuple[str, ...]) -> None:
    for name in names:
        text = Path(config(bundle, name)[0]).read_text()
        assert set(re.findall(r'"(%.*?)"', text)) <= {"%training", "%evaluating", "%inferring"}
        assert "lambda " not in text
        assert max(map(len, text.splitlines())) <= 120
    parser = parsed(bundle, *names)
    parser.parse()
    known = parser.ref_resolver.items
    for item in known.values():
        if isinstance(item.get_config(), str):
            assert set(parser.ref_resolver.match_refs_pattern(item.get_config())) <= set(known)


@each_bundle
def test_what_must_be_equal_is(bundle: str) -> None:
    """A configuration is complete in its own file; what is written twice must not come to differ."""
    train, inference = (yaml.safe_load(Path(config(bundle, name)[0]).read_text()) for name in ("train", "inference"))
    shared = ("bundle_root", "image_size", "amp_dtype", "channels_last", "compile", "device", "classes", "network_def")
    shared += ("normalisation", "input_scale") if bundle == "cmunext_busi" else ()
    assert {key: train[key] for key in shared} == {key: inference[key] for key in shared}
    assert len({Path(config(name, "multi_gpu")[0]).read_text() for name in BUNDLES}) == 1
    volume = bundle == "vmunet_synapse"
    if volume:
        whole = yaml.safe_load(Path(config(bundle, "evaluate")[0]).read_text())["validate#preprocessing"]
    steps = (whole if volume else train["validate"]["preprocessing"])["transforms"]
    # steps of the label, and of image and label together
    steps = [step for step in steps if step["keys"] != "label" and step["_target_"] != "transforms.SameSized"]
    assert [image_part(step) for step in steps] == inference["preprocessing"]["transforms"]
    for part in ("handlers", "trainer"):
        assert without(train["train"][part]) == without(
            yaml.safe_load(Path(config("vmunet_isic")[0]).read_text())["train"][part]
        )
    if not volume:
        augmented = train["train"]["preprocessing"]["transforms"]
        assert [step for step in augmented if step in steps] == steps


def image_part(step: dict[str, Any]) -> dict[str, Any]:
    """The step without what concerns the label."""
    if step["keys"] == "image":
        return step
    mode = {"mode": step["mode"][0]} if "mode" in step else {}
    return {**step, "keys": "image", **mode}


def without(part: Any) -> Any:
    """A bundle's own choices: when the schedule steps, and that nothing may be held out."""
    if isinstance(part, list):
        return [without(one) for one in part]
    own = {"epoch_level"} | ({"_disabled_"} if part.get("_target_") == "ValidationHandler" else set())
    return {key: value for key, value in part.items() if key not in own}


@each_bundle
def test_a_copied_bundle_is_one_of_its_own(bundle: str, options: Options, run: Run, data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "mine"
    shutil.copytree(ROOT / "bundles" / bundle, copied, ignore=shutil.ignore_patterns("models", "eval", "runs"))
    for name in ("train", "inference"):
        file = copied / "configs" / f"{name}.yaml"
        file.write_text(re.sub(r"\nimage_size: \d+", "\nimage_size: 40", file.read_text()))
    small, places = options(bundle, tmp_path, max_epochs=1), ("ckpt_dir", "output_dir", "log_dir", "image_size")
    kept = {key: value for key, value in small.items() if key not in places}
    run("training", [str(copied / "configs/train.yaml")], **kept)
    assert (copied / "models/model.pt").is_file()
    source = data / INPUT[bundle]
    run("inferring", [str(copied / "configs/inference.yaml")], network_def=OWN[bundle], input=str(source))
    results = {path.name for path in (copied / "predictions").iterdir()}
    assert "volumes.csv" in results
    assert len(results) == 1 + len(list(source.iterdir()))
    assert not list(Path.cwd().iterdir())


@pytest.mark.skipif(not importlib.util.find_spec("mlflow"), reason="needs mlflow-skinny, sqlalchemy and alembic")
@pytest.mark.filterwarnings("ignore:The ..noload.. loader strategy")
@each_bundle
def test_tracking_by_mlflow(bundle: str, options: Options, run: Run, tmp_path: Path) -> None:
    run("training", config(bundle), tracking="mlflow", **options(bundle, tmp_path, max_epochs=1))
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/eval/mlruns.db")
    runs = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert {"train_loss", METRIC[bundle]} <= set().union(*(run.data.metrics for run in runs))


def test_tracking_without_mlflow_is_one_line(
    options: Options, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("--tracking mlflow needs MLflow: pip install mlflow-skinny"):
        run("training", config("cmunext_busi"), tracking="mlflow", **options("cmunext_busi", tmp_path))


# A value for every override that a README names, but for those that have tests of their own.
TRIED: dict[str, Any] = {
    **dict.fromkeys(("ckpt_dir", "output_dir", "log_dir", "input", "ckpt_path", "filepath"), "somewhere"),
    "fold": 2,
    "year": 2017,
    "selection": "paper",
    "val_fraction": 0.3,
    "val_cases": ["case0005"],
    "val_interval": 3,
    "early_stop": 4,
    "new_head": True,
    "min_matched": 0.5,
    "debug": True,
    "check_data": "full",
    "clip_grad": 1.0,
    "sync_batch_norm": True,
    "force": True,
    "in_channels": 1,
    "allow_unpaired": True,
    "assume_hu": True,
    "max_epochs": 50,
    "batch_size": 3,
    "image_size": [24, 40],
    "learning_rate": 0.5,
    "num_workers": 1,
    "resume": False,
    "amp_dtype": "bfloat16",
    "channels_last": True,
    "compile": "auto",
    "device": "cpu",
    "classes": ["a", "b"],
    "label_map": {0: 0, 85: 1, 170: 2},
    "network_def": {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 3, "out_channels": 1},
    "network_def#_target_": "networks.cmunext_s",
    "network_def#scan_backend": "parallel",
    "train#dataloader#drop_last": True,
    "train#trainer#amp": False,
    "validate#dataloader#num_workers": 0,
    "probabilities": True,
    "seg_type": "labelmap",
    "tta": "flips",
    "normalisation": "plain",
    "postprocess": "largest",
    "overlay": True,
}
ELSEWHERE = {"dataset_dir", "pretrained", "tracking", "config_file"}
# Options of other commands in the READMEs.
OTHER = {
    *(
        "raw",
        "out",
        "size",
        "split",
        "splits",
        "split-files",
        "folds",
        "include-normal",
        "deduplicate",
        "overwrite",
        "seed",
    ),
    *("full", "label-ids", "output", "spacing", "standalone", "nproc_per_node", "no-build-isolation", "allow-missing"),
    *("weights", "format", "images"),
}


@each_bundle
def test_every_override_that_a_readme_names(
    bundle: str, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts = [(ROOT / name).read_text() for name in ("README.md", f"bundles/{bundle}/docs/README.md")]
    named = set(re.findall(r"--([a-z][\w#-]*)", " ".join(texts))) - OTHER - ELSEWHERE
    assert named <= set(TRIED)
    training, inference = (set(parsed(bundle, name).get()) for name in ("train", "inference"))
    if bundle == "cmunext_busi":  # the first README's example for the other networks
        named -= {"network_def#scan_backend"}
    for name in sorted(named):
        value, top = TRIED[name], name.partition("#")[0]
        if top in training:
            chosen = {**options(bundle, tmp_path), name: value}
            if name.startswith("network_def#"):
                del chosen["network_def"]
            if name in ("label_map", "classes"):
                chosen["network_def"] = {**OWN[bundle], "out_channels": "$@labels.out_channels"}
            if name == "label_map":
                chosen["classes"] = TRIED["classes"]
            parser = parsed(bundle, "train", **chosen)
            for part in ("train#trainer", "validate#evaluator", "checkpoints"):
                parser.get_parsed_content(part)
        elif top in inference:
            parser = parsed(bundle, "inference", network_def=OWN[bundle], load_pretrain=False, **{name: value})
            parser.get_parsed_content("postprocessing")
        else:  # of another bundle
            continue
        assert parser[name] == value


@each_bundle
def test_overrides_reach_what_they_name(bundle: str, options: Options, tmp_path: Path) -> None:
    chosen = {"train#dataloader#drop_last": True, "validate#dataloader#num_workers": 0, "train#trainer#amp": False}
    chosen |= {"train#handlers#1#desc": "Steps", "train#dataloader#num_workers": 1, "device": "cpu"}
    parser = parsed(bundle, **options(bundle, tmp_path), **chosen)
    trainer = parser.get_parsed_content("train#trainer")
    assert trainer.data_loader.drop_last
    assert (trainer.data_loader.num_workers, trainer.data_loader.persistent_workers) == (1, True)
    assert parser.get_parsed_content("train#handlers#1").tqdm_kwargs["desc"] == "Steps"
    assert parser.get_parsed_content("validate#evaluator").data_loader.num_workers == 0


def test_words_of_the_command_line_are_values(options: Options, run: Run, tmp_path: Path) -> None:
    words_given = {"train#dataloader#drop_last": "true", "train#trainer#amp": "False", "pretrained": "null"}
    run("training", config("cmunext_busi"), **options("cmunext_busi", tmp_path, max_epochs=1, **words_given))
    # the second batch of 6 images, which has 2, is dropped
    assert saved(tmp_path / "last.pt")["position"]["steps"] == 1


def test_one_override_chooses_the_year() -> None:
    parser = parsed("vmunet_isic", "train", "evaluate", year=2018, network_def=TINY["VMUNet"])
    assert parser.get_parsed_content("dataset_dir") == "data/isic18"
    assert parser.get_parsed_content("validate#handlers#1#published")["sensitivity"] == 91.12


@each_bundle
def test_metadata_follows_its_schema(bundle: str) -> None:
    """A copy of MONAI's schema of 2024-07-25, which the model zoo checks against."""
    metadata = json.loads((ROOT / f"bundles/{bundle}/configs/metadata.json").read_text())
    schema = json.loads((Path(__file__).parent / "meta_schema_20240725.json").read_text())
    assert metadata["schema"].endswith("meta_schema_20240725.json")
    jsonschema.validate(metadata, schema)
    assert metadata["version"] in metadata["changelog"]
    pins = (line.partition(";")[0].strip() for line in (ROOT / "constraints.txt").read_text().lower().splitlines())
    pinned = dict(pin.split("==") for pin in pins)
    required = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    for name, version in {**required, **metadata["required_packages_version"]}.items():
        assert pinned[name.lower()] == version
