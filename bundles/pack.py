"""`python -m bundles pack`: one file with a trained bundle, and all of this project that it needs.

What is in it runs where no more than the packages of its metadata are installed: configurations with what was set for
the run, code, and the network in four forms. Equal weights and settings give equal bytes.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import yaml
from torch import nn

from bundles.card import Report, card, front_matter, read_report
from bundles.configurations import (
    bundle_of,
    find_configuration,
    leaves,
    load_configuration,
    read_bundle,
    stored_configuration,
)
from bundles.description import describe
from bundles.export import NEEDS, render, settings_of_run, trained
from networks.training import Origin
from transforms import InputError, check_output, replacing, shortened

ROOT = Path(__file__).parents[1]
ROOMS = ("networks", "transforms", "evaluation", "bundles")
OVERLAYS = {"evaluate": "evaluate", "multi_gpu_train": "multi_gpu"}
# Larger files may not lie in a zoo's repository.
LARGE = 25_000_000
# Where a configuration's own file lies MONAI knows while it runs one; elsewhere the bundle is the working directory.
BUNDLE_ROOT = (
    "$next((str(one.frame.f_locals['self'].config_root_path.absolute().parent) for one in inspect.stack(0)"
    " if isinstance(one.frame.f_locals.get('self'), monai.bundle.ConfigWorkflow)), '.')"
)
# The code of this bundle, whatever was loaded before; @scripts stands in all that needs it. MONAI takes no expression
# that has a reference and the word import.
SCRIPTS = {
    "_target_": "importlib.import_module",
    "_requires_": ["$sys.path.insert(0, @bundle_root)", "$sys.modules.pop('scripts', None)"],
    "name": "scripts",
}
IMPORTS = ["$import inspect", "$import sys"]
OWN_NAME = re.compile(rf"(?<![\w.@'\"])({'|'.join(ROOMS)})(?=\.)")
LOADER = '''"""The code of this bundle as `scripts.networks`, `.transforms`, `.evaluation`, `.bundles`.

It lies in the package {name} beside this file, which is called after its content. So two bundles in one process do not
get each other's code, and nothing is taken from a network in use where a program forgets `scripts` to load another
bundle's, as MONAI Label does.
"""

import importlib
import sys
from pathlib import Path

NAME = "{name}"
FOLDER = str(Path(__file__).resolve().parent)

if FOLDER not in sys.path:
    # processes that load images find the code there too
    sys.path.append(FOLDER)
for part in ("networks.training", "transforms", "evaluation", "bundles"):
    importlib.import_module(f"{{NAME}}.{{part}}")
for alias in [alias for alias in sys.modules if alias.startswith("scripts.")]:
    del sys.modules[alias]
for full, module in list(sys.modules.items()):
    if full.startswith(f"{{NAME}}."):
        sys.modules[f"scripts{{full.removeprefix(NAME)}}"] = module

package = sys.modules[NAME]
networks, transforms, evaluation, bundles = package.networks, package.transforms, package.evaluation, package.bundles
'''

logger = logging.getLogger(__name__)


def pack_bundle(
    bundle: str | Path,
    weights: str | Path,
    output: str | Path,
    report: str | Path | None = None,
    url: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Packs a bundle with trained weights: `python -m bundles pack`.

    Args:
        bundle: its folder or name.
        weights: a checkpoint; its run's settings are taken, unless they are given.
        output: a folder, for NAME_vVERSION.zip, or a file of that suffix.
        report: folder of the results of `evaluating` with these weights. Beside the weights and in the bundle's `eval`
            they are found by themselves; "none" packs without numbers.
        url: where the folder will be published, for `large_files.yml`.
        overrides: settings by name, as on the command line.

    Returns:
        the file.

    Raises:
        InputError: when something is missing, does not fit, or would not run elsewhere.
    """
    if missing := [name for name in NEEDS["onnx"] if importlib.util.find_spec(name) is None]:
        raise InputError(f"a pack needs {', '.join(missing)}", remedy=f"pip install {' '.join(missing)}")
    folder = bundle_of(find_configuration(bundle).resolve())
    version = load_configuration(folder / "configs" / "metadata.json").get("version")
    if not isinstance(version, str):
        raise InputError("says no version", path=folder / "configs" / "metadata.json")
    if (folder / "scripts").is_dir():
        remedy = "name a bundle whose code is this project's"
        raise InputError("has code of its own in scripts, a pack for instance has", path=folder, remedy=remedy)
    path = Path(output)
    if path.suffix != ".zip":
        path /= f"{folder.name}_v{version}.zip"
    check_output(path.parent)
    network, parser = trained(bundle, weights, overrides)
    _say(f"network: {type(network).__name__} with the weights of {weights}")
    found = read_report(report, weights, folder)
    _say(f"numbers: {found.source}")
    content = pack_files(network, parser, folder, weights, found, url, overrides or {})
    with replacing(path) as temporary:
        _write_zip(temporary, folder.name, content)
    _say(f"packed to {path.resolve()}: {len(content)} files, {path.stat().st_size / 1e6:.1f} MB")
    return path


