"""Pictures and masks, in and out. Every command opens its pictures here.

What is read is right, or refused by an `InputError` that names the file. What had to be guessed is logged as a warning,
once for each kind.

MONAI's `LoadImage` hides what `ImageReader.read` raises and tries its other readers; what `get_data` raises reaches the
user. So `read` only passes the path on, and `get_data` opens the file.
"""

from __future__ import annotations

import json
import logging
import struct
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from monai.config import KeysCollection, NdarrayOrTensor
from monai.data import ImageReader, MetaTensor
from monai.transforms import MapTransform, SaveImage, SaveImaged
from monai.utils import ImageMetaKey, MetaKeys, PostFix, SpaceKeys, convert_to_numpy, ensure_tuple
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from transforms.dicom import read_frame, split_frame, write_segmentation
from transforms.files import PICTURE_SUFFIXES, InputError, PathLike, has_suffix, is_dicom, printable, replacing, stem

# Channels of each mode.
PICTURE_MODES = {"L": 1, "RGB": 3, "BGR": 3, "RGBA": 4, "BGRA": 4}
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "TIFF", "WEBP", "GIF")
# What Pillow raises over damaged files.
DAMAGE = (OSError, SyntaxError, EOFError, ValueError, OverflowError, MemoryError, struct.error, zlib.error)
BOMB = (Image.DecompressionBombError, Image.DecompressionBombWarning)
COPY_AGAIN = "copy or download it again"

# The values of a soft mask lie between nearly black and nearly white: they reach below and above these.
DARK, BRIGHT = 63, 192
# Compression moves flat areas by so much.
RIPPLE = 12
# A lossless file that holds so few values, most of them in areas, holds them on purpose.
FEW_VALUES = 16
# Of the bright pixels of one colour, in lossless files and after compression.
COLOUR_SPREAD = {False: 24, True: 64}
SHOWN = 10

EXIF_ORIENTATION = "exif_orientation"
DICOM_FILES = "dicom_files"

# Channels of PNG's kinds of colour, and the first pixel and the steps (x, y, across, down) of its seven passes.
PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
INFLATED = 1 << 20
# Kinds of frames, and the bits that a block takes at least: baseline and extended, progressive.
JPEG_BITS = {0xC0: 2, 0xC1: 2, 0xC2: 1}

logger = logging.getLogger(__name__)
_said: set[str] = set()

# Large pictures are taken, and what claims to be too large is refused: the warning says nothing to a user. Filters are
# of the whole program, so it cannot be caught where threads read.
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _say_once(kind: str, text: str) -> None:
    if kind not in _said:
        _said.add(kind)
        logger.warning(printable(text))


@contextmanager
def _opened(path: Path) -> Iterator[ImageFile.ImageFile]:
    """The one picture in a file, not yet decoded. What Pillow raises in the block becomes an `InputError`."""
    try:
        if not path.exists():
            raise InputError("no such file", path=path)
        if not (path.is_file() or path.is_dir()):
            raise InputError("is no file, expected a picture", path=path)
        content = path.read_bytes()
        if not content:
            raise InputError("is empty", path=path, remedy=COPY_AGAIN)
        _check_png(content)
        _check_jpeg(content)
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            frames = getattr(file, "n_frames", 1)
            # The further pictures in a camera's JPEG are previews.
            if frames > 1 and file.format != "MPO":
                raise InputError(f"holds {frames} pictures", path=path, remedy="save each in a file of its own")
            yield file
    except InputError:
        raise
    except BOMB as error:
        fact = "not a readable picture: its header claims more pixels than memory should be given to"
        raise InputError(fact, path=path, remedy=COPY_AGAIN) from error
    except UnidentifiedImageError as error:
        names = ", ".join(name for name in FORMATS if name != "DIB")
        fact = f"not a readable picture: damaged, or none of {names}"
        raise InputError(fact, path=path, remedy=COPY_AGAIN) from error
    except DAMAGE as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())
        raise InputError(f"not a readable picture ({printable(reason)})", path=path, remedy=COPY_AGAIN) from error


def _check_png(content: bytes) -> None:
    """Refuses a PNG whose checksums are wrong, or that holds more or fewer pixels than it claims: Pillow takes both.

    Raises:
        OSError: saying what is wrong.
        struct.error, zlib.error: when it is damaged in another way.
    """
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return
    view, place, kind = memoryview(content), 8, b""
    claimed, held, inflate = None, 0, zlib.decompressobj()
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if end + 4 > len(content):
            raise OSError("it ends too early")
        # An upper-case letter marks the chunks that pixels depend on.
        if kind[:1].isupper() and zlib.crc32(view[place + 4 : end]) != struct.unpack_from(">I", content, end)[0]:
            raise OSError("its checksum is wrong")
        if kind == b"IHDR":
            claimed = _png_bytes(*struct.unpack_from(">IIBBBBB", content, place + 8))
        elif kind == b"IDAT" and claimed is not None:
            packed: bytes | memoryview = view[place + 8 : end]
            while packed and held <= claimed:
                held += len(inflate.decompress(packed, INFLATED))
                packed = inflate.unconsumed_tail
        place = end + 4
    if claimed is not None and held != claimed:
        raise OSError(f"its header claims {claimed} bytes of pixels, it holds {'more' if held > claimed else held}")


