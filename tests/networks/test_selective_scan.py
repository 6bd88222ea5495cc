"""Every backend of the selective scan against the published implementation's goldens and the float64 reference."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor

from networks.selective_scan import available_backends, cpu, parallel, reference, selective_scan, selective_scan_2d
from tests.golden import fill

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "selective_scan.npz"
NAMES_1D = ("u", "delta", "A", "B", "C", "D", "delta_bias")

Backend = tuple[ModuleType, dict[str, Any]]
Tensors = dict[str, Tensor]

needs_kernel = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())


def _float32_backends() -> Iterator[Any]:
    """`parallel`, and the native kernel once for each instruction set."""
    yield pytest.param((parallel, {}), id="parallel")
    for level in cpu.LEVELS:
        if cpu.unavailable():
            marks = pytest.mark.skip(reason=cpu.unavailable())
        else:
            marks = pytest.mark.skipif(level not in cpu.available_levels(), reason=f"this processor has no {level}")
        yield pytest.param((cpu, {"level": level}), id=f"cpu-{level}", marks=marks)


float32_backends = pytest.mark.parametrize("backend", list(_float32_backends()))


def _inputs_1d(batch: int, groups: int, width: int, length: int, state: int, seed: int = 0) -> Tensors:
    g = torch.Generator().manual_seed(seed)
    channels = groups * width
    return {
        "u": torch.randn(batch, channels, length, generator=g, dtype=torch.float64),
        "delta": 0.5 * torch.randn(batch, channels, length, generator=g, dtype=torch.float64),
        "A": -torch.exp(0.5 * torch.randn(channels, state, generator=g, dtype=torch.float64)),
        "B": torch.randn(batch, groups, state, length, generator=g, dtype=torch.float64),
        "C": torch.randn(batch, groups, state, length, generator=g, dtype=torch.float64),
        "D": torch.randn(channels, generator=g, dtype=torch.float64),
        "delta_bias": torch.randn(channels, generator=g, dtype=torch.float64) - 1,
    }


def _inputs_2d(batch: int, height: int, width: int, channels: int, rank: int, state: int) -> Tensors:
    g = torch.Generator().manual_seed(0)
    return {
        "x": torch.randn(batch, height, width, channels, generator=g, dtype=torch.float64),
        "x_dbl": torch.randn(batch, height, width, 4, rank + 2 * state, generator=g, dtype=torch.float64),
        "dt_weight": torch.randn(4, channels, rank, generator=g, dtype=torch.float64) * rank**-0.5,
        "A": -torch.exp(0.5 * torch.randn(4 * channels, state, generator=g, dtype=torch.float64)),
        "D": torch.randn(4 * channels, generator=g, dtype=torch.float64),
        "dt_bias": torch.randn(4, channels, generator=g, dtype=torch.float64) - 1,
    }


def _run(function: Callable[..., Tensor], inputs: Tensors, dtype: torch.dtype = torch.float32) -> Tensors:
    """The output and the gradient of every input under a fixed cotangent, as float64, by name."""
    leaves = {name: t.to(dtype).clone().requires_grad_() for name, t in inputs.items()}
    y = function(**leaves)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(cotangent.to(y.dtype))
    return {"y": y.detach().double(), **{name: t.grad.double() for name, t in leaves.items()}}


def _assert_close(results: Tensors, expected: Tensors, tolerance: float) -> None:
    assert results.keys() == expected.keys()
    for name, value in results.items():
        assert value.shape == expected[name].shape
        scale = expected[name].norm()
        if name in ("A", "D", "delta_bias") and "delta" in expected:
            # These gradients are sums over positions that may cancel: rounding is measured against the terms.
            scale = max(scale, expected["delta"].norm())
        error = (value - expected[name]).norm()
        assert error <= tolerance * scale, f"{name}: {error / scale:.2g}"


def _scan_1d(backend: Backend, softplus: bool = True) -> Callable[..., Tensor]:
    module, options = backend
    return functools.partial(module.selective_scan, D=None, delta_bias=None, delta_softplus=softplus, **options)


def _scan_2d(backend: Backend) -> Callable[..., Tensor]:
    module, options = backend
    return functools.partial(module.selective_scan_2d, **options)


@functools.cache
def _expected_1d(*shape: int) -> Tensors:
    """The float64 reference on `_inputs_1d(*shape)`."""
    return _run(_scan_1d((reference, {})), _inputs_1d(*shape), torch.float64)


def _golden_inputs() -> tuple[Tensors, Tensor]:
    def noise(name: str, *shape: int) -> Tensor:
        return torch.from_numpy(fill._noise(name, shape, 0))

    return {
        "u": noise("scan_u", 2, 24, 37),
        "delta": 0.5 * noise("scan_delta", 2, 24, 37),
        "A": -torch.exp(0.5 * noise("scan_A", 24, 16)),
        "B": noise("scan_B", 2, 4, 16, 37),
        "C": noise("scan_C", 2, 4, 16, 37),
        "D": noise("scan_D", 24),
        "delta_bias": noise("scan_bias", 24) - 1,
    }, noise("scan_cotangent", 2, 24, 37)


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        pytest.param((reference, {}), torch.float64, 1e-12, id="reference-float64"),
        pytest.param((reference, {}), torch.float32, 1e-5, id="reference"),
        *(pytest.param(*p.values, torch.float32, 1e-5, id=p.id, marks=p.marks) for p in _float32_backends()),
    ],
)
def test_golden(backend: Backend, dtype: torch.dtype, tolerance: float) -> None:
    inputs, cotangent = _golden_inputs()
    leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
    y = _scan_1d(backend)(**leaves)
    y.backward(cotangent.to(dtype))
    results = {"y": y.detach(), **{f"grad_{name}": t.grad for name, t in leaves.items()}}
    with np.load(GOLDEN) as golden:
        _assert_close(results, {name: torch.from_numpy(golden[name]) for name in golden.files}, tolerance)


@float32_backends
@pytest.mark.parametrize(
    "shape",
    [
        # batch, groups, width, length, state
        (1, 1, 1, 1, 1),
        (2, 1, 16, 63, 16),
        (1, 3, 17, 64, 16),
        (3, 2, 5, 65, 4),
        (1, 4, 33, 131, 16),
        (2, 1, 48, 129, 16),
        (1, 2, 7, 30, 37),
        (1, 1, 3, 9, 256),
    ],
)
def test_1d_agrees_with_reference(backend: Backend, shape: tuple[int, ...]) -> None:
    _assert_close(_run(_scan_1d(backend), _inputs_1d(*shape)), _expected_1d(*shape), 2e-6)


@float32_backends
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True)
@hypothesis.given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    width=st.integers(1, 40),
    length=st.integers(1, 140),
    state=st.integers(1, 20),
    softplus=st.booleans(),
    skip=st.booleans(),
    bias=st.booleans(),
)
def test_1d_any_shape(
    backend: Backend,
    batch: int,
    groups: int,
    width: int,
    length: int,
    state: int,
    softplus: bool,
    skip: bool,
    bias: bool,
) -> None:
    inputs = _inputs_1d(batch, groups, width, length, state, seed=length)
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
        inputs["delta_bias"] = inputs["delta_bias"].abs()
    if not skip:
        del inputs["D"]
    if not bias:
        del inputs["delta_bias"]
    expected = _run(_scan_1d((reference, {}), softplus), inputs, torch.float64)
    _assert_close(_run(_scan_1d(backend, softplus), inputs), expected, 1e-5)


def _four_scans(x: Tensor, x_dbl: Tensor, dt_weight: Tensor, A: Tensor, D: Tensor, dt_bias: Tensor) -> Tensor:
    """The two-dimensional scan from its definition: walk the image four ways, scan, and put the results back."""
    height, width, channels = x.shape[1:]
    rank, state = dt_weight.shape[2], A.shape[1]
    total = torch.zeros_like(x)
    positions = torch.arange(height * width).reshape(height, width)
    rows, columns = positions.reshape(-1), positions.T.reshape(-1)
    for k, order in enumerate([rows, columns, rows.flip(0), columns.flip(0)]):
        own = slice(k * channels, (k + 1) * channels)
        dt, B, C = x_dbl[:, :, :, k].flatten(1, 2)[:, order].transpose(1, 2).split([rank, state, state], 1)
        u = x.flatten(1, 2)[:, order].transpose(1, 2)
        delta = torch.einsum("brl,dr->bdl", dt, dt_weight[k])
        y = reference.selective_scan(u, delta, A[own], B[:, None], C[:, None], D[own], dt_bias[k], True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        total = total + y[:, :, back].transpose(1, 2).reshape(x.shape)
    return total


@functools.cache
def _expected_2d(*shape: int) -> Tensors:
    """The definition's results in float64 on `_inputs_2d(*shape)`."""
    return _run(_four_scans, _inputs_2d(*shape), torch.float64)


