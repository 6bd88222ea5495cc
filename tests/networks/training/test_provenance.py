from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from networks.training import Origin, RunRecord, provenance
from networks.training.provenance import plain, read_run
from transforms import replacing

SETTINGS = {"fold": 1, "image_size": [32, 48], "classes": ("cup", "disc"), "label_map": {0: 0, 128: 1}, "seed": 41}


def items_of(folder: Path, *names: str) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(f"content of {name}")
    return [{"image": str(folder / name), "label": str(folder / name), "spare": 1} for name in names]


def record_in(folder: Path, settings: dict[str, Any] | None = None, **parts: list[dict[str, Any]]) -> RunRecord:
    split = SimpleNamespace(**{"train": [], "validation": [], "test": [], "rule": "IoU on held-out images"} | parts)
    settings = SETTINGS if settings is None else settings
    return RunRecord(folder / "models", nn.Linear(1, 1), "cpu", split, settings, replacing, {"overrides": {"fold": 1}})


@pytest.fixture
def data(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    names = {"train": ("a.png", "b.png"), "validation": ("c.png",), "test": ("d.png", "e.png")}
    return {part: items_of(tmp_path / "data", *some) for part, some in names.items()}


@pytest.fixture
def model(tmp_path: Path, data: dict[str, list[dict[str, Any]]]) -> Path:
    """The weights of a run that has been completed."""
    record = record_in(tmp_path, **data)
    record.write()
    record.end("completed", best={"score": 0.5})
    state = nn.Linear(1, 1).state_dict()
    state._metadata["__run__"] = {"id": record.id}
    torch.save(state, record.path.with_name("model.pt"))
    torch.save({"run_id": record.id, "model": state}, record.path.with_name("last.pt"))
    return record.path.with_name("model.pt")


def test_a_record_says_what_a_repetition_needs(tmp_path: Path, data: dict[str, list[dict[str, Any]]]) -> None:
    record = record_in(tmp_path, **data)
    record.write()
    started = read_run(record.path)
    assert started["how_it_ended"] == "running, or killed"
    assert started["overrides"] == {"fold": 1}
    assert started["selection"] == "IoU on held-out images"
    assert started["settings"] == plain(SETTINGS) | {"data": record.settings["data"]}
    assert started["versions"].keys() >= {"python", "torch", "monai", "numpy"}
    assert {part: len(items) for part, items in started["data"].items()} == {"train": 2, "validation": 1, "test": 2}
    image, digest = started["data"]["test"][0]["image"]
    assert (image, digest) == (data["test"][0]["image"], hashlib.sha256(b"content of d.png").hexdigest())
    record.end("completed", epochs=3, best={"metric": "iou", "score": 0.5, "epoch": 2})
    ended = read_run(record.path)
    assert (ended["how_it_ended"], ended["epochs"], ended["best"]["epoch"]) == ("completed", 3, 2)
    assert ended["ended"] >= ended["started"] == started["started"]


def test_the_data_are_known_by_content_and_part(tmp_path: Path, data: dict[str, list[dict[str, Any]]]) -> None:
    def fingerprint(**parts: list[dict[str, Any]]) -> str:
        return record_in(tmp_path, **parts).settings["data"]

    here = fingerprint(**data)
    moved = {
        part: items_of(tmp_path / "moved", *(Path(item["image"]).name for item in some)) for part, some in data.items()
    }
    assert fingerprint(**moved) == here
    assert fingerprint(**data | {"train": data["train"][::-1]}) != here
    assert fingerprint(**data | {"train": data["validation"], "validation": data["train"]}) != here
    Path(data["test"][0]["label"]).write_text("another mask")
    assert fingerprint(**data) != here
    # several masks of one image, and slices of one case
    several = [{"image": data["train"][0]["image"], "label": [data["test"][0]["label"], data["test"][1]["label"]]}]
    assert fingerprint(train=several) != fingerprint(train=[several[0] | {"label": several[0]["label"][::-1]}])
    assert record_in(tmp_path, train=[{"image": "no.png"}]).data["train"] == [{"image": ["no.png", "unreadable"]}]


def test_a_record_goes_on_with_the_earlier_commands(tmp_path: Path) -> None:
    first = record_in(tmp_path)
    first.write()
    second = record_in(tmp_path)
    second.resume(first.id)
    second.write()
    third = record_in(tmp_path)
    third.resume(first.id)
    third.write()
    content = read_run(third.path)
    assert content["id"] == first.id == third.id
    assert [set(command) for command in content["earlier_commands"]] == [{"command", "started"}] * 2
    # run.json of another run, or none
    fourth = record_in(tmp_path)
    fourth.resume("f" * 32)
    assert fourth.id == fourth.content["id"] == "f" * 32
    assert "earlier_commands" not in fourth.content


def test_a_run_does_not_fail_for_its_record(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = record_in(tmp_path)
    record.path.mkdir(parents=True)
    record.write()
    assert f"{record.path} cannot be written" in caplog.text
    # names of files are bytes
    odd = record_in(tmp_path / "odd", train=[{"image": os.fsdecode(b"no\xff.png")}])
    odd.write()
    assert read_run(odd.path)["data"]["train"][0]["image"][1] == "unreadable"


def test_code_in_the_repository_of_something_else_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@b.example"]
        subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True)

    module = tmp_path / "networks/training/provenance.py"
    module.parent.mkdir(parents=True)
    module.touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(module))
    found = provenance._git()
    assert found is not None
    assert (len(found["commit"]), found["clean"]) == (40, True)
    module.write_text("changed")
    assert provenance._git() == found | {"clean": False}
    below = tmp_path / "venv/site-packages/networks/training/provenance.py"
    below.parent.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(below))
    assert provenance._git() is None


