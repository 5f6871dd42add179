"""Our own layout on disk: names, schema version, writing by rename, and the reader.

run.json                          what was trained and how
steps.jsonl                       one object a line, appended and flushed at each step
probe.safetensors                 probe inputs and targets, once
snapshots/00000010.safetensors    tensors after 10 steps, with a checksum of each in the file's
metadata
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors.torch import save
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.run import CLOCKS, LIKELIHOODS, Run, RunInfo, Snapshot
from thermo_opt.runs.tensors import SafetensorsFile, checksum, metadata_checksum, opened

SCHEMA_VERSION = 1
RUN_FILE = "run.json"
STEPS_FILE = "steps.jsonl"
PROBE_FILE = "probe.safetensors"
SNAPSHOT_FOLDER = "snapshots"
PARTIAL = ".partial"
_NUMERIC = {"loss", "lr", "wall", "examples", "tokens"}
_LAST_STEP = 10**15
"""Whole numbers beyond this in a file's name are times of day or hashes, and differences of them
lose digits."""


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


def visible(files: Iterable[Path]) -> Iterator[Path]:
    """``files`` but for hidden ones, such as the ``._*`` files that macOS leaves on other systems'
    disks."""
    return (file for file in files if not file.name.startswith("."))


def remove_partial(folder: Path) -> None:
    """Remove what a killed `write_atomically` left in ``folder``."""
    for file in folder.glob("*" + PARTIAL):
        file.unlink(missing_ok=True)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write CPU tensors as safetensors with a checksum of each, atomically."""
    checksums = {name: checksum(tensor) for name, tensor in tensors.items()}
    checksums[""] = metadata_checksum(metadata or {})
    write_atomically(
        path, save(dict(tensors), {**(metadata or {}), "checksums": json.dumps(checksums)})
    )


def read_run_file(path: Path) -> dict[str, Any]:
    """The contents of ``run.json``, with its schema version checked."""
    file = path / RUN_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} can't be read ({error}); restore it from a copy") from None
    if not isinstance(content, dict) or "schema_version" not in content:
        raise InputError(
            f"{file} has no schema_version; it isn't a recorded run of ours: use --format for "
            "another tool's layout"
        )
    if content["schema_version"] != SCHEMA_VERSION:
        raise InputError(
            f"{file} has schema version {content['schema_version']!r}, this version of thermo-opt "
            "reads "
            f"{SCHEMA_VERSION}; "
            "upgrade thermo-opt or record the run again"
        )
    return content


def read_steps(file: Path) -> pd.DataFrame:
    """The training curve of ``steps.jsonl``; a last line cut short by a kill is left out."""
    rows: list[dict[str, Any]] = []
    last = 0
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                break
            raise InputError(
                f"{file}, line {number} isn't an object with a 'step'; restore the file or remove "
                "that line"
            ) from None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise InputError(
                f"{file}, line {number}: step {step!r} isn't a whole number; restore the file"
            )
        if rows and step <= last:
            how = "occurs twice" if step == last else f"comes after step {last}"
            raise InputError(
                f"{file}, line {number}: step {step} {how}; steps must increase: keep one line a "
                "step"
            )
        rows.append(row)
        last = step
    return with_numbers(
        pd.DataFrame(rows, columns=None if rows else ["step"]).set_index("step"), file
    )


def with_numbers(curve: pd.DataFrame, file: Path) -> pd.DataFrame:
    """A training curve with the columns an audit uses as float64; raises `InputError` naming
    ``file`` if one isn't numeric.
    """
    for column in _NUMERIC & set(curve.columns):
        try:
            curve[column] = pd.to_numeric(curve[column]).astype("float64")
        except (ValueError, TypeError):
            raise InputError(
                f"{file}: {column!r} isn't a number on every line; correct or remove those lines"
            ) from None
    return curve


@dataclass
class OwnSnapshot:
    """Contents of one of our snapshot files."""

    path: Path

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor by name; not kept, so that memory doesn't grow with the number of
        snapshots."""
        return self._file().shapes

    def load(self, name: str) -> Tensor:
        """The tensor of this name, verified against its checksum."""
        return self._file().load(name)

    def pieces(self, name: str, size: int) -> Iterator[Tensor]:
        """Its elements ``size`` at a time, verified once the last has been taken."""
        return self._file().pieces(name, size)

    def moments_meta(self) -> dict[str, Any] | None:
        """Step and betas of Adam's moments."""
        text = self._file().metadata.get("moments")
        if text is None:
            return None
        meta = json.loads(text)
        return {"step": int(meta["step"]), "betas": tuple(meta["betas"])}

    def absent(self, group: str) -> str | None:
        """Why a group is not there."""
        option = {
            "params": "params",
            "buffers": "params",
            "grad": "grads",
            "exp_avg": "moments",
            "exp_avg_sq": "moments",
        }.get(group)
        return f"record with {option}=True" if option else None

    def _file(self) -> SafetensorsFile:
        return opened(self.path, SafetensorsFile)


