"""`python -m bundles show`: a configuration as a run would see it, and all that it would run, without running any."""

from __future__ import annotations

import configparser
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.bundle.utils import merge_kv

from bundles.configurations import SEPARATOR, bundle_of, find_configuration, leaves, load_configuration, resolve
from transforms import InputError, printable


@dataclass
class Shown:
    """A resolved configuration.

    Args:
        values: each value by its place, `train::trainer::max_epochs`.
        origins: the file that each comes from.
        runs: (place, file, what) of each thing that MONAI would run: an expression, a component, a logging handler.
    """

    values: dict[str, Any]
    origins: dict[str, Path]
    runs: list[tuple[str, Path, str]] = field(default_factory=list)


def look(files: Sequence[Path]) -> Shown:
    """Reads a configuration and its overlays; later files win.

    Raises:
        InputError: when a file cannot be read, or a macro in it leads nowhere.

    Example:
        >>> shown = look([find_configuration("cmunext_busi")])
        >>> shown.values["image_size"], shown.origins["image_size"].name
        (256, 'inference.yaml')
    """
    parser = ConfigParser({})
    origins: dict[str, Path] = {}
    for file in files:
        before = dict(leaves(parser.get()))
        content = load_configuration(file)
        for key, value in content.items():
            try:
                merge_kv(parser, key, value)  # type: ignore[arg-type]
            except (KeyError, ValueError, IndexError) as error:
                raise InputError(f"{key} fits nothing ({' '.join(str(error).split())})", path=file) from error
        # what "+" adds to stands at places of its own
        whole = {key.replace("#", SEPARATOR): value for key, value in content.items() if not key.startswith("+")}
        given = {place for key, value in whole.items() for place, _ in leaves(value, key)}
        now = dict(leaves(parser.get()))
        set_here = {place for place, value in now.items() if place in given or before.get(place, now) != value}
        origins = {place: file if place in set_here else origins[place] for place in now}
    macros = {place: value for place, value in leaves(parser.get()) if isinstance(value, str) and value[:1] == "%"}
    resolve(parser, files[-1])
    values = dict(leaves(parser.get()))
    shown = Shown(values, {place: _origin(place, origins, macros) for place in values})
    shown.runs = [*_runs(values, shown.origins), *_runs_beside(files[0])]
    return shown


def _origin(place: str, origins: dict[str, Path], macros: dict[str, str]) -> Path:
    """The file of a value; behind a macro the file that the macro names, or that holds what it names."""
    for _ in range(100):
        holder = next((name for name in macros if place == name or place.startswith(name + SEPARATOR)), None)
        if holder is None:
            break
        target, rest = macros[holder][1:].replace("#", SEPARATOR), place[len(holder) :]
        head, _, inner = target.partition(SEPARATOR)
        if head.endswith((".json", ".yaml", ".yml")):
            return Path(head)
        if head == "":
            # relative to the macro's own place
            return origins[holder]
        place = SEPARATOR.join([head, inner] if inner else [head]) + rest
    return origins.get(place) or next(iter(origins.values()))


def _runs(values: dict[str, Any], origins: dict[str, Path]) -> Iterator[tuple[str, Path, str]]:
    for place, value in values.items():
        if isinstance(value, str) and value.startswith("$"):
            yield place, origins[place], value
        elif place.rpartition(SEPARATOR)[2] == "_target_":
            yield place.rpartition(SEPARATOR)[0], origins[place], f"{value}(…)"


def _runs_beside(first: Path) -> Iterator[tuple[str, Path, str]]:
    """What the metadata and the logging configuration beside a file would run."""
    metadata = first.parent / "metadata.json"
    if metadata.is_file():
        values = dict(leaves(load_configuration(metadata), ConfigParser.meta_key))
        yield from _runs(values, dict.fromkeys(values, metadata))
    logging_conf = first.parent / "logging.conf"
    if not logging_conf.is_file():
        return
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(logging_conf, encoding="utf-8")
    except (configparser.Error, UnicodeDecodeError) as error:
        raise InputError(f"is no logging configuration ({' '.join(str(error).split())})", path=logging_conf) from error
    for section in parser.sections():
        # Python evaluates both
        if section.startswith(("handler_", "formatter_")) and parser[section].get("class"):
            arguments = parser[section].get("args", "()") + parser[section].get("kwargs", "")
            yield section, logging_conf, f"{parser[section]['class']}{arguments}"


def show(what: Sequence[str], name: str = "inference") -> str:
    """The text of `python -m bundles show`.

    Args:
        what: a bundle, or files of a configuration, overlays last.
        name: of a bundle's configuration; several are overlaid, `train,evaluate`.

    Raises:
        InputError: when there is no such bundle or file, or it cannot be read.

    Example:
        >>> text = show(["cmunext_busi"])
        >>> [line for line in text.splitlines() if line.startswith("image_size")]
        ['image_size: 256  [1]']
    """
    if len(what) == 1 and not Path(what[0]).is_file():
        files = [find_configuration(what[0], one) for one in name.split(",")]
    else:
        files = [find_configuration(one) for one in what]
    shown = look(files)
    numbers = {file: index for index, file in enumerate(dict.fromkeys([*files, *shown.origins.values()]), 1)}
    lines = [*(f"[{number}] {file}" for file, number in numbers.items()), ""]
    lines += [f"{place}: {_text(value)}  [{numbers[shown.origins[place]]}]" for place, value in shown.values.items()]
    lines += ["", f"A run may execute these {len(shown.runs)}, each with what it imports; none was executed here:"]
    lines += [f"{place}: {what}  [{numbers.get(file, file.name)}]" for place, file, what in shown.runs]
    code = sorted(file for file in bundle_of(files[0]).rglob("*.py"))
    if code:
        lines += ["", f"Python files of the bundle that these may import: {', '.join(str(file) for file in code)}"]
    return "\n".join(map(printable, lines))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