def card_of(
    bundle: str | Path,
    weights: str | Path,
    report: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> str:
    """The README of a pack, without packing: `python -m bundles card`; arguments as `pack_bundle`'s.

    Raises:
        InputError: when something is missing or does not fit.
    """
    folder = bundle_of(find_configuration(bundle).resolve())
    network, parser = trained(bundle, weights, overrides)
    found = read_report(report, weights, folder)
    metadata = packed_metadata(parser, found)
    text = card(metadata, describe(parser), found, Origin(weights).record, _scans(network))
    return front_matter(metadata) + text


def _scans(network: nn.Module) -> bool:
    return any(hasattr(module, "scan_backend") for module in network.modules())


def pack_files(
    network: nn.Module,
    parser: Any,
    folder: Path,
    weights: str | Path,
    report: Report,
    url: str,
    overrides: Mapping[str, Any],
) -> dict[str, bytes]:
    """The content of each file of a pack, by its name in the bundle's folder."""
    origin = Origin(weights)
    configs = configurations(folder, origin, overrides)
    refuse_foreign(configs)
    metadata = packed_metadata(parser, report)
    files = {f"configs/{name}.json": _json(config) for name, config in configs.items()}
    files["configs/metadata.json"] = _json(metadata)
    for name in ("configs/logging.conf", "LICENSE", "docs/data_license.txt"):
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    _say(f"configurations: {', '.join(f'{name}.json' for name in (*configs, 'metadata'))}")
    code = packed_code()
    files |= code
    _say(f"code: {len(code)} files")
    files |= _models(network, parser, origin, configs["inference"], metadata)
    text = card(metadata, describe(parser), report, origin.record, _scans(network))
    files["docs/README.md"] = text.encode()
    files["README.md"] = (front_matter(metadata) + text).encode()
    if large := [name for name, data in files.items() if len(data) > LARGE]:
        files["large_files.yml"] = _large_files({name: files[name] for name in large}, url)
        where = f"at {url}" if url else "without addresses: give --url where they will lie"
        _say(f"large_files.yml: {', '.join(sorted(large))}, {where}")
    sums = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    files["SHA256SUMS"] = "".join(sums).encode()
    return files


def configurations(folder: Path, origin: Origin, overrides: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configurations of a pack: resolved, with the settings of the weights' run, and code from `scripts`."""
    configs = {}
    for name in ("inference", "train"):
        file = find_configuration(folder, name)
        known = read_bundle(file)
        settings = settings_of_run(origin, known)
        if name == "train":
            settings = {**_recipe(origin, known), **settings}
        content = load_configuration(file)
        given = {key: value for key, value in overrides.items() if re.split("#|::", key)[0] in content}
        config = _packed(stored_configuration(read_bundle(file, {**settings, **given})))
        head = {"imports": [*IMPORTS, *config.get("imports", [])], "bundle_root": BUNDLE_ROOT, "scripts": SCRIPTS}
        configs[name] = {**head, **{key: value for key, value in config.items() if key not in head}}
    for name, own in OVERLAYS.items():
        config = stored_configuration(read_bundle(find_configuration(folder, own)))
        del config["bundle_root"]
        configs[name] = _packed(config)
    return configs


def _recipe(origin: Origin, parser: Any) -> dict[str, Any]:
    """What else was set for the training: data alone, no places and no ways to run it."""
    places = {"dataset_dir", "ckpt_dir", "output_dir", "log_dir", "pretrained", "resume", "device", "num_workers"}
    places |= {"compile", "debug", "check_data", "force"}
    record = origin.record
    known = {**(record.get("overrides") or {}), **(record.get("settings") or {})}
    settings = {name: value for name, value in known.items() if name in parser and name not in places}
    return {name: value for name, value in settings.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    return all(not (isinstance(one, str) and one[:1] in tuple("$@%")) for _, one in leaves(value)) and not any(
        place.rpartition("::")[2].startswith("_") for place, _ in leaves(value)
    )


def _packed(value: Any, key: str = "") -> Any:
    """A configuration whose code comes from `scripts`."""
    if isinstance(value, list):
        items = [_packed(one) for one in value]
        own = {f"$import {name}" for name in (*ROOMS, "networks.training")}
        return [item for item in items if not (key == "imports" and item in own)]
    if isinstance(value, dict):
        packed = {name: _packed(one, name) for name, one in value.items()}
        # in overlays the key may be a path: validate#evaluator#_target_
        for name in [name for name in packed if re.split("#|::", str(name))[-1] == "_target_"]:
            if str(packed[name]).partition(".")[0] in ROOMS:
                packed[name] = f"scripts.{packed[name]}"
                # loaded before the component is looked for
                packed[f"{name.removesuffix('_target_')}_requires_"] = "@scripts"
        return packed
    if isinstance(value, str) and value.startswith("$") and not value.startswith("$import "):
        return OWN_NAME.sub(r"@scripts.\1", value)
    return value


def refuse_foreign(configs: Mapping[str, Any]) -> None:
    """Refuses components of packages that neither the pack nor its requirements bring.

    Raises:
        InputError: naming the first.

    Example:
        >>> refuse_foreign({"inference": {"network_def": {"_target_": "mine.Net"}}})
        Traceback (most recent call last):
        transforms.files.InputError: network_def is mine.Net, which a pack does not bring; ...
    """
    for name, config in configs.items():
        for place, value in leaves(config):
            if re.split("#|::", place)[-1] != "_target_" or "." not in str(value):
                continue
            brought = str(value).partition(".")[0] in ("scripts", "monai", "torch", "ignite")
            if not brought and value != SCRIPTS["_target_"]:
                where = place.rpartition("::")[0].replace("::", "#") or name
                remedy = "use a network of this project, MONAI or PyTorch"
                raise InputError(f"{where} is {shortened(str(value))}, which a pack does not bring", remedy=remedy)


def packed_metadata(parser: Any, report: Report) -> dict[str, Any]:
    """The metadata of a pack: numbers from the report, sizes and classes from the configuration."""
    about = describe(parser)
    metadata: dict[str, Any] = json.loads(json.dumps(parser.get("_meta_")))
    classes = about["output"]["classes"]
    numbered = {str(index): name for index, name in enumerate(classes)}
    formats = metadata["network_data_format"]
    for side in ("inputs", "outputs"):
        name = next(iter(formats[side]))
        formats[side][name] |= {"num_channels": about[side[:-1]]["channels"], "spatial_shape": about["input"]["size"]}
    # what programs label a mask by, after the postprocessing
    given = next(iter(formats["outputs"].values()))
    if [name for name in given["channel_def"].values() if name != "background"] != classes[1:]:
        listed = ", ".join(f"{number} {name}" for number, name in numbered.items())
        metadata |= {"label_classes": listed, "pred_classes": f"{about['output']['channels']} channels: {listed}"}
    given["channel_def"] = numbered
    image = next(iter(formats["inputs"].values()))
    if len(image["channel_def"]) != image["num_channels"]:
        image["channel_def"] = {str(index): f"channel {index}" for index in range(image["num_channels"])}
    metadata["eval_metrics"] = report.eval_metrics()
    return metadata


def packed_code() -> dict[str, bytes]:
    """The files under `scripts/`: this project's packages, importing each other relative to where they lie.

    Example:
        >>> sorted({name.split("/")[2] for name in packed_code() if name.count("/") > 2})
        ['bundles', 'evaluation', 'networks', 'transforms']
    """
    sources = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in _sources()}
    code = {
        name: relative_imports(data.decode(), name).encode() if name.endswith(".py") else data
        for name, data in sources.items()
    }
    code["__init__.py"] = b'"""Networks, transforms, evaluation and commands of the bundle that this lies in."""\n'
    # builds the native scan where there is a compiler; without it the same is computed in PyTorch
    if (ROOT / "setup.py").is_file():
        code["setup.py"] = (ROOT / "setup.py").read_bytes()
    digest = hashlib.sha256()
    for name in sorted(code):
        digest.update(f"{name}\0{len(code[name])}\0".encode() + code[name])
    package = f"pack_{digest.hexdigest()[:12]}"
    files = {f"scripts/{package}/{name}": data for name, data in code.items()}
    files["scripts/__init__.py"] = LOADER.format(name=package).encode()
    return files


def _sources() -> Iterator[Path]:
    for room in ROOMS[:-1]:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".c", ".h") and path.name != "__main__.py":
                yield path
    # of the commands only what configurations ask for
    wanted, seen = ["bundles"], set()
    while wanted:
        name = wanted.pop()
        path = ROOT / (f"{name.replace('.', '/')}.py" if "." in name else f"{name}/__init__.py")
        if name in seen or not path.is_file():
            continue
        seen.add(name)
        yield path
        tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        wanted += [str(node.module) for node in tree if isinstance(node, ast.ImportFrom)
                   and str(node.module).startswith("bundles.")]  # fmt: skip


def relative_imports(source: str, name: str) -> str:
    """A module whose imports of this project's packages are relative; every other byte of it is as it was.

    Args:
        source: of the module.
        name: of its file, from the folder of the packages on.

    Raises:
        ValueError: for an import that has no relative form.

    Example:
        >>> relative_imports("from transforms import stem", "evaluation/scores.py")
        'from ..transforms import stem'
    """
    lines = source.split("\n")
    dots = "." * len(Path(name).parts)
    # from the last one on, so that what is before stays where it is
    for node in sorted(ast.walk(ast.parse(source)), key=lambda node: getattr(node, "lineno", 0), reverse=True):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).partition(".")[0] in ROOMS:
            old, new = f"from {node.module} ", f"from {dots}{node.module} "
        elif isinstance(node, ast.Import) and any(alias.name.partition(".")[0] in ROOMS for alias in node.names):
            if len(node.names) > 1 or "." in node.names[0].name:
                raise ValueError(f"{name}:{node.lineno}: has no relative form")
            old, new = f"import {node.names[0].name}", f"from {dots} import {node.names[0].name}"
        else:
            continue
        line, start = lines[node.lineno - 1], len(lines[node.lineno - 1].encode()[: node.col_offset].decode())
        if not line.startswith(old, start):
            raise ValueError(f"{name}:{node.lineno}: expected {old!r}")
        lines[node.lineno - 1] = line[:start] + new + line[start + len(old) :]
    return "\n".join(lines)


