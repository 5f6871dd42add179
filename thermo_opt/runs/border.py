"""The border between a run's files and this package: what is opened, and how much of it.

Whoever wrote a run may not be trusted. Only regular files are opened (a pipe would wait for ever, a
device has no end), sizes are compared with a limit before anything is read, and JSON arrives as
plain values of bounded size.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from thermo_opt.errors import InputError, first_line

_SURROGATE = re.compile("[\ud800-\udfff]")
JSON_LIMIT = 1 << 26
"""Bytes of a JSON file read at once; parsed, they take up to twenty times as much memory."""
LARGEST = 2**53
"""Whole numbers beyond this aren't exact in float64, and none that counts steps is so large."""
REMEDY = "restore the file from a copy, or move it elsewhere to use the rest of the run"


def regular(path: Path) -> os.stat_result:
    """The file's status; raises `InputError` unless it is a regular file (or a link to one)."""
    try:
        found = os.stat(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from None
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise InputError(f"{path} is {what}, not a file; {REMEDY}")
    return found


def read_bytes(path: Path, limit: int) -> bytes:
    """The whole of a regular file of at most ``limit`` bytes."""
    size = regular(path).st_size
    if size > limit:
        raise InputError(
            f"{path} has {size:,} bytes; a file of its kind has at most {limit:,}: {REMEDY}"
        )
    try:
        with open(path, "rb") as file:
            return file.read(limit)
    except OSError as error:
        raise unreadable(path, error) from None


def read_json(path: Path, limit: int = JSON_LIMIT) -> dict[str, Any]:
    """The object in a JSON file, its text without lone surrogates."""
    try:
        content = parse_json(read_bytes(path, limit))
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path} can't be read ({first_line(error)}); restore it from a copy"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} isn't a JSON object; restore it from a copy")
    return content


def parse_json(data: bytes) -> Any:
    """A JSON value; raises ValueError or RecursionError when ``data`` is none, or nested too
    deeply.
    """
    value = json.loads(data)
    if b"\\ud" in data or b"\\uD" in data:  # only an escape can write half of a surrogate pair
        return _without_surrogates(value)
    return value


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_without_surrogates(part) for part in value]
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(part) for key, part in value.items()}
    return value


def whole(value: Any, least: int = 0) -> int | None:
    """``value`` as an int if it is a whole number from ``least`` to `LARGEST`, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if isinstance(value, float) and not (math.isfinite(value) and value.is_integer()):
        return None
    return int(value) if least <= value <= LARGEST else None


def inside(folder: Path, name: Any) -> Path | None:
    """The file ``name`` of a folder, if that is a plain relative name that stays inside it."""
    if not isinstance(name, str) or not name or "\0" in name:
        return None
    parts = Path(name).parts
    return None if Path(name).is_absolute() or ".." in parts else folder / name


def visible(files: Iterable[Path]) -> Iterator[Path]:
    """``files`` but for hidden ones, such as the ``._*`` files that macOS leaves on other systems'
    disks.
    """
    return (file for file in files if not file.name.startswith("."))


def unreadable(path: Path, error: BaseException) -> InputError:
    """The refusal of a file that can't be read, with the reason's first line."""
    return InputError(f"{path} can't be read ({first_line(error)}); {REMEDY}")
