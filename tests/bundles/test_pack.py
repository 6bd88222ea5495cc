"""`python -m bundles pack` and `card`: one file that MONAI's tools run where nothing of this project is installed."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import monai.bundle
import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from ignite.engine import Engine
from monai.bundle import ConfigParser, ConfigWorkflow
from monai.data import MetaTensor
from monai.handlers import CheckpointLoader
from monai.transforms import Compose, LoadImaged, SaveImaged
from torch import nn

import bundles.formats
import bundles.pack
from bundles.__main__ import main
from bundles.card import Report, read_report
from bundles.configurations import find_configuration, read_bundle
from bundles.pack import configurations, packed_code, packed_metadata, relative_imports
from networks.training import Autocast, Origin
from tests.bundles.conftest import BUNDLES, DATA, OWN, PICTURES, ROOT, Options, Run, config, saved
from tests.bundles.test_export import Trained, alone, source_of

missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")
each_bundle = pytest.mark.parametrize("bundle", BUNDLES)
PIECES = ("networks", "transforms", "evaluation", "bundles", "prepare", "experiments", "benchmarks", "tests")
HEADINGS = [
    "## Authors", "## Tags", "## Model Description", "## Data", "### Preprocessing", "## Performance",
    "## Additional Usage Steps", "## System Configuration", "## Limitations", "## Citation Info", "## References",
]  # fmt: skip
METRIC = {
    "cmunext_busi": ("per_image_iou", "per image", "iou"),
    "vmunet_isic": ("per_image_iou", "per image", "iou"),
    "vmunet_synapse": ("strict_dice", "strict", "dice"),
}
Packed = Callable[[str], Path]


def no_onnx(network: nn.Module, example: Any, texts: Any, name: str) -> tuple[bytes, Any]:
    """In the place of the exporter, which takes most of a minute for VM-UNet and has tests of its own."""
    return b"no ONNX", lambda images: network(torch.from_numpy(images)).detach().numpy()


@pytest.fixture(scope="module")
def evaluated(trained: Trained, options: Options, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The folder of each bundle's run, with the results of its evaluation in `eval`."""
    done: dict[str, Path] = {}

    def evaluate(bundle: str) -> Path:
        if bundle not in done:
            folder = tmp_path_factory.mktemp(f"run {bundle}")
            for name in ("model.pt", "run.json"):
                shutil.copy(trained(bundle)[0] / name, folder)
            chosen = {**options(bundle, folder), "logging_file": False}
            monai.bundle.run("evaluating", config_file=config(bundle, "train", "evaluate"), **chosen)
            done[bundle] = folder
        return done[bundle]

    return evaluate


@pytest.fixture(scope="module")
def archive(evaluated: Packed, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The zip of each bundle; ONNX is written for CMUNeXt alone."""
    done: dict[str, Path] = {}

    def pack(bundle: str) -> Path:
        if bundle not in done:
            out = tmp_path_factory.mktemp("dist")
            with pytest.MonkeyPatch.context() as patch:
                if bundle != "cmunext_busi":
                    patch.setitem(bundles.formats.CONTENT_OF, "onnx", no_onnx)
                weights = str(evaluated(bundle) / "model.pt")
                assert main(["pack", bundle, "--weights", weights, "--output", str(out)]) == 0
            (done[bundle],) = out.iterdir()
        return done[bundle]

    return pack


@pytest.fixture(scope="module")
def packed(archive: Packed, tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The folder of each bundle, unpacked elsewhere."""
    done: dict[str, Path] = {}

    def unpack(bundle: str) -> Path:
        if bundle not in done:
            place = tmp_path_factory.mktemp("else where")
            shutil.unpack_archive(archive(bundle), place)
            done[bundle] = place / bundle
        return done[bundle]

    return unpack


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """MONAI's runs set up the log, for an output that ends with the test."""
    before = [*logging.getLogger().handlers]
    yield
    logging.getLogger().handlers[:] = before


@pytest.fixture
def clean_path() -> Iterator[None]:
    """Nothing of a pack stays behind on the path or as `scripts`."""
    before = [*sys.path]
    yield
    sys.path[:] = before
    forget_scripts()


def forget_scripts() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "scripts"]:
        del sys.modules[name]


