"""Types of arguments, checked where a caller can still tell which one was wrong; each refusal is an
`InputError`."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from thermo_opt.errors import InputError

T = TypeVar("T")


def whole(name: str, value: Any, least: int | None = 1) -> int:
    """``value`` as an int, not below ``least`` (None: any); NumPy's integers count, booleans and
    text don't."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name} is {value!r}; give a whole number")
    if least is not None and value < least:
        raise InputError(f"{name} is {value!r}; it must be at least {least}")
    return int(value)


def positive(name: str, value: Any) -> float:
    """``value`` as a float, positive and finite."""
    if (
        isinstance(value, bool)
        or not isinstance(value, numbers.Real)
        or not 0 < float(value) < math.inf
    ):
        raise InputError(f"{name} is {value!r}; give a positive number")
    return float(value)


def path(name: str, value: Any) -> Path:
    """``value`` as a path."""
    if not isinstance(value, str | os.PathLike):
        raise InputError(f"{name} is {value!r}; give the path of a file or folder")
    return Path(value)


def listed(name: str, values: Any, kind: type[T] | tuple[type[T], ...], remedy: str) -> list[T]:
    """``values`` as a list, each of them a ``kind``; ``remedy`` ends the refusal."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {_short(values)}; {remedy}")
    found = list(values)
    for position, value in enumerate(found):
        if not isinstance(value, kind):
            raise InputError(f"{name}[{position}] is {_short(value)}; {remedy}")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"an object of type {type(value).__name__}"
