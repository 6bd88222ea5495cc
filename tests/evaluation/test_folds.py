import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest

from evaluation.folds import main, summarise
from evaluation.results import write_results
from evaluation.scores import ImageScores, VolumeScores

PUBLISHED = {"name": "as published", "iou": 71.56, "iou_sd": 2.43}


def write_run(folder: Path, seed: int, images: int, **options: object) -> list[float]:
    """Evaluates random masks as a bundle does; the IoU of each image, counted by hand."""
    rng = np.random.default_rng(seed)
    scores = ImageScores(**{"classes": ["lesion"], "selection": "IoU", "published": PUBLISHED, **options})
    iou = []
    for index in range(images):
        predicted, true = rng.random((2, 9, 7)) > 0.4
        scores.add(f"{index}.png", predicted.astype(np.uint8), true.astype(np.uint8))
        iou.append(((predicted & true).sum() + 1e-5) / ((predicted | true).sum() + 1e-5))
    write_results(folder, scores.summary(), scores.rows())
    return iou


def write_volumes(folder: Path) -> None:
    scores = VolumeScores(["liver"])
    scores.add("a", np.ones((2, 3, 4), int), np.ones((2, 3, 4), int))
    write_results(folder, scores.summary(), scores.rows())


def test_every_run_counts_once_whatever_its_number_of_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [tmp_path / name for name in "abc"]
    means = [statistics.fmean(write_run(folder, seed, 2 + 3 * seed)) for seed, folder in enumerate(folders)]
    main([*map(str, folders), "--output", str(tmp_path / "folds.json")])
    iou = json.loads((tmp_path / "folds.json").read_text())["protocols"]["per image"]["metrics"]["iou"]
    assert iou["n"] == 3
    assert math.isclose(iou["mean"], sum(means) / 3)
    assert math.isclose(iou["sd"], np.std(means, ddof=1))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("IoU"))
    assert f"{100 * iou['mean']:.2f} ± {100 * iou['sd']:.2f}" in line
    assert line.endswith("71.56 ± 2.43")


def test_one_run_has_no_spread_and_may_have_no_published_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (iou,) = write_run(tmp_path, 0, 1, published={})
    assert summarise([tmp_path])["protocols"]["pooled"]["metrics"]["dice"]["sd"] is None
    main([str(tmp_path)])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("IoU"))
    assert line.split()[2:4] == [f"{100 * iou:.2f}", "1"]


def test_runs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 0, 2)
    write_run(tmp_path / "b", 0, 2, selection="the loss")
    with pytest.raises(ValueError, match=r"b: selection 'the loss' differs from 'IoU'"):
        summarise([tmp_path / "a", tmp_path / "b"])
    (tmp_path / "c").mkdir()
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    write_volumes(tmp_path / "v")
    with pytest.raises(ValueError, match="no summary of an evaluation of single images"):
        summarise([tmp_path / "v"])
    for change, message in (
        ({"kind": "volumes"}, "not what an evaluation writes"),
        ({"protocols": 7}, r"summary.json: not what an evaluation writes"),
        ({"protocols": {"pooled": {}}}, "summary.json: lacks 'classes'; evaluate that run again"),
        ({"published": {"nmae": "x"}}, "not what an evaluation writes .*nmae"),
    ):
        (tmp_path / "c/summary.json").write_text(json.dumps(summary | change))
        with pytest.raises(ValueError, match=message):
            summarise([tmp_path / "c"])
    (tmp_path / "c/summary.json").write_text('{"protocols": {}}')
    with pytest.raises(ValueError, match="no summary of format 1; evaluate that run again"):
        summarise([tmp_path / "c"])
    (tmp_path / "c/summary.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable summary"):
        summarise([tmp_path / "c"])
    with pytest.raises(
        SystemExit, match=r"error: .*d.summary\.json: does not exist; name a folder that an evaluation has written"
    ):
        main([str(tmp_path / "d")])
