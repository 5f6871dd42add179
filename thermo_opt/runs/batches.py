"""Minibatches recorded with the steps they caused.

batches/00000100.safetensors holds the inputs and targets of step 101, by the names of a probe's
file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from thermo_opt.runs.probe import Probe, load_probe

BATCH_FOLDER = "batches"


def batch_path(run: Path, step: int) -> Path:
    """Where the minibatch of the step after ``step`` steps lies."""
    return run / BATCH_FOLDER / f"{step:08d}.safetensors"


@dataclass(frozen=True)
class RecordedBatch:
    """One recorded minibatch: that of the step from the state after ``step`` steps, and its
    file."""

    step: int
    path: Path

    def load(self) -> Probe:
        """Its inputs and targets; `InputError` where the file is damaged."""
        return load_probe(self.path)


def read_batches(run: Path) -> list[RecordedBatch]:
    """The minibatches recorded in a run's folder, in order; empty where there are none."""
    folder = run / BATCH_FOLDER
    files = folder.glob("*.safetensors") if folder.is_dir() else ()
    return sorted(
        (RecordedBatch(int(f.stem), f) for f in files if f.stem.isdecimal()), key=lambda b: b.step
    )