def link(snapshots: list[tuple[int, Path, Any]]) -> list[Snapshot]:
    """Snapshots in order of step, each knowing the first one's layout; raises `InputError` when two
    have one step number.
    """
    ordered = sorted(snapshots, key=lambda item: item[0])
    if ordered and ordered[-1][0] > _LAST_STEP:
        raise InputError(
            f"{ordered[-1][1]}: {ordered[-1][0]} can't be a step number; name the file by its "
            "step, or remove it"
        )
    for (step, path, _), (following, other, _) in itertools.pairwise(ordered):
        if step == following:
            raise InputError(f"{path} and {other} both hold step {step}; keep one of them")
    result: list[Snapshot] = []
    for step, path, contents in ordered:
        result.append(Snapshot(step, path, contents, result[0] if result else None))
    return result


def recognise(path: Path) -> bool:
    """Whether a folder holds a run of ours."""
    return (path / RUN_FILE).is_file()


def read_own(path: Path) -> Run:
    """Open a run that `Recorder` wrote. Tensors and probe are read when asked for."""
    content = read_run_file(path)
    folder = path / SNAPSHOT_FOLDER
    found: list[tuple[int, Path, Any]] = []
    for file in visible(folder.iterdir()) if folder.is_dir() else ():
        stem, dot, suffix = file.name.rpartition(".")
        if not dot or suffix != "safetensors":
            continue
        if not stem.isdecimal():
            raise InputError(
                f"{file}: a snapshot's name must be its step number, like 00000010.safetensors; "
                "rename or remove it"
            )
        found.append((int(stem), file, OwnSnapshot(file)))
    probe = path / PROBE_FILE
    return Run(
        name=_checked(content, "name", str, path / RUN_FILE) or path.resolve().name,
        path=path,
        format="thermo-opt",
        info=_info(content, path / RUN_FILE),
        steps=read_steps(path / STEPS_FILE),
        snapshots=link(found),
        probe_path=probe if probe.exists() else None,
    )


def _checked(content: dict[str, Any], key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    value = content.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise InputError(f"{file}: {key} is {value!r}; correct it")
    return value


def _info(content: dict[str, Any], file: Path) -> RunInfo:
    def checked(key: str, kind: type | tuple[type, ...]) -> Any:
        return _checked(content, key, kind, file)

    likelihood, clock = checked("likelihood", str), checked("clock", str)
    if likelihood is not None and likelihood not in LIKELIHOODS:
        raise InputError(
            f"{file}: unknown likelihood {likelihood!r}; use one of {', '.join(LIKELIHOODS)}"
        )
    if clock is not None and clock not in CLOCKS:
        raise InputError(f"{file}: unknown clock {clock!r}; use one of {', '.join(CLOCKS)}")
    sigma2, batch_size = checked("sigma2", (int, float)), checked("batch_size", int)
    if sigma2 is not None and not (math.isfinite(sigma2) and sigma2 > 0):
        raise InputError(f"{file}: sigma2 is {sigma2!r}; it must be positive")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"{file}: batch_size is {batch_size!r}; it must be at least 1")
    parameters = checked("parameters", list)
    for parameter in parameters or ():
        if not (
            isinstance(parameter, dict)
            and isinstance(parameter.get("name"), str)
            and isinstance(shape := parameter.get("shape"), list)
            and all(isinstance(size, int) for size in shape)
        ):
            raise InputError(
                f"{file}: parameters holds {parameter!r}; each needs a name and a shape: correct it"
            )
    return RunInfo(
        optimizer=checked("optimizer", str),
        settings=checked("settings", dict) or {},
        clock=clock,
        likelihood=likelihood,
        sigma2=sigma2,
        batch_size=batch_size,
        parameters=parameters,
        tied=checked("tied", dict) or {},
        probe_fingerprint=checked("probe_fingerprint", str),
        model=checked("model", str),
        schema_version=content["schema_version"],
        created=checked("created", str),
        notes=checked("notes", dict) or {},
    )
