"""Training curves that other tools leave beside their checkpoints: CSV, lines of JSON,
TensorBoard's event files.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from thermo_opt.errors import InputError, first_line
from thermo_opt.runs.border import regular, visible, whole
from thermo_opt.runs.readers.tables import csv_table
from thermo_opt.runs.steps_file import json_lines

NUMERIC = ("loss", "lr", "wall", "examples", "tokens")
"""Columns that an audit uses."""
_LIMIT = 1 << 29
"""Bytes of a log that is read."""
_CSV = (
    "metrics.csv",
    "log.csv",
    "train_log.csv",
    "training_log.csv",
    "history.csv",
    "progress.csv",
    "results.csv",
)
_LINES = (
    "metrics.jsonl",
    "log.jsonl",
    "train_log.jsonl",
    "training_log.jsonl",
    "history.jsonl",
    "log.txt",
    "metrics.json",
    "wandb-history.jsonl",
)
_EXPORTS = "wandb_export*.csv"
"""What W&B's pages and ``run.history().to_csv`` give."""
_LOSS = (
    "loss",
    "train_loss",
    "train_loss_step",
    "train/loss",
    "training_loss",
    "train/loss_step",
    "loss/train",
    "Loss/train",
    "total_loss",
)
_RATE = ("lr", "learning_rate", "train/lr", "train/learning_rate")
_STEP = ("step", "global_step", "_step", "Step", "iter", "iteration", "trainer/global_step")


def with_numbers(curve: pd.DataFrame, file: Path) -> pd.DataFrame:
    """A training curve with the columns an audit uses as float64; raises `InputError` naming
    ``file`` if one isn't numeric.
    """
    for column in (name for name in NUMERIC if name in curve):
        try:
            curve[column] = pd.to_numeric(curve[column]).astype("float64")
        except (ValueError, TypeError, OverflowError):
            raise InputError(
                f"{file}: {column!r} isn't a number on every line; correct or remove those lines"
            ) from None
    return curve


def find_curve(places: Iterable[Path], *, shift: int = 0) -> tuple[pd.DataFrame | None, str | None]:
    """The training curve in the first of ``places`` that has one, and a remark where a log was
    found but not read.

    ``shift`` is added to steps of CSV files: Lightning's logger counts from 0, `Run` counts steps
    done.
    """
    places = list(dict.fromkeys(places))
    for place in places:
        for name in _CSV:
            if (file := place / name).is_file():
                return _from_csv(file, shift), None
        for file in sorted(visible(place.glob(_EXPORTS))) if place.is_dir() else ():
            return _from_csv(file, 0), None
        for name in _LINES:
            if (file := place / name).is_file() and (curve := _from_lines(file)) is not None:
                return curve, None
    for place in places:
        events = sorted(visible(place.glob("*tfevents*"))) if place.is_dir() else []
        if events:
            return _from_events(events, shift)
    if any(next((place / "wandb").glob("*run-*"), None) for place in places):
        return None, (
            "a folder of Weights & Biases was found, whose curves only its own tools read: export "
            "them beside the checkpoints as wandb_export.csv (run.history().to_csv)"
        )
    return (
        None,
        "no log of the training was found beside the checkpoints: its losses and learning rates "
        "are unknown",
    )


def _from_csv(file: Path, shift: int) -> pd.DataFrame | None:
    if regular(file).st_size > _LIMIT:
        raise InputError(
            f"{file} has more than {_LIMIT:,} bytes; thin it out, or move it elsewhere"
        )
    table = csv_table(file, "restore it or move it elsewhere")
    column = next((name for name in _STEP if name in table), None)
    if column is None:
        if file.name == "metrics.csv":
            raise InputError(
                f"{file} isn't a table with a 'step' column; restore it or move it elsewhere"
            )
        return None
    rows = table[pd.notna(table[column])].copy()
    steps = [whole(value) for value in rows[column].tolist()]
    if any(step is None for step in steps):
        wrong = next(
            value for value, step in zip(rows[column].tolist(), steps, strict=True) if step is None
        )
        raise InputError(f"{file}: step {str(wrong)[:40]!r} isn't a whole number; restore the file")
    rows["step"] = np.array(steps, dtype=np.int64) + shift
    # the first value of each column: training and validation write separate rows
    return with_numbers(_usual_names(rows.groupby("step").first()), file)


def _from_lines(file: Path) -> pd.DataFrame | None:
    if regular(file).st_size > _LIMIT:
        raise InputError(
            f"{file} has more than {_LIMIT:,} bytes; thin it out, or move it elsewhere"
        )
    rows: dict[int, dict[str, Any]] = {}
    try:
        for row in json_lines(file):
            step = next(
                (number for name in _STEP if (number := whole(row.get(name))) is not None), None
            )
            if step is None:
                return None
            rows.setdefault(step, {}).update(
                {key: value for key, value in row.items() if not isinstance(value, dict | list)}
            )
    except InputError:
        return None  # some other log
    return with_numbers(_usual_names(table_of(rows)), file) if rows else None


def _from_events(files: Sequence[Path], shift: int) -> tuple[pd.DataFrame | None, str | None]:
    try:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    except ImportError:
        return None, (
            f"TensorBoard's event files were found ({files[0].name}), but reading them needs "
            "tensorboard: "
            "pip install 'thermo-opt[tensorboard]'"
        )
    rows: dict[int, dict[str, Any]] = {}
    for file in files:
        if regular(file).st_size > _LIMIT:
            return (
                None,
                f"TensorBoard's event file {file.name} has more than {_LIMIT:,} bytes and was not "
                "read",
            )
        try:
            for event in EventFileLoader(str(file)).Load():
                for value in event.summary.value:
                    number = _scalar(value)
                    if number is not None:
                        rows.setdefault(int(event.step) + shift, {}).setdefault(value.tag, number)
        except Exception as error:  # a damaged record ends in errors of several libraries
            return None, f"TensorBoard's event file {file.name} can't be read ({first_line(error)})"
    return with_numbers(_usual_names(table_of(rows)), files[0]) if rows else None, None


def _scalar(value: Any) -> float | None:
    """A summary's number: plain in older files, in a tensor of one element in newer ones."""
    if value.HasField("simple_value"):
        return float(value.simple_value)
    if value.HasField("tensor"):
        tensor = value.tensor
        for numbers in (tensor.float_val, tensor.double_val):
            if len(numbers) == 1:
                return float(numbers[0])
        if len(tensor.tensor_content) == 4 and tensor.dtype == 1:
            return float(np.frombuffer(tensor.tensor_content, "<f4")[0])
    return None


def table_of(rows: Mapping[int, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per step, in order of step."""
    frame = pd.DataFrame(
        [{"step": step, **rows[step]} for step in sorted(rows)], columns=None if rows else ["step"]
    )
    return frame.set_index(frame.pop("step").astype("int64").rename("step"))


def _usual_names(table: pd.DataFrame) -> pd.DataFrame:
    """The table with its loss and learning rate under the names that `Run` uses."""
    named = {str(column): str(column).split(" - ")[-1] for column in table}  # W&B: "run - loss"
    if len(set(named.values())) == len(named):
        table = table.rename(columns=named)
    for wanted, names in (("loss", _LOSS), ("lr", _RATE)):
        found = next((name for name in names if name in table), None)
        if found is None and wanted == "lr":  # LearningRateMonitor's names
            rates = [str(name) for name in table if str(name).startswith("lr-")]
            found = rates[0] if len(rates) == 1 else None
        if found is not None and found != wanted:
            table = table.rename(columns={found: wanted})
    return table
