"""The Triton kernels against the float64 reference: in Triton's interpreter, and on a GPU where there is one."""

from __future__ import annotations

import concurrent.futures
import functools
import importlib.util
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from networks.selective_scan import reference, triton_scan
from tests.golden import fill

Arrays = dict[str, Any]
Run = Callable[..., Arrays]

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "selective_scan.npz"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Callable[..., Any]]:
    """A process in which Triton interprets its kernels: it decides that once, when it is imported."""
    with (
        pytest.MonkeyPatch.context() as patch,
        concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(torch.set_num_threads, 1).result()
        patch.undo()
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


@pytest.fixture(params=["interpreter", "cuda"])
def run(request: pytest.FixtureRequest) -> Run:
    """`_run`, there or here."""
    if request.param == "interpreter":
        process = request.getfixturevalue("interpreter")
        return lambda *arguments: process(_run, *arguments)
    if triton_scan.unavailable():
        pytest.skip(triton_scan.unavailable())
    return functools.partial(_run, device="cuda")


def _inputs_1d(batch: int, groups: int, width: int, length: int, state: int) -> Arrays:
    g = np.random.default_rng(0)
    channels = groups * width
    return {
        "u": g.standard_normal((batch, channels, length)),
        "delta": 0.5 * g.standard_normal((batch, channels, length)),
        "A": -np.exp(0.5 * g.standard_normal((channels, state))),
        "B": g.standard_normal((batch, groups, state, length)),
        "C": g.standard_normal((batch, groups, state, length)),
        "D": g.standard_normal(channels),
        "delta_bias": g.standard_normal(channels) - 1,
    }


def _inputs_2d(batch: int, height: int, width: int, channels: int, rank: int, state: int) -> Arrays:
    g = np.random.default_rng(0)
    return {
        "x": g.standard_normal((batch, height, width, channels)),
        "x_dbl": g.standard_normal((batch, height, width, 4, rank + 2 * state)),
        "dt_weight": g.standard_normal((4, channels, rank)) * rank**-0.5,
        "A": -np.exp(0.5 * g.standard_normal((4 * channels, state))),
        "D": g.standard_normal(4 * channels),
        "dt_bias": g.standard_normal((4, channels)) - 1,
    }


def _run(
    module: str,
    inputs: Arrays,
    dtype: str = "float32",
    options: dict[str, Any] | None = None,
    cotangent: np.ndarray | None = None,
    device: str = "cpu",
) -> Arrays:
    """The output and the gradient of every input, as float64, by name; the inputs' names tell which scan.

    Arrays go in and come out, and the module's name, so that another process can do it.
    """
    scan = getattr(sys.modules[module], "selective_scan_2d" if "x" in inputs else "selective_scan")
    leaves = {
        name: None if a is None else torch.tensor(a, dtype=getattr(torch, dtype), device=device).requires_grad_()
        for name, a in inputs.items()
    }
    y = scan(**leaves, **(options or {}))
    if cotangent is None:
        cotangent = np.random.default_rng(1).standard_normal(y.shape)
    y.backward(torch.tensor(cotangent, dtype=y.dtype, device=device))
    results = {"y": y.detach(), **{f"grad_{name}": t.grad for name, t in leaves.items() if t is not None}}
    assert y.dtype == getattr(torch, dtype)
    return {name: t.cpu().double().numpy() for name, t in results.items()}


def _assert_close(results: Arrays, expected: Arrays, tolerance: float) -> None:
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert value.shape == expected[name].shape, name
        error = np.linalg.norm(value - expected[name])
        assert error <= tolerance * np.linalg.norm(expected[name]), f"{name}: {error:.2g}"


def _compare(run: Run, inputs: Arrays, segments: int = 0, **options: Any) -> None:
    expected = _run(reference.__name__, inputs, "float64", options)
    results = run(triton_scan.__name__, inputs, "float32", {**options, "segments": segments})
    _assert_close(results, expected, 2e-6)


@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        # batch, height, width, channels, rank, state
        pytest.param((1, 1, 1, 1, 1, 1), 0, id="single"),
        pytest.param((2, 3, 4, 5, 3, 2), 0, id="batch"),
        pytest.param((1, 2, 3, 70, 2, 3), 0, id="blocks of channels, padded state"),
        pytest.param((1, 1, 9, 3, 5, 1), 0, id="row"),
        pytest.param((1, 11, 6, 2, 1, 1), 2, id="chunks and segments"),
    ],
)
def test_2d(run: Run, shape: tuple[int, ...], segments: int) -> None:
    _compare(run, _inputs_2d(*shape), segments=segments)


