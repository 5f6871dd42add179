"""Weights and optimizer state of `torch.distributed.checkpoint` (FSDP, torchtitan, Accelerate): a
folder of shards.

``.metadata`` is a pickle that says which stretch of which ``*.distcp`` file holds which part of
which tensor. It is read by the unpickler that runs nothing (`thermo_opt.runs.torch_file`), and
checked here; each stretch is a file of `torch.save`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.border import REMEDY, inside, read_bytes, whole
from thermo_opt.runs.readers.optimizer_state import MOMENTS, OptimizerState, Shape, checked_state
from thermo_opt.runs.torch_file import LazyTensor, Opaque, TorchFile, restricted

METADATA = ".metadata"
_LIMIT = 1 << 28
"""Bytes of ``.metadata``."""
_MODEL_KEYS = ("model.", "app.model.", "state_dict.", "model_state_dict.", "module.")
_OPTIMIZER_KEYS = (
    "optimizer.",
    "optim.",
    "app.optim.",
    "app.optimizer.",
    "optimizer_state_dict.",
    "optimizers.",
)


@dataclass(frozen=True)
class _Part:
    """A rectangle of a tensor: where it begins in it, its size, and the stretch of the file that
    holds it.
    """

    begin: Shape
    size: Shape
    file: Path
    offset: int
    length: int


class DistributedFolder:
    """One folder of `torch.distributed.checkpoint`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._metadata = _fields(restricted(read_bytes(path / METADATA, _LIMIT), path / METADATA))

    @cached_property
    def tensors(self) -> dict[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each tensor by its full name."""
        found = {}
        for name, entry in _mapping(self._metadata.get("state_dict_metadata")).items():
            fields = _fields(entry)
            if "chunks" not in fields:
                continue
            properties = getattr(fields.get("properties"), "state", None)
            dtype = (
                properties[0]
                if isinstance(properties, tuple) and properties
                else _fields(properties).get("dtype")
            )
            if not isinstance(dtype, torch.dtype):
                dtype = _fields(fields.get("properties")).get("dtype")
            if not isinstance(name, str) or not isinstance(dtype, torch.dtype):
                raise InputError(
                    f"{self.path / METADATA} doesn't say the type of {str(name)[:80]!r}; {REMEDY}"
                )
            found[name] = (_shape(fields.get("size"), self.path / METADATA), dtype)
        return found

    @cached_property
    def _parts(self) -> dict[str, list[_Part]]:
        parts: dict[str, list[_Part]] = {}
        for index, place in _mapping(self._metadata.get("storage_data")).items():
            key, info = _fields(index), _fields(place)
            name = key.get("fqn")
            file = inside(self.path, info.get("relative_path"))
            offset, length = whole(info.get("offset")), whole(info.get("length"))
            if not isinstance(name, str) or file is None or offset is None or length is None:
                raise InputError(
                    f"{self.path / METADATA} points outside its folder, or nowhere; {REMEDY}"
                )
            chunks = _fields(_mapping(self._metadata.get("state_dict_metadata")).get(name)).get(
                "chunks"
            )
            begin: Shape = ()
            size: Shape = ()
            if isinstance(chunks, list):
                begin = _shape(key.get("offset") or (), self.path / METADATA)
                sizes = [
                    _shape(_fields(chunk).get("sizes"), self.path / METADATA)
                    for chunk in chunks
                    if _shape(_fields(chunk).get("offsets"), self.path / METADATA) == begin
                ]
                size = sizes[0] if sizes else ()
            parts.setdefault(name, []).append(_Part(begin, size, file, offset, length))
        return parts

    def load(self, name: str) -> Tensor:
        """One tensor, put together from its parts."""
        shape, dtype = self.tensors[name]
        parts = self._parts.get(name, [])
        if sum(math.prod(part.size) for part in parts) != math.prod(shape):
            raise InputError(f"{self.path} lacks parts of {name!r}; {REMEDY}")
        pieces = []
        for part in parts:
            content = TorchFile(part.file, part.offset, part.length).content
            if (
                not isinstance(content, LazyTensor)
                or content.shape != part.size
                or content.dtype != dtype
            ):
                raise InputError(f"{part.file} doesn't hold {name!r} as {METADATA} says; {REMEDY}")
            pieces.append((part, content.load()))
        if len(pieces) == 1 and pieces[0][0].size == shape:
            return pieces[0][1]
        whole_tensor = torch.empty(shape, dtype=dtype)
        for part, piece in pieces:
            place = tuple(
                slice(begin, begin + size)
                for begin, size in zip(part.begin, part.size, strict=True)
            )
            if whole_tensor[place].shape != piece.shape:
                raise InputError(f"{self.path}: parts of {name!r} lie outside it; {REMEDY}")
            whole_tensor[place] = piece
        return whole_tensor

    def plain(self, name: str) -> Any:
        """A value that isn't a tensor, if it is plain."""
        parts = self._parts.get(name, [])
        return TorchFile(parts[0].file, parts[0].offset, parts[0].length).content if parts else None

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all entries."""
        return frozenset(
            name
            for name in _mapping(self._metadata.get("state_dict_metadata"))
            if isinstance(name, str)
        )


class DistributedWeights:
    """A model's weights in such a folder, as `Weights`."""

    def __init__(self, folder: DistributedFolder) -> None:
        self._folder = folder
        names = [
            name
            for name in folder.tensors
            if not name.startswith(_OPTIMIZER_KEYS)
            and not any(f".{moment}" in f".{name}" for moment in MOMENTS)
        ]
        self._prefix = next(
            (key for key in _MODEL_KEYS if any(name.startswith(key) for name in names)), ""
        )
        self._names = {
            name.removeprefix(self._prefix): name for name in names if name.startswith(self._prefix)
        }
        if not self._names:
            raise InputError(
                f"{folder.path} holds no weights of a model; save the model's state_dict"
            )

    @property
    def layouts(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each tensor."""
        return {name: self._folder.tensors[full] for name, full in self._names.items()}

    def load(self, name: str) -> Tensor:
        """One of them."""
        return self._folder.load(self._names[name])


def optimizer_state(folder: DistributedFolder) -> OptimizerState | str:
    """The optimizer's state in such a folder: ``…state.<parameter>.exp_avg`` and so on, named by
    parameter.
    """
    state: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for full in sorted(folder.names):
        prefix = next(
            (
                key
                for key in (*_OPTIMIZER_KEYS, "")
                if full.startswith((key + "state.", key + "param_groups."))
            ),
            None,
        )
        if prefix is None:
            continue
        kind, _, rest = full.removeprefix(prefix).partition(".")
        name, _, entry = rest.rpartition(".")
        if not name:
            continue
        if kind == "param_groups":
            groups.setdefault(name, {})[entry] = folder.plain(full)
        elif full in folder.tensors and entry in (*MOMENTS, "step", "momentum_buffer"):
            state.setdefault(name, {})[entry] = folder.load(full)
        elif entry == "step":
            state.setdefault(name, {})[entry] = folder.plain(full)
    if not state:
        return "no optimizer state was saved with it"
    numbered = all(name.isdigit() for name in state)
    entries = {int(name) if numbered else name: entry for name, entry in state.items()}
    listed = [
        {**group, "params": [key for key in group["params"] if key in entries]}
        for _, group in sorted(groups.items())
        if isinstance(group.get("params"), list)
    ]
    if sum(len(group["params"]) for group in listed) != len(entries):  # settings by parameter
        settings = next((group for name, group in groups.items() if name in state), {})
        listed = [{**settings, "params": list(entries)}]
    return checked_state({"state": entries, "param_groups": listed}, str(folder.path))


def _fields(value: Any) -> Mapping[str, Any]:
    """The fields of a dataclass that wasn't built."""
    state = value.state if isinstance(value, Opaque) else value
    return state if isinstance(state, Mapping) else {}


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}


def _shape(value: Any, file: Path) -> Shape:
    if not isinstance(value, list | tuple) or not all(whole(size) is not None for size in value):
        raise InputError(f"{file} holds a shape that isn't whole numbers; {REMEDY}")
    return tuple(int(size) for size in value)
