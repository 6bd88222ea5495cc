"""From a trained network to one file that others can use without this project: TorchScript, ONNX, pt2 or a page.

Each file also holds, as JSON, the resolved configuration (`inference.json`), `metadata.json`, and `description.json`,
which says how to make the network's input and read its output (`bundles.description`).
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from torch import nn

import networks
from bundles.configurations import find_configuration, read_bundle, stored_configuration
from bundles.description import describe
from bundles.formats import CONTENT_OF
from bundles.parity import compare, parity_line
from bundles.run import running_workflow
from networks.training import Origin, load_trained
from transforms import InputError, check_output, replacing

SUFFIX = {"torchscript": ".ts", "onnx": ".onnx", "pt2": ".pt2", "tensorrt": ".engine", "page": ".html"}
TITLE = {
    "torchscript": "a TorchScript program",
    "onnx": "an ONNX program",
    "pt2": "an exported program",
    "tensorrt": "a TensorRT engine",
    "page": "a page",
}
NEEDS = dict.fromkeys(("onnx", "page"), ("onnx", "onnxscript", "onnxruntime"))
PARITY = ".parity.json"
# What exporters look at: two different sides that networks divide without a rest, or they keep the rest for the rule.
EXAMPLE = (96, 64)
# What a run's settings may fill in.
FILLED = ("image_size", "classes", "label_map", "in_channels", "normalisation")

logger = logging.getLogger(__name__)


def export_torchscript(network: nn.Module, filepath: str | Path) -> None:
    """Writes the network of the run as TorchScript, for `run exporting` of a configuration; see `write`.

    `monai.data.load_net_with_metadata` reads the network, and the JSON files beside it.

    Args:
        network: the bare network.
        filepath: ends in `.ts`; the folder is made if need be.

    Raises:
        InputError: when it ends in something else, a checkpoint's name for instance, or cannot be written.
    """
    path = check_name(filepath, "torchscript")
    workflow = running_workflow()
    if workflow is None:
        raise ValueError("export_torchscript is for a configuration; in Python call bundles.export.write")
    write(network, workflow.parser, path, "torchscript")


def export_bundle(
    bundle: str | Path,
    weights: str | Path,
    form: str,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    onnxruntime_web: str | Path | None = None,
) -> Path:
    """Exports a bundle's network with trained weights: `python -m bundles export`.

    Where the weights' run is known, settings that decide on the network's input and output are the run's, unless they
    are given.

    Args:
        bundle: its folder, its name, or an inference configuration.
        weights: a checkpoint.
        form: torchscript, onnx, pt2, tensorrt or page.
        output: the file; beside the weights, under their name, if it is not given.
        overrides: settings by name, as on the command line.
        onnxruntime_web: for a page, see `bundles.page.read_runtime`.

    Returns:
        the file.

    Raises:
        InputError: when something is missing or does not fit, or the file does not answer as the network does.
    """
    if form == "tensorrt":
        return export_tensorrt(bundle, weights, output, overrides)
    missing = [name for name in NEEDS.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--format {form} needs {', '.join(missing)}", remedy=f"pip install {' '.join(missing)}")
    path = check_name(output or Path(weights).with_suffix(SUFFIX[form]), form)
    if form == "page":
        # configurations import this module, and have no use for it
        from bundles import page

        runtime = page.read_runtime(onnxruntime_web)
    network, parser = trained(bundle, weights, overrides)
    finish = None
    if form == "page":
        description = describe(parser)
        page.check(description, parser.get(), sum(one.numel() for one in network.parameters()))
        facts = page.about(description, type(network).__name__, weights)
        finish = functools.partial(page.assemble, description=description, about=facts, runtime=runtime)
    write(network, parser, path, form, finish)
    return path


def export_tensorrt(
    bundle: str | Path,
    weights: str | Path,
    output: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Path:
    """Exports to ONNX, and lets TensorRT's `trtexec` make an engine of that file, for this machine's GPU.

    The comparison is that of the ONNX file, which stays beside the engine.

    Raises:
        InputError: when there is no NVIDIA GPU or no trtexec, or what `export_bundle` says.
    """
    lacks = "an NVIDIA GPU" * (not torch.cuda.is_available()) or "TensorRT's trtexec" * (not shutil.which("trtexec"))
    if lacks:
        remedy = "make the engine where its GPU is: export --format onnx, and see docs/export.md"
        raise InputError(f"--format tensorrt needs {lacks}, which this machine does not have", remedy=remedy)
    path = check_name(output or Path(weights).with_suffix(SUFFIX["tensorrt"]), "tensorrt")
    file = export_bundle(bundle, weights, "onnx", path.with_suffix(SUFFIX["onnx"]), overrides)
    report = json.loads(file.with_name(file.name + PARITY).read_text(encoding="utf-8"))
    _, channels, height, width = report["inputs"][0]["shape"]
    least, usual, most = (1, 32, 32), (1, height, width), (16, max(1024, height), max(1024, width))
    shapes = [
        f"--{name}Shapes=image:{batch}x{channels}x{rows}x{columns}"
        for name, (batch, rows, columns) in (("min", least), ("opt", usual), ("max", most))
    ]
    with replacing(path) as temporary:
        # TF32 would be further from the network than a comparison allows
        command = ["trtexec", f"--onnx={file}", *shapes, "--noTF32", "--skipInference", f"--saveEngine={temporary}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not temporary.is_file():
            said = " ".join((done.stderr or done.stdout).split()[-40:])
            raise InputError(f"not written: trtexec ended with {done.returncode} ({said})", path=path)
    logger.info(f"exported to {path.resolve()}; compared was the ONNX file that it is made of")
    return path


def trained(
    bundle: str | Path, weights: str | Path | Sequence[str | Path], overrides: Mapping[str, Any] | None = None
) -> tuple[nn.Module, ConfigParser]:
    """The network of a bundle with trained weights, and its configuration with the settings of their run.

    Of several checkpoints it is the mean of their logits, see `networks.Ensemble`.

    Raises:
        InputError: when there is no such bundle or setting.
        ValueError: when the weights do not fit, or are of a run with other settings.
        FileNotFoundError: when there are none.
    """
    given = dict(overrides or {})
    file = find_configuration(bundle)
    origin = Origin(weights)
    known = read_bundle(file, given)
    filled = {**settings_of_run(origin, known), **given}
    if taken := [f"{name} {value}" for name, value in filled.items() if name not in given]:
        logger.info(f"from the run of {weights}: {', '.join(taken)}")
    parser = read_bundle(file, filled)
    if "network_def" not in parser:
        raise InputError("defines no network_def", path=file)
    for name in ("ckpt_path", "load_pretrain"):
        if name in parser:
            files = str(weights) if isinstance(weights, str | Path) else [*map(str, weights)]
            parser[name] = {"ckpt_path": files, "load_pretrain": True}[name]
    if "settings" in parser:
        origin.check(parser.get_parsed_content("settings"), force=parser.get("force") is True)
    network = parser.get_parsed_content("network_def")
    if not isinstance(network, nn.Module):
        raise InputError("its network_def is no network", path=file)
    channels = describe(parser)["output"]["channels"]
    return load_trained(network, weights, out_channels=channels).eval(), parser


def settings_of_run(origin: Origin, parser: ConfigParser) -> dict[str, Any]:
    """The settings of the weights' run that this configuration has too; data alone, nothing that would be executed."""
    known: Mapping[str, Any] = origin.record.get("settings") or {}
    given: Mapping[str, Any] = origin.record.get("overrides") or {}
    settings = {name: known[name] for name in FILLED if name in known and name in parser}
    settings |= {name: given[name] for name in FILLED if name in given and name in parser}
    settings = {name: value for name, value in settings.items() if _is_data(value)}
    if isinstance(label_map := settings.get("label_map"), Mapping):
        # JSON has no numbers as keys
        settings["label_map"] = {int(key) if str(key).isdecimal() else key: one for key, one in label_map.items()}
    if (definition := _network_of_run(origin, parser)) != parser.get("network_def"):
        settings["network_def"] = definition
    return settings


