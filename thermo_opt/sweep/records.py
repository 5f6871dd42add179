"""A sweep's finished runs on disk: what they were trained as, and whether they are still whole.

A run that is finished gets a seal, `SEAL`: the facts of its trial, how many steps it took, and size
and SHA-256 of every file of its record. A run whose files are missing, cut short, changed or from
elsewhere is refused instead of standing for its trial. Runs from before seals existed are checked
for what their record alone can show.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from thermo_opt.arguments import jsonable
from thermo_opt.errors import InputError
from thermo_opt.runs import load_run
from thermo_opt.runs.format import RUN_FILE, STEPS_FILE, write_atomically
from thermo_opt.runs.readers.own import read_run_file
from thermo_opt.sweep.config import Trial

try:
    import fcntl
except ImportError:  # no such locks on Windows: two sweeps at once are not kept apart there
    fcntl = None  # type: ignore[assignment]

UNFINISHED = ".unfinished"
"""Folder of the runs being trained: a run's own folder exists only when the run is whole."""
SEAL, RESULT, LOCK = "sweep.json", "result.json", ".lock"
"""Of a run: its seal, and what a caller of `train` computed of it. Of an output folder: its
lock."""
_UNSEALED = (SEAL, RESULT)


@contextlib.contextmanager
def exclusive(output: Path) -> Iterator[None]:
    """The output folder for this process alone, made where it doesn't exist.

    Where another sweep holds it, warns and waits until that one has ended; a killed one holds
    nothing. Raises InputError when the folder can't be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        file = open(output / LOCK, "a")  # noqa: SIM115 (closed below, which releases the lock)
    except OSError as error:
        raise InputError(
            f"output {output} can't be made ({error.strerror}): choose a folder you can write to"
        ) from None
    with file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                warnings.warn(
                    f"another sweep is writing to {output}: waiting until it has ended",
                    stacklevel=3,
                )
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def finished(trial: Trial, output: Path) -> bool:
    """Whether the trial's run is recorded already, whole.

    Raises InputError when something else lies in its place: no run, another trial's, or a record
    that is damaged or incomplete. Cost: one reading of the run.
    """
    folder = output / trial.name
    if not (folder / RUN_FILE).is_file():
        if folder.exists():
            raise InputError(
                f"{folder} exists and holds no run of this sweep: move it, or choose another output"
            )
        return False
    content = read_run_file(folder)
    notes = content.get("notes")
    was, now = notes.get("sweep") if isinstance(notes, dict) else None, trial.facts()
    now = json.loads(json.dumps(now))  # as it reads from a file
    if was != now:
        known = was if isinstance(was, dict) else {}
        changed = next(
            (key for key in {**now, **known} if known.get(key) != now.get(key)), "settings"
        )
        raise InputError(
            f"{folder} was trained with another {changed} than the sweep now says: choose another "
            "output, or remove it"
        )
    if (folder / SEAL).is_file():
        _check_seal(folder, now)
    else:
        _check_unsealed(trial, folder)
    return True


def seal(trial: Trial, folder: Path, steps_done: int) -> None:
    """Write the seal of a run that is whole."""
    files = {
        name: [file.stat().st_size, _digest(file)] for name, file in sorted(_files(folder).items())
    }
    content = {"trial": trial.facts(), "steps_done": steps_done, "files": files}
    write_json(folder / SEAL, content)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write strict JSON by rename, null for what isn't finite."""
    text = json.dumps(jsonable(content), indent=1, allow_nan=False)
    write_atomically(path, text.encode() + b"\n")


def read_result(folder: Path) -> dict[str, Any]:
    """What `train`'s ``result`` gave for a finished run; NaN for what couldn't be known."""
    found = _read_json(folder / RESULT)
    return {key: math.nan if value is None else value for key, value in found.items()}


def add_to_result(folder: Path, what: dict[str, Any]) -> None:
    """Add values to a finished run's result, or replace them; all at once, whenever the process may
    be killed."""
    write_json(folder / RESULT, _read_json(folder / RESULT) | what)


def _check_seal(folder: Path, facts: dict[str, Any]) -> None:
    content = _read_json(folder / SEAL)
    sealed, found = content.get("files"), _files(folder)
    if content.get("trial") != facts or not isinstance(sealed, dict):
        raise _damaged(folder, f"{SEAL} belongs to another run")
    for name in sorted({*sealed, *found}):
        if name not in found:
            raise _damaged(folder, f"{name} is missing")
        if name not in sealed:
            raise _damaged(folder, f"{name} does not belong to it")
        if [found[name].stat().st_size, _digest(found[name])] != sealed[name]:
            raise _damaged(folder, f"{name} is not what was recorded")


def _check_unsealed(trial: Trial, folder: Path) -> None:
    """What a record without a seal shows: every step logged once from the first, a snapshot at each
    step that was due and of the last one, and the probe that the run names."""
    run = load_run(folder)
    steps, snapshots = [int(step) for step in run.steps.index], [s.step for s in run.snapshots]
    done, every = len(steps), trial.training.every
    if steps != list(range(1, done + 1)) or done > trial.training.steps:
        raise _damaged(folder, f"{STEPS_FILE} does not hold the steps from the first on")
    if snapshots != sorted({*range(0, done + 1, every), done}):
        raise _damaged(folder, "its snapshots are not those of its steps")
    if run.probe is None or run.probe.fingerprint != run.info.probe_fingerprint:
        raise _damaged(folder, "its probe is missing or another run's")


def _damaged(folder: Path, what: str) -> InputError:
    return InputError(f"{folder} is damaged: {what}; remove the folder to train the run again")


def _files(folder: Path) -> dict[str, Path]:
    """The files of a run's record by relative name; hidden ones and what is added later left
    out."""
    files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*")}
    return {
        name: file
        for name, file in files.items()
        if file.is_file() and name not in _UNSEALED and not file.name.startswith(".")
    }


def _digest(file: Path) -> str:
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{path} can't be read ({error}): remove the folder to train the run again"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object: remove the folder to train the run again")
    return content


def is_here(folder: Path) -> bool:
    """Whether a sealed run lies in the folder; unlike `finished`, reads nothing of it."""
    return os.path.isfile(folder / SEAL)
