"""What a YAML file of experiments asks for: cells, each one training of a network by a recipe on a fold with a seed.

docs/experiments.md describes the file. Reading it runs nothing.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from bundles.configurations import find_configuration, load_configuration
from bundles.settings import checked, close, refuse_unknown
from transforms import InputError, expanded, printable, shortened

HERE = Path(__file__).parent
# of the file; those of the first line may also be said of a single bundle
SHARED = ("networks", "folds", "seeds", "overrides", "budget", "zero_shot")
OF_A_BUNDLE = ("bundle", "data", "config", "published", *SHARED)
OF_A_FILE = ("output", "baseline", "bundles", "external", "submitit", "scales", "expected", *SHARED)
# settings that belong to the cell, and not to the recipe
PLACES = ("dataset_dir", "ckpt_dir", "log_dir", "output_dir", "network_def", "fold", "seed", "resume", "max_epochs")
NAME = re.compile(r"[\w(][\w.,+() -]*")


@dataclass(frozen=True)
class ZeroShot:
    """Another data set to test on: all its images, or its test `part`."""

    data: str
    part: str = "all"


@dataclass(frozen=True)
class External:
    """A row of which nothing is trained here: result folders of `python -m evaluation`, by fold."""

    name: str
    data: str
    folders: Mapping[int | None, Path]


@dataclass(frozen=True)
class Cell:
    """One training with its evaluation and zero-shot tests, in a folder of its own.

    `files` are those of --config_file for a training; `overrides` leave out where the run lies and what it reads.
    """

    bundle: str
    network: str
    fold: int | None
    seed: int | None
    folder: Path
    files: tuple[Path, ...]
    overrides: Mapping[str, Any]
    data: str
    zero_shot: Mapping[str, ZeroShot]
    minutes: float | None = None

    @property
    def name(self) -> str:
        """BUNDLE/NETWORK/FOLD_AND_SEED, the folder's path in that of all results."""
        return "/".join(self.folder.parts[-3:])

    @property
    def row(self) -> str:
        """What folds and seeds are averaged in."""
        return f"{self.bundle}/{self.network}"

    @property
    def epochs(self) -> int:
        """How many the training has."""
        return int(self.overrides.get("max_epochs") or merged(self.files)["max_epochs"])

    def targets(self) -> dict[str, Path]:
        """What is evaluated, "" for the cell's own test part, and the folders of the results."""
        return {"": self.folder / "eval", **{name: self.folder / "zero_shot" / name for name in self.zero_shot}}

    def training(self) -> list[str]:
        """The command that trains, or goes on with it."""
        return self._command("training", self.files, {"dataset_dir": self.data, "resume": "auto"}, self.folder / "eval")

    def evaluating(self, target: str = "") -> list[str]:
        """The command that evaluates, on the test part or on one of the further data sets."""
        files = (*self.files, self.files[0].with_name("evaluate.yaml"))
        data: dict[str, Any] = {"dataset_dir": self.data}
        if target:
            files = (*files, HERE / "zero_shot.yaml")
            data["dataset_dir"] = self.zero_shot[target].data
            if self.zero_shot[target].part == "test":
                data["validate#dataset#data"] = "$@split.test"
        return self._command("evaluating", files, data, self.targets()[target])

    def _command(self, run_id: str, files: Sequence[Path], data: Mapping[str, Any], output: Path) -> list[str]:
        listed = f"[{','.join(repr(str(file)) for file in files)}]" if len(files) > 1 else str(files[0])
        places = {"ckpt_dir": self.folder, "log_dir": self.folder / "runs", "output_dir": output}
        words = [
            word
            for key, value in {**self.overrides, **data, **places}.items()
            for word in (f"--{key}", str(value) if isinstance(value, str | Path) else json.dumps(value))
        ]
        # MONAI warns that configurations execute code
        quiet = ["-W", "ignore:parsing config_file:UserWarning"]
        return [sys.executable, *quiet, "-m", "monai.bundle", "run", run_id, "--config_file", listed, *words]


