"""Reader of predictions that other tools saved: npz, npy, parquet, safetensors or files of
torch.save, one file for all snapshots or one per epoch."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thermo_opt.errors import InputError
from thermo_opt.runs.border import regular, visible
from thermo_opt.runs.predictions import contents_of, predictions_run
from thermo_opt.runs.probe_files import read_arrays
from thermo_opt.runs.readers.steps import numbers_in
from thermo_opt.runs.run import Run

OUTPUTS: dict[str, str | None] = {
    "logits": None,
    "log_probabilities": "log-probabilities",
    "log_probs": "log-probabilities",
    "logprobs": "log-probabilities",
    "probabilities": "probabilities",
    "probs": "probabilities",
    "mean": "mean",
    "means": "mean",
}
"""Names that predictions have, and what they then are."""
_TARGETS = ("targets", "labels", "y_true", "y")
_STEPS = {"steps": "step", "step": "step", "epochs": "epoch", "epoch": "epoch"}
_SUFFIXES = (".npz", ".npy", ".parquet", ".safetensors", ".pt", ".pth")


def recognise(folder: Path) -> bool:
    """Whether a folder's first file of a known suffix holds an array named as predictions are."""
    if (folder / "run.json").exists():
        return False
    files = _files(folder)
    return bool(files) and any(_names(file) & set(OUTPUTS) for file in files[:4])


def read(folder: Path, key: str | None = None) -> Run:
    """The run in a folder of predictions.

    Raises:
        InputError: Naming the file, when arrays are missing, damaged or don't fit each other.
    """
    files = _files(folder)
    parts = _npy(files) if any(f.suffix == ".npy" for f in files) else None
    if parts is not None:
        return _run(folder, [(folder, parts)])
    named = [(file, read_arrays(file)) for file in files if file.stem != "probe"]
    holding = [(file, arrays) for file, arrays in named if set(arrays) & set(OUTPUTS)]
    beside = [arrays for file, arrays in named if not set(arrays) & set(OUTPUTS)]
    for arrays in beside:
        for name in _TARGETS:
            if name in arrays:
                holding = [(file, {name: arrays[name], **own}) for file, own in holding]
    return _run(folder, holding)


def _run(folder: Path, holding: Sequence[tuple[Path, dict[str, Any]]]) -> Run:
    name = folder.resolve().name
    if not holding:
        raise InputError(f"{folder}: no file holds an array named {', '.join(OUTPUTS)}")
    arrays = holding[0][1]
    output = next(key for key in OUTPUTS if key in arrays)
    targets = next((arrays[key] for key in _TARGETS if key in arrays), None)
    if len(holding) == 1:
        series = arrays[output]
        counter = next((key for key in _STEPS if key in arrays), None)
        unit = "snapshot" if counter is None else _STEPS[counter]
        steps = range(len(series)) if counter is None else [int(s) for s in arrays[counter]]
        if len(steps) != len(series):
            raise InputError(f"{holding[0][0]}: {len(steps)} steps for {len(series)} predictions")
        pairs = list(zip(steps, series, strict=True))
    else:
        found = numbers_in([file.stem for file, _ in holding])
        if None in found.numbers:
            raise InputError(
                f"{holding[found.numbers.index(None)][0]}: its name has no number; name each file "
                "by its step or epoch, as epoch_3"
            )
        unit = found.unit or "snapshot"
        pairs = []
        for (file, own), number in zip(holding, found.numbers, strict=True):
            if output not in own:
                raise InputError(f"{file} has no {output!r}, unlike {holding[0][0].name}")
            pairs.append((number or 0, own[output]))
        pairs.sort(key=lambda pair: pair[0])
    kind = OUTPUTS[output]
    return predictions_run(
        [(step, contents_of(array)) for step, array in pairs],
        targets,
        path=folder,
        name=name,
        likelihood="gaussian" if kind == "mean" else None,
        kind=None if kind == "mean" else kind,
        step_unit=unit,
        step_source="the files of predictions",
    )


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in visible(folder.iterdir()) if f.suffix in _SUFFIXES and f.is_file())


def _npy(files: Sequence[Path]) -> dict[str, Any]:
    arrays = {}
    for file in files:
        if file.suffix == ".npy":
            regular(file)
            try:
                arrays[file.stem] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise InputError(f"{file} can't be read as npy without pickles ({error})") from None
    return arrays


def _names(file: Path) -> set[str]:
    """Names of the arrays in a file, as far as they can be told without reading it."""
    if file.suffix == ".npy":
        return {file.stem}
    try:
        if file.suffix == ".npz":
            with zipfile.ZipFile(file) as archive:
                return {Path(name).stem for name in archive.namelist()}
        if file.suffix in (".pt", ".pth"):
            with zipfile.ZipFile(file) as archive:
                pickle = next(name for name in archive.namelist() if name.endswith("data.pkl"))
                head = archive.open(pickle).read(4096)
            return {name for name in OUTPUTS if _short(name) in head}
        if file.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(file), "np") as opened:
                return set(opened.keys())
        import pyarrow.parquet

        return set(pyarrow.parquet.read_schema(file).names)
    except Exception:  # damaged, or of another kind: for the other readers to say
        return set()


def _short(name: str) -> bytes:
    """A text in a pickle of protocol 2: its length in four bytes, then itself."""
    return b"X" + len(name).to_bytes(4, "little") + name.encode()