@pytest.mark.parametrize(
    ("shape", "segments"),
    [
        # batch, groups, width, length, state
        pytest.param((2, 2, 3, 10, 4), 0, id="groups"),
        pytest.param((1, 1, 33, 130, 1), 2, id="segments of two chunks and one"),
    ],
)
def test_1d(run: Run, shape: tuple[int, ...], segments: int) -> None:
    _compare(run, _inputs_1d(*shape), segments=segments, delta_softplus=True)


def test_1d_without_softplus_bias_and_skip(run: Run) -> None:
    inputs = {**_inputs_1d(1, 2, 3, 12, 2), "D": None, "delta_bias": None}
    inputs["delta"] = np.abs(inputs["delta"])
    _compare(run, inputs, delta_softplus=False)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision_is_computed_in_float32(run: Run, dtype: str) -> None:
    """Nothing is lost but what rounding the inputs and the result loses."""
    eps = torch.finfo(getattr(torch, dtype)).eps

    def rounded(inputs: Arrays) -> Arrays:
        return {name: torch.tensor(a).to(getattr(torch, dtype)).double().numpy() for name, a in inputs.items()}

    cotangent = rounded({"y": np.random.default_rng(1).standard_normal((1, 2, 4, 3))})["y"]
    inputs = rounded(_inputs_2d(1, 2, 4, 3, 2, 2))
    expected = _run(reference.__name__, inputs, "float64", cotangent=cotangent)
    _assert_close(run(triton_scan.__name__, inputs, dtype, {}, cotangent), expected, eps)
    inputs = rounded(_inputs_1d(1, 2, 2, 7, 2))
    expected = _run(reference.__name__, inputs, "float64", {"delta_softplus": True})
    _assert_close(run(triton_scan.__name__, inputs, dtype, {"delta_softplus": True}), expected, eps)


def test_golden(run: Run) -> None:
    """The first of the four groups of the published implementation's result."""
    own = slice(0, 6)

    def noise(name: str, *shape: int) -> np.ndarray:
        return fill._noise(name, shape, 0)

    inputs = {
        "u": noise("scan_u", 2, 24, 37)[:, own],
        "delta": 0.5 * noise("scan_delta", 2, 24, 37)[:, own],
        "A": -np.exp(0.5 * noise("scan_A", 24, 16))[own],
        "B": noise("scan_B", 2, 4, 16, 37)[:, :1],
        "C": noise("scan_C", 2, 4, 16, 37)[:, :1],
        "D": noise("scan_D", 24)[own],
        "delta_bias": noise("scan_bias", 24)[own] - 1,
    }
    cotangent = noise("scan_cotangent", 2, 24, 37)[:, own]
    results = run(triton_scan.__name__, inputs, "float32", {"delta_softplus": True}, cotangent)
    with np.load(GOLDEN) as golden:
        first = {"grad_A": own, "grad_D": own, "grad_delta_bias": own, "grad_B": np.s_[:, :1], "grad_C": np.s_[:, :1]}
        expected = {name: golden[name][first.get(name, np.s_[:, own])] for name in golden.files}
    _assert_close(results, expected, 1e-5)


