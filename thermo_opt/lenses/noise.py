"""What of a run's dissipation was noise, and what went somewhere: the outputs lens's replicas and
long lags (theory §11)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from thermo_opt import noise
from thermo_opt.lenses.predictions import RecordedPredictions
from thermo_opt.manifold import Point
from thermo_opt.manifold.predictive import ON_SPHERES
from thermo_opt.runs.replicas import Replica

Chords = Mapping[int, Sequence[tuple[int, int, float]]]


@dataclass(frozen=True)
class Split:
    """Dissipation over a run's steps (nats, clock ``step``), and where it comes from (§11).

    Attributes:
        noise: Q_noise, what minibatches scatter; None without replicas.
        noise_error: Its standard error.
        drift: Q_drift, what the expected steps dissipate; None without replicas.
        drift_error: Its standard error.
        transport: The part of the drift that goes somewhere; None where the path can't tell.
        transport_error: Its standard error, also where the part itself is not told.
        housekeeping: The rest of the drift, which undoes earlier noise; None where either is.
        replicas: Replica steps recorded.
    """

    noise: float | None
    noise_error: float | None
    drift: float | None
    drift_error: float | None
    transport: float | None
    transport_error: float | None
    housekeeping: float | None
    replicas: int

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


def measure_split(
    source: RecordedPredictions,
    replicas: Sequence[Replica],
    chords: Chords,
    steps: np.ndarray,
    memory: float,
) -> Split | None:
    """The split of a run's dissipation, or None where neither replicas nor its path tell anything.

    Args:
        source: The run's recorded predictions, whose family the replicas' are of.
        replicas: Its recorded replica steps.
        chords: Chords of the audited path, per stride.
        steps: Step numbers of the audited snapshots.
        memory: The optimizer's memory in steps, 1/(1−μ).
    """
    if source.likelihood == "heteroscedastic":
        return None
    total = int(steps[-1])
    found = [r for r in replicas if r.step < total]
    apart, drift = noise.Estimate(np.nan, np.nan), noise.Estimate(np.nan, np.nan)
    if found:
        pairs = np.array([_noise_and_drift(source, replica) for replica in found])
        at = [replica.step for replica in found]
        apart, drift = (noise.over_run(column, at, total) for column in pairs.T)
    stride = np.diff(steps)
    moved = None
    if len(stride) and (stride[:-1] == stride[0]).all():
        moved = noise.transport(chords, float(stride[0]), memory)
    if not found and moved is None:
        return None
    told = moved is not None and moved.told
    housekeeping = drift.value - moved.value if found and moved is not None and told else None
    return Split(
        noise=_number(apart.value),
        noise_error=_number(apart.error),
        drift=_number(drift.value),
        drift_error=_number(drift.error),
        transport=moved.value if moved is not None and told else None,
        transport_error=None if moved is None else _number(moved.error),
        housekeeping=housekeeping,
        replicas=len(found),
    )


def _noise_and_drift(source: RecordedPredictions, replica: Replica) -> tuple[float, float]:
    parts = replica.load()
    before, step, other = (
        _coordinates(source.recorded_point(parts[name], str(replica.path)), source.likelihood)
        for name in ("before", "step", "replica")
    )
    return noise.noise_and_drift(step - before, other - before)


def _coordinates(point: Point, likelihood: str) -> np.ndarray:
    """(n, width) coordinates whose small displacements have the Fisher-Rao length."""
    u = 2 * point.u if likelihood in ON_SPHERES else point.u
    if point.weights is not None:
        u = u * np.sqrt(point.weights)[:, None]
    return u.reshape(point.examples, -1) if len(u) % point.examples == 0 else u


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
