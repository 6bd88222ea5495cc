import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from medpy.metric import binary
from monai.data import DataLoader, MetaTensor, list_data_collate
from monai.engines import SupervisedEvaluator
from numpy.typing import NDArray
from scipy import ndimage

from evaluation import ImageMetric, ImageReport, MeanLoss, SliceToVolume, VolumeDice, VolumeReport
from evaluation.handlers import spacing_mm
from evaluation.metrics import confusion
from evaluation.overlay import COLOURS
from evaluation.protocols import per_image, pooled
from tests.evaluation.test_overlay import count, pixels
from tests.helpers import rows_of

CLASSES = ["liver", "spleen"]
AFFINE = np.diag([5.0, 1.5, 1.0, 1.0])

Item = dict[str, MetaTensor]


def meta_tensors(image: NDArray[Any], label: NDArray[Any], file: str, affine: NDArray[Any]) -> Item:
    arrays = {"image": torch.from_numpy(image).float(), "label": torch.from_numpy(label).float()}
    return {key: MetaTensor(array, affine, meta={"filename_or_obj": file}) for key, array in arrays.items()}


def volume_item(seed: int) -> Item:
    """Liver and spleen as bright and brighter boxes; the cases with even numbers have no spleen."""
    rng = np.random.default_rng(seed)
    label = np.zeros((1, 6, 40, 30), np.float32)
    label[:, 1:4, 5 : 20 + seed, 5:15] = 1
    if seed % 2:
        label[:, 2:5, 26:34, 5:25] = 2
    image = label / 2 + 0.05 * rng.standard_normal(label.shape)
    return meta_tensors(image, label, f"/data/case{seed:04d}.npy.h5", AFFINE)


