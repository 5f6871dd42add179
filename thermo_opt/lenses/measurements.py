"""What a lens measures of a run's intervals, before any thermodynamics."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from thermo_opt.lenses.noise import Split
from thermo_opt.lenses.results import Landmarks
from thermo_opt.manifold.initial import InitialPredictions


@dataclass
class Measurements:
    """What a lens measured of a run; input of `summarise`. Arrays over K audited intervals; losses
    in nats.

    ``step``, ``step_end``, ``tau``, ``a``, ``d``; ``delta_lower``/``delta_upper`` bracket Δ;
    ``loss``/``loss_end`` at each interval's ends; ``distance`` D and ``least_distance`` D* (None
    when unknown). ``nats`` False when the metric's scale is unknown: ratios are reported,
    quantities in nats are not. ``a_alignment``: a in Δ's metric, where it isn't ``a``'s. ``path``
    False when the intervals don't follow one another: then there is no path to sum over. ``chords``
    (see `path.PathScalars`) makes the coarse curves. ``floor``: the rounding floor a₀ of a step
    (§4); ``split``: noise apart from drift (§11).
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
    start: InitialPredictions | None = None
    attribution: pd.DataFrame | None = None
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    floor: float = 0.0
    split: Split | None = None
