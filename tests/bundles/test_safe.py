"""Nothing from a file is executed or unpickled, no name leads out of its folder, and no run looks for a network."""

from __future__ import annotations

import ast
import json
import pickle
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

import evaluation.__main__
import prepare.__main__
from bundles.__main__ import main as about_runs
from networks.weights import read_checkpoint
from tests.bundles.conftest import BUNDLES, DATA, OWN, ROOT, Options, Run, config, refused

ROOMS = ("networks", "transforms", "evaluation", "prepare", "bundles", "benchmarks")
SOURCES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]
# Calls that execute what they read, or can.
NEVER = {
    "eval", "exec", "compile", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open",
    "joblib.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle", "os.system", "os.popen",
    "torch.jit.load", "torch.hub.load", "runpy.run_path", "zipfile.extractall", "tarfile.extractall", "extractall",
}  # fmt: skip
NEEDED = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False", "numpy.load": "allow_pickle=False"}


def unsafe(source: str) -> list[str]:
    """The calls in a program that must not be there."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        last = name.rpartition(".")[2]
        if name in NEVER or last == "extractall" or given.get("shell") == "True":
            found.append(name)
        if name in NEEDED and NEEDED[name] not in [f"{key}={value}" for key, value in given.items()]:
            found.append(name)
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(a)", ["torch.load"]),
        ("torch.load(a, weights_only=False)", ["torch.load"]),
        ("torch.load(a, weights_only=True)", []),
        ("np.load(a)", ["np.load"]),
        ("np.load(a, allow_pickle=True)", ["np.load"]),
        ("pickle.loads(a)", ["pickle.loads"]),
        ("eval(a)", ["eval"]),
        ("network.eval()", []),
        ("zipfile.ZipFile(a).extractall(b)", ["zipfile.ZipFile(a).extractall"]),
        ("subprocess.run(a, shell=True)", ["subprocess.run"]),
    ],
)
def test_the_search_finds_what_it_is_for(source: str, found: list[str]) -> None:
    assert unsafe(source) == found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_program_executes_what_it_reads(file: Path) -> None:
    assert unsafe(file.read_text(encoding="utf-8")) == []
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
    }
    assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "requests", "urllib"}


# Malicious files


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "executed"
    pickle.loads(pickle.dumps(Bomb(path)))
    assert path.exists(), "the bomb works"
    path.unlink()
    yield path
    assert not path.exists(), "a file was executed"


def malicious(kind: str, path: Path, mark: Path) -> Path:
    """Weights that execute something where they are unpickled."""
    bomb = {"state_dict": {"layer.weight": Bomb(mark)}, "position": {}, "epoch": 1}
    if kind == "zip":
        torch.save(bomb, path)
    elif kind == "legacy":
        torch.save(bomb, path, _use_new_zipfile_serialization=False)
    elif kind == "plain":
        path.write_bytes(pickle.dumps(bomb))
    elif kind == "numpy":
        with path.open("wb") as file:
            np.save(file, np.array([Bomb(mark)], dtype=object))
    elif kind == "script":
        shutil.copyfile(malicious("zip", path.with_suffix(".tmp"), mark), path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("archive/constants.pkl", pickle.dumps(bomb))
    return path


KINDS = ("zip", "legacy", "plain", "numpy", "script")


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_never_executed(kind: str, suffix: str, tmp_path: Path, mark: Path) -> None:
    with pytest.raises(ValueError, match="never loaded|damaged|TorchScript"):
        read_checkpoint(malicious(kind, tmp_path / f"a{suffix}", mark))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("entrance", ["pretrained", "resume", "evaluating", "inferring", "exporting"])
def test_no_entrance_executes_weights(
    entrance: str,
    kind: str,
    options: Options,
    run: Run,
    tmp_path: Path,
    mark: Path,
    data: Path,
) -> None:
    bundle, folder = "cmunext_busi", tmp_path / "models"
    folder.mkdir()
    for name in ("model.pt", "last.pt", "last.previous.pt"):
        malicious(kind, folder / name, mark)
    chosen = options(bundle, folder, max_epochs=1)
    own = {"network_def": OWN[bundle], "ckpt_dir": str(folder), "output_dir": str(tmp_path / "out")}
    line = "never loaded|damaged|TorchScript"
    with refused(line):
        if entrance == "pretrained":
            chosen |= {"ckpt_dir": str(tmp_path / "new"), "pretrained": f"{folder}/model.pt"}
            run("training", config(bundle), **chosen)
        elif entrance == "resume":
            run("training", config(bundle), **chosen, resume=True)
        elif entrance == "evaluating":
            run("evaluating", config(bundle, "train", "evaluate"), **chosen)
        else:
            more = {"input": str(data / "busi/images"), "filepath": str(tmp_path / "a.ts")}
            run(entrance, config(bundle, "inference"), **own, **more)


@pytest.mark.parametrize("form", ["object array", "pickle", "npy with objects"])
def test_no_entrance_executes_slices(
    form: str,
    options: Options,
    run: Run,
    tmp_path: Path,
    mark: Path,
    data: Path,
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data / "synapse", folder)
    for file in (folder / "train_npz").iterdir():
        objects = np.array([[Bomb(mark)]], dtype=object)
        if form == "object array":
            np.savez(file, image=objects, label=objects)
        elif form == "pickle":
            file.write_bytes(pickle.dumps({"image": Bomb(mark)}))
        else:
            with file.open("wb") as end:
                np.save(end, objects)
    for check in ("quick", False):
        chosen = options("vmunet_synapse", tmp_path / "models", max_epochs=1, check_data=check)
        with refused(r"\.npz: "):
            run("training", config("vmunet_synapse"), **chosen | {"dataset_dir": str(folder)})


def test_pictures_and_volumes_are_never_executed(tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture) -> None:
    """Whatever its name says, a pickle is no picture, volume or prediction."""
    bomb = pickle.dumps(Bomb(mark))
    for suffix in (".png", ".nii", ".nii.gz", ".h5", ".npz", ".tif", ".hdr"):
        raw = tmp_path / f"raw{suffix}"
        for place in ("benign", "img", "images", "predictions", "labels", "masks"):
            (raw / place).mkdir(parents=True)
        for name in ("benign/benign (1)", "benign/benign (1)_mask", "img/img0001", "images/a", "masks/a"):
            (raw / f"{name}{suffix}").write_bytes(bomb)
        for place in ("predictions", "labels"):
            (raw / place / f"case1{suffix}").write_bytes(bomb)
        for words in (["busi"], ["isic"], ["synapse"]):
            with _any_end():
                assert prepare.__main__.main([*words, "--raw", str(raw), "--out", str(tmp_path / "out")]) != 0
        with _any_end():
            places = [str(raw / "predictions"), str(raw / "labels")]
            assert evaluation.__main__.main([*places, "--output", str(tmp_path / "scores")]) != 0
        with _any_end():
            assert prepare.__main__.main(["check", str(raw)]) != 0
    assert "Traceback" not in capsys.readouterr().err


class _any_end:
    """A command may end with a code or a SystemExit; what matters here is that nothing is executed."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        return isinstance(error, SystemExit) and error.code not in (0, None)