class ThreeLevels(torch.nn.Module):
    """Classes 0, 1, 2 for grey values around 0, 0.5 and 1."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -torch.cat([x.abs(), (x - 0.5).abs(), (x - 1).abs()], 1)


def evaluator(
    items: Sequence[dict[str, Any]],
    handlers: Sequence[Any],
    batch_size: int = 1,
    decollate: bool = True,
    network: torch.nn.Module | None = None,
    inferer: Callable[..., torch.Tensor] | None = None,
    kind: type[SupervisedEvaluator] = SupervisedEvaluator,
    **kwargs: Any,
) -> SupervisedEvaluator:
    return kind(
        device=torch.device("cpu"),
        val_data_loader=DataLoader(items, batch_size=batch_size, collate_fn=list_data_collate),
        network=network or ThreeLevels(),
        inferer=inferer or SliceToVolume((24, 24), batch_size=4),
        val_handlers=handlers,
        decollate=decollate,
        **kwargs,
    )


def expected_volume(item: Item) -> NDArray[Any]:
    """What the evaluator predicts, slice by slice with scipy."""
    slices = []
    for image in item["image"][0].numpy():
        zoomed = ndimage.zoom(image.astype(np.float64), (24 / 40, 24 / 30), order=3)
        labels = np.argmin([abs(zoomed), abs(zoomed - 0.5), abs(zoomed - 1)], axis=0)
        slices.append(ndimage.zoom(labels, (40 / 24, 30 / 24), order=0))
    return np.stack(slices)


def cases(folder: Path) -> list[str]:
    return [row["case"] for row in rows_of(folder)]


@pytest.mark.parametrize(("batch_size", "decollate"), [(1, True), (3, True), (2, False)])
def test_volume_report_and_key_metric_of_an_evaluator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], batch_size: int, decollate: bool
) -> None:
    items = [volume_item(seed) for seed in range(3)]
    report = VolumeReport(tmp_path, CLASSES, selection="held-out cases", title="phantoms")
    metric = VolumeDice(CLASSES)
    engine = evaluator(items, [report], batch_size, decollate, key_val_metric={"val_mean_dice": metric})
    engine.run()
    found = json.loads((tmp_path / "summary.json").read_text())["protocols"]["strict"]["classes"]
    means = []
    for index, name in enumerate(CLASSES, start=1):
        pairs = [(expected_volume(item) == index, item["label"][0].numpy() == index) for item in items]
        pairs = [pair for pair in pairs if pair[0].any() or pair[1].any()]
        means.append(np.mean([binary.dc(*pair) for pair in pairs]))
        assert found[name]["dice"]["mean"] == pytest.approx(means[-1])
        assert found[name]["dice"]["n"] == len(pairs)
        computed = [binary.hd95(*pair, (5.0, 1.5, 1.0)) for pair in pairs if pair[0].any() and pair[1].any()]
        assert found[name]["hd95"]["mean"] == pytest.approx(np.mean(computed))
    assert 0.5 < np.mean(means) < 1
    assert engine.state.metrics["mean_dice"] == pytest.approx(np.mean(means))
    assert engine.state.metrics["val_mean_dice"] == pytest.approx(np.mean(means))
    assert engine.state.best_metric == pytest.approx(np.mean(means))
    assert cases(tmp_path)[::4] == ["case0000", "case0001", "case0002"]
    printed = capsys.readouterr().out
    assert "phantoms: 3 cases; model selected by: held-out cases" in printed
    assert "spleen" in printed


def test_a_second_run_starts_anew(tmp_path: Path) -> None:
    report = VolumeReport(tmp_path, CLASSES)
    engine = evaluator([volume_item(1)], [report], key_val_metric={"dice": VolumeDice(CLASSES)})
    engine.run()
    first = dict(engine.state.metrics)
    engine.run(2)
    assert engine.state.metrics == first
    assert len(report.scores.cases) == 1


@pytest.mark.parametrize("seeds", [(0, 1), (1, 0)])
def test_volume_report_draws_the_first_case(tmp_path: Path, seeds: tuple[int, int]) -> None:
    report = VolumeReport(tmp_path / "new", CLASSES, picture=True)
    evaluator([volume_item(seed) for seed in seeds], [report]).run()
    drawn = [count(pixels(tmp_path / "new" / "overview.png"), colour) > 200 for colour in COLOURS[:2]]
    assert drawn == [True, seeds[0] == 1]  # only case 1 has a spleen
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "metrics.csv",
        "overview.png",
        "report.html",
        "summary.json",
    ]


def image_item(seed: int) -> Item:
    """Noisy logits as the image: the network is the identity."""
    rng = np.random.default_rng(seed)
    label = np.zeros((1, 24, 30))
    label[:, 4 : 14 + seed, 6:18] = 1
    image = 2 * label - 1 + rng.standard_normal(label.shape)
    soft = ndimage.uniform_filter(label, (0, 2, 2))  # edges of exactly 0.5, and of less
    return meta_tensors(image, soft, f"/data/benign ({seed}).png", np.eye(4))


@pytest.mark.parametrize(("batch_size", "decollate"), [(2, True), (3, False)])
def test_image_report_and_key_metrics(tmp_path: Path, batch_size: int, decollate: bool) -> None:
    items = [image_item(seed) for seed in range(3)]
    metrics = {name: ImageMetric(name) for name in ("iou", "specificity", "accuracy")}
    report = ImageReport(tmp_path, ["lesion"], title="lesions", picture=True)
    engine = evaluator(
        items, [report], batch_size, decollate, torch.nn.Identity(), lambda x, network: network(x),
        key_val_metric={"val_iou": metrics.pop("iou")}, additional_metrics={f"val_{k}": m for k, m in metrics.items()},
    )  # fmt: skip
    engine.run()
    counts = [confusion(item["image"][0].numpy() > 0, item["label"][0].numpy() >= 0.5) for item in items]
    for name in ("iou", "specificity", "accuracy"):
        expected = np.mean([per_image(one)[name] for one in counts])
        assert engine.state.metrics[name] == pytest.approx(expected)
        assert engine.state.metrics[f"val_{name}"] == pytest.approx(expected)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["protocols"]["pooled"]["classes"]["lesion"]["iou"]["mean"] == pytest.approx(pooled(counts)["iou"])
    assert cases(tmp_path) == [f"benign ({seed})" for seed in range(3)]
    assert count(pixels(tmp_path / "overview.png"), COLOURS[0]) > 200


def test_image_report_of_several_classes_takes_the_largest_logit(tmp_path: Path) -> None:
    logits = torch.randn(3, 8, 9, generator=torch.Generator().manual_seed(0))
    label = torch.randint(0, 3, (1, 8, 9), generator=torch.Generator().manual_seed(1))
    for key, prediction, is_logits in (("a", logits, True), ("b", logits.argmax(0, keepdim=True), False)):
        report = ImageReport(tmp_path, ["cup", "disc"], logits=is_logits)
        report.add("x.png", {"image": logits, "pred": prediction, "label": label})
        for row, index in zip(report.scores.rows(), (1, 2), strict=True):
            expected = confusion(logits.argmax(0) == index, label[0] == index)
            assert (row.score.tp, row.score.fp, row.score.fn, row.score.tn) == expected, key


@pytest.mark.parametrize(("bgr", "seen"), [(True, "red"), (False, "blue")])
def test_pictures_of_bgr_images_show_red_as_red(tmp_path: Path, bgr: bool, seen: str) -> None:
    image, empty = torch.zeros(3, 24, 30), torch.zeros(1, 24, 30)
    image[2] = 1
    report = ImageReport(tmp_path, logits=False, picture=True, bgr=bgr)
    report.add("x.png", {"image": image, "pred": empty, "label": empty})
    report.finish(Engine(lambda engine, batch: batch))
    picture = pixels(tmp_path / "overview.png")
    assert [count(picture, colour) > 10_000 for colour in ("red", "blue")] == [seen == "red", seen == "blue"]


@pytest.mark.parametrize("engine", ["fast", "medpy"])
def test_reports_take_the_options_of_the_command(tmp_path: Path, engine: str) -> None:
    label = torch.zeros(1, 6, 20, 20)
    label[:, 1:4, 2:9, 2:9] = 1
    pred = label.clone()
    pred[0, 5, 18:, 18:] = 1
    item = {key: MetaTensor(value, AFFINE) for key, value in (("image", label), ("pred", pred), ("label", label))}
    options: dict[str, Any] = {"engine": engine, "postprocess": "largest", "picture": True}
    volumes = VolumeReport(tmp_path / "v", ["a"], tolerance_mm={"a": 0.5}, missed_distance="diagonal", **options)
    images = ImageReport(tmp_path / "i", ["a"], logits=False, tolerance_px=0, **options)
    for report, one in ((volumes, item), (images, {key: value[:, 2] for key, value in item.items()})):
        report.add("x", one)
        report.finish(Engine(lambda engine, batch: batch))
        summary = json.loads((report.output_dir / "summary.json").read_text())
        assert (summary["engine"], summary["postprocess"]) == (engine, "largest")
        assert report.scores.rows()[0].score.surface_dice == 1
    assert "0.5 mm" in volumes.scores.summary().protocols["strict"].rules
    white = count(pixels(tmp_path / "v" / "overview.png"), "white")
    VolumeReport(tmp_path / "w", ["a"], picture=True).add("x", item)
    assert count(pixels(tmp_path / "v" / "overview.png"), COLOURS[0]) > 100
    assert white != count(pixels(tmp_path / "w" / "overview.png"), "white")  # another frame: the false voxels widen it


def test_volumes_of_one_slice_are_drawn_too(tmp_path: Path) -> None:
    label = MetaTensor(torch.ones(1, 1, 8, 9), AFFINE)
    report = VolumeReport(tmp_path, ["a"])
    report.add("x", {"image": label, "pred": label, "label": label})
    report.finish(Engine(lambda engine, batch: batch))
    assert (tmp_path / "report.html").read_text().count("data:image/webp") == 1


def test_cases_without_a_file_are_numbered(tmp_path: Path) -> None:
    items = [{key: volume_item(1)[key].as_tensor() for key in ("image", "label")} for _ in range(2)]
    evaluator(items, [VolumeReport(tmp_path, CLASSES)]).run()
    assert set(cases(tmp_path)) == {"case 1 of process 1", "case 2 of process 1"}


def test_key_metrics_without_a_number_are_none() -> None:
    empty = {key: torch.zeros_like(value) for key, value in volume_item(0).items()}
    engine = evaluator([empty], [], key_val_metric={"dice": VolumeDice(CLASSES)})
    engine.run()
    assert math.isnan(engine.state.metrics["dice"])


def metric_of(metric: Any, *pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """What a key metric says of predictions and labels."""
    engine = Engine(lambda engine, batch: batch)
    metric.attach(engine, "metric")
    return engine.run([[{"pred": pred, "label": label} for pred, label in pairs]]).metrics["metric"]


def test_classes_that_are_nowhere_are_left_out_unless_there_is_one_only() -> None:
    pred, label, empty = torch.zeros(3, 1, 4, 4)
    label[0, 0], pred[0, :2] = 1, 1
    assert metric_of(ImageMetric("iou", ["a", "b"], logits=False), (pred, label)) == pytest.approx(0.5, abs=1e-4)
    assert metric_of(ImageMetric("iou", ["a"], logits=False), (empty, empty)) == 1


def test_the_loss_of_a_network_that_diverged_is_no_number() -> None:
    good, bad = torch.zeros(1, 4, 4), torch.full((1, 4, 4), torch.nan)
    loss = torch.nn.BCEWithLogitsLoss()
    assert metric_of(MeanLoss(loss), (good, good), (good, good)) == pytest.approx(math.log(2))
    assert math.isnan(metric_of(MeanLoss(loss), (good, good), (bad, good)))


def test_key_metrics_refuse_what_they_cannot_score() -> None:
    with pytest.raises(ValueError, match="metric must be one of iou"):
        ImageMetric("f2")
    with pytest.raises(ValueError, match="as many labels as predictions"):
        ImageMetric().update((torch.zeros(2, 1, 4, 4), torch.zeros(1, 1, 4, 4)))


def test_spacing_comes_from_the_affine_unless_nobody_gave_it() -> None:
    rotation = np.array([[0, 0, -2.0, 5], [0, -3, 0, 7], [4, 0, 0, 9], [0, 0, 0, 1]])
    zeros = torch.zeros(1, 2, 2, 2)
    assert spacing_mm(MetaTensor(zeros, rotation)) == (4, 3, 2)
    assert spacing_mm(MetaTensor(zeros, rotation, meta={"spacing_mm": [9, 9, 9]})) == (4, 3, 2)
    assert spacing_mm(MetaTensor(zeros, np.eye(4), meta={"spacing_mm": np.array([5, 2, 2])})) == (5, 2, 2)
    assert spacing_mm(MetaTensor(zeros, np.eye(4))) is None
    assert spacing_mm(MetaTensor(zeros, np.eye(4), meta={"geometry": "file"})) == (1, 1, 1)
    assert spacing_mm(MetaTensor(zeros, rotation, meta={"geometry": "assumed"})) is None
    assert spacing_mm(zeros) is None


TWO_PROCESSES = """
import sys
import torch.distributed as dist
from evaluation import FileEvaluator
from tests.evaluation.test_handlers import CLASSES, VolumeDice, VolumeReport, evaluator, volume_item
rank, rendezvous, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
import ignite.distributed as idist
idist.sync()
cases = [[0, 1], [2, 1]][rank]  # case 1 as a padding sampler repeats it
engine = evaluator([volume_item(i) for i in cases], [VolumeReport(folder, CLASSES)],
                   key_val_metric={"val_mean_dice": VolumeDice(CLASSES)})
