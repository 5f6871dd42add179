"""What one lens says of a run: per-step scalars and a summary; and what is read of a whole
audit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from thermo_opt.arguments import jsonable
from thermo_opt.deprecated import RenamedKeys
from thermo_opt.manifold.initial import InitialPredictions

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
    "distance",
    "least_distance",
    "irreducible",
    "detour",
    "pacing",
    "straightness",
    "steadiness",
    "efficiency",
    "alignment",
    "alignment_lower",
    "alignment_upper",
    "split",
    "notes",
)
"""Keys of a summary: the same in Python, in JSON and in the report; null (None) where the lens
can't know a value."""


class Summary(RenamedKeys):
    """A lens's summary, keys `SUMMARY_KEYS`; D and D* were called ``geodesic`` and ``frontier``
    before."""

    renamed = {"geodesic": "distance", "frontier": "least_distance"}  # noqa: RUF012 (read only)


@dataclass(frozen=True)
class Landmarks:
    """A few recorded predictions kept for drawing: amplitudes √p on a fixed subset of the probe.

    ``steps`` (K,) int; ``amplitudes`` (K, n, c) float32, each (n, c) row a unit vector; ``loss``
    (K,) nats.
    """

    steps: np.ndarray
    amplitudes: np.ndarray
    loss: np.ndarray


@dataclass(frozen=True)
class LensAudit:
    """One run seen through one lens.

    ``steps``: one row an audited interval, columns ``step, step_end, tau, a, d, delta_lower,
    delta_upper, alignment_lower, alignment_upper, dissipation, loss, loss_end`` (NaN where unknown;
    losses and a, d in nats per example); the parameter lens adds ``kl_realised, null_decrease``.
    ``summary``: see `SUMMARY_KEYS`. ``coarse``: the coarse-graining curves, columns ``stride`` (m,
    in recorded snapshots), ``stride_steps`` (median optimizer steps), ``length`` (ℒ_m),
    ``dissipation`` (Q_m), ``a_mean``. ``attribution``: dissipation of each interval by parameter
    (rows as ``steps``, one column a parameter name), or None. ``landmarks``: predictions kept for
    the trajectory map, or None. ``hurst``: the exponent H of a^(m) ∝ m^{2H}, or None. ``start``:
    the outputs lens's first predictions, as far as a frontier needs them; None without targets.
    """

    lens: str
    steps: pd.DataFrame
    summary: dict[str, Any]
    coarse: pd.DataFrame
    hurst: float | None = None
    attribution: pd.DataFrame | None = None
    landmarks: Landmarks | None = None
    start: InitialPredictions | None = None


@runtime_checkable
class Audited(Protocol):
    """What drawings and sentences read of an audit; `thermo_opt.audits.Audit` is one."""

    @property
    def run(self) -> str:
        """The run's name."""

    @property
    def optimizer(self) -> str | None:
        """Name of its optimizer, where the record tells."""

    @property
    def lenses(self) -> Mapping[str, LensAudit]:
        """The run through each lens that could look."""

    @property
    def missing(self) -> Mapping[str, str]:
        """Why the other lenses could not."""

    @property
    def curve(self) -> pd.DataFrame:
        """The recorded training curve."""

    @property
    def headline(self) -> LensAudit:
        """The first of `LENSES` that the record supports."""

    @property
    def steps(self) -> pd.DataFrame:
        """Per-interval scalars of the headline lens."""

    @property
    def summary(self) -> dict[str, Any]:
        """Summary of the headline lens."""

    @property
    def summaries(self) -> list[dict[str, Any]]:
        """One summary per lens, headline first."""

    @property
    def probe(self) -> str | None:
        """The probe's fingerprint."""


def summaries_json(audits: Iterable[Audited]) -> str:
    """``{"runs": [summary, ...]}`` of several audits as strict JSON: non-finite numbers become
    null."""
    return json.dumps(
        {"runs": [jsonable(s) for audit in audits for s in audit.summaries]},
        indent=2,
        allow_nan=False,
    )
