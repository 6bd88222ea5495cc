"""The augmentation published for abdominal CT slices (first in TransUNet, kept by VM-UNet), exactly as scipy has it.

Half of the slices get `RandRotFlip(prob=1)`, the other half `RandRotateDegrees(prob=0.5)`; MONAI's `OneOf` chooses.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Randomizable, RandomizableTransform
from scipy import special

from transforms.geometry import like_input, plain_tensor


def rot_flip(x: NdarrayOrTensor, k: int, axis: int) -> NdarrayOrTensor:
    """`numpy.rot90` by k quarter turns, then `numpy.flip` along rows (axis 0) or columns (axis 1).

    Args:
        x: (…, H, W), array or tensor; the result is (…, W, H) for odd k.
        k: number of quarter turns.
        axis: 0 or 1.

    Raises:
        ValueError: when `axis` is neither 0 nor 1, or `x` has fewer than two axes.

    Example:
        >>> rot_flip(np.array([[1, 2, 3], [4, 5, 6]]), k=1, axis=0).tolist()
        [[1, 4], [2, 5], [3, 6]]
    """
    if axis not in (0, 1):
        raise ValueError(f"axis must be 0 (rows) or 1 (columns), got {axis!r}")
    tensor = plain_tensor(x)
    change = np.eye(3)
    sizes = list(tensor.shape[-2:])
    for _ in range(k % 4):
        # A quarter turn takes the new (row, column) from (column, old width − 1 − row).
        change = change @ np.array([[0.0, 1, 0], [-1, 0, sizes[1] - 1], [0, 0, 1]])
        sizes.reverse()
    mirror = np.eye(3)
    mirror[axis, axis], mirror[axis, 2] = -1, sizes[axis] - 1
    return like_input(torch.rot90(tensor, k, (-2, -1)).flip(axis - 2), x, change @ mirror)


def _rotation(height: int, width: int, angle: float) -> np.ndarray:
    """(3, 3): output (row, column, 1) → input, as `scipy.ndimage.rotate` computes it."""
    cos, sin = special.cosdg(angle), special.sindg(angle)
    matrix = np.array([[cos, sin], [-sin, cos]])
    centre = (np.array([height, width]) - 1) / 2
    return np.block([[matrix, (centre - matrix @ centre)[:, None]], [np.zeros((1, 2)), np.ones((1, 1))]])


@lru_cache(maxsize=40)
def _rotated_indices(height: int, width: int, angle: float, device: torch.device) -> torch.Tensor:
    """(H·W,) int32: flat input index of every output pixel, H·W where it lies outside.

    The sums are in the order of scipy's C loop, so that rounding agrees to the last bit.
    """
    matrix = _rotation(height, width, angle)
    rows, columns = np.arange(float(height))[:, None], np.arange(float(width))
    row, column = ((offset + rows * by_row) + columns * by_column for by_row, by_column, offset in matrix[:2])
    inside = (row >= 0) & (row <= height - 1) & (column >= 0) & (column <= width - 1)
    index = np.floor(row + 0.5) * width + np.floor(column + 0.5)
    with torch.inference_mode(False):
        return torch.as_tensor(np.where(inside, index, height * width).astype(np.int32).ravel(), device=device)


def rotate(x: NdarrayOrTensor, angle: float) -> NdarrayOrTensor:
    """`scipy.ndimage.rotate(order=0, reshape=False)` of the last two axes: nearest neighbour, zeros from outside.

    Args:
        x: (…, H, W), array or tensor on any device, any dtype.
        angle: degrees.

    Raises:
        ValueError: when `angle` is not finite, or `x` has fewer than two axes.

    Example:
        >>> rotate(np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]]), 90).tolist()
        [[3, 6, 9], [2, 5, 8], [1, 4, 7]]
    """
    if not np.isfinite(angle):
        raise ValueError(f"angle must be a finite number of degrees, got {angle}")
    tensor = plain_tensor(x)
    height, width = tensor.shape[-2:]
    # One more sample, zero, stands for everything outside.
    padded = tensor.new_empty(*tensor.shape[:-2], height * width + 1)
    padded[..., :-1] = tensor.flatten(-2)
    padded[..., -1] = 0
    index = _rotated_indices(height, width, float(angle), tensor.device)
    return like_input(padded.index_select(-1, index).view(tensor.shape), x, _rotation(height, width, angle))


class RandRotFlip(RandomizableTransform):
    """With probability `prob`, 0 … 3 quarter turns and then one flip along a random axis, see `rot_flip`.

    Example:
        >>> RandRotFlip().set_random_state(0)(np.array([[[1, 2, 3], [4, 5, 6]]])).tolist()
        [[[1, 4], [2, 5], [3, 6]]]
    """

    def __init__(self, prob: float = 1.0) -> None:
        super().__init__(prob)
        self.k, self.axis = 0, 0

    def randomize(self, data: Any = None) -> None:
        super().randomize(None)
        self.k, self.axis = self.R.randint(4), self.R.randint(2)

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> NdarrayOrTensor:
        """(…, H, W); `randomize=False` repeats the last draw."""
        if randomize:
            self.randomize()
        return rot_flip(img, self.k, self.axis) if self._do_transform else img


class RandRotateDegrees(RandomizableTransform):
    """With probability `prob`, a rotation by a random whole number of degrees, see `rotate`.

    Args:
        prob: probability of rotating at all.
        degrees: lowest angle, and the one above the highest.

    Raises:
        ValueError: when `degrees` does not rise.

    Example:
        >>> rotate_some = RandRotateDegrees(prob=1).set_random_state(1)
        >>> out = rotate_some(np.eye(9)[None])
        >>> rotate_some.angle, out.shape
        (-8, (1, 9, 9))
    """

    def __init__(self, prob: float = 0.5, degrees: tuple[int, int] = (-20, 20)) -> None:
        super().__init__(prob)
        self.low, self.high = degrees
        if not self.low < self.high:
            raise ValueError(f"degrees must rise, got {degrees}")
        self.angle = 0

    def randomize(self, data: Any = None) -> None:
        super().randomize(None)
        self.angle = self.R.randint(self.low, self.high)

    def __call__(self, img: NdarrayOrTensor, randomize: bool = True) -> NdarrayOrTensor:
        """(…, H, W); `randomize=False` repeats the last draw."""
        if randomize:
            self.randomize()
        return rotate(img, self.angle) if self._do_transform else img


class _SameForAllKeys(MapTransform, Randomizable):
    """Applies one draw of `transform` to all keys."""

    def __init__(
        self, keys: KeysCollection, transform: RandRotFlip | RandRotateDegrees, allow_missing_keys: bool
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.transform = transform

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> Randomizable:
        self.transform.set_random_state(seed, state)
        return self

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        result = dict(data)
        self.transform.randomize()
        for key in self.key_iterator(result):
            result[key] = self.transform(result[key], randomize=False)
        return result


class RandRotFlipd(_SameForAllKeys):
    """Dictionary version of `RandRotFlip`: the same turn and flip for all keys.

    Example:
        >>> out = RandRotFlipd(["image", "label"])({"image": np.eye(3)[None], "label": np.eye(3)[None]})
        >>> np.array_equal(out["image"], out["label"])
        True
    """

    def __init__(self, keys: KeysCollection, prob: float = 1.0, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, RandRotFlip(prob), allow_missing_keys)


class RandRotateDegreesd(_SameForAllKeys):
    """Dictionary version of `RandRotateDegrees`: the same angle for all keys.

    Example:
        >>> out = RandRotateDegreesd(["image", "label"])({"image": np.eye(9)[None], "label": np.eye(9)[None]})
        >>> np.array_equal(out["image"], out["label"])
        True
    """

    def __init__(
        self,
        keys: KeysCollection,
        prob: float = 0.5,
        degrees: tuple[int, int] = (-20, 20),
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, RandRotateDegrees(prob, degrees), allow_missing_keys)
