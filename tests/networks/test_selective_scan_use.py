"""The selective scan as others use it: scripted, traced, compiled, exported; installed or not."""

from __future__ import annotations

import importlib.machinery
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from networks.selective_scan import available_backends, cpu, default_backend, selective_scan, selective_scan_2d

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Scan2d(nn.Module):
    """A Linear makes dt, B and C of four directions, as SS2D does."""

    def __init__(self, channels: int = 6, rank: int = 2, state: int = 3) -> None:
        super().__init__()
        self.size = rank + 2 * state
        self.project = nn.Linear(channels, 4 * self.size)
        self.dt_weight = nn.Parameter(torch.randn(4, channels, rank))
        self.A_logs = nn.Parameter(torch.randn(4 * channels, state))
        self.D = nn.Parameter(torch.randn(4 * channels))
        self.dt_bias = nn.Parameter(torch.randn(4, channels) - 1)

    def forward(self, x: Tensor) -> Tensor:
        x_dbl = self.project(x).reshape(x.shape[0], x.shape[1], x.shape[2], 4, self.size)
        return selective_scan_2d(x, x_dbl, self.dt_weight, -torch.exp(self.A_logs), self.D, self.dt_bias)


class Scan1d(nn.Module):
    """u makes everything else."""

    def __init__(self, channels: int = 6, state: int = 3) -> None:
        super().__init__()
        self.A_logs = nn.Parameter(torch.randn(channels, state))
        self.project = nn.Conv1d(channels, 2 * state, 1)
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, u: Tensor) -> Tensor:
        B, C = self.project(u).chunk(2, 1)
        A = -torch.exp(self.A_logs)
        return selective_scan(u, torch.tanh(u), A, B, C, delta_bias=self.bias, delta_softplus=True)


Case = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(params=["1d", "2d"])
def case(request: pytest.FixtureRequest) -> Case:
    """A module, an input, and one of another size."""
    torch.manual_seed(0)
    if request.param == "1d":
        return Scan1d(), torch.randn(2, 6, 37), torch.randn(3, 6, 90)
    return Scan2d(), torch.randn(2, 5, 7, 6), torch.randn(3, 9, 10, 6)


