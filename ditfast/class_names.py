"""Classes by name, where a file tells the names."""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Sequence
from pathlib import Path

_LONGEST_NUMBER = 20  # digits; Python refuses to read very many


class ClassNameError(ValueError):
    """A file without names, or a name without a class; the message suggests close ones."""


def read_names(path: Path) -> list[str]:
    """The names of classes 0, 1, 2 and so on.

    Args:
        path: one name a line; or JSON: a list of names, or an object from numbers to names or to lists that end in one
            (``{"0": ["n01440764", "tench"], ...}``).

    Raises:
        ClassNameError: it cannot be read, or holds something else.
    """
    text = _read_text(path)
    if not text.lstrip().startswith(("[", "{")):
        return [line.strip() for line in text.rstrip().split("\n")]
    try:
        content = json.loads(text)
        listed = content if isinstance(content, list) else [content[str(k)] for k in range(len(content))]
    except (ValueError, KeyError, RecursionError) as error:
        raise ClassNameError(f"{path}: got JSON that is damaged or skips a number, expected names of 0, 1, 2, ...") from error
    names = [name[-1] if isinstance(name, list) and name else name for name in listed]
    if not all(isinstance(name, str) for name in names):
        raise ClassNameError(f"{path}: got JSON of other things than names")
    return names


def find_class(text: str, num_classes: int, names: Sequence[str] | None = None) -> int:
    """Return the class, 0..num_classes-1, that a number stands for, or a name as in ``class_called`` where there are names.

    Raises:
        ClassNameError: there is no such class, or several.
    """
    if text.isdecimal() and len(text) < _LONGEST_NUMBER:
        if int(text) >= num_classes:
            raise ClassNameError(f"got {text}, expected 0..{num_classes - 1}")
        return int(text)
    if names is None:
        raise ClassNameError(f"got {text!r}, expected a number 0..{num_classes - 1}, or --labels with names")
    return class_called(text, names)


def class_called(text: str, names: Sequence[str]) -> int:
    """Return the class that a name or one of its comma-separated synonyms stands for; case does not matter.

    Raises:
        ClassNameError: there is no such class, or several.
    """
    numbers: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        for synonym in dict.fromkeys([_plain(name), *map(_plain, name.split(","))]):
            numbers.setdefault(synonym, []).append(number)
    found = numbers.get(_plain(text), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise ClassNameError(f"got {text!r}, which is {' and '.join(f'{k} ({names[k]})' for k in found)}: give the number")
    close = [f"{name!r} ({numbers[name][0]})" for name in difflib.get_close_matches(_plain(text), numbers, n=3)]
    raise ClassNameError(f"got {text!r}, which no class is called" + (f"; close are {', '.join(close)}" if close else ""))


def _read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, perhaps behind a byte order mark, its lines parted by line feeds."""
    try:
        content = path.read_bytes()
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
            raise ClassNameError(f"{path}: cannot be read: it is not text in UTF-8 but in UTF-16 or UTF-32; save it as UTF-8")
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text in UTF-8"
        raise ClassNameError(f"{path}: cannot be read: {reason}") from error


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").lower().split())
