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

import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from thermo_opt import thermodynamics as td
from thermo_opt.audits.results import Audit
from thermo_opt.errors import InputError
from thermo_opt.lenses.replay import targets_of
from thermo_opt.manifold import Point, embed, row_distances
from thermo_opt.manifold.start import Start
from thermo_opt.runs import Run
from thermo_opt.runs.run import RunInfo

_BLOCK_BYTES = 1 << 18
"""Predictions embedded at a time by `read_track`: enough to spread NumPy's overheads, few enough
for the cache."""


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
class Track:
    """A run's line: ``steps``, ``loss`` (nats), ``time`` and ``dissipation`` since the start, each
    (K+1,) over snapshots; ``energy``, joules since the start, where each step logged them."""

    run: str
    path: str
    optimizer: str | None
    probe: str | None
    clock: str
    start: Start
    steps: np.ndarray
    loss: np.ndarray
    time: np.ndarray
    dissipation: np.ndarray
    energy: np.ndarray | None = None

    @property
    def best(self) -> float:
        """The lowest loss at any snapshot (nats)."""
        return float(np.min(self.loss))

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


def track_of(audit: Audit, clock: str | None = None) -> Track:
    """The line of an audited run, from its outputs lens; ``clock``: another one than it was audited
    on.

    Raises InputError naming the run when it has no outputs lens, no targets, or no readings of that
    clock.
    """
    lens = audit.lenses.get("outputs")
    if lens is None:
        reason = audit.missing.get("outputs", "it was audited through other lenses only")
        raise InputError(f"{audit.run}: a speed-cost front needs the outputs lens: {reason}")
    steps = np.append(lens.steps["step"].to_numpy(), lens.steps["step_end"].iloc[-1])
    loss = np.append(lens.steps["loss"].to_numpy(), lens.steps["loss_end"].iloc[-1])
    tau = lens.steps["tau"].to_numpy()
    if clock is not None and clock != lens.summary["clock"]:
        try:
            tau = _tau(audit.path, audit.curve, None, clock, steps)
        except (
            InputError
        ) as error:  # a reading of the whole record may know more, a constant batch size for one
            raise InputError(f"{error}; or audit it with clock={clock!r}") from None
    return _track(
        audit.run,
        audit.path,
        audit.optimizer,
        audit.probe,
        clock or lens.summary["clock"],
        lens.start,
        steps,
        loss,
        lens.steps["a"].to_numpy(),
        tau,
        _energy(audit.curve, steps),
    )


def read_track(run: Run, clock: str = "step") -> Track:
    """The line of a run from the predictions it recorded: what `track_of` its audit gives, without
    the audit's other work.

    Raises InputError as `track_of`, and for a run without recorded predictions. Cost: one reading
    of the snapshots.
    """
    likelihood, sigma2 = run.info.likelihood or "categorical", run.info.sigma2 or 1.0
    if len(run.snapshots) < 2 or "probe/logits" not in run.snapshots[0].names():
        raise InputError(
            f"{run.path}: a speed-cost front needs predictions recorded on a probe at two steps at "
            "least"
        )
    targets = targets_of(run.probe)
    if targets is None:
        raise InputError(
            f"{run.path}: the probe has no targets, so the run has no loss; record it with targets"
        )
    block = max(2, _BLOCK_BYTES // (8 * max(1, math.prod(run.snapshots[0].shape("probe/logits")))))
    start: Start | None = None
    loss: list[float] = []
    a: list[float] = []
    held: list[np.ndarray] = []
    for begin in range(0, len(run.snapshots), block):
        held += [
            _array(snapshot.load("probe/logits"))
            for snapshot in run.snapshots[begin : begin + block]
        ]
        found = _walk(np.stack(held), targets, likelihood, sigma2, str(run.path))
        start = start or found.start
        loss += found.loss[1:] if loss else found.loss
        a += found.a
        if len(found.loss) < len(held):
            break
        held = held[-1:]
    if len(loss) < 2:
        raise InputError(
            f"{run.path}: the predictions are NaN or infinite from its first steps: there is no "
            "path to follow"
        )
    steps = np.array([snapshot.step for snapshot in run.snapshots[: len(loss)]])
    tau = _tau(str(run.path), run.steps, run.info.batch_size, clock, steps)
    probe = None if run.probe is None else run.probe.fingerprint
    energy = _energy(run.steps, steps)
    return _track(
        run.name,
        str(run.path),
        run.info.optimizer,
        probe,
        clock,
        start,
        steps,
        np.array(loss),
        np.array(a),
        tau,
        energy,
    )


class _Walked(NamedTuple):
    start: Start | None
    loss: list[float]
    a: list[float]


def _walk(
    outputs: np.ndarray, targets: np.ndarray, likelihood: str, sigma2: float, source: str
) -> _Walked:
    """The start, the losses and the squared distances of predictions (K+1, n, …), up to the first
    that isn't finite."""
    count = len(outputs)
    tiled = np.broadcast_to(targets, (count, *targets.shape)).reshape(-1, *targets.shape[1:])
    try:
        whole = embed(
            outputs.reshape(-1, *outputs.shape[2:]), tiled, likelihood=likelihood, sigma2=sigma2
        )
    except InputError as error:
        raise InputError(f"{source}: {error}") from None
    if not whole.finite:
        finite = np.isfinite(whole.u).reshape(count, -1).all(axis=1)
        count = count if finite.all() else int(np.argmin(finite))
        if count == 0:
            return _Walked(None, [], [])
    examples, rows = whole.examples // len(outputs), len(whole.u) // len(outputs)
    assert whole.loss is not None
    loss = whole.loss.reshape(len(outputs), -1)[:count].sum(axis=1) / examples

    def part(first: int, last: int) -> Point:
        at = slice(first * rows, last * rows)
        log_y = None if whole.log_amplitude_y is None else whole.log_amplitude_y[at]
        return Point(
            whole.u[at],
            examples,
            log_y,
            None if whole.residual is None else whole.residual[at],
            finite=whole.finite,
        )

    distance = row_distances(part(0, count - 1), part(1, count), likelihood).reshape(
        count - 1, rows
    )
    a = np.einsum("ij,ij->i", distance, distance) / examples
    return _Walked(Start.of(part(0, 1), likelihood, sigma2), loss.tolist(), a.tolist())


def _array(outputs: Tensor) -> np.ndarray:
    half = outputs.dtype in (torch.bfloat16, torch.float16)
    return (outputs.float() if half else outputs).detach().numpy()


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


def _track(
    run: str,
    path: str,
    optimizer: str | None,
    probe: str | None,
    clock: str,
    start: Start | None,
    steps: np.ndarray,
    loss: np.ndarray,
    a: np.ndarray,
    tau: np.ndarray,
    energy: np.ndarray | None,
) -> Track:
    if start is None or np.isnan(loss).any():
        raise InputError(
            f"{run}: the probe has no targets, so the run has no loss; record it with targets"
        )
    try:
        q = td.dissipation(a, tau)
    except ValueError as error:
        raise InputError(f"{run}: clock {clock!r}: {error}") from None

    def total(values: np.ndarray) -> np.ndarray:
        return np.concatenate([[0.0], np.cumsum(values)])

    return Track(
        run, path, optimizer, probe, clock, start, steps, loss, total(tau), total(q), energy
    )
