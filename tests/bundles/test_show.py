"""`python -m bundles show`: everything that a configuration would run, and nothing of it run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bundles.__main__ import main
from bundles.configurations import leaves
from bundles.show import look
from tests.bundles.conftest import BUNDLES, ROOT, config

TOUCH = "$__import__('pathlib').Path('touched').touch()"


@pytest.fixture
def strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle that leaves a file behind wherever something of it runs."""
    monkeypatch.chdir(tmp_path)
    configs = tmp_path / "bundle/configs"
    configs.mkdir(parents=True)
    content = {
        "imports": ["$import scripts.own"],
        "plain": 1,
        "deep": [{"one": TOUCH}, {"_target_": "scripts.own.Network", "size": [TOUCH, 2]}],
        "copied": "%deep::0::one",
        "shared": "%bundle/configs/shared.yaml::part",
        "run": [TOUCH],
    }
    (configs / "inference.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    (configs / "shared.yaml").write_text(yaml.safe_dump({"part": {"a": TOUCH, "b": 3}}))
    (configs / "more.yaml").write_text(yaml.safe_dump({"plain": 2, "deep#0#one": 5, "+run": ["$second()"]}))
    (configs / "metadata.json").write_text('{"version": "$third()"}')
    lines = "[loggers]\nkeys=root\n[handler_x]\nclass=FileHandler\nargs=(open('touched', 'w'),)\n"
    (configs / "logging.conf").write_text(lines)
    (tmp_path / "bundle/scripts").mkdir()
    (tmp_path / "bundle/scripts/own.py").write_text("open('touched', 'w')\n")
    return tmp_path / "bundle"


def test_all_that_would_run_is_shown_and_nothing_runs(
    strangers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", str(strangers)]) == 0
    text = capsys.readouterr().out
    listed = text.partition("none was executed here:\n")[2].splitlines()
    assert [line.split(": ")[0] for line in listed if ": " in line and not line.startswith("Python")] == [
        "imports::0",
        "deep::0::one",
        "deep::1",
        "deep::1::size::0",
        "copied",
        "shared::a",
        "run::0",
        "_meta_::version",
        "handler_x",
    ]
    assert "FileHandler(open('touched', 'w'),)" in text
    assert str(strangers / "scripts/own.py") in text
    assert "shared::b: 3  [2]" in text
    assert not (tmp_path / "touched").exists()


def test_each_key_comes_from_the_last_file_that_set_it(strangers: Path) -> None:
    first, more = (strangers / f"configs/{name}.yaml" for name in ("inference", "more"))
    shown = look([first, more])
    names = {place: file.name for place, file in shown.origins.items()}
    assert shown.values["plain"] == 2
    assert shown.values["deep::0::one"] == 5
    changed = ("plain", "deep::0::one", "copied", "run::1")
    assert {place: names[place] for place in changed} == dict.fromkeys(changed, "more.yaml")
    assert (names["run::0"], names["deep::1::_target_"]) == ("inference.yaml", "inference.yaml")
    assert names["shared::a"] == "shared.yaml"


@pytest.mark.parametrize("bundle", BUNDLES)
def test_our_configurations_are_shown_whole(bundle: str) -> None:
    for names in (["inference"], ["train"], ["train", "evaluate"], ["train", "multi_gpu"]):
        files = [Path(file) for file in config(bundle, *names)]
        shown = look(files)
        assert set(shown.origins.values()) == set(files)
        given = yaml.safe_load(files[-1].read_text())
        assert {file for file in shown.origins.values() if file == files[-1]}
        assert len(shown.values) >= len(dict(leaves(given)))


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("a: [1\n", "is no configuration"),
        ("- 1\n", "expected keys and values"),
        ("a: '%b'\n", "a macro in it leads nowhere"),
        ("a: '%no.yaml::b'\n", "refers to no.yaml, which cannot be read"),
        ("a#b: 1\n", "a#b fits nothing"),
    ],
)
def test_what_is_no_configuration_is_said_in_one_line(
    content: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text(content)
    code = main(["show", "a.yaml"])
    output = capsys.readouterr()
    assert code == 1
    assert line in output.err
    assert output.err.count("\n") == 1


def test_names_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["show", "cmunext_busi", "--config", "train,evaluate"]) == 0
    assert str(ROOT / "bundles/cmunext_busi/configs/evaluate.yaml") in capsys.readouterr().out
    assert main(["show", str(tmp_path)]) == 1
    assert "holds no configs/inference.json or .yaml; name a bundle's folder" in capsys.readouterr().err
