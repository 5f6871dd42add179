"""What of a run's dissipation was noise, and what went somewhere: the outputs lens's replicas and
products of displacements apart in time (theory §11)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import pandas as pd

from thermo_opt import noise
from thermo_opt.lenses.lags import ADJACENT, Products, coordinates
from thermo_opt.lenses.predictions import RecordedPredictions
from thermo_opt.noise import Estimate
from thermo_opt.runs.replicas import Replica
from thermo_opt.runs.run import RunInfo

_STRETCHES = 12
"""Stretches of a run that the split is told for, at most."""
_SIGMAS = 3.0
"""Standard errors by which the drift of a stretch should stand out for a critical batch size: a
run whose whole drift stands out by n times as many is cut into n² stretches."""
_USUAL = 0.9
"""Momentum of most optimizers that have one."""
_MUCH = 3.0
"""Times by which the error of long lags must be smaller for them to be preferred to the balance,
which is free of their bias."""
_NONE = 1e-3
"""Share of noise in what noise and drift dissipate below which replicas made the same steps: a
schedule between a replica and its step, and rounding, feign as much."""
_LEAST_REPLICAS = 3
"""Replicas in a stretch, at least."""


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
        transport_lag: Steps apart of the displacements it was read from; 1 for neighbours.
        housekeeping: The rest of the drift, which undoes earlier noise; None where either is.
        housekeeping_error: Its standard error.
        critical_batch: B* = B·Q_noise/Q_drift, for an optimizer without momentum: momentum mixes
            earlier minibatches into the drift. None there, and where drift or batch size is not
            told.
        critical_batch_error: Its standard error.
        replicas: Replica steps recorded.
        reason: Why a part is None, in a sentence; None where all are told.
        memory: M, the optimizer's memory in steps, 1/(1−μ).
        curve: Noise, drift and transport per step in stretches of the run, columns ``step,
            step_end`` and each with its ``_error``, NaN where a stretch can't tell; empty without
            replicas.
        critical: The critical batch size in (fewer, so that drift is told) stretches, columns
            ``step, step_end, noise, drift, critical_batch`` with errors, and
            ``critical_batch_lower``, B* at least (two standard errors off), also where drift is not
            told; empty without replicas or batch size, and with momentum.
    """

    noise: float | None
    noise_error: float | None
    drift: float | None
    drift_error: float | None
    transport: float | None
    transport_error: float | None
    transport_lag: float | None
    housekeeping: float | None
    housekeeping_error: float | None
    critical_batch: float | None
    critical_batch_error: float | None
    replicas: int
    reason: str | None
    memory: float
    curve: pd.DataFrame = field(repr=False, compare=False)
    critical: pd.DataFrame = field(repr=False, compare=False)

    @property
    def scatters(self) -> bool:
        """Whether replicas made other steps than the run's own: no full batches."""
        return scatters(self.noise or 0.0, self.drift or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary, without the curves."""
        tables = ("curve", "critical")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in tables}


def scatters(noise: float, drift: float) -> bool:
    """Whether noise stands out from none beside this drift."""
    return noise > _NONE * (noise + max(drift, 0.0))


@dataclass(frozen=True)
class _Samples:
    """Noise and drift per step as sampled, (K,) each, at the replicas; or drift at every step, as
    the ``rest`` of its dissipation."""

    noise: np.ndarray
    noise_at: np.ndarray
    drift: np.ndarray
    drift_at: np.ndarray
    rest: bool

    def sums(self, end: int, start: int = 0) -> dict[str, Estimate]:
        """Over a stretch; the drift of every step shares the error of the noise it is freed of."""
        if not len(self.noise):
            return dict.fromkeys(("noise", "drift"), Estimate(np.nan, np.nan))
        apart = noise.over_run(self.noise, self.noise_at, end, start)
        drift = noise.over_run(self.drift, self.drift_at, end, start)
        if self.rest:
            drift = Estimate(drift.value, float(np.hypot(drift.error, apart.error)))
        return {"noise": apart, "drift": drift}


def measure_split(
    source: RecordedPredictions,
    replicas: Sequence[Replica],
    products: Products,
    a: np.ndarray,
    steps: np.ndarray,
    memory: float,
    batch_size: int | None,
) -> Split | None:
    """The split of a run's dissipation, or None where neither replicas nor its path tell anything.

    Args:
        source: The run's recorded predictions, whose family the replicas' are of.
        replicas: Its recorded replica steps.
        products: Of displacements along the audited path (`lags`).
        a: (K,) squared lengths of the audited intervals, nats.
        steps: (K+1,) step numbers of the audited snapshots.
        memory: The optimizer's memory in steps, 1/(1−μ).
        batch_size: Loss terms per step, where known.
    """
    if source.likelihood == "heteroscedastic":
        return None
    total = int(steps[-1])
    found = [r for r in replicas if steps[0] <= r.step < total]
    sampled = _samples(source, found, a, steps)
    moved = _transport(products, sampled, steps, memory)
    if not found and moved is None:
        return None
    apart, drift = sampled.sums(total).values()
    resolved = moved is not None and moved.total.significant
    unknown = Estimate(np.nan, np.nan)
    way = moved.total if moved is not None else unknown
    rest = _housekeeping(drift, way, moved) if resolved else unknown
    scattered = scatters(apart.value, drift.value)
    scale = float(batch_size or np.nan) if memory <= 1 and scattered else np.nan
    batch = noise.ratio(apart, drift, scale) if drift.significant and scattered else unknown
    curve = _curve(sampled, moved, total)
    return Split(
        noise=_number(apart.value),
        noise_error=_number(apart.error),
        drift=_number(drift.value),
        drift_error=_number(drift.error),
        transport=way.value if resolved else None,
        transport_error=_number(way.error),
        transport_lag=moved.lag if moved is not None and resolved else None,
        housekeeping=_number(rest.value),
        housekeeping_error=_number(rest.error),
        critical_batch=_number(batch.value),
        critical_batch_error=_number(batch.error),
        replicas=len(found),
        reason=_reason(found, moved, batch_size, memory, scattered),
        memory=memory,
        curve=curve,
        critical=critical_table(curve, scale),
    )


def _samples(
    source: RecordedPredictions, replicas: Sequence[Replica], a: np.ndarray, steps: np.ndarray
) -> _Samples:
    """Noise from the replicas, drift from the more precise of two: the replicas, or, where every
    step was recorded, what is left of each step's dissipation."""
    pairs = np.array([_noise_and_drift(source, r) for r in replicas]).reshape(-1, 2)
    at = np.array([r.step for r in replicas])
    alone = _Samples(pairs[:, 0], at, pairs[:, 1], at, False)
    if not len(pairs) or not bool((np.diff(steps) == 1).all()):
        return alone
    scatter = np.interp(steps[:-1], at, pairs[:, 0])
    rest = _Samples(pairs[:, 0], at, 0.5 * a - scatter, steps[:-1], True)
    errors = [s.sums(int(steps[-1]))["drift"].error for s in (rest, alone)]
    return rest if errors[0] <= errors[1] else alone


def _transport(
    products: Products, sampled: _Samples, steps: np.ndarray, memory: float
) -> noise.Transport | None:
    """From the balance of fluctuations, where the optimizer has no memory and every step was
    recorded; from long lags otherwise, or where these are far more precise, or where a path that
    goes to and fro makes the balance the small difference of two large numbers."""
    gaps = np.diff(steps)
    if not len(gaps) or not (gaps[:-1] == gaps[0]).all():
        return None
    lasting = noise.lasting_transport(products, steps, memory)
    if memory > 1 or gaps[0] != 1 or not len(sampled.noise):
        return lasting
    total = int(steps[-1])
    shared = noise.over_run(sampled.noise, sampled.noise_at, total).error if sampled.rest else 0.0
    balanced = noise.balanced_transport(
        [(int(steps[k]), x) for k, x in products.get(ADJACENT, [])],
        sampled.drift,
        sampled.drift_at,
        total,
        shared,
    )
    if balanced is None or lasting is None:
        return balanced or lasting
    rough = balanced.total.error > _MUCH * lasting.total.error
    return lasting if rough or noise.oscillates(products, steps) else balanced


def _housekeeping(drift: Estimate, way: Estimate, moved: noise.Transport | None) -> Estimate:
    # balanced: ½(drift − ½⟨δ,δ₊⟩), whose error is that of the transport
    error = way.error if moved is not None and moved.balanced else np.hypot(drift.error, way.error)
    return Estimate(drift.value - way.value, float(error))


def _reason(
    found: Sequence[Replica],
    moved: noise.Transport | None,
    batch_size: int | None,
    memory: float,
    scattered: bool,
) -> str | None:
    said = []
    if not found:
        said.append("noise and drift are unknown without replicas: record with Recorder(replica=…)")
    if moved is None:
        said.append("transport is unknown: the recorded path is too short, or unevenly recorded")
    elif not moved.total.significant:
        said.append(
            f"transport can't be told from zero: {moved.total.value:.2g} ± {moved.total.error:.2g} "
            "nats"
        )
    if found and memory > 1:
        said.append("the critical batch size is not told with momentum, which mixes minibatches")
    elif found and not scattered:
        said.append(
            "replicas made the same steps: full batches have no noise to read a critical batch "
            "size from"
        )
    elif found and batch_size is None:
        said.append("the critical batch size needs the batch size: record with batch_size=…")
    if moved is not None and moved.total.significant and moved.grows:
        said.append(
            "transport is a lower bound: products further apart in time than this record allows "
            "would be larger"
        )
    return "; ".join(said) or None


def _curve(sampled: _Samples, moved: noise.Transport | None, total: int) -> pd.DataFrame:
    """The split per step in at most so many stretches with equally many replicas."""
    at = sampled.noise_at
    rows = []
    count = min(_STRETCHES, max(1, len(at) // _LEAST_REPLICAS), len(at))
    for part in np.array_split(np.arange(len(at)), count) if count else ():
        start = int(at[part[0]])
        end = total if part[-1] == len(at) - 1 else int(at[part[-1] + 1])
        found = sampled.sums(end, start) | {"transport": Estimate(np.nan, np.nan)}
        if moved is not None:
            found["transport"] = noise.over_run(moved.rate, moved.step, end, start)
        row: dict[str, float] = {"step": start, "step_end": end}
        for key, estimate in found.items():
            row[key] = estimate.value / (end - start)
            row[f"{key}_error"] = estimate.error / (end - start)
        rows.append(row)
    keys = [key + tail for key in ("noise", "drift", "transport") for tail in ("", "_error")]
    return pd.DataFrame(rows, columns=["step", "step_end", *keys])


def critical_table(curve: pd.DataFrame, scale: float) -> pd.DataFrame:
    """B*, ``scale`` times noise over drift, from a split's curve: its stretches joined to as
    many as are likely to be told apart from zero. Columns as `Split.critical`."""
    span = (curve["step_end"] - curve["step"]).to_numpy(float)
    way = _summed(curve, "drift", span)
    count = 0
    if np.isfinite(scale) and np.isfinite(way.value):
        sigmas = way.value / way.error if way.error > 0 else np.inf
        count = int(min(len(span), max(1.0, max(sigmas / _SIGMAS, 0.0) ** 2)))
    rows = []
    for part in np.array_split(np.arange(len(span)), count) if count else ():
        length = span[part].sum()
        row = {"step": curve["step"].iloc[part[0]], "step_end": curve["step_end"].iloc[part[-1]]}
        apart, here = (
            _summed(curve.iloc[part], key, span[part] / length) for key in ("noise", "drift")
        )
        star = noise.ratio(apart, here, scale) if here.significant else Estimate(np.nan, np.nan)
        above = max(here.value, 0.0) + 2 * here.error
        below = max(apart.value - 2 * apart.error, 0.0)
        row |= {"noise": apart.value, "noise_error": apart.error}
        row |= {"drift": here.value, "drift_error": here.error}
        row |= {"critical_batch": star.value, "critical_batch_error": star.error}
        rows.append(row | {"critical_batch_lower": scale * below / above if above > 0 else np.nan})
    keys = [k + e for k in ("noise", "drift", "critical_batch") for e in ("", "_error")]
    return pd.DataFrame(rows, columns=["step", "step_end", *keys, "critical_batch_lower"])


def _summed(curve: pd.DataFrame, key: str, weights: np.ndarray) -> Estimate:
    value, error = curve[key].to_numpy(float), curve[f"{key}_error"].to_numpy(float)
    return Estimate(float(weights @ value), float(np.sqrt(weights**2 @ np.nan_to_num(error) ** 2)))


def _noise_and_drift(source: RecordedPredictions, replica: Replica) -> tuple[float, float]:
    parts = replica.load()
    before, step, other = (
        coordinates(source.recorded_point(parts[name], str(replica.path)), source.likelihood)
        for name in ("before", "step", "replica")
    )
    return noise.noise_and_drift(step - before, replica.lr_ratio * (other - before))


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def memory(info: RunInfo) -> float:
    """An optimizer's memory in steps: 1/(1−μ) of its momentum or first moment; 1 for one that has
    none, and 10 where the record doesn't say."""
    settings = info.settings
    betas = info.betas
    beta = betas[0] if betas is not None else settings.get("momentum")
    if beta is None:
        beta = 0.0 if info.optimizer == "SGD" else _USUAL
    return 1 / (1 - beta) if isinstance(beta, int | float) and 0 <= beta < 1 else 1 / (1 - _USUAL)
