"""Predictive distributions: Fisher-Rao distances, the universal frontier, closed forms, maps of
trajectories."""

from thermo_opt.manifold.embedding import embed, fisher_rao
from thermo_opt.manifold.level_set import least_distance, log_least_distance
from thermo_opt.manifold.maps import trajectory_map
from thermo_opt.manifold.predictive import (
    Move,
    Point,
    chi_squared,
    move,
    row_distances,
    squared_distance,
)
from thermo_opt.manifold.progress import progress

__all__ = [
    "Move",
    "Point",
    "chi_squared",
    "embed",
    "fisher_rao",
    "least_distance",
    "log_least_distance",
    "move",
    "progress",
    "row_distances",
    "squared_distance",
    "trajectory_map",
]
