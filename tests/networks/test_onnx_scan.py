"""The selective scan in ONNX: any length, groups and options, against the reference."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

from networks.selective_scan import selective_scan
from networks.selective_scan.onnx import exporting, to_onnx

missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed")


class Sequence(nn.Module):
    """u (B, 6, L) → y, everything else made of u, for `groups` groups."""

    def __init__(self, groups: int, whole: bool) -> None:
        super().__init__()
        self.groups = groups
        self.A = nn.Parameter(-torch.rand(6, 4))
        self.D, self.bias = (nn.Parameter(torch.rand(6)) if whole else None for _ in range(2))
        self.project = nn.Conv1d(6, 2 * groups * 4, 1)

    def forward(self, u: Tensor, backend: str | None = None) -> Tensor:
        B, C = self.project(u).unflatten(1, (2, self.groups, 4)).unbind(1)
        delta = u.square() if self.bias is None else u
        return selective_scan(u, delta, self.A, B, C, self.D, self.bias, self.bias is not None, backend=backend)


@pytest.mark.parametrize(("groups", "whole"), [(1, True), (3, False)])
def test_one_file_scans_every_length(groups: int, whole: bool) -> None:
    import onnxruntime

    torch.manual_seed(0)
    module = Sequence(groups, whole).eval()
    axes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("length")}
    program = to_onnx(module, torch.randn(2, 6, 9), axes, "u")
    assert not exporting()
    model = program.model_proto
    assert [node.op_type for node in model.graph.node].count("Scan") == 1
    assert {entry.domain for entry in model.opset_import} == {""}
    session = onnxruntime.InferenceSession(model.SerializeToString())
    for batch, length in ((1, 1), (2, 9), (3, 250)):
        u = torch.randn(batch, 6, length)
        with torch.no_grad():
            expected = module(u, backend="reference")
        (y,) = session.run(None, {"u": u.numpy()})
        torch.testing.assert_close(torch.from_numpy(y), expected, atol=1e-5, rtol=1e-5)
