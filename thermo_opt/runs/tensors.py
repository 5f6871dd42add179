"""Files of safetensors, opened lazily: a file is mapped, its header checked, each tensor verified
while it is read.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.border import REMEDY, parse_json, regular, unreadable

T = TypeVar("T")

_ROW = 1024
"""Words (8 bytes each) in a row of `checksum`'s fold."""

_SMALL = 1 << 18
"""Bytes up to which a file is read whole: mapping costs more than copying it."""
_HEADER = 100_000_000
"""Bytes of a header, safetensors' own limit."""
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""Types of numbers that our files hold, by the names of the format."""


class Checksum:
    """Checksum of a tensor's dtype, shape and bytes, taken piece by piece while they are in the
    processor's cache.

    The bytes are folded into 1024 columns of 64-bit words, each summed modulo 2^64, and the CRC-32
    of the sums is taken. Any flipped bit, cut or zeroed stretch changes it; the fold runs at memory
    speed (tens of GB/s), several times a plain CRC.
    """

    def __init__(self, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self._crc = _layout_crc(dtype, tuple(shape))
        self._sums: np.ndarray | None = None
        self._rest = b""

    def add(self, piece: Tensor) -> None:
        """Count the next elements; pieces but the last hold a multiple of 8192 bytes."""
        flat = (piece if piece.is_cpu else piece.cpu()).contiguous().reshape(-1)
        data = (flat.detach() if flat.requires_grad else flat).view(torch.uint8).numpy()
        whole = data.nbytes // (8 * _ROW) * (8 * _ROW)
        if whole:
            sums = np.add.reduce(data[:whole].view(np.uint64).reshape(-1, _ROW), axis=0)
            self._sums = sums if self._sums is None else np.add(self._sums, sums, out=self._sums)
        self._rest = data[whole:].tobytes()

    def hexadecimal(self) -> str:
        """The checksum of what was counted."""
        crc = self._crc if self._sums is None else zlib.crc32(self._sums.tobytes(), self._crc)
        return f"{zlib.crc32(self._rest, crc):08x}"


@lru_cache(maxsize=64)
def _layout_crc(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    return zlib.crc32(f"{dtype}{shape}".encode())


def checksum(tensor: Tensor) -> str:
    """`Checksum` of a whole tensor, as hexadecimal."""
    result = Checksum(tensor.dtype, tensor.shape)
    result.add(tensor)
    return result.hexadecimal()


def metadata_checksum(metadata: Mapping[str, str]) -> str:
    """CRC-32 of a file's metadata but for its ``checksums``, as hexadecimal."""
    text = json.dumps(sorted((key, value) for key, value in metadata.items() if key != "checksums"))
    return f"{zlib.crc32(text.encode()):08x}"


class SafetensorsFile:
    """One safetensors file, mapped (a small one is read whole, which is quicker). Its sizes are
    checked on opening; each tensor, where the file carries checksums, when loaded.

    Raises `InputError` naming the file when it is missing, cut short or altered.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._held: dict[str, Tensor] | None = None
        size = regular(path).st_size
        try:
            header, data = _header(path, size)
            if data is not None:
                self._held = load_bytes(data)
            else:
                self._file = safe_open(path, framework="pt")
        except InputError:
            raise
        except (
            Exception
        ) as error:  # the library's own errors, and KeyError for a dtype that torch lacks
            raise unreadable(path, error) from None
        metadata = header.pop("__metadata__", None) or {}
        self.metadata: dict[str, str] = metadata if isinstance(metadata, dict) else {}
        self.layouts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for name in sorted(header):
            dtype = DTYPES.get(header[name]["dtype"])
            if dtype is None:
                raise InputError(
                    f"{path}: {name!r} is of type {header[name]['dtype']}, which torch can't "
                    "hold; convert it"
                )
            self.layouts[name] = (tuple(header[name]["shape"]), dtype)
        self.shapes = {name: shape for name, (shape, _) in self.layouts.items()}
        self._checksums: dict[str, str] | None = None
        if "checksums" in self.metadata:
            self._checksums = self._read_checksums()

    def _read_checksums(self) -> dict[str, str]:
        try:
            checksums = dict(parse_json(self.metadata["checksums"].encode()))
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"{self.path} is damaged: its checksums can't be read; {REMEDY}"
            ) from None
        whole = checksums.pop("", None)
        if whole not in (None, metadata_checksum(self.metadata)) or set(checksums) != set(
            self.shapes
        ):
            raise InputError(
                f"{self.path} is damaged: its header doesn't match its checksums; {REMEDY}"
            )
        return checksums

    def load(self, name: str) -> Tensor:
        """The tensor ``name``, mapped; raises `InputError` when its bytes don't match the file's
        checksum.
        """
        tensor = self._mapped(name)
        if self._checksums is not None and checksum(tensor) != self._checksums[name]:
            raise self._damaged(name)
        return tensor

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """The tensor's elements in order, ``size`` (a multiple of 8192) at a time; raises
        `InputError` after the last when they don't match the file's checksum. Each piece is
        verified as it is handed out, so that memory is read once.
        """
        tensor = self._mapped(name)
        expected = None if self._checksums is None else self._checksums[name]
        found = Checksum(tensor.dtype, tensor.shape)
        for piece in tensor.view(-1).split(size):
            if expected is not None:
                found.add(piece)
            yield piece
        if expected is not None and found.hexadecimal() != expected:
            raise self._damaged(name)

    def _mapped(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise InputError(f"{self.path} has no tensor {name!r}; it has {_some(self.shapes)}")
        try:
            return self._file.get_tensor(name) if self._held is None else self._held[name].clone()
        except (SafetensorError, OSError, RuntimeError) as error:
            raise unreadable(self.path, error) from None

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{self.path} is damaged: {name!r} doesn't match its checksum; {REMEDY}")


def _header(path: Path, size: int) -> tuple[dict[str, Any], bytes | None]:
    """A file's header, and all of its bytes if it is small: one opening then serves for both."""
    with open(path, "rb", buffering=0) as file:
        data = file.read(min(size, _SMALL) + 1)
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > min(size - 8, _HEADER):
            raise InputError(f"{path} is cut short, or isn't a file of safetensors; {REMEDY}")
        text = data[8 : 8 + length]
        while len(text) < length:
            more = file.read(length - len(text))
            if not more:
                raise InputError(f"{path} is cut short; {REMEDY}")
            text += more
    header = parse_json(text)
    if not isinstance(header, dict) or not all(
        isinstance(entry, dict) for entry in header.values()
    ):
        raise InputError(f"{path} isn't a file of safetensors; {REMEDY}")
    return header, data if len(data) <= _SMALL else None


@lru_cache(maxsize=10)
def _opened(path: Path, opener: Callable[[Path], Any], modified: int, size: int) -> Any:
    return opener(path)


def opened(path: Path, opener: Callable[[Path], T]) -> T:
    """``opener(path)``, remembered for the last few unchanged files: consecutive tensors come from
    one opening.

    ``opener`` must be a module-level function or class. Memory stays flat however many files a run
    has.
    """
    stat = regular(path)
    result: T = _opened(path, opener, stat.st_mtime_ns, stat.st_size)
    return result


def _some(names: Mapping[str, Any]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (", …" if len(names) > 5 else "") if shown else "none at all"