def _network_of_run(origin: Origin, parser: ConfigParser) -> Any:
    """The run's network_def, from where ever it was given, if it is one of this project's networks.

    Its arguments are data, or what this configuration says too. Of another one it is this configuration's own.
    """
    own = parser.get("network_def")
    run = (origin.record.get("configuration") or {}).get("network_def")
    if not isinstance(run, Mapping):
        return own
    arguments = {name: value for name, value in run.items() if name != "_target_"}
    known = own if isinstance(own, Mapping) else {}
    package, _, name = str(run.get("_target_")).partition(".")
    plain_ones = {name: value for name, value in arguments.items() if name not in known or known[name] != value}
    fits = package == "networks" and name in networks.__all__ and _is_data(plain_ones)
    return dict(run) if fits else own


def _is_data(value: Any) -> bool:
    """False for what MONAI would run."""
    if isinstance(value, Mapping):
        return all(not str(key).startswith("_") and _is_data(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_data, value))
    return not (isinstance(value, str) and value.startswith(("$", "@", "%")))


def check_name(filepath: str | Path, form: str) -> Path:
    """The path of a file to write.

    Raises:
        InputError: when its name ends otherwise than files of this format do, or its folder cannot be written to.

    Example:
        >>> check_name("model.pt", "onnx")
        Traceback (most recent call last):
        transforms.files.InputError: model.pt: an ONNX program is called NAME.onnx; give it such a name
    """
    path = Path(filepath)
    if path.suffix != SUFFIX[form] or path.is_dir():
        fact = f"{TITLE[form]} is called NAME{SUFFIX[form]}"
        raise InputError(fact, path=path, remedy="give it such a name")
    check_output(path.parent)
    return path


