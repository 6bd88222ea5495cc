"""`python -m bundles export`: files that answer as the network does, and run without this project."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import load_net_with_metadata
from packaging.requirements import Requirement
from torch import nn

import bundles.export
import bundles.formats
from bundles.__main__ import main
from bundles.configurations import find_configuration, read_bundle
from bundles.description import describe
from bundles.parity import parity_inputs
from networks import CMUNeXt, VMUNet
from tests.bundles.conftest import BUNDLES, DATA, OWN, PICTURES, ROOT, Options, Run, config, saved
from tests.bundles.test_bundles import brightness_network
from tests.helpers import read
from transforms import InputError

Trained = Callable[[str], tuple[Path, str]]
Export = Callable[[str], Path]
each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
# the exporter takes most of a minute for VM-UNet
each_network = pytest.mark.parametrize(
    "bundle", [pytest.param(name, marks=[pytest.mark.soak] * (name == "vmunet_isic")) for name in BUNDLES]
)
missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")
CLASSES = {"cmunext_busi": 1, "vmunet_isic": 1, "vmunet_synapse": 9}


def network_of(bundle: str, weights: Path) -> nn.Module:
    arguments = {key: value for key, value in OWN[bundle].items() if key != "_target_"}
    kind = CMUNeXt if bundle == "cmunext_busi" else VMUNet
    network = kind(**{"in_channels": 3, "out_channels": CLASSES[bundle], **arguments}).eval()
    network.load_state_dict(saved(weights))
    return network


def source_of(bundle: str, data: Path) -> Path:
    pattern = "**/images/*.*" if bundle in PICTURES else "raw/img/*.nii.gz"
    return min((data / DATA[bundle]).glob(pattern))


@pytest.fixture(scope="module")
def used(trained: Trained, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """VM-UNet's trained weights, the last layer shifted so that each class is as likely in one picture; CMUNeXt's as
    they are: the logits of so short a training hardly differ from one pixel to the next."""
    done: dict[str, Path] = {}

    @torch.no_grad()
    def shift(bundle: str) -> Path:
        if bundle not in done:
            folder, _ = trained(bundle)
            done[bundle] = tmp_path_factory.mktemp("used") / "model.pt"
            shutil.copy(folder / "run.json", done[bundle].parent)
            state, network = saved(folder / "model.pt"), network_of(bundle, folder / "model.pt")
            parser = read_bundle(find_configuration(bundle), {"image_size": 32})
            image = parser.get_parsed_content("preprocessing")({"image": source_of(bundle, data)})["image"].as_tensor()
            image = image[None] if bundle in PICTURES else image[:, 3][None]
            if bundle != "cmunext_busi":
                state[f"{network.head}.bias"] -= network(image).median(-1).values.median(-1).values[0]
            torch.save(state, done[bundle])
        return done[bundle]

    return shift


@pytest.fixture(scope="module")
def exported(used: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Export:
    """The ONNX file of each bundle's trained network; no setting is given, so they are the run's."""
    done: dict[str, Path] = {}

    def export(bundle: str) -> Path:
        if bundle not in done:
            path = tmp_path_factory.mktemp("exported") / "model.onnx"
            weights = used(bundle)
            assert main(["export", bundle, "--weights", str(weights), "--format", "onnx", "--output", str(path)]) == 0
            done[bundle] = path
        return done[bundle]

    return export


@needs_onnx
@each_network
def test_an_onnx_file_has_standard_operators_and_any_size(
    bundle: str, exported: Export, used: Callable[[str], Path]
) -> None:
    import onnx
    import onnxruntime

    model = onnx.load(exported(bundle))
    operators = [node.op_type for node in model.graph.node]
    network = network_of(bundle, used(bundle))
    blocks = sum(type(module).__name__ == "SS2D" for module in network.modules())
    assert operators.count("Scan") == blocks == (0 if bundle == "cmunext_busi" else 8)
    assert not {"Loop", "If"} & set(operators)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert not model.functions
    channels = 1 if bundle == "vmunet_synapse" else 3
    dims = [dim.dim_param or dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", channels, "height", "width"]
    session = onnxruntime.InferenceSession(exported(bundle))
    for shape in ((1, 1), (31, 65), (64, 32), (40, 40)):
        image = torch.rand(3, channels, *shape)
        with torch.no_grad():
            expected = network(image)
        (found,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


@needs_onnx
@each_network
def test_an_onnx_file_says_how_to_use_it(bundle: str, exported: Export) -> None:
    import onnx

    texts = {entry.key: json.loads(entry.value) for entry in onnx.load(exported(bundle)).metadata_props}
    assert texts.keys() == {"description.json", "inference.json", "metadata.json"}
    assert texts["description.json"]["input"]["size"] == [32, 32]
    assert texts["inference.json"]["image_size"] == 32
    assert texts["inference.json"]["bundle_root"] == "."
    assert not re.search(r'"%|\$bundles\.root', json.dumps(texts["inference.json"]))
    report = json.loads(exported(bundle).with_name("model.onnx.parity.json").read_text())
    assert report["passed"]
    assert len(report["inputs"]) == 5
    assert len({tuple(row["shape"][2:]) for row in report["inputs"]}) == 3
    assert report["relative"] < 1e-4


def alone(packages: tuple[str, ...], folder: Path) -> Path:
    """A folder with these packages and what they require, and nothing else that is installed here."""
    folder.mkdir()
    wanted, seen = [*packages], set()
    while wanted:
        name = wanted.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        required = map(Requirement, distribution.requires or ())
        wanted += [one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    return folder


@needs_onnx
@each_bundle
def test_the_readmes_example_gets_the_same_mask_without_this_project(
    bundle: str, exported: Export, used: Callable[[str], Path], data: Path, run: Run, tmp_path: Path
) -> None:
    text = (ROOT / "bundles" / bundle / "docs/README.md").read_text()
    program = text.partition("## Export")[2].partition("```python\n")[2].partition("```")[0]
    picture = bundle in PICTURES
    source = source_of(bundle, data)
    if not picture:
        model, chosen = exported(bundle), {"network_def": OWN[bundle], "ckpt_dir": str(used(bundle).parent)}
    else:
        model, weights = tmp_path / "model.onnx", tmp_path / "model.pt"
        chosen = {"network_def": brightness_network(bundle, weights), "ckpt_dir": str(tmp_path)}
        overrides = {"network_def": chosen["network_def"], "image_size": 32}
        bundles.export.export_bundle(bundle, weights, "onnx", model, overrides)
    packages = alone(("onnxruntime", "numpy", "pillow" if picture else "nibabel"), tmp_path / "packages")
    empty = tmp_path / "empty"
    empty.mkdir()
    start = f"import sys; sys.path.insert(0, {str(packages)!r})\n"
    answer = empty / ("mask.png" if picture else "labels.nii.gz")
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + program, str(model), str(source), answer.name],
        cwd=empty, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    absent = subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"{start}import importlib.util as u; print(u.find_spec('torch'))"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert absent.stdout.strip() == "None"
    where = {"input": str(source), "output_dir": str(tmp_path / "masks")}
    run("inferring", config(bundle, "inference"), image_size=32, **chosen, **where)
    (mask,) = (tmp_path / "masks").glob("*.png" if picture else "*.nii.gz")
    if picture:
        expected, found = read(mask), read(answer)
    else:
        expected, found = (np.asarray(nib.load(file).dataobj) for file in (mask, answer))
        assert np.allclose(nib.load(mask).affine, nib.load(answer).affine)
    assert found.shape == expected.shape
    assert len(np.unique(expected)) > 1
    assert (found != expected).mean() <= 1e-4


def test_torchscript_holds_the_resolved_configuration(trained: Trained, tmp_path: Path) -> None:
    bundle, path = "vmunet_isic", tmp_path / "new/best.ts"
    weights = trained(bundle)[0] / "model.pt"
    folder = str(ROOT / "bundles" / bundle)
    assert main(["export", folder, "--weights", str(weights), "--format", "torchscript", "--output", str(path)]) == 0
    names = ("inference.json", "description.json")
    program, metadata, files = load_net_with_metadata(path, more_extra_files=names)
    assert metadata["name"] == "VM-UNet ISIC dermoscopy"
    assert json.loads(files["inference.json"])["network_def"]["_target_"] == "networks.VMUNet"
    assert json.loads(files["description.json"])["output"]["classes"] == ["background", "lesion"]
    network, image = network_of(bundle, weights), 255 * torch.rand(2, 3, 45, 70)
    with torch.no_grad():
        torch.testing.assert_close(program(image), network(image), atol=1e-4, rtol=1e-4)


def test_an_exported_program_takes_any_size_and_says_how_to_use_it(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, weights = tmp_path / "best.pt2", trained("cmunext_busi")[0] / "model.pt"
    assert main(["export", "cmunext_busi", "--weights", str(weights), "--format", "pt2", "--output", str(path)]) == 0
    assert "on 5 inputs of 3 sizes" in capsys.readouterr().out
    files = dict.fromkeys(("inference.json", "description.json", "metadata.json"), "")
    program = torch.export.load(path, extra_files=files).module()
    assert json.loads(files["description.json"])["input"]["smallest"] == 1
    assert json.loads(files["inference.json"])["image_size"] == 32
    assert json.loads(files["metadata.json"])["name"] == "CMUNeXt BUSI breast ultrasound"
    network = network_of("cmunext_busi", weights)
    for shape in ((1, 1, 1), (3, 16, 16), (1, 31, 65), (2, 64, 32)):
        image = torch.rand(shape[0], 3, *shape[1:])
        with torch.no_grad():
            torch.testing.assert_close(program(image), network(image), atol=1e-4, rtol=1e-4)
    assert json.loads(path.with_name("best.pt2.parity.json").read_text())["passed"]


def test_the_smallest_image_of_an_exported_program_is_found_out_and_said() -> None:
    class Asks(nn.Module):
        def __init__(self, side: int) -> None:
            super().__init__()
            self.side = side

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert min(x.shape[2:]) >= self.side, "Guard failed"
            return x

    example = torch.zeros(2, 3, 96, 64)
    assert [bundles.formats._smallest(Asks(side), example, 32) for side in (1, 33)] == [1, 33]
    with pytest.raises(InputError, match="cannot export this network for images of any size; export to ONNX"):
        bundles.formats._smallest(Asks(40), example, 32)
    about = {"input": {"channels": 1, "size": [32, 64], "value_range": [0, 1], "smallest": 33}}
    assert [one.shape[2:] for one in parity_inputs(about)][3] == (33, 57)
    about["input"]["size"] = [48, 80]
    assert [one.shape[2:] for one in parity_inputs(about)][3] == (33, 71)


def test_tensorrt_needs_its_gpu_and_program(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, path = trained("cmunext_busi")[0] / "model.pt", tmp_path / "best.engine"
    typed = ["export", "cmunext_busi", "--weights", str(weights), "--format", "tensorrt", "--output", str(path)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(typed) == 1
    assert capsys.readouterr().err.startswith("--format tensorrt needs an NVIDIA GPU, which this machine does not have")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(typed) == 1
    assert "needs TensorRT's trtexec" in capsys.readouterr().err

    # a stand-in for trtexec, and for the ONNX export before it
    tool = tmp_path / "trtexec"
    tool.write_text(
        f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1].split('=')[1], 'w').write(' '.join(sys.argv))\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(shutil, "which", lambda name: str(tool))

    def to_onnx_only(bundle: str, weights: Path, form: str, output: Path, overrides: dict) -> Path:
        output.with_name(output.name + ".parity.json").write_text(json.dumps({"inputs": [{"shape": [1, 3, 64, 48]}]}))
        return output

    monkeypatch.setattr(bundles.export, "export_bundle", to_onnx_only)
    bundles.export.export_tensorrt("cmunext_busi", weights, path)
    assert f"--onnx={tmp_path}/best.onnx --minShapes=image:1x3x32x32 --optShapes=image:1x3x64x48" in path.read_text()
    path.unlink()
    tool.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no kernel')\n")
    with pytest.raises(InputError, match=r"not written: trtexec ended with 1 \(no kernel\)"):
        bundles.export.export_tensorrt("cmunext_busi", weights, path)
    assert not path.exists()


def test_what_does_not_answer_alike_is_not_written(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, weights = tmp_path / "a.ts", trained("cmunext_busi")[0] / "model.pt"
    whole = bundles.formats.CONTENT_OF["torchscript"]

    def off_by(share: float) -> None:
        def writer(*arguments: Any) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
            content, program = whole(*arguments)
            return content, lambda images: program(images) * (1 + share)

        monkeypatch.setitem(bundles.formats.CONTENT_OF, "torchscript", writer)

    typed = ["export", "cmunext_busi", "--weights", str(weights), "--format", "torchscript", "--output", str(path)]
    off_by(2e-3)
    assert main(typed) == 1
    assert capsys.readouterr().err == f"{path}: not written: the exported network does not answer as this one does\n"
    assert not list(tmp_path.iterdir())
    off_by(5e-4)
    assert main(typed) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.ts", "a.ts.parity.json"]


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["nothing"], "nothing: no such bundle; name a bundle's folder, or one of cmunext_busi, "),
        (["cmunext_busi", "--image_sise", "64"], "--image_sise: no such setting; did you mean --image_size?"),
        (["cmunext_busi", "--image_size", "0"], "--image_size 0: expected a whole number of pixels above 0"),
        (["cmunext_busi", "--image_size"], "--image_size: has no value"),
        (["cmunext_busi", "more"], "more: not expected here; settings are written --name value"),
        (
            ["cmunext_busi", "--image_size", "64"],
            r"was trained with image_size 32, and it is 64 now: give what the run",
        ),
        (["cmunext_busi", "--output", "a.pt"], "a.pt: a TorchScript program is called NAME.ts; give it such a name"),
        (["cmunext_busi", "--weights", "no.pt"], "no weight file no.pt: train first, or name an existing checkpoint"),
        (["vmunet_isic"], "was trained with bundle CMUNeXt BUSI breast ultrasound, and it is VM-UNet ISIC dermoscopy"),
    ],
)
def test_what_cannot_be_exported_is_said_in_one_line(
    typed: list[str], line: str, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    weights = str(trained("cmunext_busi")[0] / "model.pt")
    own = [] if "--output" in typed else ["--output", "a.ts"]
    assert main(["export", "--weights", weights, "--format", "torchscript", *own, *typed]) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_runs_network_is_taken_wherever_it_was_given(trained: Trained) -> None:
    folder, _ = trained("cmunext_busi")
    run = json.loads((folder / "run.json").read_text())
    parser = read_bundle(find_configuration("cmunext_busi"))
    own = parser["network_def"]
    # by --network_def#_target_, or in an overlay
    run["configuration"]["network_def"] = {**own, "_target_": "networks.cmunext_s", "dims": [4, 8, 8, 8, 8]}
    origin = type("Origin", (), {"record": run})()
    assert bundles.export.settings_of_run(origin, parser)["network_def"] == run["configuration"]["network_def"]
    run["configuration"]["network_def"] = own
    assert "network_def" not in bundles.export.settings_of_run(origin, parser)


def test_a_runs_record_executes_nothing(trained: Trained, options: Options, tmp_path: Path) -> None:
    """Only settings that are plain data, and this project's networks, are taken from run.json."""
    folder, _ = trained("cmunext_busi")
    run = json.loads((folder / "run.json").read_text())
    parser = read_bundle(find_configuration("cmunext_busi"))
    origin = type("Origin", (), {"record": run})()
    assert bundles.export.settings_of_run(origin, parser)["network_def"] == OWN["cmunext_busi"]
    for definition in (
        {"_target_": "os.system", "command": "true"},
        {"_target_": "networks.weights.load_weights"},
        {**OWN["cmunext_busi"], "dims": "$__import__('os').system('true')"},
        {**OWN["cmunext_busi"], "dims": {"_target_": "os.getcwd"}},
        {**OWN["cmunext_busi"], "_mode_": "debug"},
        "$print()",
    ):
        run["overrides"] = {"image_size": "$print()"}
        run["configuration"]["network_def"] = definition
        run["settings"] = {"classes": ["@device"]}
        assert bundles.export.settings_of_run(origin, parser) == {}