def _check_jpeg(content: bytes) -> None:
    """Refuses a JPEG that claims more blocks of 8 × 8 pixels than its bits could hold: Pillow fills them with grey.

    A block takes two bits at least, one where it is progressive. Fewer claimed in excess cannot be told.

    Raises:
        OSError: saying what is wrong.
    """
    if not content.startswith(b"\xff\xd8"):
        return
    place = 2
    while place + 9 <= len(content) and content[place] == 0xFF:
        kind, length = content[place + 1], int.from_bytes(content[place + 2 : place + 4], "big")
        if kind in JPEG_BITS:
            height, width = struct.unpack_from(">HH", content, place + 5)
            blocks = -(height // -8) * -(width // -8)
            if blocks * JPEG_BITS[kind] > 8 * len(content):
                raise OSError(f"its header claims {height} × {width} pixels, it holds fewer")
            return
        # padding has no length
        place += 1 if kind == 0xFF else 2 + length


def _png_bytes(
    width: int, height: int, bits: int, colour: int, compression: int, filtering: int, interlaced: int
) -> int | None:
    """How many bytes the pixels of a PNG take, each row with one for its filter; None of a kind that there is not."""
    if colour not in PNG_CHANNELS:
        return None
    total = 0
    for x, y, across, down in ADAM7 if interlaced else ((0, 0, 1, 1),):
        columns, rows = -((x - width) // across), -((y - height) // down)
        if columns > 0 and rows > 0:
            total += rows * (1 + (columns * bits * PNG_CHANNELS[colour] + 7) // 8)
    return total


def _upright(picture: Image.Image) -> Image.Image:
    """As viewers show it: turned and mirrored as its EXIF orientation says."""
    return picture if _orientation(picture) == 1 else ImageOps.exif_transpose(picture)


def _orientation(picture: Image.Image) -> int:
    number = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return number if number in range(1, 9) else 1


def read_picture(path: PathLike, mode: str = "RGB") -> np.ndarray:
    """A picture in the form that a network needs, whatever form it is stored in.

    It is turned as viewers show it (EXIF orientation). Grey becomes three equal channels, palettes are looked up,
    transparency is dropped unless it is asked for. Grey of 16 bits is scaled to 8: 0 … 65535, but 0 … 4095 where no
    value is higher (12 bits), and 0 … 255 where none is higher than that. Refused: several pages or frames,
    floating-point and negative values. Of DICOM see `read_frame`.

    Args:
        path: of the file.
        mode: "RGB" or "BGR" (H, W, 3), "RGBA" or "BGRA" (H, W, 4), "L" for grey (H, W).

    Returns:
        uint8.

    Raises:
        InputError: when the file is damaged or cannot be read in this mode, or there is no such mode.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("L", (4, 3), 7).save(f"{folder}/a.png")
        ...     read_picture(f"{folder}/a.png").shape, read_picture(f"{folder}/a.png", "L")[0].tolist()
        ((3, 4, 3), [7, 7, 7, 7])
    """
    return _read_picture(Path(path), mode)[0]


def _read_picture(path: Path, mode: str) -> tuple[np.ndarray, int]:
    """The picture, and its EXIF orientation."""
    if mode not in PICTURE_MODES:
        raise InputError(f"mode must be one of {', '.join(PICTURE_MODES)}, got {mode!r}")
    if is_dicom(split_frame(path)[0]):
        if PICTURE_MODES[mode] == 4:
            raise InputError("has no fourth channel (DICOM)", path=path, remedy="expected an alpha channel")
        array = read_frame(path, mode)
        return (array[..., ::-1] if mode == "BGR" else array), 1
    with _opened(path) as file:
        # Before anything decodes the pixels.
        deep = any("16" in str(tile.args) for tile in file.tile)
        orientation = _orientation(file)
        picture = _upright(file)
        stored = np.asarray(picture)
        if stored.dtype.itemsize > 1:
            picture = Image.fromarray(_to_bytes(stored, path))
        elif deep and 0 < stored.max() < 16:
            fact = f"16 bits for each colour, of which the highest 4 are used up to {stored.max()}"
            raise InputError(fact, path=path, remedy="save it with 8 bits for each colour")
        return _in_mode(picture, mode, path), orientation


def _in_mode(picture: Image.Image, mode: str, path: Path | None) -> np.ndarray:
    """A decoded picture of 8 bits as the array of a mode; `path` is None for one that came from memory."""
    if PICTURE_MODES[mode] == 4 and not picture.has_transparency_data:
        fact = f"has no fourth channel ({picture.mode})"
        raise InputError(fact, path=path, remedy="expected red, green, blue and alpha, as in_channels is 4")
    if picture.mode == "CMYK":
        _say_once("CMYK", f"{path}: printing colours (CMYK) are turned into red, green and blue without a profile")
    if PICTURE_MODES[mode] < 4:
        # Pillow warns of palettes with transparency.
        picture.info.pop("transparency", None)
    array = np.asarray(picture.convert(mode.replace("BGR", "RGB")))
    return array[..., [2, 1, 0, 3][: array.shape[-1]]] if "BGR" in mode else array


def _to_bytes(stored: np.ndarray, path: Path) -> np.ndarray:
    """Grey of more than 8 bits as uint8, see `read_picture`."""
    if stored.dtype.kind == "f" or stored.min() < 0 or stored.max() > 65535:
        fact = f"values from {stored.min():g} to {stored.max():g}, expected 8 or 16 bits without a sign"
        raise InputError(fact, path=path, remedy="save it as such")
    highest = stored.max()
    if highest > 4095:
        return (stored / 257).round().astype(np.uint8)
    bits = 8 if highest <= 255 else 12
    if highest:
        fact = f"stored in 16 bits, but no value is above {2**bits - 1}: taken for {bits} bits"
        _say_once(f"{bits} bits", f"{path}: {fact}")
    return (stored / (2**bits - 1) * 255).round().astype(np.uint8)


def read_mask(path: PathLike, label_map: Mapping[int, int] | None = None, classes: int = 1) -> np.ndarray:
    """A mask as class indices, whatever numbers, colours or palette the picture stores.

    With `label_map`, or for several classes, the stored numbers count; of a palette they are the indices. For one class
    without `label_map` it is the picture that counts, as viewers show it:

    - Two values: one is the background, the other is class 1. Background is what is transparent or black; else the
      number or palette index 0; else, as a guess that is logged, grey or white beside a colour, else the darker one.
    - One value: the background if it is black, transparent or 0, else class 1 everywhere.
    - More values: a soft mask (anti-aliased, resized, JPEG) is cut at half of the range, and anything else is refused.
      A soft mask is of one colour and reaches from nearly black to nearly white (below 64, above 191). Its values
      between lie on edges: most have a darker and a brighter neighbour, and none fills 3 × 3 pixels. Compression may
      add ripples of 12, but of up to 16 values not most may fill 3 × 3 pixels.
    - Transparency counts as black. Where everything is black it is the mask: what is opaque is class 1.

    A mask is turned as viewers show it (EXIF orientation), as images are.

    Args:
        path: of the file.
        label_map: {stored number: class}; a stored number that is not listed is refused.
        classes: how many classes there are. Without `label_map` the numbers 0 … C of several are taken as they are.

    Returns:
        (H, W) uint8.

    Raises:
        InputError: when the file is damaged, or holds values that do not say which class they are.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.fromarray(np.array([[0, 2, 2, 0]], np.uint8)).save(f"{folder}/a.png")
        ...     read_mask(f"{folder}/a.png").tolist()
        [[0, 1, 1, 0]]
    """
    path = Path(path)
    if label_map is None and classes > 1:
        label_map = {index: index for index in range(classes + 1)}
    with _opened(path) as file:
        lossy = file.format in ("JPEG", "MPO")
        picture = _upright(file)
        picture.load()
        if label_map is not None:
            return _by_number(_numbers(picture, path), label_map, path)
        return _foreground(picture, lossy, path)


def _numbers(picture: Image.Image, path: Path) -> np.ndarray:
    """The stored numbers (H, W). Grey saved as colour, or with an alpha channel that says nothing, is grey."""
    stored = np.asarray(picture)
    if stored.ndim == 3:
        grey, rest = stored[..., :1], stored[..., 1:]
        if picture.mode in ("RGBA", "LA") and (rest[..., -1] == rest[0, 0, -1]).all():
            rest = rest[..., :-1]
        if picture.mode not in ("RGB", "RGBA", "LA") or not (rest == grey).all():
            fact = f"holds {picture.mode} pixels, expected one whole number for each"
            raise InputError(fact, path=path, remedy="save the numbers as grey values")
        stored = stored[..., 0]
    if stored.dtype.kind == "f":
        whole = np.round(stored)
        if not (whole == stored).all():
            raise InputError(f"holds {_shown(stored)}, expected whole numbers", path=path)
        stored = whole.astype(np.int64)
    return stored.astype(np.uint8) if stored.dtype.kind == "b" else stored


def _by_number(stored: np.ndarray, label_map: Mapping[int, int], path: Path) -> np.ndarray:
    found = _values(stored)
    if unknown := sorted(set(found.tolist()) - set(label_map)):
        some = ", ".join(map(str, unknown[:SHOWN])) + " …" * (len(unknown) > SHOWN)
        fact = f"holds {some}, which --label_map {dict(label_map)} does not list"
        raise InputError(fact, path=path, remedy="say with --label_map which class each stored number is")
    if stored.dtype == np.uint8:
        table = np.zeros(256, np.uint8)
        for number in found.tolist():
            table[number] = label_map[number]
        return table[stored]
    classes = np.zeros(stored.shape, np.uint8)
    for number in found.tolist():
        classes[stored == number] = label_map[number]
    return classes


def _values(stored: np.ndarray) -> np.ndarray:
    """The different values, sorted."""
    if stored.dtype == np.uint8:
        return np.flatnonzero(Image.fromarray(stored).histogram())
    return np.unique(stored)


def _shown(stored: np.ndarray) -> str:
    found = _values(stored)
    return ", ".join(f"{value:g}" for value in found[:SHOWN].tolist()) + " …" * (len(found) > SHOWN)


def _foreground(picture: Image.Image, lossy: bool, path: Path) -> np.ndarray:
    """Class 1 of a mask of one class, see `read_mask`."""
    if picture.mode in ("P", "PA", "LA", "La", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"):
        return _coloured_foreground(picture, lossy, path)
    stored = np.asarray(picture)
    if stored.dtype.kind == "b":
        return stored.astype(np.uint8)
    if stored.dtype.kind == "f" and not np.isfinite(stored).all():
        raise InputError("holds values that are not finite", path=path)
    found = _values(stored)
    if len(found) == 1:
        return np.full(stored.shape, found[0] != 0, np.uint8)
    if len(found) == 2 and not lossy:
        low, high = found
        background = 0 if high == 0 else low
        if background and (low > RIPPLE or high < 255 - RIPPLE):
            _say_once("grey", f"{path}: of the values {low:g} and {high:g} the lower one is taken for the background")
        return (stored != background).astype(np.uint8)
    return _soft(_grey(stored, path), lossy, path, lambda: _shown(stored))


def _grey(stored: np.ndarray, path: Path) -> np.ndarray:
    """More than two values as uint8: of 8 or 16 bits, or from 0 to 1."""
    if stored.dtype == np.uint8:
        return stored
    low, high = stored.min(), stored.max()
    to_255 = 1 / 257 if high > 255 else 255.0 if stored.dtype.kind == "f" and high <= 1 else 1.0
    if low < 0 or high > 65535:
        raise InputError(f"holds {_shown(stored)}, expected a mask", path=path)
    return (stored * to_255).round().astype(np.uint8)


def _soft(grey: np.ndarray, lossy: bool, path: Path, shown: Callable[[], str]) -> np.ndarray:
    """A soft mask cut at half of the range; anything else is refused."""
    found = _values(grey)
    if lossy and found[0] >= BRIGHT:
        return np.ones(grey.shape, np.uint8)
    reaches = found[0] <= DARK and found[-1] >= BRIGHT
    if not reaches or _is_labelled(grey, found, few=not lossy and len(found) <= FEW_VALUES):
        remedy = "say with --label_map which class each stored number is, or save it as black and white"
        raise InputError(f"holds the values {shown()}: more than background and one class", path=path, remedy=remedy)
    return (grey > 127).astype(np.uint8)


def _of_neighbours(grey: np.ndarray, choose: np.ufunc) -> np.ndarray:
    """The lowest or highest of the 3 × 3 pixels around each."""
    padded = np.pad(grey, 1, mode="edge")
    rows = choose.reduce((padded[:-2], padded[1:-1], padded[2:]))
    chosen: np.ndarray = choose.reduce((rows[:, :-2], rows[:, 1:-1], rows[:, 2:]))
    return chosen


def _is_labelled(grey: np.ndarray, found: np.ndarray, few: bool) -> bool:
    """True where values between the lowest and the highest fill areas, or lie elsewhere than on edges."""
    darkest, brightest = (_of_neighbours(grey, choose) for choose in (np.minimum, np.maximum))
    # values that fill 3 × 3 pixels
    flat = np.unique(grey[1:-1, 1:-1][(darkest == brightest)[1:-1, 1:-1]])
    between = found[1:-1]
    if few and np.isin(between, flat).sum() > len(between) / 2:
        return True
    bottom, top = int(found[0]) + RIPPLE, int(found[-1]) - RIPPLE
    if ((flat > bottom) & (flat < top)).any():
        return True
    inner = (grey > bottom) & (grey < top)
    on_edge = inner & (darkest < grey) & (brightest > grey)
    return bool(np.count_nonzero(on_edge) < np.count_nonzero(inner) / 2)


def _coloured_foreground(picture: Image.Image, lossy: bool, path: Path) -> np.ndarray:
    """As `_foreground`, of a palette, of colours, or with an alpha channel."""
    indices = np.asarray(picture) if picture.mode == "P" else None
    if picture.has_transparency_data or picture.mode in ("La", "RGBa"):
        rgba = picture.convert("RGBA") if picture.mode != "La" else picture.convert("LA").convert("RGBA")
        alpha = rgba.getchannel("A")
        picture = rgba.convert("RGB")
        if np.ptp(np.asarray(alpha)):
            picture = Image.composite(picture, Image.new("RGB", picture.size), alpha)
            if not np.asarray(picture).any():
                return _foreground(alpha, lossy, path)
            # What shines through belongs to no palette entry.
            indices = None
    elif picture.mode != "RGB":
        picture = picture.convert("RGB")
    red, green, blue = picture.split()
    if indices is None and red.tobytes() == green.tobytes() == blue.tobytes():
        return _foreground(red, lossy, path)
    colours = picture.getcolors(2) if not lossy else None
    if indices is not None:
        used = _values(indices).tolist()
        colours = [(0, _palette_colour(picture, indices, index)) for index in used] if len(used) <= 2 else None
        if len(used) == 2 and colours and colours[0][1] == colours[1][1]:
            return (indices != min(used)).astype(np.uint8)
    if not colours:
        return _soft_colour(picture, lossy, path, indices)
    if len(colours) == 1:
        nothing = colours[0][1] == (0, 0, 0) or (indices is not None and not indices.any())
        return np.full((picture.height, picture.width), not nothing, np.uint8)
    background = _background([colour for _, colour in colours], indices, path)
    array = np.asarray(picture)
    return (array != np.array(background, np.uint8)).any(axis=-1).astype(np.uint8)


def _palette_colour(picture: Image.Image, indices: np.ndarray, index: int) -> tuple[int, ...]:
    row, column = np.unravel_index(int(np.argmax(indices == index)), indices.shape)
    pixel: Any = picture.getpixel((int(column), int(row)))
    return tuple(pixel)


def _background(colours: Sequence[Any], indices: np.ndarray | None, path: Path) -> tuple[int, ...]:
    """Of two colours the background, see `read_mask`; those of a palette come in the order of their indices."""
    if (0, 0, 0) in colours:
        return (0, 0, 0)
    if indices is not None and not indices.min():
        return tuple(colours[0])
    grey = [colour for colour in colours if len(set(colour)) == 1]
    weights = np.array([0.299, 0.587, 0.114])
    background = grey[0] if len(grey) == 1 else min(colours, key=lambda colour: float(weights @ np.array(colour)))
    other = next(colour for colour in colours if colour != background)
    _say_once("colour", f"{path}: of the colours {background} and {other} the former is taken for the background")
    return tuple(background)


def _soft_colour(picture: Image.Image, lossy: bool, path: Path, indices: np.ndarray | None) -> np.ndarray:
    """A soft mask of one colour on black, told by the inside of its bright areas."""
    array = np.asarray(picture)
    value = array.max(axis=-1)
    bright = array[_of_neighbours(value, np.minimum) >= BRIGHT]

    def shown() -> str:
        if indices is not None:
            return _shown(indices)
        colours = sorted(colour for _, colour in picture.getcolors(picture.width * picture.height) or [])
        return ", ".join(map(str, colours[:SHOWN])) + " …" * (len(colours) > SHOWN)

    shades = bright * (255 / bright.max(axis=-1, keepdims=True)) if len(bright) else bright
    compressed = lossy or picture.getcolors(FEW_VALUES) is None
    if len(bright) and (np.ptp(shades, axis=0) > COLOUR_SPREAD[compressed]).any():
        remedy = "save one number for each class and say with --label_map which is which"
        kind = "colours" if indices is None else "values"
        raise InputError(f"holds the {kind} {shown()}: more than background and one class", path=path, remedy=remedy)
    return _soft(value, lossy, path, shown)


class PictureReader(ImageReader):
    """Pictures for `LoadImaged`: rows first, as viewers show them; see `read_picture`.

    Args:
        mode: "RGB", "BGR", "RGBA", "BGRA" or "L".
        channels: of the network, which decides instead: 1 is grey, 4 adds the alpha channel to the mode's colours.

    Raises:
        InputError: when there is no such mode.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.new("RGB", (4, 3)).save(f"{folder}/a.jpg")
        ...     LoadImage(PictureReader("BGR"))(f"{folder}/a.jpg").shape
        torch.Size([3, 4, 3])
    """

    def __init__(self, mode: str = "RGB", channels: int | None = None) -> None:
        super().__init__()
        if mode not in PICTURE_MODES:
            raise InputError(f"mode must be one of {', '.join(PICTURE_MODES)}, got {mode!r}")
        if channels not in (None, 1, 3, 4):
            raise InputError(f"pictures have 1, 3 or 4 channels, not in_channels {channels!r}")
        colours = mode if mode != "L" else "RGB"
        self.mode = {None: mode, 1: "L", 3: colours[:3], 4: colours[:3] + "A"}[channels]

    def verify_suffix(self, filename: Sequence[PathLike] | PathLike) -> bool:
        return all(
            has_suffix(name, PICTURE_SUFFIXES) or is_dicom(split_frame(name)[0]) for name in ensure_tuple(filename)
        )

    def read(self, data: Sequence[PathLike] | PathLike, **kwargs: Any) -> list[Path]:
        """The paths themselves."""
        return [Path(file) for file in ensure_tuple(data)]

    def get_data(self, img: Sequence[Path]) -> tuple[np.ndarray, dict]:
        """(array (H, W) or (H, W, C), metadata).

        Raises:
            InputError: when there are several files, or this one is damaged or cannot be read in this mode.
        """
        if len(img) != 1:
            raise InputError(f"expected one picture, got {', '.join(printable(str(file)) for file in img)}")
        array, orientation = _read_picture(img[0], self.mode)
        meta = _metadata(array, orientation)
        file, frame = split_frame(img[0])
        if is_dicom(file) and frame is None:
            meta[DICOM_FILES] = json.dumps([str(file)])
        return np.ascontiguousarray(array), meta

    def of_array(self, array: np.ndarray) -> tuple[np.ndarray, dict]:
        """What `get_data` gives for a file that holds this picture.

        Args:
            array: uint8: grey (H, W), red, green and blue (H, W, 3), or with alpha (H, W, 4).

        Raises:
            InputError: when it is no such array, or lacks the alpha channel that is asked for.

        Example:
            >>> PictureReader("BGR").of_array(np.array([[[1, 2, 3]]], np.uint8))[0].tolist()
            [[[3, 2, 1]]]
        """
        if array.dtype != np.uint8 or not array.size or not (array.ndim == 2 or array.shape[2:] in ((3,), (4,))):
            fact = (
                f"the array is {array.dtype} of shape {array.shape}, expected a picture in uint8: (H, W) or (H, W, 3)"
            )
            raise InputError(fact)
        taken = np.ascontiguousarray(_in_mode(Image.fromarray(array), self.mode, None))
        return taken, _metadata(taken, 1)


class MaskReader(PictureReader):
    """Masks for `LoadImaged`: class indices (H, W), whatever numbers the picture stores; see `read_mask`.

    Several files are the masks of one image: what any of them marks is marked.

    Args:
        label_map: {stored number: class}.
        classes: how many.

    Example:
        >>> import tempfile
        >>> from monai.transforms import LoadImage
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Image.fromarray(np.array([[0, 85, 170]], np.uint8)).save(f"{folder}/a.png")
        ...     LoadImage(MaskReader({0: 0, 85: 1, 170: 2}))(f"{folder}/a.png").tolist()
        [[0.0, 1.0, 2.0]]
    """

    def __init__(self, label_map: Mapping[int, int] | None = None, classes: int = 1) -> None:
        super().__init__("L")
        self.label_map = None if label_map is None else dict(label_map)
        self.classes = classes

    def get_data(self, img: Sequence[Path]) -> tuple[np.ndarray, dict]:
        """(array (H, W) uint8, metadata).

        Raises:
            InputError: when a file cannot be read, two differ in size or class, or values do not say which class they
                are.
        """
        array = merged_masks(img, self.label_map, self.classes)
        return array, _metadata(array, 1)


def merged_masks(paths: Sequence[PathLike], label_map: Mapping[int, int] | None = None, classes: int = 1) -> np.ndarray:
    """The masks of one image in one: class indices (H, W) uint8; see `read_mask`.

    Raises:
        InputError: when a file cannot be read, or two differ in size or in the class of a pixel.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, values in (("a_mask.png", [[0, 255, 0]]), ("a_mask_1.png", [[0, 0, 255]])):
        ...         Image.fromarray(np.array(values, np.uint8)).save(f"{folder}/{name}")
        ...     merged_masks([f"{folder}/a_mask.png", f"{folder}/a_mask_1.png"]).tolist()
        [[0, 1, 1]]
    """
    merged = read_mask(paths[0], label_map, classes)
    for path in paths[1:]:
        one = read_mask(path, label_map, classes)
        if one.shape != merged.shape:
            raise InputError(f"{_size(one)} pixels, but {printable(str(paths[0]))} {_size(merged)}", path=path)
        if ((merged > 0) & (one > 0) & (merged != one)).any():
            raise InputError(f"gives pixels another class than {printable(str(paths[0]))}", path=path)
        merged = np.where(one > 0, one, merged)
    return merged


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]}×{array.shape[0]}"


def _metadata(array: np.ndarray, orientation: int) -> dict:
    return {
        MetaKeys.AFFINE: np.eye(4),
        MetaKeys.ORIGINAL_AFFINE: np.eye(4),
        MetaKeys.SPATIAL_SHAPE: np.asarray(array.shape[:2]),
        MetaKeys.SPACE: SpaceKeys.RAS,
        MetaKeys.ORIGINAL_CHANNEL_DIM: -1 if array.ndim == 3 else float("nan"),
        EXIF_ORIENTATION: orientation,
    }


def check_sizes(
    image_path: PathLike, image_shape: Sequence[int], orientation: int, mask_path: PathLike, mask_shape: Sequence[int]
) -> None:
    """Refuses an image and a mask of different size.

    A mask belongs on the image as viewers show it. One that was drawn on the stored pixels of a turned photograph is
    told by its size, and refused. Where EXIF turns by 180° or mirrors, or the picture is square, sizes cannot tell:
    the rule is kept, and said once.

    Args:
        image_path: of the image.
        image_shape: (H, W) as shown.
        orientation: of the image, as EXIF numbers it: 1 as stored, 5 … 8 swap height and width.
        mask_path: of the mask.
        mask_shape: (H, W) as shown.

    Raises:
        InputError: when they differ.

    Example:
        >>> check_sizes("a.jpg", (40, 30), 6, "a.png", (30, 40))
        Traceback (most recent call last):
        transforms.files.InputError: a.png: 40×30 pixels, the image a.jpg 30×40: it fits the stored pixels, which ...
    """
    height, width = (int(size) for size in image_shape)
    mask_height, mask_width = (int(size) for size in mask_shape)
    if (height, width) == (mask_height, mask_width):
        if orientation > 1 and (orientation < 5 or height == width):
            fact = f"its EXIF orientation ({orientation}) turns or mirrors it, and sizes do not tell whether the mask"
            _say_once("EXIF", f"{image_path}: {fact} was drawn on what viewers show; that is assumed")
        return
    fact = f"{mask_width}×{mask_height} pixels, the image {printable(Path(image_path).name)} {width}×{height}"
    if orientation >= 5 and (height, width) == (mask_width, mask_height):
        fact += f": it fits the stored pixels, which the image's EXIF orientation ({orientation}) turns"
        raise InputError(fact, path=mask_path, remedy="turn the mask, or take the orientation out of the image")
    raise InputError(fact, path=mask_path, remedy="image and mask must have the same size")


class SameSized(MapTransform):
    """Refuses an item whose image and mask differ in size, as they were read; see `check_sizes`.

    Args:
        keys: of the image and of its mask.

    Example:
        >>> item = {"image": MetaTensor(np.zeros((3, 4, 5))), "label": MetaTensor(np.zeros((1, 4, 5)))}
        >>> SameSized(["image", "label"])(item) is item
        True
    """

    def __init__(self, keys: KeysCollection = ("image", "label"), allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> Mapping[Hashable, Any]:
        """The item itself.

        Raises:
            InputError: when the sizes differ.
        """
        first, *others = self.keys
        image = data[first]
        meta = image.meta if isinstance(image, MetaTensor) else {}
        for key in others:
            mask = data[key]
            names = [
                tensor.meta.get(ImageMetaKey.FILENAME_OR_OBJ, name) if isinstance(tensor, MetaTensor) else str(name)
                for name, tensor in ((first, image), (key, mask))
            ]
            check_sizes(names[0], image.shape[-2:], int(meta.get(EXIF_ORIENTATION, 1)), names[1], mask.shape[-2:])
        return data


class SaveImageMask(SaveImage):
    """Writes the mask of a picture as `NAME_mask.png`, NAME being the picture's without suffix.

    The mask of one class is its probability cut at 0.5; of several classes the most probable wins. MONAI's tools know
    the step by its base class; its other options have no effect. The mask of a DICOM picture is a DICOM-SEG,
    `NAME_seg.dcm`; those of a DICOM file's several frames are PNG.

    Args:
        output_dir: folder of the masks, made if need be.
        label_map: {stored number: class}: masks hold the first number listed for a class. None writes one class as 0
            and 255, several as their indices.
        probabilities: also write `NAME_probability.png`, 0 … 255; with several classes one file for each but the
            background, `NAME_probability_1.png` …
        classes: names of the classes 1 … C, for DICOM.
        seg_type: of DICOM: "binary" or "labelmap".
        algorithm: its name, for DICOM.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = SaveImageMask(folder)(np.full((1, 2, 2), 0.7), {"filename_or_obj": "images/a.jpg"})
        ...     np.asarray(Image.open(Path(folder) / "a_mask.png")).tolist()
        [[255, 255], [255, 255]]
    """

    def __init__(
        self,
        output_dir: PathLike,
        label_map: Mapping[int, int] | None = None,
        probabilities: bool = False,
        classes: Sequence[str] = (),
        seg_type: str = "binary",
        algorithm: str = "segmentation",
    ) -> None:
        super().__init__(output_dir, "mask", ".png", np.uint8, separate_folder=False, print_log=False)
        self.output_dir = Path(output_dir)
        self.numbers = {index: number for number, index in reversed(dict(label_map or {}).items())}
        self.probabilities = probabilities
        self.segments: dict[str, Any] = {"classes": classes, "seg_type": seg_type, "algorithm": algorithm}

    def place(self, name: str) -> Path:
        """Folder and NAME of the files of that name."""
        return self.output_dir / name

    def __call__(
        self, img: NdarrayOrTensor, meta_data: Mapping | None = None, filename: PathLike | None = None
    ) -> NdarrayOrTensor:
        """Writes the files and returns `img`.

        Args:
            img: probabilities (K, H, W): one channel for one class, otherwise the background first; or whole numbers
                (1, H, W), which are the classes.
            meta_data: has the picture's name as "filename_or_obj"; a MetaTensor brings its own.
            filename: folder and NAME to use instead.
        """
        meta = img.meta if isinstance(img, MetaTensor) else meta_data
        path = Path(filename or self.output_dir / stem(self.fname_formatter(meta, self)["subject"]))
        values = convert_to_numpy(img)
        if np.issubdtype(values.dtype, np.integer):
            indices, classes = values[0], max(len(self.segments["classes"]), int(values.max()), 1)
        else:
            indices = values[0] > 0.5 if len(values) == 1 else values.argmax(0)
            classes = max(len(values) - 1, 1)
        numbers = self.numbers or ({1: 255} if classes == 1 else {})
        stored = [numbers.get(index, index) for index in range(classes + 1)]
        if meta and DICOM_FILES in meta:
            file = path.with_name(f"{path.name}_seg.dcm")
            write_segmentation(file, indices.astype(np.uint8), None, meta[DICOM_FILES], **self.segments)
        else:
            _save(np.array(stored, np.min_scalar_type(max(stored)))[indices.astype(int)], path, "mask")
        if self.probabilities:
            foreground = values if len(values) == 1 else values[1:]
            for index, channel in enumerate(foreground, 1):
                number = f"_{index}" if len(foreground) > 1 else ""
                _save((255 * channel).round().astype(np.uint8), path, f"probability{number}")
        self._data_index += 1
        return img


class SaveImageMaskd(SaveImaged):
    """Dictionary version of `SaveImageMask`; an item's "name", where it has one, is NAME.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pred = MetaTensor(np.zeros((3, 2, 2)), meta={"filename_or_obj": "a.png"})
        ...     _ = SaveImageMaskd("pred", folder)({"pred": pred})
        ...     [file.name for file in Path(folder).iterdir()]
        ['a_mask.png']
    """

    def __init__(
        self,
        keys: KeysCollection,
        output_dir: str | Path,
        label_map: Mapping[int, int] | None = None,
        probabilities: bool = False,
        allow_missing_keys: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(keys, output_dir=output_dir, allow_missing_keys=allow_missing_keys)
        self.saver = SaveImageMask(output_dir, label_map, probabilities, **options)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Writes the files and returns the item."""
        return save_items(self, data)


def save_items(writer: SaveImaged, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
    """Writes the keys of an item by the writer's `saver`, under the item's "name" where it has one."""
    item = dict(data)
    name = item.get("name")
    for key in writer.key_iterator(item):
        meta = item.get(f"{key}_{PostFix.meta()}")
        filename = writer.saver.place(str(name)) if name else None  # type: ignore[attr-defined]
        item[key] = writer.saver(item[key], meta_data=meta, filename=filename)
    return item


def _save(array: np.ndarray, path: Path, what: str) -> None:
    with replacing(path.with_name(f"{path.name}_{what}.png")) as temporary:
        Image.fromarray(array).save(temporary)
