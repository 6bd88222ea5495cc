"""Readers of pictures for `LoadImaged`.

MONAI's `LoadImage` hides what `ImageReader.read` raises and tries its other readers; what `get_data` raises reaches the
user. So `read` looks at the suffix only, and `get_data` opens the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import PathLike
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys, ensure_tuple
from PIL import Image

from transforms.files import PICTURE_SUFFIXES, has_suffix

PICTURE_MODES = ("RGB", "BGR", "L", "ids")


class _OneFileReader(ImageReader):
    suffixes: tuple[str, ...]

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(has_suffix(name, self.suffixes) for name in ensure_tuple(filename))

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> Path:
        """The path itself.

        Raises:
            ValueError: when there are several files, or the suffix is not this reader's.
        """
        files = ensure_tuple(data)
        if len(files) != 1 or not self.verify_suffix(files):
            raise ValueError(f"{', '.join(map(str, files))}: expected one file ending in {', '.join(self.suffixes)}")
        return Path(files[0])


def read_picture(path: PathLike, mode: str = "RGB") -> np.ndarray:
    """A picture (png, jpg, bmp, tif) in the form that a network or mask needs, whatever form it is stored in.

    Grey becomes three equal channels, transparency is dropped, palettes are looked up, 16-bit grey is scaled to 8 bits.
    The pixels stay where the file has them: an EXIF orientation is not applied, as masks are drawn on the pixels.

    Args:
        path: of the file.
        mode: "RGB" or "BGR" (H, W, 3), "L" for grey (H, W), "ids" for the stored numbers (H, W), palette indices too.

    Returns:
        uint8, or for "ids" the file's own integer type.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged or cannot be read in this mode, or there is no such mode.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (4, 3), 7).save(f"{folder}/a.png")
        ...     read_picture(f"{folder}/a.png").shape, read_picture(f"{folder}/a.png", "L")[0].tolist()
        ((3, 4, 3), [7, 7, 7, 7])
    """
    path = Path(path)
    if mode not in PICTURE_MODES:
        raise ValueError(f"mode must be one of {', '.join(PICTURE_MODES)}, got {mode!r}")
    try:
        with Image.open(path) as file:
            picture: Image.Image = file
            stored = np.asarray(picture)
            if mode == "ids":
                if stored.ndim != 2 or stored.dtype.kind not in "ub":
                    raise ValueError(f"{path}: holds {picture.mode} pixels, expected one whole number for each")
                return stored.astype(np.uint8) if stored.dtype.kind == "b" else stored
            if stored.dtype.itemsize > 1:
                # Pillow would clip what exceeds 255.
                if stored.dtype.kind == "f" or stored.min() < 0 or stored.max() > 65535:
                    raise ValueError(f"{path}: values from {stored.min()} to {stored.max()}, expected 8 or 16 bits")
                picture = Image.fromarray((stored / 257).round().astype(np.uint8))
            array = np.asarray(picture.convert("L" if mode == "L" else "RGB"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error
    return array[..., ::-1] if mode == "BGR" else array


class PictureReader(_OneFileReader):
    """Pictures for `LoadImaged`: rows first, as in the file; see `read_picture`.

    Args:
        mode: "RGB", "BGR", "L" or "ids".

    Raises:
        ValueError: when there is no such mode.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (4, 3)).save(f"{folder}/a.jpg")
        ...     LoadImage(PictureReader("BGR"))(f"{folder}/a.jpg").shape
        torch.Size([3, 4, 3])
    """

    suffixes = PICTURE_SUFFIXES

    def __init__(self, mode: str = "RGB") -> None:
        super().__init__()
        if mode not in PICTURE_MODES:
            raise ValueError(f"mode must be one of {', '.join(PICTURE_MODES)}, got {mode!r}")
        self.mode = mode

    def get_data(self, img: Path) -> tuple[np.ndarray, dict]:
        """(array (H, W) or (H, W, 3), metadata).

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file is damaged or cannot be read in this mode.
        """
        array = np.ascontiguousarray(read_picture(img, self.mode))
        meta = {
            MetaKeys.AFFINE: np.eye(4),
            MetaKeys.ORIGINAL_AFFINE: np.eye(4),
            MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape[:2]),
            MetaKeys.SPACE: SpaceKeys.RAS,
            MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if array.ndim == 3 else float("nan"),
        }
        return array, meta


class MaskReader(PictureReader):
    """Masks for `LoadImaged`: class indices (H, W), whatever numbers the picture stores.

    Args:
        label_map: {stored number: class}; a stored number that is not listed is an error. None for one class: what is
            brighter than half the range is 1; a picture that holds nothing but 0 and 1 is taken as it is.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.fromarray(np.array([[0, 85, 170]], np.uint8)).save(f"{folder}/a.png")
        ...     LoadImage(MaskReader({0: 0, 85: 1, 170: 2}))(f"{folder}/a.png").tolist()
        [[0.0, 1.0, 2.0]]
    """

    def __init__(self, label_map: Mapping[int, int] | None = None) -> None:
        super().__init__("ids" if label_map else "L")
        self.label_map = dict(label_map or {})

    def get_data(self, img: Path) -> tuple[np.ndarray, dict]:
        """(array (H, W) uint8, metadata).

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file cannot be read or holds a number without a class.
        """
        stored, meta = super().get_data(img)
        if not self.label_map:
            # "L" stretches 1 of a bilevel picture to 255, but not 1 of a grey one.
            return (stored > (127 if stored.max() > 1 else 0)).astype(np.uint8), meta
        if unknown := sorted(set(np.unique(stored).tolist()) - set(self.label_map)):
            raise ValueError(f"{img}: holds {unknown[0]}, which label_map {self.label_map} does not list")
        classes = np.zeros(stored.shape, np.uint8)
        for number, class_index in self.label_map.items():
            classes[stored == number] = class_index
        return classes, meta