SHAPES_2D = [
    # batch, height, width, channels, rank, state
    pytest.param((1, 1, 1, 1, 1, 1), id="single"),
    pytest.param((2, 5, 7, 9, 3, 4), id="odd"),
    pytest.param((1, 1, 70, 16, 1, 16), id="row"),
    pytest.param((3, 9, 1, 17, 2, 5), id="column"),
    pytest.param((1, 10, 13, 40, 6, 16), id="long"),
    pytest.param((5, 8, 9, 32, 5, 16), id="large"),
    pytest.param((1, 3, 4, 8, 48, 33), id="rank"),
]


@pytest.mark.parametrize("shape", SHAPES_2D)
def test_reference_2d_is_four_scans(shape: tuple[int, ...]) -> None:
    results = _run(reference.selective_scan_2d, _inputs_2d(*shape), torch.float64)
    _assert_close(results, _expected_2d(*shape), 1e-12)


@float32_backends
@pytest.mark.parametrize("shape", SHAPES_2D)
def test_2d_agrees_with_definition(backend: Backend, shape: tuple[int, ...]) -> None:
    _assert_close(_run(_scan_2d(backend), _inputs_2d(*shape)), _expected_2d(*shape), 3e-6)


@float32_backends
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_computed_in_float32(backend: Backend, dtype: torch.dtype) -> None:
    """Nothing is lost but what rounding the inputs and the result loses."""
    eps = torch.finfo(dtype).eps
    inputs = {name: t.to(dtype).double() for name, t in _inputs_1d(2, 2, 9, 33, 16).items()}
    assert _scan_1d(backend)(**{name: t.to(dtype) for name, t in inputs.items()}).dtype == dtype
    expected = _run(_scan_1d((reference, {})), inputs, torch.float64)
    _assert_close(_run(_scan_1d(backend), inputs, dtype), expected, eps)
    inputs = {name: t.to(dtype).double() for name, t in _inputs_2d(2, 4, 5, 9, 3, 16).items()}
    assert _scan_2d(backend)(**{name: t.to(dtype) for name, t in inputs.items()}).dtype == dtype
    _assert_close(_run(_scan_2d(backend), inputs, dtype), _run(_four_scans, inputs, torch.float64), eps)


