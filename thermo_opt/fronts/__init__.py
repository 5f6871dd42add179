"""Speed-cost fronts: what runs took, in time and dissipation, to reach a loss, and which of them
nothing beats."""

from thermo_opt.fronts.front import CLOCK_OF, ParetoFront, Target, pareto
from thermo_opt.fronts.trajectory import Track, read_track, track_of

__all__ = ["CLOCK_OF", "ParetoFront", "Target", "Track", "pareto", "read_track", "track_of"]
