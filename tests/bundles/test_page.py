"""The page in Chromium, from disk and offline: its masks are Python's, and it can be used by anybody."""

from __future__ import annotations

import base64
import contextlib
import csv
import gzip
import hashlib
import importlib.util
import io
import json
import re
import shutil
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

import bundles
from bundles import page
from bundles.__main__ import main
from bundles.configurations import find_configuration, read_bundle
from bundles.description import describe
from bundles.export import export_bundle
from networks import CMUNeXt
from tests.bundles.conftest import OWN, ROOT
from transforms import InputError

# .ci/run fetches it
ARCHIVE = ROOT / "build" / page.ARCHIVE
CHROMIUM = shutil.which("chromium")
needed = ("onnx", "onnxscript", "onnxruntime", "playwright")
absent = [name for name in needed if importlib.util.find_spec(name) is None]
absent += ["Chromium"] * (CHROMIUM is None) + [f"build/{page.ARCHIVE} ({page.HOW})"] * (not ARCHIVE.is_file())
in_browser = pytest.mark.skipif(bool(absent), reason=f"not here: {', '.join(absent)}")
PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 900}
FACTS = [("Run", "unknown"), ("Trained on", "unknown")]
SIZE = (61, 83)
# masks by the picture's name without suffix, the line beside each picture, rows of the table
Results = tuple[dict[str, np.ndarray], dict[str, str], list[dict[str, str]]]
Masks = Callable[[str, Sequence[Path]], Results]
# page and predictor
Models = Callable[[str], tuple[Path, Any]]


def description(bundle: str = "cmunext_busi", **settings: Any) -> dict[str, Any]:
    return describe(read_bundle(find_configuration(bundle), settings))


# What Python does


@pytest.mark.parametrize(
    ("bundle", "settings", "line"),
    [
        (
            "vmunet_synapse",
            {},
            "cannot do the step read volume of this input; export to onnx",
        ),
        ("vmunet_isic", {"in_channels": 4}, "a page reads no RGBA: browsers do not keep the fourth channel"),
        ("cmunext_busi", {"tta": "flips"}, "--tta flips: a page does not do it; leave it out"),
        ("cmunext_busi", {"postprocess": "largest"}, "--postprocess largest: a page does not do it; leave it out"),
        (
            "vmunet_isic",
            {"preprocessing#transforms#2": {"_target_": "AdjustContrastd", "keys": "image", "gamma": 2}},
            "cannot do the step AdjustContrastd of this input",
        ),
        ("vmunet_isic", {"preprocessing#transforms#3#mode": "bicubic"}, "cannot do the step resize of this input"),
    ],
)
def test_what_a_page_cannot_do_is_refused(bundle: str, settings: dict[str, Any], line: str) -> None:
    parser = read_bundle(find_configuration(bundle), settings)
    with pytest.raises(InputError, match=re.escape(line)):
        page.check(describe(parser), parser.get())


def test_networks_that_phones_cannot_hold_are_refused() -> None:
    page.check(description(), {}, 8_286_721)  # CMUNeXt-L
    with pytest.raises(InputError, match="weights take 105 MB, in a page they may take 48; export a smaller"):
        page.check(description(), {}, 27_400_000)


def test_only_the_release_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = ["export", "cmunext_busi", "--weights", "a.pt", "--format", "page"]
    assert main(typed) == 1
    assert capsys.readouterr().err == f"--format page needs onnxruntime-web 1.30.0; {page.HOW}\n"
    with tarfile.open(page.ARCHIVE, "w:gz") as archive:
        content = tarfile.TarInfo("package/dist/ort-wasm-simd-threaded.wasm")
        archive.addfile(content)
    assert main(typed) == 1
    assert "holds no ort.wasm.bundle.min.mjs" in capsys.readouterr().err
    for name in page.RUNTIME:
        (tmp_path / name).write_bytes(b"of another release")
    assert main([*typed, "--onnxruntime_web", str(tmp_path)]) == 1
    assert "its ort.wasm.bundle.min.mjs is not that of onnxruntime-web 1.30.0" in capsys.readouterr().err
    Path(page.ARCHIVE).write_bytes(b"no archive")
    assert main(typed) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"{page.ARCHIVE}: is no archive of npm")
    assert error.count("\n") == 1
    assert main([*typed, "--output", "page.onnx"]) == 1
    assert "a page is called NAME.html" in capsys.readouterr().err


