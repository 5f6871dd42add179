"""Reader for our own layout (`thermo_opt.runs.format`): what `Recorder` wrote, checked before it is
used.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.likelihoods import KINDS
from thermo_opt.runs.border import REMEDY, parse_json, read_json, visible, whole
from thermo_opt.runs.format import PROBE_FILE, RUN_FILE, SCHEMA_VERSION, SNAPSHOT_FOLDER, STEPS_FILE
from thermo_opt.runs.readers.common import link
from thermo_opt.runs.readers.curves import with_numbers
from thermo_opt.runs.run import CLOCKS, LIKELIHOODS, Run, RunInfo
from thermo_opt.runs.steps_file import read_steps
from thermo_opt.runs.tensors import SafetensorsFile, opened

_OPTIONS = {
    "params": "params",
    "buffers": "params",
    "grad": "grads",
    "exp_avg": "moments",
    "exp_avg_sq": "moments",
}
"""The option of `Recorder` that records each group."""


@dataclass
class OwnSnapshot:
    """Contents of one of our snapshot files.

    ``step`` is the one in the file's name, which its metadata must repeat; ``weights`` the names
    that ``run.json`` lists.
    """

    path: Path
    step: int | None = None
    weights: frozenset[str] = frozenset()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor by name; not kept, so that memory doesn't grow with the number of
        snapshots.
        """
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
        try:
            meta = parse_json(text.encode())
        except (ValueError, RecursionError):
            meta = None
        step = whole(meta.get("step"), least=1) if isinstance(meta, dict) else None
        betas = meta.get("betas") if isinstance(meta, dict) else None
        if (
            step is None
            or not isinstance(betas, list)
            or len(betas) != 2
            or not all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas)
        ):
            raise InputError(
                f"{self.path}: its note on the moments ({text[:60]}) isn't a step of at least 1 "
                f"and two betas below 1; {REMEDY}"
            )
        return {"step": step, "betas": (float(betas[0]), float(betas[1]))}

    def absent(self, group: str) -> str | None:
        """Why a group is not there."""
        option = _OPTIONS.get(group)
        return f"record with {option}=True" if option else None

    def _file(self) -> SafetensorsFile:
        file = opened(self.path, SafetensorsFile)
        said = file.metadata.get("step")
        if self.step is not None and said is not None and said != str(self.step):
            raise InputError(
                f"{self.path} is named as step {self.step} but holds step {said[:20]}; give it "
                "the name of its step back"
            )
        if (
            self.weights
            and not file.shapes.keys() >= self.weights
            and any(n.startswith("params/") for n in file.shapes)
        ):
            missing = min(self.weights - file.shapes.keys())
            raise InputError(f"{self.path} lacks {missing}, which {RUN_FILE} lists; {REMEDY}")
        return file


def recognise(path: Path) -> bool:
    """Whether a folder holds a run of ours."""
    return os.path.lexists(path / RUN_FILE)  # a link that leads nowhere is damage


def read(path: Path, key: str | None = None) -> Run:
    """Open a run that `Recorder` wrote. Tensors and probe are read when asked for."""
    content = read_run_file(path)
    file = path / RUN_FILE
    info = _info(content, file)
    weights = frozenset(f"params/{parameter['name']}" for parameter in info.parameters or ())
    folder = path / SNAPSHOT_FOLDER
    found: list[tuple[int, Path, Any]] = []
    for snapshot in visible(folder.iterdir()) if folder.is_dir() else ():
        stem, dot, suffix = snapshot.name.rpartition(".")
        if not dot or suffix != "safetensors":
            continue
        if not stem.isdecimal():
            raise InputError(
                f"{snapshot}: a snapshot's name must be its step number, like "
                "00000010.safetensors; rename it or move it "
                "elsewhere"
            )
        found.append((int(stem), snapshot, OwnSnapshot(snapshot, int(stem))))
    if found:  # the others are held against the first
        min(found, key=lambda item: item[0])[2].weights = weights
    probe = path / PROBE_FILE
    steps_file = path / STEPS_FILE
    return Run(
        name=_checked(content, "name", str, file) or path.resolve().name,
        path=path,
        format="thermo-opt",
        info=info,
        steps=with_numbers(read_steps(steps_file), steps_file),
        snapshots=link(found),
        probe_path=probe if probe.exists() else None,
    )


def read_run_file(path: Path) -> dict[str, Any]:
    """The contents of ``run.json``, with its schema version checked."""
    file = path / RUN_FILE
    content = read_json(file)
    if "schema_version" not in content:
        raise InputError(
            f"{file} has no schema_version; it isn't a recorded run of ours: use --format for "
            "another tool's layout"
        )
    if content["schema_version"] != SCHEMA_VERSION or content["schema_version"] is True:
        raise InputError(
            f"{file} has schema version {content['schema_version']!r:.40}, this version of "
            "thermo-opt reads "
            f"{SCHEMA_VERSION}; upgrade thermo-opt or record the run again"
        )
    return content


def _checked(content: dict[str, Any], key: str, kind: type | tuple[type, ...], file: Path) -> Any:
    value = content.get(key)
    if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
        raise InputError(f"{file}: {key} is {str(value)[:60]!r}; correct it")
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
    if sigma2 is not None and not 0 < sigma2 <= sys.float_info.max:
        raise InputError(f"{file}: sigma2 is {str(sigma2)[:60]}; it must be positive and finite")
    if batch_size is not None and whole(batch_size, least=1) is None:
        raise InputError(
            f"{file}: batch_size is {str(batch_size)[:60]}; it must be a number of examples"
        )
    parameters = checked("parameters", list)
    for parameter in parameters or ():
        if not (
            isinstance(parameter, dict)
            and isinstance(parameter.get("name"), str)
            and isinstance(shape := parameter.get("shape"), list)
            and all(whole(size) is not None for size in shape)
        ):
            raise InputError(
                f"{file}: parameters holds {str(parameter)[:80]}; each needs a name and a shape: "
                "correct it"
            )
    tied = checked("tied", dict) or {}
    if not all(isinstance(name, str) for name in tied.values()):
        raise InputError(
            f"{file}: tied must give the name of a parameter for each alias; correct it"
        )
    kind, sketch = checked("kind", str), checked("sketch", dict)
    if kind is not None and kind not in KINDS:
        raise InputError(f"{file}: unknown kind {kind!r}; use one of {', '.join(KINDS)}")
    if sketch is not None and not all(
        isinstance(sketch.get(key), int) for key in ("width", "seed")
    ):
        raise InputError(f"{file}: sketch is {sketch!r}; it needs a width and a seed: correct it")
    return RunInfo(
        optimizer=checked("optimizer", str),
        settings=checked("settings", dict) or {},
        clock=clock,
        likelihood=likelihood,
        sigma2=None if sigma2 is None else float(sigma2),
        batch_size=batch_size,
        parameters=parameters,
        tied=tied,
        probe_fingerprint=checked("probe_fingerprint", str),
        model=checked("model", str),
        schema_version=content["schema_version"],
        created=checked("created", str),
        notes=checked("notes", dict) or {},
        step_source="the number in each snapshot's name and metadata",
        kind=kind,
        sketch=sketch,
    )
