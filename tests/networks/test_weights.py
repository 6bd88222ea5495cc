import hashlib
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from networks import VMUNet, load_weights

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
    assert report.missing == report.mis_shaped == []
    assert report.unexpected == (["total_ops"] if wrapping == "profiled" else [])
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def vmamba(source: VMUNet) -> dict[str, Tensor]:
    """The checkpoint of a classifier: the encoder with one block more in the last stage, and a head."""
    state = {name: t for name, t in source.state_dict().items() if name.startswith(("patch_embed", "layers."))}
    extra = {name.replace(".0.", ".1.", 1): t for name, t in state.items() if name.startswith("layers.3.blocks.0.")}
    return {**state, **extra, "classifier.head.weight": torch.zeros(1000, 64)}


def test_vmamba_start_fills_encoder_and_mirrored_decoder(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    torch.save({"model": vmamba(other)}, tmp_path / "vmamba.pth")
    report = load_weights(network, tmp_path / "vmamba.pth")
    after, source = network.state_dict(), other.state_dict()
    for name, tensor in after.items():
        if name.startswith(("patch_embed", "layers.")):
            assert torch.equal(tensor, source[name]), name
        elif ".blocks." in name:
            stage, rest = name.removeprefix("layers_up.").split(".", 1)
            assert torch.equal(tensor, source[f"layers.{3 - int(stage)}.{rest}"]), name
        else:
            assert torch.equal(tensor, before[name]), name
    assert report.share == 1
    assert report.expected == sum(name.startswith(("patch_embed", "layers.")) or ".blocks." in name for name in after)
    assert "classifier.head.weight" in report.unexpected


def test_vmamba_of_another_generation_is_refused(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    renamed = {name.replace("self_attention", "op"): tensor for name, tensor in vmamba(other).items()}
    torch.save({"model": renamed}, tmp_path / "vmamba.pth")
    with pytest.raises(ValueError, match=r"vmamba.pth .* missing \(layers\.0\.blocks\.0\.self_attention"):
        load_weights(network, tmp_path / "vmamba.pth")


def test_partial_weights_raise_and_leave_the_network_alone(network: VMUNet, other: VMUNet, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = dict(other.state_dict())
    state["head.weight"] = state.pop("final_conv.weight")
    state["patch_embed.proj.weight"] = torch.zeros(8, 1, 4, 4)
    torch.save(state, tmp_path / "partial.pth")
    with pytest.raises(ValueError, match="partial.pth") as error:
        load_weights(network, tmp_path / "partial.pth", min_matched=1.0)
    for part in (
        "1 missing (final_conv.weight)",
        "1 unexpected (head.weight)",
        "1 mis-shaped (patch_embed.proj.weight (8, 1, 4, 4) for (8, 3, 4, 4))",
    ):
        assert part in str(error.value)
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())

    report = load_weights(network, tmp_path / "partial.pth", min_matched=0.9)
    assert report.missing == ["final_conv.weight"]
    assert len(report.matched) == report.expected - 2


class Payload:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_files_never_execute(network: VMUNet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil.pth is not a checkpoint of plain tensors"):
        load_weights(network, tmp_path / "evil.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"])
def test_files_that_are_no_checkpoints(content: bytes, network: VMUNet, tmp_path: Path) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="broken.pth is not a checkpoint"):
        load_weights(network, path)


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], {"model": {"note": "none"}}])
def test_checkpoints_without_tensors(content: object, network: VMUNet, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match=r"empty.pth holds"):
        load_weights(network, tmp_path / "empty.pth")


def test_missing_file(network: VMUNet, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_weights(network, tmp_path / "absent.pth")