def test_a_page_is_the_same_each_time_and_names_nothing_outside() -> None:
    runtime = {name: name.encode() for name in page.RUNTIME}
    about = {**description(), "name": "</script><b>CMUNeXt"}
    content = page.assemble(b"model", about, FACTS, runtime)
    assert content == page.assemble(b"model", about, FACTS, runtime)
    text = content.decode()
    assert "<title>&lt;/script&gt;&lt;b&gt;CMUNeXt</title>" in text
    assert "</script><b>" not in text
    # XMP has a name that looks like an address
    assert set(re.findall(r"https?://[^\s\"'\\]*", text)) == {"http://ns.adobe.com/xap/1.0/"}
    assert not re.search(r"<(script|img|link)[^>]* (src|href)=\"(?!data:,)", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.split(" ", 1) for rule in policy.replace("&#39;", "'").split("; "))
    assert rules["default-src"] == rules["connect-src"] == "'none'"
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in rules["script-src"]


def test_a_page_says_where_its_model_comes_from(tmp_path: Path) -> None:
    image = tmp_path / "busi" / "images" / "a.png"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"a picture")
    weights = tmp_path / "model.pt"
    torch.save({"run_id": "f00d" * 8, "model": {}}, weights)
    run: dict[str, Any] = {
        "format": 1, "id": "f00d" * 8, "started": "2026-01-02T03:04:05", "how_it_ended": "completed", "command": "",
        "network": "CMUNeXt", "selection": "IoU on held-out training images", "settings": {},
        "best": {"metric": "iou", "score": 0.5, "epoch": 3},
        "data": {"train": [{"image": [str(image), hashlib.sha256(image.read_bytes()).hexdigest()]}]},
    }  # fmt: skip

    def trained_on() -> str:
        (tmp_path / "run.json").write_text(json.dumps(run))
        facts = page.about(description(), "CMUNeXt", weights)
        assert str(tmp_path) not in str(facts)
        return dict(facts)["Trained on"]

    assert trained_on() == "1 images: the data set says nothing of itself"
    run["data_note"] = "synthetic phantom"
    assert trained_on() == "1 images: synthetic phantom"
    facts = page.about(description(), "CMUNeXt", weights)
    text = page.assemble(b"", description(), facts, dict.fromkeys(page.RUNTIME, b""))
    assert b"trained on drawn phantoms" in text
    assert b"Model: run f00df00d, trained on 1 images: synthetic phantom" in text
    weights.unlink()
    assert dict(page.about(description(), "CMUNeXt", weights))["Run"] == "unknown: the weights name no run"


# Networks and pictures


def mixing(classes: int) -> torch.nn.Conv2d:
    """A 1×1 convolution that tells the three colours apart."""
    network = torch.nn.Conv2d(3, classes, 1)
    with torch.no_grad():
        weights = torch.tensor([[0.5, 0.3, 0.2], [-0.4, 0.6, 0.1], [0.3, -0.5, 0.6]])[:classes, :, None, None]
        network.weight.copy_(weights)
        network.bias.copy_(torch.tensor([-120.0, 3.0, 9.0])[:classes])
    return network


def as_onnx(network: torch.nn.Conv2d) -> bytes:
    """What takes PyTorch's exporter seconds."""
    from onnx import TensorProto, helper, numpy_helper

    state = {name: numpy_helper.from_array(tensor.numpy(), name) for name, tensor in network.state_dict().items()}
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", channels, "height", "width"])
        for name, channels in (("image", 3), ("logits", network.out_channels))
    ]
    node = helper.make_node("Conv", ["image", *state], ["logits"])
    graph = helper.make_graph([node], "mixing", ends[:1], ends[1:], [*state.values()])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10).SerializeToString()


@torch.no_grad()
def tiny_cmunext(data: Path) -> CMUNeXt:
    """Random, the weights so large that logits differ, and half of the demo pictures' pixels foreground."""
    torch.manual_seed(1)
    network = CMUNeXt(**{name: value for name, value in OWN["cmunext_busi"].items() if name != "_target_"}).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.weight.mul_(2.4)
    network.stem.conv[0].weight.mul_(100)
    parser = read_bundle(find_configuration("cmunext_busi"), {"image_size": 32})
    preprocessing = parser.get_parsed_content("preprocessing")
    files = sorted((data / "busi/images").iterdir())
    images = [preprocessing({"image": file})["image"].as_tensor() for file in files]
    network.Conv_1x1.bias -= network(torch.stack(images)).median()
    return network


