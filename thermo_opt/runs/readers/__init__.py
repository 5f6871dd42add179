"""Readers: which tool wrote a folder, told from its files, and the run in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from thermo_opt import arguments
from thermo_opt.errors import InputError
from thermo_opt.runs import format as own
from thermo_opt.runs.readers import huggingface, lightning, safetensors_folder, torch_folder
from thermo_opt.runs.run import Run

_READERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path], Run]]] = {
    "thermo-opt": (own.recognise, own.read_own),
    "huggingface": (huggingface.recognise, huggingface.read),
    "lightning": (lightning.recognise, lightning.read),
    "torch": (torch_folder.recognise, torch_folder.read),
    "safetensors": (safetensors_folder.recognise, safetensors_folder.read),
}

FORMATS = tuple(_READERS)
"""Names of the known layouts, for ``format=``."""


def load_run(path: str | os.PathLike[str], format: str | None = None) -> Run:
    """Open a recorded run, whichever tool wrote it; tensors are read only when asked for.

    Recognised from the files: our own layout (``run.json``), Hugging Face `Trainer` output
    (``checkpoint-*/``), Lightning (``*.ckpt``), a folder of torch state dicts (``*.pt``,
    ``*.pth``), a folder of safetensors.

    Args:
        path: folder of the run.
        format: one of `FORMATS`, instead of what the files suggest.

    Raises:
        InputError: naming the folder or file when it is missing, empty, damaged, or of no known or
            of more than one layout.
    """
    folder = arguments.path("path", path)
    try:
        if not folder.exists():
            raise InputError(f"{folder}: no such folder; give the folder of a recorded run")
        if not folder.is_dir():
            raise InputError(f"{folder} is a file; give the folder of a recorded run")
        if format is not None:
            if format not in _READERS:
                raise InputError(f"unknown format {format!r}; use one of {', '.join(FORMATS)}")
            return _READERS[format][1](folder)
        if not any(folder.iterdir()):
            raise InputError(f"{folder} is empty; give the folder of a recorded run")
        found = [name for name, (recognise, _) in _READERS.items() if recognise(folder)]
        if not found:
            raise InputError(
                f"{folder} holds no recorded run of a known layout (run.json, checkpoint-*/, "
                "*.ckpt, *.pt, "
                "*.safetensors); "
                "give the folder that directly holds one"
            )
        if len(found) > 1 and found[0] not in ("thermo-opt", "huggingface"):
            raise InputError(
                f"{folder} could be read as {' or '.join(found)}; choose with --format"
            )
        return _READERS[found[0]][1](folder)
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} can't be read ({error.strerror or error}); check its "
            "permissions"
        ) from None