def _assert_same(module: nn.Module, other: nn.Module, x: Tensor) -> None:
    parameters = list(module.parameters())
    expected, y = module(x), other(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    for a, b in zip(torch.autograd.grad(y.square().sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_script(case: Case, tmp_path: Path) -> None:
    module, x, larger = case
    scripted = torch.jit.script(module)
    _assert_same(module, scripted, x)
    _assert_same(module, scripted, larger)
    torch.jit.save(scripted, tmp_path / "scan.ts")
    torch.testing.assert_close(torch.jit.load(tmp_path / "scan.ts")(larger), module(larger), rtol=1e-4, atol=1e-5)


def test_trace_keeps_the_size_open(case: Case) -> None:
    module, x, larger = case
    traced = torch.jit.trace(module, x)
    _assert_same(module, traced, x)
    _assert_same(module, traced, larger)
    assert "selective_scan::" not in str(traced.inlined_graph)


def test_compile_without_graph_breaks(case: Case) -> None:
    module, x, larger = case
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    _assert_same(module, compiled, x)
    _assert_same(module, compiled, larger)


def test_export(case: Case) -> None:
    module, x, _ = case
    program = torch.export.export(module, (x,))
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-4, atol=1e-5)
    assert not any("selective_scan" in str(node.target) for node in program.graph.nodes)


def test_export_keeps_the_size_open(case: Case) -> None:
    module, x, larger = case
    sizes = (0, 2) if x.dim() == 3 else (0, 1, 2)
    shapes = {axis: torch.export.Dim.DYNAMIC for axis in sizes}
    program = torch.export.export(module, (x,), dynamic_shapes=(shapes,))
    for value in (x, larger, x[:1]):
        torch.testing.assert_close(program.module()(value), module(value), rtol=1e-4, atol=1e-5)


def test_backends_by_device() -> None:
    native = () if cpu.unavailable() else ("cpu",)
    assert available_backends() == (*native, "parallel", "reference")
    assert available_backends(torch.device("meta")) == ("parallel", "reference")
    assert available_backends("cuda:0")[-2:] == ("parallel", "reference")
    assert default_backend("cpu") == available_backends("cpu")[0]


def _tiny() -> tuple[Tensor, ...]:
    x = torch.ones(1, 2, 3)
    return x, x, -torch.ones(2, 4), torch.ones(1, 1, 4, 3), torch.ones(1, 1, 4, 3)


def test_unknown_backend_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"unknown selective scan backend 'gpu'; known are cpu, .*parallel, reference"):
        selective_scan(*_tiny(), backend="gpu")


def test_backend_for_another_device() -> None:
    with pytest.raises((ValueError, RuntimeError), match="does not run on meta|not built"):
        selective_scan(*(t.to("meta") for t in _tiny()), backend="cpu")


CALL = """
    import torch
    from networks.selective_scan import available_backends, selective_scan, selective_scan_2d
    def call(backend=None):
        x = torch.ones(1, 2, 3)
        return selective_scan(x, x, -torch.ones(2, 4), torch.ones(1, 4, 3), torch.ones(1, 4, 3), backend=backend)
    def message(backend):
        try:
            call(backend)
        except RuntimeError as error:
            print(error)
"""


def _python(code: str, folder: Path) -> tuple[str, list[str]]:
    """What `code` prints, and what it logs about the scan; it sees the packages in `folder` only."""
    code = f"import sys; sys.path[:0] = [{str(folder)!r}]\n" + textwrap.dedent(CALL) + textwrap.dedent(code)
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout, [line for line in result.stderr.splitlines() if "selective scan" in line]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The package without the built kernel."""
    unbuilt = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__")
    shutil.copytree(ROOT / "networks" / "selective_scan", tmp_path / "networks" / "selective_scan", ignore=unbuilt)
    (tmp_path / "networks" / "__init__.py").touch()
    return tmp_path


def test_import_takes_torch_only(checkout: Path) -> None:
    code = """
        available_backends("cuda")
        names = {name.partition(".")[0] for name in sys.modules}
        print(names & {"monai", "ignite", "scipy", "triton", "mamba_ssm"})
    """
    out, _ = _python(code, checkout)
    assert out == "set()\n"


def test_without_native_kernel_there_is_one_notice(checkout: Path) -> None:
    """Backends asked for by name are silent; the default says once what is missing; the command is in every message."""
    code = "call('parallel'); call('reference'); message('cpu'); message('mamba_ssm'); print(available_backends('cpu'))"
    out, logged = _python(code, checkout)
    assert logged == []
    no_kernel, no_mamba, available = out.splitlines()
    assert "not built; build it: `pip install -e .`" in no_kernel
    assert "No module named 'mamba_ssm'" in no_mamba
    assert "`pip install --no-build-isolation mamba-ssm causal-conv1d`" in no_mamba
    assert available == "('parallel', 'reference')"
    _, logged = _python("call(); call(); call('parallel')", checkout)
    assert len(logged) == 1
    assert "native kernel of the selective scan is not built; build it: `pip install -e .`" in logged[0]


def test_broken_native_kernel_does_not_look_absent(checkout: Path) -> None:
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (checkout / "networks" / "selective_scan" / f"scan_cpu{suffix}").write_bytes(b"not a library")
    out, _ = _python("try:\n    call()\nexcept OSError as error:\n    print(error)", checkout)
    assert "scan_cpu" in out


def _install_mamba(folder: Path, interface: str) -> None:
    (folder / "mamba_ssm" / "ops").mkdir(parents=True)
    (folder / "mamba_ssm" / "__init__.py").touch()
    (folder / "mamba_ssm" / "ops" / "__init__.py").touch()
    (folder / "mamba_ssm" / "ops" / "selective_scan_interface.py").write_text(interface)


@pytest.mark.parametrize("guarded", [False, True])
def test_mamba_without_its_kernel_is_not_there(checkout: Path, guarded: bool) -> None:
    """Released mamba_ssm imports its kernel, the development version tries to: neither may pass for the kernel."""
    guard = "try:\n    import selective_scan_cuda\nexcept ImportError:\n    selective_scan_cuda = None\n"
    _install_mamba(checkout, guard if guarded else "import selective_scan_cuda\n")
    out, _ = _python("message('mamba_ssm'); print(available_backends('cuda'))", checkout)
    assert "mamba_ssm is there without its kernel (no module selective_scan_cuda)" in out
    assert "MAMBA_KEEP_CUDA_BUILD=TRUE" in out
    assert "('parallel', 'reference')" in out


def test_broken_mamba_does_not_look_absent(checkout: Path) -> None:
    _install_mamba(checkout, "import selective_scan_cuda\n")
    (checkout / "selective_scan_cuda.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    out, _ = _python("message('mamba_ssm')", checkout)
    assert "there but does not load (undefined symbol: _ZN3c10)" in out


@pytest.mark.parametrize("installed", ["mamba_ssm", "triton", "both"])
def test_preference_on_a_gpu(checkout: Path, installed: str) -> None:
    """mamba_ssm's kernel where it is installed, then ours."""
    if installed != "triton":
        _install_mamba(checkout, "import selective_scan_cuda\n")
        (checkout / "selective_scan_cuda.py").touch()
    if installed != "mamba_ssm":
        (checkout / "triton.py").touch()
    code = f"""
        import importlib.util
        torch.cuda.is_available = lambda: True
        torch.cuda.get_device_capability = lambda: (8, 0)
        if {installed == "mamba_ssm"}:
            importlib.util.find_spec = lambda name: None
        print(available_backends("cuda"))
    """
    out, _ = _python(code, checkout)
    expected = ("mamba_ssm", "triton") if installed == "both" else (installed,)
    assert out == f"{(*expected, 'parallel', 'reference')}\n"


@pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable())
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_openmp_runtime() -> None:
    """The kernel shares PyTorch's OpenMP: two pools of threads would spin against each other."""
    code = "call(); print(open('/proc/self/maps').read())"
    out, _ = _python(code, ROOT)
    assert "scan_cpu" in out
    assert len(set(re.findall(r"\S*lib[gi]?omp[\w.-]*\.so\S*", out))) == 1


def test_installs_without_a_compiler(tmp_path: Path) -> None:
    """setup.py says so and goes on."""
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    shutil.copytree(
        ROOT / "networks" / "selective_scan",
        tmp_path / "networks" / "selective_scan",
        ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"),
    )
    (tmp_path / "networks" / "__init__.py").touch()
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PATH": "/nonexistent", "CC": "no-such-compiler"},
    )
    assert result.returncode == 0, result.stderr
    assert "no-such-compiler" in result.stdout + result.stderr
    assert not list(tmp_path.rglob("*.so"))


def test_an_older_python_is_refused_in_one_line() -> None:
    code = "import runpy, sys; sys.hexversion = 0x030A0000; runpy.run_path('setup.py')"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("This package needs Python 3.11 or newer")
    assert result.stderr.count("\n") == 1
