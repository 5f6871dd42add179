"""Readers: which tool wrote a folder, told from its files, and the run in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from thermo_opt import arguments
from thermo_opt.errors import InputError
from thermo_opt.runs import remote
from thermo_opt.runs.border import visible
from thermo_opt.runs.readers import (
    folders,
    huggingface,
    lightning,
    own,
    predictions,
    safetensors_folder,
    torch_folder,
)
from thermo_opt.runs.readers.foreign import what_is_in
from thermo_opt.runs.run import Likelihood, Run

_READERS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, str | None], Run]]] = {
    "thermo-opt": (own.recognise, own.read),
    "huggingface": (huggingface.recognise, huggingface.read),
    "lightning": (lightning.recognise, lightning.read),
    "predictions": (predictions.recognise, predictions.read),
    "torch": (torch_folder.recognise, torch_folder.read),
    "safetensors": (safetensors_folder.recognise, safetensors_folder.read),
    "folders": (folders.recognise, folders.read),
}
_CERTAIN = ("thermo-opt", "huggingface", "lightning", "predictions")
"""Layouts that no other tool writes: other files beside them don't matter."""
_BELOW = 4
"""How many folders deep a run is looked for below the folder that was given."""
_MOST = 500

FORMATS = tuple(_READERS)
"""Names of the known layouts, for ``format=``."""


def load_run(
    path: str | os.PathLike[str],
    format: str | None = None,
    *,
    key: str | None = None,
    likelihood: Likelihood | None = None,
    sigma2: float | None = None,
) -> Run:
    """Open a recorded run, whichever tool wrote it; tensors are read only when asked for, and
    nothing in it is executed.

    Args:
        path: the run's folder, one with a single run below it, or a file of predictions. Recognised
            from its files: our own layout (``run.json``), Hugging Face `Trainer` output
            (``checkpoint-*/``), Lightning (``*.ckpt``), files of `torch.save` (``*.pt``, ``*.pth``,
            ``*.pth.tar``, …), safetensors, or one folder per checkpoint (Accelerate, FSDP, DCP, …).
            A URL that fsspec knows (``s3://bucket/run``) is copied to this machine
            (`thermo_opt.runs.remote`).
        format: one of `FORMATS`, where the files don't tell.
        key: dotted key of the state dict to read, where a checkpoint holds several models'.
        likelihood: output distribution of the model, where the files don't say, or say otherwise.
        sigma2: variance σ² of a Gaussian likelihood.

    Returns:
        The run; ``run.remarks`` says what was taken for granted or left out.

    Raises:
        InputError: naming the folder or file, when it is missing, empty, damaged, of no known or of
            more than one layout, or holds several runs.
    """
    folder = arguments.path("path", path)
    if remote.is_remote(folder):
        folder = remote.local_copy(folder)
    try:
        if not folder.exists():
            raise InputError(f"{folder}: no such folder; give the folder of a recorded run")
        if not folder.is_dir() and not (
            format in (None, "predictions") and predictions.is_one(folder)
        ):
            raise InputError(
                f"{folder} is a file, and not one of predictions; give the folder of a recorded run"
            )
        if not folder.is_dir():
            run = predictions.read(folder.parent, key, only=folder)
        elif format is not None:
            if format not in _READERS:
                raise InputError(f"unknown format {format!r}; use one of {', '.join(FORMATS)}")
            run = _READERS[format][1](folder, key)
        elif not any(folder.iterdir()):
            raise InputError(f"{folder} is empty; give the folder of a recorded run")
        else:
            run = (
                _READERS[_format(folder)][1](folder, key)
                if _formats(folder)
                else _below(folder, key)
            )
    except OSError as error:
        raise InputError(
            f"{error.filename or folder} can't be read ({error.strerror or error}); check its "
            "permissions"
        ) from None
    return run.assuming(likelihood, sigma2)


def _formats(folder: Path) -> list[str]:
    """The layouts that a folder's files may be of, the surest first."""
    return [name for name, (recognise, _) in _READERS.items() if recognise(folder)]


def _format(folder: Path) -> str:
    found = _formats(folder)
    if len(found) > 1 and found[0] not in _CERTAIN:
        flat = [name for name in found if name != "folders"]
        if len(flat) > 1:
            raise InputError(
                f"{folder} could be read as {' or '.join(found)}; choose with --format"
            )
        if flat:
            return flat[0]
    return found[0]


def _below(folder: Path, key: str | None) -> Run:
    """The one run in the folders below; refused where there are several, or none."""
    level, found = [folder], []
    for _ in range(_BELOW):
        level = [
            below for place in level for below in sorted(visible(place.iterdir())) if below.is_dir()
        ][:_MOST]
        found = [place for place in level if _formats(place)]
        if found:
            break
    if not found:
        raise InputError(f"{folder}: {what_is_in(folder)}")
    if len(found) > 1:
        names = ", ".join(str(place.relative_to(folder)) for place in found[:4])
        raise InputError(
            f"{folder} holds several runs ({names}{', …' if len(found) > 4 else ''}): give one of "
            "them, or all of them to "
            "thermo-opt compare"
        )
    return _READERS[_format(found[0])][1](found[0], key)
