from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from transforms import WindowHU


def test_applied_once_only() -> None:
    image = MetaTensor(torch.tensor([[-1000.0, 75.0]]))
    once = WindowHU()(image)
    assert torch.equal(once, torch.tensor([[0, 0.5]]))
    assert torch.equal(WindowHU()(once), once)
    np.testing.assert_array_equal(once.meta["window_hu"], [-125, 275])
    assert "window_hu" not in image.meta


def test_another_window_is_possible_but_not_after_the_first_one() -> None:
    np.testing.assert_allclose(WindowHU((0, 100))(np.array([25.0])), [0.25])
    image = MetaTensor(torch.rand(1, 4, 4), meta={"window_hu": np.array([-160, 240]), "filename_or_obj": "a.h5"})
    with pytest.raises(ValueError, match=r"a\.h5.*-160"):
        WindowHU()(image)
    with pytest.raises(ValueError, match="window_hu"):
        WindowHU((275, -125))
