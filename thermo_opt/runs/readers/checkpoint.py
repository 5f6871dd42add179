"""What the readers of other tools' checkpoints share: weights of a state dict, and an optimizer's
moments under their names.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.format import PROBE_FILE, link
from thermo_opt.runs.optimizer_state import optimizer_settings
from thermo_opt.runs.run import Run, RunInfo

Shape = tuple[int, ...]

_STATISTICS = ("running_mean", "running_var")
"""Floating-point buffers by the names `torch.nn` gives them; all others in a state dict count as
weights."""

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Checkpoint(ABC):
    """Contents of one checkpoint of another tool: ``params/``, ``buffers/`` and, where they can be
    named, Adam's moments.

    A format says where weights and optimizer state lie, and which orders of parameters its
    optimizer may have.
    """

    path: Path

    @abstractmethod
    def weights(self) -> Mapping[str, Any]:
        """Names of the stored weights and buffers, in the file's order (values: whatever `weight`
        needs)."""

    @abstractmethod
    def weight(self, name: str) -> Tensor:
        """One of them, mapped."""

    @abstractmethod
    def optimizer_state(self) -> Mapping[str, Any] | None:
        """The optimizer's ``state_dict()``: ``{"state": {index: …}, "param_groups": […]}``."""

    def parameter_orders(self, groups: int) -> Sequence[Sequence[Sequence[str]]]:
        """Possible orders of the parameters in the optimizer: for each, one list of names a group.
        First fit wins."""
        names = [
            name.removeprefix("params/")
            for name in self._weight_shapes
            if name.startswith("params/")
        ]
        return [[names] * groups]

    @cached_property
    def _weight_shapes(self) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for name in self.weights():
            tensor = self.weight(name)
            buffer = not tensor.is_floating_point() or name.endswith(_STATISTICS)
            shapes[f"{'buffers' if buffer else 'params'}/{name}"] = tuple(tensor.shape)
        return shapes

    @cached_property
    def _indices(self) -> dict[str, int] | str:
        """Name of each parameter that has moments → its index in the optimizer; or why they can't
        be told."""
        state = self.optimizer_state()
        if state is None:
            return "no optimizer state was saved with it"
        found = _moment_shapes(state)
        if not any(shape is not None for group in found for shape in group.values()):
            return "its optimizer keeps no exp_avg and exp_avg_sq"
        known = {name.removeprefix("params/"): shape for name, shape in self._weight_shapes.items()}
        orders = self.parameter_orders(len(found))
        for order in orders:
            if len(order) == len(found):
                indices = _assign(
                    found,
                    [[(name, known[name]) for name in group if name in known] for group in order],
                )
                if indices is not None:
                    return self._in_step(indices, state)
        return (
            "its optimizer state doesn't name the parameters, and the moments' shapes "
            "leave more than one possibility"
        )

    @staticmethod
    def _in_step(indices: dict[str, int], state: Mapping[str, Any]) -> dict[str, int]:
        """Those as often updated as the most advanced one: the others' bias correction would be
        another."""
        done = {name: int(state["state"][index].get("step", 0)) for name, index in indices.items()}
        return {name: index for name, index in indices.items() if done[name] == max(done.values())}

    @cached_property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each tensor by name."""
        shapes = dict(self._weight_shapes)
        if not isinstance(self._indices, str):
            for moment in _MOMENTS:
                shapes |= {f"{moment}/{name}": shapes[f"params/{name}"] for name in self._indices}
        return shapes

    def load(self, name: str) -> Tensor:
        """The tensor of this name; KeyError when it isn't one of `shapes`."""
        if name not in self.shapes:
            raise KeyError(name)
        group, own = name.split("/", 1)
        if group not in _MOMENTS:
            return self.weight(own).detach()
        state = self.optimizer_state()
        assert state is not None
        assert not isinstance(self._indices, str)
        return state["state"][self._indices[own]][group].detach()

    def moments_meta(self) -> dict[str, Any] | None:
        """Step and betas of Adam's moments."""
        state = self.optimizer_state()
        if state is None or isinstance(self._indices, str) or not self._indices:
            return None
        step = state["state"][next(iter(self._indices.values()))].get("step")
        betas = state["param_groups"][0].get("betas")
        if step is None or betas is None:
            return None
        return {"step": int(step), "betas": (float(betas[0]), float(betas[1]))}

    def absent(self, group: str) -> str | None:
        """Why there are no moments."""
        if group in _MOMENTS:
            return self._indices if isinstance(self._indices, str) else None
        return {
            "probe": "checkpoints of this format hold no predictions",
            "grad": "checkpoints of this format hold no gradients",
        }.get(group)


