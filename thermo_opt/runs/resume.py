"""Taking up a recorded run again: what must be the same, what may differ and is noted, what is
removed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thermo_opt.errors import InputError, warn_only
from thermo_opt.runs.batches import BATCH_FOLDER, read_batches
from thermo_opt.runs.format import (
    RUN_FILE,
    SNAPSHOT_FOLDER,
    STEPS_FILE,
    remove_partial,
    snapshot_path,
    write_atomically,
)
from thermo_opt.runs.readers import own
from thermo_opt.runs.replicas import REPLICA_FOLDER, read_replicas
from thermo_opt.runs.steps_file import read_steps
from thermo_opt.runs.tensors import SafetensorsFile

_SAME = ("likelihood", "sigma2", "kind", "batch_size", "clock", "model", "optimizer", "sketch")
"""Entries of run.json on which every number of an audit depends: one record has one of each."""
_OFTEN_CHANGED = ("lr", "initial_lr")
"""Settings that schedulers change; another value is noted but worth no warning."""


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on: after ``step`` steps, ``wall`` seconds after its start."""

    step: int
    wall: float


def resume(
    path: Path, header: Mapping[str, Any], at: bool | int, tensors: Mapping[str, Tensor]
) -> Resumed:
    """Make a recorded run ready to be continued: what lies after the step is removed, other
    settings are noted.

    Args:
        path: the run's folder.
        header: what run.json would say of the present training; entries that are None were not
            given.
        at: True for its last logged step, or the number of a step.
        tensors: the model's present state, held against the snapshot of that step where there is
            one.

    Raises:
        InputError: another model, probe, optimizer, likelihood …, a step that isn't there, or
            another state. Nothing has been changed then.
    """
    run, content = own.read(path), own.read_run_file(path)
    if run.info.parameters != header["parameters"]:
        raise InputError(
            f"{path} records a model with other parameters than this one; record into a new folder"
        )
    if run.info.probe_fingerprint != header["probe_fingerprint"]:
        raise InputError(
            f"{path} was recorded with another probe; give the same one, or record into a new "
            f"folder"
        )
    for key in _SAME:
        if header.get(key) is not None and header[key] != content.get(key):
            name = {"model": "factory"}.get(key, key)
            raise InputError(
                f"{path} was recorded with {name} {content.get(key)!r}, not {header[key]!r}; give "
                f"the same, or record "
                "into a new folder"
            )
    logged = int(run.steps.index[-1]) if len(run.steps) else 0
    step = logged if at is True else int(at)
    if not 0 <= step <= logged:
        raise InputError(f"{path} has {logged} recorded steps; it can't be resumed at step {step}")
    if (recorded := snapshot_path(path, step)).exists():
        _check_same_state(recorded, step, tensors)
    remove_partial(path)  # from here on the folder is changed, so every refusal comes before
    remove_partial(path / SNAPSHOT_FOLDER)
    for snapshot in run.snapshots:
        if snapshot.step > step:
            snapshot.path.unlink()
    remove_partial(path / REPLICA_FOLDER)
    remove_partial(path / BATCH_FOLDER)
    beside = [(r.step, r.path) for r in read_replicas(path)]
    for taken, file in [*beside, *((b.step, b.path) for b in read_batches(path))]:
        if taken >= step:
            file.unlink()
    _note_session(path, content, header, step)
    return Resumed(step, _keep_rows(path / STEPS_FILE, step))


def _note_session(
    path: Path, content: dict[str, Any], header: Mapping[str, Any], step: int
) -> None:
    """Add when and with which settings the run went on to run.json."""
    sessions = content.get("sessions")
    sessions = sessions if isinstance(sessions, list) else []
    before = next(
        (s["settings"] for s in reversed(sessions) if isinstance(s, dict) and "settings" in s), None
    )
    before, now = before or content.get("settings") or {}, header["settings"]
    session = {"step": step, "created": header["created"]}
    if now != before:
        session["settings"] = now
        changed = sorted(
            key for key in now.keys() | before.keys() if now.get(key) != before.get(key)
        )
        notable = [key for key in changed if key not in _OFTEN_CHANGED]
        if notable:
            warn_only(
                f"{path} goes on with other optimizer settings ({', '.join(notable)}); run.json "
                f"notes them from step "
                f"{step}",
                stacklevel=4,
            )
    content["sessions"] = [*sessions, session]
    write_atomically(
        path / RUN_FILE, json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
    )


def _keep_rows(file: Path, step: int) -> float:
    """Drop the rows after ``step``; returns the wall clock's last reading. A last row that lacks
    only its line break (a full disk, a power cut) counts, as it does for readers."""
    if not file.exists():
        return 0.0
    kept = [
        line
        for line in file.read_bytes().split(b"\n")
        if (found := _step_of(line)) is not None and found <= step
    ]
    write_atomically(file, b"".join(line + b"\n" for line in kept))
    wall = read_steps(file).get("wall")
    return float(wall.dropna().iloc[-1]) if wall is not None and wall.notna().any() else 0.0


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # empty, or a row that a kill cut in the middle
        return None
    return int(step)


def _check_same_state(recorded: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
    file = SafetensorsFile(recorded)
    for name in (
        "probe/logits",
        "probe/sketch",
        *(name for name in tensors if name.startswith("params/")),
    ):
        if name not in tensors or name not in file.shapes:
            continue
        was, now = file.load(name).double(), tensors[name].double()
        scale = float(was.abs().max()) if was.numel() else 0.0
        if was.shape != now.shape or not torch.allclose(
            was, now, rtol=1e-3, atol=1e-3 * scale, equal_nan=True
        ):
            raise InputError(
                f"{recorded}: {name} at step {step} isn't the present model's; load the model's "
                f"state of that step "
                "before recording on, or give resume=<its step>"
            )
