"""Speed against drift: fronts on what the expected steps cost, the noise of minibatches beside it
(§5, §11)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from thermo_opt.audits.results import Audit
from thermo_opt.errors import InputError
from thermo_opt.fronts.dominance import pareto_mask
from thermo_opt.fronts.front import pareto
from thermo_opt.lenses.noise import Split

COLUMNS = (
    "run",
    "group",
    "target_loss",
    "censored",
    "step",
    "time",
    "noise",
    "noise_error",
    "drift",
    "drift_error",
    "dissipation",
    "on_front",
)
"""Columns of a front on drift."""


def drift_front(audits: Sequence[Audit], **options: Any) -> pd.DataFrame:
    """Time and drift that runs took to first reach a loss, and which of them nothing beats.

    As `pareto`, with Q_drift (nats, clock ``step``) up to the crossing in the place of Q, so that a
    run isn't judged by its batch size; Q_noise stands beside it. The universal frontier is one of
    the whole dissipation and does not bound the drift alone.

    Args:
        audits: Of runs recorded with replicas.
        **options: Those of `pareto`: ``target_loss``, ``x``, ``groups``.

    Returns:
        One row a run and target, columns `COLUMNS`; NaN where ``censored``; errors are standard
        errors, NaN where too few replicas give none. ``attrs["x"]`` and ``attrs["clock"]``: what
        time is, and its clock; ``attrs["notes"]``: as `ParetoFront.notes`.
        `thermo_opt.plots.drift_front` and `thermo_opt.report.write_drift_front` draw it.

    Raises:
        InputError: As `pareto`, and for runs without replicas, naming them.
    """
    splits = [_split(audit) for audit in audits]
    front = pareto(audits, **options)
    table = front.table
    parts = ["noise", "noise_error", "drift", "drift_error"]
    rows = table.assign(**dict.fromkeys(parts, np.nan))
    for position, (_, row) in enumerate(table.iterrows()):
        split = splits[position % len(splits)]  # the runs in order, target after target
        if not row["censored"]:
            spent = _until(audits[position % len(splits)], split, float(row["step"]))
            rows.loc[rows.index[position], parts] = spent
    for _, own in rows.groupby("target_loss", sort=False):
        mask = pareto_mask(own["time"].to_numpy(float), own["drift"].to_numpy(float))
        rows.loc[own.index, "on_front"] = mask
    found = rows[list(COLUMNS)]
    found.attrs |= {"x": front.x, "clock": front.clock, "notes": list(front.notes)}
    return found


def _split(audit: Audit) -> Split:
    lens = audit.lenses.get("outputs")
    split = None if lens is None else lens.split
    if split is None or split.curve.empty:
        raise InputError(f"{audit.run}: a front on drift needs replicas: record with replica=…")
    return split


def _until(audit: Audit, split: Split, step: float) -> tuple[float, float, float, float]:
    """Noise and drift up to a step, each with its standard error: noise from its means over
    stretches, drift as the rest of the dissipation where every step was recorded."""
    start, end = (split.curve[k].to_numpy(float) for k in ("step", "step_end"))
    span = np.clip(step - start, 0.0, end - start)
    noise, drift = (float(span @ split.curve[k].to_numpy(float)) for k in ("noise", "drift"))
    errors = (split.curve[f"{k}_error"].to_numpy(float) for k in ("noise", "drift"))
    noise_error, drift_error = (float(np.sqrt(((e * span)[span > 0] ** 2).sum())) for e in errors)
    lens = audit.lenses["outputs"]
    if lens.summary["every_step"]:
        spent = np.concatenate([[0.0], np.cumsum(lens.steps["a"].to_numpy(float) / 2)])
        at = np.concatenate([lens.steps["step"].to_numpy(float)[:1], lens.steps["step_end"]])
        drift, drift_error = float(np.interp(step, at, spent)) - noise, noise_error
    return noise, noise_error, drift, drift_error
