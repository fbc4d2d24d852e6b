"""Reading files that somebody else may have written: bounded in size, strict, and never waiting for anybody."""

from __future__ import annotations

import errno
import functools
import json
import os
import reprlib
import stat
import sys
import types
import typing
from collections import Counter
from typing import BinaryIO

# A record with its timeline has about 10 kB. JSON takes up to twenty times its size when it is parsed.
MOST_BYTES = 64 * 2**20


def open_file(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file to read bytes. Raises OSError, also for what is no file: reading a pipe may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
    return open(path, "rb")


def read_text(path: str | os.PathLike) -> str:
    """The text of a file. Raises OSError, and ValueError for what is no UTF-8 or has more than `MOST_BYTES`."""
    with open_file(path) as file:
        # Before anything of it is in memory; what the system makes as it is read has no size until then.
        size = os.fstat(file.fileno()).st_size
        content = b"" if size > MOST_BYTES else file.read(MOST_BYTES + 1)
    if max(size, len(content)) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES // 2**20} MiB; give smaller files")
    return content.decode("utf-8")


def parse(text: str, allow_nan: bool = False) -> object:
    """What JSON holds. Raises ValueError, also where an object has a key twice or nesting is too deep for Python.

    `allow_nan` is for files with foreign parts: Python writes NaN and Infinity, which are no JSON.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=float if allow_nan else _no_number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {shown(twice)} stands twice in an object")
    return found


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


def misfit(instance: object) -> str | None:
    """What is wrong with the first field of a dataclass whose value is not of its type; None where all are.

    An integer is a number too; what is not finite, or past any float, is none.
    """
    for name, hint in hints(type(instance)).items():
        value = getattr(instance, name)
        if not _fits(value, hint):
            return f"field {name!r} must be {_described(hint)}, got {shown(value)}"
    return None


@functools.cache
def hints(cls: type) -> dict[str, object]:
    """The types of a dataclass's fields."""
    return typing.get_type_hints(cls)


def _fits(value: object, hint: object) -> bool:
    if isinstance(hint, types.UnionType):
        return any(_fits(value, kind) for kind in typing.get_args(hint))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is dict:
        return isinstance(value, dict) and all(_fits(each, kinds[1]) for each in value.values())
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
        return len(value) == len(kinds) and all(map(_fits, value, kinds))
    return isinstance(value, hint)


def _described(hint: object) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join(map(_described, typing.get_args(hint)))
    words = {
        int: "an integer",
        float: "a finite number",
        str: "a string",
        bool: "true or false",
        types.NoneType: "null",
        tuple: "a list of the right values",
        dict: "an object of the right values",
    }
    return words[typing.get_origin(hint) or hint]


def shown(value: object) -> str:
    """A value from a file as an error shows it: `repr`, cut short."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 80
    return short.repr(value)
