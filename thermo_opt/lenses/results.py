"""What one lens says of a run: per-step scalars and a summary; and what is read of a whole
audit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd

from thermo_opt.arguments import jsonable
from thermo_opt.deprecated import RenamedKeys
from thermo_opt.lenses.noise import Split
from thermo_opt.manifold.initial import InitialPredictions

LENSES = ("outputs", "parameters", "optimizer-state", "counterfactual")
"""Every lens, in the order in which an audit prefers them for its headline."""

BY_NAME = ("counterfactual",)
"""Lenses that look only when asked for by name."""

SCHEMA_VERSION = 2
"""Of the JSON: 2 since D and D* are ``distance`` and ``least_distance``, the optimizer-state lens
has keys of its own, and the lenses that could not look are listed."""

SUMMARY_KEYS = (
    "run",
    "lens",
    "clock",
    "step_unit",
    "first_step",
    "last_step",
    "stride",
    "every_step",
    "sketch",
    "rounding",
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
    "counterfactual",
    "downhill_lower",
    "downhill_upper",
    "uphill_lower",
    "uphill_upper",
    "held_by",
    "alignment_lower_rest",
    "displacement_alignment",
    "adam_alignment_lower",
    "adam_alignment_upper",
    "adam_straightness_lower",
    "adam_straightness_upper",
    "adam_steadiness_lower",
    "adam_steadiness_upper",
    "notes",
)
"""Keys of a summary: the same in Python, in JSON and in the report; null (None) where the lens
can't know a value. `thermo_opt.describe.quantities` says what each means, and when it is exact, a
bound, or an estimate."""


ALIGNMENT_KEYS = (
    "alignment",
    "alignment_lower",
    "alignment_upper",
    "downhill_lower",
    "downhill_upper",
    "uphill_lower",
    "uphill_upper",
    "held_by",
    "alignment_lower_rest",
)
"""Keys of a summary that speak of the alignment of single optimizer steps."""


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

    Attributes:
        lens: Its name, one of `LENSES`.
        steps: One row per audited interval, columns ``step, step_end, tau, a, d, delta_lower,
            delta_upper, alignment_lower, alignment_upper, dissipation, loss, loss_end`` (NaN where
            unknown; losses and a, d in nats per example); the parameter lens adds ``kl_realised,
            null_decrease, displacement_alignment``. The optimizer-state lens has ``step, step_end,
            tau, adam_alignment_lower, adam_alignment_upper, adam_share_lower, adam_share_upper,
            loss, loss_end``, the share being that of the path's dissipation in Adam's metric. The
            counterfactual lens has ``step, step_end, loss, loss_end`` (on the probe), ``nats,
            nats_held`` (realised KL on the step's minibatch and on the probe), ``decrease,
            decrease_held`` (fall of the loss there), and the last three again after ``natural_``
            and ``kfac_``, of the natural gradient's step of the same nats.
        summary: See `SUMMARY_KEYS`.
        coarse: The coarse-graining curves, columns ``stride`` (m, in recorded snapshots),
            ``stride_steps`` (median optimizer steps), ``length`` (ℒ_m), ``dissipation`` (Q_m),
            ``a_mean``.
        hurst: The exponent H of a^(m) ∝ m^{2H}, or None.
        attribution: Dissipation of each interval by parameter (rows as ``steps``, one column per
            parameter name), or None.
        landmarks: Predictions kept for the trajectory map, or None.
        start: The outputs lens's first predictions, as far as D* needs them; None without targets.
        split: Noise apart from drift, over the run and along it (§11); None where nothing tells.
    """

    lens: str
    steps: pd.DataFrame
    summary: dict[str, Any]
    coarse: pd.DataFrame
    hurst: float | None = None
    attribution: pd.DataFrame | None = None
    landmarks: Landmarks | None = None
    start: InitialPredictions | None = None
    split: Split | None = None


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

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the record says of how the run was trained: learning rate, batch size and more."""


def summaries_json(
    audits: Iterable[Audited],
    left_out: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """Several audits as strict JSON: non-finite numbers become null.

    Args:
        audits: The audits.
        left_out: (run, reason) of the runs that could not be audited.
        notes: Sentences on how the runs were made comparable, or why they are not ranked.

    Returns:
        ``{"schema_version", "runs": [summary, ...], "missing": [{"run", "lens", "reason"}, ...],
        "left_out": [{"run", "reason"}, ...], "notes"}``: one summary per run and lens; ``missing``
        says which lenses could not look at which run, and why.
    """
    audits = list(audits)
    return json.dumps(
        jsonable(
            {
                "schema_version": SCHEMA_VERSION,
                "runs": [s for audit in audits for s in audit.summaries],
                "missing": [
                    {"run": audit.run, "lens": lens, "reason": reason}
                    for audit in audits
                    for lens, reason in audit.missing.items()
                ],
                "left_out": [{"run": run, "reason": reason} for run, reason in left_out],
                "notes": list(notes),
            }
        ),
        indent=2,
        allow_nan=False,
    )
