import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose
from monai.utils import set_determinism
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prepare.demo import prepare_demo
from tests.transforms.test_pictures import opencv_linear

ROOT = Path(__file__).parents[2]
BUNDLES = ("cmunext_busi", "vmunet_isic")
DATA = {"cmunext_busi": "busi", "vmunet_isic": "isic17", "vmunet_synapse": "synapse"}
SMALL_VMUNET = {"dims": [8, 16, 32, 64], "depths": [1, 1, 1, 1], "decoder_depths": [1, 1, 1, 1], "d_state": 4}
TINY: dict[str, dict[str, Any]] = {
    "CMUNeXt": {"_target_": "networks.CMUNeXt", "dims": [4, 4, 8, 8, 8], "kernel_sizes": [3] * 5},
    "VMUNet": {"_target_": "networks.VMUNet", **SMALL_VMUNET},
    "BasicUNet": {"_target_": "BasicUNet", "spatial_dims": 2, "features": [4, 4, 8, 8, 8, 4]},
}
OWN = {"cmunext_busi": TINY["CMUNeXt"], "vmunet_isic": TINY["VMUNet"]}
METRIC = {"cmunext_busi": "iou", "vmunet_isic": "val_loss"}
RGB_MEAN, RGB_SD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
Run = Callable[..., None]


def config(bundle: str, name: str = "train") -> str:
    return f"bundles/{bundle}/configs/{name}.yaml"


