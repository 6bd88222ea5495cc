"""What a program must know to use an exported network: from a file to its input, from its output to a mask.

It is read off the configuration that the file was exported from, so that settings given count. Every step is described
by plain numbers and words; one of a kind that is not known here is given as the configuration has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.utils import ensure_tuple_rep

from bundles.configurations import bundle_name
from evaluation import SliceToVolume
from networks.training.provenance import plain
from transforms import WINDOW_HU, LabelSet, PictureReader, VolumeReader
from transforms.pictures import PICTURE_MODES

FORMAT = 1
Arguments = Mapping[str, Any]


def describe(parser: ConfigParser) -> dict[str, Any]:
    """The description of the network in a bundle's `inference` configuration.

    Returns:
        - name, task, format
        - input: name, layout, dtype, channels, batch, height and width ("any"), divisible_by, size (rows and columns
          that the network was trained at), value_range, steps from file to input
        - output: name, layout, channels, coding ("sigmoid": one class where the logit is above 0; "argmax": the
          channel that is highest), classes, stored (class → number in mask files), steps from output to mask file

    Example:
        >>> from bundles.configurations import find_configuration, read_bundle
        >>> description = describe(read_bundle(find_configuration("cmunext_busi")))
        >>> description["input"]["steps"][1], description["output"]["classes"]
        ({'step': 'resize', 'size': [256, 256], 'method': 'bilinear'}, ['background', 'lesion'])
    """
    metadata = parser.get(ConfigParser.meta_key) or {}
    formats = metadata.get("network_data_format") or {}
    image: dict[str, Any] = next(iter((formats.get("inputs") or {}).values()), {})
    steps = _steps(parser, "preprocessing") + _inferer(parser)
    mode = next((step["mode"] for step in steps if step.get("mode") in PICTURE_MODES), None)
    sizes = [step["size"] for step in steps if "size" in step]
    classes, stored = _classes(parser, formats)
    binary = len(classes) == 2
    return {
        "format": FORMAT,
        "name": bundle_name(parser),
        "task": metadata.get("task", ""),
        "intended_use": metadata.get("intended_use", ""),
        "input": {
            "name": "image",
            "layout": "NCHW",
            "dtype": "float32",
            "channels": PICTURE_MODES[mode] if mode else image.get("num_channels"),
            **dict.fromkeys(("batch", "height", "width"), "any"),
            "divisible_by": 1,
            "size": sizes[-1] if sizes else image.get("spatial_shape"),
            "value_range": image.get("value_range") or [0, 1],
            "steps": steps,
        },
        "output": {
            "name": "logits",
            "layout": "NCHW",
            "dtype": "float32",
            "channels": 1 if binary else len(classes),
            "coding": "sigmoid" if binary else "argmax",
            "classes": classes,
            "stored": stored,
            "steps": _back(parser, binary),
        },
    }


def _evaluated(parser: ConfigParser, place: str) -> dict[str, Any]:
    """The arguments of a component, expressions computed."""
    given = [name for name in parser[place] if name != "keys" and not name.startswith("_")]
    return {name: parser.get_parsed_content(f"{place}::{name}") for name in given}


def _steps(parser: ConfigParser, name: str) -> list[dict[str, Any]]:
    steps = []
    for index, component in enumerate(parser.get(f"{name}::transforms") or []):
        place = f"{name}::transforms::{index}"
        target = str(component["_target_"]).rpartition(".")[2]
        arguments = _evaluated(parser, place)
        known = STEPS.get(target)
        step = known(arguments) if known else None
        if step is None:
            step = {"step": "other", "transform": component["_target_"], "arguments": plain(arguments)}
        if step:
            steps.append(step)
    return steps


def _read(arguments: Arguments) -> dict[str, Any] | None:
    reader = arguments.get("reader")
    if isinstance(reader, PictureReader):
        return {"step": "read", "kind": "picture", "mode": reader.mode, "values": [0, 255]}
    if isinstance(reader, VolumeReader):
        return {"step": "read", "kind": "volume", "unit": "HU"}
    return None


def _rounded(arguments: Arguments) -> dict[str, Any] | None:
    return {"step": "round"} if arguments["func"] is torch.round else None


def _resized(arguments: Arguments) -> dict[str, Any] | None:
    if set(arguments) - {"spatial_size", "mode", "dtype"}:
        return None
    # pixel centres, no smoothing
    return {"step": "resize", "size": [*map(int, arguments["spatial_size"])], "method": arguments["mode"]}


def _normalised(arguments: Arguments) -> dict[str, Any] | None:
    if set(arguments) - {"subtrahend", "divisor", "channel_wise"} or "subtrahend" not in arguments:
        return None
    return {"step": "normalise", "mean": plain(arguments["subtrahend"]), "std": plain(arguments["divisor"])}


def _stretched(arguments: Arguments) -> dict[str, Any] | None:
    if set(arguments) - {"minv", "maxv"}:
        return None
    # from the image's own least and greatest value
    return {"step": "stretch", "to": [arguments.get("minv", 0.0), arguments.get("maxv", 1.0)]}


# By the name of the transform: what it does in plain words, {} for nothing that numbers show, None for "cannot say".
STEPS: Mapping[str, Callable[[Arguments], dict[str, Any] | None]] = {
    "LoadImaged": _read,
    "EnsureChannelFirstd": lambda _: {},
    "Resized": _resized,
    "Lambdad": _rounded,
    "NormalizeIntensityd": _normalised,
    "ScaleIntensityd": _stretched,
    "Orientationd": lambda arguments: {"step": "orient", "axes": arguments["axcodes"]},
    "WindowHUd": lambda arguments: {
        "step": "window",
        "hu": [*map(float, arguments.get("window_hu", WINDOW_HU))],
        "to": [0.0, 1.0],
    },
}


def _inferer(parser: ConfigParser) -> list[dict[str, Any]]:
    inferer = parser.get_parsed_content("inferer") if "inferer" in parser else None
    if not isinstance(inferer, SliceToVolume):
        return []
    slices = {"step": "slice", "axis": inferer.spatial_dim}
    if inferer.spatial_size is None:
        return [slices]
    # scipy.ndimage.zoom, whose corner samples keep their places
    return [slices, {"step": "zoom", "size": [*ensure_tuple_rep(inferer.spatial_size, 2)], "order": 3}]


def _back(parser: ConfigParser, binary: bool) -> list[dict[str, Any]]:
    """From logits to the mask of a file."""
    decide = {"step": "threshold", "above": 0.5} if binary else {"step": "argmax"}
    inferer = parser.get_parsed_content("inferer") if "inferer" in parser else None
    if isinstance(inferer, SliceToVolume):
        return [decide, {"step": "zoom", "size": "the slice's", "order": 0}, {"step": "orient", "axes": "the file's"}]
    activate = {"step": "sigmoid" if binary else "softmax"}
    return [activate, {"step": "resize", "size": "the picture's", "method": "bilinear"}, decide]


def _classes(parser: ConfigParser, formats: Mapping[str, Any]) -> tuple[list[str], dict[str, int]]:
    """Names of the classes, the background first, and the number that stands for each in mask files."""
    if "labels" in parser:
        labels: LabelSet = parser.get_parsed_content("labels")
        names = ["background", *labels.classes]
        if labels.label_map is None:
            return names, {"background": 0, names[1]: 255}
        first = {index: number for number, index in reversed([*labels.label_map.items()])}
        return names, {name: first.get(index, index) for index, name in enumerate(names)}
    if "classes" in parser:
        names = ["background", *parser.get_parsed_content("classes")]
    else:
        output: dict[str, Any] = next(iter((formats.get("outputs") or {}).values()), {})
        channels = output.get("channel_def") or {}
        names = [str(channels[key]) for key in sorted(channels, key=int)]
        names = names if len(names) > 1 else ["background", *names]
    return names, {name: index for index, name in enumerate(names)}