@dataclass(frozen=True)
class Plan:
    """All cells in the order in which they are trained, and what the table needs to know besides."""

    file: Path
    output: Path
    cells: tuple[Cell, ...]
    scale: str | None
    baselines: Mapping[str, str]
    external: tuple[External, ...]
    published: Mapping[str, Mapping[str, Any]]
    expected: Mapping[str, Any]
    submitit: Mapping[str, Any]

    def shard(self, share: str) -> Plan:
        """The i-th of n shares, "2/4"; together they are all cells, whatever is finished already.

        Raises:
            InputError: when it is no share.
        """
        found = re.fullmatch(r"(\d+)/(\d+)", share)
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise InputError(f"--shard {share}: expected i/n, 1/4 for instance, the first of four shares")
        return replace(self, cells=self.cells[int(found[1]) - 1 :: int(found[2])])


def read_plan(file: str | Path, scale: str | None = None, overrides: Mapping[str, Any] | None = None) -> Plan:
    """The plan in a YAML file.

    Args:
        file: its path.
        scale: one of those that it has under `scales`; what stands there replaces what the file says.
        overrides: settings of all cells besides those in the file.

    Raises:
        InputError: when the file cannot be read, or says something that cannot be.

    Example:
        >>> plan = read_plan(HERE / "demo.yaml")
        >>> len(plan.cells), plan.cells[0].row
        (4, 'recipe/BasicUNet')
    """
    path = Path(file)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        raise InputError(f"is no YAML ({' '.join(str(error).split())})", path=path) from error
    try:
        content = _at_scale(content, scale)
        content["overrides"] = _mapping(content.get("overrides") or {}, "overrides") | dict(overrides or {})
        return _plan(path, content, scale)
    except InputError as error:
        line = str(error)
        raise error if line.startswith(str(path)) else InputError(line, path=path) from error


def _at_scale(content: Any, scale: str | None) -> dict[str, Any]:
    known = _mapping(content, "the file")
    scales = _mapping(known.pop("scales", None) or {}, "scales")
    if scale is None:
        return known
    if scale not in scales:
        raise InputError(f"--scale {scale}: not in it", remedy=f"it has {', '.join(scales) or 'no scales'}")
    changed = dict(_mapping(scales[scale], f"scales: {scale}"))
    known["output"] = f"{known.get('output', '')}-{scale}"
    # what holds at the full scale does not at another
    known.pop("expected", None)
    return known | changed


def _plan(file: Path, content: dict[str, Any], scale: str | None) -> Plan:
    _refuse_others(content, OF_A_FILE, "the file")
    output, bundles = content.get("output"), _mapping(content.get("bundles"), "bundles")
    if not isinstance(output, str) or not output:
        raise InputError("names no output", remedy="say output: FOLDER, where runs and table go")
    cells: list[Cell] = []
    published: dict[str, Mapping[str, Any]] = {}
    for name, said in bundles.items():
        entry = _mapping(said, f"bundles: {name}")
        _refuse_others(entry, OF_A_BUNDLE, f"bundles: {name}")
        own = {key: content[key] for key in SHARED if key in content} | entry
        own["overrides"] = _mapping(content.get("overrides") or {}, "overrides") | _mapping(
            entry.get("overrides") or {}, f"bundles: {name}: overrides"
        )
        cells += _cells(_name(name), own, Path(expanded(output)))
        if entry.get("published"):
            published[str(own["data"])] = _published(entry["published"])
    if not cells:
        raise InputError("names no bundle to train", remedy="bundles: {NAME: {bundle: cmunext_busi, data: FOLDER}}")
    # a whole table is there early: all rows on one fold before the next fold
    cells.sort(key=lambda cell: (_order(cell.fold), _order(cell.seed), cell.row))
    external = tuple(
        _external(_name(name), said, sorted({cell.data for cell in cells}))
        for name, said in sorted(_mapping(content.get("external") or {}, "external").items())
    )
    return Plan(
        file,
        Path(expanded(output)),
        tuple(cells),
        scale,
        _baselines(content.get("baseline"), cells),
        external,
        published,
        _expected(content.get("expected")),
        _mapping(content.get("submitit") or {}, "submitit"),
    )


def _order(number: int | None) -> int:
    return -1 if number is None else number


