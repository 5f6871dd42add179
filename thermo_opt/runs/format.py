"""Our own layout on disk: names, schema version, and writing by rename.

run.json                          what was trained and how
steps.jsonl                       one object a line, appended and flushed at each step
probe.safetensors                 probe inputs and targets, once
snapshots/00000010.safetensors    tensors after 10 steps, with a checksum of each in the file's
metadata
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.tensors import DTYPES, checksum, metadata_checksum

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
PROBE_FILE = "probe.safetensors"
SNAPSHOT_FOLDER = "snapshots"
PARTIAL = ".partial"


def snapshot_path(run: Path, step: int) -> Path:
    """Where the snapshot after ``step`` steps lies."""
    return run / SNAPSHOT_FOLDER / f"{step:08d}.safetensors"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is either whole or absent, also after a kill or a power cut: fsync, rename,
    fsync of the folder.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def remove_partial(folder: Path) -> None:
    """Remove what a killed `write_atomically` left in ``folder``."""
    for file in folder.glob("*" + PARTIAL):
        file.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write CPU tensors as safetensors with a checksum of each, atomically; InputError for a type
    of numbers that the format hasn't."""
    for name, tensor in tensors.items():
        if tensor.dtype not in DTYPES.values():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise InputError(
                f"{path.name}: {name} is of type {kind}, which safetensors can't hold; convert it"
            )
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    checksums[""] = metadata_checksum(metadata or {})
    write_atomically(
        path, save(dict(tensors), {**(metadata or {}), "checksums": json.dumps(checksums)})
    )
