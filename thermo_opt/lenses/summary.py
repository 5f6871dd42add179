"""From per-interval scalars to an audit of one lens: the summary's arithmetic, the same for every
lens (§2-5), and that of Adam's metric (§9)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd

from thermo_opt import thermodynamics as td
from thermo_opt.errors import InputError
from thermo_opt.lenses.counterfactual import CounterfactualMeasurements
from thermo_opt.lenses.measurements import AdamMeasurements, Measurements
from thermo_opt.lenses.results import SUMMARY_KEYS, LensAudit, Summary
from thermo_opt.manifold.precision import ABOVE

_LEAST_ROUNDING = 1e-6
"""Relative excess of D* over D that is rounding; any larger would be a mistake worth seeing."""
_MOTIONLESS = 1e-28
"""Squared lengths below this are rounding."""
_NARROW = 0.1
"""Width up to which a bracket is also printed as one number, its middle."""


def summarise(
    measured: Measurements | AdamMeasurements | CounterfactualMeasurements,
    run: str,
    lens: str,
    clock: str,
    step_unit: str = "step",
) -> LensAudit:
    """The tidy table, summary and coarse curves of what a lens measured.

    Args:
        measured: What it measured.
        run: The run's name.
        lens: The lens's name.
        clock: The clock of ``measured.tau``.
        step_unit: What the run's step numbers count; only where it is ``"step"`` can an interval
            be one optimizer step.

    Raises:
        InputError: When the clock stands still while the run moves.
    """
    if isinstance(measured, CounterfactualMeasurements):
        return _counterfactual(measured, run, lens, clock, step_unit)
    if isinstance(measured, AdamMeasurements):
        return _adam(measured, run, lens, clock, step_unit)
    _refuse_standing_clock(run, clock, measured, measured.a)
    one_step = _one_step(measured, step_unit)
    q = td.dissipation(measured.a, measured.tau)
    parts = td.decompose(
        measured.a, measured.tau, measured.distance if measured.decomposed else None
    )
    if not measured.decomposed and measured.distance is not None and parts.duration > 0:
        straight = measured.distance**2 / (2 * parts.duration)
        parts = replace(parts, distance=measured.distance, irreducible=straight)
    lower, upper = td.alignment_bracket(
        measured.a if measured.a_alignment is None else measured.a_alignment,
        measured.d,
        measured.delta_lower,
        measured.delta_upper,
    )
    known = np.isfinite(lower)
    aligned = known & one_step
    columns = {
        "step": measured.step,
        "step_end": measured.step_end,
        "tau": measured.tau,
        "a": measured.a,
        "d": measured.d,
        "delta_lower": measured.delta_lower,
        "delta_upper": measured.delta_upper,
        "alignment_lower": np.where(aligned, lower, np.nan),
        "alignment_upper": np.where(aligned, upper, np.nan),
        "dissipation": q,
        "loss": measured.loss,
        "loss_end": measured.loss_end,
        **measured.extra,
    }
    # over several steps the bracket is of the net displacement, not of any step (§3)
    displaced = np.where(known & ~one_step, (lower + upper) / 2, np.nan)
    certain = upper - lower <= _NARROW
    displacement = None
    if (known & ~one_step & certain).any():
        columns["displacement_alignment"] = np.where(certain, displaced, np.nan)
        displacement = td.mean_alignment(columns["displacement_alignment"], q)
    whole = _when(measured.path)
    summed = _when(measured.path and (measured.bounded or bool(one_step.all())))
    # one interval is straight whatever was between
    several = _when(len(q) > 1 and measured.path and (measured.bounded or bool(one_step.all())))
    common, notes = _common(measured, run, lens, clock, step_unit)
    if measured.split is not None and measured.split.replicas and measured.split.reason:
        notes.append(measured.split.reason)
    summary = common | {
        "sketch": measured.sketch,
        "rounding": measured.rounding,
        "duration": whole(parts.duration),
        "dissipation": summed(parts.dissipation),
        "length": summed(parts.length),
        "distance": whole(parts.distance),
        "least_distance": whole(_below(measured.least_distance, parts.distance)),
        "irreducible": whole(parts.irreducible),
        "detour": several(parts.detour),
        "pacing": several(parts.pacing),
        "straightness": several(parts.straightness),
        "steadiness": several(parts.steadiness),
        "efficiency": several(parts.efficiency),
        "displacement_alignment": displacement,
        "split": None if measured.split is None else measured.split.to_dict(),
        "notes": [*measured.notes, *notes, *_undefined(measured, known, one_step)],
    }
    if one_step.all() and known.any():
        summary |= _alignment(lower, upper, measured.d, q)
        if measured.rest is not None:
            a, d, chi2 = measured.rest
            rest, _ = td.alignment_bracket(a, d, np.zeros_like(a), chi2)
            rest = np.where(np.isfinite(rest), rest, -1.0)
            summary["held_by"] = list(measured.held_by)
            summary["alignment_lower_rest"] = td.mean_alignment(
                rest, td.dissipation(a, measured.tau)
            )
    elif known.any():
        summary["notes"].append(
            "alignment is a property of one optimizer step, and this run was not recorded at every "
            "step: it is unknown"
        )
    if measured.path and not measured.bounded and not one_step.all():
        summary["notes"].append(
            "the quadratic form of a displacement over several steps is no length of the path: its "
            "sums are left to the outputs lens"
        )
    points = _coarse_points(measured)
    coarse = pd.DataFrame(
        {
            "stride": [p.stride for p in points],
            "stride_steps": [p.stride * summary["stride"] for p in points],
            "length": [p.length for p in points],
            "dissipation": [p.dissipation for p in points],
            "a_mean": [p.a_mean for p in points],
        }
    )
    return LensAudit(
        lens,
        pd.DataFrame(columns),
        summary,
        coarse,
        _exponent(points, measured.floor),
        measured.attribution,
        measured.landmarks,
        measured.start,
        measured.split,
    )


def _adam(measured: AdamMeasurements, run: str, lens: str, clock: str, step_unit: str) -> LensAudit:
    """Alignment, straightness and steadiness in Adam's metric: ranges over the batch sizes that
    may be the run's, each within itself free of units (§9)."""
    _refuse_standing_clock(run, clock, measured, measured.paths[0].a)
    one_step = _one_step(measured, step_unit)
    epsilon = np.stack([td.alignment(p.a, p.d, p.delta) for p in measured.paths])
    epsilon[:, ~one_step] = np.nan
    q = np.stack([td.dissipation(p.a, measured.tau) for p in measured.paths])
    total = q.sum(axis=1, keepdims=True)
    shares = np.divide(q, total, out=np.full_like(q, np.nan), where=total > 0)
    parts = [td.decompose(p.a, measured.tau, p.distance) for p in measured.paths]
    common, notes = _common(measured, run, lens, clock, step_unit)
    summary = common | {
        "duration": float(measured.tau.sum()),
        "notes": [*measured.notes, *notes],
    }
    if one_step.all():
        means = [td.mean_alignment(e, w) for e, w in zip(epsilon, q, strict=True)]
        summary |= _range("adam_alignment", means)
    else:
        summary["notes"].append(
            "alignment in Adam's metric is a property of one optimizer step, and this run was not "
            "recorded at every step: it is unknown"
        )
    if len(measured.tau) > 1:
        summary |= _range("adam_straightness", [p.straightness for p in parts])
        summary |= _range("adam_steadiness", [p.steadiness for p in parts])
    steps = pd.DataFrame(
        {
            "step": measured.step,
            "step_end": measured.step_end,
            "tau": measured.tau,
            "adam_alignment_lower": epsilon.min(axis=0),
            "adam_alignment_upper": epsilon.max(axis=0),
            "adam_share_lower": shares.min(axis=0),
            "adam_share_upper": shares.max(axis=0),
            "loss": measured.loss,
            "loss_end": measured.loss_end,
        }
    )
    empty = pd.DataFrame(columns=["stride", "stride_steps", "length", "dissipation", "a_mean"])
    return LensAudit(lens, steps, summary, empty)


