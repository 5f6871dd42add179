"""Reader for a folder of safetensors files, one per checkpoint, with the step in each file's name.

The tensors are a model's weights, or carry the group names of our own snapshots (``probe/logits``,
``params/…``): so predictions alone, written by any framework, can be audited.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.border import visible
from thermo_opt.runs.readers.common import (
    Checkpoint,
    Found,
    Shape,
    empty_curve,
    find_probe,
    link,
    open_run,
)
from thermo_opt.runs.readers.curves import find_curve
from thermo_opt.runs.readers.own import OwnSnapshot
from thermo_opt.runs.readers.series import Candidate, series
from thermo_opt.runs.run import Run, RunInfo
from thermo_opt.runs.tensors import SafetensorsFile, opened

GROUPS = frozenset({"params", "buffers", "probe", "grad", "exp_avg", "exp_avg_sq"})
"""First parts of tensor names in our own snapshots."""
NO_OPTIMIZER = "no optimizer state was saved with it"


def recognise(path: Path) -> bool:
    """Whether a folder has ``*.safetensors`` files besides a probe."""
    return bool(_files(path))


def read(path: Path, key: str | None = None) -> Run:
    """Open a folder of safetensors files: each a model's weights, or a snapshot by our names."""
    files = _files(path)
    if not files:
        raise InputError(f"{path} has no .safetensors files; give the folder of a recorded run")
    found = series(
        path, [Candidate(file, file.name.removesuffix(".safetensors")) for file in files], _same
    )
    first = found.members[0][1].path
    if all(name.split("/")[0] in GROUPS for name in opened(first, SafetensorsFile).shapes):
        return Run(
            name=path.resolve().name,
            path=path,
            format="safetensors",
            info=RunInfo(clock="step", step_unit=found.unit, step_source=found.source),
            steps=empty_curve(),
            snapshots=link(
                [(step, item.path, OwnSnapshot(item.path)) for step, item in found.members]
            ),
            probe_path=find_probe(path),
            remarks=found.remarks,
        )
    steps, remark = find_curve([path, path.parent])
    return open_run(
        path,
        "safetensors",
        [
            Found(
                step,
                Checkpoint(
                    item.path, partial(SafetensorsWeights, [item.path]), lambda: NO_OPTIMIZER
                ),
            )
            for step, item in found.members
        ],
        steps=steps,
        remarks=[*found.remarks, *([remark] if remark else [])],
        step_unit=found.unit,
        step_source=found.source,
    )


class SafetensorsWeights:
    """The weights in one file of safetensors, or in several that complete each other."""

    def __init__(self, files: Sequence[Path], of: Mapping[str, Path] | None = None) -> None:
        self._files, self._of = files, of

    @property
    def layouts(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each tensor."""
        found: dict[str, tuple[Shape, torch.dtype]] = {}
        for file in self._files:
            layouts = opened(file, SafetensorsFile).layouts
            found |= {
                name: layout
                for name, layout in layouts.items()
                if self._of is None or self._of.get(name) == file
            }
        return found

    def load(self, name: str) -> Tensor:
        """One of them, mapped."""
        if self._of is not None:
            return opened(self._of[name], SafetensorsFile).load(name)
        file = next(file for file in self._files if name in opened(file, SafetensorsFile).shapes)
        return opened(file, SafetensorsFile).load(name)


def _same(one: Candidate, other: Candidate) -> bool:
    files = [opened(candidate.path, SafetensorsFile) for candidate in (one, other)]
    return files[0].layouts == files[1].layouts and all(
        torch.equal(files[0].load(name), files[1].load(name)) for name in files[0].shapes
    )


def _files(path: Path) -> list[Path]:
    return sorted(
        file
        for file in visible(path.glob("*.safetensors"))
        if not file.is_dir() and file.name != "probe.safetensors"
    )
