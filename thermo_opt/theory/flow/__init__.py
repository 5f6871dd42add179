"""Natural-gradient flow, geodesics and least-dissipation schedules, integrated adaptively (theory
§4, §6).

A `Landscape` is a loss with a metric: a toy problem in closed form or a `network` with any of the
`fisher` metrics. `integrate` follows a velocity field on it (natural-gradient flow by default),
`geodesic` connects two points at least dissipation, `reschedule` moves along a given curve at
constant speed, `trace` measures any curve. Each returns a `Path`.
"""

from thermo_opt.theory.flow.geodesic import geodesic, optimal_durations, reschedule
from thermo_opt.theory.flow.integrate import integrate
from thermo_opt.theory.flow.landscape import DenseMetric, Landscape, LocalMetric, NotConverged
from thermo_opt.theory.flow.network import network
from thermo_opt.theory.flow.path import Path, trace

__all__ = [
    "DenseMetric",
    "Landscape",
    "LocalMetric",
    "NotConverged",
    "Path",
    "geodesic",
    "integrate",
    "network",
    "optimal_durations",
    "reschedule",
    "trace",
]