def _counterfactual(
    measured: CounterfactualMeasurements, run: str, lens: str, clock: str, step_unit: str
) -> LensAudit:
    """Sums over the steps looked at: what they bought, and what others would have for the same
    nats. A share compares those steps only for which the other step could be made."""
    columns: dict[str, np.ndarray] = {
        "step": measured.step,
        "step_end": measured.step + 1,
        "loss": measured.loss,
        "loss_end": measured.loss_end,
    }
    keys = ("nats", "nats_held", "decrease", "decrease_held")
    for key in keys:
        columns[key] = np.array([getattr(one, key) for one in measured.own])
    for name, prefix in (("exact", "natural"), ("kfac", "kfac")):
        for key in keys[1:]:
            columns[f"{prefix}_{key}"] = np.array(
                [np.nan if one is None else getattr(one, key) for one in measured.other[name]]
            )
    steps = pd.DataFrame(columns)
    found: dict[str, float | int | None] = {"steps": len(steps)}
    found |= {key: float(steps[key].sum()) for key in keys}
    found["held_share"] = _share(steps["nats_held"], steps["nats"])
    for prefix in ("natural", "kfac"):
        made = steps[steps[f"{prefix}_decrease"].notna()]
        for key in keys[1:]:
            found[f"{prefix}_{key}"] = float(made[f"{prefix}_{key}"].sum()) if len(made) else None
        for key in keys[2:]:
            found[f"{prefix}_share{key.removeprefix('decrease')}"] = _share(
                made[key], made[f"{prefix}_{key}"]
            )
    summary = Summary(dict.fromkeys(SUMMARY_KEYS))
    summary |= {
        "run": run,
        "lens": lens,
        "clock": clock,
        "step_unit": step_unit,
        "first_step": int(measured.step[0]),
        "last_step": int(measured.step[-1]) + 1,
        "stride": 1.0,
        "every_step": False,
        "steps": len(steps),
        "loss_start": _number(measured.loss[0]),
        "loss_end": _number(measured.loss_end[-1]),
        "counterfactual": found,
        "notes": list(measured.notes),
    }
    empty = pd.DataFrame(columns=["stride", "stride_steps", "length", "dissipation", "a_mean"])
    return LensAudit(lens, steps, summary, empty)


