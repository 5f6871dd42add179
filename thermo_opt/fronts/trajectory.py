"""A run as a line in the speed-cost plane: loss, time and dissipation at each snapshot, and where
it meets a target.

Between two snapshots the line follows the geodesic at constant speed. Along a geodesic each
example's loss is convex (-2 log cos of an angle that grows linearly; for Gaussian outputs a
square), so the loss interpolated linearly is an upper bound: at the fraction s where it equals L*,
the predictions γ(s) have a mean loss ≤ L*. Getting there took T = T_k + s τ_k and cost Q = Q_k + s
Q_k→k+1, over a length ℒ_k + s √a_k ≥ D*(L*), so that by Cauchy-Schwarz ``Q T ≥ D*(L*)²/2`` holds at
the crossing exactly, not only at snapshots (§4, §5).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from thermo_opt import thermodynamics as td
from thermo_opt.audits.auditor import at_steps
from thermo_opt.audits.results import Audit
from thermo_opt.errors import InputError
from thermo_opt.lenses.inputs import LensInputs, recorded_settings
from thermo_opt.lenses.path import path_scalars
from thermo_opt.lenses.predictions import RecordedPredictions, array_of, targets_of
from thermo_opt.manifold.initial import InitialPredictions
from thermo_opt.runs import Run
from thermo_opt.runs.run import RunInfo


@dataclass(frozen=True)
class Crossing:
    """Where a run first meets a target: optimizer ``step`` (fractional), ``time`` and
    ``dissipation`` since its start, and ``least_distance``, D*(L*) from that start; ``energy`` in
    joules where the run logged it. NaN but for the frontier where it never does."""

    step: float
    time: float
    dissipation: float
    least_distance: float
    energy: float = np.nan

    @property
    def reached(self) -> bool:
        """Whether the run met the target."""
        return bool(np.isfinite(self.time))


@dataclass(frozen=True)
class Trajectory:
    """A run's line: ``steps``, ``loss`` (nats), ``time`` and ``dissipation`` since the start, each
    (K+1,) over snapshots; ``energy``, joules since the start, where each step logged them.
    ``step_unit``: what its steps count; ``settings``: what the record says of how it was trained;
    ``source``: what it was read from, so that it can be read at fewer snapshots."""

    run: str
    path: str
    optimizer: str | None
    probe: str | None
    clock: str
    start: InitialPredictions
    steps: np.ndarray
    loss: np.ndarray
    time: np.ndarray
    dissipation: np.ndarray
    energy: np.ndarray | None = None
    step_unit: str = "step"
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: Audit | Run | None = field(default=None, repr=False, compare=False)

    @classmethod
    def along(
        cls,
        *,
        run: str,
        clock: str,
        start: InitialPredictions | None,
        loss: np.ndarray,
        a: np.ndarray,
        tau: np.ndarray,
        **known: Any,
    ) -> Trajectory:
        """The line through intervals of squared lengths ``a`` and durations ``tau``; the rest as
        the attributes."""
        if start is None or np.isnan(loss).any():
            raise InputError(
                f"{run}: the probe has no targets, so the run has no loss; record it with targets"
            )
        try:
            q = td.dissipation(a, tau)
        except ValueError as error:
            raise InputError(f"{run}: clock {clock!r}: {error}") from None
        time, dissipation = (np.concatenate([[0.0], np.cumsum(x)]) for x in (tau, q))
        return cls(
            run=run,
            clock=clock,
            start=start,
            loss=loss,
            time=time,
            dissipation=dissipation,
            **known,
        )

    @property
    def best(self) -> float:
        """The lowest loss at any snapshot (nats)."""
        return float(np.min(self.loss))

    @property
    def stride(self) -> float:
        """Steps between successive snapshots, their median."""
        return float(np.median(np.diff(self.steps)))

    @property
    def every_step(self) -> bool:
        """Whether every optimizer step was seen, so that nothing is a bound because of the
        stride."""
        return self.step_unit == "step" and bool((np.diff(self.steps) == 1).all())

    def at(self, steps: Sequence[int]) -> Trajectory:
        """The same run at fewer of its snapshots, those of these step numbers (§4).

        Raises:
            InputError: When it isn't known where the run was read from.
        """
        if isinstance(self.source, Run):
            again = read_trajectory(self.source, self.clock, steps)
        elif isinstance(self.source, Audit) and self.source.inputs is not None:
            again = trajectory_of(at_steps(self.source, steps), self.clock)
        else:
            raise InputError(
                f"{self.run} can't be seen at fewer snapshots, since it isn't known where it was "
                "read from: audit it again"
            )
        return replace(again, run=self.run)

    def crossing(self, target_loss: float) -> Crossing:
        """Where the line first meets ``target_loss``, below the loss at the start (see the module's
        notes). O(K)."""
        least_distance = self.start.least_distance(target_loss)
        below = np.flatnonzero(self.loss <= target_loss)
        if len(below) == 0:
            return Crossing(np.nan, np.nan, np.nan, least_distance)
        end = int(below[0])
        if end == 0:
            return Crossing(float(self.steps[0]), 0.0, 0.0, least_distance)
        high, low = self.loss[end - 1], self.loss[end]
        s = (high - target_loss) / (high - low) if np.isfinite(high) else 1.0

        def between(values: np.ndarray) -> float:
            return float(values[end - 1] + s * (values[end] - values[end - 1]))

        energy = np.nan if self.energy is None else between(self.energy)
        return Crossing(
            between(self.steps),
            between(self.time),
            between(self.dissipation),
            least_distance,
            energy,
        )


def trajectory_of(audit: Audit, clock: str | None = None) -> Trajectory:
    """The line of an audited run, from its outputs lens.

    Args:
        audit: The audit.
        clock: Another clock than the audit's.

    Raises:
        InputError: Naming the run when it has no outputs lens, no targets, or no readings of that
            clock.
    """
    lens = audit.lenses.get("outputs")
    if lens is None:
        reason = audit.missing.get("outputs", "it was audited through other lenses only")
        raise InputError(f"{audit.run}: a speed-cost front needs the outputs lens: {reason}")
    steps = np.append(lens.steps["step"].to_numpy(), lens.steps["step_end"].iloc[-1])
    tau = lens.steps["tau"].to_numpy()
    if clock is not None and clock != lens.summary["clock"]:
        try:
            tau = _tau(audit.path, audit.curve, None, clock, steps)
        except (
            InputError
        ) as error:  # a reading of the whole record may know more, a constant batch size for one
            raise InputError(f"{error}; or audit it with clock={clock!r}") from None
    return Trajectory.along(
        run=audit.run,
        path=audit.path,
        optimizer=audit.optimizer,
        probe=audit.probe,
        clock=clock or lens.summary["clock"],
        start=lens.start,
        steps=steps,
        loss=np.append(lens.steps["loss"].to_numpy(), lens.steps["loss_end"].iloc[-1]),
        energy=_energy(audit.curve, steps),
        a=lens.steps["a"].to_numpy(),
        tau=tau,
        step_unit=lens.summary["step_unit"],
        settings=audit.settings,
        source=audit,
    )


def read_trajectory(
    run: Run, clock: str = "step", steps: Sequence[int] | None = None
) -> Trajectory:
    """The line of a run from the predictions it recorded: what `trajectory_of` its audit gives,
    without the audit's other work.

    Cost: one reading of the snapshots.

    Args:
        run: The run.
        clock: What time is.
        steps: Step numbers of the snapshots to use, by default all.

    Raises:
        InputError: As `trajectory_of`, and for a run without recorded predictions.
    """
    if len(run.snapshots) < 2 or "probe/logits" not in run.snapshots[0].names():
        raise InputError(
            f"{run.path}: a speed-cost front needs predictions recorded on a probe at two steps at "
            "least"
        )
    last = run.snapshots[-1]
    likelihood, sigma2, _ = LensInputs(run=run, indices=[0, len(run.snapshots) - 1]).family(
        lambda: array_of(last.load("probe/logits")), targets_of(run.probe)
    )
    source = RecordedPredictions(run, likelihood, sigma2, run.info.kind)
    if source.targets is None:
        raise InputError(
            f"{run.path}: the probe has no targets, so the run has no loss; record it with targets"
        )
    wanted = None if steps is None else set(steps)
    indices = [k for k, step in enumerate(source.steps) if wanted is None or step in wanted]
    found = path_scalars(source, indices, strides=(), first_order=False)
    if len(found.loss) < 2:
        raise InputError(
            f"{run.path}: the predictions are NaN or infinite from its first steps: there is no "
            "path to follow"
        )
    seen = np.array([source.steps[k] for k in indices[: len(found.loss)]])
    return Trajectory.along(
        run=run.name,
        path=str(run.path),
        optimizer=run.info.optimizer,
        probe=None if run.probe is None else run.probe.fingerprint,
        clock=clock,
        start=InitialPredictions.of(source.point(indices[0]), source.likelihood, source.sigma2),
        steps=seen,
        loss=np.array(found.loss),
        energy=_energy(run.steps, seen),
        a=np.array(found.a),
        tau=_tau(str(run.path), run.steps, run.info.batch_size, clock, seen),
        step_unit=run.info.step_unit,
        settings=recorded_settings(run),
        source=run,
    )


def _tau(
    path: str, curve: pd.DataFrame, batch_size: int | None, clock: str, steps: np.ndarray
) -> np.ndarray:
    """Durations between these steps on a clock, from a run's training curve."""
    record = Run(path, Path(path), "", RunInfo(batch_size=batch_size), curve, [])
    try:
        return td.durations(record.clock_readings(clock, steps))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"{path}: clock {clock!r}: {error}") from None


def _energy(curve: pd.DataFrame, steps: np.ndarray) -> np.ndarray | None:
    """Joules drawn up to these steps since the first of them; None unless every step between logged
    them."""
    if "energy" not in curve:
        return None
    joules = (
        pd.to_numeric(curve["energy"], errors="coerce")
        .reindex(np.arange(steps[0] + 1, steps[-1] + 1))
        .to_numpy(float)
    )
    return (
        None
        if np.isnan(joules).any()
        else np.concatenate([[0.0], np.cumsum(joules)])[steps - steps[0]]
    )
