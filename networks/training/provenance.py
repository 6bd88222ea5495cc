"""Where a run's results come from: `run.json` beside `model.pt`, and what evaluation and use ask of it."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shlex
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from networks.selective_scan import default_backend
from networks.training.processes import is_rank_zero
from networks.weights import read_checkpoint

logger = logging.getLogger(__name__)

FILE = "run.json"
FORMAT = 1
PACKAGES = ("torch", "monai", "pytorch-ignite", "numpy", "scipy", "monai-cmunext-vmunet")
PARTS = ("train", "validation", "test")
SLICE = re.compile(r"(.+)_slice\d+\.npz")
# What every record says, and of what kind.
SAID = {
    "id": str, "started": str, "how_it_ended": str, "command": str, "network": str, "selection": str,
    "settings": dict, "data": dict,
}  # fmt: skip


class RunRecord:
    """Writes `run.json` when a run starts, and completes it however the run ends.

    It holds what a repetition needs: the command, its overrides, the resolved configuration, the seed, the commit, the
    versions, the device, and every file of the data with its SHA-256; and what became of the run.

    Args:
        ckpt_dir: folder of the run.
        network: for its name and scan backend.
        device: where it runs.
        split: the data, with `train`, `validation` and `test` as lists of {"image", "label"} items and the `rule` by
            which the model is selected.
        settings: what must be the same when the run is resumed or its model is used, by name.
        replacing: `transforms.replacing`, the context manager that writes a file whole or not at all.
        configuration: what `bundles.configuration()` says of the command.

    Example:
        >>> import contextlib
        >>> record = RunRecord("models", nn.Linear(1, 1), "cpu", None, {"seed": 42}, contextlib.nullcontext)
        >>> len(record.id), record.settings["seed"]
        (32, 42)
    """

    def __init__(
        self,
        ckpt_dir: str | Path,
        network: nn.Module,
        device: torch.device | str,
        split: Any,
        settings: Mapping[str, Any],
        replacing: Callable[[Path], AbstractContextManager[Path]],
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        self.path = Path(ckpt_dir) / FILE
        self.id = uuid.uuid4().hex
        self.replacing = replacing
        self.data = {part: _hashed(getattr(split, part)) for part in PARTS} if split is not None else {}
        self.settings = plain(settings) | {"data": _fingerprint(self.data)}
        scans = [module for module in network.modules() if hasattr(module, "scan_backend")]
        self.content: dict[str, Any] = {
            "format": FORMAT,
            "id": self.id,
            "how_it_ended": "running, or killed",
            "started": _now(),
            "command": shlex.join(sys.argv),
            **plain(configuration or {}),
            "settings": self.settings,
            "selection": getattr(split, "rule", "unknown"),
            "network": type(network).__name__,
            "device": str(device),
            "threads": torch.get_num_threads(),
            "scan_backend": scans[0].scan_backend or default_backend(torch.device(device)) if scans else None,
            "git": _git(),
            "versions": {"python": platform.python_version(), **_versions()},
            "machine": platform.platform(),
            "data": self.data,
            "data_note": getattr(split, "note", ""),
        }

    def resume(self, run_id: str) -> None:
        """Goes on with the record of an earlier command."""
        before = read_run(self.path)
        self.id = run_id or self.id
        if before.get("id") == self.id:
            commands = [*before.get("earlier_commands", []), {key: before[key] for key in ("command", "started")}]
            self.content["earlier_commands"] = commands
        self.content["id"] = self.id

    def write(self, how_it_ended: str = "running, or killed", **more: Any) -> None:
        """Writes the file; `more` are facts to add, such as the best score. A run does not fail for it."""
        self.content |= {"how_it_ended": how_it_ended, **plain(more)}
        if not is_rank_zero():
            return
        # a file's name may hold bytes that are no text
        text = json.dumps(self.content, indent=1, ensure_ascii=False).encode("utf-8", "backslashreplace")
        try:
            with self.replacing(self.path) as temporary:
                temporary.write_bytes(text + b"\n")
        except OSError as error:
            logger.warning(f"{self.path} cannot be written ({error.strerror})")

    def end(self, how: str, **more: Any) -> None:
        """Completes the file."""
        self.write(how, ended=_now(), **more)


class Origin:
    """The run that a file of weights comes from, where it says so.

    Args:
        ckpt_path: `model.pt` or `last.pt` of a run, with its `run.json` beside it; any other file is of unknown origin.
            Of several each is checked, and the first one speaks for them.

    Example:
        >>> Origin("nowhere/model.pt").selection
        'unknown: the weights name no run'
    """

    def __init__(self, ckpt_path: str | Path | Sequence[str | Path]) -> None:
        first, *others = [ckpt_path] if isinstance(ckpt_path, str | Path) else ckpt_path
        self.others = [Origin(one) for one in others]
        self.path = Path(first)
        self.run_id = _run_id(self.path)
        record = read_run(self.path.with_name(FILE)) if self.run_id else {}
        self.record = record if record.get("id") == self.run_id else {}
        self.forced: list[str] = []

    @property
    def selection(self) -> str:
        """How the model was selected, as the run says; and what `check` was forced to take."""
        if self.record:
            forced = f" (forced: {'; '.join(self.forced)})" if self.forced else ""
            return f"{self.record['selection']}{forced}"
        return f"unknown: no {FILE} of the weights' run" if self.run_id else "unknown: the weights name no run"

    @property
    def weights(self) -> dict[str, str]:
        """Which weights these are: their run's id, "" where they name none, and the SHA-256 of each file."""
        files = [self.path, *(other.path for other in self.others)]
        return {"run": self.run_id or "", "sha256": " ".join(_sha256(str(file)) for file in files)}

    def check(
        self,
        settings: Mapping[str, Any],
        items: Iterable[Mapping[str, Any]] = (),
        force: bool = False,
        other_data: bool = False,
    ) -> None:
        """Compares what is asked for now with the run.

        Args:
            settings: of this command; only names that the run knows are compared.
            items: what is to be evaluated. Files are known by their content: those that the run trained on, and those
                that it had not meant to be tested on.
            force: go on with a warning.
            other_data: the items are of another data set than the run's, and so none of its test part.

        Raises:
            ValueError: naming the difference.
        """
        for other in self.others:
            other.check(settings, items, force, other_data)
        if not self.path.is_file():
            # loading it says what is wrong
            return
        if not self.record:
            why = f"no {FILE} of its run lies beside it" if self.run_id else "it names no run"
            logger.warning(f"{self.path} is of unknown origin: {why}, nothing is checked")
            return
        known = self.record["settings"]
        differing = [name for name, value in plain(settings).items() if name in known and known[name] != value]
        if differing:
            name = differing[0]
            self._object(
                f"{self.path} was trained with {name} {known[name]}, and it is {plain(settings)[name]} now", force
            )
        parts = {part: _images(self.record["data"].get(part)) for part in PARTS}
        # slices of a volume are files of their own
        cases = {found[1] for file in parts["train"].values() if (found := SLICE.fullmatch(Path(file).name))}
        asked = [item["image"] for item in _hashed(items)]
        for file, sha256 in asked:
            if sha256 in parts["train"] or (isinstance(file, str) and Path(file).name.partition(".")[0] in cases):
                self._object(f"the run of {self.path} was trained on {file}, which is to be evaluated", force)
                break
        else:
            strange = (file for file, sha256 in asked if sha256 not in parts["test"] and not other_data)
            if file := next(strange, None):
                self._object(f"{file} is none of the test images of the run of {self.path}", force)
        logger.info(f"{self.path} is of run {self.record['id'][:8]}, selected by {self.selection}")

    def _object(self, line: str, force: bool) -> None:
        if not force:
            raise ValueError(f"{line}: give what the run had, or --force true")
        logger.warning(f"{line}; --force true")
        self.forced.append(line)


