"""Hounsfield units to network input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import MetaTensor
from monai.transforms import MapTransform, ScaleIntensityRange, Transform
from monai.utils import convert_to_numpy, convert_to_tensor

WINDOW_HU = (-125.0, 275.0)
# Values that are windowed at once.
SLAB = 1 << 22


class WindowHU(Transform):
    """Clips Hounsfield units to a window and maps it to [0, 1], float32, once only.

    An image whose metadata has `window_hu` is in [0, 1] already and passes unchanged. The readers of prepared files
    set it, and so does this transform.

    Args:
        window_hu: lower and upper end.

    Raises:
        ValueError: when `window_hu` does not rise.

    Example:
        >>> WindowHU()(np.array([-1000, -125, 75, 3000]))
        array([0. , 0. , 0.5, 1. ], dtype=float32)
    """

    def __init__(self, window_hu: Sequence[float] = WINDOW_HU) -> None:
        low, high = (float(end) for end in window_hu)
        if not low < high:
            raise ValueError(f"window_hu must rise, got {(low, high)}")
        self.window_hu = (low, high)
        self.scale = ScaleIntensityRange(low, high, 0.0, 1.0, clip=True, dtype=np.float32)

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """The windowed image, in any shape.

        Raises:
            ValueError: when the image went through another window before.
        """
        meta = img.meta if isinstance(img, MetaTensor) else {}
        if "window_hu" in meta:
            if not np.allclose(meta["window_hu"], self.window_hu):
                name = meta.get("filename_or_obj", "image")
                raise ValueError(f"{name}: windowed to {tuple(meta['window_hu'])} HU, expected {self.window_hu}")
            return img
        plain: Any = convert_to_tensor(img, track_meta=False)
        out: Any = torch.empty(plain.shape, dtype=torch.float32, device=plain.device)
        # MONAI's steps hold some copies of what they are given
        for source, target in zip(_slabs(plain), _slabs(out), strict=True):
            scaled: Any = self.scale(source)
            target.copy_(scaled)
        if isinstance(img, MetaTensor):
            out = MetaTensor(out).copy_meta_from(img)
            out.meta["window_hu"] = np.asarray(self.window_hu)
        return convert_to_numpy(out) if isinstance(img, np.ndarray) else out


def _slabs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Parts of a tensor along its longest axis, as views."""
    x = torch.atleast_1d(x)
    axis = max(range(x.ndim), key=lambda axis: x.shape[axis])
    return x.split(max(1, SLAB * x.shape[axis] // max(x.numel(), 1)), axis)


class WindowHUd(MapTransform):
    """Dictionary version of `WindowHU`.

    Example:
        >>> WindowHUd("image")({"image": np.array([75.0]), "name": "a"})
        {'image': array([0.5], dtype=float32), 'name': 'a'}
    """

    def __init__(
        self, keys: KeysCollection, window_hu: Sequence[float] = WINDOW_HU, allow_missing_keys: bool = False
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.window = WindowHU(window_hu)

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        result = dict(data)
        for key in self.key_iterator(result):
            result[key] = self.window(result[key])
        return result
