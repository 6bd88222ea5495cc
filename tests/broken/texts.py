"""Changes of lists of names and of configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tests.broken.changes import (
    EITHER,
    FAILS,
    REFUSED,
    SAID,
    SAME,
    Change,
    Edit,
    Expected,
    any_file,
    append,
    cut,
    expecting,
    rewrite,
    without,
)


def lists(other: str, both: Expected = REFUSED) -> list[Change]:
    """Of a list of names, one a line.

    Args:
        other: a name that is listed in another part.
        both: what must come of a name in two parts.
    """

    def text(function: Callable[[str], str], encoding: str = "utf-8") -> Edit:
        return rewrite(lambda data: function(data.decode()).encode(encoding))

    return [
        *expecting(without(any_file(), "one byte"), {"all zeros": REFUSED}),
        Change("only blank lines", text(lambda names: "\n \n\t\n"), REFUSED),
        Change("with a byte order mark", text(lambda names: names, "utf-8-sig"), SAME),
        Change("with CRLF", text(lambda names: names.replace("\n", "\r\n")), SAME),
        Change("with blank lines", text(lambda names: "\n" + names.replace("\n", "\n\n")), SAME),
        Change("with blanks around names", text(lambda names: names.replace("\n", " \t\n")), SAME),
        Change("without a last newline", text(str.rstrip), SAME),
        Change("in UTF-16", text(lambda names: names, "utf-16"), EITHER),
        Change("with a byte that is no UTF-8", append(b"\xff\xfe\n"), REFUSED),
        Change("an unknown name", text(lambda names: names + "unknown\n"), REFUSED, also=("unknown",)),
        Change("a comment", text(lambda names: "# names\n" + names), EITHER, also=("names",)),
        Change("a name twice", text(lambda names: names + names.splitlines()[0] + "\n"), SAID),
        Change("a name of another part", text(lambda names: f"{names}{other}\n"), both, also=(other,)),
        Change("a name with a null", text(lambda names: names + "a\0b\n"), REFUSED, also=("a\\x00b", "a\\0b")),
        Change("a path for a name", text(lambda names: names + "../../etc/passwd\n"), REFUSED, also=("passwd",)),
        Change("names in one line", text(lambda names: names.replace("\n", ",")), REFUSED),
        Change("a line of 1 MB", text(lambda names: names + "x" * 1_000_000 + "\n"), REFUSED),
    ]


# Configurations


def yaml() -> list[Change]:
    def replaced(old: str, new: str) -> Edit:
        def edit(path: Path) -> None:
            text = path.read_text()
            if old not in text:
                raise ValueError(f"{path} does not hold {old!r}")
            path.write_text(text.replace(old, new, 1))

        return edit

    def value(text: str) -> Edit:
        """Another value of val_fraction."""
        return replaced("val_fraction: 0.1", f'val_fraction: "{text}"')

    function, label_set = "transforms.image_split", "_target_: transforms.LabelSet"
    read_first = without(any_file(), "one byte", "a link to the file")
    return [
        *(replace(change, expected=FAILS) for change in read_first),
        Change("cut to 50 %", cut(0.5), FAILS),
        Change("cut inside a bracket", rewrite(lambda data: data[: data.index(b"[lesion]") + 4]), FAILS),
        Change("a bracket that stays open", replaced("classes: [lesion]", "classes: [lesion"), FAILS),
        Change("a tab for blanks", replaced(f"  {label_set}", f"\t{label_set}"), FAILS),
        Change("a list", rewrite(lambda data: b"- training\n- evaluating\n"), FAILS),
        Change("one word", rewrite(lambda data: b"training\n"), FAILS),
        Change("with a byte order mark", rewrite(lambda data: b"\xef\xbb\xbf" + data), EITHER),
        Change("with CRLF", rewrite(lambda data: data.replace(b"\n", b"\r\n")), SAME),
        Change("a byte that is no UTF-8", append(b"# \xff\n"), FAILS),
        Change("an unknown function", replaced(function, f"{function}t"), REFUSED, also=("image_splitt",)),
        Change("an unknown argument", replaced('  fold: "@fold"', '  fould: "@fold"'), REFUSED, also=("fould",)),
        Change("an unknown reference", value("@val_fractoin"), REFUSED, also=("val_fractoin",)),
        Change("a reference to itself", value("@val_fraction"), REFUSED, also=("val_fraction",)),
        Change("an expression that does not end", value("$(0.1"), REFUSED, also=("val_fraction", "$(0.1")),
        Change("an expression that fails", value("$1 / 0"), REFUSED, also=("val_fraction", "1 / 0")),
        Change("a macro of a missing file", value("%nowhere.yaml#a"), FAILS),
        Change("no training", replaced("\ntraining:\n", "\nother:\n"), FAILS),
        Change("no trainer", replaced("\n  trainer:\n", "\n  other:\n"), REFUSED, also=("trainer",)),
    ]
