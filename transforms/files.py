"""What belongs to files whatever they hold: suffixes, names, lists, pairs, hashes, and writing whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import logging
import os
import re
import shutil
import tempfile
import unicodedata
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

PathLike = str | os.PathLike[str]

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".h5", ".hdf5", ".nrrd", ".nhdr", ".mha", ".mhd")
DICOM_SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif")

# What systems leave in folders, besides hidden files.
CLUTTER = ("Thumbs.db", "desktop.ini", "__MACOSX")

_VOLUME, _OTHERS = ("|".join(map(re.escape, some)) for some in (VOLUME_SUFFIXES, PICTURE_SUFFIXES + DICOM_SUFFIXES))
# The released Synapse volumes are called case0001.npy.h5; .npz are slices to train on.
_SUFFIX = re.compile(rf"(?<=.)((\.npy)?({_VOLUME})|{_OTHERS}|\.npz)\Z", re.IGNORECASE | re.DOTALL)
# What by-products, which are neither image nor mask, and masks and predictions add to the name of their image.
_BESIDE = r"superpixels|probability(_\d+)?|overlay"
_BY_PRODUCT = re.compile(rf"(?<=.)_({_BESIDE})\Z", re.IGNORECASE | re.DOTALL)
_ADDED = rf"_(segmentation|seg|mask(_\d+)?|labels?|gt|prediction|pred|trans|lesion|{_BESIDE})\Z"
_ADDITION = re.compile(rf"(?<=.){_ADDED}", re.IGNORECASE | re.DOTALL)
# MONAI's own SaveImage makes case0001.npy_pred.nii.gz from case0001.npy.h5, hence `.npy` here.
_DECORATION = re.compile(rf"(?<=.)({_ADDED}|\.npy\Z)|\A(img|label)(?=\d)", re.IGNORECASE | re.DOTALL)
_SECOND_MASK = re.compile(r"_mask_\d+\Z", re.IGNORECASE)
# Options of bundles that other commands have too, with dashes, and without a value where it is true.
_SHARED_OPTION = re.compile(r"(?<!\S)(--(?:allow_unpaired|assume_hu|label_map))\b(?: true\b)?")
# Letters of a name and of a line that are shown.
NAME_LENGTH, LINE_LENGTH = 240, 900

logger = logging.getLogger(__name__)


def printable(text: str) -> str:
    """The text in one line: control characters and what no screen can show are escaped.

    Example:
        >>> printable("two\\nlines")
        'two\\\\nlines'
    """
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def shortened(text: str, length: int = NAME_LENGTH) -> str:
    """The text with its middle left out where it is longer than `length`: a line is to be read.

    Example:
        >>> shortened("a" * 1000, 9)
        'aaaa…aaaa'
    """
    half = (length - 1) // 2
    return text if len(text) <= length else f"{text[:half]}…{text[-half:]}"


class InputError(ValueError):
    """What a user gave cannot be taken. Its text is one line: file, fact, remedy.

    Library functions raise it; commands print the line and exit with 1. Control characters in the file's name are shown
    escaped; names and values that no screen can hold lose their middle.

    Args:
        fact: what is wrong.
        path: the file or folder, where it is one's fault.
        remedy: what to do about it, where the fact does not say so already.

    Example:
        >>> print(InputError("values from 0 to 1 are not Hounsfield units", path="a.nii", remedy="give the CT itself"))
        a.nii: values from 0 to 1 are not Hounsfield units; give the CT itself
    """

    def __init__(self, fact: str, *, path: PathLike | None = None, remedy: str = "") -> None:
        name = "" if path is None else f"{shortened(printable(os.fspath(path)))}: "
        fact, remedy = shortened(fact, LINE_LENGTH), shortened(remedy, LINE_LENGTH)
        super().__init__(f"{name}{fact}; {remedy}" if remedy else f"{name}{fact}")


def dashed(line: str) -> str:
    """A message with options as `python -m prepare` and `python -m evaluation` spell them, not as bundles do.

    Example:
        >>> dashed("values are not Hounsfield units; say --assume_hu true where they are")
        'values are not Hounsfield units; say --assume-hu where they are'
    """
    return _SHARED_OPTION.sub(lambda found: found[1].replace("_", "-"), line)


def log_warnings() -> None:
    """From here on what libraries warn of is one line of the log, without the source that Python shows with it.

    Example:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     log_warnings()
    """

    def show(message: Warning | str, category: type[Warning], *place: object, **more: object) -> None:
        logger.warning(shortened(" ".join(f"{category.__name__}: {message}".split()), LINE_LENGTH))

    warnings.showwarning = show


def expanded(path: str) -> str:
    """The path with a leading `~` as the home folder, which shells leave alone in `--dataset_dir=~/data`.

    A folder of that very name is what is meant where there is one.

    Example:
        >>> expanded("data/~"), expanded("~/data").endswith("/data"), expanded("~/data").startswith("~")
        ('data/~', True, False)
    """
    first = path.replace("\\", "/").partition("/")[0]
    return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(first) else path


def error_chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that led to it, as a traceback shows them.

    Example:
        >>> error = RuntimeError("applying transform")
        >>> error.__cause__ = InputError("no such file", path="a.png")
        >>> [str(one) for one in error_chain(error)]
        ['applying transform', 'a.png: no such file']
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def has_suffix(path: PathLike, suffixes: Sequence[str]) -> bool:
    """True if the file's name ends in one of `suffixes`, in upper or lower case.

    Example:
        >>> has_suffix("scans/img0001.NII.GZ", VOLUME_SUFFIXES), has_suffix("notes.txt", PICTURE_SUFFIXES)
        (True, False)
    """
    return os.fspath(path).lower().endswith(tuple(suffixes))


def is_dicom(path: PathLike) -> bool:
    """True for a file that is called as DICOM is, or has its mark in front and no other format's name.

    Example:
        >>> is_dicom("IM0001.dcm"), is_dicom(__file__)
        (True, False)
    """
    if has_suffix(path, DICOM_SUFFIXES):
        return True
    if has_suffix(path, (*VOLUME_SUFFIXES, *PICTURE_SUFFIXES, ".npz")):
        return False
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def stem(path: PathLike) -> str:
    """The file's name without its folder and without the suffix of a volume, picture or slice; other dots stay.

    Example:
        >>> stem("test_vol_h5/case0001.npy.h5"), stem("img0001.nii.gz"), stem("benign (4).v2.PNG")
        ('case0001', 'img0001', 'benign (4).v2')
    """
    return _SUFFIX.sub("", Path(path).name)


def case_name(path: PathLike) -> str:
    """What image, label and prediction of one case have in common: the stem without `_mask`, `_pred`, `img` and so on.

    Example:
        >>> case_name("img0001_pred.nii.gz"), case_name("label0001.nii.gz")
        ('0001', '0001')
        >>> case_name("ISIC_0000000_segmentation.png"), case_name("benign (4)_mask_1.png")
        ('ISIC_0000000', 'benign (4)')
    """
    name = stem(path)
    while name != (name := _DECORATION.sub("", name)):
        pass
    return name


def made_of(path: PathLike) -> str:
    """The stem of the image that a mask, prediction or by-product was made of: `a` for `a_mask_1.png` and for `a.png`.

    Example:
        >>> made_of("benign (4)_mask_1.png"), made_of("benign (4).png")
        ('benign (4)', 'benign (4)')
    """
    return _ADDITION.sub("", stem(path))


def list_files(
    path: PathLike,
    suffixes: Sequence[str],
    recursive: bool = False,
    passed: Counter[str] | None = None,
    dicom: list[Path] | None = None,
) -> list[Path]:
    """The files in a folder that end in one of `suffixes`, sorted; hidden ones are left out, and `.img` beside `.hdr`.

    Args:
        path: the folder, or one file, which is then the only candidate.
        suffixes: in lower case; see `has_suffix`.
        recursive: look into sub-folders too.
        passed: counts what was left out, for `passed_over`.
        dicom: gets the files that are DICOM by name or content.

    Raises:
        InputError: when `path` does not exist or may not be read.

    Example:
        >>> list_files(__file__, [".py"]) == [Path(__file__)], list_files(__file__, PICTURE_SUFFIXES)
        (True, [])
    """
    path, passed = Path(path), Counter() if passed is None else passed
    try:
        if not path.exists():
            raise InputError("does not exist", path=path)
        candidates = [path] if path.is_file() else sorted(path.rglob("*") if recursive else path.iterdir())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    files = []
    for file in candidates:
        if file != path and any(_is_clutter(part) for part in file.relative_to(path).parts):
            passed["hidden"] += 1
        elif file.is_dir():
            passed["sub-folder"] += not recursive
        elif dicom is not None and file.is_file() and is_dicom(file):
            dicom.append(file)
        elif not has_suffix(file, suffixes):
            passed[f"*{file.suffix.lower()}" if file.suffix else "without suffix"] += 1
        elif not file.exists():
            passed["link to nothing"] += 1
        elif not file.is_file():
            # a pipe would be waited for
            passed["no file"] += 1
        else:
            files.append(file)
    headers = {file.with_suffix("") for file in files if has_suffix(file, [".hdr"])}
    return [file for file in files if not (has_suffix(file, [".img"]) and file.with_suffix("") in headers)]


def is_by_product(path: PathLike) -> bool:
    """True for what lies beside images and masks and is neither: superpixels, probabilities, overlays.

    Example:
        >>> is_by_product("a_overlay.png"), is_by_product("a_probability_2.png"), is_by_product("a_mask.png")
        (True, True, False)
    """
    return bool(_BY_PRODUCT.search(stem(path)))


def without_by_products(files: Sequence[Path], passed: Counter[str] | None = None) -> list[Path]:
    """The images among files: without by-products, and without the masks and predictions made of another one of them.

    `a_mask.png` is left out where `a.jpg` is in the same folder, and taken where it is not.

    Args:
        files: images, perhaps with other files among them.
        passed: counts what was left out, for `passed_over`.

    Example:
        >>> [file.name for file in without_by_products([Path("a.png"), Path("a_mask.png"), Path("b_mask.png")])]
        ['a.png', 'b_mask.png']
    """
    stems = {(file.parent, stem(file)) for file in files}
    made = [file for file in files if made_of(file) != stem(file) and (file.parent, made_of(file)) in stems]
    return _without(files, {*made, *filter(is_by_product, files)}, passed)


def masks_alone(files: Sequence[Path], passed: Counter[str] | None = None) -> list[Path]:
    """The masks among files: without by-products, and without the images beside their masks, as in raw downloads.

    Args:
        files: masks or predictions, perhaps with other files among them.
        passed: counts what was left out, for `passed_over`.

    Example:
        >>> [file.name for file in masks_alone([Path("a.png"), Path("a_mask.png"), Path("b.png")])]
        ['a_mask.png', 'b.png']
    """
    by_products = set(filter(is_by_product, files))
    masked = {(file.parent, made_of(file)) for file in files if made_of(file) != stem(file) and file not in by_products}
    images = {file for file in files if made_of(file) == stem(file) and (file.parent, stem(file)) in masked}
    if passed is not None:
        passed["image beside its mask"] += len(images)
    return [file for file in _without(files, by_products, passed) if file not in images]


def _without(files: Sequence[Path], left_out: set[Path], passed: Counter[str] | None) -> list[Path]:
    """The others; those left out are counted by what their names end in."""
    if passed is not None:
        for file in files:
            if file in left_out:
                passed[f"*{stem(file).removeprefix(made_of(file)).lower().rstrip('0123456789_')}"] += 1
    return [file for file in files if file not in left_out]


def passed_over(passed: Counter[str]) -> str:
    """What was left out of a folder, in words; empty where nothing was.

    Example:
        >>> passed_over(Counter({"hidden": 2, "*.txt": 1}))
        'passed over: 2 hidden, 1 *.txt'
    """
    counts = ", ".join(f"{count} {kind}" for kind, count in passed.most_common() if count)
    return printable(f"passed over: {counts}") if counts else ""


def find_folder(root: Path, name: str) -> Path | None:
    """The folder `name` in `root` or up to two folders deeper, as archives may unpack into folders of their own.

    Raises:
        InputError: when there are several.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     Path(root, "archive/Data/Data").mkdir(parents=True)
        ...     find_folder(Path(root), "Data") == Path(root, "archive/Data/Data")
        True
    """
    for depth in range(3):
        found = [path for path in sorted(root.glob("/".join([*["*"] * depth, glob.escape(name)]))) if path.is_dir()]
        found = [path for path in found if not any(_is_clutter(part) for part in path.relative_to(root).parts)]
        if len(found) > 1:
            fact = f"is there twice: {printable(str(found[1]))}"
            raise InputError(fact, path=found[0], remedy="leave one of them, or name its parent")
        if found:
            folder = found[0]
            while (folder / name).is_dir() and not any(file.is_file() for file in folder.iterdir()):
                folder = folder / name
            return folder
    return None


def _is_clutter(part: str) -> bool:
    return part.startswith(".") or part in CLUTTER


def read_list(path: PathLike) -> list[str]:
    """The names in a text file, one a line; blank lines, a byte order mark and Windows' line ends do not matter.

    Raises:
        InputError: when there is no such file, it is no text, or a name leads to another folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     size = Path(folder, "train.txt").write_bytes(b"\\xef\\xbb\\xbfa\\r\\n\\r\\nb c\\r\\n")
        ...     read_list(f"{folder}/train.txt")
        ['a', 'b c']
    """
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise InputError("is no file, expected a list of names", path=path)
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError("no such file", path=path) from error
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", path=path) from error
    except UnicodeDecodeError as error:
        raise InputError("is no list of names in UTF-8", path=path, remedy="save it as a text file again") from error
    if "\0" in text:
        raise InputError("is no list of names", path=path, remedy="save it as a text file in UTF-8 again")
    # Not splitlines, which divides names at rarer characters too.
    names = [line.strip() for line in text.split("\n") if line.strip()]
    if astray := next((name for name in names if name == ".." or Path(name).name != name), None):
        raise InputError(f"{printable(astray)} is no name but leads to a folder", path=path, remedy="list names alone")
    return names


def by_name(files: Iterable[Path], name: Callable[[Path], str] = case_name) -> dict[str, Path]:
    """The files by what `name` makes of them, in the order given; accented letters may be written in either way.

    Raises:
        InputError: when two files have the same name.

    Example:
        >>> list(by_name([Path("b_mask.png"), Path("a.png")]))
        ['b', 'a']
    """
    found: dict[str, Path] = {}
    for file in files:
        other = found.setdefault(same_letters(name(file)), file)
        if other is not file:
            raise _namesakes(other, file)
    return found


def same_letters(name: str) -> str:
    """The name with each accented letter as one character: macOS writes two, a letter and an accent.

    Example:
        >>> len("e\\u0301"), len(same_letters("e\\u0301"))
        (2, 1)
    """
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _namesakes(one: Path, other: Path) -> InputError:
    fact = f"has the same name as {printable(str(other))}"
    return InputError(fact, path=one, remedy="rename or remove one of them")


def pair_by_name(
    first: Sequence[Path],
    second: Sequence[Path],
    kinds: tuple[str, str] = ("prediction", "label"),
) -> list[tuple[Path, Path]]:
    """Files that belong together, in the order of `first`.

    Equal stems on both sides decide; where the stems differ, `case_name` does.

    Args:
        first: files of the first kind.
        second: files of the second kind.
        kinds: what the files are, for error messages.

    Raises:
        InputError: when a file has no partner, or two files of one kind have the same name.

    Example:
        >>> pair_by_name([Path("img1.nii.gz")], [Path("label1.nii.gz")])
        [(PosixPath('img1.nii.gz'), PosixPath('label1.nii.gz'))]
    """
    name = _common_name(first, second)
    here, there = by_name(first, name), by_name(second, name)
    _check_partners(here, there, kinds)
    return [(file, there[key]) for key, file in here.items()]


def pair_masks(
    images: Sequence[Path], masks: Sequence[Path], allow_unpaired: bool = False, passed: Counter[str] | None = None
) -> list[tuple[Path, tuple[Path, ...]]]:
    """Each image with its masks, in the order of `images`: `a_mask.png`, and `a_mask_1.png` … where it has several.

    Names decide as in `pair_by_name`. By-products are no masks.

    Args:
        images: files.
        masks: files.
        allow_unpaired: leave out images without a mask and masks without an image.
        passed: counts what was left out, for `passed_over`.

    Raises:
        InputError: when an image or a mask has no partner, or two files have the same name.

    Example:
        >>> pair_masks([Path("a.jpg")], [Path("a_mask.png"), Path("a_mask_1.png")])
        [(PosixPath('a.jpg'), (PosixPath('a_mask.png'), PosixPath('a_mask_1.png')))]
    """
    masks = [mask for mask in masks if not is_by_product(mask)]
    name = _common_name(images, masks)
    here = by_name(images, name)
    # All masks of an image are different files: only the first may go without a number.
    numbered = by_name(masks, lambda file: f"{name(file)}/{_SECOND_MASK.search(stem(file)) and stem(file).lower()}")
    there: dict[str, list[Path]] = {}
    for file in numbered.values():
        there.setdefault(same_letters(name(file)), []).append(file)
    if not allow_unpaired:
        _check_partners(here, {key: files[0] for key, files in there.items()}, ("image", "mask"))
    elif passed is not None:
        passed["image without mask"] += len(here.keys() - there.keys())
        passed["mask without image"] += len(there.keys() - here.keys())
    return [(file, tuple(there[key])) for key, file in here.items() if key in there]


def _common_name(first: Sequence[Path], second: Sequence[Path]) -> Callable[[Path], str]:
    one, other = (sorted(same_letters(stem(file)) for file in files) for files in (first, second))
    return stem if one == other else case_name


def _check_partners(here: dict[str, Path], there: dict[str, Path], kinds: tuple[str, str]) -> None:
    for some, others, kind in ((here, there, kinds[1]), (there, here, kinds[0])):
        if alone := [printable(str(some[key])) for key in sorted(some.keys() - others.keys())]:
            more = f" … ({len(alone)} files)" * (len(alone) > 3)
            raise InputError(f"no {kind} of the same name for {', '.join(alone[:3])}{more}")


@contextlib.contextmanager
def replacing(path: PathLike) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on the disk too, when the block ends without an error.

    Otherwise the temporary file is removed and `path` stays as it was. The folder is made if need be. The temporary
    name ends as the final one does, for writers that go by the suffix.

    Raises:
        FileNotFoundError: when the block wrote nothing.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with replacing(folder / "new" / "a.txt") as temporary:
        ...     written = temporary.write_text("whole")
        >>> [(file.name, file.read_text()) for file in (folder / "new").iterdir()]
        [('a.txt', 'whole')]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex[:8]}.{path.name}")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The new name is lost in a crash unless the folder is flushed too; some systems cannot open a folder or flush it.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def check_output(folder: PathLike, bytes_needed: int = 0) -> None:
    """Refuses a folder that could not be written to, before the work that would be lost. It makes nothing.

    A file is written, and removed, in the folder, or in the nearest one above that exists: permissions say little on
    network drives, read-only file systems and to root.

    Args:
        folder: the folder to write to; it need not exist.
        bytes_needed: about how much will be written.

    Raises:
        InputError: when the folder cannot be made or written to, or less is free than needed.

    Example:
        >>> check_output(f"{__file__}/results")
        Traceback (most recent call last):
        transforms.files.InputError: ...files.py: is a file, not a folder to write to; choose another folder
    """
    folder = Path(folder).absolute()
    another = "choose another folder"
    try:
        there = next(place for place in (folder, *folder.parents) if _in_use(place))
        if not there.exists():
            raise InputError(f"is a link to {os.readlink(there)}, which does not exist", path=there, remedy=another)
        if not there.is_dir():
            raise InputError("is a file, not a folder to write to", path=there, remedy=another)
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"\0")
            file.flush()
        free = shutil.disk_usage(there).free
    except OSError as error:
        raise InputError(f"cannot be written to ({error.strerror})", path=folder, remedy=another) from error
    if free < bytes_needed:
        fact = f"{free / 1e6:,.0f} MB are free, about {bytes_needed / 1e6:,.0f} MB needed"
        raise InputError(fact, path=folder, remedy=f"free some, or {another}")


def _in_use(path: Path) -> bool:
    """True if there is anything of that name, a dangling link too.

    Raises:
        OSError: when nothing of that name can be.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except ValueError as error:
        raise OSError(errno.EINVAL, str(error)) from error
    return True


def sha256(path: PathLike) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits, without reading it into memory at once.

    Example:
        >>> sha256(os.devnull)[:16]
        'e3b0c44298fc1c14'
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
