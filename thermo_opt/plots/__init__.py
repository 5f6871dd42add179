"""Matplotlib figures of audits: one function a figure, each taking an audit (or several) and an
Axes.

Matplotlib is imported when the first figure is drawn. The Axes may be left out: the figure then
makes its own.
"""

from thermo_opt.plots.counterfactual import counterfactual, held_out
from thermo_opt.plots.curves import (
    alignment,
    coarse_graining,
    loss_and_dissipation,
    predicted_vs_realised,
)
from thermo_opt.plots.drift import drift_front
from thermo_opt.plots.ensemble import ensemble_map, progress
from thermo_opt.plots.front import energy, pareto
from thermo_opt.plots.maps import decomposition_bars, dissipation_heatmap, trajectory_map
from thermo_opt.plots.overview import overview
from thermo_opt.plots.split import critical_batch, split_bars, split_curve

__all__ = [
    "alignment",
    "coarse_graining",
    "counterfactual",
    "critical_batch",
    "decomposition_bars",
    "dissipation_heatmap",
    "drift_front",
    "energy",
    "ensemble_map",
    "held_out",
    "loss_and_dissipation",
    "overview",
    "pareto",
    "predicted_vs_realised",
    "progress",
    "split_bars",
    "split_curve",
    "trajectory_map",
]
