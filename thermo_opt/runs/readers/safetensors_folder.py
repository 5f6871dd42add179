"""Reader for a folder of safetensors files, one a checkpoint, with the step in each file's name.

The tensors are a model's weights, or carry the group names of our own snapshots (``probe/logits``,
``params/…``): so predictions alone, written by any framework, can be audited.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.format import PROBE_FILE, OwnSnapshot, link, visible
from thermo_opt.runs.readers.checkpoint import Checkpoint, find_probe, open_run, step_in_name
from thermo_opt.runs.run import Run, RunInfo
from thermo_opt.runs.tensors import SafetensorsFile, opened

GROUPS = frozenset({"params", "buffers", "probe", "grad", "exp_avg", "exp_avg_sq"})
"""First parts of tensor names in our own snapshots."""


def recognise(path: Path) -> bool:
    """Whether a folder has ``*.safetensors`` files besides a probe."""
    return bool(_files(path))


def read(path: Path) -> Run:
    """Open a folder of safetensors files: each a model's weights, the step being the last number in
    its name."""
    files = _files(path)
    if not files:
        raise InputError(f"{path} has no .safetensors files; give the folder of a recorded run")
    if all(name.split("/")[0] in GROUPS for name in opened(files[0], SafetensorsFile).shapes):
        return Run(
            name=path.resolve().name,
            path=path,
            format="safetensors",
            info=RunInfo(clock="step"),
            steps=pd.DataFrame(index=pd.Index([], name="step", dtype="int64")),
            snapshots=link([(step_in_name(file), file, OwnSnapshot(file)) for file in files]),
            probe_path=find_probe(path),
        )
    return open_run(
        path,
        "safetensors",
        [(step_in_name(file), SafetensorsCheckpoint(file)) for file in files],
        clock="step",
    )


@dataclass
class SafetensorsCheckpoint(Checkpoint):
    """One safetensors file of weights."""

    @cached_property
    def _names(self) -> dict[str, None]:
        return dict.fromkeys(self._file().shapes)

    def weights(self) -> Mapping[str, None]:
        """The file's tensors."""
        return self._names

    def weight(self, name: str) -> Tensor:
        """One of them, mapped."""
        return self._file().load(name)

    def optimizer_state(self) -> Mapping[str, Any] | None:
        """None: the format has no place for it."""
        return None

    def _file(self) -> SafetensorsFile:
        return opened(self.path, SafetensorsFile)


def _files(path: Path) -> list[Path]:
    return sorted(
        file
        for file in visible(path.glob("*.safetensors"))
        if file.is_file() and file.name != PROBE_FILE
    )