@float32_backends
def test_strong_decay_and_growth(backend: Backend) -> None:
    """Exponents far outside float32's range decay to nothing, and positive A grows as it should."""
    inputs = _inputs_1d(1, 1, 20, 70, 16)
    inputs["A"] = inputs["A"] * torch.logspace(-3, 4, 20, dtype=torch.float64)[:, None]
    inputs["A"][3] = 0.05
    inputs["delta"] = inputs["delta"] + torch.linspace(-30, 30, 70, dtype=torch.float64)
    expected = _run(_scan_1d((reference, {})), inputs, torch.float64)
    results = _run(_scan_1d(backend), inputs)
    # The exponent's rounding error grows with the exponent.
    _assert_close({"y": results["y"]}, {"y": expected["y"]}, 1e-4)
    assert all(torch.isfinite(value).all() for value in results.values())


@float32_backends
@pytest.mark.parametrize("name", NAMES_1D)
def test_nan_is_not_swallowed(backend: Backend, name: str) -> None:
    inputs = {key: t.float() for key, t in _inputs_1d(1, 1, 4, 20, 16).items()}
    inputs[name].view(-1)[-1] = torch.nan
    y = _scan_1d(backend)(**inputs)
    assert torch.equal(torch.isnan(y), torch.isnan(_scan_1d((reference, {}))(**inputs)))