def read_run(path: str | Path) -> dict[str, Any]:
    """What `run.json` says; {} where there is none, or none that can be read.

    Example:
        >>> read_run("nowhere/run.json")
        {}
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return {}
    return content if all(isinstance(content.get(name), kind) for name, kind in SAID.items()) else {}


def plain(value: Any) -> Any:
    """The value as JSON and files of plain tensors can hold it.

    Example:
        >>> plain({"size": (2, 3), "path": Path("a")})
        {'size': [2, 3], 'path': 'a'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value if isinstance(value, bool | int | float | None) else str(value)


def _run_id(path: Path) -> str | None:
    try:
        # loading the weights reads and checks them
        content = read_checkpoint(path, tensors=False)
    except (OSError, ValueError):
        return None
    if isinstance(content, dict) and isinstance(content.get("run_id"), str):
        return content["run_id"]
    for name in ("__run__", "id"):
        content = getattr(content, "_metadata", content)
        content = content.get(name) if isinstance(content, Mapping) else None
    return content if isinstance(content, str) else None


def _images(items: Any) -> dict[str, str]:
    """The images in a part of a record: their files by their hashes."""
    entries = [item.get("image") for item in items if isinstance(item, dict)] if isinstance(items, list) else []
    return {str(entry[1]): str(entry[0]) for entry in entries if isinstance(entry, list) and len(entry) == 2}


def _hashed(items: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Items with [file, SHA-256] for each file; several files of one entry count as one, by their joined hashes."""
    items = [{key: item[key] for key in ("image", "label") if key in item} for item in items]
    files = sorted({str(file) for item in items for entry in item.values() for file in _listed(entry)})
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(files, pool.map(_sha256, files), strict=True))

    def entry_of(entry: Any) -> list[Any]:
        if isinstance(entry, str | os.PathLike):
            return [str(entry), hashes[str(entry)]]
        joined = hashlib.sha256("".join(hashes[str(file)] for file in entry).encode()).hexdigest()
        return [[str(file) for file in entry], joined]

    return [{key: entry_of(entry) for key, entry in item.items()} for item in items]


def _listed(entry: Any) -> list[Any]:
    return [entry] if isinstance(entry, str | os.PathLike) else list(entry)


def _sha256(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        # reading it will say what is wrong
        return "unreadable"


def _fingerprint(data: Mapping[str, list[dict[str, Any]]]) -> str:
    """One hash of all files in their parts, wherever they lie."""
    content = {part: [[item[key][1] for key in sorted(item)] for item in items] for part, items in data.items()}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _git() -> dict[str, Any] | None:
    """Commit of this code, and whether it was as committed; None outside of a checkout."""
    folder = Path(__file__).parents[2]
    try:
        top, commit, changed = (
            subprocess.run(
                ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (["rev-parse", "--show-toplevel"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    # installed code may lie in the repository of something else
    return {"commit": commit, "clean": not changed} if Path(top).resolve() == folder.resolve() else None


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
