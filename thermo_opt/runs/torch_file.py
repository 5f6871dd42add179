"""What `torch.save` wrote, read without running anything in it: tensors are mapped when asked for,
objects are skipped.

A file of `torch.save` is a pickle that names functions to call. Here only a fixed set of names
means something (tensors, storages, dtypes, plain containers, NumPy's numbers), and what they mean
is defined in this module; every other name becomes an `Opaque` object that remembers what was to be
called and does nothing. So arguments, paths and whole pickled models beside the weights do no harm,
and no code of the file, of torch or of the user's packages runs. The zip's CRC-32 of each storage
is compared when its tensor is first loaded.
"""

from __future__ import annotations

import math
import mmap
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.border import REMEDY, regular, unreadable

_PICKLE_LIMIT = 1 << 24
"""Bytes of a file's pickle, which holds names and shapes only: 100 for a tensor or so."""
_MOST, _DEEPEST = 100_000_000, 200
"""Values that a file's containers may hold, and how deep they may lie."""
_MAGIC = 0x1950A86A20F9469CFC6C
"""First object of a file in the format of torch < 1.6."""
_CHUNK = 1 << 24
_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64, "UntypedStorage": torch.uint8,
}  # fmt: skip


class _Sealed(type):
    """Classes that no pickle can change."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a pickle can't change a class")


class Opaque(metaclass=_Sealed):
    """An object of a file that means nothing here: the name of its class or function, and the data
    it was given.
    """

    __slots__ = ("arguments", "state")
    name = "object"
    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Opaque:
        made = super().__new__(cls)
        made.arguments, made.state = arguments, None
        return made

    def __init__(self, *arguments: Any) -> None:
        """Nothing is called."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of an unknown container are dropped."""

    def append(self, value: Any) -> None:
        """As `__setitem__`."""

    extend = add = append

    def __repr__(self) -> str:
        return f"<{self.name}>"


@dataclass(frozen=True)
class Storage:
    """A stretch of the file that holds elements of one dtype."""

    file: TorchFile
    key: str
    dtype: torch.dtype
    count: int


