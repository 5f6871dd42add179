"""Arrays of a probe's file, read within limits: a small file may unpack to more than a machine
holds.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from thermo_opt.errors import InputError, first_line
from thermo_opt.runs.border import inside, read_json, regular
from thermo_opt.runs.tensors import SafetensorsFile, opened
from thermo_opt.runs.torch_file import LazyTensor, TorchFile

PROBE_SUFFIXES = (".safetensors", ".npz", ".parquet", ".pt", ".pth")
LIMIT = 1 << 30
"""Bytes of a probe's arrays."""


def read_arrays(path: Path) -> dict[str, Any]:
    """The arrays in a probe's file, or in a folder of the `datasets` library, by name."""
    if path.is_dir():
        return _read_datasets(path)
    regular(path)
    if path.suffix == ".safetensors":
        file = SafetensorsFile(path)
        _check_size(
            path, sum(math.prod(shape) * dtype.itemsize for shape, dtype in file.layouts.values())
        )
        return {name: file.load(name) for name in file.shapes}
    if path.suffix == ".npz":
        return dict(_read_npz(path))
    if path.suffix == ".parquet":
        return _read_parquet(path)
    if path.suffix in (".pt", ".pth"):
        return _read_torch(path)
    raise InputError(
        f"{path}: unknown kind of probe file; use one of {', '.join(PROBE_SUFFIXES)}, or a "
        "datasets folder"
    )


def _check_size(path: Path, size: int) -> None:
    if size > LIMIT:
        raise InputError(
            f"{path}: its arrays take {size:,} bytes, and {LIMIT:,} are read at once: give fewer "
            "examples, or of predictions one file per snapshot"
        )


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            _check_size(path, sum(entry.file_size for entry in entries))
            for entry in entries:
                if not entry.filename.endswith(".npy"):
                    raise InputError(
                        f"{path} isn't an npz file (it holds {entry.filename[:60]!r}); save it "
                        "with numpy.savez"
                    )
                name = entry.filename.removesuffix(".npy")
                if name in arrays:
                    raise InputError(
                        f"{path} holds two arrays called {name[:60]!r}; keep one of them"
                    )
                with archive.open(entry) as stream:
                    version = np.lib.format.read_magic(stream)
                    reader = {
                        (1, 0): np.lib.format.read_array_header_1_0,
                        (2, 0): np.lib.format.read_array_header_2_0,
                    }
                    shape, _, dtype = reader[version](stream)
                if dtype.hasobject or math.prod(shape) * dtype.itemsize > entry.file_size:
                    raise ValueError(
                        f"{name[:60]!r} holds Python objects, as rows of different shapes make them"
                        if dtype.hasobject
                        else "an array is cut short"
                    )
                with archive.open(entry) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    except InputError:
        raise
    except (
        Exception
    ) as error:  # zipfile, zlib and NumPy each have their own errors for a damaged file
        raise InputError(
            f"{path} can't be read as npz without pickles ({first_line(error)}); save plain "
            "numeric arrays with numpy.savez, rows put together with numpy.stack"
        ) from None
    return arrays


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise InputError(
            f"{path}: reading parquet needs pyarrow; pip install 'thermo-opt[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        values = sum(
            group.column(i).num_values for group in groups for i in range(group.num_columns)
        )
        _check_size(path, 8 * max(values, file.metadata.num_rows))
        table = file.read()
    except InputError:
        raise
    except Exception as error:  # pyarrow's errors share no base class with a damaged file
        raise InputError(
            f"{path} can't be read as parquet ({first_line(error)}); write it again"
        ) from None
    return _columns(table, path)