@torch.no_grad()
def write(
    network: nn.Module,
    parser: ConfigParser,
    path: Path,
    form: str,
    finish: Callable[[bytes], bytes] | None = None,
) -> dict[str, Any]:
    """Exports a network, compares the answers of both, and writes the file.

    What is written is the network's form for inference, with batch, height and width open. The comparison is printed,
    and stored beside the file as `NAME.parity.json`. It is the file's content that answers; of TorchScript the program
    before it is stored: no program here reads TorchScript, which executes what it holds.

    Args:
        network: with its weights.
        parser: the configuration that it comes from.
        path: of the file.
        form: torchscript, onnx, pt2 or page.
        finish: from the exported network to the content of the file, of a page.

    Returns:
        the comparison.

    Raises:
        InputError: when logits differ by more than 1e-3 of the greatest one, or masks by more than a Dice of 0.999;
            nothing is written then.
    """
    content, report = render(network, parser, path, form)
    content = finish(content) if finish else content
    with replacing(path) as temporary, replacing(path.with_name(path.name + PARITY)) as beside:
        temporary.write_bytes(content)
        beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    logger.info(f"exported to {path.resolve()}")
    return report


@torch.no_grad()
def render(
    network: nn.Module, parser: ConfigParser, path: Path, form: str, texts: Mapping[str, Any] | None = None
) -> tuple[bytes, dict[str, Any]]:
    """The content of the file that `write` writes, and the comparison; equal networks give equal bytes.

    Args:
        path: of the file, for its name; nothing is written.
        texts: values for JSON files within it, instead of those that follow from the configuration, by name.

    Raises:
        InputError: as `write`.
    """
    description = describe(parser)
    contents = {
        "description.json": description,
        "inference.json": stored_configuration(parser),
        "metadata.json": parser.get(ConfigParser.meta_key) or {},
        **(texts or {}),
    }
    network = network.cpu().eval()
    freeze: Any = getattr(network, "frozen", None)
    frozen: nn.Module = freeze() if callable(freeze) else network
    example = torch.zeros(2, description["input"]["channels"], *EXAMPLE)
    if form != "torchscript":
        logger.info("the export takes one to three minutes")
    content, exported = CONTENT_OF[form](frozen, example, contents, path.stem)
    report = {"file": path.name, "format": form, **compare(network, exported, description)}
    print(parity_line(report))
    if not report["passed"]:
        raise InputError("not written: the exported network does not answer as this one does", path=path)
    return content, report
