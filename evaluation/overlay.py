"""Pictures: images with predicted and true outlines."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from scipy.ndimage import binary_erosion
from torch import Tensor

from evaluation.metrics import class_boxes
from transforms import printable, replacing

# Bright on grey and told apart by most kinds of colour vision; more classes than colours start again.
COLOURS = ("#ff5a4f", "#37d67a", "#ffd23f", "#3fa7ff", "#c77dff", "#ff9f1c", "#2ee6d6", "#ff70c0", "#b8e04a", "#9aa8ff",
           "#e0a070", "#d0d0d0", "#5fd0a0")  # fmt: skip
BACKGROUND, TEXT = "#14161a", "#e8eaed"
THUMBNAIL, THUMBNAIL_BYTES, QUALITIES = 256, 6000, (60, 40, 20)


class Panel(NamedTuple):
    """One image, (H, W), (1, H, W), (3, H, W) or (4, H, W), with its maps of class indices, (H, W).

    `aspect` is pixel height over pixel width.
    """

    image: NDArray[Any]
    prediction: NDArray[Any]
    label: NDArray[Any] | None
    caption: str = ""
    aspect: float = 1.0


def save_overview(
    path: str | Path,
    image: ArrayLike | Tensor,
    prediction: ArrayLike | Tensor,
    label: ArrayLike | Tensor | None,
    classes: Sequence[str],
    *,
    spacing_mm: Sequence[float] | None = None,
    title: str = "",
    slices: int = 3,
) -> None:
    """Save a PNG of an image with what was predicted (filled, solid outline) and what is true (dashed outline).

    A volume is shown in axial slices: the labelled stretch is cut into equal parts, and each part gives the slice with
    most classes. A single image is shown as it is, and with outlines.

    Args:
        path: the PNG file, written whole or not at all.
        image: (D, H, W), (H, W) or (3, H, W) RGB, with or without a leading channel of one for grey values; any range.
        prediction: map of class indices of the image's spatial shape, with or without a leading channel of one.
        label: the same, or None where there is no truth to show.
        classes: names of the classes 1 … C.
        spacing_mm: voxel size for each spatial axis, for true proportions.
        title: heading.
        slices: how many slices of a volume.

    Raises:
        ValueError: when the image is neither, the maps do not fit it, or a class has no name.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     save_overview(f"{folder}/picture.png", np.zeros((8, 8)), np.eye(8, dtype=int), None, ["lesion"])
        ...     Path(folder, "picture.png").exists()
        True
    """
    predicted = _map(prediction)
    true = None if label is None else _map(label)
    picture = as_array(image)
    if picture.ndim == predicted.ndim + 1 and len(picture) == 1:
        picture = picture[0]
    spatial = picture.shape[-2:] if predicted.ndim == 2 else picture.shape
    if predicted.ndim not in (2, 3) or spatial != predicted.shape or (true is not None and true.shape != spatial):
        raise ValueError(f"{path}: image {picture.shape} and maps {predicted.shape} do not belong together")
    aspect = 1.0 if spacing_mm is None else float(spacing_mm[-2]) / float(spacing_mm[-1])
    if predicted.ndim == 2:
        panels = [Panel(picture, np.zeros_like(predicted), None, "image", aspect)]
        panels.append(Panel(picture, predicted, true, "segmentation", aspect))
    else:
        marked = predicted if true is None else np.where(true > 0, true, predicted)
        rows, columns = _frame(marked)
        panels = [
            Panel(
                picture[i, rows, columns],
                predicted[i, rows, columns],
                None if true is None else true[i, rows, columns],
                f"slice {i + 1} of {len(picture)}",
                aspect,
            )
            for i in choose_slices(marked, slices)
        ]
    save_panels(path, panels, classes, title)


def thumbnail(
    image: ArrayLike | Tensor | None,
    prediction: ArrayLike | Tensor,
    label: ArrayLike | Tensor,
    spacing_mm: Sequence[float] | None = None,
    size: int = THUMBNAIL,
) -> bytes:
    """A small WebP picture: predicted outlines coloured by class, those of the label white and dashed.

    Of a volume it is the slice with most wrong voxels, or with most marked ones where none is wrong. Volumes, and
    pictures without image, are cut to what is marked, with a margin.

    Args:
        image: as in `save_overview`; None for a dark ground.
        prediction: map of class indices, with or without a leading channel of one.
        label: the same.
        spacing_mm: voxel size for each spatial axis, for true proportions.
        size: the longer side in pixels.

    Example:
        >>> thumbnail(None, np.eye(8, dtype=int), np.eye(8, dtype=int))[8:12]
        b'WEBP'
    """
    predicted, true = _squeezed(prediction), _squeezed(label)
    picture = np.broadcast_to(np.float32(0), predicted.shape) if image is None else as_array(image)
    if predicted.ndim == 3:
        if picture.ndim == 4:
            picture = picture[0]
        wrong = np.count_nonzero(predicted != true, axis=(1, 2))
        rank = wrong if wrong.any() else np.count_nonzero(true, axis=(1, 2))
        index = int(rank.argmax())
        frame = _frame(np.maximum(predicted, true))
        picture, predicted, true = (array[index][frame] for array in (picture, predicted, true))
    elif image is None:
        frame = _frame(np.maximum(predicted, true)[None])
        picture, predicted, true = (array[frame] for array in (picture, predicted, true))
    aspect = 1.0 if spacing_mm is None else float(spacing_mm[-2]) / float(spacing_mm[-1])
    tall, wide = predicted.shape[0] * aspect, predicted.shape[1]
    factor = size / max(tall, wide)
    shape = max(1, round(wide * factor)), max(1, round(tall * factor))
    drawn = _colours(picture).resize(shape, Image.Resampling.BILINEAR)
    pixels = np.asarray(drawn).copy()
    predicted, true = (
        np.asarray(Image.fromarray(one.astype(np.int32)).resize(shape, Image.Resampling.NEAREST))
        for one in (predicted, true)
    )
    rows, columns = np.indices(predicted.shape)
    dashes = (rows + columns) % 8 < 5
    for index in _classes(predicted):
        pixels[_inner_border(predicted == index)] = np.multiply(to_rgb(_colour(index)), 255)
    for index in _classes(true):
        pixels[_inner_border(true == index) & dashes] = 255
    for quality in QUALITIES:
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "WEBP", quality=quality)
        if stream.tell() <= THUMBNAIL_BYTES:
            break
    return stream.getvalue()


def _inner_border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Two pixels wide, so that it is seen where pictures are shown smaller."""
    return mask & ~binary_erosion(mask, iterations=2)


