"""Minimum-work protocols of an overdamped particle in a harmonic trap (theory §10): closed forms,
quadrature, simulation.

The particle follows ẋ = −k(x − c) + √2 ξ (unit mobility, k_BT = 1) in V = ½k(x − c)², starting in
equilibrium; a protocol moves the centre c(t) and the stiffness k(t). It is the physical case of the
theory: excess work is dissipation, in units of k_BT. Sivak & Crooks write the excess power as ζk̇²,
without the ½ that `thermodynamics.dissipation` carries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.integrate import solve_ivp

from thermo_opt.errors import InputError

Schedule = Callable[[float], float]


@dataclass(frozen=True)
class TrapProtocol:
    """Centre and stiffness for 0 < t < duration, and the values held before and after: a difference
    is a jump at that end.

    ``start`` and ``end`` are pairs (centre, stiffness); the particle is in equilibrium with
    ``start`` at t = 0.
    """

    name: str
    duration: float
    centre: Schedule
    stiffness: Schedule
    start: tuple[float, float]
    end: tuple[float, float]


def drag_optimally(distance: float, duration: float) -> TrapProtocol:
    """The least-work protocol for dragging a unit trap by λ in time t: c(s) = λ(s+1)/(t+2), jumps
    λ/(t+2) at both ends.

    Source: Schmiedl & Seifert 2007. Its work is `drag_work_optimal`. Raises InputError unless
    duration > 0.
    """
    _check_duration(duration)
    return TrapProtocol(
        "optimal dragging",
        duration,
        lambda s: distance * (s + 1) / (duration + 2),
        lambda s: 1.0,
        (0.0, 1.0),
        (distance, 1.0),
    )


def drag_linearly(distance: float, duration: float) -> TrapProtocol:
    """Dragging a unit trap by λ at constant speed λ/t, without jumps: the slow-driving optimum.
    Raises InputError unless duration > 0.
    """
    _check_duration(duration)
    return TrapProtocol(
        "linear dragging",
        duration,
        lambda s: distance * s / duration,
        lambda s: 1.0,
        (0.0, 1.0),
        (distance, 1.0),
    )


def drag_work_optimal(distance: float, duration: float) -> float:
    """Least mean work of dragging a unit trap by λ in time t: λ²/(t+2), in k_BT (Schmiedl & Seifert
    2007)."""
    return distance**2 / (duration + 2)


def drag_work_linear(distance: float, duration: float) -> float:
    """Mean work of linear dragging: (λ/t)²(t + e^{−t} − 1), in k_BT; λ²/t when slow, λ²/2 when
    instantaneous."""
    return (distance / duration) ** 2 * (duration + np.expm1(-duration))


def stiffness_friction(stiffness: float) -> float:
    """Friction ζ(k) = 1/(4k³) of changing the stiffness (Sivak & Crooks 2012): slow excess power is
    ζk̇²."""
    return 1 / (4 * stiffness**3)


def stiffen_slowly(start: float, end: float, duration: float) -> TrapProtocol:
    """The schedule of least ∫ζk̇²dt from stiffness ``start`` to ``end``: k^{−1/2} moves linearly in
    time (Sivak & Crooks 2012).

    Raises InputError unless both stiffnesses and the duration are positive.
    """
    _check_stiffness(start, end, duration)
    a, b = start**-0.5, end**-0.5
    return TrapProtocol(
        "k^-1/2 linear",
        duration,
        lambda s: 0.0,
        lambda s: (a + (b - a) * s / duration) ** -2.0,
        (0.0, start),
        (0.0, end),
    )


def stiffen_linearly(start: float, end: float, duration: float) -> TrapProtocol:
    """Stiffness moved linearly in time: the naive rival of `stiffen_slowly`. Raises InputError for
    non-positive arguments.
    """
    _check_stiffness(start, end, duration)
    return TrapProtocol(
        "k linear",
        duration,
        lambda s: 0.0,
        lambda s: start + (end - start) * s / duration,
        (0.0, start),
        (0.0, end),
    )


def stiffen_excess_slow(start: float, end: float, duration: float) -> float:
    """Slow-driving excess work of `stiffen_slowly`: (Δk^{−1/2})²/T, the least ∫ζk̇²dt, in k_BT."""
    return (end**-0.5 - start**-0.5) ** 2 / duration


def stiffen_free_energy(start: float, end: float) -> float:
    """Free-energy difference ½ ln(k'/k), in k_BT: the work of an infinitely slow change of
    stiffness."""
    return float(np.log(end / start) / 2)


def mean_work(protocol: TrapProtocol, rtol: float = 1e-10) -> float:
    """Mean work of a protocol, jumps included, in k_BT, by adaptive quadrature of the two moment
    equations.

    With u = ⟨x⟩ and s = var(x): u̇ = −k(u−c), ṡ = 2 − 2ks. By the first law the work is the change
    of ⟨V⟩ plus the heat ∫(k²⟨(x−c)²⟩ − k)dt, so no derivative of the protocol is needed. Raises
    InputError when the quadrature does not converge.
    """

    def rate(t: float, y: np.ndarray) -> np.ndarray:
        c, k = protocol.centre(t), protocol.stiffness(t)
        mean, variance, _ = y
        return np.array(
            [-k * (mean - c), 2 - 2 * k * variance, k * k * (variance + (mean - c) ** 2) - k]
        )

    c0, k0 = protocol.start
    c1, k1 = protocol.end
    solution = solve_ivp(
        rate,
        (0, protocol.duration),
        [c0, 1 / k0, 0.0],
        method="DOP853",
        rtol=rtol,
        atol=rtol * 1e-2,
    )
    if not solution.success:
        raise InputError(
            f"the moments of protocol {protocol.name!r} could not be integrated: {solution.message}"
        )
    mean, variance, heat = solution.y[:, -1]
    return float(k1 * (variance + (mean - c1) ** 2) / 2 - 0.5 + heat)


def simulate_work(
    protocol: TrapProtocol, trajectories: int, rng: np.random.Generator, steps: int = 200
) -> np.ndarray:
    """Work along independent Langevin trajectories, (trajectories,), in k_BT.

    The protocol is held at each step's midpoint value, and the particle relaxes by the exact
    Ornstein–Uhlenbeck law, so the only error is the staircase's, O((T/steps)²). Cost: steps ×
    trajectories normal variates, vectorised over trajectories.
    """
    c, k = protocol.start
    x = c + rng.standard_normal(trajectories) / np.sqrt(k)
    work = np.zeros(trajectories)
    h = protocol.duration / steps
    for i in range(steps):
        centre, stiffness = protocol.centre((i + 0.5) * h), protocol.stiffness((i + 0.5) * h)
        work += _energy(x, centre, stiffness) - _energy(x, c, k)
        c, k = centre, stiffness
        x -= c
        x *= np.exp(-k * h)
        x += np.sqrt(-np.expm1(-2 * k * h) / k) * rng.standard_normal(trajectories)
        x += c
    return work + _energy(x, *protocol.end) - _energy(x, c, k)


def _energy(x: np.ndarray, centre: float, stiffness: float) -> np.ndarray:
    return stiffness / 2 * (x - centre) ** 2


def _check_duration(duration: float) -> None:
    if not (np.isfinite(duration) and duration > 0):
        raise InputError(f"a protocol's duration must be positive, not {duration}")


def _check_stiffness(start: float, end: float, duration: float) -> None:
    _check_duration(duration)
    if not (start > 0 and end > 0):
        raise InputError(f"a trap's stiffness must be positive, not {min(start, end)}")