@dataclass(frozen=True, eq=False)
class LazyTensor:
    """A tensor of the file, mapped when `load` is called."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def identity(self) -> tuple[Any, ...]:
        """Equal for two names of one shared tensor."""
        return (
            id(self.storage.file),
            self.storage.key,
            self.offset,
            self.shape,
            self.stride,
            self.dtype,
        )

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle can't change a tensor")

    def load(self) -> Tensor:
        """The tensor, mapped; raises `InputError` when its bytes don't match the file's CRC-32."""
        return self.storage.file.elements(self.storage, self.dtype).as_strided(
            self.shape, self.stride, self.offset
        )


class TorchFile:
    """One file written by `torch.save`; ``content``: its nested containers, with `LazyTensor` for
    tensors.

    Raises `InputError` naming the file when it is missing, damaged, or not such a file.
    """

    def __init__(self, path: Path, start: int = 0, length: int | None = None) -> None:
        self.path = path
        size = regular(path).st_size
        try:
            with open(path, "rb") as file:
                self._map = (
                    memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
                    if size
                    else memoryview(b"")
                )
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from None
        if start < 0 or (length is not None and (length < 0 or start + length > size)):
            raise InputError(f"{path} is cut short; {REMEDY}")
        self._map = self._map[start : size if length is None else start + length]
        self._places: dict[str, tuple[int, int, int | None]] = {}
        self._checked: set[str] = set()
        try:
            self.content = self._read()
            if _expanded(self.content, {}) > _MOST:
                raise InputError(f"{path} unpacks to more than {_MOST:,} values; {REMEDY}")
        except InputError:
            raise
        except (
            Exception
        ) as error:  # a damaged archive or pickle fails in many ways, none of them our bug
            raise unreadable(path, error) from None

    def elements(self, storage: Storage, dtype: torch.dtype) -> Tensor:
        """A storage's elements as a flat tensor on the mapped file."""
        place, size, crc = self._places[storage.key]
        data = self._map[place : place + size]
        if crc is not None and storage.key not in self._checked:
            found = 0
            for begin in range(0, size, _CHUNK):
                found = zlib.crc32(data[begin : begin + _CHUNK], found)
            if found != crc:
                raise InputError(
                    f"{self.path} is damaged: a tensor doesn't match its CRC-32; {REMEDY}"
                )
            self._checked.add(storage.key)
        if size == 0:
            return torch.empty(0, dtype=dtype)
        raw = torch.frombuffer(data, dtype=torch.uint8)
        aligned = raw if raw.data_ptr() % dtype.itemsize == 0 else raw.clone()
        return aligned[: size // dtype.itemsize * dtype.itemsize].view(dtype)

    def _read(self) -> Any:
        if bytes(self._map[:4]) == b"PK\x03\x04":
            return self._read_zip()
        stream = _Window(self._map)
        if bytes(self._map[:1]) != b"\x80":
            raise InputError(f"{self.path} isn't a file of torch.save; {REMEDY}")
        first = _Unpickler(stream).load()
        return self._read_legacy(stream) if isinstance(first, int) and first == _MAGIC else first

    def _read_zip(self) -> Any:
        with zipfile.ZipFile(_Window(self._map)) as archive:
            entries = archive.infolist()
        records = {entry.filename: entry for entry in entries}
        pickles = sorted((name for name in records if name.split("/")[-1] == "data.pkl"), key=len)
        if len(pickles) > 1 or len(records) < len(entries):
            raise InputError(
                f"{self.path} is damaged: it holds more than one record of a name; {REMEDY}"
            )
        if not pickles:
            raise InputError(f"{self.path} is a zip archive, but not of torch.save; {REMEDY}")
        prefix = pickles[0].removesuffix("data.pkl")
        if prefix + "constants.pkl" in records:
            raise InputError(
                f"{self.path} is a TorchScript archive; save the model's state_dict() instead"
            )
        order = records.get(prefix + "byteorder")
        if order is not None and bytes(self._record(order)[0]) != b"little":
            raise InputError(
                f"{self.path} was written on a big-endian machine; save it again on a "
                "little-endian one"
            )
        summed = (
            records[pickles[0]].CRC != 0
        )  # torch can be told to leave the checksums out: then all of them are 0
        data, _ = self._record(records[pickles[0]])
        if len(data) > _PICKLE_LIMIT:
            raise InputError(f"{self.path} holds a pickle of absurd length; {REMEDY}")
        if summed and zlib.crc32(data) != records[pickles[0]].CRC:
            raise InputError(
                f"{self.path} is damaged: its pickle doesn't match its CRC-32; {REMEDY}"
            )

        def find(key: str, dtype: torch.dtype, count: int) -> Storage:
            entry = records.get(f"{prefix}data/{key}")
            if entry is None or entry.file_size < count * dtype.itemsize:
                raise InputError(f"{self.path} is damaged: a tensor's data are missing; {REMEDY}")
            _, place = self._record(entry)
            self._places[key] = (place, entry.file_size, entry.CRC if summed else None)
            return Storage(self, key, dtype, count)

        return _Unpickler(_Window(data), find).load()

    def _record(self, entry: zipfile.ZipInfo) -> tuple[memoryview, int]:
        """A record's bytes and where they begin; `torch.save` never compresses."""
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise InputError(
                f"{self.path} has a compressed record, which torch.save never writes; {REMEDY}"
            )
        header = bytes(self._map[entry.header_offset : entry.header_offset + 30])
        if header[:4] != b"PK\x03\x04":
            raise InputError(
                f"{self.path} is damaged: a record is not where its index says; {REMEDY}"
            )
        place = (
            entry.header_offset
            + 30
            + int.from_bytes(header[26:28], "little")
            + int.from_bytes(header[28:30], "little")
        )
        if place + entry.file_size > len(self._map):
            raise InputError(f"{self.path} is cut short; {REMEDY}")
        return self._map[place : place + entry.file_size], place

    def _read_legacy(self, stream: _Window) -> Any:
        """The format of torch < 1.6: pickles of version, machine, content and keys, then each
        storage in turn.
        """
        _Unpickler(stream).load()
        _Unpickler(stream).load()
        found: dict[str, Storage] = {}

        def find(key: str, dtype: torch.dtype, count: int) -> Storage:
            return found.setdefault(key, Storage(self, key, dtype, count))

        content = _Unpickler(stream, find).load()
        keys = _Unpickler(stream).load()
        place = stream.tell()
        for key in keys if isinstance(keys, list) else []:
            count = int.from_bytes(self._map[place : place + 8], "little")
            storage = found.get(key) if isinstance(key, str) else None
            if storage is None or count < storage.count:
                raise InputError(
                    f"{self.path} is damaged: its list of tensors doesn't fit them; {REMEDY}"
                )
            self._places[key] = (place + 8, count * storage.dtype.itemsize, None)
            place += 8 + count * storage.dtype.itemsize
        if place > len(self._map) or found.keys() - self._places.keys():
            raise InputError(f"{self.path} is cut short; {REMEDY}")
        return content


def _expanded(tree: Any, known: dict[int, int], depth: int = _DEEPEST) -> int:
    """How many values nested containers hold, each counted as often as it can be reached: a pickle
    of two kilobytes may hold one list in another ten times over, and so on. Loops have no end.
    """
    if isinstance(tree, Mapping):
        parts: Iterable[Any] = tree.values()
    elif isinstance(tree, list | tuple | set | frozenset):
        parts = tree
    elif isinstance(tree, Opaque):
        parts = (tree.arguments, tree.state)
    else:
        return 1
    if id(tree) not in known:
        known[id(tree)] = _MOST + 1  # while it is being counted: met again, it holds itself
        if depth:
            known[id(tree)] = 1 + sum(_expanded(part, known, depth - 1) for part in parts)
    return known[id(tree)]


def restricted(data: bytes, path: Path) -> Any:
    """The plain values of a pickle that holds no tensors; everything else in it is `Opaque`."""
    try:
        return _Unpickler(_Window(memoryview(data))).load()
    except InputError:
        raise
    except Exception as error:  # as in TorchFile
        raise unreadable(path, error) from None


class _Window:
    """A part of a mapped file, read like a file."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._place, self._reads = data, 0, 0

    def read(self, count: int = -1) -> bytes:
        self._reads += 1
        if self._reads > _PICKLE_LIMIT:
            raise pickle.UnpicklingError("a pickle of absurd length")
        end = len(self._data) if count < 0 else min(self._place + count, len(self._data))
        found = bytes(self._data[self._place : end])
        self._place = max(self._place, end)
        return found

    def readline(self) -> bytes:
        begin = self._place
        while (part := self.read(256)) and b"\n" not in part:
            pass
        end = self._place - len(part) + part.index(b"\n") + 1 if part else self._place
        self._place = begin
        return self.read(end - begin)

    def readinto(self, buffer: Any) -> int:
        found = self.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = max(0, offset + (0, self._place, len(self._data))[whence])
        return self._place

    def tell(self) -> int:
        return self._place


_Python: Any = pickle._Unpickler


class _Unpickler(_Python):
    """The unpickler that Python has in Python (joblib builds on it too), so that each operation can
    be looked at.

    Unlike the one in C it allocates no more than the file holds. Keys of dictionaries are plain:
    hashing nested tuples can take for ever.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(_Python.dispatch)

    def __init__(
        self, stream: Any, find: Callable[[str, torch.dtype, int], Storage] | None = None
    ) -> None:
        super().__init__(stream)
        self._find, self._framed = find, 0
        self._unknown: dict[str, Any] = {}

    def persistent_load(self, identity: Any) -> Storage:
        kind, dtype, key, _, count = identity[:5]
        if self._find is None or kind != "storage" or not isinstance(dtype, _StorageType):
            raise pickle.UnpicklingError("a reference that isn't a tensor's storage")
        if not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise pickle.UnpicklingError("a storage without a key or a size")
        return self._find(key, dtype.dtype, count)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _KNOWN:
            return _KNOWN[module, name]
        if module in ("torch", "torch.storage"):
            if name in _STORAGES:
                return _StorageType(_STORAGES[name])
            if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
                return found
        full = f"{module}.{name}"
        if full not in self._unknown:
            self._unknown[full] = _Sealed("Opaque", (Opaque,), {"name": full, "__slots__": ()})
        return self._unknown[full]

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError("an extension code")

    def _frame(self) -> None:
        (size,) = struct.unpack("<Q", self.read(8))
        self._framed += size
        if self._framed > _PICKLE_LIMIT:
            raise pickle.UnpicklingError("a pickle of absurd length")
        self._unframer.load_frame(size)

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("an operation that torch.save never writes")

    def _bytes(self) -> None:
        """The bytes of an array of protocol 5, of which no more are allocated than are there."""
        (size,) = struct.unpack("<Q", self.read(8))
        self.append(bytes(self.read(size)))

    def _set_item(self) -> None:
        _check_keys(self.stack[-2:-1])
        _Python.load_setitem(self)

    def _set_items(self) -> None:
        _check_keys(self.stack[::2])
        _Python.load_setitems(self)

    def _add_items(self) -> None:
        _check_keys(self.stack)
        _Python.load_additems(self)

    def _frozenset(self) -> None:
        _check_keys(self.stack)
        _Python.load_frozenset(self)

    def _dict(self) -> None:
        _check_keys(self.stack[::2])
        _Python.load_dict(self)

    dispatch[pickle.FRAME[0]] = _frame
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = _set_items
    dispatch[pickle.ADDITEMS[0]] = _add_items
    dispatch[pickle.FROZENSET[0]] = _frozenset
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.BYTEARRAY8[0]] = _bytes
    for _operation in (pickle.NEXT_BUFFER, pickle.READONLY_BUFFER):
        dispatch[_operation[0]] = _refuse


