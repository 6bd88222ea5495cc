from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

import prepare.output
from prepare.__main__ import main
from prepare.demo import _write_ct
from prepare.output import FACTS, MARK, Report, staged, write_facts
from tests.helpers import contents
from transforms import InputError

RUN = "from pathlib import Path; import sys; from tests.prepare import test_output as t; t.{}(*map(Path, sys.argv[1:]))"


def write(folder: Path, name: str) -> None:
    """What stands for a data set: files in folders, one folder and one file of its own."""
    for file in ("images/1", f"{name}/2", f"{name}.txt"):
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(name)
    write_facts(folder, {"dataset": name}, Report())


def make(out: Path, name: str, overwrite: bool = False) -> dict[str, bytes]:
    with staged(out, overwrite) as folder:
        write(folder, name)
    return contents(out)


def python(function: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN.format(function), *map(str, paths)]
    # coverage's own file would not fit on a full disk
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    here = Path(__file__).parents[2]
    return subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def unmovable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare.output, "_movable", lambda out: False)


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare.output, "_exchange", lambda *folders: False)


@pytest.mark.parametrize("way", [lambda monkeypatch: None, no_exchange, unmovable])
def test_a_result_is_replaced_whole_and_nothing_is_left_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: Callable[[pytest.MonkeyPatch], None]
) -> None:
    way(monkeypatch)
    out = tmp_path / "out"
    old = make(out, "old")
    assert sorted(old) == [FACTS, "images/1", "old.txt", "old/2"]
    with pytest.raises(InputError, match=r"^/.*out: exists already; choose another --out, or --overwrite it$"):
        make(out, "new")
    with suppress(KeyboardInterrupt), staged(out, overwrite=True) as folder:
        write(folder, "new")
        raise KeyboardInterrupt
    assert contents(out) == old
    new = make(out, "new", overwrite=True)
    assert sorted(new) == [FACTS, "images/1", "new.txt", "new/2"]
    assert names(tmp_path) == ["out"]
    assert names(out) == [FACTS, "images", "new", "new.txt"]


def test_data_land_in_the_folder_that_a_link_names(tmp_path: Path) -> None:
    link, disk = tmp_path / "data", tmp_path / "disk" / "big"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    for name in ("old", "new"):
        made = make(link, name, overwrite=True)
        assert contents(disk) == made
    assert names(tmp_path) == ["data", "disk"]
    assert names(tmp_path / "disk") == ["big"]
    assert link.is_symlink()


def test_an_empty_folder_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o750)
    make(tmp_path / "out", "new")
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


def test_the_working_directory_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        make(Path(), name, overwrite=True)
        assert contents(Path()) == contents(tmp_path)
    assert names(tmp_path) == [FACTS, "images", "new", "new.txt"]


def test_what_systems_put_into_folders_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmovable(monkeypatch)
    (tmp_path / "lost+found").mkdir()
    for name in ("old", "new"):
        make(tmp_path, name, overwrite=True)
    assert names(tmp_path) == [FACTS, "images", "lost+found", "new", "new.txt"]


@pytest.mark.parametrize("facts", ["", "[]", '{"name": "Task01", "numTraining": 9}'])
def test_a_dataset_json_of_others_is_never_replaced(tmp_path: Path, facts: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FACTS).write_text(facts)
    with pytest.raises(InputError, match="not prepared here"):
        make(tmp_path / "out", "new", overwrite=True)
    assert contents(tmp_path) == {f"out/{FACTS}": facts.encode()}