CONVOLUTION = {"_target_": "torch.nn.Conv2d", "in_channels": 3, "kernel_size": 1}
LABELS = {"classes": ["cup", "disc"], "label_map": {0: 0, 128: 1, 300: 2}}
# name → bundle, settings
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "cmunext_busi": ("cmunext_busi", {"image_size": 32, "network_def": OWN["cmunext_busi"]}),
    "vmunet_isic": ("vmunet_isic", {"image_size": 64, "network_def": {**CONVOLUTION, "out_channels": 1}}),
    "classes": ("vmunet_isic", {"image_size": [40, 64], "network_def": {**CONVOLUTION, "out_channels": 3}, **LABELS}),
}


@pytest.fixture(scope="module")
def models(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """(Page, predictor) of a model."""
    done: dict[str, tuple[Path, Any]] = {}

    def make(name: str) -> tuple[Path, Any]:
        if name not in done:
            bundle, settings = MODELS[name]
            weights = tmp_path_factory.mktemp("model") / "model.pt"
            network = tiny_cmunext(data) if name == "cmunext_busi" else mixing(3 if name == "classes" else 1)
            torch.save(network.state_dict(), weights)
            if name == "cmunext_busi":
                written = export_bundle(bundle, weights, "page", None, settings, ARCHIVE)
            else:
                written = weights.with_suffix(".html")
                about = description(bundle, **settings)
                written.write_bytes(page.assemble(as_onnx(network), about, FACTS, page.read_runtime(ARCHIVE)))
            done[name] = written, bundles.load(bundle, weights, settings)
        return done[name]

    return make


def png(width: int, bits: int, colour: int, rows: np.ndarray, interlaced: bool = False, filtering: int = 0) -> bytes:
    """A PNG of any kind: Pillow writes few."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    lines = [row.tobytes() for x, y, across, down in passes for row in rows[y::down, x::across] if row.size]
    packed = zlib.compress(b"".join(bytes([filtering]) + line for line in lines))
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, interlaced)
    written = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", packed), (b"IEND", b"")):
        written += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return written


def profile() -> bytes:
    """A colour profile that swaps red and blue for whoever obeys it."""
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    first, second = (swapped.index(name, 128) for name in (b"rXYZ", b"bXYZ"))
    swapped[first : first + 4], swapped[second : second + 4] = b"bXYZ", b"rXYZ"
    return bytes(swapped)


def colours(height: int = SIZE[0], width: int = SIZE[1]) -> np.ndarray:
    y, x = np.mgrid[:height, :width] / 25
    waves = [127 + 110 * np.sin(x * (1 + 0.3 * i) + i) * np.cos(y * (1.2 - 0.2 * i)) for i in range(3)]
    return np.stack(waves, -1)


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of every kind that the page takes."""
    folder = tmp_path_factory.mktemp("kinds")
    exact = colours()
    array = exact.astype(np.uint8)
    rgb, grey = Image.fromarray(array), Image.fromarray(array[..., 0])
    veil = Image.fromarray((np.arange(array[..., 0].size) % 256).astype(np.uint8).reshape(SIZE))
    clear, clear_grey, opaque = rgb.copy(), grey.copy(), rgb.copy()
    clear.putalpha(veil)
    clear_grey.putalpha(veil)
    opaque.putalpha(255)
    plain = {"rgb": rgb, "grey": grey, "rgba": clear, "la": clear_grey, "bilevel": grey.convert("1")}
    for name, picture in plain.items():
        picture.save(folder / f"{name}.png")
    for bits, count in ((8, 200), (4, 16), (2, 4), (1, 2)):
        rgb.quantize(count).save(folder / f"palette{count}.png", bits=bits, transparency=1)
    for bits in (1, 2, 4):
        unpacked = np.unpackbits(array[..., :1] >> (8 - bits), axis=-1)[..., 8 - bits :].reshape(SIZE[0], -1)
        (folder / f"grey of {bits} bits.png").write_bytes(png(SIZE[1], bits, 0, np.packbits(unpacked, axis=1)))
    for highest in (65535, 4095, 255):
        Image.fromarray((exact[..., 0] / 255 * highest).astype(np.uint16)).save(folder / f"16 bits to {highest}.png")
    deep = (exact / 255 * 65535).astype(">u2")
    (folder / "colours of 16 bits.png").write_bytes(png(SIZE[1], 16, 2, deep))
    (folder / "deep and clear.png").write_bytes(png(SIZE[1], 16, 6, np.dstack([deep, deep[..., 0]])))
    (folder / "interlaced.png").write_bytes(png(SIZE[1], 8, 2, array, interlaced=True))
    (folder / "interlaced and tiny.png").write_bytes(png(2, 8, 2, array[:3, :2], interlaced=True))
    for filtering in (1, 2, 3, 4):
        (folder / f"filter {filtering}.png").write_bytes(png(SIZE[1], 8, 2, array, filtering=filtering))
    exif = Image.Exif()
    for number in range(1, 9):
        exif[0x112] = number
        rgb.save(folder / f"turned {number}.jpg", exif=exif, quality=95)
    rgb.save(folder / "turned.png", exif=exif)
    rgb.save(folder / "turned.webp", exif=exif, lossless=True)
    raw = exif.tobytes()
    for packed in (False, True):
        written = PngImagePlugin.PngInfo()
        written.add_text("Raw profile type exif", f"\nexif\n{len(raw):8}\n{raw.hex()}\n", zip=packed)
        rgb.save(folder / f"turned as older programs say{' packed' * packed}.png", pnginfo=written)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    rgb.save(folder / "turned by XMP.jpg", xmp=xmp, quality=95)
    rgb.save(folder / "turned by XMP.webp", xmp=xmp, lossless=True)
    written = PngImagePlugin.PngInfo()
    written.add_itxt("XML:com.adobe.xmp", xmp.decode())
    rgb.save(folder / "turned by XMP.png", pnginfo=written)
    options: dict[str, dict[str, Any]] = {"png": {}, "jpg": {"quality": 95}, "webp": {"lossless": True}}
    for suffix, more in options.items():
        rgb.save(folder / f"profile.{suffix}", icc_profile=profile(), **more)
    for subsampling in (0, 1, 2):
        rgb.save(folder / f"subsampled {subsampling}.jpg", subsampling=subsampling, quality=85)
    rgb.save(folder / "progressive.jpg", progressive=True)
    rgb.save(folder / "restarts.jpg", restart_marker_rows=1)
    grey.save(folder / "grey.jpg")
    rgb.save(folder / "lossy.webp", quality=80)
    opaque.save(folder / "opaque.webp", lossless=True)
    bitmaps = {"24": rgb, "8": grey, "palette": rgb.quantize(20), "1": grey.convert("1"), "32": opaque}
    for name, picture in bitmaps.items():
        picture.save(folder / f"{name}.bmp")
    (folder / "a JPEG by another name.png").write_bytes((folder / "grey.jpg").read_bytes())
    (folder / "something after it.png").write_bytes((folder / "rgb.png").read_bytes() + b"more")
    Image.fromarray(array[:1, :1]).save(folder / "one pixel.png")
    Image.fromarray(array[:1]).save(folder / "one line.png")
    Image.new("L", (50, 40), 200).save(folder / "of one colour.png")
    Image.fromarray(colours(1700, 1100).astype(np.uint8)).save(folder / "large.jpg", quality=92)
    # the names of masks have no suffix
    for file in folder.iterdir():
        file.rename(file.with_name(f"{file.stem} {file.suffix[1:]}{file.suffix}"))
    return folder


# In the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # this computer's own server must be heard, where the page's policy is tried
        local = "--disable-features=LocalNetworkAccessChecks"
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=[local])
        yield started
        started.close()