def _cells(name: str, entry: dict[str, Any], output: Path) -> list[Cell]:
    """The cells of one entry of `bundles`."""
    where = f"bundles: {name}"
    if not isinstance(entry.get("data"), str):
        raise InputError(f"{where} names no data", remedy="say data: FOLDER, a prepared one")
    first = find_configuration(str(entry.get("bundle", name)), "train").resolve()
    files = (first, *(_overlay(first, word) for word in _list(entry.get("config"), f"{where}: config")))
    config = merged(files)
    networks = _mapping(entry.get("networks") or {"": None}, f"{where}: networks")
    budget = _mapping(entry.get("budget") or {}, f"{where}: budget")
    _refuse_others(budget, ("epochs", "minutes"), f"{where}: budget")
    zero_shot = _zero_shot(entry.get("zero_shot") or {})
    found = []
    for network, definition in networks.items():
        overrides = dict(entry["overrides"])
        if definition is not None:
            overrides["network_def"] = _network(network, definition, config)
        elif not network:
            network = str(config["network_def"]["_target_"]).rpartition(".")[2]
        if "epochs" in budget:
            overrides["max_epochs"] = budget["epochs"]
        for fold in _list(entry.get("folds"), f"{where}: folds") or [None]:
            for seed in _list(entry.get("seeds"), f"{where}: seeds") or [None]:
                own = overrides | {key: one for key, one in (("fold", fold), ("seed", seed)) if one is not None}
                _check_settings(own, config, where)
                words = [f"{key}{one}" for key, one in (("fold", fold), ("seed", seed)) if one is not None]
                folder = output / name / _name(network) / ("-".join(words) or "run")
                cell = Cell(name, network, fold, seed, folder, files, own, entry["data"], zero_shot, _minutes(budget))
                found.append(cell)
    if len({cell.folder for cell in found}) < len(found):
        raise InputError(f"{where}: a fold or a seed is named twice")
    return found


def _check_settings(overrides: Mapping[str, Any], config: Mapping[str, Any], where: str) -> None:
    """Finds now what would end each training: settings that there are not, and values that cannot be."""
    if taken := [key for key in ("dataset_dir", "ckpt_dir", "log_dir", "output_dir", "resume") if key in overrides]:
        raise InputError(f"{where}: overrides: {taken[0]} is not for a file of experiments to say")
    refuse_unknown(overrides, config)
    for key, value in overrides.items():
        checked(key, value)


def _minutes(budget: Mapping[str, Any]) -> float | None:
    minutes = budget.get("minutes")
    if minutes is None:
        return None
    if isinstance(minutes, bool) or not isinstance(minutes, int | float) or minutes <= 0:
        raise InputError(f"budget: minutes {minutes}: expected a number above 0")
    return float(minutes)


def _overlay(first: Path, word: Any) -> Path:
    """A file beside the bundle's own, or one by its path."""
    beside = first.with_name(str(word))
    return beside if beside.is_file() else find_configuration(expanded(str(word))).resolve()


def merged(files: Iterable[Path]) -> dict[str, Any]:
    """The configuration of several files, as a run reads it.

    Example:
        >>> merged([find_configuration("cmunext_busi", "train")])["max_epochs"]
        300
    """
    listed = list(files)
    for file in listed:
        load_configuration(file)
    return ConfigParser.load_config_files([str(file) for file in listed])


