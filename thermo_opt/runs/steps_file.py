"""``steps.jsonl``: one object per line, read in blocks into columns, so that millions of rows take
seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from thermo_opt.errors import InputError
from thermo_opt.runs.border import LARGEST, parse_json, regular, unreadable

_LIMIT = 1 << 32
"""Bytes of a file of lines."""
_BLOCK = 1 << 22
"""Bytes parsed together."""
_LINE = 1 << 24
"""Bytes of a line."""


def read_steps(file: Path) -> pd.DataFrame:
    """The training curve of ``steps.jsonl``; a last line cut short by a kill is left out. Empty if
    there is no file.

    Raises `InputError` naming the line that isn't an object with a whole ``step``, or whose step
    doesn't increase.
    """
    parts: list[pd.DataFrame] = []
    last = -1
    if file.exists():
        for number, rows in _blocks(file):
            steps = _steps(rows, last)
            if steps is None:
                raise _wrong_step(rows, last, file, number)
            last = int(steps[-1])
            parts.append(_table(rows, steps))
    if not parts:
        return pd.DataFrame(index=pd.Index([], name="step", dtype="int64"))
    return parts[0] if len(parts) == 1 else pd.concat(parts)


def json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    for number, rows in _blocks(file):
        for offset, row in enumerate(rows):
            if not isinstance(row, dict):
                raise InputError(
                    f"{file}, line {number + offset} isn't an object; restore the file"
                )
            yield row


def _blocks(file: Path) -> Iterator[tuple[int, list[Any]]]:
    """Number of the first line of each block (from 1), and what its lines hold. Empty lines are
    allowed at block ends.
    """
    size = regular(file).st_size
    if size > _LIMIT:
        raise InputError(
            f"{file} has {size:,} bytes; a log of at most {_LIMIT:,} can be read: thin it out"
        )
    number = 1
    try:
        with open(file, "rb") as stream:
            rest = b""
            while data := stream.read(_BLOCK):
                rest += data
                if len(rest) > _LINE and b"\n" not in rest:
                    raise InputError(
                        f"{file}, line {number} has more than {_LINE:,} bytes; restore the file"
                    )
                whole, newline, rest = rest.rpartition(b"\n")
                if newline:
                    yield from _parsed(whole.split(b"\n"), number, file, last=False)
                    number += whole.count(b"\n") + 1
            if rest:
                yield from _parsed([rest], number, file, last=True)
    except OSError as error:
        raise unreadable(file, error) from None


def _parsed(
    lines: list[bytes], number: int, file: Path, last: bool
) -> Iterator[tuple[int, list[Any]]]:
    """The values of some lines: all at once, which is several times as fast; if that fails, line by
    line to name the line.
    """
    if all(lines):
        try:
            rows = parse_json(b"[" + b",".join(lines) + b"]")
        except (ValueError, RecursionError):
            rows = []
        if len(rows) == len(lines):
            yield number, rows
            return
    for offset, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError):
            if last:
                return  # cut short by a kill
            raise _not_a_row(file, number + offset) from None
        yield number + offset, [row]


def _steps(rows: list[Any], last: int) -> np.ndarray | None:
    """The rows' steps if all are whole numbers that increase from ``last``; a block at a time."""
    try:
        found = list(map(itemgetter("step"), rows))
    except (TypeError, KeyError):
        return None
    if set(map(type, found)) != {int} or max(found) > LARGEST or min(found) < 0:
        return None
    steps = np.array(found, dtype=np.int64)
    return steps if steps[0] > last and (np.diff(steps) > 0).all() else None


def _wrong_step(rows: list[Any], last: int, file: Path, number: int) -> InputError:
    """What is wrong with the first row that isn't one; ``number``: the first row's line."""
    for line, row in enumerate(rows, number):
        if not isinstance(row, dict) or "step" not in row:
            return _not_a_row(file, line)
        step = row["step"]
        if type(step) is not int or not 0 <= step <= LARGEST:
            return InputError(
                f"{file}, line {line}: step {str(step)[:40]} isn't a whole number; restore the file"
            )
        if step <= last:
            how = "occurs twice" if step == last else f"comes after step {last}"
            return InputError(
                f"{file}, line {line}: step {step} {how}; steps must increase: "
                "keep one line per step"
            )
        last = step
    raise AssertionError("every row is one")


def _not_a_row(file: Path, number: int) -> InputError:
    return InputError(
        f"{file}, line {number} isn't an object with a 'step'; restore the file or remove that line"
    )


def _table(rows: list[dict[str, Any]], steps: np.ndarray) -> pd.DataFrame:
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(chain.from_iterable(rows)):
        if name == "step":
            continue
        try:
            values = list(map(itemgetter(name), rows))  # most rows have all columns
        except KeyError:
            values = [row.get(name) for row in rows]
        numeric = set(map(type, values)) <= {float, int, type(None)}
        try:
            columns[name] = np.array(values, dtype=np.float64) if numeric else values
        except OverflowError:
            columns[name] = values
    return pd.DataFrame(columns, index=pd.Index(steps, name="step"))