def _colours(picture: NDArray[Any]) -> Image.Image:
    """RGB, from grey values or three or four channels of any range."""
    values = np.round(255 * _to_unit_range(picture)).astype(np.uint8)
    channels = (
        np.moveaxis(values[:3], 0, -1) if values.ndim == 3 and len(values) > 1 else values.reshape(values.shape[-2:])
    )
    return Image.fromarray(channels).convert("RGB")


def choose_slices(marked: NDArray[Any], count: int) -> list[int]:
    """Indices of at most `count` slices of a map (D, H, W): the one with most classes of each part of what is marked.

    Among slices with as many classes the larger marked area wins. Where nothing is marked, the whole volume is divided.

    Example:
        >>> choose_slices(np.array([0, 0, 1, 1, 2, 0]).reshape(6, 1, 1), count=2)
        [2, 4]
    """
    areas = np.count_nonzero(marked, axis=(1, 2))
    occupied = np.flatnonzero(areas) if areas.any() else np.arange(len(marked))
    stretch = np.arange(occupied[0], occupied[-1] + 1)
    parts = [part for part in np.array_split(stretch, count) if len(part)]
    return [int(max(part, key=lambda i: (len(np.unique(marked[i])), areas[i]))) for part in parts]


def save_panels(path: str | Path, panels: Sequence[Panel], classes: Sequence[str], title: str = "") -> None:
    """Save a PNG with one column for each panel and a legend of the classes that occur in any of them.

    Raises:
        ValueError: when a class has no name.
    """
    shown = sorted({index for panel in panels for part in (panel.prediction, panel.label) for index in _classes(part)})
    if shown and shown[-1] > len(classes):
        raise ValueError(f"{path}: class {shown[-1]} is in the maps, but only {len(classes)} classes have names")
    shapes = [(panel.image.shape[-2] * panel.aspect, panel.image.shape[-1]) for panel in panels]
    height = 3.6  # inches, as all lengths here
    widths = [height * width / tall for tall, width in shapes]
    margin, gap, top, bottom = 0.12, 0.08, 0.6 if title else 0.3, 0.42
    used = sum(widths) + gap * (len(panels) - 1)
    total_width, total_height = max(used + 2 * margin, 6.0), height + top + bottom
    figure = Figure(figsize=(total_width, total_height), dpi=150, facecolor=BACKGROUND)
    left = (total_width - used) / 2
    for panel, width in zip(panels, widths, strict=True):
        place = left / total_width, bottom / total_height, width / total_width, height / total_height
        _draw(figure.add_axes(place), panel)
        left += width + gap
    style: dict[str, Any] = {"color": TEXT, "fontsize": 12, "ha": "center", "va": "center", "parse_math": False}
    figure.text(0.5, 1 - 0.2 / total_height, printable(title), **style)
    dashes = any(panel.label is not None for panel in panels)
    _legend(figure, {index: classes[index - 1] for index in shown}, dashes)
    with replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", facecolor=BACKGROUND)