def _models(
    network: nn.Module, parser: Any, origin: Origin, inference: Mapping[str, Any], metadata: Mapping[str, Any]
) -> dict[str, bytes]:
    state = network.state_dict()
    files = {}
    if run := packed_run(origin):
        state._metadata["__run__"] = {"id": run["id"]}  # type: ignore[attr-defined]
        files["models/run.json"] = _json(run)
    content = io.BytesIO()
    torch.save(state, content)
    files["models/model.pt"] = content.getvalue()
    files["models/model.safetensors"] = safetensors.torch.save(
        {name: tensor.contiguous() for name, tensor in state.items()}, {"format": "pt"}
    )
    texts = {"inference.json": inference, "metadata.json": metadata}
    for name, form in (("model.ts", "torchscript"), ("model.onnx", "onnx")):
        files[f"models/{name}"], report = render(network, parser, Path(name), form, texts)
        if not report["passed"]:
            raise InputError("not packed: the exported network does not answer as this one does", path=name)
    return files


def packed_run(origin: Origin) -> dict[str, Any]:
    """What `run.json` says of the weights, without places, commands and names of files; {} for unknown weights.

    Images stay known by their hashes, so that evaluation refuses those that were trained on.
    """
    record = origin.record
    if not record:
        return {}
    kept = ("format", "id", "how_it_ended", "started", "ended", "settings", "selection", "network", "threads", "best",
            "epochs", "git", "versions", "data_note")  # fmt: skip
    data = {
        part: [{"image": [_slice_name(item["image"][0]), item["image"][1]]} for item in items]
        for part, items in record["data"].items()
    }
    return {**{name: record[name] for name in kept if name in record}, "command": "", "data": data}


def _slice_name(file: Any) -> str:
    """The name of a slice, which says its case; of other files none."""
    name = Path(file).name if isinstance(file, str) else ""
    return name if re.fullmatch(r"case\d+_slice\d+\.npz", name) else ""


def _large_files(files: Mapping[str, bytes], url: str) -> bytes:
    base = f"{url.rstrip('/')}/" if url else ""
    entries = [
        {
            "path": name,
            "url": f"{base}{name}" if base else "",
            "hash_val": hashlib.sha256(data).hexdigest(),
            "hash_type": "sha256",
        }
        for name, data in sorted(files.items())
    ]
    return yaml.safe_dump({"large_files": entries}, sort_keys=False).encode()


def _write_zip(path: Path, folder: str, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(f"{folder}/{name}")
            entry.external_attr = 0o100644 << 16
            # as where it is written on Unix
            entry.create_system = 3
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _say(line: str) -> None:
    logger.info(line)
