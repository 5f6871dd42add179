"""Probe files: the fixed inputs and targets on which predictions are compared."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from thermo_opt import arguments
from thermo_opt.errors import InputError
from thermo_opt.runs.tensors import SafetensorsFile

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

PROBE_SUFFIXES = (".safetensors", ".npz", ".parquet")


@dataclass(frozen=True)
class Probe:
    """The fixed examples on which a run's predictions are compared.

    Attributes:
        inputs: a tensor for ``model(inputs)``, a tuple for ``model(*inputs)``, a dict for
            ``model(**inputs)``; None when only predictions were recorded.
        targets: what the loss compares with (-100: not counted); None when unknown.
        fingerprint: SHA-256 of the contents.
    """

    inputs: Inputs | None
    targets: Tensor | None
    fingerprint: str


def probe_tensors(inputs: Inputs | None, targets: Tensor | None) -> dict[str, Tensor]:
    """A probe's tensors by the names they have in a file: ``inputs``, ``inputs/<position or key>``,
    ``targets``."""
    named: dict[str, Tensor] = {}
    if isinstance(inputs, Tensor):
        named["inputs"] = inputs
    elif isinstance(inputs, Mapping):
        named |= {f"inputs/{key}": value for key, value in inputs.items()}
    elif inputs is not None:
        named |= {f"inputs/{i}": value for i, value in enumerate(inputs)}
    if targets is not None:
        named["targets"] = targets
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()
    }


def make_probe(inputs: Inputs | None, targets: Tensor | None) -> Probe:
    """A probe with its fingerprint: SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(probe_tensors(inputs, targets).items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return Probe(inputs, targets, digest.hexdigest())


def load_probe(path: str | os.PathLike[str]) -> Probe:
    """Read a probe from safetensors, npz or parquet.

    Tensors (arrays, columns) are named ``inputs`` for ``model(inputs)``, ``inputs/0, inputs/1, …``
    for ``model(*inputs)`` or ``inputs/<key>`` for ``model(**inputs)``, and ``targets``.

    Args:
        path: the file.

    Raises:
        InputError: naming the file when it is missing, damaged, has neither inputs nor targets, or
            has no rows.
    """
    path = arguments.path("probe", path)
    if not path.is_file():
        raise InputError(
            f"{path}: no such probe file; give one of safetensors, npz or parquet with inputs and "
            "targets"
        )
    if path.suffix == ".safetensors":
        file = SafetensorsFile(path)
        named = {name: file.load(name) for name in file.shapes}
    elif path.suffix == ".npz":
        named = {name: _tensor(array, path, name) for name, array in _read_npz(path).items()}
    elif path.suffix == ".parquet":
        named = {name: _tensor(array, path, name) for name, array in _read_parquet(path).items()}
    else:
        raise InputError(
            f"{path}: unknown kind of probe file; use one of {', '.join(PROBE_SUFFIXES)}"
        )
    return _assemble(named, path)


def _assemble(named: dict[str, Tensor], path: Path) -> Probe:
    targets = named.get("targets")
    keyed = {
        name.removeprefix("inputs/"): tensor
        for name, tensor in named.items()
        if name.startswith("inputs/")
    }
    inputs: Inputs | None
    if "inputs" in named:
        inputs = named["inputs"]
    elif keyed and all(key.isdigit() for key in keyed):
        inputs = tuple(keyed[key] for key in sorted(keyed, key=int))
    else:
        inputs = keyed or None
    if inputs is None and targets is None:
        raise InputError(
            f"{path} has neither 'inputs' nor 'targets' (it has "
            f"{', '.join(sorted(named)) or 'nothing'}); name them so"
        )
    rows = {
        name: len(tensor) if tensor.ndim else 0
        for name, tensor in named.items()
        if name == "targets" or name.startswith("inputs")
    }
    if min(rows.values()) == 0:
        raise InputError(
            f"{path}: the probe has no rows ({min(rows, key=lambda name: rows[name])} is empty); "
            "give at least one "
            "example"
        )
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(rows.items()))
        raise InputError(
            f"{path}: the probe's tensors differ in their number of rows ({counts}); give one row "
            "an example"
        )
    return make_probe(inputs, targets)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (
        Exception
    ) as error:  # zipfile, zlib and NumPy each have their own errors for a damaged file
        raise InputError(
            f"{path} can't be read as npz without pickles ({error}); save plain numeric arrays "
            "with numpy.savez"
        ) from None


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    import pandas as pd

    try:
        frame = pd.read_parquet(path)
    except ImportError:
        raise InputError(
            f"{path}: reading parquet needs pyarrow; pip install 'thermo-opt[parquet]'"
        ) from None
    except Exception as error:  # pyarrow's errors share no base class with a damaged file
        raise InputError(f"{path} can't be read as parquet ({error}); write it again") from None
    columns = {}
    for name in frame.columns:
        try:
            columns[name] = np.array([_nested(cell) for cell in frame[name]])
        except ValueError:
            raise InputError(
                f"{path}: the rows of {name!r} differ in shape; pad them to one"
            ) from None
    return columns


def _nested(cell: object) -> object:
    return [_nested(part) for part in cell] if isinstance(cell, np.ndarray | list) else cell


def _tensor(array: np.ndarray, path: Path, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    except TypeError:
        raise InputError(
            f"{path}: {name!r} isn't a rectangular numeric array ({array.dtype}); make all rows "
            "the same shape"
        ) from None