@pytest.mark.parametrize(
    ("bundle", "settings", "expected"),
    [
        (
            "cmunext_busi",
            {"normalisation": "plain", "in_channels": 1},
            (
                "input",
                "steps",
                [
                    {"step": "read", "kind": "picture", "mode": "L", "values": [0, 255]},
                    {"step": "resize", "size": [256, 256], "method": "bilinear"},
                    {"step": "round"},
                    {"step": "normalise", "mean": [255 * 0.485], "std": [255 * 0.229]},
                ],
            ),
        ),
        ("cmunext_busi", {"in_channels": 1}, ("input", "channels", 1)),
        ("cmunext_busi", {"image_size": [192, 256]}, ("input", "size", [192, 256])),
        ("vmunet_isic", {"in_channels": 4}, ("input", "channels", 4)),
        ("vmunet_synapse", {"image_size": 64}, ("input", "size", [64, 64])),
        (
            "vmunet_isic",
            {"classes": ["cup", "disc"], "label_map": {0: 0, 128: 1, 255: 2}},
            ("output", "stored", {"background": 0, "cup": 128, "disc": 255}),
        ),
        ("vmunet_isic", {"classes": ["cup", "disc"]}, ("output", "coding", "argmax")),
        (
            "vmunet_isic",
            {
                "preprocessing#transforms#2": {
                    "_target_": "ScaleIntensityRangePercentilesd",
                    "keys": "image",
                    "lower": 1,
                }
            },
            (
                "input",
                "steps",
                [
                    {"step": "read", "kind": "picture", "mode": "RGB", "values": [0, 255]},
                    {
                        "step": "other",
                        "transform": "ScaleIntensityRangePercentilesd",
                        "arguments": {"lower": 1},
                    },
                    {"step": "resize", "size": [256, 256], "method": "bilinear"},
                ],
            ),
        ),
    ],
)
def test_the_description_follows_the_settings(bundle: str, settings: dict, expected: tuple[str, str, Any]) -> None:
    side, name, value = expected
    assert describe(read_bundle(find_configuration(bundle), settings))[side][name] == value