def test_objects_in_hdf5_are_not_executed(tmp_path: Path, mark: Path) -> None:
    from transforms.volumes import read_volume

    path = tmp_path / "case1.npy.h5"
    with h5py.File(path, "w") as file:
        file["image"] = np.frombuffer(pickle.dumps(Bomb(mark)), np.uint8)
        file["label"] = np.void(pickle.dumps(Bomb(mark)))
    for name in ("image", "label"):
        with pytest.raises(ValueError, match=r"case1\.npy\.h5"):
            read_volume(path, name)


def test_records_are_data(tmp_path: Path, mark: Path, capsys: pytest.CaptureFixture) -> None:
    """`runs` reads what lies there, and executes nothing of it."""
    (tmp_path / "run.json").write_bytes(pickle.dumps(Bomb(mark)))
    assert about_runs(["runs", str(tmp_path)]) == 1
    assert about_runs(["reproduce", str(tmp_path)]) == 1
    said = f"$__import__('pathlib').Path({str(mark)!r}).touch()"
    texts = dict.fromkeys(("id", "started", "how_it_ended", "command", "network", "selection"), said)
    (tmp_path / "run.json").write_text(json.dumps({"format": 1, **texts, "settings": {}, "data": {}}))
    assert about_runs(["runs", str(tmp_path)]) == 0
    assert said[:16] in capsys.readouterr().out


