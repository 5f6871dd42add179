"""Types of arguments, checked where a caller can still tell which one was wrong; each refusal is an
`InputError`."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from thermo_opt.errors import InputError

T = TypeVar("T")

_EXACT = 2**63
"""From here on whole numbers are written as floating-point ones, which every reader of JSON has."""


def whole(name: str, value: Any, least: int | None = 1, most: int | None = None) -> int:
    """``value`` as an int, not below ``least`` nor above ``most`` (None: any); NumPy's integers
    count, booleans and text don't."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name} is {value!r}; give a whole number")
    if least is not None and value < least:
        raise InputError(f"{name} is {value!r}; it must be at least {least}")
    if most is not None and int(value) > most:
        raise InputError(f"{name} is {value!r}; it must be at most {most}")
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
    """``value`` as a path; a leading ``~`` is the user's home, as in a shell."""
    text = os.fspath(value) if isinstance(value, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise InputError(f"{name} is {shown(value)}; give the path of a file or folder")
    return Path(os.path.expanduser(text))


def listed(name: str, values: Any, kind: type[T] | tuple[type[T], ...], remedy: str) -> list[T]:
    """``values`` as a list, each of them a ``kind``; ``remedy`` ends the refusal."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise InputError(f"{name} is {shown(values)}; {remedy}")
    found = list(values)
    for position, value in enumerate(found):
        if not isinstance(value, kind):
            raise InputError(f"{name}[{position}] is {shown(value)}; {remedy}")
    return found


def jsonable(value: Any) -> Any:
    """``value`` as strict JSON can hold it.

    Mappings and sequences member by member; numbers of NumPy and torch as Python's; what isn't
    finite, or lies beyond a float, becomes None (null). Anything else is returned as it is, for the
    encoder to refuse.
    """
    if isinstance(value, Mapping):
        return {text(str(key)): jsonable(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(member) for member in value]
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value) if abs(int(value)) < _EXACT else _finite(value)
    if isinstance(value, numbers.Real):
        return _finite(value)
    return jsonable(value.tolist()) if hasattr(value, "tolist") else value


def scalar(value: Any) -> str | bool | int | float | None:
    """A number or a text as strict JSON holds it (`jsonable`); None for anything else, and for what
    isn't finite."""
    try:
        found = jsonable(value.item() if hasattr(value, "item") else value)
    except (
        TypeError,
        ValueError,
        RuntimeError,
        OverflowError,
    ):  # a tensor of several elements, or on no device
        return None
    return found if isinstance(found, str | bool | int | float) else None


def text(value: str) -> str:
    """Text that can be written as UTF-8: lone surrogates are replaced."""
    return value.encode("utf-8", "replace").decode("utf-8")


def is_nonfinite(value: Any) -> bool:
    """Whether this is one number that is not-a-number or infinite."""
    try:
        return not math.isfinite(value.item() if hasattr(value, "item") else value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        return False


def _finite(value: Any) -> float | None:
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def shown(value: Any) -> str:
    """``value`` as a refusal quotes it: in one short line."""
    try:
        text = repr(value)
    except Exception:  # the user's own
        text = " " * 61
    return text if len(text) <= 60 else f"an object of type {type(value).__name__}"