@pytest.mark.parametrize("name", ["model.pt", "last.pt"])
def test_what_is_equal_passes(name: str, model: Path, data: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    origin = Origin(model.with_name(name))
    origin.check(SETTINGS, data["test"])
    # fewer of the test images, and settings that the run did not know
    origin.check({"fold": 1, "new": 3}, data["test"][:1])
    origin.check({})
    assert origin.selection == "IoU on held-out images"
    assert [record.levelname for record in caplog.records] == ["INFO"] * 3
    assert f"is of run {origin.run_id[:8]}, selected by IoU on held-out images" in caplog.text


@pytest.mark.parametrize(
    ("name", "value", "then"),
    [
        ("fold", 2, "1"),
        ("fold", "1", "1"),
        ("image_size", 32, r"\[32, 48\]"),
        ("classes", ["cup"], r"\['cup', 'disc'\]"),
        ("classes", ["disc", "cup"], r"\['cup', 'disc'\]"),
        ("label_map", None, r"\{'0': 0, '128': 1\}"),
        ("seed", 0, "41"),
    ],
)
def test_a_differing_setting_is_refused(
    name: str, value: Any, then: str, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = rf"model\.pt was trained with {name} {then}, and it is .* now: give what the run had, or --force true"
    with pytest.raises(ValueError, match=line):
        Origin(model).check(SETTINGS | {name: value})
    Origin(model).check(SETTINGS | {name: value}, force=True)
    assert f"was trained with {name}" in caplog.text


def test_images_that_the_run_has_seen_are_refused_wherever_they_lie(
    model: Path, data: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    [copied] = items_of(tmp_path / "elsewhere", "b.png")
    line = r"the run of .*model\.pt was trained on .*elsewhere/b\.png, which is to be evaluated: give .* --force true"
    with pytest.raises(ValueError, match=line):
        Origin(model).check(SETTINGS, [*data["test"], copied])
    Origin(model).check(SETTINGS, [copied], force=True)
    assert "was trained on" in caplog.text
    # those that chose the model, and those of another data set, are no test images
    other = items_of(tmp_path / "other", "x.png")
    for some in (data["validation"], other):
        with pytest.raises(ValueError, match=rf"{some[0]['image']} is none of the test images of the run of"):
            Origin(model).check(SETTINGS, [*data["test"], *some])
    Origin(model).check(SETTINGS, other, force=True)
    assert "x.png is none of the test images" in caplog.text


def test_a_volume_is_known_by_its_slices(tmp_path: Path, model: Path) -> None:
    train = items_of(tmp_path / "npz", "case1_slice000.npz", "case1_slice001.npz")
    volumes = items_of(tmp_path / "h5", "case1.npy.h5", "case2.npy.h5")
    record = record_in(tmp_path, train=train, test=volumes)
    record.id = record.content["id"] = str(Origin(model).run_id)
    record.write()
    Origin(model).check({}, volumes[1:])
    with pytest.raises(ValueError, match=r"was trained on .*h5/case1\.npy\.h5"):
        Origin(model).check({}, volumes)


def test_a_run_that_is_copied_whole_stays_known(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model.parent, tmp_path / "copy")
    with pytest.raises(ValueError, match="was trained with fold 1"):
        Origin(tmp_path / "copy/model.pt").check({"fold": 2})
    (tmp_path / "copy/model.pt").rename(tmp_path / "copy/best.pt")
    assert Origin(tmp_path / "copy/best.pt").selection == "IoU on held-out images"


BROKEN = {
    "no json": b"{",
    "no text": b"\xff\xfe\x00",
    "empty": b"",
    "a list": b"[]",
    "another format": b'{"format": 99}',
    "half": b'{"format": 1}',
    "other kinds": b'{"format": 1, "id": 1, "settings": []}',
    "deep": b'{"a":' * 100_000,
}


@pytest.mark.parametrize("damage", [*BROKEN, "missing", "of another run", "a folder", "settings of other kinds"])
def test_a_record_that_cannot_be_read_is_an_unknown_origin(
    damage: str, model: Path, data: Any, caplog: pytest.LogCaptureFixture
) -> None:
    path = model.with_name("run.json")
    content = json.loads(path.read_bytes())
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "of another run":
        path.write_text(json.dumps(content | {"id": "0" * 32}))
    elif damage == "settings of other kinds":
        path.write_text(json.dumps(content | {"settings": [1], "data": 3}))
    elif damage in BROKEN:
        path.write_bytes(BROKEN[damage])
    origin = Origin(model)
    origin.check({"fold": 2}, data["train"])
    assert origin.selection == "unknown: no run.json of the weights' run"
    assert f"{model} is of unknown origin: no run.json of its run lies beside it, nothing is checked" in caplog.text


def test_lists_of_other_kinds_in_a_record_do_not_matter(model: Path, data: Any) -> None:
    path = model.with_name("run.json")
    content = json.loads(path.read_bytes())
    content["data"] = {"train": [3, {"image": 3}, {}, {"image": ["a"]}], "test": content["data"]["test"]}
    path.write_text(json.dumps(content))
    Origin(model).check({}, data["test"])


@pytest.mark.parametrize("content", [{"weight": torch.ones(1)}, {"__run__": 3}, [1], torch.ones(1), b"no checkpoint"])
def test_weights_that_name_no_run(content: Any, model: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = model.with_name("published.pth")
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    origin = Origin(path)
    origin.check({"fold": 2})
    assert origin.selection == "unknown: the weights name no run"
    assert f"{path} is of unknown origin: it names no run, nothing is checked" in caplog.text


def test_metadata_of_other_kinds(model: Path) -> None:
    for metadata in ([], {"__run__": 5}, {"__run__": {"id": 5}}):
        state = nn.Linear(1, 1).state_dict()
        state._metadata = metadata
        torch.save(state, model)
        assert Origin(model).run_id is None


def test_asking_for_the_run_reads_no_weights(model: Path) -> None:
    for name in ("model.pt", "last.pt"):
        content = provenance.read_checkpoint(model.with_name(name), tensors=False)
        assert all(tensor.is_meta for tensor in content.get("model", content).values())
