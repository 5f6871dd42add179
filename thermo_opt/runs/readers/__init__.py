"""Readers: which tool wrote a folder, told from its files, and the run in it."""

from __future__ import annotations

import os
from pathlib import Path

from thermo_opt.errors import InputError
from thermo_opt.runs.format import RUN_FILE, read_own
from thermo_opt.runs.run import Run

FORMATS = ("thermo-opt", "huggingface", "lightning", "torch", "safetensors")


def load_run(path: str | os.PathLike[str], format: str | None = None) -> Run:
    """Open a recorded run, whichever tool wrote it; tensors are read only when asked for.

    Recognised from the files: our own layout (``run.json``). ``format`` overrides. Raises `InputError` naming the
    folder when it is missing, empty or of no known layout.
    """
    folder = Path(path)
    if not folder.exists():
        raise InputError(f"{folder}: no such folder; give the folder of a recorded run")
    if not folder.is_dir():
        raise InputError(f"{folder} is a file; give the folder of a recorded run")
    if (folder / RUN_FILE).exists():
        return read_own(folder)
    raise InputError(f"{folder} holds no recorded run")
