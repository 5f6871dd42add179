"""What every lens is given: the run, which of its snapshots to use, the clock, and what the user
added."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from thermo_opt import thermodynamics as td
from thermo_opt.errors import InputError
from thermo_opt.lenses.replay import build_model
from thermo_opt.runs import Probe, Run

Progress = Callable[[str, int], Callable[[int], None]]
"""``progress(description, total)`` starts a bar and returns ``advance(n)``."""


class Unsupported(InputError):
    """The run lacks what a lens needs; the message says what."""


class LensInputs:
    """A run as an audit looks at it. Arguments as in `thermo_opt.audits.audit`."""

    def __init__(
        self,
        run: Run,
        clock: str = "step",
        stride: int = 1,
        model: str | nn.Module | None = None,
        probe: Probe | None = None,
        batch_size: int | None = None,
        intervals: slice | Sequence[int] | None = None,
        jobs: int = 1,
        quadrature: Literal["start", "trapezoid"] = "start",
        damping: float | None = None,
        device: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.run, self.clock, self.jobs = run, clock, jobs
        self.batch_size = batch_size if batch_size is not None else run.info.batch_size
        self.sigma2 = run.info.sigma2 if run.info.sigma2 is not None else 1.0
        self.indices = list(range(0, len(run.snapshots), stride))
        if self.indices[-1] != len(run.snapshots) - 1:
            self.indices.append(len(run.snapshots) - 1)
        self.intervals = intervals
        if quadrature not in ("start", "trapezoid"):
            raise InputError(f"quadrature {quadrature!r} is unknown: use 'start' or 'trapezoid'")
        if jobs == 0:
            raise InputError("jobs must be a number of processes, or -1 for one a core, not 0")
        self.quadrature, self.damping = quadrature, damping
        try:
            self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        except (RuntimeError, TypeError):
            raise InputError(
                f"device is {device!r}; give one of torch's, such as 'cpu' or 'cuda'"
            ) from None
        self.probe_given = probe is not None
        self._probe, self._model, self._progress = probe, model, progress

    @cached_property
    def probe(self) -> Probe | None:
        """The user's probe, else the run's own."""
        return self._probe if self._probe is not None else self.run.probe

    @property
    def likelihood(self) -> tuple[str, list[str]]:
        """The outputs' likelihood, and a note when it had to be assumed."""
        if self.run.info.likelihood is None:
            return "categorical", ["outputs taken for class logits (the record doesn't say)"]
        return self.run.info.likelihood, []

    def model(self) -> nn.Module:
        """The architecture, built once."""
        return self._built

    @cached_property
    def _built(self) -> nn.Module:
        try:
            return build_model(self.run, self._model)
        except InputError as error:
            if self._model is not None:
                raise
            raise Unsupported(str(error)) from None

    def tau(self, steps: np.ndarray) -> np.ndarray:
        """Durations of the intervals between these steps on the chosen clock."""
        readings = self.run.clock_readings(self.clock, steps)
        for k in np.flatnonzero(np.diff(readings) < 0):
            raise InputError(
                f"{self.run.path}: clock {self.clock!r} runs backwards from step {steps[k]} to "
                f"{steps[k + 1]}: correct "
                "what the run logged, or use clock 'step'"
            )
        return td.durations(readings)

    def training_loss(self, steps: np.ndarray) -> np.ndarray:
        """The training loss logged last before or at these steps (nats), NaN where there is none
        yet."""
        if "loss" not in self.run.steps:
            return np.full(len(steps), np.nan)
        logged = self.run.steps["loss"].astype(np.float64).dropna()
        at = np.searchsorted(logged.index.to_numpy(), steps, side="right") - 1
        return (
            np.where(at >= 0, logged.to_numpy()[np.maximum(at, 0)], np.nan)
            if len(logged)
            else np.full(len(steps), np.nan)
        )

    def advance(self, description: str, total: int) -> Callable[[int], None] | None:
        """Start a progress bar if the user asked for any."""
        return None if self._progress is None else self._progress(description, total)
