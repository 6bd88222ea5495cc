"""Settings are checked before any work, and errors reach the user as one line, whatever MONAI wraps them in."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from monai.bundle import ConfigParser
from torch.utils.data import DataLoader, Dataset

import bundles
from bundles.settings import checked, refuse_no_component, refuse_no_python, refuse_unknown
from tests.bundles.conftest import BUNDLES, OWN, Options, Run, command, config, refused, words
from transforms import InputError

Wrap = Callable[[Exception], Exception]

# What is typed, and what is said of it after `--NAME VALUE: `.
VALUES: list[tuple[str, Any, str]] = [
    *(("image_size", value, "a whole number of pixels") for value in (0, -1, 2.5, "abc", [64, 0], [1, 2, 3], True)),
    *(("batch_size", value, "a whole number above 0") for value in (0, -4, 1.5, "many", "nan")),
    *(("max_epochs", value, "a whole number above 0") for value in (0, "inf", None)),
    *(("learning_rate", value, "a number above 0 and up to 10") for value in ("nan", 1e9, 0, -0.1, "fast", [0.1])),
    *(("early_stop", value, "a whole number, 0 or above") for value in ("x", -1)),
    *(("seed", value, "a whole number, 0 or above") for value in (-1, 2**32)),
    *(("fold", value, "the number of a split") for value in ("*", 0, "../1")),
    *(("val_fraction", value, "a share above 0 and below 1") for value in (0, 1, 30)),
    *(("selection", value, "holdout or paper") for value in ("test", None)),
    *(("amp_dtype", value, "float32, bfloat16 or auto") for value in ("float16", True)),
    *(("compile", value, "true, false or auto") for value in ("yes", 1)),
    *(("resume", value, "true, false or auto") for value in ("yes", 2)),
    *(("force", value, "true or false") for value in ("yes", "auto", 2)),
    *(("clip_grad", value, "a number, 0 or above") for value in (-1, "nan", "inf")),
    *(("in_channels", value, "1, 3 or 4") for value in (2, 0, "rgb")),
    ("year", 2019, "2017 or 2018"),
    # a variable that a shell does not know
    *((name, value, "a path") for name in ("input", "dataset_dir", "pretrained") for value in ("", " ")),
    *(("ckpt_path", value, "a path, or a list of paths") for value in ("", [], "[]", ["a.pt", 3])),
    *(("classes", value, "a list of different names") for value in (["a", "a"], [], [1, 2], 3, [""])),
    *(("device", value, "a device that this machine has") for value in ("gpu", "cuda:99", 3.5, "meta:x")),
]


@pytest.mark.parametrize(("name", "value", "expected"), VALUES)
def test_values_that_a_setting_cannot_have(name: str, value: Any, expected: str) -> None:
    with pytest.raises(InputError) as caught:
        checked(name, value)
    assert str(caught.value).startswith(f"--{name} {value}: expected {expected}")


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("image_size", (192, 256), [192, 256]),
        ("image_size", 224, 224),
        ("image_size", [64, 64], 64),
        ("max_epochs", 3.0, 3),
        ("classes", "lesion", ["lesion"]),
        ("compile", "auto", "auto"),
        ("amp_dtype", "auto", "auto"),
        ("year", "2018", 2018),
        ("device", "cpu", "$torch.device('cpu')"),
        ("batch_size", "$2 * 4", "$2 * 4"),
        ("max_epochs", "@epochs", "@epochs"),
        ("ckpt_path", "[a.pt, 'b c.pt']", ["a.pt", "b c.pt"]),
        ("ckpt_path", "[1].pt", "[1].pt"),
        ("a setting of one's own", "anything", "anything"),
    ],
)
def test_values_are_taken_as_configurations_need_them(name: str, value: Any, taken: Any) -> None:
    assert checked(name, value) == taken
    assert type(checked(name, value)) is type(taken)


KNOWN = {
    "max_epochs": 300,
    "batch_size": 8,
    "train": {"dataloader": {"_target_": "DataLoader", "batch_size": "@batch_size"}, "handlers": [{"_target_": "A"}]},
}


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("max_epoch", "--max_epoch: no such setting; did you mean --max_epochs?"),
        ("batchsize", "--batchsize: no such setting; did you mean --batch_size?"),
        ("train#dataloadr", "--train#dataloadr: no such setting; did you mean --train#dataloader?"),
        ("trian#dataloader#drop_last", "--trian#dataloader#drop_last: no such setting; did you mean --train?"),
        ("xyz", "--xyz: no such setting; the nearest are max_epochs, batch_size, train"),
    ],
)
def test_a_mistyped_setting_is_refused_with_the_nearest(name: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        refuse_unknown({name: 5}, KNOWN)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize(
    "given",
    [
        {"max_epochs": 5, "train#dataloader": {"_target_": "Mine"}},
        {"train#dataloader#drop_last": True, "train::dataloader::num_workers": 0, "train#handlers#0#name": "a"},
        {"epochs": 5, "max_epochs": "@epochs"},
        {"_mode_": "debug"},
    ],
)
def test_settings_may_be_added_where_something_takes_them(given: dict[str, Any]) -> None:
    refuse_unknown(given, KNOWN)


def wrapped(error: Exception, times: int = 3) -> Exception:
    """As MONAI hands on what a transform, a component or an expression raised."""
    for _ in range(times):
        try:
            raise RuntimeError("Failed to evaluate ConfigExpression\n with advice") from error
        except RuntimeError as outer:
            error = outer
    return error


def raised_by(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (any: one_line is to tell them apart)
        call()
    return caught.value


@pytest.mark.parametrize("wrap", [lambda error: error, wrapped])
def test_lines_for_the_user_are_told_from_faults_of_the_program(wrap: Wrap, tmp_path: Path) -> None:
    def line(call: Callable[[], object]) -> str | None:
        return bundles.one_line(wrap(raised_by(call)))

    assert line(lambda: checked("fold", 0)) == "--fold 0: expected the number of a split: 1, 2, …"
    # a ValueError on purpose, and one of NumPy below a function of ours
    from evaluation import hd95
    from transforms import spline_zoom

    assert line(lambda: hd95(np.ones(3, bool), np.ones(4, bool))) is not None
    assert line(lambda: spline_zoom(None, (1, 2), 3)) is None
    assert line(lambda: np.zeros(3).reshape(2)) is None
    assert line(lambda: [][0]) is None
    assert line(lambda: (tmp_path / "no").read_text()) == f"{tmp_path / 'no'}: No such file or directory"
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert bundles.one_line(wrap(full)) == "No space left on device"
    assert "not enough memory" in str(bundles.one_line(wrap(MemoryError())))
    assert bundles.one_line(KeyboardInterrupt()) == "interrupted"


class Broken(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise InputError("holds 3, which no class has", path="a.png")


class BrokenBelowMONAI(Broken):
    def __getitem__(self, index: int) -> None:
        try:
            super().__getitem__(index)
        except InputError as error:
            raise RuntimeError("applying transform <LoadImaged>") from error


@pytest.mark.parametrize("dataset", [Broken(), BrokenBelowMONAI()])
def test_lines_come_through_from_other_processes(dataset: Dataset) -> None:
    error = raised_by(lambda: list(DataLoader(dataset, num_workers=1)))
    assert bundles.one_line(wrapped(error)) == "a.png: holds 3, which no class has"


COMMANDS = {
    "--batchsize 4": r"--batchsize: no such setting; did you mean --batch_size?",
    "--fold *": "--fold *: expected the number of a split: 1, 2, …",
    "--network_def#_target_ networks.cmunex": "there is no networks.cmunex; did you mean networks.cmunext?",
    "--network_def#widths 3": "cmunext() takes no setting 'widths'",
    "--image_size @size": "the configuration refers to @size, which it does not define",
    "--train#dataloader#drop_lst true": "DataLoader takes no setting 'drop_lst'",
}


@pytest.mark.parametrize("typed", COMMANDS)
def test_a_command_ends_with_its_line(typed: str, options: Options, tmp_path: Path) -> None:
    chosen = options("cmunext_busi", tmp_path)
    del chosen["network_def"]
    for debug in (False, True)[: 2 if typed == "--batchsize 4" else 1]:
        more = [*typed.split(" "), *(["--debug", "true"] if debug else [])]
        done = command("training", config("cmunext_busi"), tmp_path, *words(chosen), *more)
        assert done.returncode == 1
        assert (done.stdout + done.stderr).strip().splitlines()[-1] == COMMANDS[typed]
        assert ("Traceback" in done.stdout + done.stderr) == debug
        assert not (tmp_path / "model.pt").exists()


def test_a_pattern_that_the_shell_expanded_is_refused(data: Path, tmp_path: Path) -> None:
    pictures = sorted(map(str, (data / "busi/images").iterdir()))[:3]
    where = ["--load_pretrain", "false", "--output_dir", "out", "--ckpt_path", "none"]
    done = command("inferring", config("cmunext_busi", "inference"), tmp_path, "--input", *pictures, *where)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"{pictures[1]}: one word more than expected; quote")
    assert not (tmp_path / "out").exists()


def test_a_package_of_the_same_name_is_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "transforms").mkdir()
    (tmp_path / "transforms/__init__.py").touch()
    done = command("training", config("cmunext_busi"), tmp_path)
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"{tmp_path}/transforms/__init__.py hides this project's package transforms: run from")


def test_one_unreadable_file_does_not_stop_the_rest(
    data: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(data / "busi/images", folder)
    first, second, *rest = sorted(folder.iterdir())
    second.write_bytes(b"no picture")
    with refused(f"1 of {2 + len(rest)} files failed: {re.escape(str(second))}: "):
        run(
            "inferring", config("cmunext_busi", "inference"), load_pretrain=False, input=str(folder), image_size=32,
            output_dir=str(tmp_path / "out"), network_def={"_target_": "networks.cmunext_s"},
        )  # fmt: skip
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert written == {"volumes.csv", *(f"{file.stem}_mask.png" for file in (first, *rest))}
    rest[0].write_bytes(b"no picture")
    with refused(r"^2 of 2 files failed: .+\.png, .+\.png; the lines above say why$"):
        run(
            "inferring", config("cmunext_busi", "inference"), load_pretrain=False, image_size=32,
            input=[str(second), str(rest[0])], output_dir=str(tmp_path / "out"),
            network_def={"_target_": "networks.cmunext_s"},
        )  # fmt: skip
    lines = [line.partition(" ERROR ")[2] for line in capsys.readouterr().out.splitlines() if " ERROR " in line]
    assert [line.partition(": ")[0] for line in lines] == [str(second), str(rest[0])]


def test_outputs_that_do_not_fit_the_classes_are_refused(
    options: Options, run: Run, data: Path, tmp_path: Path
) -> None:
    """A network of one output with two classes once trained, and was evaluated as perfect."""
    one = {"_target_": "BasicUNet", "spatial_dims": 2, "in_channels": 3, "features": [4, 4, 8, 8, 8, 4]}
    named = {"classes": ["a", "b"], "label_map": {0: 0, 128: 1, 255: 2}, "network_def": {**one, "out_channels": 1}}
    line = "BasicUNet answers with 1 channel, and the classes need 3"
    with refused(line):
        run("training", config("cmunext_busi"), **options("cmunext_busi", tmp_path, **named))
    where = {"input": str(data / "busi/images"), "output_dir": str(tmp_path / "out"), "load_pretrain": False}
    with refused(line):
        run("inferring", config("cmunext_busi", "inference"), **named, **where)
    own = {"network_def": {"_target_": "networks.cmunext_s", "out_channels": 3}}
    with refused("CMUNeXt answers with 3 channels, and the classes need 1"):
        run("exporting", config("cmunext_busi", "inference"), **own, filepath=str(tmp_path / "a.ts"))
    assert not (tmp_path / "model.pt").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"network_def": "cmunext"}, "--network_def cmunext: expected a component"),
        ({"network_def": [1, 2]}, r"--network_def \[1, 2\]: expected a component"),
        ({"network_def": {"dims": [3]}}, "--network_def {'dims': .3.}: expected a component"),
        ({"train#loss": 3}, "--train#loss 3: expected a component, {'_target_': 'DiceLoss', …} for instance"),
        ({"train#handlers": "x"}, "--train#handlers x: expected a list of components"),
    ],
)
def test_what_is_no_component_is_refused(given: dict[str, Any], line: str) -> None:
    component = {"_target_": "DiceLoss"}
    known = {"network_def": component, "train": {"loss": component, "handlers": [component]}, "classes": ["a"]}
    with pytest.raises(InputError, match=line):
        refuse_no_component(given, known)
    refuse_no_component({"network_def": "@other", "train#loss": "$f()", "classes": "a", "train#handlers": []}, known)


@pytest.mark.parametrize("value", ["$(", "$x_$", "$1 +", "$a b"])
def test_what_is_no_python_is_refused(value: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"--train#lr {value}: no Python expression (")):
        refuse_no_python({"train": {"lr": value}})


def test_the_expressions_of_the_configurations_are_python() -> None:
    for bundle in BUNDLES:
        for name in ("train", "evaluate", "inference", "multi_gpu"):
            refuse_no_python(ConfigParser.load_config_file(config(bundle, name)[0]))
    refuse_no_python({"a": "${1: @b, 2: [@c#d::e]}", "b": "$import os", "c": "$@train#x['k'] if @d else lambda: 1"})


def failed(expression: str, **config: Any) -> str | None:
    with pytest.raises(Exception) as caught:  # noqa: PT011  (MONAI's own)
        ConfigParser({"a": expression, **config}).get_parsed_content("a")
    return bundles.one_line(caught.value)


def test_an_expression_that_fails_itself_is_one_line() -> None:
    assert failed("$1 / 0") == "$1 / 0 cannot be evaluated: division by zero"
    assert failed("$@b.parameters()", b="word") == (
        "$@b.parameters() cannot be evaluated: 'str' object has no attribute 'parameters'"
    )
    # what it calls may be at fault
    assert failed("$monai.utils.first(3)") is None
    assert failed("@b", b="@a") == "--a refers to itself, through b: give it a value"
    assert failed("@a") == "--a refers to itself: give it a value"
    assert failed("$@b", b={"_target_": "nowhere.Net"}) == "there is no nowhere.Net"


def test_a_mistyped_run_names_the_nearest(run: Run, options: Options, tmp_path: Path) -> None:
    with refused("run ID 'trainin' doesn't exist in the config file; did you mean training"):
        run("trainin", config("cmunext_busi"), **options("cmunext_busi", tmp_path))
    with refused("run ID 'z+…z+' doesn't exist"):
        run("z" * 5_000, config("cmunext_busi"), **options("cmunext_busi", tmp_path))


def test_a_network_of_other_channels_than_the_pictures(run: Run, options: Options, tmp_path: Path) -> None:
    network = {**OWN["cmunext_busi"], "in_channels": 4}
    with refused("--network_def takes 4 channels, pictures are read with 3; give --in_channels 4 too"):
        run("training", config("cmunext_busi"), **options("cmunext_busi", tmp_path, network_def=network))
    assert not list(tmp_path.iterdir())
    error = RuntimeError("Given groups=1, weight of size [4, 3, 3, 3], expected input[2, 1, 32, 32] to have 3 channels,"
                         " but got 1 channels instead")  # fmt: skip
    assert bundles.one_line(error) == (
        "the network takes 3 channels, the images have 1: give both the same in_channels"
    )


def test_long_values_are_shortened() -> None:
    for refuse in (lambda: checked("batch_size", "z" * 10**6), lambda: refuse_unknown({"z" * 10**6: 1}, {"a": 1})):
        with pytest.raises(InputError) as caught:
            refuse()
        assert len(str(caught.value)) < 1000


def test_a_setting_that_refers_to_itself_alone_is_unknown() -> None:
    with pytest.raises(InputError, match="--new: no such setting"):
        refuse_unknown({"new": "@new"}, {"a": 1})
    refuse_unknown({"new": 1, "a": "@new"}, {"a": 1})


def test_paths_may_begin_with_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    for name in ("dataset_dir", "ckpt_dir", "output_dir", "ckpt_path", "input", "pretrained"):
        assert checked(name, "~/x") == "/home/me/x"
    assert checked("input", ["~/x", "y"]) == ["/home/me/x", "y"]
    assert checked("pretrained", None) is None
