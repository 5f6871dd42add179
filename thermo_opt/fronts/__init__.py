"""Speed-cost fronts: what runs took, in time and dissipation, to reach a loss, and which of them
nothing beats."""

from typing import Any

from thermo_opt.deprecated import warn_renamed
from thermo_opt.fronts.alike import like_most, seen_in_time
from thermo_opt.fronts.common import sharing_snapshots
from thermo_opt.fronts.drift import drift_front
from thermo_opt.fronts.front import CLOCK_OF, ParetoFront, Target, pareto
from thermo_opt.fronts.trajectory import Trajectory, read_trajectory, trajectory_of

__all__ = [
    "CLOCK_OF",
    "ParetoFront",
    "Target",
    "Trajectory",
    "drift_front",
    "like_most",
    "pareto",
    "read_trajectory",
    "seen_in_time",
    "sharing_snapshots",
    "trajectory_of",
]

_RENAMED = {
    "Track": "Trajectory",
    "read_track": "read_trajectory",
    "track_of": "trajectory_of",
}
"""Old name → new."""


def __getattr__(name: str) -> Any:
    if name not in _RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warn_renamed(f"{__name__}.{name}", f"{__name__}.{_RENAMED[name]}")
    return globals()[_RENAMED[name]]
