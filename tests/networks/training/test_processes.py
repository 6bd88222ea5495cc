from __future__ import annotations

import pytest

from networks import training


def test_processes_are_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="multi_gpu.yaml runs under torchrun --standalone --nproc_per_node=N"):
        training.start_process_group()