@contextlib.contextmanager
def opened(browser: Any, path: Path, **options: Any) -> Iterator[Any]:
    """The page, ready and offline. Nothing may be asked for or complained of."""
    context = browser.new_context(**options)
    context.set_offline(True)
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(path.as_uri())
    tab.wait_for_selector("html[data-ready]")
    yield tab
    assert said == []
    assert [url for url in asked if not url.startswith(("blob:", "data:"))] == [path.as_uri()]
    context.close()


def segment(tab: Any, files: Sequence[Path]) -> None:
    tab.set_input_files("#files", files)
    tab.wait_for_selector("#list[aria-busy=false]", timeout=60000)


@pytest.fixture(scope="module")
def masks(browser: Any, models: Models) -> Masks:
    """What the page of a model makes of files."""

    def segmented(model: str, files: Sequence[Path]) -> Results:
        with opened(browser, models(model)[0]) as tab:
            segment(tab, files)
            entries = tab.locator("#list li").all()
            lines = {row.locator("button").inner_text(): row.locator("span").inner_text() for row in entries}
            with tab.expect_download() as download:
                tab.click("#save-all")
            with zipfile.ZipFile(download.value.path()) as archive:
                assert archive.testzip() is None
                found = {name: archive.read(name) for name in archive.namelist()}
        rows = list(csv.DictReader(io.StringIO(found.pop("areas.csv").decode())))
        stored = {name: np.asarray(Image.open(io.BytesIO(content))) for name, content in found.items()}
        return {name.removesuffix("_mask.png"): mask for name, mask in stored.items()}, lines, rows

    return segmented


def agreement(found: np.ndarray, labels: np.ndarray, numbers: Sequence[int]) -> float:
    expected = np.array(numbers)[labels]
    assert found.shape == expected.shape
    return float((found == expected).mean())


