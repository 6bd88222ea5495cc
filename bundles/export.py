"""From a trained network to one file that others can use without this project: TorchScript or ONNX.

Each file also holds, as JSON, the resolved configuration (`inference.json`), `metadata.json`, and `description.json`,
which says how to make the network's input and read its output (`bundles.description`).
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.data import save_net_with_metadata
from monai.networks import convert_to_torchscript
from monai.utils import ensure_tuple_rep
from torch import Tensor, nn

import networks
from bundles.configurations import find_configuration, read_bundle, stored_configuration
from bundles.description import describe
from bundles.run import running_workflow
from evaluation.inferers import to_labels
from networks.selective_scan.onnx import to_onnx
from networks.training import Origin, load_trained
from networks.training.provenance import plain
from transforms import InputError, check_output, replacing

SUFFIX = {"torchscript": ".ts", "onnx": ".onnx"}
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
PARITY = ".parity.json"
# What exporters look at: two different sides that networks divide without a rest, or they keep the rest for the rule.
EXAMPLE = (96, 64)
# Of the greatest logit; and of the masks.
LARGEST_DIFFERENCE, LEAST_DICE = 1e-3, 0.999
# What a run's settings may fill in.
FILLED = ("image_size", "classes", "label_map", "in_channels", "normalisation")

Apply = Callable[[np.ndarray], np.ndarray]
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
) -> Path:
    """Exports a bundle's network with trained weights: `python -m bundles export`.

    Where the weights' run is known, settings that decide on the network's input and output are the run's, unless they
    are given.

    Args:
        bundle: its folder, its name, or an inference configuration.
        weights: a checkpoint.
        form: torchscript or onnx.
        output: the file; beside the weights, under their name, if it is not given.
        overrides: settings by name, as on the command line.

    Returns:
        the file.

    Raises:
        InputError: when something is missing or does not fit, or the file does not answer as the network does.
    """
    missing = [name for name in NEEDS.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--format {form} needs {', '.join(missing)}", remedy=f"pip install {' '.join(missing)}")
    path = check_name(output or Path(weights).with_suffix(SUFFIX[form]), form)
    network, parser = trained(bundle, weights, overrides)
    write(network, parser, path, form)
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
    filled = {**_of_run(origin, known), **given}
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


def _of_run(origin: Origin, parser: ConfigParser) -> dict[str, Any]:
    """The settings of the weights' run that this configuration has too; data alone, nothing that would be executed."""
    known: Mapping[str, Any] = origin.record.get("settings") or {}
    given: Mapping[str, Any] = origin.record.get("overrides") or {}
    settings = {name: known[name] for name in FILLED if name in known and name in parser}
    settings |= {name: given[name] for name in FILLED if name in given and name in parser}
    settings = {name: value for name, value in settings.items() if _is_data(value)}
    definition = given.get("network_def")
    if isinstance(definition, Mapping):
        arguments = {name: value for name, value in definition.items() if name != "_target_"}
        package, _, name = str(definition.get("_target_")).partition(".")
        if package == "networks" and name in networks.__all__ and _is_data(arguments):
            settings["network_def"] = dict(definition)
    return settings


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
        title = {"torchscript": "a TorchScript", "onnx": "an ONNX"}[form]
        fact = f"{title} program is called NAME{SUFFIX[form]}"
        raise InputError(fact, path=path, remedy="give it such a name")
    check_output(path.parent)
    return path


@torch.no_grad()
def write(network: nn.Module, parser: ConfigParser, path: Path, form: str) -> dict[str, Any]:
    """Exports a network, compares the answers of both, and writes the file.

    What is written is the network's form for inference, with batch, height and width open. The comparison is printed,
    and stored beside the file as `NAME.parity.json`. Of ONNX it is the file's content that answers, of TorchScript the
    program before it is stored: no program here reads TorchScript, which executes what it holds.

    Args:
        network: with its weights.
        parser: the configuration that it comes from.
        path: of the file.
        form: torchscript or onnx.

    Returns:
        the comparison.

    Raises:
        InputError: when logits differ by more than 1e-3 of the greatest one, or masks by more than a Dice of 0.999;
            nothing is written then.
    """
    description = describe(parser)
    metadata = parser.get(ConfigParser.meta_key) or {}
    texts = {
        "description.json": json.dumps(description),
        "inference.json": json.dumps(stored_configuration(parser)),
        "metadata.json": json.dumps(metadata),
    }
    network = network.cpu().eval()
    freeze: Any = getattr(network, "frozen", None)
    frozen: nn.Module = freeze() if callable(freeze) else network
    example = torch.zeros(2, description["input"]["channels"], *EXAMPLE)
    if form == "onnx":
        logger.info("an ONNX export takes one to three minutes")
    content, exported = _WRITERS[form](frozen, example, texts)
    report = {"file": path.name, "format": form, **compare(network, exported, description)}
    print(parity_line(report))
    if not report["passed"]:
        raise InputError("not written: the exported network does not answer as this one does", path=path)
    with replacing(path) as temporary, replacing(path.with_name(path.name + PARITY)) as beside:
        temporary.write_bytes(content)
        beside.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    logger.info(f"exported to {path.resolve()}")
    return report


def _torchscript(network: nn.Module, example: Tensor, texts: Mapping[str, str]) -> tuple[bytes, Apply]:
    # in memory first: PyTorch's writer aborts the process on a full disk
    content = io.BytesIO()
    more = {name: text.encode() for name, text in texts.items() if name != "metadata.json"}
    program: Any = convert_to_torchscript(network)
    metadata = json.loads(texts["metadata.json"])
    save_net_with_metadata(program, content, meta_values=metadata, more_extra_files=more)
    return content.getvalue(), lambda images: program(torch.from_numpy(images)).numpy()