@float32_backends
def test_slow_decay(backend: Backend) -> None:
    """States that remember a thousand positions: an error of the exponential adds up, were it more than rounding."""
    inputs = _inputs_1d(1, 1, 16, 1500, 4)
    inputs["u"], inputs["B"], inputs["C"] = (inputs[name].abs() for name in ("u", "B", "C"))
    inputs["A"] = -torch.logspace(-4, 0, 64, dtype=torch.float64).reshape(16, 4)
    inputs["delta"] = torch.zeros_like(inputs["delta"])
    expected = _run(_scan_1d((reference, {})), inputs, torch.float64)
    _assert_close(_run(_scan_1d(backend), inputs), expected, 5e-5)


@pytest.mark.parametrize("name", available_backends("cpu"))
def test_inputs_need_not_be_contiguous(name: str) -> None:
    inputs = {key: t.float() for key, t in _inputs_1d(2, 2, 8, 20, 16).items()}
    strided = {key: torch.stack([t, t], -1)[..., 1] for key, t in inputs.items()}
    strided["u"] = inputs["u"].transpose(1, 2).contiguous().transpose(1, 2)
    strided["delta"] = inputs["delta"][:1].expand(2, -1, -1)
    inputs["delta"] = strided["delta"].contiguous()
    call = functools.partial(selective_scan, delta_softplus=True, backend=name)
    _assert_close(_run(call, strided), _run(call, inputs), 1e-6)


@pytest.mark.parametrize("name", available_backends("cpu"))
def test_one_group_may_be_left_out(name: str) -> None:
    inputs = _inputs_1d(2, 1, 8, 20, 16)
    squeezed = {**inputs, "B": inputs["B"][:, 0], "C": inputs["C"][:, 0]}
    call = functools.partial(selective_scan, delta_softplus=True, backend=name)
    torch.testing.assert_close(_run(call, squeezed)["y"], _run(call, inputs)["y"], rtol=0, atol=0)


@pytest.mark.parametrize("name", available_backends("cpu"))
def test_empty_batch(name: str) -> None:
    inputs = {key: t[:0] if key in ("x", "x_dbl") else t for key, t in _inputs_2d(1, 3, 4, 8, 2, 4).items()}
    results = _run(functools.partial(selective_scan_2d, backend=name), inputs)
    assert results["y"].shape == (0, 3, 4, 8)
    assert not results["A"].any()
    inputs = {key: t[:0] if key in ("u", "delta", "B", "C") else t for key, t in _inputs_1d(1, 2, 4, 5, 4).items()}
    assert _run(functools.partial(selective_scan, backend=name), inputs)["y"].shape == (0, 8, 5)


