"""Tensor files opened lazily and safely: a file is mapped, its header checked, and no code in it
can run.

Two kinds, one interface (`TensorFile`): safetensors, and what `torch.save` writes (loaded with
``weights_only=True`` only).
"""

from __future__ import annotations

import json
import os
import pickle
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from torch import Tensor

from thermo_opt.errors import InputError

_ROW = 1024
"""Words (8 bytes each) in a row of `checksum`'s fold."""

_SMALL = 1 << 18
"""Bytes up to which a file is read whole: mapping costs more than copying it."""


class TensorFile(Protocol):
    """Names, shapes and tensors of one file; ``load`` maps the file rather than copying it."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor, by name, in the file's order."""

    def load(self, name: str) -> Tensor:
        """The tensor of this name."""


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
        """Count the next elements of the tensor; pieces but the last hold a multiple of 8192
        bytes."""
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
        try:
            data = _start(path)
            if len(data) <= _SMALL:
                self._held = load_bytes(data)
                header = json.loads(str(data[8 : 8 + int.from_bytes(data[:8], "little")], "utf-8"))
                self.metadata: dict[str, str] = header.pop("__metadata__", None) or {}
                self.shapes = {name: tuple(self._held[name].shape) for name in sorted(header)}
            else:
                self._file = safe_open(path, framework="pt")
                self.metadata = self._file.metadata() or {}
                self.shapes = {
                    name: tuple(self._file.get_slice(name).get_shape())
                    for name in self._file.keys()  # noqa: SIM118
                }
        except (SafetensorError, OSError) as error:
            raise _unreadable(path, error) from None
        self._checksums: dict[str, str] | None = None
        if "checksums" in self.metadata:
            self._checksums = self._read_checksums()

    def _read_checksums(self) -> dict[str, str]:
        try:
            checksums = dict(json.loads(self.metadata["checksums"]))
        except (ValueError, TypeError):
            raise InputError(
                f"{self.path} is damaged: its checksums can't be read; {_REMEDY}"
            ) from None
        if checksums.pop("", None) not in (None, metadata_checksum(self.metadata)) or set(
            checksums
        ) != set(self.shapes):
            raise InputError(
                f"{self.path} is damaged: its header doesn't match its checksums; {_REMEDY}"
            )
        return checksums

    def load(self, name: str) -> Tensor:
        """The tensor ``name``, mapped; raises `InputError` when its bytes don't match the file's
        checksum."""
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
            raise _unreadable(self.path, error) from None

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{self.path} is damaged: {name!r} doesn't match its checksum; {_REMEDY}")


def _start(path: Path) -> bytes:
    """The first bytes of a file, one more than `_SMALL` if it has them: all of a small one in one
    opening."""
    with open(path, "rb", buffering=0) as file:
        return file.read(min(os.fstat(file.fileno()).st_size, _SMALL) + 1)


class TorchFile:
    """One file written by `torch.save`, its nested dictionaries kept in ``content``; ``shapes`` and
    ``load`` see ``tensors(content)``.
    """

    def __init__(
        self, path: Path, tensors: Callable[[Any], Mapping[str, Tensor]] = lambda content: content
    ) -> None:
        self.path = path
        self.content = load_torch(path)
        self._tensors = tensors(self.content)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def load(self, name: str) -> Tensor:
        """The tensor ``name``."""
        if name not in self._tensors:
            raise InputError(f"{self.path} has no tensor {name!r}; it has {_some(self.shapes)}")
        return self._tensors[name].detach()


def load_torch(path: Path) -> Any:
    """What `torch.save` wrote to ``path``, restricted to tensors and plain values; a pickle that
    holds more is refused, never run.
    """
    try:
        zipped = zipfile.is_zipfile(path)  # the format of torch < 1.6 can't be mapped
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Detected pickle protocol"
            )  # what can't be read is refused anyway
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        reason = str(error)
        if (
            "nsupported" in reason
            or "weights_only" in reason.lower()
            or "WeightsUnpickler" in reason
        ):
            raise InputError(
                f"{path} holds more than tensors and plain values ({_refused(reason)}); nothing in "
                "it was run: "
                "save its state_dict alone, or remove the file"
            ) from None
        raise _unreadable(path, error) from None
    except Exception as error:  # a damaged archive fails in many ways, none of them our bug
        raise _unreadable(path, error) from None


@lru_cache(maxsize=10)
def _opened(path: Path, opener: Callable[[Path], Any], modified: int, size: int) -> Any:
    return opener(path)


def opened(path: Path, opener: Callable[[Path], Any]) -> Any:
    """``opener(path)``, remembered for the last few unchanged files: consecutive tensors come from
    one opening.

    ``opener`` must be a module-level function or class. Memory stays flat however many files a run
    has.
    """
    try:
        stat = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return _opened(path, opener, stat.st_mtime_ns, stat.st_size)


def flat_tensors(tree: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dictionaries with dotted names."""
    if isinstance(tree, Tensor):
        yield prefix, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from flat_tensors(value, f"{prefix}.{key}" if prefix else str(key))


_REMEDY = "restore the file from a copy, or remove it to use the rest of the run"


def _unreadable(path: Path, error: BaseException) -> InputError:
    reason = str(error).strip().splitlines()
    return InputError(
        f"{path} can't be read ({reason[0] if reason else type(error).__name__}); {_REMEDY}"
    )


def _refused(reason: str) -> str:
    for line in reason.splitlines():
        if "GLOBAL" in line or "nsupported" in line:
            return line.strip()[:160]
    return "a pickled object"


def _some(names: Mapping[str, Any]) -> str:
    shown = sorted(names)[:5]
    return ", ".join(shown) + (", …" if len(names) > 5 else "") if shown else "none at all"
