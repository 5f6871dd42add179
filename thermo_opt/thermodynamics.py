"""Thermodynamics of a step sequence: arithmetic on the four numbers (a, d, Δ, τ) of each step.
NumPy only.

    a_k = δ_kᵀ F_k δ_k      squared Fisher-Rao length of the step (nats)
    d_k = -g_kᵀ δ_k         predicted loss decrease (nats)
    Δ_k = g_kᵀ F_k⁺ g_k     squared natural-gradient norm (nats)
    τ_k                     time the step took, in the unit of the chosen clock

How the four are obtained (a metric, a recorded run) is the business of other modules. a and Δ must
come from the *same* metric; with damping use F + λI in both. Dissipation here is the Rayleigh
function ½ vᵀFv; Sivak & Crooks (2012) write the excess power without the ½.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_ROUNDING = 1e-9
"""Relative slack within which an inequality of the theory counts as met: beyond it the inputs
contradict each other."""
_NOTHING = 1e-14
"""Relative difference of two sums below which it is their rounding."""


def dissipation(a: ArrayLike, tau: ArrayLike = 1.0) -> Array:
    """Dissipation of each step, ``Q_k = a_k / (2 τ_k)`` (§3).

    A step that moves nothing in no time (a = τ = 0, as under a zero learning rate on the flow
    clock) has Q = 0. Cost O(K).

    Args:
        a: squared lengths of the steps, (K,), nats.
        tau: their durations, (K,) or one for all, in the unit of the clock.

    Returns:
        (K,) float64; nats when τ = 1, else nats per unit of the clock.

    Raises:
        ValueError: for negative or NaN input, or a step with a > 0 and τ = 0.
    """
    a, tau = np.broadcast_arrays(_nonnegative(a, "a"), _nonnegative(tau, "tau"))
    if np.any((tau == 0) & (a > 0)):
        k = int(np.flatnonzero(np.ravel((tau == 0) & (a > 0)))[0])
        raise ValueError(f"step {k} has length but no duration (tau = 0): choose another clock")
    return np.divide(a, 2 * tau, out=np.zeros_like(a), where=tau > 0)


def length(a: ArrayLike) -> float:
    """Length of the path, ``ℒ = Σ √a_k``, in √nats (§4; Crooks 2007).

    Args:
        a: squared lengths of the steps, (K,), nats.
    """
    return float(np.sqrt(_nonnegative(a, "a")).sum())


def least_dissipation(d: ArrayLike, delta: ArrayLike, tau: ArrayLike = 1.0) -> Array:
    """Least dissipation that buys a first-order decrease d in time τ, ``d² / (2 Δ τ)`` (§3).

    Attained only by ``δ = (d/Δ) F⁺(-g)``. Infinite where Δ = 0 and d ≠ 0; zero where d = 0.

    Args:
        d: predicted decreases, (K,), nats.
        delta: squared natural-gradient norms Δ, (K,), nats.
        tau: durations, (K,) or one for all.
    """
    d = np.asarray(d, dtype=np.float64)
    cost = _nonnegative(delta, "delta") * _nonnegative(tau, "tau") * 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(d == 0, 0.0, d * d / cost)


def alignment(a: ArrayLike, d: ArrayLike, delta: ArrayLike) -> Array:
    """Alignment ``ε_k = d|d| / (a Δ)``, between −1 and 1 (§3).

    The squared cosine between a step and the natural-gradient direction, with the sign of d. A
    magnitude above 1 by no more than rounding is clipped.

    Args:
        a: squared lengths of the steps, (K,), nats.
        d: predicted decreases, (K,), nats.
        delta: squared natural-gradient norms Δ in the metric of ``a``, (K,), nats.

    Returns:
        (K,) float64; NaN where it is undefined (a = 0 or Δ = 0).

    Raises:
        ValueError: where |ε| exceeds 1: then a and Δ come from different metrics.
    """
    a, d, delta = np.broadcast_arrays(
        _nonnegative(a, "a"),
        np.asarray(d, dtype=np.float64),
        _nonnegative(delta, "delta", infinite=True),
    )
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        # (d/√a)·(|d|/√a)/Δ rather than d|d|/(aΔ): no overflow or underflow in the product aΔ.
        speed = d / np.sqrt(a)
        epsilon = np.where(
            np.isinf(delta), 0.0, (speed / np.sqrt(delta)) * (np.abs(speed) / np.sqrt(delta))
        )
    epsilon = np.where((a > 0) & (delta > 0) & ~np.isnan(d), epsilon, np.nan)
    size = np.ravel(np.nan_to_num(np.abs(epsilon)))
    if np.max(size, initial=0.0) > 1 + _ROUNDING:
        k = int(np.argmax(size))
        raise ValueError(
            f"step {k} has |alignment| {abs(np.ravel(epsilon)[k]):.6g} > 1: a and delta are not of "
            "the same metric"
        )
    return np.clip(epsilon, -1.0, 1.0)


def alignment_bracket(
    a: ArrayLike, d: ArrayLike, delta_lower: ArrayLike, delta_upper: ArrayLike
) -> tuple[Array, Array]:
    """Bounds of the signed alignment when Δ is only known to lie in an interval (§5).

    ``|ε| ∈ [d²/(aΔ_upper), min(1, d²/(aΔ_lower))]``, with the sign of d.

    Args:
        a: squared lengths of the steps, (K,), nats.
        d: predicted decreases, (K,), nats.
        delta_lower: lower ends of Δ, (K,), nats; with 0 the outer end is ±1.
        delta_upper: upper ends of Δ, (K,), nats; may be infinite: then 0 becomes the inner end.

    Returns:
        Lower and upper bounds of ε, (K,) each; NaN where a = 0 or Δ_upper = 0.
    """
    a, d, lower, upper = np.broadcast_arrays(
        _nonnegative(a, "a"),
        np.asarray(d, dtype=np.float64),
        _nonnegative(delta_lower, "delta_lower"),
        _nonnegative(delta_upper, "delta_upper", infinite=True),
    )
    if np.any(lower > upper * (1 + _ROUNDING)):
        raise ValueError("delta_lower exceeds delta_upper")
    inner = alignment(a, d, upper)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        outer = np.sign(d) * np.minimum(
            1.0, np.where(lower > 0, (d / np.sqrt(a)) ** 2 / lower, 1.0)
        )
    outer = np.where(np.isnan(inner), np.nan, outer)
    return np.minimum(inner, outer), np.maximum(inner, outer)


def mean_alignment(epsilon: ArrayLike, q: ArrayLike) -> float | None:
    """Dissipation-weighted mean of ε over the steps where it is defined; None if there are none."""
    epsilon, q = np.broadcast_arrays(np.asarray(epsilon, dtype=np.float64), _nonnegative(q, "q"))
    known = np.isfinite(epsilon) & (q > 0)
    if not known.any():
        return None
    return float(np.average(epsilon[known], weights=q[known]))


@dataclass(frozen=True)
class Decomposition:
    """Where a path's dissipation went (§4): three non-negative parts that add up to it, and ratios.

    Dissipations are in nats per unit of time, lengths in √nats. Ratios are None for a path that
    went nowhere (0/0), and wherever the distance is unknown.

    Attributes:
        dissipation: Q.
        length: ℒ.
        distance: D, the Fisher-Rao distance between the two ends; None when unknown.
        duration: T.
        irreducible: ``D²/2T``, the least any path between the same ends could cost in that time.
        detour: ``(ℒ² − D²)/2T``, the price of not going straight.
        pacing: ``Q − ℒ²/2T``, the price of not going steadily.
        straightness: ``D²/ℒ²``.
        steadiness: ``ℒ²/(2QT)``.
        efficiency: ``D²/(2QT)``, the product of the two.
    """

    dissipation: float
    length: float
    distance: float | None
    duration: float
    irreducible: float | None
    detour: float | None
    pacing: float
    straightness: float | None
    steadiness: float | None
    efficiency: float | None


def decompose(a: ArrayLike, tau: ArrayLike, distance: float | None) -> Decomposition:
    """Split a path's dissipation into irreducible, detour and pacing (§4). Cost O(K).

    Args:
        a: squared lengths of the steps, (K,), nats.
        tau: their durations, (K,) or one for all.
        distance: D, the Fisher-Rao distance between the two ends, √nats. None when it is unknown:
            then only pacing and steadiness are known.

    Raises:
        ValueError: when D exceeds ℒ by more than rounding: they belong to different paths.
    """
    a, tau = np.broadcast_arrays(np.atleast_1d(_nonnegative(a, "a")), _nonnegative(tau, "tau"))
    q = float(dissipation(a, tau).sum())
    path = length(a)
    time = float(tau.sum())
    steady = (
        min(path * path / (2 * time), q) if time > 0 else 0.0
    )  # Cauchy-Schwarz: below q but for rounding
    moved = path > 0
    if q - steady <= _NOTHING * q:
        steady = q  # what is left is rounding of the sums, not uneven pacing
    steadiness = steady / q if moved else None
    if distance is None:
        return Decomposition(q, path, None, time, None, None, q - steady, None, steadiness, None)
    distance = float(_nonnegative(distance, "distance"))
    if distance > path * (1 + _ROUNDING):
        raise ValueError(f"the distance {distance:.9g} exceeds the path's length {path:.9g}")
    distance = min(distance, path)
    irreducible = min(distance * distance / (2 * time), steady) if time > 0 else 0.0
    return Decomposition(
        dissipation=q,
        length=path,
        distance=distance,
        duration=time,
        irreducible=irreducible,
        detour=steady - irreducible,
        pacing=q - steady,
        straightness=irreducible / steady if moved else None,
        steadiness=steadiness,
        efficiency=irreducible / q if moved else None,
    )


def action_gap(a: ArrayLike, d: ArrayLike, delta: ArrayLike, tau: ArrayLike) -> float:
    """Action gap ``S = Σ (a/(2τ) + τΔ/2 − d) ≥ 0`` on the flow clock τ = η, nats (§6).

    The Onsager-Machlup ("entropic") action of the recorded path: each term is
    ``½ τ |δ/τ + F⁺g|²_F``, and S is zero exactly on natural-gradient flow.

    Args:
        a: squared lengths of the steps, (K,), nats.
        d: predicted decreases, (K,), nats.
        delta: squared natural-gradient norms Δ in the metric of ``a``, (K,), nats.
        tau: learning rates, (K,).
    """
    a, d, delta, tau = (np.asarray(x, dtype=np.float64) for x in (a, d, delta, tau))
    return float(np.sum(dissipation(a, tau) + tau * delta / 2 - d))


def durations(readings: ArrayLike) -> Array:
    """Durations τ_k between readings of a cumulative clock.

    Args:
        readings: (K+1,) readings.

    Returns:
        (K,) differences.

    Raises:
        ValueError: if the clock runs backwards or a reading is missing.
    """
    tau = np.diff(np.asarray(readings, dtype=np.float64))
    if np.any(~(tau >= 0)):
        k = int(np.flatnonzero(~(tau >= 0))[0])
        raise ValueError(f"the clock runs backwards or is missing between readings {k} and {k + 1}")
    return tau


@dataclass(frozen=True)
class CoarsePoint:
    """The path seen at a stride of m recorded intervals (§4, sampling).

    Attributes:
        stride: m.
        length: ℒ_m, √nats.
        dissipation: Q_m.
        a_mean: mean squared length of the chords that span m full intervals, nats.
    """

    stride: int
    length: float
    dissipation: float
    a_mean: float


def coarse_point(
    stride: int, a: ArrayLike, tau: ArrayLike, whole: ArrayLike | None = None
) -> CoarsePoint:
    """ℒ_m, Q_m and the mean of a^(m) from the path's chords at stride m (§4, sampling).

    Args:
        stride: m, in recorded intervals.
        a: squared lengths of the chords, nats.
        tau: their durations.
        whole: marks the chords that span m full intervals (default: all). A shorter last one must
            be given too, so that coarse paths share their ends; ``a_mean`` leaves it out.
    """
    a = np.atleast_1d(_nonnegative(a, "a"))
    keep = np.ones(len(a), dtype=bool) if whole is None else np.asarray(whole, dtype=bool)
    q = float(dissipation(a, tau).sum())
    return CoarsePoint(stride, length(a), q, float(a[keep].mean()) if keep.any() else float("nan"))


def hurst_exponent(points: Sequence[CoarsePoint]) -> float | None:
    """Exponent H of ``a^(m) ∝ m^{2H}``, by least squares in logarithms (§4).

    1 is ballistic (signal), ½ diffusive (noise).

    Args:
        points: the path at several strides.

    Returns:
        H, or None with fewer than three strides of positive a^(m), where a slope would say nothing.
    """
    used = [(p.stride, p.a_mean) for p in points if p.a_mean > 0]
    if len(used) < 3:
        return None
    m, a = np.log(np.array(used, dtype=np.float64)).T
    return float(np.polyfit(m, a, 1)[0] / 2)


def _nonnegative(x: ArrayLike, name: str, infinite: bool = False) -> Array:
    x = np.asarray(x, dtype=np.float64)
    if not np.all(x >= 0) or (not infinite and np.any(np.isinf(x))):
        raise ValueError(f"{name} must be {'' if infinite else 'finite and '}non-negative")
    return x