def _onnx(network: nn.Module, example: Tensor, texts: Mapping[str, str]) -> tuple[bytes, Apply]:
    import onnx
    import onnxruntime

    axes = {axis: torch.export.Dim(name) for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    model = to_onnx(network, example, axes).model_proto
    onnx.helper.set_model_props(model, dict(texts))
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    (name,) = (one.name for one in session.get_inputs())
    return content, lambda images: np.asarray(session.run(None, {name: images})[0])


_WRITERS: Mapping[str, Callable[[nn.Module, Tensor, Mapping[str, str]], tuple[bytes, Apply]]] = {
    "torchscript": _torchscript,
    "onnx": _onnx,
}


def parity_inputs(description: Mapping[str, Any]) -> Iterator[np.ndarray]:
    """Five inputs of three sizes: the network's own, once for two images; odd and smaller; larger and of other form.

    They are smooth fields with noise in the range of values that the description gives, the same each time.

    Example:
        >>> image = {"channels": 1, "size": [8, 8], "value_range": [0, 1]}
        >>> [one.shape for one in parity_inputs({"input": image})]
        [(1, 1, 8, 8), (1, 1, 8, 8), (2, 1, 8, 8), (1, 1, 5, 7), (1, 1, 12, 9)]
    """
    about = description["input"]
    height, width = ensure_tuple_rep(about["size"], 2)
    low, high = about["value_range"] if len(about["value_range"]) == 2 else (0, 1)
    sizes = [(height, width)] * 3 + [((height // 2) | 1, (7 * width // 8) | 1), (3 * height // 2, width + 1)]
    random = torch.Generator().manual_seed(0)
    for batch, size in zip((1, 1, 2, 1, 1), sizes, strict=True):
        coarse = torch.rand(batch, about["channels"], 5, 5, generator=random)
        smooth = F.interpolate(coarse, size, mode="bicubic", align_corners=True)
        noise = torch.randn(smooth.shape, generator=random)
        yield (low + (high - low) * (smooth + 0.05 * noise).clamp(0, 1)).numpy()


@torch.no_grad()
def compare(network: Callable[[Tensor], Tensor], exported: Apply, description: Mapping[str, Any]) -> dict[str, Any]:
    """How far two forms of a network are apart: logits and masks on `parity_inputs`.

    Returns:
        inputs: for each its shape, largest_difference of the logits, relative (to the greatest logit), dice (of the
        class whose masks agree least), foreground (share of pixels); and largest_difference, relative, dice, passed.

    Example:
        >>> about = {"input": {"channels": 1, "size": [8, 8], "value_range": [0, 1]}}
        >>> report = compare(lambda x: x - 0.5, lambda x: x - 0.4, about)
        >>> round(report["largest_difference"], 3), report["passed"]
        (0.1, False)
    """
    rows: list[dict[str, Any]] = []
    for images in parity_inputs(description):
        expected = network(torch.from_numpy(images))
        found = torch.from_numpy(np.asarray(exported(images)))
        if found.shape != expected.shape:
            fact = f"the exported network answers {tuple(found.shape)}, this one {tuple(expected.shape)}"
            raise InputError(f"not written: for an input {images.shape} {fact}")
        difference = float((found - expected).abs().max())
        greatest = float(expected.abs().max())
        masks = to_labels(expected), to_labels(found)
        rows.append(
            {
                "shape": [*images.shape],
                "largest_difference": difference,
                "relative": difference / greatest if greatest else difference,
                "dice": _dice(*masks),
                "foreground": float((masks[0] > 0).double().mean()),
            }
        )
    worst: dict[str, float] = {name: max(row[name] for row in rows) for name in ("largest_difference", "relative")}
    worst["dice"] = min(row["dice"] for row in rows)
    finite = all(math.isfinite(row["largest_difference"]) for row in rows)
    passed = finite and worst["relative"] <= LARGEST_DIFFERENCE and worst["dice"] >= LEAST_DICE
    return plain({**worst, "passed": passed, "inputs": rows})


def _dice(expected: Tensor, found: Tensor) -> float:
    """Dice of the class whose masks agree least; 1 where a class is in neither."""
    scores = [1.0]
    for label in torch.cat([expected.flatten(), found.flatten()]).unique().tolist():
        first, second = expected == label, found == label
        scores.append(2 * float((first & second).sum()) / float(first.sum() + second.sum()))
    return min(scores)


def parity_line(report: Mapping[str, Any]) -> str:
    """A comparison in one line.

    Example:
        >>> rows = [{"shape": [1, 3, 8, 8], "foreground": 0.0}]
        >>> numbers = {"largest_difference": 1e-6, "relative": 2e-7, "dice": 1.0, "passed": True}
        >>> parity_line({"file": "a.onnx", **numbers, "inputs": rows})
        'a.onnx: largest difference of logits 1e-06 (2e-07 of the greatest), Dice of masks 1.00000, on 1 inputs of 1
        sizes; all masks are empty'
    """
    rows = report["inputs"]
    sizes = {tuple(row["shape"][2:]) for row in rows}
    shares = [row["foreground"] for row in rows]
    vacuous = "; all masks are empty" if max(shares) == 0 else "; all masks are full" if min(shares) == 1 else ""
    return (
        f"{report['file']}: largest difference of logits {report['largest_difference']:.1g} ({report['relative']:.1g}"
        f" of the greatest), Dice of masks {report['dice']:.5f}, on {len(rows)} inputs of {len(sizes)} sizes{vacuous}"
    )