def parser_of(folder: Path, *names: str) -> ConfigParser:
    parser = ConfigParser()
    parser.read_meta(str(folder / "configs/metadata.json"))
    parser.read_config([str(folder / f"configs/{name}.json") for name in names or ("inference",)])
    parser["bundle_root"] = str(folder)
    return parser


# What is in it


@each_bundle
def test_a_pack_holds_what_it_says(bundle: str, archive: Packed, packed: Packed, evaluated: Packed) -> None:
    assert archive(bundle).name == f"{bundle}_v0.1.0.zip"
    with zipfile.ZipFile(archive(bundle)) as file:
        entries = file.infolist()
    names = [entry.filename.removeprefix(f"{bundle}/") for entry in entries]
    assert names == sorted(names)
    assert {entry.date_time for entry in entries} == {(1980, 1, 1, 0, 0, 0)}
    assert {stat.filemode(entry.external_attr >> 16) for entry in entries} == {"-rw-r--r--"}
    configs = [f"configs/{name}.json" for name in ("inference", "evaluate", "train", "multi_gpu_train", "metadata")]
    models = [f"models/model.{kind}" for kind in ("pt", "ts", "onnx", "safetensors")]
    assert {*configs, *models, "LICENSE", "README.md", "docs/README.md", "scripts/__init__.py"} <= set(names)
    folder = packed(bundle)
    sums = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert sums.keys() == set(names) - {"SHA256SUMS"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in sums.items())
    # nothing tells of the machine, or of people's files
    data_of_run = json.loads((evaluated(bundle) / "run.json").read_text())["data"]
    images = [Path(item["image"][0]).name for item in data_of_run["train"]] if bundle in PICTURES else []
    for name in names:
        data = (folder / name).read_bytes()
        assert str(ROOT).encode() not in data, name
        assert str(evaluated(bundle)).encode() not in data, name
        assert name.startswith("scripts/") or not any(image.encode() in data for image in images), name
    program = zipfile.ZipFile(folder / "models/model.ts")
    assert not any(str(ROOT).encode() in program.read(entry) for entry in program.namelist())


@each_bundle
def test_the_network_is_the_same_in_every_form(bundle: str, packed: Packed, evaluated: Packed) -> None:
    models = packed(bundle) / "models"
    expected = saved(evaluated(bundle) / "model.pt")
    for state in (saved(models / "model.pt"), safetensors.torch.load_file(models / "model.safetensors")):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert Origin(models / "model.pt").record["id"] == Origin(evaluated(bundle) / "model.pt").record["id"]