@pytest.mark.parametrize("name", [".out.partial", ".out.replaced"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_others_named_alike_is_not_removed(tmp_path: Path, name: str, kind: str) -> None:
    theirs, elsewhere = tmp_path / name, tmp_path / "elsewhere"
    (theirs if kind == "folder" else elsewhere).mkdir()
    if kind == "folder":
        (theirs / "thesis.txt").write_text("years")
    elif kind == "file":
        theirs.write_text("years")
    else:
        make(elsewhere / "data", "theirs")
        theirs.symlink_to(elsewhere / "data")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=rf"{name}: is in the way and was not made by a preparation; move it"):
        make(tmp_path / "out", "new")
    assert contents(tmp_path) == before
    assert not (tmp_path / "out").exists()


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial" / "images").mkdir(parents=True)
    (tmp_path / ".out.partial" / "images" / "half.png").touch()
    (tmp_path / ".out.partial" / MARK).touch()
    (tmp_path / ".out.prepare-lock").touch()
    assert sorted(make(tmp_path / "out", "new")) == [FACTS, "images/1", "new.txt", "new/2"]
    assert names(tmp_path) == ["out"]


def test_of_two_runs_at_once_the_second_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "link"
    with staged(tmp_path / "out") as folder:
        write(folder, "first")
        (tmp_path / "out").mkdir()
        link.symlink_to("out")
        ended = python("second_run", link)
        with pytest.raises(InputError, match="another preparation is writing to it"):
            make(tmp_path / "out", "third")
    assert ended.stdout == f"{tmp_path}/out: another preparation is writing to it; wait, or choose another --out\n"
    assert (tmp_path / "out" / "first.txt").exists()
    assert names(tmp_path) == ["link", "out"]


def second_run(out: Path) -> None:
    try:
        make(out, "second", overwrite=True)
    except InputError as error:
        print(error)


def test_folders_made_for_a_refused_run_go_again(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=f"wrote no {FACTS}"), staged(tmp_path / "a" / "b" / "out"):
        pass
    assert names(tmp_path) == []


def test_too_little_room_is_said_before_the_work(tmp_path: Path) -> None:
    text = r"out: [\d,]+ MB are free, about 1,000,000,000 MB needed; free some"
    with pytest.raises(InputError, match=text), staged(tmp_path / "out", bytes_needed=10**15):
        pass
    assert names(tmp_path) == []


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    ended = python("prepare_where_volumes_do_not_fit", tmp_path)
    line = f"prepare synapse: {tmp_path}/out: the disk is full; free some room, or choose another --out\n"
    assert (ended.stderr, ended.returncode) == (line, 1)
    assert names(tmp_path) == ["raw"]


def prepare_where_volumes_do_not_fit(folder: Path) -> None:
    """Prepares where no file may grow beyond 100 kB: slices fit, volumes do not."""
    for case in (1, 5):
        _write_ct(folder / "raw", case, seed=0, slices=40, size=64)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    options = ["--train-cases", "5", "--test-cases", "1"]
    sys.exit(main(["synapse", "--raw", str(folder / "raw"), "--out", str(folder / "out"), *options]))


def test_a_kill_leaves_the_old_result_or_the_new(tmp_path: Path) -> None:
    ended = python("kill_everywhere", tmp_path)
    assert ended.returncode == 0, ended.stderr
    left = dict(line.split(": ") for line in ended.stdout.splitlines())
    assert re.fullmatch("(old ){9,}(new ){9,}", left["exchange"])
    for way in ("entries", "inside"):
        assert re.fullmatch("(old ){9,}(some ){3,9}(new ){9,}", left[way])


def kill_everywhere(folder: Path) -> None:
    """Replaces results again and again, each time killed one change of the file system later; prints what is left."""
    new = make(folder / "new", "new")
    for name, way in (("exchange", lambda _: None), ("entries", no_exchange), ("inside", unmovable)):
        with pytest.MonkeyPatch.context() as monkeypatch:
            way(monkeypatch)
            print(f"{name}: ", end="")
            changes, ended = 0, False
            while not ended:
                out = folder / name / str(changes) / "out"
                old = make(out, "old")
                ended = _ends_before_its_kill(changes, out)
                left = result(out)
                print(
                    next(
                        what
                        for what, is_so in {
                            "old": left == old,
                            "new": left == new,
                            "some": left.items() <= old.items() or left.items() <= new.items(),
                            "mixed": True,
                        }.items()
                        if is_so
                    ),
                    end=" ",
                )
                with suppress(ZeroDivisionError), staged(out, overwrite=True):
                    assert result(out) in (old, new)
                    raise ZeroDivisionError
                assert contents(out) in (old, new)
                assert names(out.parent) == ["out"]
                changes += 1
            assert left == new
            print()


def result(out: Path) -> dict[str, bytes]:
    """What is in a folder, without what a run that works in it has there."""
    return {name: data for name, data in contents(out).items() if not name.startswith(MARK)}


def _ends_before_its_kill(changes: int, out: Path) -> bool:
    """Replaces `out` in a process that kills itself before the change of that number; true if it came to its end."""
    if not (child := os.fork()):
        left = [changes]

        def count(event: str, arguments: tuple) -> None:
            if event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (
                event == "open" and str(arguments[0]).startswith(str(out.parent))
            ):
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1

        sys.addaudithook(count)
        make(out, "new", overwrite=True)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0
