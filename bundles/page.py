"""From a network to one HTML file that segments pictures in a browser, offline: `--format page` of an export.

The page is assembled from `page.html`, `page.css`, `page.js` and `page_worker.js`, the network as ONNX, its
description, and onnxruntime-web. It names no other file and forbids itself every connection.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from networks.training import Origin
from transforms import InputError

VERSION = "1.30.0"
ARCHIVE = f"onnxruntime-web-{VERSION}.tgz"
ADDRESS = f"https://registry.npmjs.org/onnxruntime-web/-/{ARCHIVE}"
HOW = (
    f"get it into this folder with npm pack onnxruntime-web@{VERSION}, or curl -O {ADDRESS}; or --onnxruntime_web PATH"
)
# The program and what it runs on, with their SHA-256.
RUNTIME = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
# Of weights, 4 bytes a parameter, which the page holds as letters: a third more. CMUNeXt-L has 33 MB, VM-UNet 110.
MOST_BYTES = 48 * 2**20
STEPS = ("read", "resize", "round", "normalise", "stretch")
STEPS_BACK = ("sigmoid", "softmax", "resize", "threshold", "argmax")
MODES = ("RGB", "BGR", "L")
PHANTOMS = "phantom"


def read_runtime(place: str | Path | None = None) -> dict[str, bytes]:
    """The files of onnxruntime-web that a page needs, by name.

    Args:
        place: the archive that `npm pack` gives, or a folder that holds the files; without it the archive is looked
            for in the working directory.

    Raises:
        InputError: when they are not there, or are not those of the release.

    Example:
        >>> read_runtime("nowhere.tgz")
        Traceback (most recent call last):
        transforms.files.InputError: nowhere.tgz: no such file; get it into this folder with npm pack ...
    """
    path = Path(place or ARCHIVE)
    if not path.exists():
        fact = "no such file" if place else f"--format page needs onnxruntime-web {VERSION}"
        raise InputError(fact, path=place, remedy=HOW)
    found = _in_folder(path) if path.is_dir() else _in_archive(path)
    for name, sha256 in RUNTIME.items():
        if name not in found:
            raise InputError(f"holds no {name}", path=path, remedy=HOW)
        if hashlib.sha256(found[name]).hexdigest() != sha256:
            raise InputError(f"its {name} is not that of onnxruntime-web {VERSION}", path=path, remedy=HOW)
    return found


def _in_folder(folder: Path) -> dict[str, bytes]:
    """Of an unpacked archive, of `node_modules/onnxruntime-web`, or of its `dist`."""
    places = (folder, folder / "dist", folder / "package" / "dist")
    files = {name: place / name for place in places for name in RUNTIME if (place / name).is_file()}
    return {name: file.read_bytes() for name, file in files.items()}


def _in_archive(file: Path) -> dict[str, bytes]:
    found = {}
    try:
        with tarfile.open(file, "r:gz") as archive:
            for name in RUNTIME:
                content = archive.extractfile(f"package/dist/{name}")
                found[name] = content.read() if content else b""
    except KeyError:
        return found
    except (OSError, EOFError, tarfile.TarError) as error:
        raise InputError(f"is no archive of npm ({error})", path=file, remedy=HOW) from error
    return found


def check(description: Mapping[str, Any], settings: Mapping[str, Any], parameters: int = 0) -> None:
    """Refuses what a page cannot do as Python does it, and what would be too large for phones and mails.

    Args:
        description: of the export.
        settings: of the configuration, resolved.
        parameters: of the network.

    Raises:
        InputError: saying what.

    Example:
        >>> check({"input": {"steps": [{"step": "orient"}]}, "output": {"steps": []}}, {})
        Traceback (most recent call last):
        transforms.files.InputError: a page takes pictures, and cannot do the step orient of this input; ...
    """
    for part, known in (("input", STEPS), ("output", STEPS_BACK)):
        for step in description[part]["steps"]:
            name = step["step"]
            if name not in known or step.get("method", "bilinear") != "bilinear" or step.get("kind") == "volume":
                what = step.get("transform") or " ".join(str(step[key]) for key in ("step", "kind") if key in step)
                fact = f"a page takes pictures, and cannot do the step {what} of this {part}"
                raise InputError(fact, remedy="export to onnx")
            if step.get("mode", "RGB") not in MODES:
                raise InputError(f"a page reads no {step['mode']}: browsers do not keep the fourth channel")
    for name, without in (("tta", "none"), ("postprocess", "none")):
        if settings.get(name, without) != without:
            raise InputError(f"--{name} {settings[name]}: a page does not do it", remedy="leave it out")
    if 4 * parameters > MOST_BYTES:
        size, most = (round(number / 2**20) for number in (4 * parameters, MOST_BYTES))
        fact = f"the network's weights take {size} MB, in a page they may take {most}"
        raise InputError(fact, remedy="export a smaller network, a CMUNeXt for instance; or to onnx")


def assemble(
    model: bytes, description: Mapping[str, Any], about: Sequence[tuple[str, str]], runtime: Mapping[str, bytes]
) -> bytes:
    """The page: same input, same bytes.

    Args:
        model: the network as ONNX.
        description: of the export, see `bundles.description`.
        about: what is known of the model, name and text; see `about`.
        runtime: see `read_runtime`.
    """
    folder, facts = Path(__file__).parent, dict(about)
    script, style, worker = ((folder / name).read_text("utf-8") for name in ("page.js", "page.css", "page_worker.js"))
    program, wasm = (_packed(runtime[name]) for name in RUNTIME)
    environment = Environment(
        autoescape=True, trim_blocks=True, loader=FileSystemLoader(folder), undefined=StrictUndefined
    )
    policy = "; ".join(
        (
            "default-src 'none'",
            # blob: the worker, and the program in it; nothing else is a blob that runs
            f"script-src {_hash(script)} 'wasm-unsafe-eval' blob:",
            "worker-src blob:",
            f"style-src {_hash(style)}",
            "img-src data: blob:",
            "connect-src 'none'",
            "form-action 'none'",
            "base-uri 'none'",
        )
    )
    return (
        environment.get_template("page.html")
        .render(
            policy=policy,
            title=description["name"],
            task=description["task"] or "Segmentation of pictures",
            intended_use=description["intended_use"] or "For research on segmentation methods; not for clinical use",
            phantoms=PHANTOMS in facts["Trained on"],
            about=about,
            origin=f"run {facts['Run'][:8]}, trained on {facts['Trained on']}" if "Trained" in facts else facts["Run"],
            # no tag can begin in it
            description=Markup(json.dumps(description).replace("<", "\\u003c")),
            script=Markup(script),
            style=Markup(style),
            worker=Markup(worker),
            program=Markup(program),
            wasm=Markup(wasm),
            model=Markup(_packed(model)),
        )
        .encode("utf-8")
    )


def about(description: Mapping[str, Any], network: str, weights: str | Path) -> list[tuple[str, str]]:
    """What is known of a model and its run, name and text: no paths.

    Example:
        >>> classes = ["background", "lesion"]
        >>> description = {"name": "A", "input": {"size": [64, 64]}, "output": {"classes": classes}}
        >>> about(description, "CMUNeXt", "nowhere/model.pt")[:2]
        [('Bundle', 'A'), ('Network', 'CMUNeXt, input of 64 × 64 pixels')]
    """
    origin = Origin(weights)
    run = origin.record
    rows, columns = description["input"]["size"]
    found = [
        ("Bundle", description["name"]),
        ("Network", f"{network}, input of {columns} × {rows} pixels"),
        ("Segments", ", ".join(description["output"]["classes"][1:])),
        ("Run", str(run["id"]) if run else origin.selection),
    ]
    if run:
        found += [("Trained", str(run["started"])[:10]), ("Trained on", _data(run)), ("Selected by", origin.selection)]
        if best := run.get("best"):
            found.append(
                ("Score", f"{best['metric']} {best['score']:.4f} in epoch {best['epoch']}, on the held-out part")
            )
    else:
        found.append(("Trained on", "unknown"))
    if Path(weights).is_file():
        found.append(("SHA-256 of the weights", origin.weights["sha256"]))
    found.append(("Runs with", f"ONNX Runtime Web {VERSION}, © Microsoft, MIT licence"))
    return found


def _data(run: Mapping[str, Any]) -> str:
    """What a run was trained on, as its record says."""
    items = run["data"].get("train") or []
    count = f"{len(items)} images" if items else "no images that are listed"
    return f"{count}: {run.get('data_note') or 'the data set says nothing of itself'}"


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 9, mtime=0)).decode()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