def test_equal_input_gives_equal_bytes(
    archive: Packed, evaluated: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the exporter to ONNX writes is compared by itself; here it is taken from the first pack."""
    bundle = "cmunext_busi"
    with zipfile.ZipFile(archive(bundle)) as file:
        program = file.read(f"{bundle}/models/model.onnx")
    monkeypatch.setitem(bundles.formats.CONTENT_OF, "onnx", lambda *given: (program, no_onnx(*given)[1]))
    copied = tmp_path / "other/best.pt"
    shutil.copytree(evaluated(bundle), copied.parent)
    (copied.parent / "model.pt").rename(copied)
    typed = ["pack", bundle, "--weights", str(copied), "--output", str(tmp_path / "new/second.zip")]
    assert main(typed) == 0
    assert (tmp_path / "new/second.zip").read_bytes() == archive(bundle).read_bytes()


@pytest.mark.soak
@each_bundle
def test_two_processes_write_equal_bytes(bundle: str, evaluated: Packed, tmp_path: Path) -> None:
    """With the programs in ONNX, whose export takes most of a minute for VM-UNet."""
    for name in ("first", "second"):
        typed = ["pack", bundle, "--weights", str(evaluated(bundle) / "model.pt"), "--output", str(tmp_path / name)]
        subprocess.run([sys.executable, "-m", "bundles", *typed], cwd=ROOT, check=True)
    first, second = (next((tmp_path / name).iterdir()).read_bytes() for name in ("first", "second"))
    assert first == second


@each_bundle
def test_configurations_are_resolved(bundle: str, packed: Packed) -> None:
    for file in (packed(bundle) / "configs").glob("*.json"):
        text = file.read_text()
        assert not re.search(r'"%', text), file.name
        assert not re.search(rf"(?<!scripts\.)\b({'|'.join(PIECES[:4])})\.[a-zA-Z]", text), file.name
    inference = json.loads((packed(bundle) / "configs/inference.json").read_text())
    assert inference["image_size"] == 32
    assert inference["network_def"]["_target_"] == f"scripts.{OWN[bundle]['_target_']}"
    train = json.loads((packed(bundle) / "configs/train.json").read_text())
    # as the run was set, but for its places
    assert (train["batch_size"], train["max_epochs"], train["image_size"]) == (4, 2, 32)
    assert train["dataset_dir"] == read_bundle(find_configuration(bundle, "train"))["dataset_dir"]
    metadata = json.loads((packed(bundle) / "configs/metadata.json").read_text())
    (image,), (pred,) = (metadata["network_data_format"][side].values() for side in ("inputs", "outputs"))
    assert image["spatial_shape"] == pred["spatial_shape"] == [32, 32]


def test_settings_of_the_run_and_given_ones_are_in_the_configurations(tmp_path: Path) -> None:
    classes = {"classes": ["cup", "disc"], "label_map": {0: 0, 128: 1, 255: 2}, "in_channels": 1}
    origin = Origin(tmp_path / "none.pt")
    origin.record = {"settings": {"fold": 3, **json.loads(json.dumps(classes))}, "overrides": {"in_channels": 1}}
    configs = configurations(ROOT / "bundles/cmunext_busi", origin, {"image_size": 64, "tta": "flips"})
    assert configs["train"]["fold"] == 3
    assert (configs["train"]["image_size"], configs["inference"]["tta"]) == (64, "flips")
    for name in ("train", "inference"):
        # JSON has no numbers as keys
        assert configs[name]["label_map"] == "${0: 0, 128: 1, 255: 2}"
        parser = ConfigParser(json.loads(json.dumps(configs[name])))
        assert parser.get_parsed_content("label_map") == classes["label_map"]
    metadata = packed_metadata(read_bundle(find_configuration("cmunext_busi"), classes), Report(None, ""))
    (image,), (pred,) = (metadata["network_data_format"][side].values() for side in ("inputs", "outputs"))
    assert (image["num_channels"], len(image["channel_def"]), pred["num_channels"]) == (1, 1, 3)
    assert pred["channel_def"] == {"0": "background", "1": "cup", "2": "disc"}
    assert metadata["label_classes"] == "0 background, 1 cup, 2 disc"


# The code


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("networks/vmunet.py", "from networks.selective_scan import a", "from ..networks.selective_scan import a"),
        ("networks/training/log.py", "if 1:\n  from networks import (\n a)", "if 1:\n  from ...networks import (\n a)"),
        ("bundles/export.py", "é = 1; import networks", "é = 1; from .. import networks"),
        ("bundles/run.py", "import os, torch\nfrom . import a", "import os, torch\nfrom . import a"),
        ("bundles/run.py", '"""\n>>> from networks import a\n"""', '"""\n>>> from networks import a\n"""'),
    ],
)  # fmt: skip
def test_imports_become_relative(name: str, before: str, after: str) -> None:
    assert relative_imports(before, name) == after


@pytest.mark.parametrize("source", ["import networks.vmunet", "import networks as nets, os"])
def test_an_import_without_a_relative_form_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=r"a/b\.py:1: has no relative form"):
        relative_imports(source, "a/b.py")


def test_code_asks_for_nothing_that_a_pack_does_not_bring() -> None:
    files = packed_code()
    (package,) = {name.split("/")[1] for name in files if name.count("/") > 1}
    required = json.loads((ROOT / "bundles/cmunext_busi/configs/metadata.json").read_text())
    brought = {"torch", "monai", "numpy", *required["required_packages_version"]}
    modules = {"pytorch-ignite": "ignite", "pillow": "PIL", "simpleitk": "SimpleITK", "pyyaml": "yaml"}
    brought = {modules.get(name, name) for name in brought} | set(sys.stdlib_module_names)
    # asked for in functions, where the user wants what they do
    optional = {"onnx", "onnxruntime", "onnx_ir", "highdicom", "pydicom", "triton", "setuptools"}
    for name, data in files.items():
        for node in ast.walk(ast.parse(data)) if name.endswith(".py") else ():
            if isinstance(node, ast.ImportFrom) and node.level:
                parent = Path(name).parents[node.level - 1]
                found = parent / (node.module or "").replace(".", "/")
                places = {f"{found}.py", f"{found}/__init__.py"}
                assert places & set(files) or not node.module, (name, node.module)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                asked = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                for module in asked:
                    assert str(module).partition(".")[0] in brought | optional, (name, module)
    for bundle in BUNDLES[1:]:
        other = json.loads((ROOT / f"bundles/{bundle}/configs/metadata.json").read_text())
        assert other["required_packages_version"] == required["required_packages_version"]
    kernel = f"scripts/{package}/networks/selective_scan"
    assert {f"{kernel}/scan_cpu.c", f"{kernel}/scan_cpu.h", f"scripts/{package}/setup.py"} <= set(files)


# Where nothing of this project is installed


@pytest.fixture(scope="module")
def packages(packed: Packed, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a pack requires, and nothing else."""
    metadata = json.loads((packed("cmunext_busi") / "configs/metadata.json").read_text())
    required = ("torch", "monai", "numpy", *metadata["required_packages_version"])
    return alone(required, tmp_path_factory.mktemp("site") / "packages")


ELSEWHERE = """
import importlib.util, json, runpy, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
assert not any(importlib.util.find_spec(name) for name in json.loads(sys.argv[1])), "it is installed"
from monai.bundle import run
configs, data, out, source = sys.argv[2:]
files = [configs + "/train.json", configs + "/evaluate.json"]
chosen = {"dataset_dir": data, "num_workers": 1, "output_dir": out + "/eval"}
run("evaluating", config_file=files, **chosen)
chosen |= {"ckpt_dir": out + "/new", "log_dir": out + "/new/runs", "max_epochs": 1}
run("training", config_file=files[0], **chosen)
sys.argv[1:] = ["run", "inferring", "--config_file", configs + "/inference.json", "--input", source]
sys.argv += ["--output_dir", out + "/masks"]
runpy.run_module("monai.bundle", run_name="__main__")
"""


@each_bundle
def test_it_trains_evaluates_and_predicts_elsewhere(
    bundle: str, packed: Packed, packages: Path, evaluated: Packed, data: Path, run: Run, tmp_path: Path
) -> None:
    folder, nowhere = packed(bundle), tmp_path / "nowhere"
    nowhere.mkdir()
    source = source_of(bundle, data)
    start = f"import sys; sys.path.insert(0, {str(packages)!r})\n"
    typed = [json.dumps(PIECES), str(folder / "configs"), str(data / DATA[bundle]), str(tmp_path), str(source)]
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", start + ELSEWHERE, *typed],
        cwd=nowhere, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    # the kernel is not built in a pack, and that is said where it is missed
    said = "the native kernel of the selective scan is not built; build it: `python setup.py build_ext --inplace` in"
    assert (said in done.stdout + done.stderr) == (bundle != "cmunext_busi")
    assert not list(nowhere.iterdir())
    assert all(file.read_bytes() == content for file, content in before.items())
    assert (tmp_path / "new/model.pt").is_file()
    ours, theirs = (json.loads((place / "eval/summary.json").read_text()) for place in (evaluated(bundle), tmp_path))
    assert theirs["selection"] == ours["selection"]
    assert theirs["weights"]["run"] == ours["weights"]["run"]
    _, protocol, name = METRIC[bundle]
    assert theirs["protocols"][protocol]["mean"][name]["mean"] == pytest.approx(
        ours["protocols"][protocol]["mean"][name]["mean"], abs=1e-3
    )
    # what this project's own configuration writes
    chosen = {"network_def": OWN[bundle], "image_size": 32, "ckpt_dir": str(evaluated(bundle))}
    run("inferring", config(bundle, "inference"), **chosen, input=str(source), output_dir=str(tmp_path / "ours"))
    pattern = "*.png" if bundle in PICTURES else "*.nii.gz"
    (first,), (second,) = ((tmp_path / place).glob(pattern) for place in ("ours", "masks"))
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()
    first, second = ((tmp_path / place / "volumes.csv").read_text() for place in ("ours", "masks"))
    assert first == second


# MONAI's tools, by what they do


class LabelApp:
    """MONAI Label's inference by a bundle: `scripts` is forgotten before each part of the configuration is read."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.parser = folder, ConfigParser()
        self.parser.read_config(str(folder / "configs/inference.json"))
        self.parser.config["bundle_root"] = str(folder)
        self.network = self.part("network_def")
        metadata = json.loads((folder / "configs/metadata.json").read_text())
        formats = metadata["network_data_format"]
        (self.image, _), (self.pred, output) = (next(iter(formats[side].items())) for side in ("inputs", "outputs"))
        self.labels = {name: int(number) for number, name in output["channel_def"].items() if name != "background"}
        self.network.load_state_dict(saved(folder / "models/model.pt"), strict=True)
        self.network.eval()

    def part(self, name: str) -> Any:
        sys.path.insert(0, str(self.folder))
        forget_scripts()
        content = self.parser.get_parsed_content(name, instantiate=True)
        sys.path.remove(str(self.folder))
        return content

    @torch.no_grad()
    def __call__(self, file: Path) -> MetaTensor:
        before, inferer, after = (self.part(name) for name in ("preprocessing", "inferer", "postprocessing"))
        assert sum(isinstance(step, LoadImaged) for step in before.transforms) == 1
        assert not any(isinstance(step, Compose) for step in (*before.transforms, *after.transforms))
        item = before({self.image: str(file)})
        item[self.pred] = inferer(item[self.image][None], self.network)[0]
        rest = [step for step in after.transforms if not isinstance(step, SaveImaged)]
        assert len(rest) == len(after.transforms) - 1
        return Compose(rest)(item)[self.pred]


def predicted(bundle: str, weights: Path, source: Path) -> np.ndarray:
    """The labels as this project gives them."""
    return bundles.load(bundle, weights, {"image_size": 32, "network_def": OWN[bundle]})(source)


@pytest.mark.usefixtures("clean_path")
def test_monai_label_takes_packs_one_after_the_other(
    packed: Packed, evaluated: Packed, data: Path, tmp_path: Path
) -> None:
    """Two of the packs are of other versions: their code differs."""
    folders = {bundle: packed(bundle) for bundle in BUNDLES}
    for bundle in ("cmunext_busi", "vmunet_synapse"):
        folders[bundle] = tmp_path / bundle
        shutil.copytree(packed(bundle), folders[bundle])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                bundles.pack, "relative_imports", lambda *given, to=bundle: f"{relative_imports(*given)}# {to}\n"
            )
            shutil.rmtree(folders[bundle] / "scripts")
            for name, content in packed_code().items():
                (folders[bundle] / name).parent.mkdir(parents=True, exist_ok=True)
                (folders[bundle] / name).write_bytes(content)
    apps = {bundle: LabelApp(folder) for bundle, folder in folders.items()}
    assert len({type(app.network).__module__.partition(".")[0] for app in apps.values()}) == 3
    assert apps["vmunet_isic"].labels == {"lesion": 1}
    for _ in range(2):
        for bundle, app in apps.items():
            source = source_of(bundle, data)
            found = app(source)
            assert found.dtype == torch.uint8
            expected = predicted(bundle, evaluated(bundle) / "model.pt", source)
            # pictures lie in the order of columns and rows in neither; volumes as their file stores them
            np.testing.assert_array_equal(np.squeeze(found[0].numpy()), np.squeeze(expected))
            assert set(np.unique(found)) <= {0, *app.labels.values()}


@pytest.mark.usefixtures("clean_path")
@each_bundle
def test_monai_deploy_takes_the_folder_and_the_program(bundle: str, packed: Packed) -> None:
    folder = packed(bundle)
    state = saved(folder / "models/model.pt")
    # of a folder the key network comes before network_def
    network = parser_of(folder).get_parsed_content("network")
    network.load_state_dict(state, strict=True)
    program = folder / "models/model.ts"
    with zipfile.ZipFile(program) as file:
        metadata, configuration = (
            json.loads(file.read(f"model/extra/{name}.json")) for name in ("metadata", "inference")
        )
    sys.path.insert(0, str(folder))
    parser = ConfigParser()
    parser.read_meta(f=metadata)
    parser.read_config(configuration)
    parser.parse()
    assert isinstance(parser.get_parsed_content("device"), torch.device)
    inferer = parser.get_parsed_content("inferer")
    for name, word in (("preprocessing", "LoadImage"), ("postprocessing", "SaveImage")):
        kinds = [type(step).__name__ for step in parser.get_parsed_content(name).transforms]
        assert sum(word in kind for kind in kinds) == 1
        assert "Compose" not in kinds
    (image,) = metadata["network_data_format"]["inputs"].values()
    shape = (1, image["num_channels"], *((2, 24, 40) if bundle == "vmunet_synapse" else (24, 40)))
    loaded = torch.jit.load(program, map_location="cpu").eval()
    images = torch.rand(shape)
    with torch.no_grad():
        answers = [inferer(inputs=images, network=one.eval()) for one in (loaded, network)]
    torch.testing.assert_close(*answers, atol=1e-4, rtol=1e-4)


@pytest.mark.usefixtures("clean_path")
@each_bundle
def test_monai_loads_the_network(bundle: str, packed: Packed, run: Run) -> None:
    network = monai.bundle.load(bundle, bundle_dir=str(packed(bundle).parent), device="cpu")
    state = saved(packed(bundle) / "models/model.pt")
    assert type(network).__name__ == OWN[bundle]["_target_"].rpartition(".")[2]
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())


@pytest.mark.usefixtures("clean_path")
def test_monai_label_trains_from_the_weights(packed: Packed) -> None:
    """Its handler loads `model.pt` into `network`, which is made fast there."""
    folder = packed("cmunext_busi")
    network = parser_of(folder, "train").get_parsed_content("network")
    # by the name of another copy of this code
    assert type(network).__name__ == Autocast.__name__
    path, engine = str(folder / "models/model.pt"), Engine(lambda engine, batch: None)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    CheckpointLoader(load_path=path, load_dict={"model": network}, strict=False)(engine)
    after = network.state_dict()
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(torch.equal(after[f"network.{name}"], tensor) for name, tensor in saved(Path(path)).items())


@pytest.mark.usefixtures("clean_path")
@each_bundle
def test_the_model_zoo_accepts_it(bundle: str, packed: Packed, data: Path, run: Run, tmp_path: Path) -> None:
    """Its checks that are not above: files, names of keys, schema, properties, the network's output, TorchScript."""
    folder = packed(bundle)
    configs = folder / "configs"
    metadata = json.loads((configs / "metadata.json").read_text())
    jsonschema.validate(metadata, json.loads((Path(__file__).parent / "meta_schema_20240725.json").read_text()))
    assert metadata["version"] in metadata["changelog"]
    assert all(re.fullmatch(r"\d+(\.\d+)+", metadata[name]) for name in ("version", "monai_version", "pytorch_version"))
    assert all(file.stat().st_size <= 25e6 for file in folder.rglob("*"))
    sets = {("inference",): "infer", ("train",): "train", ("train", "evaluate"): "train"}
    for names, kind in sets.items():
        files = [str(configs / f"{name}.json") for name in names]
        chosen = {"dataset_dir": str(data / DATA[bundle]), "ckpt_dir": str(folder / "models")}
        workflow = ConfigWorkflow(config_file=files, workflow_type=kind, logging_file=False, **chosen)
        workflow.initialize()
        assert workflow.check_properties() == []
    parser = parser_of(folder, "train", "multi_gpu_train")
    parser.parse()
    known = parser.ref_resolver.items
    texts = [item.get_config() for item in known.values() if isinstance(item.get_config(), str)]
    assert {name for text in texts for name in parser.ref_resolver.match_refs_pattern(text)} <= set(known)
    where = {"meta_file": str(configs / "metadata.json"), "config_file": str(configs / "inference.json")}
    where["bundle_root"] = str(folder)
    monai.bundle.verify_net_in_out(net_id="network_def", device="cpu", n=1, p=1, **where)
    monai.bundle.ckpt_export(
        net_id="network_def", filepath=str(tmp_path / "a.ts"), ckpt_file=str(folder / "models/model.pt"), **where
    )
    assert torch.jit.load(tmp_path / "a.ts") is not None


# The card


@each_bundle
def test_the_card_has_the_zoos_headings_and_the_reports_numbers(
    bundle: str, packed: Packed, evaluated: Packed, capsys: pytest.CaptureFixture[str]
) -> None:
    text, shown = ((packed(bundle) / name).read_text() for name in ("docs/README.md", "README.md"))
    metadata = json.loads((packed(bundle) / "configs/metadata.json").read_text())
    assert re.findall(r"^##.*", text, re.MULTILINE) == HEADINGS
    assert text.startswith(f"# {metadata['name']}\n")
    _, head, rest = shown.split("---\n", 2)
    assert rest == text
    matter = yaml.safe_load(head)
    assert (matter["library_name"], matter["license"], matter["tags"][:2]) == (
        "monai",
        "apache-2.0",
        ["monai", "medical"],
    )
    summary = json.loads((evaluated(bundle) / "eval/summary.json").read_text())
    key, protocol, name = METRIC[bundle]
    mean = summary["protocols"][protocol]["mean"][name]
    numbers = metadata["eval_metrics"]
    assert numbers["cases"] == summary["cases"]
    assert numbers[key] == mean["mean"]
    assert (numbers.get(f"{key}_low"), numbers.get(f"{key}_high")) == (mean["low"], mean["high"])
    assert all(isinstance(value, float | int) for value in numbers.values())
    performance = text.partition("## Performance")[2].partition("\n## ")[0]
    assert f"{100 * mean['mean']:.2f}" in performance
    for stated in (f"**{protocol}**", summary["selection"], f"{summary['cases']} case", "95 % interval"):
        assert stated in performance
    # both were phantoms
    assert performance.count("synthetic phantom, not patient data") == 1
    assert "What they were trained on: synthetic phantom" in text
    assert ("python setup.py build_ext" in text) == (bundle != "cmunext_busi")
    capsys.readouterr()
    assert main(["card", bundle, "--weights", str(evaluated(bundle) / "model.pt")]) == 0
    assert capsys.readouterr().out == shown


def test_numbers_of_other_weights_are_refused(
    evaluated: Packed, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, report = tmp_path / "model.pt", evaluated("cmunext_busi") / "eval"
    shutil.copytree(evaluated("cmunext_busi"), tmp_path, dirs_exist_ok=True)
    capsys.readouterr()
    state = saved(weights)
    next(iter(state.values())).mul_(1.5)
    torch.save(state, weights)
    remedy = "run `evaluating` with these weights, or give --report none\n"
    for given, place in ((["--report", str(report)], report), ([], tmp_path / "eval")):
        assert main(["card", "cmunext_busi", "--weights", str(weights), *given]) == 1
        line = f"{place}/summary.json: is of other weights of the same run than {weights}; {remedy}"
        assert capsys.readouterr().err == line
    summary = json.loads((report / "summary.json").read_text())
    (tmp_path / "eval/summary.json").write_text(json.dumps({**summary, "weights": {}}))
    assert main(["card", "cmunext_busi", "--weights", str(weights)]) == 1
    assert capsys.readouterr().err == f"{tmp_path}/eval/summary.json: does not say which weights it is of; {remedy}"
    assert main(["card", "cmunext_busi", "--weights", str(weights), "--report", str(tmp_path / "no")]) == 1
    assert "no/summary.json: does not exist" in capsys.readouterr().err
    out = tmp_path / "card.md"
    assert main(["card", "cmunext_busi", "--weights", str(weights), "--report", "none", "--output", str(out)]) == 0
    assert "These weights have not been evaluated" in out.read_text()
    assert "Nothing is known of how well these weights do" in out.read_text()
    shutil.rmtree(tmp_path / "eval")
    found = read_report(None, weights, tmp_path)
    assert found.eval_metrics() == {}
    assert found.source.startswith("none: no summary.json in")


# What does not fit


def test_large_files_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = {"models/model.pt": b"12345", "models/model.ts": b"123456789"}
    listed = yaml.safe_load(bundles.pack._large_files(content, "https://example.org/x/"))["large_files"]
    assert [entry["url"] for entry in listed] == [f"https://example.org/x/models/model.{kind}" for kind in ("pt", "ts")]
    assert listed[0]["hash_val"] == hashlib.sha256(b"12345").hexdigest()
    assert {entry["hash_type"] for entry in listed} == {"sha256"}


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        (["nothing"], "nothing: no such bundle; name a bundle's folder, or one of cmunext_busi, "),
        (["cmunext_busi", "--image_sise", "64"], "--image_sise: no such setting; did you mean --image_size?"),
        (["cmunext_busi", "--weights", "no.pt"], "no weight file no.pt: train first, or name an existing checkpoint"),
        (["vmunet_isic"], "was trained with bundle CMUNeXt BUSI breast ultrasound, and it is VM-UNet ISIC dermoscopy"),
        (
            ["cmunext_busi", "--handlers#0#_target_", "mine.Bar"],
            "handlers#0 is mine.Bar, which a pack does not bring",
        ),
    ],
)
def test_what_cannot_be_packed_is_said_in_one_line(
    typed: list[str], line: str, evaluated: Packed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    weights = str(evaluated("cmunext_busi") / "model.pt")
    capsys.readouterr()
    assert main(["pack", "--weights", weights, "--output", "dist", *typed]) == 1
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("dist/*"))


def test_a_pack_is_not_packed_again(packed: Packed, evaluated: Packed, capsys: pytest.CaptureFixture[str]) -> None:
    folder, weights = packed("cmunext_busi"), str(evaluated("cmunext_busi") / "model.pt")
    capsys.readouterr()
    assert main(["pack", str(folder), "--weights", weights, "--output", str(folder.parent / "again")]) == 1
    assert "has code of its own in scripts" in capsys.readouterr().err