@in_browser
@pytest.mark.parametrize("model", ["vmunet_isic", "classes"])
def test_pictures_of_every_kind_are_read_as_in_python(model: str, masks: Masks, models: Models, kinds: Path) -> None:
    # all of them once
    files = sorted(kinds.iterdir())[:: 1 if model == "vmunet_isic" else 6]
    found, lines, rows = masks(model, files)
    predictor = models(model)[1]
    numbers = [0, 128, 300] if model == "classes" else [0, 255]
    foreground = []
    for file in files:
        assert file.stem in found, f"{file.name}: {lines[file.name]}"
        labels = predictor(file)
        # the rounding of the last bit
        assert agreement(found[file.stem], labels, numbers) >= 0.9999, file.name
        foreground.append((labels > 0).mean())
        for index, name in enumerate(predictor.classes[1:], 1):
            (row,) = (row for row in rows if (row["image"], row["class"]) == (file.name, name))
            assert int(row["pixels"]) == (found[file.stem] == numbers[index]).sum()
            assert float(row["percent"]) == pytest.approx(100 * int(row["pixels"]) / labels.size, abs=0.006)
    assert sum(0.1 < share < 0.9 for share in foreground) > 0.7 * len(files)
    if model == "vmunet_isic":
        assert lines["16 bits to 4095 png.png"].endswith("; 16 bits, no value above 4095: taken for 12 bits")


@in_browser
def test_masks_of_cmunext_on_the_demo_pictures_are_those_of_python(masks: Masks, models: Models, data: Path) -> None:
    files = sorted((data / "busi/images").iterdir())
    found, _, _ = masks("cmunext_busi", files)
    predictor = models("cmunext_busi")[1]
    labels = {file: predictor(file) for file in files}
    assert 0.1 < np.mean([mask.mean() for mask in labels.values()]) < 0.9
    assert min(agreement(found[file.stem], labels[file], [0, 255]) for file in files) >= 0.999


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@in_browser
def test_what_cannot_be_read_rightly_is_said_and_the_others_go_on(masks: Masks, kinds: Path, tmp_path: Path) -> None:
    whole = {file.name: file.read_bytes() for file in kinds.iterdir()}
    array = colours().astype(np.uint8)
    rgb = Image.fromarray(array)
    clear = rgb.copy()
    clear.putalpha(120)
    flipped = bytearray(whole["rgb png.png"])
    flipped[len(flipped) // 2] ^= 255
    early, several = (
        "it ends too early; copy or save it again",
        "it holds several pictures; save each in a file of its own",
    )
    other = "which this page does not read; save it as PNG"
    broken = {
        "checksum.png": (bytes(flipped), "its checksum is wrong; copy or save it again"),
        "cut.png": (whole["rgb png.png"][:-200], early),
        "cut.bmp": (whole["24 bmp.bmp"][:-200], early),
        "cut.jpg": (whole["turned 1 jpg.jpg"][:-200], early),
        "no end.jpg": (whole["turned 1 jpg.jpg"][:-2], early),
        "cut.webp": (whole["lossy webp.webp"][:-200], early),
        "header.png": (whole["rgb png.png"][:24], early),
        "fewer.png": (
            png(SIZE[1] + 1, 8, 2, array),
            "its header claims more pixels than it holds; copy or save it again",
        ),
        "more.png": (png(SIZE[1] - 1, 8, 2, array), "its header claims fewer pixels than it holds"),
        "empty.png": (b"", "it is empty"),
        "text.jpg": (b"hello", "no PNG, JPEG, WebP or BMP"),
        "huge.png": (
            png(30000, 8, 0, np.zeros((30000, 1), np.uint8)),
            "30000 × 30000 pixels, more than the 50 million that this page takes; save it smaller",
        ),
        "dark.png": (
            png(SIZE[1], 16, 2, (array * np.uint16(10)).astype(">u2")),
            "16 bits for each colour, of which the highest 4 are used up to 9; save it with 8 bits for each colour",
        ),
        "films.png": (saved(rgb, "PNG", save_all=True, append_images=[rgb.rotate(90)]), several),
        "films.webp": (saved(rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90)]), several),
        "clear.webp": (saved(clear, "WEBP", lossless=True), "parts of it are transparent; save it as PNG"),
        "print.jpg": (
            saved(rgb.convert("CMYK"), "JPEG"),
            "printing colours (CMYK); save it as PNG with red, green and blue",
        ),
        "scan.tif": (saved(rgb, "TIFF"), f"TIFF, {other}"),
        "old.gif": (saved(rgb, "GIF"), f"GIF, {other}"),
        "scan.dcm": (b"\0" * 128 + b"DICM", f"DICOM, {other}"),
    }
    for name, (content, _) in broken.items():
        (tmp_path / name).write_bytes(content)
    shutil.copy(kinds / "rgb png.png", tmp_path / "rgb.png")
    shutil.copy(kinds / "grey jpg.jpg", tmp_path / "grey.jpg")
    files = [tmp_path / "rgb.png", *(tmp_path / name for name in broken), tmp_path / "grey.jpg"]
    found, lines, _ = masks("vmunet_isic", files)
    for name, (_, line) in broken.items():
        assert lines[name] == line, name
    assert found.keys() == {"rgb", "grey"}