def _check_keys(keys: Sequence[Any]) -> None:
    for key in keys:
        parts = key if isinstance(key, tuple) else (key,)
        if not all(
            isinstance(part, str | int | float | bytes | Opaque | torch.dtype | None)
            for part in parts
        ):
            raise pickle.UnpicklingError(f"a dictionary with a {type(key).__name__} for a key")


class PlainArray(metaclass=_Sealed):
    """A NumPy array of numbers that was pickled: ``array``, or None where it holds anything else.

    Only its type's letters, its shape and its bytes are used.
    """

    __slots__ = ("array",)
    array: np.ndarray | None

    def __init__(self, array: np.ndarray | None = None) -> None:
        self.array = array

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, by_column, data = state
            self.array = _numbers(data, dtype, shape, "F" if by_column else "C")

    @property
    def shape(self) -> tuple[int, ...]:
        """The array's shape."""
        return () if self.array is None else self.array.shape


def _numbers(data: Any, dtype: Any, shape: Any, order: Any = "C") -> np.ndarray | None:
    """The array of these bytes, or None where they aren't plain numbers of this shape."""
    code = dtype.arguments[0] if isinstance(dtype, Opaque) and dtype.arguments else None
    state = dtype.state if isinstance(dtype, Opaque) else None
    if not isinstance(code, str) or not re.fullmatch(r"[biuf][1248]", code):
        return None
    if not isinstance(data, bytes) or not isinstance(shape, tuple) or len(shape) > 32:
        return None
    if any(type(size) is not int or size < 0 for size in shape):
        return None
    order_of_bytes = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
    kind = np.dtype((">" if order_of_bytes == ">" else "<") + code)
    if len(data) != math.prod(shape) * kind.itemsize:
        return None
    return np.frombuffer(data, kind).reshape(shape, order="F" if order == "F" else "C")


