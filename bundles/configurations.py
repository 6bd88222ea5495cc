"""A bundle's configuration read by a command: found, settings put in, macros resolved; nothing of it is run."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from monai.bundle import ConfigParser

from bundles.settings import RULES, checked, refuse_unknown, with_values
from transforms import InputError

SUFFIXES = (".json", ".yaml", ".yml")
SEPARATOR = "::"


def find_configuration(bundle: str | Path, name: str = "inference") -> Path:
    """The configuration `name` of a bundle, which is a folder, or the name of one beside this package.

    A file is taken as it is.

    Raises:
        InputError: when there is none.

    Example:
        >>> find_configuration("cmunext_busi").name
        'inference.yaml'
    """
    path = Path(bundle)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise InputError("is no configuration", path=path, remedy=f"expected {', '.join(SUFFIXES)}, or a bundle")
        return path
    beside = Path(__file__).parent / bundle
    folder = path if path.exists() or not (beside / "configs").is_dir() else beside
    for suffix in SUFFIXES:
        if (file := folder / "configs" / f"{name}{suffix}").is_file():
            return file
    fact = f"holds no configs/{name}.json or .yaml" if folder.is_dir() else "no such bundle"
    known = ", ".join(sorted(file.parents[1].name for file in Path(__file__).parent.glob("*/configs/metadata.json")))
    raise InputError(fact, path=bundle, remedy=f"name a bundle's folder, or one of {known}")


def bundle_of(file: Path) -> Path:
    """The folder of the bundle that a configuration belongs to.

    Example:
        >>> bundle_of(Path("a/configs/train.yaml")), bundle_of(Path("a/train.yaml"))
        (PosixPath('a'), PosixPath('a'))
    """
    return file.parent.parent if file.parent.name == "configs" else file.parent


def load_configuration(file: Path) -> dict[str, Any]:
    """What is in a file of a configuration.

    Raises:
        InputError: when it cannot be read, or holds no keys.

    Example:
        >>> load_configuration(find_configuration("cmunext_busi"))["image_size"]
        256
    """
    try:
        content = ConfigParser.load_config_file(file)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=file) from error
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"is no configuration ({reason})", path=file, remedy="expected YAML or JSON") from error
    if not isinstance(content, dict):
        raise InputError("is no configuration", path=file, remedy="expected keys and values")
    return content


def read_bundle(file: Path, overrides: Mapping[str, Any] | None = None) -> ConfigParser:
    """The configuration in a file with the metadata beside it as `_meta_`.

    Args:
        file: of the configuration.
        overrides: settings by name, `network_def#_target_` for instance.

    Returns:
        A parser whose `bundle_root` is the bundle's folder. Expressions run when content is asked for.

    Raises:
        InputError: when a file cannot be read, or a setting is none.

    Example:
        >>> read_bundle(find_configuration("cmunext_busi"), {"image_size": 64})["image_size"]
        64
    """
    content, given = load_configuration(file), dict(overrides or {})
    refuse_unknown(given, content)
    metadata = file.parent / "metadata.json"
    parser = ConfigParser({**with_values(content)})
    for name, value in given.items():
        parser.set(with_values(value), name)
    config: dict[str, Any] = parser.get()
    for name in RULES:
        if name in config:
            config[name] = checked(name, config[name])
    parser[ConfigParser.meta_key] = load_configuration(metadata) if metadata.is_file() else {}
    # a run would look for both; this is no run
    parser["bundle_root"] = str(bundle_of(file.resolve()))
    if "bundle" in (config.get("settings") or {}):
        parser["settings::bundle"] = bundle_name(parser)
    resolve(parser, file)
    return parser


def bundle_name(parser: ConfigParser) -> str:
    """The bundle's name, as its metadata say; the folder's where they do not.

    Example:
        >>> bundle_name(read_bundle(find_configuration("cmunext_busi")))
        'CMUNeXt BUSI breast ultrasound'
    """
    metadata = parser.get(ConfigParser.meta_key) or {}
    return str(metadata.get("name") or Path(parser.get("bundle_root") or "unknown").name)


def resolve(parser: ConfigParser, file: Path) -> None:
    """Puts what macros (`%key`, `%file::key`) stand for in their place.

    Raises:
        InputError: when there is no such key or file.
    """
    try:
        parser.resolve_macro_and_relative_ids()
    except OSError as error:
        raise InputError(f"refers to {error.filename}, which cannot be read", path=file) from error
    except (KeyError, ValueError, RecursionError) as error:
        raise InputError(f"a macro in it leads nowhere ({' '.join(str(error).split())})", path=file) from error


def stored_configuration(parser: ConfigParser) -> dict[str, Any]:
    """The configuration as files for others hold it: resolved, without what is known to one machine only.

    Example:
        >>> stored_configuration(read_bundle(find_configuration("cmunext_busi")))["bundle_root"]
        '.'
    """
    config = {**(parser.get() or {})}
    config.pop(ConfigParser.meta_key, None)
    config["bundle_root"] = "."
    stored: dict[str, Any] = json.loads(json.dumps(_with_text_keys(config), default=str))
    return stored


def _with_text_keys(value: Any) -> Any:
    """JSON has no whole numbers as keys: what has them, a `label_map`, becomes an expression."""
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value):
            return f"${value!r}"
        return {key: _with_text_keys(one) for key, one in value.items()}
    return [_with_text_keys(one) for one in value] if isinstance(value, list) else value


def leaves(config: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Each value that is no list and no dictionary, or is an empty one, with its place.

    Example:
        >>> list(leaves({"a": [1, {"b": 2}], "c": []}))
        [('a::0', 1), ('a::1::b', 2), ('c', [])]
    """
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    empty = True
    for key, value in items:
        empty = False
        yield from leaves(value, f"{place}{SEPARATOR}{key}" if place else str(key))
    if empty:
        yield place, config


def settings_of(words: Sequence[str]) -> dict[str, Any]:
    """Settings as they are typed: `--image_size 64 --network_def "{'_target_': 'networks.VMUNet'}"`.

    Raises:
        InputError: when a word is no setting, or has no value.

    Example:
        >>> settings_of(["--image_size", "[64, 96]", "--compile", "false"])
        {'image_size': [64, 96], 'compile': False}
    """
    settings = {}
    rest = iter(words)
    for word in rest:
        if not word.startswith("--") or len(word) == 2:
            raise InputError(f"{word}: not expected here", remedy="settings are written --name value")
        name, given, value = word[2:].partition("=")
        if not given and (value := next(rest, "--")).startswith("--"):
            raise InputError(f"--{name}: has no value")
        try:
            settings[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise InputError(f"--{name} {value}: cannot be read ({' '.join(str(error).split())})") from error
    return settings
