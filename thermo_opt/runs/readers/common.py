"""What the readers of other tools' checkpoints share: a checkpoint's contents by this package's
names, and the run of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.adam_moments import optimizer_settings
from thermo_opt.runs.readers.optimizer_state import (
    MOMENTS,
    Key,
    OptimizerState,
    Shape,
    named,
    plain_name,
)
from thermo_opt.runs.run import Run, RunInfo, Snapshot
from thermo_opt.runs.torch_file import LazyTensor

_STATISTICS = ("running_mean", "running_var")
"""Floating-point buffers by the names `torch.nn` gives them; all others in a state dict count as
weights.
"""
_COUNTS = ("n_averaged",)
"""Entries that wrappers add beside the model's own."""
_LAST_STEP = 10**15
"""Whole numbers beyond this in a file's name are times of day or hashes, and differences of them
lose digits.
"""

Order = Sequence[Sequence[str]]
"""Names of the parameters in each of an optimizer's groups."""


class Weights(Protocol):
    """A checkpoint's weights and buffers by the names in the file; nothing is loaded before it is
    asked for.
    """

    @property
    def layouts(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each tensor, in the file's order."""

    def load(self, name: str) -> Tensor:
        """One of them, mapped."""


@dataclass
class Checkpoint:
    """Contents of one checkpoint of another tool: ``params/``, ``buffers/`` and, where they can be
    named, Adam's moments.

    Attributes:
        path: the file or folder, for messages.
        weights: opens the weights.
        optimizer: opens the optimizer's state; a sentence where there is none, or more than one.
        orders: given the parameters' shapes, the orders in which the optimizer may have them; by
            default the file's own.
    """

    path: Path
    weights: Callable[[], Weights]
    optimizer: Callable[[], OptimizerState | str]
    orders: Callable[[Mapping[str, Shape]], Sequence[Order]] | None = None

    @cached_property
    def _names(self) -> dict[str, str]:
        """This package's name of each tensor → its name in the file."""
        layouts = self.weights().layouts
        stored = [name for name in layouts if name not in _COUNTS]
        plain = {name: plain_name(name) for name in stored}
        if len(set(plain.values())) < len(plain) or not _common_module(stored):
            plain = {name: name for name in stored}
        result = {}
        for name in stored:
            dtype = layouts[name][1]
            buffer = not (dtype.is_floating_point or dtype.is_complex) or name.endswith(_STATISTICS)
            result[f"{'buffers' if buffer else 'params'}/{plain[name]}"] = name
        return result

    @cached_property
    def _weight_shapes(self) -> dict[str, Shape]:
        layouts = self.weights().layouts
        return {name: layouts[stored][0] for name, stored in self._names.items()}

    @cached_property
    def parameters(self) -> list[dict[str, Any]]:
        """``{name, shape, dtype, trainable}`` of each weight."""
        layouts = self.weights().layouts
        return [
            {
                "name": name.removeprefix("params/"),
                "shape": list(layouts[stored][0]),
                "dtype": str(layouts[stored][1]).removeprefix("torch."),
                "trainable": None,
            }
            for name, stored in self._names.items()
            if name.startswith("params/")
        ]

    def _state(self) -> OptimizerState | str:
        """The optimizer's state, or why it can't be used: a damaged one stops only the lens that
        needs it.
        """
        try:
            return self.optimizer()
        except InputError as error:
            return str(error)

    @cached_property
    def _keys(self) -> dict[str, Key] | str:
        """Name of each parameter that has moments → its key in the optimizer; or why they can't be
        told.
        """
        state = self._state()
        if isinstance(state, str):
            return state
        shapes = {
            name.removeprefix("params/"): shape
            for name, shape in self._weight_shapes.items()
            if name.startswith("params/")
        }
        if self.orders is None:
            return named(state, shapes, [[list(shapes)] * len(state.groups)])
        return named(state, shapes, self.orders(shapes))

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each tensor by name."""
        shapes = dict(self._weight_shapes)
        if not isinstance(self._keys, str):
            for moment in MOMENTS:
                shapes |= {f"{moment}/{name}": shapes[f"params/{name}"] for name in self._keys}
        return shapes

    def load(self, name: str) -> Tensor:
        """The tensor of this name; KeyError when it isn't one of `shapes`."""
        if name not in self.shapes:
            raise KeyError(name)
        group, own = name.split("/", 1)
        if group not in MOMENTS:
            return self.weights().load(self._names[name]).detach()
        state = self._state()
        assert isinstance(state, OptimizerState)
        assert not isinstance(self._keys, str)
        entry = state.entries[self._keys[own]]
        moment = entry.first if group == MOMENTS[0] else entry.second
        assert moment is not None
        return (moment.load() if isinstance(moment, LazyTensor) else moment).detach()

    def moments_meta(self) -> dict[str, Any] | None:
        """Step and betas of Adam's moments."""
        state = self._state()
        if isinstance(state, str) or isinstance(self._keys, str) or not self._keys:
            return None
        step, betas = state.entries[next(iter(self._keys.values()))].step, state.betas
        return None if not step or betas is None else {"step": step, "betas": betas}

    def absent(self, group: str) -> str | None:
        """Why a group is not there."""
        if group in MOMENTS:
            if isinstance(self._keys, str):
                return self._keys
            return (
                "its optimizer's state holds no step or no betas"
                if self.moments_meta() is None
                else None
            )
        return {
            "probe": "checkpoints of this format hold no predictions",
            "grad": "checkpoints of this format hold no gradients",
        }.get(group)


def _common_module(names: Sequence[str]) -> bool:
    """Whether a leading ``module`` is a wrapper's: all names have it, or none."""
    return len({name.split(".")[0] == "module" for name in names}) <= 1


@dataclass
class Found:
    """A checkpoint as a reader found it: the step it is of, and its contents."""

    step: int
    checkpoint: Checkpoint


def open_run(
    path: Path,
    format: str,
    found: Sequence[Found],
    *,
    steps: pd.DataFrame | None = None,
    remarks: Sequence[str] = (),
    key: str | None = None,
    **info: Any,
) -> Run:
    """A `Run` of checkpoints; the optimizer's settings are the last one's (the first may precede
    any step), the layout is the first one's.
    """
    snapshots = link([(item.step, item.checkpoint.path, item.checkpoint) for item in found])
    first, last = snapshots[0].contents, snapshots[-1].contents
    assert isinstance(first, Checkpoint)
    assert isinstance(last, Checkpoint)
    state = last._state()
    return Run(
        name=path.resolve().name,
        path=path,
        format=format,
        info=RunInfo(
            optimizer=None if isinstance(state, str) else state.optimizer,
            settings={}
            if isinstance(state, str)
            else optimizer_settings([group.settings for group in state.groups]),
            parameters=first.parameters,
            **{"clock": "step", **info},
        ),
        steps=steps if steps is not None else empty_curve(),
        snapshots=snapshots,
        probe_path=find_probe(path),
        remarks=list(remarks),
        key=key,
    )


def empty_curve() -> pd.DataFrame:
    """The training curve of a run that logged none."""
    return pd.DataFrame(index=pd.Index([], name="step", dtype="int64"))


def find_probe(path: Path) -> Path | None:
    """The probe file laid beside a run's checkpoints, if any: ``probe`` with the suffix of a kind
    that can be read.
    """
    return next(
        (
            file
            for suffix in (".safetensors", ".npz", ".parquet")
            if (file := path / ("probe" + suffix)).exists()
        ),
        None,
    )


def link(snapshots: list[tuple[int, Path, Any]]) -> list[Snapshot]:
    """Snapshots in order of step, each knowing the first one's layout; raises `InputError` when two
    have one step number.
    """
    ordered = sorted(snapshots, key=lambda item: item[0])
    if ordered and ordered[-1][0] > _LAST_STEP:
        raise InputError(
            f"{ordered[-1][1]}: {ordered[-1][0]} can't be a step number; name the file by its "
            "step, or move it elsewhere"
        )
    for (step, path, _), (following, other, _) in itertools.pairwise(ordered):
        if step == following:
            raise InputError(f"{path} and {other} both hold step {step}; keep one of them here")
    result: list[Snapshot] = []
    for step, path, contents in ordered:
        result.append(Snapshot(step, path, contents, result[0] if result else None))
    return result