def _share(part: pd.Series, whole: pd.Series) -> float | None:
    """Ratio of two sums, None where it means nothing."""
    total = float(whole.sum())
    return float(part.sum()) / total if total > 0 else None


def _common(
    measured: Measurements | AdamMeasurements, run: str, lens: str, clock: str, step_unit: str
) -> tuple[Summary, list[str]]:
    """What every lens says of the run's intervals, and notes on what no lens saw of it."""
    gaps = measured.step_end - measured.step
    stride = float(np.median(gaps))
    every_step = bool(_one_step(measured, step_unit).all())
    summary = Summary(dict.fromkeys(SUMMARY_KEYS))
    summary |= {
        "run": run,
        "lens": lens,
        "clock": clock,
        "step_unit": step_unit,
        "first_step": int(measured.step[0]),
        "last_step": int(measured.step_end[-1]),
        "stride": stride,
        "every_step": every_step,
        "steps": len(gaps),
        "loss_start": _number(measured.loss[0]),
        "loss_end": _number(measured.loss_end[-1]),
    }
    notes = []
    if measured.step[0] > 0:
        notes.append(
            f"the first snapshot is {step_unit} {measured.step[0]}: what came before it is not "
            "seen, and in no number here"
        )
    if step_unit != "step":
        notes.append(
            f"snapshots are numbered in {step_unit}s: how many optimizer steps one holds is not "
            "known"
        )
    if len(gaps) == 1:
        notes.append(
            "there is one interval only: how straight and how steady the path between was, and so "
            "its efficiency, is unknown"
        )
    return summary, notes


def _alignment(
    lower: np.ndarray, upper: np.ndarray, d: np.ndarray, q: np.ndarray
) -> dict[str, float | None]:
    """The signed mean of ε, and the shares of the dissipation along the natural gradient, downhill
    and uphill apart: the mean of |ε| is a share, that of ε is not (§3). Of an interval whose ε is
    not known nothing is assumed."""
    known = np.isfinite(lower)
    lower, upper = np.where(known, lower, -1.0), np.where(known, upper, 1.0)
    low, high = td.mean_alignment(lower, q), td.mean_alignment(upper, q)
    narrow = low is not None and high is not None and high - low <= _NARROW
    inner = np.where(known, np.minimum(np.abs(lower), np.abs(upper)), 0.0)
    outer = np.maximum(np.abs(lower), np.abs(upper))
    up, down = known & (d < 0), known & (d >= 0)
    return {
        "alignment": 0.5 * (low + high)
        if narrow and low is not None and high is not None
        else None,
        "alignment_lower": low,
        "alignment_upper": high,
        "downhill_lower": td.mean_alignment(np.where(up, 0.0, inner), q),
        "downhill_upper": td.mean_alignment(np.where(up, 0.0, outer), q),
        "uphill_lower": td.mean_alignment(np.where(up, inner, 0.0), q),
        "uphill_upper": td.mean_alignment(np.where(down, 0.0, outer), q),
    }


def _undefined(measured: Measurements, known: np.ndarray, one_step: np.ndarray) -> list[str]:
    """Why the alignment is undefined where it is."""
    if known.all() or not known.any():
        return []
    unknown = ~known & one_step
    infinite = unknown & ~(np.isfinite(measured.loss) & np.isfinite(measured.loss_end))
    still = unknown & ~infinite & (measured.a < _MOTIONLESS)
    said = []
    if still.any():
        said.append(
            f"alignment is undefined in {int(still.sum())} of {len(known)} intervals (nothing "
            "moved, but for rounding)"
        )
    if infinite.any():
        said.append(
            f"alignment is undefined in {int(infinite.sum())} of {len(known)} intervals (the loss "
            "is infinite at one of their ends)"
        )
    return said


def _one_step(measured: Measurements | AdamMeasurements, step_unit: str) -> np.ndarray:
    return (measured.step_end - measured.step == 1) & (step_unit == "step")


def _refuse_standing_clock(
    run: str, clock: str, measured: Measurements | AdamMeasurements, a: np.ndarray
) -> None:
    for k in np.flatnonzero((measured.tau == 0) & (a > 0)):
        raise InputError(
            f"{run}: clock {clock!r} stands still from step {measured.step[k]} to "
            f"{measured.step_end[k]} while the run moves: use another clock"
        )


def _range(key: str, values: list[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    return {
        f"{key}_lower": min(known) if known else None,
        f"{key}_upper": max(known) if known else None,
    }


def _when(known: bool) -> Callable[[float | None], float | None]:
    return lambda value: value if known else None


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