@in_browser
def test_a_browser_that_changes_pixels_is_noticed(browser: Any, models: Models, kinds: Path, tmp_path: Path) -> None:
    changed = """
        const context = OffscreenCanvasRenderingContext2D.prototype;
        const read = context.getImageData;
        context.getImageData = function (...words) {
            const image = read.apply(this, words);
            image.data[40] ^= 1;
            return image;
        };
    """
    text = models("vmunet_isic")[0].read_text()
    (tmp_path / "page.html").write_text(text.replace('id="worker">', f'id="worker">{changed}'))
    with opened(browser, tmp_path / "page.html") as tab:
        segment(tab, [kinds / "rgb png.png", kinds / "grey jpg.jpg", kinds / "24 bmp.bmp"])
        first, second, third = tab.locator("#list span").all_inner_texts()
    assert second == "this browser changes the pixels that pages read; save it as PNG"
    assert first == third
    assert first.startswith("lesion")


@in_browser
def test_nothing_leaves_the_computer(browser: Any, models: Models, tmp_path: Path) -> None:
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    tries = {
        "fetch": "await fetch(address + '/fetch', {mode: 'no-cors'})",
        "beacon": "navigator.sendBeacon(address + '/beacon', 'a')",
        "image": "new Image().src = address + '/image'",
        "socket": "new WebSocket(address.replace('http', 'ws') + '/socket')",
        "script": "document.head.append(Object.assign(document.createElement('script'), {src: address + '/script'}))",
        "frame": "document.body.append(Object.assign(document.createElement('iframe'), {src: address + '/frame'}))",
        "form": "document.body.append(Object.assign(document.createElement('form'), {action: address + '/form'}));"
        " document.forms[0].submit()",
        "worker": "const w = new Worker(URL.createObjectURL(new Blob([`fetch('${address}/worker')`])));"
        " await new Promise(done => setTimeout(done, 300))",
    }
    context = browser.new_context()
    tab = context.new_page()
    # a page without a policy gets through, so the server would be heard
    (tmp_path / "free.html").write_text("<!doctype html>")
    tab.goto((tmp_path / "free.html").as_uri())
    tab.evaluate("address => { window.kept = new Image(); window.kept.src = address + '/image' }", address)
    for _ in range(50):
        if not asked:
            tab.wait_for_timeout(100)
    assert asked == ["/image"]
    tab.goto(models("vmunet_isic")[0].as_uri())
    tab.wait_for_selector("html[data-ready]")
    for code in tries.values():
        tab.evaluate(f"async address => {{ try {{ {code} }} catch {{}} }}", address)
    tab.wait_for_timeout(500)
    context.close()
    server.shutdown()
    server.server_close()
    assert asked == ["/image"]


# Gives the page a file as a person would.
GIVE = """([kind, name, content]) => {
    const data = new DataTransfer();
    if (content) data.items.add(new File([Uint8Array.from(atob(content), c => c.charCodeAt(0))], name));
    const event = kind == 'paste' ? new ClipboardEvent(kind, {clipboardData: data, bubbles: true})
        : new DragEvent(kind, {dataTransfer: data, bubbles: true, cancelable: true});
    document.body.dispatchEvent(event);
    return event.defaultPrevented;
}"""


@in_browser
def test_what_is_dropped_before_the_network_is_there_waits_for_it(browser: Any, models: Models, kinds: Path) -> None:
    content = base64.b64encode((kinds / "rgb png.png").read_bytes()).decode()
    tab = browser.new_page()
    tab.goto(models("vmunet_isic")[0].as_uri())
    early = f"given => {{ ({GIVE})(given); return !document.documentElement.dataset.ready; }}"
    assert tab.evaluate(early, ["drop", "a.png", content])
    tab.wait_for_selector("#list[aria-busy=false] li.done")
    tab.close()