def words(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images each, the lists of three splits, and three small CT volumes."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    prepare_demo(out, cases=3, slices=8, size=32, images=12)
    return out


@pytest.fixture
def options(data: Path) -> Callable[..., dict[str, Any]]:
    def for_run(bundle: str, folder: Path, **more: Any) -> dict[str, Any]:
        places = {"dataset_dir": data / DATA[bundle], "ckpt_dir": folder, "output_dir": folder / "eval"}
        rest = {"log_dir": folder / "runs", "image_size": 32, "batch_size": 4, "num_workers": 0}
        return {key: str(value) for key, value in places.items()} | {**rest, "log_dir": str(rest["log_dir"]), **more}

    return for_run


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """What `python -m monai.bundle run` does, in this process."""
    monkeypatch.chdir(ROOT)
    yield lambda run_id, files, **override: monai.bundle.run(run_id, config_file=files, **override)
    set_determinism(None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bundle_command: Callable, data: Path) -> Callable[[str], tuple]:
    """(Folder, log) of a training of two epochs, one for each bundle."""
    done: dict[str, tuple[Path, str]] = {}

    def train(bundle: str) -> tuple[Path, str]:
        if bundle not in done:
            folder = tmp_path_factory.mktemp(bundle)
            places = {"dataset_dir": data / DATA[bundle], "ckpt_dir": folder, "log_dir": folder / "runs"}
            rest = {"image_size": 32, "batch_size": 4, "num_workers": 0, "max_epochs": 2, "network_def": OWN[bundle]}
            done[bundle] = (
                folder,
                bundle_command("run training", "--config_file", config(bundle), *words({**places, **rest})),
            )
        return done[bundle]

    return train


def saved(path: Path) -> Any:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_says_what_it_does_and_leaves_checkpoints_curves_and_images(bundle: str, trained: Callable) -> None:
    folder, log = trained(bundle)
    start = {"cmunext_busi": "6 images to train on, model selected by IoU",
             "vmunet_isic": "7 images to train on, model selected by the loss"}  # fmt: skip
    assert f"{start[bundle]} on held-out training images" in log
    assert f"best {METRIC[bundle]} so far" in log
    assert "loss=" in log
    last = saved(folder / "last.pt")
    assert last["trainer"]["iteration"] == 2 * 2
    assert last["model"].keys() == saved(folder / "model.pt").keys()
    events = EventAccumulator(str(folder / "runs"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"train_loss", METRIC[bundle]} <= set(tags["scalars"])
    shown = [events.Images(tag)[-1] for tag in tags["images"]]
    assert len(shown) == 3
    assert {(image.width, image.height) for image in shown} == {(32, 32)}


def test_training_resumes(trained: Callable, options: Callable, run: Run, tmp_path: Path) -> None:
    bundle = "cmunext_busi"
    (tmp_path / "last.pt").write_bytes((trained(bundle)[0] / "last.pt").read_bytes())
    run("training", config(bundle), **options(bundle, tmp_path, max_epochs=3, resume="true", network_def=OWN[bundle]))
    after = saved(tmp_path / "last.pt")
    assert after["trainer"]["iteration"] == 3 * 2
    assert after["lr_scheduler"]["last_epoch"] == 6
    assert after["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01 * (1 - 5 / 6) ** 0.9)


def test_training_ends_early(options: Callable, run: Run, tmp_path: Path) -> None:
    bundle = "vmunet_isic"
    still = {"learning_rate": 0.0, "lr_scheduler#eta_min": 0.0, "early_stop": 2, "max_epochs": 30}
    run("training", config(bundle), **options(bundle, tmp_path, network_def=OWN[bundle], **still))
    assert saved(tmp_path / "last.pt")["trainer"]["iteration"] == 3 * 2


@pytest.mark.parametrize("bundle", BUNDLES)
def test_evaluating_reports_both_protocols(
    bundle: str, trained: Callable, options: Callable, run: Run, data: Path, capsys: pytest.CaptureFixture
) -> None:
    folder, _ = trained(bundle)
    chosen = options(bundle, folder, network_def=OWN[bundle])
    run("evaluating", [config(bundle), config(bundle, "evaluate")], **chosen)
    assert {"cmunext_busi": "71.56", "vmunet_isic": "80.23"}[bundle] in capsys.readouterr().out
    with (folder / "eval/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    listed = {"cmunext_busi": "busi/busi_val1.txt", "vmunet_isic": "isic17/val.txt"}[bundle]
    assert {row["case"] for row in rows} == set((data / listed).read_text().splitlines())
    summary = json.loads((folder / "eval/summary.json").read_text())
    assert summary["selection"].endswith("on held-out training images")
    each, pooled = (summary["protocols"][name]["classes"]["lesion"] for name in ("per image", "pooled"))
    assert each["iou"]["mean"] == pytest.approx(np.mean([float(row["iou"]) for row in rows]))
    tp, wrong = (sum(int(row[key]) for row in rows for key in keys) for keys in (("tp",), ("fp", "fn")))
    assert pooled["iou"]["mean"] == pytest.approx(tp / (tp + wrong))
    assert sum(int(rows[0][key]) for key in ("tp", "fp", "fn", "tn")) == 32 * 32
    assert Image.open(folder / "eval/overview.png").width > 200


def brightness_network(bundle: str, path: Path) -> dict[str, Any]:
    """Behind the bundle's input, a 1×1 convolution whose logit is the picture's red value, 0 … 255, minus 127.5."""
    network = torch.nn.Conv2d(3, 1, 1)
    weight, bias = torch.tensor([1.0, 0.0, 0.0]), -127.5
    if bundle == "cmunext_busi":
        weight, bias = torch.tensor([0.0, 0.0, 255 * 255 * RGB_SD[2]]), 255 * RGB_MEAN[2] - 127.5
    with torch.no_grad():
        network.weight.copy_(weight[None, :, None, None])
        network.bias.fill_(bias)
    torch.save(network.state_dict(), path)
    return {"_target_": "torch.nn.Conv2d", "in_channels": 3, "out_channels": 1, "kernel_size": 1}


def l_shape(height: int, width: int) -> np.ndarray:
    """No quarter turn and no flip takes it to itself."""
    mask = np.zeros((height, width), bool)
    mask[height // 8 : height // 2, width // 8 : width // 4] = True
    mask[height // 2 - height // 8 : height // 2, width // 8 : 3 * width // 4] = True
    return mask


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("bundle", BUNDLES)
def test_masks_have_the_size_and_the_orientation_of_their_pictures(
    bundle: str, bundle_command: Callable, tmp_path: Path
) -> None:
    pictures = tmp_path / "in"
    pictures.mkdir()
    drawn = {}
    kinds = {"grey.png": "L", "rgba.png": "RGBA", "photo.JPG": "RGB", "palette.bmp": "P", "bilevel.tif": "1"}
    for (name, mode), size in zip(kinds.items(), ((96, 70), (64, 128), (90, 90), (33, 47), (64, 40)), strict=True):
        shape = l_shape(*size)
        drawn[Path(name).stem] = shape
        Image.fromarray(shape.astype(np.uint8) * 255).convert(mode).save(pictures / name)
    red = np.zeros((50, 60, 3), np.uint8)
    red[l_shape(50, 60), 0] = 255
    red[..., 2] = 255 - red[..., 0]
    Image.fromarray(red).save(pictures / "red on blue.png")
    drawn["red on blue"] = l_shape(50, 60)

    network = brightness_network(bundle, tmp_path / "model.pt")
    chosen = {"input": pictures, "output_dir": tmp_path / "out", "ckpt_dir": tmp_path, "image_size": 64}
    bundle_command(
        "run inferring", "--config_file", config(bundle, "inference"),
        *words({**chosen, "network_def": network, "probabilities": True}),
    )  # fmt: skip
    names = {f"{stem}_{kind}.png" for stem, kind in product(drawn, ("mask", "probability"))}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for stem, shape in drawn.items():
        mask = np.asarray(Image.open(tmp_path / "out" / f"{stem}_mask.png"))
        assert mask.shape == shape.shape
        assert set(np.unique(mask)) == {0, 255}
        assert overlap(mask > 0, shape) > 0.85, stem
        assert max(overlap(mask > 0, shape[::-1]), overlap(mask > 0, shape[:, ::-1])) < 0.5
        probability = np.asarray(Image.open(tmp_path / "out" / f"{stem}_probability.png"))
        # 127 and 128 are what a probability of one half becomes
        np.testing.assert_array_equal(mask[probability > 128], 255)
        np.testing.assert_array_equal(mask[probability < 127], 0)


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """Three kinds of things, drawn in stored numbers 85, 170 and 255, in pictures of several kinds."""
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "own" / folder).mkdir(parents=True)
    for index in range(10):
        stored = np.repeat(np.repeat(rng.choice(np.array([0, 85, 170, 255], np.uint8), (4, 5)), 9, 0), 9, 1)
        noisy = (stored * 0.8 + rng.integers(0, 40, stored.shape)).astype(np.uint8)
        suffix = (".png", ".jpg", ".bmp", ".tif")[index % 4]
        Image.fromarray(noisy).convert("RGB" if index % 2 else "L").save(tmp_path / f"own/images/a{index}{suffix}")
        decoration = ("", "_mask", "_segmentation")[index % 3]
        Image.fromarray(stored).save(tmp_path / f"own/masks/a{index}{decoration}.png")
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("bundle", "network"),
    [
        ("cmunext_busi", {"network_def#_target_": "networks.cmunext_s"}),
        ("vmunet_isic", {f"network_def#{key}": value for key, value in SMALL_VMUNET.items()}),
    ],
)
def test_a_folder_of_ones_own_with_several_classes(
    bundle: str, network: dict[str, Any], own_folder: Path, options: Callable, run: Run, tmp_path: Path
) -> None:
    classes = {"classes": ["cyst", "node", "shadow"], "label_map": {0: 0, 85: 1, 170: 2, 255: 3}, **network}
    chosen = options(bundle, tmp_path, max_epochs=1, **classes) | {"dataset_dir": str(own_folder)}
    run("training", config(bundle), **chosen)
    assert next(reversed(saved(tmp_path / "model.pt").values())).shape[0] == 4
    run("evaluating", [config(bundle), config(bundle, "evaluate")], **chosen)
    summary = json.loads((tmp_path / "eval/summary.json").read_text())
    assert summary["cases"] == 3
    assert set(summary["protocols"]["pooled"]["classes"]) == {"cyst", "node", "shadow"}
    run(
        "inferring", config(bundle, "inference"), input=str(own_folder / "images/a1.jpg"), image_size=32,
        output_dir=str(tmp_path / "out"), ckpt_dir=str(tmp_path), probabilities=True, **classes,
    )  # fmt: skip
    mask = np.asarray(Image.open(tmp_path / "out/a1_mask.png"))
    assert mask.shape == (36, 45)
    assert set(np.unique(mask)) <= {0, 85, 170, 255}
    assert len(list((tmp_path / "out").glob("a1_probability_[123].png"))) == 3


@pytest.mark.parametrize("bundle", BUNDLES)
def test_missing_data_is_one_line_with_the_remedy(bundle: str, options: Callable, run: Run, tmp_path: Path) -> None:
    chosen = options(bundle, tmp_path) | {"dataset_dir": str(tmp_path)}
    with pytest.raises(SystemExit, match=r"holds no images to train on .*prepare busi.*prepare isic.*prepare demo"):
        run("training", config(bundle), network_def=OWN[bundle], **chosen)
    with pytest.raises(SystemExit, match=r"nowhere does not exist: give a file or a folder of them as --input"):
        run("inferring", config(bundle, "inference"), load_pretrain=False, network_def=OWN[bundle],
            input=str(tmp_path / "nowhere"))  # fmt: skip


def test_two_processes_train_one_network(options: Callable, bundle_command: Callable, tmp_path: Path) -> None:
    bundle = "vmunet_isic"
    log = bundle_command(
        "run training", "--config_file", f"['{config(bundle)}','{config(bundle, 'multi_gpu')}']",
        *words(options(bundle, tmp_path, max_epochs=1, batch_size=2, network_def=OWN[bundle])),
        launcher=(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"),
    )  # fmt: skip
    assert log.count("images to train on") == 1
    # 7 images, one repeated, over two processes, batches of 2
    assert saved(tmp_path / "last.pt")["trainer"]["iteration"] == 2
    assert (tmp_path / "model.pt").is_file()


@pytest.mark.parametrize(
    ("bundle", "name"), [(bundle, name) for bundle in DATA for name in TINY if OWN.get(bundle) != TINY[name]]
)
def test_every_network_trains_on_every_data_set_by_its_definition_alone(
    bundle: str, name: str, options: Callable, run: Run, tmp_path: Path
) -> None:
    channels = {"in_channels": 1, "out_channels": 9} if bundle == "vmunet_synapse" else {}
    if name == "BasicUNet":
        channels = channels or {"in_channels": 3, "out_channels": 1}
    chosen = options(bundle, tmp_path, max_epochs=1, network_def={**TINY[name], **channels})
    if bundle == "vmunet_synapse":
        chosen |= {"val_cases": 1, "val_interval": 1}
    run("training", config(bundle), **chosen)
    weights = saved(tmp_path / "model.pt")
    assert all(value.isfinite().all() for value in weights.values())


def parsed(bundle: str, overlays: tuple[str, ...] = (), **override: Any) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(ROOT / config(bundle, name)) for name in ("train", *overlays)])
    parser.update(override)
    return parser


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize(("bundle", "overlays"), product(BUNDLES, [(), ("evaluate",)]))
def test_every_training_config_builds(bundle: str, overlays: tuple[str, ...], data: Path, tmp_path: Path) -> None:
    parser = parsed(
        bundle, overlays, dataset_dir=str(data / DATA[bundle]), log_dir=str(tmp_path), network_def=OWN[bundle]
    )
    parser.parse()
    left = [key for key, item in parser.ref_resolver.items.items() if str(item.get_config()).startswith("%")]
    assert set(left) <= {"run"}
    for key in ("train#trainer", "validate#evaluator", "checkpoints"):
        assert parser.get_parsed_content(key) is not None


@pytest.mark.usefixtures("at_root")
def test_one_override_chooses_the_year() -> None:
    parser = parsed("vmunet_isic", ("evaluate",), year=2018, network_def=TINY["VMUNet"])
    assert parser.get_parsed_content("dataset_dir") == "data/isic18"
    assert parser.get_parsed_content("validate#handlers#0#published")["sensitivity"] == 91.12


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize(
    ("variant", "parameters"), [("cmunext_s", 417505), ("cmunext", 3149185), ("cmunext_l", 8286721)]
)
@pytest.mark.parametrize("name", ["train", "inference"])
def test_one_override_chooses_the_variant(name: str, variant: str, parameters: int) -> None:
    parser = ConfigParser()
    parser.read_config(config("cmunext_busi", name))
    parser.update({"network_def#_target_": f"networks.{variant}"})
    network = parser.get_parsed_content("network_def")
    assert sum(p.numel() for p in network.parameters()) == parameters


@pytest.mark.usefixtures("at_root")
def test_published_recipe_of_cmunext(data: Path) -> None:
    parser = parsed("cmunext_busi", dataset_dir=str(data / "busi"))
    published = {
        "image_size": 256,
        "max_epochs": 300,
        "batch_size": 8,
        "learning_rate": 1e-2,
        "seed": 41,
        "early_stop": 0,
    }
    assert {key: parser[key] for key in published} == published
    network = parser.get_parsed_content("network_def")
    assert sum(p.numel() for p in network.parameters()) == 3149185
    optimizer = parser.get_parsed_content("optimizer")
    assert isinstance(optimizer, torch.optim.SGD)
    assert {key: optimizer.defaults[key] for key in ("lr", "momentum", "weight_decay", "nesterov")} == {
        "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": False,
    }  # fmt: skip
    scheduler = parser.get_parsed_content("lr_scheduler")
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    # 6 images in one batch of 8, so one step an epoch
    assert rates == pytest.approx([0.01, 0.01, 0.01 * (1 - 1 / 300) ** 0.9, 0.01 * (1 - 2 / 300) ** 0.9], rel=1e-12)
    loss = parser.get_parsed_content("train#loss")
    logits, target = torch.tensor([[[[2.0, -1.0]]]]), torch.tensor([[[[1.0, 0.0]]]])
    p = torch.sigmoid(logits)
    bce = -(p[..., 0].log() + (1 - p[..., 1]).log()) / 2
    assert loss(logits, target).item() == pytest.approx(
        (0.5 * bce + 1 - (2 * p[..., 0] + 1e-5) / (p.sum() + 1 + 1e-5)).item(), abs=1e-6
    )


@pytest.mark.usefixtures("at_root")
def test_published_recipe_of_vmunet() -> None:
    parser = parsed("vmunet_isic", **{f"network_def#{key}": value for key, value in SMALL_VMUNET.items()})
    published = {
        "image_size": 256,
        "max_epochs": 300,
        "batch_size": 32,
        "learning_rate": 1e-3,
        "seed": 42,
        "early_stop": 0,
    }
    assert {key: parser[key] for key in published} == published
    optimizer = parser.get_parsed_content("optimizer")
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {key: optimizer.defaults[key] for key in ("lr", "betas", "weight_decay")} == {
        "lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 1e-2,
    }  # fmt: skip
    scheduler = parser.get_parsed_content("lr_scheduler")
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    cosine = [1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi * epoch / 50)) / 2 for epoch in range(101)]
    assert rates == pytest.approx(cosine, rel=1e-9)
    assert not parser["lr_per_step"]
    unused = parsed("vmunet_isic")["network_def"]
    assert unused.keys() == {"_target_", "in_channels", "out_channels"}


def picture_and_mask(folder: Path, size: tuple[int, int]) -> tuple[dict[str, str], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    image = rng.integers(10, 200, (*size, 3), dtype=np.uint8)
    mask = rng.random(size) > 0.6
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "mask.png")
    return {"image": str(folder / "image.png"), "label": str(folder / "mask.png")}, image.transpose(2, 0, 1), mask


def opencv_resize(x: np.ndarray, size: int) -> np.ndarray:
    return opencv_linear(opencv_linear(x, size).swapaxes(1, 2), size).swapaxes(1, 2)


@pytest.mark.usefixtures("at_root")
def test_published_input_of_cmunext(tmp_path: Path) -> None:
    item, image, mask = picture_and_mask(tmp_path, (57, 80))
    out = parsed("cmunext_busi", image_size=48).get_parsed_content("validate#preprocessing")(item)
    resized = opencv_resize(image[::-1].astype(np.float64), 48)
    expected = (np.rint(resized) / 255 - RGB_MEAN[:, None, None]) / RGB_SD[:, None, None] / 255
    # where a half is rounded the other way, one grey value
    difference = np.abs(out["image"].numpy() - expected)
    assert difference.max() < 1.01 / 255 / 255 / RGB_SD.min()
    assert (difference < 1e-7).mean() > 0.99
    rows, columns = np.arange(48) * 57 // 48, np.arange(48) * 80 // 48
    np.testing.assert_array_equal(out["label"].numpy(), mask[None, rows[:, None], columns])


@pytest.mark.usefixtures("at_root")
def test_published_input_of_vmunet(tmp_path: Path) -> None:
    item, image, mask = picture_and_mask(tmp_path, (57, 80))
    out = parsed("vmunet_isic", image_size=48).get_parsed_content("validate#preprocessing")(item)
    normalised = (image.astype(np.float64) - 159.922) / 28.871
    stretched = 255 * (normalised - normalised.min()) / (normalised.max() - normalised.min())
    np.testing.assert_allclose(out["image"].numpy(), opencv_resize(stretched, 48), rtol=0, atol=5e-3)
    np.testing.assert_allclose(out["label"].numpy(), opencv_resize(mask[None].astype(float), 48), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("bundle", BUNDLES)
def test_training_and_inference_see_the_same_input(bundle: str, tmp_path: Path) -> None:
    item, _, _ = picture_and_mask(tmp_path, (57, 80))
    inference = ConfigParser()
    inference.read_config(config(bundle, "inference"))
    alone = inference.get_parsed_content("preprocessing")({"image": item["image"]})["image"]
    assert torch.equal(alone.as_tensor(), parsed(bundle).get_parsed_content("validate#preprocessing")(item)["image"])


def orientations(x: np.ndarray) -> dict[bytes, list[str]]:
    """Pixels after every quarter turn and then every flip of CMUNeXt's augmentation, and which of these give them."""
    found: dict[bytes, list[str]] = {}
    for k, axes in product(range(4), ((), (0,), (1,), (0, 1))):
        found.setdefault(np.flip(np.rot90(x, k), axes).tobytes(), []).append(f"{k}{axes}")
    return found


@pytest.mark.usefixtures("at_root")
def test_published_augmentation_of_cmunext(tmp_path: Path) -> None:
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    Image.fromarray(np.where(pixels % 3 == 1, 255, 0).astype(np.uint8)).save(tmp_path / "label.png")
    item = {key: str(tmp_path / f"{key}.png") for key in ("image", "label")}
    load, *random = parsed("cmunext_busi", image_size=4).get_parsed_content("train#preprocessing").transforms
    loaded, augment = load(item), Compose(random).set_random_state(0)
    expected: Counter[bytes] = Counter()
    for result, ways in orientations(pixels).items():
        for way in ways:
            k, flipped = way[0], len(way) > len("0()")
            expected[result] += (0.625 if k == "0" else 0.125) * (1 / 6 if flipped else 0.5)
    draws, seen = 1500, Counter()
    for _ in range(draws):
        out = augment(loaded)
        # channel 2 is red, here as everywhere grey
        grey = np.rint((out["image"][2].numpy() * 255 * RGB_SD[2] + RGB_MEAN[2]) * 255).astype(np.uint8)
        np.testing.assert_array_equal(out["label"][0].numpy(), grey % 3 == 1)
        seen[grey.tobytes()] += 1
    assert seen.keys() == expected.keys()
    for result, share in expected.items():
        assert abs(seen[result] - draws * share) < 3 * math.sqrt(draws * share * (1 - share))


@pytest.mark.usefixtures("at_root")
def test_published_augmentation_of_vmunet(tmp_path: Path) -> None:
    shape = np.pad(l_shape(62, 62), 1, constant_values=True)
    Image.fromarray(shape.astype(np.uint8) * 255).save(tmp_path / "image.png")
    item = dict.fromkeys(("image", "label"), str(tmp_path / "image.png"))
    load, *random = parsed("vmunet_isic", image_size=64).get_parsed_content("train#preprocessing").transforms
    loaded, augment = load(item), Compose(random).set_random_state(0)
    flips = [np.flip(shape, axes) for axes in ((), (0,), (1,), (0, 1))]
    only_flipped: Counter[int] = Counter()
    draws, turned = 400, []
    for _ in range(draws):
        out = augment(loaded)
        drawn = out["label"][0].numpy()
        # nearest neighbours, turned together
        np.testing.assert_array_equal(out["image"].numpy(), np.stack([255 * drawn] * 3))
        assert set(np.unique(drawn)) <= {0, 1}
        matches = [index for index, flip in enumerate(flips) if np.array_equal(drawn, flip)]
        only_flipped.update(matches)
        if not matches:
            turned.append(drawn)
    assert abs(len(turned) - draws / 2) < 4 * math.sqrt(draws / 4)
    for count in only_flipped.values():
        assert abs(count - draws / 8) < 4 * math.sqrt(draws * 7 / 64)
    assert len(only_flipped) == 4
    # what is turned in from outside is black
    assert np.mean([drawn[0, 0] for drawn in turned]) < 0.1
    # an angle for each sample, all around
    assert len({drawn.tobytes() for drawn in turned}) > 0.95 * len(turned)
    rows, columns = np.mgrid[:64, :64] - 31.5
    angles = [math.atan2((rows * drawn).sum(), (columns * drawn).sum()) for drawn in turned]
    assert np.histogram(angles, 12, (-math.pi, math.pi))[0].min() > len(turned) / 30
