"""From per-interval scalars to an audit of one lens: the summary's arithmetic, the same for every
lens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from thermo_opt import thermodynamics as td
from thermo_opt.errors import InputError
from thermo_opt.lenses.results import Landmarks, LensAudit, Summary
from thermo_opt.manifold.start import Start

_LEAST_ROUNDING = 1e-6
"""Relative excess of D* over D that is rounding; any larger would be a mistake worth seeing."""


@dataclass
class Measurements:
    """What a lens saw of a run, before any thermodynamics. Arrays over K audited intervals; losses
    in nats.

    ``step``, ``step_end``, ``tau``, ``a``, ``d``; ``delta_lower``/``delta_upper`` bracket Δ;
    ``loss``/``loss_end`` at each interval's ends; ``distance`` D and ``least_distance`` D* (None
    when unknown). ``nats`` False when the metric's scale is unknown: ratios are reported,
    quantities in nats are not. ``a_alignment``: a in Δ's metric, where it isn't ``a``'s. ``path``
    False when the intervals don't follow one another: then there is no path to sum over. ``chords``
    (see `outputs.Walk`) makes the coarse curves.
    """

    step: np.ndarray
    step_end: np.ndarray
    tau: np.ndarray
    a: np.ndarray
    d: np.ndarray
    delta_lower: np.ndarray
    delta_upper: np.ndarray
    loss: np.ndarray
    loss_end: np.ndarray
    distance: float | None
    least_distance: float | None = None
    a_alignment: np.ndarray | None = None
    nats: bool = True
    path: bool = True
    notes: list[str] = field(default_factory=list)
    chords: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)
    landmarks: Landmarks | None = None
    start: Start | None = None
    attribution: pd.DataFrame | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)


def lens_audit(seen: Measurements, run: str, lens: str, clock: str) -> LensAudit:
    """The tidy table, summary and coarse curves of what a lens saw. Every figure is arithmetic of
    §2-5."""
    for k in np.flatnonzero((seen.tau == 0) & (seen.a > 0)):
        raise InputError(
            f"{run}: clock {clock!r} stands still from step {seen.step[k]} to {seen.step_end[k]} "
            "while the run moves: "
            "use another clock"
        )
    q = td.dissipation(seen.a, seen.tau)
    parts = td.decompose(seen.a, seen.tau, seen.distance)
    a_alignment = seen.a if seen.a_alignment is None else seen.a_alignment
    lower, upper = td.alignment_bracket(a_alignment, seen.d, seen.delta_lower, seen.delta_upper)
    known = np.isfinite(lower)
    low = td.mean_alignment(lower, q)
    high = td.mean_alignment(upper, q)
    # a point value only where the bracket is narrow enough to print as one number
    point = None if low is None or high is None or high - low > 0.1 else 0.5 * (low + high)
    notes = list(seen.notes)
    if known.any() and not known.all():
        notes.append(
            f"alignment is undefined in {int((~known).sum())} of {len(known)} intervals (nothing "
            "moved)"
        )

    def whole(value: float | None) -> float | None:
        return value if seen.path else None

    def nats(value: float | None) -> float | None:
        return whole(value) if seen.nats else None

    steps = pd.DataFrame(
        {
            "step": seen.step,
            "step_end": seen.step_end,
            "tau": seen.tau,
            "a": seen.a if seen.nats else np.nan,
            "d": seen.d,
            "delta_lower": seen.delta_lower if seen.nats else np.nan,
            "delta_upper": seen.delta_upper if seen.nats else np.nan,
            "alignment_lower": lower,
            "alignment_upper": upper,
            "dissipation": q if seen.nats else np.nan,
            "loss": seen.loss,
            "loss_end": seen.loss_end,
            **seen.extra,
        }
    )
    stride = float(np.median(seen.step_end - seen.step))
    summary = Summary(
        {
            "run": run,
            "lens": lens,
            "clock": clock,
            "stride": stride,
            "steps": len(steps),
            "duration": whole(parts.duration),
            "loss_start": _number(seen.loss[0]),
            "loss_end": _number(seen.loss_end[-1]),
            "dissipation": nats(parts.dissipation),
            "length": nats(parts.length),
            "distance": nats(parts.distance),
            "least_distance": nats(_below(seen.least_distance, parts.distance)),
            "irreducible": nats(parts.irreducible),
            "detour": nats(parts.detour),
            "pacing": nats(parts.pacing),
            "straightness": whole(parts.straightness),
            "steadiness": whole(parts.steadiness),
            "efficiency": whole(parts.efficiency),
            "alignment": point,
            "alignment_lower": low,
            "alignment_upper": high,
            "notes": notes,
        }
    )
    points = _coarse_points(seen)
    scale = 1.0 if seen.nats else np.nan
    coarse = pd.DataFrame(
        {
            "stride": [p.stride for p in points],
            "stride_steps": [p.stride * stride for p in points],
            "length": [p.length * scale for p in points],
            "dissipation": [p.dissipation * scale for p in points],
            "a_mean": [p.a_mean * scale for p in points],
        }
    )
    return LensAudit(
        lens,
        steps,
        summary,
        coarse,
        td.hurst_exponent(points),
        seen.attribution,
        seen.landmarks,
        seen.start,
    )


def _coarse_points(seen: Measurements) -> list[td.CoarsePoint]:
    elapsed = np.concatenate([[0.0], np.cumsum(seen.tau)])
    points = []
    for m, chords in sorted(seen.chords.items()):
        first, last, a = (np.array(column) for column in zip(*chords, strict=True))
        # guard the difference of cumulative sums against rounding below a single interval's τ
        tau = seen.tau[first] if m == 1 else elapsed[last] - elapsed[first]
        points.append(td.coarse_point(m, a, tau, whole=last - first == m))
    return points


def _below(least_distance: float | None, distance: float | None) -> float | None:
    """D* ≤ D also in rounding: where predictions saturate, D* has half of the loss's digits
    only."""
    if (
        least_distance is None
        or distance is None
        or least_distance > distance * (1 + _LEAST_ROUNDING) + _LEAST_ROUNDING**2
    ):
        return least_distance
    return min(least_distance, distance)


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def loss_columns(losses: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Losses at K+1 snapshots as columns at the start and the end of each of the K intervals."""
    values = np.asarray(losses, dtype=np.float64)
    return values[:-1], values[1:]
