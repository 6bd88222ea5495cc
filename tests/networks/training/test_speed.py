from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.profiler import profile

from networks import VMUNet, cmunext_s
from networks.training import (
    Autocast,
    load_trained,
    prepare_network,
)
from tests.golden import fill


class SeesPlainTensors(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not isinstance(x, MetaTensor)
        self.autocast = torch.is_autocast_enabled("cpu")
        y = self.layer(x)
        self.dtype = y.dtype
        return y


@pytest.mark.parametrize(("amp", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_autocast_keeps_metadata_and_returns_float32(amp: str, dtype: torch.dtype) -> None:
    network = SeesPlainTensors()
    prepared = prepare_network(network, torch.device("cpu"), amp)
    image = MetaTensor(torch.randn(2, 3), meta={"filename_or_obj": "a.png"})
    image.is_batch = True
    out = prepared(image)
    assert network.dtype == dtype
    assert network.autocast == (amp == "bfloat16")
    assert out.dtype == torch.float32
    assert out.meta["filename_or_obj"] == "a.png"
    assert out.is_batch
    plain = prepared(image.as_tensor())
    assert type(plain) is torch.Tensor
    torch.testing.assert_close(plain, network.layer(image.as_tensor()), atol=0.05 if amp == "bfloat16" else 0, rtol=0)
    out.sum().backward()
    torch.testing.assert_close(network.layer.weight.grad, image.as_tensor().sum(0).expand(3, 3), atol=0.05, rtol=0)


def test_an_outer_autocast_is_left_alone() -> None:
    network = SeesPlainTensors()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Autocast(network, bfloat16=False)(torch.ones(2, 3))
    assert network.dtype == torch.bfloat16


def test_words_that_a_switch_may_be() -> None:
    for switch in ("channels_last", "compile"):
        with pytest.raises(ValueError, match=f"{switch} must be True, False or 'auto', not 'false'"):
            prepare_network(nn.Linear(1, 1), "cpu", **{switch: "false"})
    with pytest.raises(ValueError, match="amp_dtype must be float32, bfloat16 or auto, not 'half'"):
        prepare_network(nn.Linear(1, 1), "cpu", "half")


@pytest.mark.parametrize(("channels", "needed"), [(1, 3), (3, 1), (3, 9)])
@pytest.mark.parametrize("says", [True, False])
def test_an_output_that_does_not_fit_the_classes_is_refused(channels: int, needed: int, says: bool) -> None:
    """A network of this project says what it answers with; any other shows it when it runs."""
    network = cmunext_s(out_channels=channels) if says else nn.Conv2d(3, channels, 1)
    with pytest.raises(ValueError, match=rf"answers with {channels} channels?, and the classes need {needed}"):
        prepare_network(network, "cpu", out_channels=needed)(torch.zeros(1, 3, 32, 32))
    assert prepare_network(network, "cpu", out_channels=channels)(torch.zeros(1, 3, 32, 32)).shape[1] == channels
    if says:
        with pytest.raises(ValueError, match=f"the classes need {needed}"):
            load_trained(network, "model.pt", wanted=False, out_channels=needed)


def test_compiling_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"--compile true needs a C\+\+ compiler"):
        prepare_network(nn.Linear(1, 1), "cpu", compile=True)


@pytest.mark.parametrize("switches", [{"channels_last": True}, {"frozen": True}, {"channels_last": False}])
def test_switches_change_how_not_what(switches: dict[str, Any]) -> None:
    torch.manual_seed(0)
    network, image = cmunext_s().eval(), torch.randn(2, 3, 32, 48)
    fill.fill(network.state_dict())
    with torch.no_grad():
        expected = network(image)
        torch.testing.assert_close(
            prepare_network(network, torch.device("cpu"), **switches)(image), expected, rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("network", [cmunext_s(), VMUNet(dims=(8, 16, 32, 64))], ids=["conv", "scan"])
def test_frozen_bfloat16_is_autocast_without_casting_weights(network: nn.Module) -> None:
    fill.fill(network.state_dict())
    network.eval()
    image, cpu = torch.randn(1, 3, 32, 32), torch.device("cpu")
    with torch.no_grad():
        # norms folded, weights in float32 as they are
        expected = prepare_network(network.frozen(), cpu, "bfloat16")(image)
        prepared = prepare_network(network, cpu, "bfloat16", frozen=True)
        assert torch.equal(prepared(image), expected)
    assert any(parameter.dtype is torch.bfloat16 for parameter in prepared.parameters())
    assert all(parameter.dtype is torch.float32 for parameter in network.parameters())


class OneConvolution(nn.Module):  # a plain nn.Conv2d or nn.Sequential is not compiled
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


@pytest.mark.skipif(
    shutil.which("c++") is None or not torch.backends.mkldnn.is_available(),
    reason="torch.compile needs a C++ compiler, and x86 or Arm for oneDNN",
)
def test_compiled_frozen_network_computes_the_same() -> None:
    network, image = OneConvolution().eval(), torch.randn(1, 3, 16, 16)
    prepared = prepare_network(network, torch.device("cpu"), channels_last=True, compile=True, frozen=True)
    with torch.inference_mode():
        expected = network(image)
        torch.testing.assert_close(prepared(image), expected)
        with profile() as seen:
            prepared(image)
    # PyTorch chooses the layout of weights that it may take for constants
    assert any(event.key.startswith("mkldnn::_convolution_pointwise") for event in seen.key_averages())


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")
def test_freed_memory_is_kept() -> None:
    code = """if True:
        import resource, torch
        from networks.training import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(4):
                torch.ones(7 << 20)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        given_back = faults()
        took_effect = keep_freed_memory()
        faults()
        print(took_effect, given_back, faults())
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    took_effect, given_back, kept = out.split()
    assert took_effect == "True"
    assert int(kept) < int(given_back) / 2
