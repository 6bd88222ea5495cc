"""What CONTRIBUTING.md says of the rooms: which may import which, and how the texts are laid out."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "networks": set(),
    "transforms": set(),
    "evaluation": {"transforms"},
    "prepare": {"transforms"},
    "bundles": {"networks", "transforms", "evaluation"},
    "experiments": {"bundles", "networks", "transforms", "evaluation"},
}


def installed() -> bool:
    """True where pip has installed this checkout."""
    try:
        return bool(importlib.metadata.distribution("monai-cmunext-vmunet"))
    except importlib.metadata.PackageNotFoundError:
        return False


def imported(file: Path) -> set[str]:
    """The top-level packages that a module imports, anywhere in it."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(room: str) -> None:
    for file in (ROOT / room).rglob("*.py"):
        assert imported(file) & (set(MAY_IMPORT) - {room}) <= MAY_IMPORT[room], file


def test_networks_need_torch_only() -> None:
    code = "import sys, networks; print(*{name.split('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "torch" in loaded.split()
    assert not {"monai", "ignite", "scipy", "triton", "transforms"} & set(loaded.split())


TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("bundles/*/docs/*.md")]


@pytest.mark.parametrize("file", TEXTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_lines_can_be_read(file: Path) -> None:
    made = file.read_text().partition("<!-- table -->")[0] + file.read_text().partition("<!-- end of table -->")[2]
    assert max(map(len, made.splitlines())) <= 120


@pytest.mark.skipif(not installed(), reason="the package is run from the checkout, not installed")
def test_a_folder_of_ones_own_hides_no_package(tmp_path: Path) -> None:
    for room in MAY_IMPORT:
        (tmp_path / room).mkdir()
    code = f"import {', '.join(MAY_IMPORT)}; print(*[room.__file__ for room in ({', '.join(MAY_IMPORT)})])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [Path(file).parent.parent for file in done.stdout.split()] == [ROOT] * len(MAY_IMPORT)
