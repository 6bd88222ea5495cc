"""What belongs to files whatever they hold: suffixes, names, lists, pairs, hashes, and writing whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

PathLike = str | os.PathLike[str]

VOLUME_SUFFIXES = (".nii", ".nii.gz", ".hdr", ".img", ".h5", ".hdf5")
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")

_VOLUME, _PICTURE = ("|".join(map(re.escape, suffixes)) for suffixes in (VOLUME_SUFFIXES, PICTURE_SUFFIXES))
# The released Synapse volumes are called case0001.npy.h5; .npz are slices to train on.
_SUFFIX = re.compile(rf"(?<=.)((\.npy)?({_VOLUME})|{_PICTURE}|\.npz)\Z", re.IGNORECASE | re.DOTALL)
# MONAI's SaveImage makes case0001.npy_pred.nii.gz from case0001.npy.h5, hence `.npy` here.
_DECORATION = re.compile(
    r"(?<=.)(_(segmentation|seg|mask(_\d+)?|labels?|gt|prediction|pred|trans|lesion)|\.npy)\Z|\A(img|label)(?=\d)",
    re.DOTALL,
)


class InputError(ValueError):
    """What a user gave cannot be taken. Its text is one line: file, fact, remedy.

    Library functions raise it; commands print the line and exit with 1. Control characters in the file's name are shown
    escaped.

    Args:
        fact: what is wrong.
        path: the file or folder, where it is one's fault.
        remedy: what to do about it, where the fact does not say so already.

    Example:
        >>> print(InputError("values from 0 to 1 are not Hounsfield units", path="a.nii", remedy="give the CT itself"))
        a.nii: values from 0 to 1 are not Hounsfield units; give the CT itself
    """

    def __init__(self, fact: str, *, path: PathLike | None = None, remedy: str = "") -> None:
        letters = "" if path is None else f"{os.fspath(path)}: "
        name = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in letters)
        super().__init__(f"{name}{fact}; {remedy}" if remedy else f"{name}{fact}")


def has_suffix(path: PathLike, suffixes: Sequence[str]) -> bool:
    """True if the file's name ends in one of `suffixes`, in upper or lower case.

    Example:
        >>> has_suffix("scans/img0001.NII.GZ", VOLUME_SUFFIXES), has_suffix("notes.txt", PICTURE_SUFFIXES)
        (True, False)
    """
    return os.fspath(path).lower().endswith(tuple(suffixes))


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


def list_files(path: PathLike, suffixes: Sequence[str], recursive: bool = False) -> list[Path]:
    """The files in a folder that end in one of `suffixes`, sorted; hidden ones are left out, and `.img` beside `.hdr`.

    Args:
        path: the folder, or one file, which is then the only candidate.
        suffixes: in lower case; see `has_suffix`.
        recursive: look into sub-folders too.

    Raises:
        FileNotFoundError: when `path` does not exist.

    Example:
        >>> list_files(__file__, [".py"]) == [Path(__file__)], list_files(__file__, PICTURE_SUFFIXES)
        (True, [])
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_file():
        files = [path]
    else:
        found = path.rglob("*") if recursive else path.iterdir()
        files = sorted(file for file in found if not any(part[0] == "." for part in file.relative_to(path).parts))
        headers = {file.with_suffix("") for file in files if has_suffix(file, [".hdr"])}
        files = [file for file in files if not (has_suffix(file, [".img"]) and file.with_suffix("") in headers)]
    return [file for file in files if has_suffix(file, suffixes) and file.is_file()]


def by_name(files: Iterable[Path], name: Callable[[Path], str] = case_name) -> dict[str, Path]:
    """The files by what `name` makes of them, in the order given.

    Raises:
        ValueError: when two files have the same name.

    Example:
        >>> list(by_name([Path("b_mask.png"), Path("a.png")]))
        ['b', 'a']
    """
    found: dict[str, Path] = {}
    for file in files:
        other = found.setdefault(name(file), file)
        if other is not file:
            raise ValueError(f"{other} and {file} have the same name: rename or remove one of them")
    return found


def pair_by_name(
    first: Sequence[Path],
    second: Sequence[Path],
    kinds: tuple[str, str] = ("prediction", "label"),
    spare: bool = False,
) -> list[tuple[Path, Path]]:
    """Files that belong together, in the order of `first`.

    Equal stems on both sides decide; where the stems differ, `case_name` does.

    Args:
        first: files of the first kind.
        second: files of the second kind.
        kinds: what the files are, for error messages.
        spare: files of the second kind may lack a partner.

    Raises:
        ValueError: when a file has no partner, or two files of one kind have the same name.

    Example:
        >>> pair_by_name([Path("img1.nii.gz")], [Path("label1.nii.gz")])
        [(PosixPath('img1.nii.gz'), PosixPath('label1.nii.gz'))]
    """
    stems = [sorted(map(stem, files)) for files in (first, second)]
    name = stem if stems[0] == stems[1] else case_name
    here, there = by_name(first, name), by_name(second, name)
    for some, others, kind in ((here, there, kinds[1]), (there, here, kinds[0])):
        alone = [str(some[key]) for key in sorted(some.keys() - others.keys())]
        if alone and not (spare and some is there):
            more = f" … ({len(alone)} files)" * (len(alone) > 3)
            raise ValueError(f"no {kind} of the same name for {', '.join(alone[:3])}{more}")
    return [(file, there[key]) for key, file in here.items()]


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
