"""`scipy.ndimage.zoom` as matrix products.

Spline interpolation on a regular grid is linear and separable: out = R · x · Cᵀ with one matrix per axis, spline
prefilter and boundary included. The matrices are what scipy makes of unit vectors, so agreement with scipy holds by
construction. They are kept for each (size in, size out, order). The prefilter's weights fall by 0.27 with every sample,
so a matrix is a band: on a CPU some rows at a time are multiplied with the few input samples they need, three times as
fast as one product with all of them. Order 0 needs no arithmetic, only an index for each axis.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from monai.config import KeysCollection, NdarrayOrTensor
from monai.transforms import MapTransform, Transform
from monai.utils import ensure_tuple_rep
from scipy import ndimage

from transforms.geometry import like_input, plain_tensor

BAND_ROWS = 32


@lru_cache(maxsize=64)
def _bands(
    size_in: int, size_out: int, order: int, dtype: torch.dtype, device: torch.device
) -> list[tuple[slice, torch.Tensor]]:
    """For successive output samples: the input samples they depend on, and their weights (outputs, inputs).

    Weights a hundred times smaller than what the dtype resolves are left out. GPUs get one band: they would rather
    multiply zeros than start more kernels.
    """
    columns = [ndimage.zoom(unit, size_out / size_in, order=order) for unit in np.eye(size_in)]
    matrix = np.stack(columns, axis=1)
    rows = BAND_ROWS if device.type == "cpu" else size_out
    bands = []
    for band in np.split(matrix, range(rows, size_out, rows)):
        needed = np.flatnonzero((np.abs(band) > torch.finfo(dtype).eps / 100).any(axis=0))
        inputs = slice(needed.min(initial=size_in - 1), needed.max(initial=0) + 1)
        with torch.inference_mode(False):
            bands.append((inputs, torch.as_tensor(band[:, inputs], dtype=dtype, device=device).contiguous()))
    return bands


@lru_cache(maxsize=64)
def _indices(size_in: int, size_out: int, device: torch.device) -> tuple[torch.Tensor, int]:
    """Source index of every output sample, and how many leading samples scipy fills from the input.

    When (size_out − 1)·step rounds to just above size_in − 1, scipy takes the last sample as lying outside: zero.
    """
    index = ndimage.zoom(np.arange(size_in), size_out / size_in, order=0, cval=-1)
    with torch.inference_mode(False):
        return torch.as_tensor(index.clip(0), device=device), int((index >= 0).sum())


def _zoom_axis(x: torch.Tensor, axis: int, size: int, order: int) -> torch.Tensor:
    size_in = x.shape[axis]
    if size == size_in:
        return x
    if order == 0:
        index, inside = _indices(size_in, size, x.device)
        x = x.index_select(axis, index)
        if inside < size:
            x.narrow(axis, inside, size - inside).zero_()
        return x
    bands = _bands(size_in, size, order, x.dtype, x.device)
    if axis == -1:
        return torch.cat([x[..., inputs] @ weights.T for inputs, weights in bands], dim=-1)
    return torch.cat([weights @ x[..., inputs, :] for inputs, weights in bands], dim=-2)


def spline_zoom(x: NdarrayOrTensor, size: Sequence[int | None], order: int = 3) -> NdarrayOrTensor:
    """`scipy.ndimage.zoom` of the last two axes with the factors size / shape; other axes are left alone.

    Args:
        x: (…, H, W), array or tensor on any device. Order 0 keeps the dtype; higher orders compute and answer in
            float32, or in float64 if `x` has it (also under autocast).
        size: (H', W'); −1 or None keeps that axis.
        order: of the spline, 0 … 5.

    Raises:
        ValueError: when `order` is none of these, `size` is not two positive integers, or `x` is empty.

    Example:
        >>> spline_zoom(np.array([[0.0, 1], [2, 3]]), (3, 3), order=1).tolist()
        [[0.0, 0.5, 1.0], [1.0, 1.5, 2.0], [2.0, 2.5, 3.0]]
    """
    if order not in range(6):
        raise ValueError(f"order must be 0 … 5, got {order!r}")
    tensor = plain_tensor(x)
    if len(size) != 2:
        raise ValueError(f"size must be (H, W), got {size!r}")
    shape = tuple(tensor.shape[-2:])
    height, width = (old if new in (None, -1) else int(new) for new, old in zip(size, shape, strict=True))
    if height < 1 or width < 1:
        raise ValueError(f"size must be positive (or −1 to keep an axis), got {size!r}")
    if order > 0 and tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()
    with torch.autocast(tensor.device.type, enabled=False):
        # Columns cost more than rows (their samples are not contiguous), so they wait until the rows have become fewer.
        if height < shape[0]:
            out = _zoom_axis(_zoom_axis(tensor, -2, height, order), -1, width, order)
        else:
            out = _zoom_axis(_zoom_axis(tensor, -1, width, order), -2, height, order)
    # scipy aligns the centres of the corner samples.
    steps = ((old - 1) / max(new - 1, 1) for old, new in zip(shape, (height, width), strict=True))
    return like_input(out, x, np.diag([*steps, 1.0]))


class SplineZoom(Transform):
    """Resizes the last two axes exactly as `scipy.ndimage.zoom` does, see `spline_zoom`.

    Args:
        spatial_size: (H', W'), or one number for both; −1 or None keeps that axis.
        order: of the spline: 3 for images, 0 for labels.

    Example:
        >>> SplineZoom((224, -1))(np.zeros((1, 512, 400))).shape
        (1, 224, 400)
    """

    def __init__(self, spatial_size: Sequence[int | None] | int, order: int = 3) -> None:
        self.spatial_size = ensure_tuple_rep(spatial_size, 2)
        self.order = order

    def __call__(self, img: NdarrayOrTensor) -> NdarrayOrTensor:
        """(…, H, W) → (…, H', W')."""
        return spline_zoom(img, self.spatial_size, self.order)


class SplineZoomd(MapTransform):
    """Dictionary version of `SplineZoom`; `order` is one number, or one for each key.

    Example:
        >>> data = {"image": np.zeros((1, 8, 8)), "label": np.zeros((1, 8, 8), np.uint8)}
        >>> {key: array.shape for key, array in SplineZoomd(["image", "label"], 4, order=(3, 0))(data).items()}
        {'image': (1, 4, 4), 'label': (1, 4, 4)}
    """

    def __init__(
        self,
        keys: KeysCollection,
        spatial_size: Sequence[int | None] | int,
        order: Sequence[int] | int = 3,
        allow_missing_keys: bool = False,
    ) -> None:
        super().__init__(keys, allow_missing_keys)
        self.zooms = [SplineZoom(spatial_size, one) for one in ensure_tuple_rep(order, len(self.keys))]

    def __call__(self, data: Mapping[Hashable, NdarrayOrTensor]) -> dict[Hashable, NdarrayOrTensor]:
        result = dict(data)
        for key, zoom in self.key_iterator(result, self.zooms):
            result[key] = zoom(result[key])
        return result