def _read_datasets(path: Path) -> dict[str, np.ndarray]:
    """A dataset saved with ``save_to_disk``: its Arrow files, listed in ``state.json``."""
    if (path / "dataset_dict.json").exists():
        splits = read_json(path / "dataset_dict.json").get("splits")
        names = [name for name in splits if inside(path, name)] if isinstance(splits, list) else []
        if len(names) != 1:
            raise InputError(
                f"{path} holds several datasets ({', '.join(map(str, names))}); give the folder "
                "of one of them"
            )
        return _read_datasets(path / names[0])
    if not (path / "state.json").exists():
        raise InputError(
            f"{path} is a folder, but not of the datasets library (state.json is missing); give a "
            "probe file"
        )
    try:
        import pyarrow
    except ImportError:
        raise InputError(
            f"{path}: reading it needs pyarrow; pip install 'thermo-opt[parquet]'"
        ) from None
    state = read_json(path / "state.json")
    if state.get("_indices_files"):
        raise InputError(
            f"{path} is a selection of a larger dataset; save it after flatten_indices()"
        )
    listed = state.get("_data_files")
    names = (
        [entry.get("filename") for entry in listed if isinstance(entry, dict)]
        if isinstance(listed, list)
        else []
    )
    files = [file for name in names if (file := inside(path, name)) is not None]
    if not files or len(files) < len(names):
        raise InputError(
            f"{path / 'state.json'} lists no files of this folder; save the dataset again"
        )
    _check_size(path, sum(regular(file).st_size for file in files))
    try:
        table = pyarrow.concat_tables(
            [pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all() for file in files]
        )
    except Exception as error:  # as for parquet
        raise InputError(
            f"{path} can't be read as a dataset ({first_line(error)}); save it again"
        ) from None
    return _columns(table, path)


def _columns(table: Any, path: Path) -> dict[str, np.ndarray]:
    """The columns of an Arrow table; lists of one length become further axes. Columns of text are
    left as objects.
    """
    columns: dict[str, np.ndarray] = {}
    for name in table.column_names:
        column = table.column(name)
        _check_size(path, 8 * len(column))
        try:
            columns[name] = _array(column.combine_chunks(), path, name)
        except InputError:
            raise
        except Exception as error:  # as for parquet
            raise InputError(
                f"{path}: {name!r} can't be read ({first_line(error)}); write numbers"
            ) from None
    return columns


def _array(column: Any, path: Path, name: str) -> np.ndarray:
    import pyarrow

    kind = column.type
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if isinstance(kind, pyarrow.BaseExtensionType):
        return _array(column.storage, path, name)
    if (
        pyarrow.types.is_list(kind)
        or pyarrow.types.is_large_list(kind)
        or pyarrow.types.is_fixed_size_list(kind)
    ):
        if column.null_count:
            raise InputError(f"{path}: {name!r} has empty cells; fill them")
        lengths = set(column.value_lengths().unique().to_pylist()) if len(column) else {0}
        if len(lengths) > 1:
            raise InputError(f"{path}: the rows of {name!r} differ in shape; pad them to one")
        inner = _array(column.flatten(), path, name)
        return inner.reshape(len(column), lengths.pop(), *inner.shape[1:])
    if (
        pyarrow.types.is_integer(kind)
        or pyarrow.types.is_floating(kind)
        or pyarrow.types.is_boolean(kind)
    ):
        if column.null_count:
            raise InputError(f"{path}: {name!r} has empty cells; fill them")
        return column.to_numpy(zero_copy_only=False)
    return np.full(len(column), None, dtype=object)


def _read_torch(path: Path) -> dict[str, Tensor]:
    content = opened(path, TorchFile).content
    if isinstance(content, tuple | list) and len(content) == 2:
        content = {"inputs": content[0], "targets": content[1]}
    if not isinstance(content, Mapping):
        raise InputError(
            f"{path} holds neither a dictionary of tensors nor (inputs, targets); save one of them"
        )
    named: dict[str, LazyTensor] = {}
    for name, value in content.items():
        parts = (
            value.items()
            if isinstance(value, Mapping)
            else enumerate(value)
            if isinstance(value, tuple)
            else None
        )
        if isinstance(value, LazyTensor):
            named[str(name)] = value
        elif parts is not None:
            named |= {f"{name}/{key}": part for key, part in parts if isinstance(part, LazyTensor)}
    _check_size(
        path, sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in named.values())
    )
    return {name: tensor.load() for name, tensor in named.items()}
