"""From per-interval scalars to an audit of one lens: the summary's arithmetic, the same for every
lens."""

from __future__ import annotations

import numpy as np
import pandas as pd

from thermo_opt import thermodynamics as td
from thermo_opt.errors import InputError
from thermo_opt.lenses.measurements import Measurements
from thermo_opt.lenses.results import LensAudit, Summary
from thermo_opt.manifold.precision import ABOVE

_LEAST_ROUNDING = 1e-6
"""Relative excess of D* over D that is rounding; any larger would be a mistake worth seeing."""


def summarise(measured: Measurements, run: str, lens: str, clock: str) -> LensAudit:
    """The tidy table, summary and coarse curves of what a lens saw. Every figure is arithmetic of
    §2-5."""
    for k in np.flatnonzero((measured.tau == 0) & (measured.a > 0)):
        raise InputError(
            f"{run}: clock {clock!r} stands still from step {measured.step[k]} to "
            f"{measured.step_end[k]} while the run moves: use another clock"
        )
    q = td.dissipation(measured.a, measured.tau)
    parts = td.decompose(measured.a, measured.tau, measured.distance)
    a_alignment = measured.a if measured.a_alignment is None else measured.a_alignment
    lower, upper = td.alignment_bracket(
        a_alignment, measured.d, measured.delta_lower, measured.delta_upper
    )
    known = np.isfinite(lower)
    low = td.mean_alignment(lower, q)
    high = td.mean_alignment(upper, q)
    # a point value only where the bracket is narrow enough to print as one number
    point = None if low is None or high is None or high - low > 0.1 else 0.5 * (low + high)
    notes = list(measured.notes)
    if known.any() and not known.all():
        notes.append(
            f"alignment is undefined in {int((~known).sum())} of {len(known)} intervals (nothing "
            "moved)"
        )

    def whole(value: float | None) -> float | None:
        return value if measured.path else None

    def nats(value: float | None) -> float | None:
        return whole(value) if measured.nats else None

    steps = pd.DataFrame(
        {
            "step": measured.step,
            "step_end": measured.step_end,
            "tau": measured.tau,
            "a": measured.a if measured.nats else np.nan,
            "d": measured.d,
            "delta_lower": measured.delta_lower if measured.nats else np.nan,
            "delta_upper": measured.delta_upper if measured.nats else np.nan,
            "alignment_lower": lower,
            "alignment_upper": upper,
            "dissipation": q if measured.nats else np.nan,
            "loss": measured.loss,
            "loss_end": measured.loss_end,
            **measured.extra,
        }
    )
    stride = float(np.median(measured.step_end - measured.step))
    summary = Summary(
        {
            "run": run,
            "lens": lens,
            "clock": clock,
            "stride": stride,
            "steps": len(steps),
            "duration": whole(parts.duration),
            "loss_start": _number(measured.loss[0]),
            "loss_end": _number(measured.loss_end[-1]),
            "dissipation": nats(parts.dissipation),
            "length": nats(parts.length),
            "distance": nats(parts.distance),
            "least_distance": nats(_below(measured.least_distance, parts.distance)),
            "irreducible": nats(parts.irreducible),
            "detour": nats(parts.detour),
            "pacing": nats(parts.pacing),
            "straightness": whole(parts.straightness),
            "steadiness": whole(parts.steadiness),
            "efficiency": whole(parts.efficiency),
            "alignment": point,
            "alignment_lower": low,
            "alignment_upper": high,
            "split": None if measured.split is None else measured.split.to_dict(),
            "notes": notes,
        }
    )
    points = _coarse_points(measured)
    scale = 1.0 if measured.nats else np.nan
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
        _exponent(points, measured.floor),
        measured.attribution,
        measured.landmarks,
        measured.start,
    )


def _exponent(points: list[td.CoarsePoint], floor: float) -> float | None:
    """H, or None where the shortest chords lie at the rounding floor, which looks like diffusion
    (§4)."""
    if points and points[0].a_mean < ABOVE * floor:
        return None
    return td.hurst_exponent(points)


def _coarse_points(measured: Measurements) -> list[td.CoarsePoint]:
    elapsed = np.concatenate([[0.0], np.cumsum(measured.tau)])
    points = []
    for m, chords in sorted(measured.chords.items()):
        first, last, a = (np.array(column) for column in zip(*chords, strict=True))
        # guard the difference of cumulative sums against rounding below a single interval's τ
        tau = measured.tau[first] if m == 1 else elapsed[last] - elapsed[first]
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
