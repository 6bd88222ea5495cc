import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from networks import VMUNet, cmunext_s, load_weights

SMALL = {"dims": (8, 16, 32, 64), "depths": (2, 1, 1, 1), "decoder_depths": (1, 1, 1, 2), "d_state": 4}


@pytest.fixture
def network() -> VMUNet:
    torch.manual_seed(0)
    return VMUNet(**SMALL)


@pytest.fixture
def other() -> VMUNet:
    torch.manual_seed(1)
    return VMUNet(**SMALL)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


WRAPPINGS = {
    "bare": lambda state: state,
    "published": lambda state: OrderedDict((f"vmunet.{name}", tensor) for name, tensor in state.items()),
    "data parallel": lambda state: {f"module.vmunet.{name}": tensor for name, tensor in state.items()},
    "training run": lambda state: {"epoch": 7, "model_state_dict": state, "optimizer_state_dict": {"state": {}}},
    "MONAI": lambda state: {"model": state, "optimizer": {"param_groups": []}},
    "nested twice": lambda state: {"state_dict": {"network": {f"vmunet.{n}": t for n, t in state.items()}}},
    "compiled": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "compiled in parallel": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in state.items()},
    "Lightning": lambda state: {"state_dict": {f"model.{n}": t for n, t in state.items()}, "epoch": 3},
    "averaged": lambda state: {"n_averaged": torch.tensor(9), **{f"ema.{n}": t for n, t in state.items()}},
    "nnU-Net": lambda state: {"network_weights": state, "trainer_name": "nnUNetTrainer"},
    "with a counter": lambda state: {"epoch": torch.tensor(7), "state_dict": state},
    "profiled": lambda state: {"total_ops": torch.zeros(1), **{f"vmunet.{n}": t for n, t in state.items()}},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_published_and_own_formats(wrapping: str, network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(WRAPPINGS[wrapping](other.state_dict()), path)
    report = load_weights(network, path)
    assert same(network, other)
    assert report.share == 1
    assert report.matched == list(network.state_dict())
    assert report.missing == report.mis_shaped == report.unexpected == report.left_random == []
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def vmamba(source: VMUNet) -> dict[str, Tensor]:
    """The checkpoint of a classifier: the encoder with one block more in the last stage, and a head."""
    state = {name: t for name, t in source.state_dict().items() if name.startswith(("patch_embed", "layers."))}
    extra = {name.replace(".0.", ".1.", 1): t for name, t in state.items() if name.startswith("layers.3.blocks.0.")}
    return {**state, **extra, "classifier.head.weight": torch.zeros(1000, 64)}


def test_vmamba_start_fills_encoder_and_mirrored_decoder(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save({"model": vmamba(other)}, tmp_path / "vmamba.pth")
    report = load_weights(network, tmp_path / "vmamba.pth", start=True)
    after, source, left = network.state_dict(), other.state_dict(), []
    for name, tensor in after.items():
        if name.startswith(("patch_embed", "layers.")):
            assert torch.equal(tensor, source[name]), name
        elif ".blocks." in name:
            stage, rest = name.removeprefix("layers_up.").split(".", 1)
            assert torch.equal(tensor, source[f"layers.{3 - int(stage)}.{rest}"]), name
        else:
            assert torch.equal(tensor, before[name]), name
            left.append(name)
    assert report.share == 1
    assert report.expected == sum(name.startswith(("patch_embed", "layers.")) or ".blocks." in name for name in after)
    assert "classifier.head.weight" in report.unexpected
    assert report.left_random == left
    assert ", ".join(left) in str(report)


def test_partial_weights_raise_and_leave_the_network_alone(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = dict(other.state_dict())
    state["head.weight"] = state.pop("final_conv.weight")
    state["patch_embed.proj.weight"] = torch.zeros(8, 1, 4, 4)
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match="partial.pth") as error:
        load_weights(network, tmp_path / "partial.pth")
    for part in (
        "1 missing (final_conv.weight)",
        "1 unexpected (head.weight)",
        "1 mis-shaped (patch_embed.proj.weight (8, 1, 4, 4) for (8, 3, 4, 4))",
    ):
        assert part in str(error.value)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())

    report = load_weights(network, tmp_path / "partial.pth", start=True, min_matched=0.9)
    assert report.missing == ["final_conv.weight"]
    assert len(report.matched) == report.expected - 2


def test_a_new_head_is_asked_for(network: VMUNet, tmp_path: Path) -> None:
    three = VMUNet(out_channels=3, **SMALL)
    torch.save(three.state_dict(), tmp_path / "three.pth")
    before = network.final_conv.weight.clone()
    for options in ({}, {"start": True}):
        with pytest.raises(ValueError, match=r"of 3 output channels, the model of 1: .* \(--new_head true\)"):
            load_weights(network, tmp_path / "three.pth", **options)
    with pytest.raises(ValueError, match="start=True as well"):
        load_weights(network, tmp_path / "three.pth", new_head=True)
    report = load_weights(network, tmp_path / "three.pth", start=True, new_head=True)
    assert report.left_random == ["final_conv.weight", "final_conv.bias"]
    assert report.share == 1
    assert torch.equal(network.final_conv.weight, before)
    assert torch.equal(network.patch_embed.proj.weight, three.patch_embed.proj.weight)


@pytest.mark.parametrize("kept", ["of as many classes", "of none"])
def test_a_new_head_is_new_whatever_the_file_holds_of_it(
    kept: str, network: VMUNet, other: VMUNet, tmp_path: Path
) -> None:
    state = {n: t for n, t in other.state_dict().items() if kept != "of none" or not n.startswith("final_conv.")}
    torch.save(state, tmp_path / "a.pt")
    before = network.final_conv.weight.clone()
    report = load_weights(network, tmp_path / "a.pt", start=True, new_head=True)
    assert report.left_random == ["final_conv.weight", "final_conv.bias"]
    assert "left random: final_conv.weight, final_conv.bias" in str(report)
    assert torch.equal(network.final_conv.weight, before)
    assert torch.equal(network.patch_embed.proj.weight, other.patch_embed.proj.weight)


@pytest.mark.parametrize("layer", ["norm", "patch_embed"])
def test_no_other_layer_is_taken_for_a_head(layer: str, network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    """Tensors that differ in the first dimension alone, as those of a head of other classes do."""
    name = {"norm": "layers.0.blocks.0.ln_1.weight", "patch_embed": "patch_embed.proj.weight"}[layer]
    state = other.state_dict()
    torch.save({**state, name: torch.ones(7, *state[name].shape[1:])}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"1 mis-shaped \({name}") as caught:
        load_weights(network, tmp_path / "a.pt", start=True, new_head=True)
    assert "--new_head" not in str(caught.value)


def test_a_head_may_be_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unnamed, source = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)) for _ in range(2))
    torch.save(source.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match="does not say which layer is its head: name it, --new_head 1 for instance"):
        load_weights(unnamed, tmp_path / "a.pt", start=True, new_head=True)
    with pytest.raises(ValueError, match="has no layer 'head'"):
        load_weights(unnamed, tmp_path / "a.pt", start=True, new_head="head")
    report = load_weights(unnamed, tmp_path / "a.pt", start=True, new_head="1")
    assert report.left_random == ["1.weight", "1.bias"]
    assert torch.equal(unnamed[0].weight, source[0].weight)


