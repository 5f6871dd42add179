"""Reader for PyTorch Lightning: the ``*.ckpt`` files of one run and, beside them, ``metrics.csv``
of its `CSVLogger`.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from thermo_opt.errors import InputError
from thermo_opt.runs.format import visible, with_numbers
from thermo_opt.runs.readers.checkpoint import Checkpoint, open_run
from thermo_opt.runs.readers.torch_folder import TorchCheckpoint, tied_names
from thermo_opt.runs.run import Run


def recognise(path: Path) -> bool:
    """Whether there are ``*.ckpt`` files in a folder or below it."""
    return next(visible(path.rglob("*.ckpt")), None) is not None


def read(path: Path) -> Run:
    """Open the folder of a Lightning run (the checkpoints' own, or one above it).

    The step is each file's ``global_step``. ``last.ckpt`` is left out where it repeats another
    checkpoint.
    """
    files = sorted(visible(path.rglob("*.ckpt")))
    if not files:
        raise InputError(f"{path} has no .ckpt files; give the folder of a Lightning run")
    folders = sorted({file.parent for file in files})
    if len(folders) > 1:
        raise InputError(
            f"{path} holds checkpoints of several runs ({folders[0]}, {folders[1]}, …); give one "
            "of them"
        )
    checkpoints: dict[int, TorchCheckpoint] = {}
    for file in sorted(files, key=lambda file: (file.stem.startswith("last"), file.name)):
        checkpoint = TorchCheckpoint(file)
        step = checkpoint._content().get("global_step")
        if not isinstance(step, int):
            raise InputError(
                f"{file} has no global_step; it isn't a Lightning checkpoint: remove it, or use "
                "--format torch"
            )
        if step in checkpoints:
            if file.stem.startswith("last"):
                continue
            raise InputError(
                f"{checkpoints[step].path} and {file} both hold step {step}; keep one of them"
            )
        checkpoints[step] = checkpoint
    ordered: list[tuple[int, Checkpoint]] = list(checkpoints.items())
    return open_run(
        path,
        "lightning",
        ordered,
        _metrics(folders[0], path),
        clock="step",
        tied=tied_names(ordered[0][1]),
    )


def _metrics(folder: Path, top: Path) -> pd.DataFrame | None:
    """The logger's table, one row a step; its steps count from 0 while ours counts steps done."""
    places = [folder, folder.parent, top]
    file = next(
        (place / "metrics.csv" for place in places if (place / "metrics.csv").is_file()), None
    )
    if file is None:
        return None
    try:
        table = pd.read_csv(file)
        table["step"] = table["step"].astype("int64") + 1
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{file} isn't a table with a 'step' column ({error}); restore or remove it"
        ) from None
    table = table.groupby(
        "step"
    ).first()  # the first value of each column: training and validation write separate rows
    for name in ("train_loss", "train_loss_step", "train/loss"):
        if "loss" not in table and name in table:
            table = table.rename(columns={name: "loss"})
    rates = [
        column for column in table if str(column).startswith("lr-")
    ]  # LearningRateMonitor's names
    if len(rates) == 1 and "lr" not in table:
        table = table.rename(columns={rates[0]: "lr"})
    return with_numbers(table, file)
