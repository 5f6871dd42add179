"""Reader of predictions that other tools saved: npz, npy, parquet, safetensors or files of
torch.save, one file for all snapshots or one per epoch."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from thermo_opt.errors import InputError
from thermo_opt.runs.border import regular, visible, whole
from thermo_opt.runs.predictions import contents_of, predictions_run
from thermo_opt.runs.probe_files import read_arrays
from thermo_opt.runs.readers.steps import numbers_in
from thermo_opt.runs.run import Run
from thermo_opt.runs.tensors import opened
from thermo_opt.runs.torch_file import TorchFile

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
_TARGETS = ("targets", "labels", "label", "y_true", "y")
_WEIGHTS = ("weights", "sample_weight", "sample_weights", "attention_mask")
_EXAMPLES = ("example", "examples", "example_id", "example_ids", "ids", "id", "index", "indices")
"""Names of the numbers that say which example a row is."""
_STEPS = {
    **dict.fromkeys(("steps", "step", "global_step"), "step"),
    **dict.fromkeys(("epochs", "epoch"), "epoch"),
}
_SUFFIXES = (".npz", ".npy", ".parquet", ".safetensors", ".pt", ".pth")
_NUMBERED = re.compile(r"[-_. ]*(?:step|epoch|iter)?[-_. ]*\d+$")


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
    numbered = {f for f in files if f.suffix == ".npy" and f.stem not in OUTPUTS and _names(f)}
    parts = _npy([file for file in files if file not in numbered])
    named = [(f, {next(iter(_names(f))): _npy([f])[f.stem]}) for f in files if f in numbered]
    named += [(f, _arrays(f)) for f in files if f.suffix != ".npy" and f.stem != "probe"]
    named.append((folder, parts))
    holding = [(file, arrays) for file, arrays in named if set(arrays) & set(OUTPUTS)]
    shared = _TARGETS + _WEIGHTS + (tuple(_STEPS) if len(holding) == 1 else ())
    beside = {
        name: array
        for _, arrays in named
        if not set(arrays) & set(OUTPUTS)
        for name, array in arrays.items()
        if name in shared
    }
    return _run(folder, sorted((file, {**beside, **own}) for file, own in holding))


def _run(folder: Path, holding: Sequence[tuple[Path, dict[str, Any]]]) -> Run:
    if not holding:
        raise InputError(f"{folder}: no file holds an array named {', '.join(OUTPUTS)}")
    first, arrays = holding[0]
    output = next(key for key in OUTPUTS if key in arrays)
    if len(holding) == 1:
        unit, pairs, arrays = _of_one(first, arrays, output)
    else:
        unit, pairs = _of_many(holding, output)
    targets = next((arrays[key] for key in _TARGETS if key in arrays), None)
    weights = next((arrays[key] for key in _WEIGHTS if key in arrays), None)
    kind = OUTPUTS[output]
    run = predictions_run(
        [(step, contents_of(array)) for step, array in pairs],
        targets,
        path=folder,
        name=folder.resolve().name,
        weights=weights,
        likelihood="gaussian" if kind == "mean" else None,
        kind=None if kind == "mean" else kind,
        step_unit=unit,
        step_source="the files of predictions",
    )
    known = {output, *_TARGETS, *_WEIGHTS, *_EXAMPLES, *_STEPS}
    if unused := sorted(set(arrays) - known):
        run.remarks.append(f"arrays that nothing uses: {', '.join(unused[:6])}")
    return run


def _of_one(
    file: Path, arrays: dict[str, Any], output: str
) -> tuple[str, list[tuple[int, Any]], dict[str, Any]]:
    """The unit, the (step, predictions) and the other arrays of a file that holds all snapshots:
    an array (snapshots, examples, ...), or a table with a row for each snapshot and example."""
    counter = next((key for key in _STEPS if key in arrays), None)
    if counter is not None:
        numbers = np.asarray(arrays[counter]).reshape(-1)
        if len(numbers) == len(arrays[output]) and len(set(numbers.tolist())) < len(numbers):
            arrays = _unfolded(file, arrays, counter)
    series = arrays[output]
    unit = "snapshot" if counter is None else _STEPS[counter]
    steps = range(len(series)) if counter is None else np.asarray(arrays[counter]).reshape(-1)
    if len(steps) != len(series):
        raise InputError(f"{file}: {len(steps)} steps for {len(series)} predictions")
    for key in (*_TARGETS, *_WEIGHTS, *_EXAMPLES):
        rows = np.asarray(arrays[key]) if key in arrays else None
        if rows is None or rows.shape != series.shape[:-1] or rows.shape == series.shape[1:]:
            continue
        if rows.ndim == 1 or not (rows == rows[0]).all():  # of one snapshot, or of other examples
            raise InputError(
                f"{file}: {output!r} has shape {tuple(series.shape)} and {key!r} {rows.shape}: "
                "give predictions (snapshots, examples, ...) of two snapshots or more, and the "
                "same examples in the same order at each"
            )
        arrays = {**arrays, key: rows[0]}
    return unit, list(zip((int(s) for s in steps), series, strict=True)), arrays


def _unfolded(file: Path, arrays: dict[str, Any], counter: str) -> dict[str, Any]:
    """The arrays of a table of snapshots and examples, as (snapshots, examples, ...)."""
    steps = np.asarray(arrays[counter]).reshape(-1)
    named = next((np.asarray(arrays[key]) for key in _EXAMPLES if key in arrays), None)
    order = np.argsort(steps, kind="stable") if named is None else np.lexsort((named, steps))
    found, counts = np.unique(steps, return_counts=True)
    if len(set(counts.tolist())) > 1:
        raise InputError(
            f"{file}: {counter} {found[0]} has {counts[0]} rows, and another has "
            f"{counts[counts != counts[0]][0]}: give the same examples at each"
        )
    shape = (len(found), int(counts[0]))
    unfolded = {
        key: np.asarray(array)[order].reshape(*shape, *np.shape(array)[1:])
        for key, array in arrays.items()
        if key != counter and np.shape(array)[:1] == steps.shape
    }
    return {**unfolded, counter: found}


def _of_many(
    holding: Sequence[tuple[Path, dict[str, Any]]], output: str
) -> tuple[str, list[tuple[int, Any]]]:
    """The unit and the (step, predictions) of files that hold one snapshot each, of the same
    examples."""
    first, arrays = holding[0]
    for file, own in holding[1:]:
        if output not in own:
            raise InputError(f"{file} has no {output!r}, unlike {first.name}")
        for key in (*_TARGETS, *_WEIGHTS, *_EXAMPLES):
            if key in own and key in arrays and not np.array_equal(own[key], arrays[key]):
                raise InputError(
                    f"{file}: its {key!r} aren't those of {first.name}: give the same examples in "
                    "the same order at each snapshot"
                )
    counter = next((key for key in _STEPS if key in arrays), None)
    steps: list[int | None] = [_whole(own.get(counter or "")) for _, own in holding]
    if counter is not None and None not in steps and len(set(steps)) == len(steps):
        unit = _STEPS[counter]
    else:
        found = numbers_in([file.stem for file, _ in holding])
        if None in found.numbers:
            raise InputError(
                f"{holding[found.numbers.index(None)][0]}: its name has no number; name each file "
                "by its step or epoch, as epoch_3"
            )
        steps, unit = found.numbers, found.unit or "snapshot"
    pairs = [(step or 0, own[output]) for step, (_, own) in zip(steps, holding, strict=True)]
    return unit, sorted(pairs, key=lambda pair: pair[0])


def _whole(value: Any) -> int | None:
    """A count that an array of one value holds."""
    if value is None or np.size(value) != 1:
        return None
    return whole(np.asarray(value).item())


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in visible(folder.iterdir()) if f.suffix in _SUFFIXES and f.is_file())


def _arrays(file: Path) -> dict[str, Any]:
    """A file's arrays, with its plain numbers that count steps."""
    arrays = read_arrays(file)
    if file.suffix in (".pt", ".pth"):
        content = opened(file, TorchFile).content
        counts = content if isinstance(content, Mapping) else {}
        arrays |= {k: np.asarray(n) for k in _STEPS if (n := whole(counts.get(k))) is not None}
    return arrays


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
        bare = _NUMBERED.sub("", file.stem)
        return {bare} if bare in OUTPUTS else {file.stem} & set(OUTPUTS)
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