def test_safetensors(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    safetensors.torch.save_file({f"module.{n}": t for n, t in other.state_dict().items()}, tmp_path / "a.safetensors")
    load_weights(network, tmp_path / "a.safetensors")
    assert same(network, other)


def test_a_name_that_begins_like_a_prefix_stays(tmp_path: Path) -> None:
    network = nn.ModuleDict({"model": nn.Linear(2, 1)})
    for prefix in ("", "module.", "model."):
        torch.save({f"{prefix}{name}": tensor for name, tensor in network.state_dict().items()}, tmp_path / "a.pt")
        assert load_weights(network, tmp_path / "a.pt").share == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_may_be_stored_in_another_precision(dtype: torch.dtype, other: VMUNet, tmp_path: Path) -> None:
    torch.save(as_type(other, dtype), tmp_path / "a.pt")
    network = VMUNet(**SMALL)
    load_weights(network, tmp_path / "a.pt")
    assert network.final_conv.weight.dtype == torch.float32


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_is_seen(seed: int, other: VMUNet, network: VMUNet, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save(other.state_dict(), path)
    content = bytearray(path.read_bytes())
    name, tensor = list(other.state_dict().items())[7 * seed]
    start = content.find(tensor.numpy().tobytes())
    assert start > 0, name
    content[start + 1] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt is damaged: the checksum"):
        load_weights(network, path)


class Payload:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_files_never_execute(network: VMUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth holds Python objects \([\w.]+\), which are never loaded"):
        load_weights(network, tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


def renamed(network: VMUNet, *prefixes: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": t for prefix in prefixes for name, t in network.state_dict().items()}


def as_type(network: VMUNet, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}


def nested_in_itself(_: VMUNet) -> dict[str, object]:
    content: dict[str, object] = {}
    content["model"] = content
    return content


# What a file holds, made from a network that fits, and what is said of it.
REFUSED: dict[str, tuple[Callable[[VMUNet], object], str]] = {
    "a classifier": (lambda other: {"model": vmamba(other)}, "all must match"),
    "deeper": (
        lambda _: VMUNet(**{**SMALL, "depths": (3, 1, 1, 1)}).state_dict(),
        r"the model has no layers\.0\.blocks\.2\S+: it is smaller than the network that the file is of",
    ),
    "two sets": (
        lambda other: {"state_dict": renamed(other, "model.", "ema.")},
        r"two sets of weights, model\.\S+ and ema\.\S+ for instance",
    ),
    "a prefix": (lambda other: renamed(other, "backbone."), r"the file's names begin with 'backbone\.'"),
    "other names": (
        lambda _: {"odd": torch.zeros(1)},
        r"the file names 'odd' for instance, the model 'patch_embed",
    ),
    "infinite": (
        lambda other: {**other.state_dict(), "final_conv.bias": torch.tensor([torch.inf])},
        r"final_conv\.bias holds values that are not finite",
    ),
    "whole numbers": (lambda other: as_type(other, torch.int64), r"is torch\.int64, expected torch\.float32"),
    "complex": (lambda other: as_type(other, torch.complex64), r"is torch\.complex64, expected torch\.float32"),
    "8 bits": (lambda other: as_type(other, torch.float8_e4m3fn), r"is torch\.float8_e4m3fn, expected torch\.float32"),
    "sparse": (
        lambda other: {**other.state_dict(), "final_conv.bias": torch.ones(1).to_sparse()},
        r"final_conv\.bias is a sparse, quantized or empty tensor",
    ),
    "nested in itself": (nested_in_itself, "holds no tensors"),
    "a list": (lambda _: [1, 2], "holds a list, not a state_dict"),
    "a note": (lambda _: {"model": {"note": "none"}}, "holds no tensors"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_fit_is_refused(kind: str, network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    content, message = REFUSED[kind]
    before = copy.deepcopy(network)
    torch.save(content(other), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=rf"a\.pt.*{message}") as caught:
        load_weights(network, tmp_path / "a.pt")
    assert "\n" not in str(caught.value)
    assert same(network, before)


def test_a_start_needs_a_classifier_of_the_same_generation(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    odd = {name.replace("self_attention", "op"): tensor for name, tensor in vmamba(other).items()}
    torch.save({"model": odd}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt .* missing \(layers\.0\.blocks\.0\.self_attention"):
        load_weights(network, tmp_path / "a.pt", start=True)


def test_the_models_own_prefix_is_named(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    torch.save(other.state_dict(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"the model's names begin with 'inner\.'"):
        load_weights(nn.ModuleDict({"inner": network}), tmp_path / "a.pt")


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"not a checkpoint", b"PK\x03\x04 cut short", b"\x08\0\0\0\0\0\0\0{}broken"])
def test_files_that_are_no_checkpoints(content: bytes, name: str, network: VMUNet, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is damaged, or no checkpoint of torch.save or safetensors") as caught:
        load_weights(network, tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_else_lies_where_weights_should(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    with pytest.raises(FileNotFoundError, match=r"no weight file .*a\.pt"):
        load_weights(network, path)
    with pytest.raises(ValueError, match="is a folder: name the file in it"):
        load_weights(network, tmp_path)
    path.touch()
    with pytest.raises(ValueError, match=r"a\.pt is empty: copy it again"):
        load_weights(network, path)
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)
    with pytest.raises(ValueError, match=r"a\.pt is a TorchScript program"):
        load_weights(network, path)
    # the content tells what a file is
    safetensors.torch.save_file(other.state_dict(), path)
    load_weights(network, path)
    assert same(network, other)


@pytest.mark.parametrize("build", [cmunext_s, lambda: VMUNet(**SMALL)], ids=["CMUNeXt", "VMUNet"])
def test_networks_themselves_refuse_what_are_no_weights(build: Callable[[], nn.Module]) -> None:
    """So do MONAI's own commands, which know nothing of `load_weights`."""
    network = build()
    state = network.state_dict()
    name = next(reversed(state))
    with pytest.raises(RuntimeError, match=rf"{name} holds values that are not finite"):
        network.load_state_dict({**state, name: torch.full_like(state[name], torch.inf)})
    with pytest.raises(RuntimeError, match=rf"{name} holds values that are not finite"):
        network.load_state_dict({**state, name: torch.full_like(state[name], 1e200, dtype=torch.float64)})
    with pytest.raises(RuntimeError, match=rf"{name} is torch.int64, expected torch.float32"):
        network.load_state_dict({**state, name: state[name].long()})
    network.load_state_dict(state)


def test_several_sets_of_weights_in_one_file_are_refused(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    for first, second in (("state_dict", "model"), ("model", "net"), ("model_state_dict", "network_weights")):
        torch.save({first: network.state_dict(), second: other.state_dict()}, tmp_path / "a.pt")
        with pytest.raises(ValueError, match=f"several sets of weights, under {first} and {second}"):
            load_weights(network, tmp_path / "a.pt")
    # averaged ones, under a name and a prefix of another program's own
    averaged = {f"module.{name}": tensor for name, tensor in other.state_dict().items()} | {"n_averaged": torch.ones(1)}
    torch.save({"model": network.state_dict(), "model_ema": averaged, "epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="several sets of weights, under model and model_ema"):
        load_weights(network, tmp_path / "a.pt")
    torch.save({"model": other.state_dict(), "state_dict": {}, "net": {"epoch": 3}}, tmp_path / "a.pt")
    load_weights(network, tmp_path / "a.pt")
    assert same(network, other)


def test_weights_that_are_all_zero_are_refused(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = {name: tensor if tensor.ndim < 2 else torch.zeros_like(tensor) for name, tensor in before.items()}
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"a\.pt: all its weights are 0"):
        load_weights(network, tmp_path / "a.pt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