@in_browser
def test_files_are_dropped_and_pasted(browser: Any, models: Models, kinds: Path) -> None:
    content = base64.b64encode((kinds / "rgb png.png").read_bytes()).decode()
    with opened(browser, models("vmunet_isic")[0]) as tab:
        assert tab.evaluate(GIVE, ["dragover", "a.png", content])
        assert tab.evaluate("document.body.classList.contains('dragged')")
        assert tab.evaluate(GIVE, ["drop", "a.png", content])
        assert not tab.evaluate("document.body.classList.contains('dragged')")
        tab.evaluate(GIVE, ["paste", "image.png", content])
        tab.evaluate(GIVE, ["paste", "image.png", content])
        tab.wait_for_selector("#list[aria-busy=false] li:nth-child(3).done")
        assert tab.locator("#list button").all_inner_texts() == ["a.png", "image.png", "image.png"]
        assert len(set(tab.locator("#list span").all_inner_texts())) == 1
        tab.evaluate(GIVE, ["drop", "", ""])
        assert tab.inner_text("#status") == "What was dropped holds no files."
        with tab.expect_download() as download:
            tab.click("#save-all")
        with zipfile.ZipFile(download.value.path()) as archive:
            assert archive.namelist() == ["a_mask.png", "image_mask.png", "image (2)_mask.png", "areas.csv"]


@in_browser
def test_the_keyboard_is_enough(browser: Any, models: Models, kinds: Path) -> None:
    overlay = """() => {
        const context = new OffscreenCanvas(83, 61).getContext('2d', {willReadFrequently: true});
        context.drawImage(document.getElementById('overlay'), 0, 0);
        return [...context.getImageData(0, 0, 83, 61).data];
    }"""
    with opened(browser, models("vmunet_isic")[0], viewport=DESKTOP) as tab:
        segment(tab, [kinds / name for name in ("rgb png.png", "grey png.png", "of one colour png.png")])
        tab.wait_for_selector("#viewer:not([hidden])")
        assert tab.inner_text("#status") == "3 segmented."
        tab.evaluate("document.activeElement.blur()")
        reached = []
        for _ in range(14):
            tab.keyboard.press("Tab")
            ring = "one => one.id || one.textContent.trim()"
            reached.append(tab.evaluate(f"({ring})(document.activeElement)"))
            visible = """() => {
                const one = document.activeElement;
                const shown = [getComputedStyle(one), getComputedStyle(one, '::after')];
                if (one.id == 'files') shown.push(getComputedStyle(document.querySelector('label[for=files]')));
                return shown.some(style => style.outlineStyle == 'solid' && style.outlineWidth == '3px');
            }"""
            assert tab.evaluate(visible), reached[-1]
            if reached[-1] == "grey png.png":
                tab.keyboard.press("Enter")
                tab.wait_for_selector("#shown:text('grey png.png')")
            elif reached[-1] == "opacity":
                before = np.array(tab.evaluate(overlay)).reshape(61, 83, 4)
                tab.keyboard.press("End")
                after = np.array(tab.evaluate(overlay)).reshape(61, 83, 4)
                assert set(np.unique(before[..., 3])) == {0, 89, 255}
                assert set(np.unique(after[..., 3])) == {0, 255}
                tab.keyboard.press("Home")
            elif reached[-1] == "outline":
                assert set(np.unique(np.array(tab.evaluate(overlay))[3::4])) == {0, 255}
                tab.keyboard.press("Space")
                assert set(np.unique(np.array(tab.evaluate(overlay))[3::4])) == {0}
            elif reached[-1] == "pixel":
                tab.keyboard.type("0,5")
                pixels, share, square = tab.locator("#areas td").all_inner_texts()
                assert float(square) == pytest.approx(int(pixels) / 4, rel=1e-3)
                assert float(share) == pytest.approx(100 * int(pixels) / (61 * 83), abs=0.006)
                tab.keyboard.type("x")
                assert tab.inner_text("#pixel-error") == "A number above 0, for instance 0.07"
                assert tab.locator("#areas td").all_inner_texts()[2] == "–"
            elif reached[-1] == "save":
                with tab.expect_download() as download:
                    tab.keyboard.press("Enter")
                assert download.value.suggested_filename == "grey png_mask.png"
                mask = np.asarray(Image.open(download.value.path()))
                assert mask.shape == SIZE
                assert (mask > 0).sum() == int(pixels)
            elif reached[-1] == "About this model":
                break
        assert reached == [
            "files", "save-all", "clear", "rgb png.png", "grey png.png", "of one colour png.png", "opacity", "outline",
            "pixel", "save", "About this model",
        ]  # fmt: skip
        tab.keyboard.press("Enter")
        assert tab.locator("#about dd").first.is_visible()
        tab.focus("#clear")
        tab.keyboard.press("Enter")
        assert tab.locator("#list li").count() == 0
        assert tab.evaluate("document.activeElement.id") == "files"
        assert not tab.is_visible("#viewer")