def _network(name: str, definition: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """A network's definition with the channels that the bundle gives its own, where it does not say them itself.

    A channel that is said as null is left out, for networks that have no such argument.
    """
    said = _mapping(definition, f"networks: {name}")
    if not isinstance(said.get("_target_"), str):
        raise InputError(f"networks: {name} is no network", remedy="{_target_: networks.cmunext_s} for instance")
    own = config["network_def"]
    taken = own.get("in_channels", 1) if "in_channels" in config or said["_target_"] == own["_target_"] else 1
    channels = {"in_channels": taken, "out_channels": own.get("out_channels", 1)}
    return {key: value for key, value in {**said, **{k: said.get(k, v) for k, v in channels.items()}}.items()
            if value is not None or key not in channels}  # fmt: skip


def _zero_shot(said: Any) -> dict[str, ZeroShot]:
    found = {}
    for name, one in _mapping(said, "zero_shot").items():
        entry = {"data": one} if isinstance(one, str) else _mapping(one, f"zero_shot: {name}")
        _refuse_others(entry, ("data", "part"), f"zero_shot: {name}")
        if not isinstance(entry.get("data"), str) or entry.get("part", "all") not in ("all", "test"):
            raise InputError(f"zero_shot: {name}: expected a folder, or {{data: FOLDER, part: all or test}}")
        found[_name(name)] = ZeroShot(**entry)
    return dict(sorted(found.items()))


def _external(name: str, said: Any, data: Sequence[str]) -> External:
    entry = _mapping(said, f"external: {name}")
    _refuse_others(entry, ("data", "results"), f"external: {name}")
    results = entry.get("results")
    folders = results if isinstance(results, Mapping) else {None: results}
    if not all(isinstance(folder, str) and (fold is None or isinstance(fold, int)) for fold, folder in folders.items()):
        raise InputError(f"external: {name}: expected results: FOLDER, or results: {{1: FOLDER, 2: FOLDER}} by fold")
    of = entry.get("data", data[0] if len(data) == 1 else None)
    if of not in data:
        raise InputError(f"external: {name}: data {of}: no bundle has these", remedy=f"there are {', '.join(data)}")
    return External(name, str(of), {fold: Path(expanded(str(folder))) for fold, folder in folders.items()})


def _published(said: Any) -> Mapping[str, Any]:
    """{"protocol": …, "row": what repeats the first of the rows, "rows": {name: {metric: value, metric_sd: value}}}."""
    entry = _mapping(said, "published")
    _refuse_others(entry, ("protocol", "row", "rows"), "published")
    rows = _mapping(entry.get("rows"), "published: rows")
    for name, values in rows.items():
        for metric, value in _mapping(values, f"published: {name}").items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise InputError(f"published: {name}: {metric} {value}: expected a number")
    return {"protocol": str(entry.get("protocol")), "row": entry.get("row"), "rows": rows}


def _expected(said: Any) -> Mapping[str, Any]:
    """{"of": in words, "score": [lowest, highest]}, of each cell's best validation; {} where nothing is."""
    if said is None:
        return {}
    entry = _mapping(said, "expected")
    _refuse_others(entry, ("of", "score"), "expected")
    score = entry.get("score")
    numbers = isinstance(score, list) and len(score) == 2 and all(isinstance(end, int | float) for end in score)
    if not numbers or not isinstance(entry.get("of"), str):
        raise InputError("expected: wants of: WORDS and score: [LOWEST, HIGHEST]")
    return entry


def _baselines(word: Any, cells: Sequence[Cell]) -> dict[str, str]:
    """Of each data set the row that a word names: BUNDLE/NETWORK, or one of both where that is clear."""
    found: dict[str, str] = {}
    for data in sorted({cell.data for cell in cells}):
        rows = sorted({cell.row for cell in cells if cell.data == data})
        fitting = [row for row in rows if row == word] or [row for row in rows if str(word) in row.split("/")]
        if word is None and len(rows) == 1:
            fitting = rows
        if word is None and len(rows) > 1:
            raise InputError("names no baseline", remedy=f"say baseline: one of {', '.join(rows)}")
        if len(fitting) > 1:
            raise InputError(f"baseline: {word}: several rows have it", remedy=f"say one of {', '.join(fitting)}")
        if fitting:
            found[data] = fitting[0]
    if not found:
        rows = sorted({cell.row for cell in cells})
        raise InputError(f"baseline: {word}: no such row", remedy=f"there are {', '.join(rows)}")
    return found


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(f"{where}: expected names and values")
    return {str(key): one for key, one in value.items()} if where != "external" else dict(value)


def _list(value: Any, where: str) -> list[Any]:
    if value is None:
        return []
    listed = value if isinstance(value, list) else [value]
    if any(isinstance(one, dict | list) for one in listed):
        raise InputError(f"{where}: expected a list")
    return listed


def _name(word: Any) -> str:
    if not isinstance(word, str) or not NAME.fullmatch(word):
        fact = f"{shortened(printable(str(word)))}: no name"
        raise InputError(fact, remedy="a name has letters, digits and . , + - ( ), for it is a folder's too")
    return word


def _refuse_others(said: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in said:
        if key not in known:
            near = close(str(key), known)
            remedy = f"did you mean {near[0]}?" if near else f"it may have {', '.join(known)}"
            raise InputError(f"{where}: {shortened(printable(str(key)))}: not known", remedy=remedy)