engine.run()
print(f"mean {engine.state.metrics['mean_dice']:.6f}", flush=True)
# all of rank 1's cases are bad, then all of both
bad = [{"failure": f"{name}: damaged", "file": f"/in/{name}"} for name in "abcd"]
for name, items in (("some", [[volume_item(0)], bad[:2]]), ("none", [bad[:2], bad[2:]])):
    try:
        evaluator(items[rank], [VolumeReport(f"{folder}/{name}", CLASSES)], kind=FileEvaluator).run()
        print(name, "goes on", flush=True)
    except ValueError as error:
        print(name, "ends:", error, flush=True)
dist.destroy_process_group()
"""


def test_two_processes_report_all_cases_once(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), str(tmp_path / "rendezvous"), str(tmp_path / "both")],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    evaluator([volume_item(seed) for seed in range(3)], [VolumeReport(tmp_path / "one", CLASSES)]).run()
    one, both = ((tmp_path / name / "metrics.csv").read_text() for name in ("one", "both"))
    assert one == both
    mean = json.loads((tmp_path / "one" / "summary.json").read_text())["protocols"]["strict"]["mean"]["dice"]["mean"]
    assert all(f"mean {mean:.6f}" in out.splitlines() for out, _ in outputs)
    assert ["mean of classes" in out for out, _ in outputs] == [True, False]
    assert [out.splitlines()[-2:] for out, _ in outputs] == [
        ["some ends: 2 of 3 files failed: a, b; the lines above say why"]
        + ["none ends: 4 of 4 files failed: a, b, c, d; the lines above say why"],
        ["some goes on", "none goes on"],
    ]
    summary = json.loads((tmp_path / "both/some/summary.json").read_text())
    assert (summary["cases"], summary["failures"]) == (1, {"/in/a": "a: damaged", "/in/b": "b: damaged"})
    assert not (tmp_path / "both/none").exists()


@pytest.mark.parametrize("shape", [(1, 1, 2, 3, 4), (1, 1, 2, 3, 5)])
def test_key_metrics_name_the_file_that_they_cannot_score(shape: tuple[int, ...]) -> None:
    label = MetaTensor(torch.full((1, 2, 3, 4), 9.0), meta={"filename_or_obj": "in/case1.h5"})
    with pytest.raises(ValueError, match=r"^in/case1\.h5: "):
        metric_of(VolumeDice(["a"]), (torch.zeros(shape[1:]), label))