def test_safetensors_hold_tensors_alone(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")["a"], torch.ones(1))


# Names


@pytest.mark.parametrize("name", ["../../secret", "../train_npz/../../secret", "/etc/passwd"])
def test_lists_do_not_lead_out_of_their_folder(
    name: str,
    options: Options,
    run: Run,
    tmp_path: Path,
    data: Path,
) -> None:
    for bundle, lists in (("vmunet_synapse", "lists/lists_Synapse/train.txt"), ("cmunext_busi", "busi_train1.txt")):
        folder = tmp_path / bundle
        shutil.copytree(data / DATA[bundle], folder)
        with (folder / lists).open("a") as file:
            file.write(f"\n{name}\n")
        chosen = options(bundle, tmp_path / "models", max_epochs=1) | {"dataset_dir": str(folder)}
        with refused(rf"{Path(lists).name}: .* is no name but leads to a folder"):
            run("training", config(bundle), **chosen)


ODD = ["$print(1)", "@device", "%train", "a#b", "a::b", "{x}", "$__import__('os').abort()", "100 %", "a b", "été", "~x"]


def test_names_of_files_are_never_evaluated(
    options: Options,
    run: Run,
    tmp_path: Path,
    data: Path,
) -> None:
    """A data set whose pictures, and whose folders, are named like expressions, references and macros."""
    bundle, folder = "cmunext_busi", tmp_path / "100% $x @device a#b/busi"
    pairs = []
    for number, file in enumerate(sorted((data / "busi/images").iterdir())):
        name = ODD[number % len(ODD)] + str(number) * (number >= len(ODD))
        mask = next((data / "busi/masks").rglob(f"{file.stem}*"))
        for kind, source in (("images", file), ("masks", mask)):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            with Image.open(source) as picture:
                picture.save(folder / kind / f"{name}.png")
        pairs.append(name)
    models, out = tmp_path / "$models @x %y a#b", tmp_path / "@out %z a#b"
    chosen = options(bundle, models, max_epochs=1) | {"dataset_dir": str(folder), "output_dir": str(out)}
    run("training", config(bundle), **chosen)
    assert (models / "model.pt").is_file()
    run("evaluating", config(bundle, "train", "evaluate"), **chosen)
    where = {"input": str(folder / "images"), "output_dir": str(out / "masks"), "ckpt_dir": str(models)}
    own = {"network_def": OWN[bundle], "image_size": 32}
    run("inferring", config(bundle, "inference"), **where, **own)
    assert len(list((out / "masks").rglob("*.png"))) == len(pairs)
    for name in ODD[:6]:
        one = where | {"input": str(folder / "images" / f"{name}.png")}
        run("inferring", config(bundle, "inference"), **one, **own)
    # in the working directory a name begins with its first letter; of %, MONAI wants a file of its own
    for name in ("$print(1).png", "@device.png"):
        shutil.copy(folder / "images" / name, name)
        run("inferring", config(bundle, "inference"), **where | {"input": name, "output_dir": "out"}, **own)
    assert len(list(Path("out").rglob("*.png"))) == 2


# The network


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **more: Any) -> Any:
        raise AssertionError(f"a run asked for the network: {arguments}")

    connect = socket.socket.connect

    def local(self: socket.socket, address: Any) -> Any:
        return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

    monkeypatch.setattr(socket.socket, "connect", local)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "gethostbyname", refuse)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_runs_need_no_network(
    bundle: str,
    offline: None,
    options: Options,
    run: Run,
    tmp_path: Path,
    data: Path,
) -> None:
    with pytest.raises(AssertionError, match="asked for the network"):
        socket.create_connection(("example.org", 80))
    chosen = options(bundle, tmp_path, max_epochs=1, num_workers=1)
    run("training", config(bundle), **chosen)
    run("evaluating", config(bundle, "train", "evaluate"), **chosen)
    places = {"cmunext_busi": "images", "vmunet_isic": "val/images", "vmunet_synapse": "test_vol_h5"}
    source = data / DATA[bundle] / places[bundle]
    own = {"network_def": OWN[bundle], "image_size": 32, "ckpt_dir": str(tmp_path)}
    run("inferring", config(bundle, "inference"), **own, input=str(source), output_dir=str(tmp_path / "masks"))
    assert any((tmp_path / "masks").rglob("*.*"))