def open_run(
    path: Path,
    format: str,
    checkpoints: list[tuple[int, Checkpoint]],
    steps: pd.DataFrame | None = None,
    **info: Any,
) -> Run:
    """A `Run` of checkpoints ``(step, contents)``; the optimizer's settings and the layout are
    those of the first one.
    """
    snapshots = link([(step, contents.path, contents) for step, contents in checkpoints])
    first = snapshots[0].contents
    assert isinstance(first, Checkpoint)
    state = first.optimizer_state()
    groups = list(state["param_groups"]) if state is not None else []
    parameters = [
        {
            "name": name,
            "shape": list(shape),
            "dtype": str(first.weight(name).dtype).removeprefix("torch."),
            "trainable": None,
        }
        for name, shape in (
            (key.removeprefix("params/"), shape)
            for key, shape in first._weight_shapes.items()
            if key.startswith("params/")
        )
    ]
    return Run(
        name=path.resolve().name,
        path=path,
        format=format,
        info=RunInfo(
            optimizer=_optimizer_name(state),
            settings=optimizer_settings(groups) if groups else {},
            parameters=parameters,
            **info,
        ),
        steps=steps
        if steps is not None
        else pd.DataFrame(index=pd.Index([], name="step", dtype="int64")),
        snapshots=snapshots,
        probe_path=find_probe(path),
    )


def find_probe(path: Path) -> Path | None:
    """The probe file laid beside a run's checkpoints, if any: ``probe.safetensors``, ``probe.npz``
    or ``probe.parquet``.
    """
    stem = Path(PROBE_FILE).stem
    return next(
        (
            file
            for suffix in (".safetensors", ".npz", ".parquet")
            if (file := path / (stem + suffix)).exists()
        ),
        None,
    )


def step_in_name(path: Path) -> int:
    """The last whole number in a file's name; raises `InputError` when there is none."""
    numbers = re.findall(r"\d+", path.stem)
    if not numbers:
        raise InputError(
            f"{path}: there is no step number in its name; rename it like model-100{path.suffix}, "
            "or remove it"
        )
    return int(numbers[-1])


def _moment_shapes(state: Mapping[str, Any]) -> list[dict[int, Shape | None]]:
    """For each group, index → shape of its moments (None: that parameter has none)."""
    result = []
    for group in state["param_groups"]:
        entries = {index: state["state"].get(index, {}) for index in group["params"]}
        result.append(
            {
                index: tuple(entry["exp_avg"].shape)
                if all(isinstance(entry.get(m), Tensor) for m in _MOMENTS)
                else None
                for index, entry in entries.items()
            }
        )
    return result


def _assign(
    found: list[dict[int, Shape | None]], order: Sequence[Sequence[tuple[str, Shape]]]
) -> dict[str, int] | None:
    """Names for the indices of each group, if exactly one order-preserving choice has the right
    shapes."""
    result: dict[str, int] = {}
    for group, names in zip(found, order, strict=True):
        if len(group) == len(names):
            pairs = [
                (name, shape, index, own)
                for (name, shape), (index, own) in zip(names, group.items(), strict=True)
            ]
            if any(own is not None and own != shape for _, shape, _, own in pairs):
                return None
            chosen = {name: index for name, _, index, own in pairs if own is not None}
        else:
            present = [(index, shape) for index, shape in group.items() if shape is not None]
            positions = _only_embedding(
                [shape for _, shape in present], [shape for _, shape in names]
            )
            if positions is None:
                return None
            chosen = {
                names[position][0]: index
                for position, (index, _) in zip(positions, present, strict=True)
            }
        if result.keys() & chosen.keys():
            return None
        result |= chosen
    return result


def _only_embedding(part: Sequence[Shape], whole: Sequence[Shape]) -> list[int] | None:
    """Positions of ``part`` as a subsequence of ``whole``, if there is exactly one way: its
    leftmost and rightmost fits agree.
    """

    def leftmost(part: Sequence[Shape], whole: Sequence[Shape]) -> list[int] | None:
        positions: list[int] = []
        for shape in part:
            start = positions[-1] + 1 if positions else 0
            position = next((i for i in range(start, len(whole)) if whole[i] == shape), None)
            if position is None:
                return None
            positions.append(position)
        return positions

    first = leftmost(part, whole)
    last = leftmost(part[::-1], whole[::-1])
    if first is None or last is None:
        return None
    return first if first == [len(whole) - 1 - position for position in reversed(last)] else None


def _optimizer_name(state: Mapping[str, Any] | None) -> str | None:
    if state is None:
        return None
    keys = {key for entry in state["state"].values() for key in entry}
    if set(_MOMENTS) <= keys:
        return "AdamW" if state["param_groups"][0].get("decoupled_weight_decay") else "Adam"
    return "SGD" if "momentum_buffer" in keys else None