class Table(dict, metaclass=_Sealed):
    """A dictionary of a file; attributes that some carry (`state_dict`'s versions) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        """Nothing is kept."""


def _table(pairs: Any = (), *_: Any) -> Table:
    made = Table()
    for key, value in pairs if isinstance(pairs, list) else ():
        _check_keys([key])
        made[key] = value
    return made


@dataclass(frozen=True, slots=True)
class _StorageType:
    dtype: torch.dtype


class _Function:
    """What a known name does; a pickle can call it but not change it."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("a pickle can't change a function")

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


_REPEATED = 2**22
"""Most numbers of a tensor that is larger than its storage because it repeats it (`expand`)."""


def _tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, *_: Any, dtype: torch.dtype | None = None
) -> LazyTensor:
    shape, stride = tuple(shape), tuple(stride)
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or len(shape) != len(stride) or len(shape) > 64:
        raise pickle.UnpicklingError("a tensor without a storage")
    if any(type(number) is not int or number < 0 for number in numbers):
        raise pickle.UnpicklingError("a tensor whose shape isn't whole numbers")
    dtype = dtype or storage.dtype
    available = storage.count * storage.dtype.itemsize // dtype.itemsize
    count, last = 1, offset
    for size, step in zip(shape, stride, strict=True):
        count, last = count * size, last + max(size - 1, 0) * step
    if count and (last >= available or count > max(available, _REPEATED)):
        raise pickle.UnpicklingError("a tensor larger than its storage")
    return LazyTensor(storage, dtype, offset, shape, stride)