def test_extreme_steps(run: Run) -> None:
    """Softplus and its slope where exp overflows, where it rounds to nothing, and where its series ends."""
    inputs = _inputs_1d(1, 1, 1, 24, 2)
    inputs["delta"] = np.concatenate([np.linspace(-60, 90, 16), np.linspace(-2.4, -1.2, 8)])[None, None]
    inputs["delta_bias"] = np.zeros(1)
    expected = _run(reference.__name__, inputs, "float64", {"delta_softplus": True})
    results = run(triton_scan.__name__, inputs, "float32", {"delta_softplus": True})
    for name in ("y", "grad_u", "grad_delta"):
        np.testing.assert_allclose(results[name], expected[name], rtol=1e-4, atol=1e-30)


def _operators() -> None:
    """The operators keep PyTorch's rules, and torch.compile takes them whole."""

    def normalized(delta: Tensor | None, groups: int, rank: int) -> tuple[Tensor | None, ...]:
        g = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, 3, 2, generator=g) if delta is None else torch.randn(delta.shape, generator=g)
        projected = torch.randn(1, 6, groups, rank + 2, generator=g)
        weight, A = torch.randn(groups, rank, 2, generator=g), -torch.rand(groups, 1, 2, generator=g)
        return x, delta, projected, weight, A, torch.randn(groups, 2), torch.randn(groups, 2)

    scan = torch.ops.selective_scan.triton_scan
    for tensors in (normalized(None, 4, 1), normalized(torch.randn(1, 6, 4), 2, 0)):
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_()
        torch.library.opcheck(scan, (*tensors, True, True, 0))
    plain = [None if tensor is None else tensor.detach() for tensor in tensors]
    y, states = scan(*plain, True, True, 0)
    torch.library.opcheck(torch.ops.selective_scan.triton_scan_backward, (y, states, *plain, True, 0))

    inputs = {name: torch.tensor(a, dtype=torch.float32) for name, a in _inputs_2d(1, 2, 3, 2, 1, 1).items()}
    inputs["x"].requires_grad_()
    compiled = torch.compile(triton_scan.selective_scan_2d, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), triton_scan.selective_scan_2d(**inputs))
    compiled(**inputs).sum().backward()
    assert inputs["x"].grad is not None


def test_operators(interpreter: Callable[..., Any]) -> None:
    interpreter(_operators)


def test_empty_batch() -> None:
    inputs = {name: torch.tensor(a).float() for name, a in _inputs_2d(1, 2, 3, 2, 1, 1).items()}
    for name in ("x", "x_dbl"):
        inputs[name] = inputs[name][:0]
    inputs["A"].requires_grad_()
    y = triton_scan.selective_scan_2d(**inputs)
    y.sum().backward()
    assert y.shape == (0, 2, 3, 2)
    assert not inputs["A"].grad.any()


@pytest.mark.parametrize("kernel", ["segment_ends", "carry", "forward", "backward", "merge"])
def test_kernel_compiles_for_a_gpu(kernel: str) -> None:
    """To machine code for compute capability 8.0. The interpreter accepts more than the compiler."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: Triton compiles nothing")
    import triton
    from triton.backends.compiler import GPUTarget

    from networks.selective_scan import triton_kernels

    constants = {
        **{"GROUPS": 4, "RANK": 6, "STATE": 16, "STATE_BLOCK": 16, "IMAGE": True, "SOFTPLUS": True, "SAVE": True},
        **{"ADJOINT": True, "PARTS": 4, "AHEAD": 8, "TILE": triton_scan.TILE, "CHUNK": triton_scan.CHUNK},
        "BLOCK": triton_scan.BLOCK,
    }
    numbers = ("batch", "length", "height", "width", "channels", "segments", "segment_tiles", "segment_chunks", "size")
    function = getattr(triton_kernels, kernel)
    signature = {}
    for parameter in function.params:
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
        elif parameter.name in numbers:
            signature[parameter.name] = "i32"
        else:
            signature[parameter.name] = "*bf16" if parameter.name in ("x", "delta", "values", "grad_y") else "*fp32"
    source = triton.compiler.ASTSource(function, signature, {k: v for k, v in constants.items() if k in signature})
    compiled = triton.compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
    assert compiled.asm["cubin"]
