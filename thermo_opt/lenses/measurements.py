"""What a lens measures of a run's intervals, before any thermodynamics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from thermo_opt.lenses.noise import Split
from thermo_opt.lenses.results import Landmarks
from thermo_opt.manifold.initial import InitialPredictions


@dataclass(kw_only=True)
class Measurements:
    """What a lens measured of K intervals in the Fisher metric; losses and lengths in nats.

    Attributes:
        step: (K,) step number at each interval's start; ``step_end`` at its end.
        step_end: (K,) see ``step``.
        tau: (K,) durations on the audit's clock.
        a: (K,) squared lengths.
        d: (K,) first-order decreases of the loss, NaN where unknown.
        delta_lower: (K,) lower ends of Δ.
        delta_upper: (K,) upper ends of Δ.
        loss: (K,) loss at each interval's start; ``loss_end`` at its end.
        loss_end: (K,) see ``loss``.
        distance: D, None where unknown.
        least_distance: D*, None where unknown.
        a_alignment: a in Δ's metric, where it isn't ``a``'s.
        decomposed: Whether ``a`` is exact enough for ℒ ≥ D, so that D splits the dissipation.
        path: Whether the intervals follow one another: else there is no path to sum over.
        bounded: Whether sums over coarser snapshots bound those over finer ones (exact arcs do, a
            quadratic form does not).
        notes: What the lens could not see, in sentences.
        chords: Per stride the chords of the coarse curves (`path.PathScalars`).
        landmarks: Predictions kept for the trajectory map.
        start: The first predictions, as far as D* needs them.
        attribution: Dissipation by parameter, one row per interval.
        held_by: Examples that hold most of χ², whose absence would raise the alignment's lower end.
        rest: (a, d, χ²) of the probe without these examples, each (K,).
        extra: Further columns.
        floor: The rounding floor a₀ of an interval (§4).
        rounding: Share of the dissipation that rounding feigns, None where unknown.
        split: Noise apart from drift (§11).
        sketch: Random sums that stand for each prediction's outputs; None where they are whole.
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
    decomposed: bool = True
    path: bool = True
    bounded: bool = True
    notes: list[str] = field(default_factory=list)
    chords: dict[int, list[tuple[int, int, float]]] = field(default_factory=dict)
    landmarks: Landmarks | None = None
    start: InitialPredictions | None = None
    attribution: pd.DataFrame | None = None
    held_by: list[int] = field(default_factory=list)
    rest: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    floor: float = 0.0
    rounding: float | None = None
    split: Split | None = None
    sketch: int | None = None


@dataclass(frozen=True, kw_only=True)
class AdamPath:
    """K intervals in the metric of Adam's moments for one batch size; no quantity is in nats (§9).

    Attributes:
        batch_size: B, loss terms per optimizer step.
        a: (K,) squared lengths.
        d: (K,) −m̂·δ.
        delta: (K,) m̂ᵀF⁻¹m̂.
        distance: Length of the straight line beside the developed path.
    """

    batch_size: int
    a: np.ndarray
    d: np.ndarray
    delta: np.ndarray
    distance: float


@dataclass(kw_only=True)
class AdamMeasurements:
    """What the optimizer-state lens measured; ``paths`` holds one `AdamPath` per batch size that
    may be the run's, the other attributes are those of `Measurements`."""

    step: np.ndarray
    step_end: np.ndarray
    tau: np.ndarray
    loss: np.ndarray
    loss_end: np.ndarray
    paths: Sequence[AdamPath]
    notes: list[str] = field(default_factory=list)
