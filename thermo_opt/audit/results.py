"""What an audit is: per-step scalars and a summary for each lens, and what the other lenses lacked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from thermo_opt.audit.start import Start

LENSES = ("outputs", "parameters", "optimizer-state")
"""Every lens, in the order in which an audit prefers them for its headline."""

SUMMARY_KEYS = (
    "run",
    "lens",
    "clock",
    "stride",
    "steps",
    "duration",
    "loss_start",
    "loss_end",
    "dissipation",
    "length",
    "geodesic",
    "frontier",
    "irreducible",
    "detour",
    "pacing",
    "straightness",
    "steadiness",
    "efficiency",
    "alignment",
    "alignment_lower",
    "alignment_upper",
    "notes",
)
"""Keys of a summary: the same in Python, in JSON and in the report; null (None) where the lens can't know a value."""


@dataclass(frozen=True)
class Landmarks:
    """A few recorded predictions kept for drawing: amplitudes √p on a fixed subset of the probe.

    ``steps`` (K,) int; ``amplitudes`` (K, n, c) float32, each (n, c) row a unit vector; ``loss`` (K,) nats.
    """

    steps: np.ndarray
    amplitudes: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class LensAudit:
    """One run seen through one lens.

    ``steps``: one row an audited interval, columns ``step, step_end, tau, a, d, delta_lower, delta_upper,
    alignment_lower, alignment_upper, dissipation, loss, loss_end`` (NaN where unknown; losses and a, d in nats per example);
    the parameter lens adds ``kl_realised, null_decrease``. ``summary``: see `SUMMARY_KEYS`. ``coarse``: the coarse-graining curves,
    columns ``stride`` (m, in recorded snapshots), ``stride_steps`` (median optimizer steps), ``length`` (ℒ_m), ``dissipation`` (Q_m), ``a_mean``.
    ``attribution``: dissipation of each interval by parameter (rows as ``steps``, one column a parameter name), or None.
    ``landmarks``: predictions kept for the trajectory map, or None. ``hurst``: the exponent H of a^(m) ∝ m^{2H}, or None.
    ``start``: the outputs lens's first predictions, as far as a frontier needs them; None without targets.
    """

    lens: str
    steps: pd.DataFrame
    summary: dict[str, Any]
    coarse: pd.DataFrame
    hurst: float | None = None
    attribution: pd.DataFrame | None = None
    landmarks: Landmarks | None = None
    start: Start | None = None


@dataclass(frozen=True)
class Audit:
    """A run's audit: every lens its record supports (``lenses``) and why the others could not look (``missing``).

    ``steps`` and ``summary`` are those of the headline lens (the first of `LENSES` present). ``curve``: the recorded training
    curve, one row a logged step (index ``step``). ``optimizer``, ``probe`` (the probe's fingerprint) and ``path`` identify the run.
    """

    run: str
    path: str
    lenses: dict[str, LensAudit]
    missing: dict[str, str] = field(default_factory=dict)
    curve: pd.DataFrame = field(default_factory=pd.DataFrame)
    optimizer: str | None = None
    probe: str | None = None

    @property
    def headline(self) -> LensAudit:
        """The first of `LENSES` that the record supports."""
        return next(self.lenses[name] for name in LENSES if name in self.lenses)

    @property
    def steps(self) -> pd.DataFrame:
        """Per-interval scalars of the headline lens."""
        return self.headline.steps

    @property
    def summary(self) -> dict[str, Any]:
        """Summary of the headline lens."""
        return self.headline.summary

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """One summary a lens, headline first."""
        return [self.lenses[name].summary for name in LENSES if name in self.lenses]

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """The summaries as ``{"runs": [...]}``, the object the command line prints; also written to ``path`` if given."""
        text = summaries_json([self])
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_html(self, path: str | PathLike[str]) -> Path:
        """Write the one-file interactive report (opens offline) and return its path."""
        from thermo_opt.report import write_report

        return write_report([self], path)

    def plot(self) -> Any:
        """One Matplotlib figure with the audit's main panels; returns the ``matplotlib.figure.Figure``."""
        from thermo_opt.plots import overview

        return overview(self)


def summaries_json(audits: list[Audit]) -> str:
    """``{"runs": [summary, ...]}`` of several audits as strict JSON: non-finite numbers become null."""
    return json.dumps({"runs": [_plain(s) for audit in audits for s in audit.summaries]}, indent=2, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
