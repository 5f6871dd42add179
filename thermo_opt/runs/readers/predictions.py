"""Reader of predictions that other tools saved: npz, npy, tables, safetensors, pickles or files of
torch.save, one file for all snapshots or one per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from thermo_opt.errors import InputError
from thermo_opt.runs.border import visible, whole
from thermo_opt.runs.predictions import PredictionContents, contents_of, predictions_run
from thermo_opt.runs.readers.named_arrays import (
    COUNTERS,
    EXAMPLES,
    OUTPUTS,
    SUFFIXES,
    TARGETS,
    WEIGHTS,
    arrays_of,
    evidence,
)
from thermo_opt.runs.readers.steps import numbers_in
from thermo_opt.runs.run import Run

_PER_EXAMPLE = (TARGETS, WEIGHTS, EXAMPLES)
_LOOKED_AT = 16
"""Files of a folder whose names and shapes are looked at to recognise it."""
_LOGS = (".csv", ".jsonl")
"""Kinds of files that trainings leave beside anything."""


def recognise(folder: Path) -> bool:
    """Whether most of a folder's files hold arrays that are named or formed as predictions are."""
    if (folder / "run.json").exists():
        return False
    files = _files(folder)
    step = max(1, len(files) // _LOOKED_AT)
    found = [(evidence(file), file) for file in files[::step]]
    named = sum(kind == "named" for kind, _ in found)
    formed = sum(kind == "form" for kind, _ in found)
    other = sum(kind is None and file.suffix not in _LOGS for kind, file in found)
    return named >= max(1, other) or (not other and formed + named > 0)


def is_one(file: Path) -> bool:
    """Whether a file holds arrays that are named or formed as predictions are."""
    return file.suffix in SUFFIXES and evidence(file) in ("named", "form")


def read(folder: Path, key: str | None = None, only: Path | None = None) -> Run:
    """The run in a folder of predictions, or in ``only`` one file of it with what lies beside.

    Raises:
        InputError: Naming the file, when arrays are missing, damaged or don't fit each other.
    """
    files = [file for file in _files(folder) if file.stem != "probe"]
    kinds = {file: evidence(file) for file in files}
    holding = [file for file in files if kinds[file] in ("named", "form")]
    if only is not None:
        holding = [only]
    if not holding:
        raise InputError(f"{folder}: no file holds an array named {', '.join(OUTPUTS)}")
    first, called = arrays_of(holding[0])
    shared = (TARGETS, WEIGHTS, *(COUNTERS if len(holding) == 1 else ()))
    beside = {
        name: array
        for file in files
        if kinds[file] == "beside"
        for name, array in arrays_of(file)[0].items()
        if name in shared
    }
    if not (output := next((name for name in OUTPUTS if name in first), None)):
        names = ", ".join(map(repr, list(first)[:6])) or "none at all"
        raise InputError(
            f"{holding[0]} has the arrays {names}: call its predictions logits, probabilities, "
            "log_probabilities or mean, and the examples' classes labels"
        )
    first = {**beside, **first}
    pairs: list[tuple[int, PredictionContents]]
    if len(holding) == 1:
        unit, steps, first = _of_one(holding[0], first, output)
        series = first[output]
        pairs = [(step, contents_of(array)) for step, array in zip(steps, series, strict=True)]
    else:
        unit, pairs = _of_many(holding, first, output)
    kind = OUTPUTS[output]
    run = predictions_run(
        pairs,
        first.get(TARGETS),
        path=folder if only is None else only,
        name=folder.resolve().name if only is None else only.stem,
        weights=first.get(WEIGHTS),
        likelihood="gaussian" if kind == "mean" else None,
        kind=None if kind == "mean" else kind,
        step_unit=unit,
        step_source="the files of predictions",
    )
    if output == "predictions":
        alone = len(first) == 1 or called == holding[0].stem
        what = "the one array in each file" if alone else f"what its files call {called}"
        run.remarks.append(f"its predictions are {what}")
    if unused := sorted(set(first) - {output, *_PER_EXAMPLE, *COUNTERS}):
        run.remarks.append(f"arrays that nothing uses: {', '.join(unused[:6])}")
    return run


def _of_one(
    file: Path, arrays: dict[str, Any], output: str
) -> tuple[str, list[int], dict[str, Any]]:
    """The unit and the steps of a file that holds all snapshots, and its arrays: predictions
    (snapshots, examples, ...), or a table with a row for each snapshot and example."""
    counter = next((key for key in COUNTERS if key in arrays), None)
    if counter is not None:
        numbers = np.asarray(arrays[counter]).reshape(-1)
        if len(numbers) == len(arrays[output]) and len(set(numbers.tolist())) < len(numbers):
            arrays = _unfolded(file, arrays, counter)
    series = arrays[output]
    unit = "snapshot" if counter is None else counter
    steps = range(len(series)) if counter is None else np.asarray(arrays[counter]).reshape(-1)
    if len(steps) != len(series):
        raise InputError(f"{file}: {len(steps)} steps for {len(series)} predictions")
    if wrong := [step for step in steps if whole(float(step)) is None]:
        raise InputError(f"{file}: {counter} {wrong[0]} isn't a whole number from 0 on")
    for key in _PER_EXAMPLE:
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
    return unit, [int(step) for step in steps], arrays


def _unfolded(file: Path, arrays: dict[str, Any], counter: str) -> dict[str, Any]:
    """The arrays of a table of snapshots and examples, as (snapshots, examples, ...)."""
    steps = np.asarray(arrays[counter]).reshape(-1)
    named = np.asarray(arrays[EXAMPLES]) if EXAMPLES in arrays else None
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
    files: Sequence[Path], first: dict[str, Any], output: str
) -> tuple[str, list[tuple[int, PredictionContents]]]:
    """The unit and the (step, predictions) of files that hold one snapshot each, of the same
    examples. Each is read here to be checked, and again when its predictions are asked for: two
    snapshots are in memory at a time."""
    counter = next((key for key in COUNTERS if key in first), None)
    steps: list[int | None] = []
    shapes: list[tuple[int, ...]] = []
    for file in files:
        own, _ = arrays_of(file)
        if output not in own:
            raise InputError(f"{file} has no {output!r}, unlike {files[0].name}")
        for key in _PER_EXAMPLE:
            if key in own and key in first and not np.array_equal(own[key], first[key]):
                raise InputError(
                    f"{file}: its {key!r} aren't those of {files[0].name}: give the same examples "
                    "in the same order at each snapshot"
                )
        steps.append(_count(own.get(counter or "")))
        shapes.append(tuple(own[output].shape))
    if counter is not None and None not in steps and len(set(steps)) == len(steps):
        unit = counter
    else:
        found = numbers_in([file.stem for file in files])
        if None in found.numbers:
            raise InputError(
                f"{files[found.numbers.index(None)]}: its name has no number; name each file by "
                "its step or epoch, as epoch_3"
            )
        steps, unit = found.numbers, found.unit or "snapshot"
    read_again = lru_cache(maxsize=2)(lambda file: arrays_of(file)[0][output])
    pairs = [
        (step or 0, PredictionContents(shape, partial(read_again, file)))
        for step, shape, file in zip(steps, shapes, files, strict=True)
    ]
    return unit, sorted(pairs, key=lambda pair: pair[0])


def _count(value: Any) -> int | None:
    """The count that an array holds, if all its values are one."""
    values = np.unique(np.asarray(value)) if value is not None else np.empty(0)
    return whole(values[0].item()) if len(values) == 1 else None


def _files(folder: Path) -> list[Path]:
    return sorted(f for f in visible(folder.iterdir()) if f.suffix in SUFFIXES and f.is_file())