@in_browser
def test_it_is_read_anywhere(browser: Any, models: Models, kinds: Path, tmp_path: Path) -> None:
    (tmp_path / f"{'a long name ' * 12}.txt").write_text("no picture")
    shutil.copy(kinds / "large jpg.jpg", tmp_path / f"{'aLongNameWithoutASpace' * 6}.jpg")
    for size in (PHONE, DESKTOP):
        with opened(browser, models("classes")[0], viewport=size) as tab:
            segment(tab, [*tmp_path.iterdir()])
            tab.wait_for_selector("#viewer:not([hidden])")
            wide = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
            assert tab.evaluate(wide) <= size["width"]
            # all of the picture is seen at once
            box = tab.locator("#layers").bounding_box()
            assert box["height"] <= 0.76 * size["height"]
            assert box["width"] / box["height"] == pytest.approx(1100 / 1700, rel=0.01)
            for scheme in ("light", "dark"):
                tab.emulate_media(color_scheme=scheme)
                colours_of = """names => names.map(name => {
                    const found = getComputedStyle(document.querySelector(name));
                    return [found.color, found.backgroundColor]; })"""
                names = ["body", "h1", ".soft", ".notice", "#list .refused span", "label.button", "#clear", "th", "td"]
                shades = [[numbers(one) for one in pair] for pair in tab.evaluate(colours_of, names)]
                paper = shades[0][1]
                assert (sum(paper[:3]) < 150) == (scheme == "dark")
                for name, (front, back) in zip(names, shades, strict=True):
                    assert contrast(front, back if len(back) < 4 or back[3] else paper) >= 4.5, (name, scheme)


def numbers(colour: str) -> list[float]:
    return [float(one) for one in re.findall(r"[\d.]+", colour)]


def contrast(front: list[float], back: list[float]) -> float:
    """As WCAG 2 defines it."""

    def luminance(colour: list[float]) -> float:
        shares = [one / 255 for one in colour[:3]]
        linear = [share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(front), luminance(back)))
    return (high + 0.05) / (low + 0.05)


@in_browser
def test_a_screen_reader_finds_its_way(browser: Any, models: Models, kinds: Path) -> None:
    with opened(browser, models("classes")[0]) as tab:
        segment(tab, [kinds / "rgb png.png", kinds / "of one colour png.png"])
        tab.wait_for_selector("#viewer:not([hidden])")
        assert tab.evaluate("document.documentElement.lang") == "en"
        assert tab.evaluate("[...document.querySelectorAll('h1, h2')].map(one => one.tagName)") == ["H1", "H2", "H2"]
        for role, name in (
            ("button", "Save all masks"), ("button", "rgb png.png"), ("slider", "Opacity of the area"),
            ("checkbox", "Outline"), ("textbox", "Pixel size in mm, of all pictures"), ("link", "Save the mask"),
            ("region", "Pictures"), ("list", "Pictures"),
        ):  # fmt: skip
            assert tab.get_by_role(role, name=name, exact=True).count() == 1, (role, name)
        assert tab.get_by_label("Choose pictures").count() == 1
        assert tab.locator("[role=status][aria-live=polite]").inner_text() == "2 segmented."
        label = tab.get_by_role("img").get_attribute("aria-label")
        assert re.fullmatch(r"rgb png\.png, outlined: cup \d+ px², [\d.]+ %; disc \d+ px², [\d.]+ %", label)
        assert tab.get_by_role("button", name="rgb png.png").get_attribute("aria-current") == "true"
        described = tab.get_by_role("button", name="rgb png.png").get_attribute("aria-describedby")
        assert "cup" in tab.inner_text(f"#{described}")


@in_browser
def test_the_model_and_the_runtime_are_in_the_page(models: Models) -> None:
    import onnx

    path = models("cmunext_busi")[0]
    text = path.read_text()
    blocks = dict(re.findall(r'<script type="text/plain" id="(program|wasm|model)">([^<]*)</script>', text))
    contents = {name: gzip.decompress(base64.b64decode(block)) for name, block in blocks.items()}
    hashes = [hashlib.sha256(contents[name]).hexdigest() for name in ("program", "wasm")]
    assert hashes == [*page.RUNTIME.values()]
    onnx.checker.check_model(onnx.load_from_string(contents["model"]))
    assert json.loads(path.with_name(path.name + ".parity.json").read_text())["passed"]