def test_only_reference_follows_float64() -> None:
    inputs = _inputs_2d(1, 6, 6, 8, 2, 4)
    for name in available_backends("cpu"):
        y = selective_scan_2d(**inputs, backend=name)
        error = float((y - _four_scans(**inputs)).abs().max())
        assert y.dtype == torch.float64
        assert (error < 1e-12) == (name == "reference")


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads; the old one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_kernel
@pytest.mark.parametrize("level", cpu.LEVELS)
@pytest.mark.parametrize("shape", [(1, 9, 11, 50, 3, 16), (2, 8, 9, 33, 5, 6), (3, 8, 9, 33, 5, 6)])
def test_threads(threads: Callable[[int], None], level: str, shape: tuple[int, ...]) -> None:
    """The result repeats to the bit for a number of threads, and depends on it by rounding only."""
    if level not in cpu.available_levels():
        pytest.skip(f"this processor has no {level}")
    inputs = _inputs_2d(*shape)
    results = []
    for count in (1, 2, 2, 7):
        threads(count)
        results.append(_run(functools.partial(cpu.selective_scan_2d, level=level), inputs))
    for name, value in results[1].items():
        assert torch.equal(value, results[2][name])
    for other in (results[0], results[3]):
        _assert_close(other, results[1], 1e-6)


@needs_kernel
@pytest.mark.parametrize("level", cpu.LEVELS)
def test_more_threads_than_work(threads: Callable[[int], None], level: str) -> None:
    if level not in cpu.available_levels():
        pytest.skip(f"this processor has no {level}")
    threads(8)
    inputs = _inputs_1d(1, 1, 5, 20, 3)
    expected = _run(_scan_1d((reference, {})), inputs, torch.float64)
    _assert_close(_run(functools.partial(cpu.selective_scan, delta_softplus=True, level=level), inputs), expected, 2e-6)


@needs_kernel
def test_unknown_instruction_set() -> None:
    inputs = {name: t.float() for name, t in _inputs_2d(1, 2, 2, 1, 1, 1).items()}
    with pytest.raises(ValueError, match="'mmx' is not one of this processor's: baseline"):
        cpu.selective_scan_2d(**inputs, level="mmx")


def _operator_inputs() -> Iterator[list[Tensor | None]]:
    """The tensors of both contracts as the operator takes them: u, delta, B, C, x_dbl, dt_weight, A, D, bias."""
    u, delta, A, B, C, D, bias = (t.float() for t in _inputs_1d(2, 2, 5, 70, 3).values())
    yield [u, delta, B, C, None, None, A, D, bias]
    yield [u, delta, B, C, None, None, A, None, None]
    x, x_dbl, dt_weight, A, D, bias = (t.float() for t in _inputs_2d(2, 3, 4, 5, 2, 3).values())
    yield [x, None, None, None, x_dbl, dt_weight, A, D, bias]


@needs_kernel
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(save: bool) -> None:
    for tensors in _operator_inputs():
        leaves = [None if t is None else t.requires_grad_() for t in tensors]
        torch.library.opcheck(torch.ops.selective_scan.cpu_scan, (*leaves, True, save, ""))


@needs_kernel
def test_opcheck_backward() -> None:
    for tensors in _operator_inputs():
        y, states = torch.ops.selective_scan.cpu_scan(*tensors, True, True, "")
        torch.library.opcheck(torch.ops.selective_scan.cpu_scan_backward, (y, states, *tensors, True, ""))


@needs_kernel
def test_what_the_kernel_cannot_read_is_refused() -> None:
    """A double read as float, or a field that `struct scan` does not have, would give numbers from nowhere."""
    tensors = [None if t is None else t.double() for t in next(_operator_inputs())]
    with pytest.raises(TypeError, match=r"float32, not u of torch\.float64"):
        torch.ops.selective_scan.cpu_scan(*tensors, True, False, "")
    with pytest.raises(AttributeError, match="hieght"):
        cpu._Scan(hieght=3)


