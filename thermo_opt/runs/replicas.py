"""Replica steps: what an independent minibatch would have done from the same state, for telling
noise from drift (§11).

replicas/00000100.safetensors holds the probe's predictions before step 101 (``before``), after it
(``step``), and after a replica of it on another minibatch (``replica``).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.models import random_states_kept
from thermo_opt.runs.memento import Memento, used_by
from thermo_opt.runs.tensors import SafetensorsFile

REPLICA_FOLDER = "replicas"
PARTS = ("before", "step", "replica")
LR_RATIO = "lr_ratio"
"""Entry of a file's metadata: the step's learning rate over the replica's, where a scheduler was
called in between."""


def replica_path(run: Path, step: int) -> Path:
    """Where the replica of the step after ``step`` steps lies."""
    return run / REPLICA_FOLDER / f"{step:08d}.safetensors"


@dataclass(frozen=True)
class Replica:
    """One recorded replica step: the state after ``step`` optimizer steps, and its file."""

    step: int
    path: Path

    @property
    def lr_ratio(self) -> float:
        """The step's learning rate over the replica's, by which the replica's displacement is
        multiplied."""
        text = SafetensorsFile(self.path).metadata.get(LR_RATIO, "1")
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not 0 <= value < float("inf"):
            raise InputError(f"{self.path}: its {LR_RATIO} is {text!r}, no number; remove the file")
        return value

    def load(self) -> dict[str, dict[str, Tensor]]:
        """The predictions ``before``, after the ``step`` and after the ``replica``, each by the
        names of a snapshot."""
        file = SafetensorsFile(self.path)
        found: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        for name in file.shapes:
            part, _, rest = name.partition("/")
            if part in found:
                found[part][rest] = file.load(name)
        if not all(found.values()):
            raise InputError(
                f"{self.path} lacks one of {', '.join(PARTS)}; remove it to use the rest of the run"
            )
        return found


def read_replicas(run: Path) -> list[Replica]:
    """The replica steps recorded in a run's folder, in order; empty where there are none."""
    folder = run / REPLICA_FOLDER
    files = folder.glob("*.safetensors") if folder.is_dir() else ()
    return sorted(
        (Replica(int(f.stem), f) for f in files if f.stem.isdecimal()), key=lambda r: r.step
    )


class ReplicaSteps:
    """Takes replica steps from a training's present state and leaves that state bit for bit as it
    was.

    Args:
        closure: as for ``torch.optim.Optimizer.step``, on an independent minibatch: computes the
            loss and its gradients. It may also take the whole step itself (gradient clipping,
            ``GradScaler``); if it doesn't, the optimizer's ``step`` is called for it.
        model: what is being trained.
        optimizer: its optimizer. Both, and modules, optimizers, schedulers and gradient scalers
            that the closure refers to, are put back afterwards.
    """

    def __init__(
        self, closure: Callable[[], Any], model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        if not callable(closure):
            raise InputError(
                f"replica is of type {type(closure).__name__}; give a function that computes "
                f"gradients"
            )
        self._closure, self._model, self._optimizer = closure, model, optimizer

    def take(self, step: int, observe: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What ``observe`` gives after one replica step.

        Random states are its own, seeded by ``step``: dropout masks shared with the real step would
        count as no noise. Cost: one training step, and a copy of all that is put back.
        """
        used = used_by(self._closure)
        memento = Memento(self._model, self._optimizer, *used)
        try:
            with random_states_kept(), torch.enable_grad():
                torch.manual_seed(step)
                random.seed(step)
                np.random.seed(step % 2**32)  # noqa: NPY002 (the user's code may draw from it)
                self._advance([thing for thing in used if isinstance(thing, torch.amp.GradScaler)])
                return observe()
        finally:
            memento.restore()

    def _advance(self, scalers: list[torch.amp.GradScaler]) -> None:
        stepped: list[bool] = []
        hook = self._optimizer.register_step_post_hook(lambda *_: stepped.append(True))
        try:
            self._optimizer.zero_grad(set_to_none=True)
            self._closure()
            if not stepped and scalers:
                scalers[0].step(self._optimizer)
                scalers[0].update()
            elif not stepped:
                self._optimizer.step()
        finally:
            hook.remove()