def _draw(axes: Axes, panel: Panel) -> None:
    picture = _to_unit_range(panel.image)
    # of four channels the fourth is no colour
    colours = np.moveaxis(picture[:3], 0, -1) if picture.shape[:-2] in ((3,), (4,)) else None
    picture = picture.reshape(picture.shape[-2:]) if colours is None else colours
    axes.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect=panel.aspect, interpolation="bilinear")
    # names of files: a $ in them begins no formula
    axes.set_title(printable(panel.caption), color=TEXT, fontsize=9, pad=4, parse_math=False)
    axes.axis("off")
    fill = np.zeros((*panel.prediction.shape, 4))
    for index in _classes(panel.prediction):
        mask = panel.prediction == index
        fill[mask] = (*to_rgb(_colour(index)), 0.38)
        _outline(axes, mask, colors=[_colour(index)], linewidths=1.2)
    axes.imshow(fill, aspect=panel.aspect, interpolation="nearest")
    if panel.label is not None:
        for index in _classes(panel.label):
            _outline(axes, panel.label == index, colors=["white"], linewidths=1.0, linestyles=[(0, (3, 2))])


def _outline(axes: Axes, mask: NDArray[np.bool_], **style: Any) -> None:
    """The border of a mask; it is padded so that a mask that touches the image's edge is closed there."""
    rows, columns = (np.arange(-1, size + 1) for size in mask.shape)
    axes.contour(columns, rows, np.pad(mask, 1).astype(float), levels=[0.5], **style)


def _legend(figure: Figure, names: dict[int, str], with_truth: bool) -> None:
    handles: list[Any] = [
        Patch(facecolor=(*to_rgb(_colour(index)), 0.5), edgecolor=_colour(index), label=name)
        for index, name in names.items()
    ]
    handles.append(Line2D([], [], color=TEXT, linewidth=1.2, label="predicted (filled)"))
    if with_truth:
        handles.append(Line2D([], [], color="white", linewidth=1.0, linestyle=(0, (3, 2)), label="true"))
    legend = figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, labelcolor=TEXT,
                           fontsize=9, borderpad=0.2, handlelength=1.6, columnspacing=1.4)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def as_array(values: ArrayLike | Tensor) -> NDArray[Any]:
    """A NumPy array of a tensor on any device, or of what NumPy takes.

    Example:
        >>> as_array(Tensor([0.5, 1]))
        array([0.5, 1. ], dtype=float32)
    """
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _map(values: ArrayLike | Tensor) -> NDArray[Any]:
    return _squeezed(values).astype(np.int64)


def _squeezed(values: ArrayLike | Tensor) -> NDArray[Any]:
    array = as_array(values)
    return array[0] if array.ndim > 2 and len(array) == 1 else array


def _classes(indices: NDArray[Any] | None) -> list[int]:
    return [] if indices is None else [int(index) for index in np.unique(indices) if index > 0]


def _colour(index: int) -> str:
    return COLOURS[(index - 1) % len(COLOURS)]


def _to_unit_range(image: NDArray[Any]) -> NDArray[Any]:
    """Unchanged where the values are in [0, 1] already, else stretched from the 0.5th to the 99.5th percentile."""
    picture = image.astype(np.float32)
    if picture.min() >= 0 and picture.max() <= 1:
        return picture
    low, high = np.percentile(picture, (0.5, 99.5))
    return ((picture - low) / max(high - low, 1e-6)).clip(0, 1)


def _frame(marked: NDArray[Any]) -> tuple[slice, slice]:
    """Rows and columns of what is marked in any slice, with a margin; everything where nothing is."""
    if not marked.any():
        return slice(None), slice(None)
    (box,) = class_boxes([marked > 0])
    margins = [max(4, round(0.08 * size)) for size in marked.shape]
    _, rows, columns = (slice(max(s.start - m, 0), s.stop + m) for s, m in zip(box, margins, strict=True))
    return rows, columns