@needs_kernel
def test_second_derivatives_are_refused() -> None:
    inputs = {name: t.float().requires_grad_() for name, t in _inputs_2d(1, 2, 2, 3, 1, 2).items()}
    (gradient,) = torch.autograd.grad(cpu.selective_scan_2d(**inputs).sum(), inputs["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='parallel'"):
        gradient.sum().backward()


@needs_kernel
def test_gradients_by_finite_differences() -> None:
    """The kernel's gradients against its own forward pass: a directional derivative for each input."""
    inputs = _inputs_2d(1, 4, 5, 6, 2, 3)
    gradients = _run(cpu.selective_scan_2d, inputs)
    generator = torch.Generator().manual_seed(2)
    cotangent = torch.randn(gradients["y"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for name, value in inputs.items():
        direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (-1e-2, 1e-2):
            moved = {**inputs, name: value + step * direction}
            y = cpu.selective_scan_2d(**{key: t.float() for key, t in moved.items()}).double()
            values.append(float((y * cotangent).sum()))
        assert (values[1] - values[0]) / 2e-2 == pytest.approx(float((gradients[name] * direction).sum()), rel=5e-3)


@pytest.mark.parametrize("name", available_backends("cpu"))
def test_no_gradients_where_none_are_wanted(name: str) -> None:
    inputs = {key: t.float() for key, t in _inputs_2d(1, 3, 4, 5, 2, 3).items()}
    assert not selective_scan_2d(**inputs, backend=name).requires_grad
    inputs["A"].requires_grad_()
    with torch.no_grad():
        assert not selective_scan_2d(**inputs, backend=name).requires_grad
    y = selective_scan_2d(**inputs, backend=name)
    y.sum().backward()
    assert inputs["A"].grad is not None
    assert inputs["x"].grad is None


@pytest.mark.parametrize("name", available_backends("cpu"))
def test_autocast_scans_in_float32(name: str) -> None:
    inputs = {key: t.float() for key, t in _inputs_2d(1, 7, 8, 16, 4, 16).items()}
    inputs["x"] = inputs["x"].bfloat16()
    expected = selective_scan_2d(**inputs, backend=name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = selective_scan_2d(**inputs, backend=name)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("delta", lambda t: t[..., :-1], ValueError, r"delta has shape \(2, 6, 8\), expected \(2, 6, 9\)"),
        ("u", lambda t: t[0], ValueError, r"expected u \(batch, G·d, L\)"),
        ("B", lambda t: t[:, :, :-1], ValueError, r"B has shape \(2, 2, 3, 9\), expected \(2, 2, 4, 9\)"),
        ("C", lambda t: t[:, :1], ValueError, r"C has shape \(2, 1, 4, 9\), expected \(2, 2, 4, 9\)"),
        ("D", lambda t: t[:-1], ValueError, r"D has shape \(5,\), expected \(6,\)"),
        ("delta_bias", lambda t: t.long(), TypeError, "delta_bias has dtype torch.int64"),
        ("A", lambda t: t.to(torch.complex64), TypeError, "A has dtype torch.complex64"),
        ("C", lambda t: t.to("meta"), ValueError, "C is on meta, but u is on cpu"),
    ],
)
def test_bad_input_1d(name: str, change: Callable[[Tensor], Tensor], error: type[Exception], message: str) -> None:
    inputs = _inputs_1d(2, 2, 3, 9, 4)
    inputs[name] = change(inputs[name])
    with pytest.raises(error, match=message):
        selective_scan(**inputs)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t[0], r"expected x \(B, H, W, d\)"),
        ("x_dbl", lambda t: t[..., :-1], r"x_dbl has shape \(1, 3, 4, 4, 9\), expected \(1, 3, 4, 4, 10\)"),
        ("dt_weight", lambda t: t[:3], r"dt_weight has shape \(3, 5, 2\), expected \(4, 5, 2\)"),
        ("A", lambda t: t[:5], r"A has shape \(5, 4\), expected \(20, 4\)"),
        ("dt_bias", lambda t: t.reshape(-1), r"dt_bias has shape \(20,\), expected \(4, 5\)"),
    ],
)
def test_bad_input_2d(name: str, change: Callable[[Tensor], Tensor], message: str) -> None:
    inputs = _inputs_2d(1, 3, 4, 5, 2, 4)
    inputs[name] = change(inputs[name])
    with pytest.raises(ValueError, match=message):
        selective_scan_2d(**inputs)