def _tensor_v3(
    storage: Any,
    offset: Any,
    shape: Any,
    stride: Any,
    gradient: Any,
    hooks: Any,
    dtype: Any,
    *rest: Any,
) -> LazyTensor:
    return _tensor(
        storage, offset, shape, stride, dtype=dtype if isinstance(dtype, torch.dtype) else None
    )


def _first(value: Any, *_: Any) -> Any:
    return value


def _subclass(function: Any, kind: Any, arguments: Any, *_: Any) -> Any:
    return function(*arguments) if isinstance(function, _Function) else Opaque()


def _number(kind: Any, data: Any = None) -> Any:
    code = kind.arguments[0] if isinstance(kind, Opaque) and kind.arguments else None
    if (
        not isinstance(code, str)
        or not re.fullmatch(r"[biuf][1248]", code)
        or not isinstance(data, bytes)
    ):
        return Opaque()
    return np.frombuffer(data, "<" + code, 1)[0].item() if len(data) == int(code[1:]) else Opaque()


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "utf-8", "utf8"):
        raise pickle.UnpicklingError("bytes in an unknown encoding")
    return text.encode(encoding)


_KNOWN: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _Function(_table),
    ("collections", "defaultdict"): _Function(lambda *_: Table()),
    ("_codecs", "encode"): _Function(_encoded),
    ("torch", "Size"): _Function(tuple),
    ("torch._utils", "_rebuild_tensor"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): _Function(_tensor),
    ("torch._utils", "_rebuild_tensor_v3"): _Function(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): _Function(_first),
    ("torch._utils", "_rebuild_parameter_with_state"): _Function(_first),
    ("torch._tensor", "_rebuild_from_type_v2"): _Function(_subclass),
    **{(f"numpy.{core}.multiarray", "scalar"): _Function(_number) for core in ("core", "_core")},
    **{
        (f"numpy.{core}.multiarray", "_reconstruct"): _Function(lambda *_: PlainArray())
        for core in ("core", "_core")
    },
    **{
        (f"numpy.{core}.numeric", "_frombuffer"): _Function(
            lambda data, dtype, shape, order: PlainArray(_numbers(data, dtype, shape, order))
        )
        for core in ("core", "_core")
    },
}
