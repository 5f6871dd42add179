"""Least-dissipation paths: the geodesic between two points, and the best schedule along a given
curve (theory §4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_bvp, solve_ivp
from scipy.optimize import least_squares, root

from thermo_opt.errors import InputError
from thermo_opt.theory.flow.landscape import Landscape, NotConverged
from thermo_opt.theory.flow.path import Curve, Path, derivative, trace

Array = NDArray[np.float64]


def geodesic(
    landscape: Landscape,
    start: ArrayLike,
    end: ArrayLike,
    duration: float = 1.0,
    *,
    matrix: Callable[[Array], Array],
    samples: int = 101,
    rtol: float = 1e-11,
) -> Path:
    """The geodesic between two points at constant speed, which dissipates ½D²/T in time T (§4).

    Solves the Hamiltonian equations ``θ̇ = F⁻¹p``, ``ṗ_k = ½θ̇ᵀ(∂_kF)θ̇`` as a boundary-value
    problem, then polishes by shooting. Finds *a* geodesic: the shortest where they are unique (all
    families of §10). Cost: O(P) metric evaluations per right-hand side, P + 1 integrations per
    Newton step.

    Args:
        landscape: the loss with its metric.
        start: θ at time 0, (P,).
        end: θ at the end, (P,).
        duration: T.
        matrix: θ → F(θ) as (P, P), regular along the way.
        samples: points of the returned path.
        rtol: relative tolerance of the solver.

    Raises:
        InputError: for a singular metric at an end.
        NotConverged: when no initial velocity reaches the end.
    """
    x0, x1 = (np.atleast_1d(np.asarray(x, dtype=np.float64)) for x in (start, end))
    for x in (x0, x1):
        values = np.linalg.eigvalsh(matrix(x))
        if not values[0] > 1e-12 * values[-1]:
            raise InputError(
                f"{landscape.name}: the metric is singular at {x}: a geodesic needs a regular one"
            )
    size = len(x0)
    scale = np.abs(x1 - x0).max() + np.abs(x0).max() * 1e-3

    def rate(_: float, y: Array) -> Array:
        theta, p = y[:size], y[size:]
        v = np.linalg.solve(matrix(theta), p)
        return np.concatenate(
            [v, [v @ df @ v / 2 for df in _metric_derivatives(matrix, theta, scale)]]
        )

    def shoot(v: Array, dense: bool = False) -> Any:
        solution = solve_ivp(
            rate,
            (0, 1),
            np.concatenate([x0, matrix(x0) @ v]),
            "DOP853",
            rtol=rtol,
            atol=rtol * 1e-2,
            dense_output=dense,
        )
        if not solution.success:
            raise NotConverged(f"{landscape.name}: shooting failed: {solution.message}")
        return solution

    if np.array_equal(x0, x1):
        return trace(
            landscape, lambda t: x0, duration, velocity=lambda t: np.zeros(size), samples=samples
        )
    guess = _relax(rate, x0, x1, matrix, landscape.name)
    try:
        with np.errstate(all="ignore"):
            found = root(lambda v: shoot(v).y[:size, -1] - x1, guess, tol=1e-13)
    except (np.linalg.LinAlgError, ValueError) as error:
        raise NotConverged(
            f"{landscape.name}: shooting from {x0} to {x1} failed ({error})"
        ) from None
    solution = shoot(found.x, dense=True)
    miss = np.abs(solution.y[:size, -1] - x1).max()
    if not miss <= 1e-8 * scale:
        raise NotConverged(f"{landscape.name}: the geodesic from {x0} misses {x1} by {miss:.2g}")

    def curve(t: float) -> Array:
        return solution.sol(t / duration)[:size]

    def velocity(t: float) -> Array:
        y = solution.sol(t / duration)
        return np.linalg.solve(matrix(y[:size]), y[size:]) / duration

    return trace(landscape, curve, duration, velocity=velocity, samples=samples)


def optimal_durations(a: ArrayLike, duration: float) -> Array:
    """How long to spend on each step so that Σ a_k/(2τ_k) is least: ``τ_k = T √a_k / ℒ`` (§4).

    The dissipation is then ℒ²/2T. Cost O(K).

    Args:
        a: squared lengths of the steps, (K,), non-negative.
        duration: T.

    Returns:
        (K,) durations that add up to T.

    Raises:
        InputError: when the path has no length.
    """
    root_a = np.sqrt(np.asarray(a, dtype=np.float64))
    if not (np.isfinite(root_a).all() and root_a.sum() > 0):
        raise InputError(
            "optimal durations need finite, non-negative squared lengths, not all zero"
        )
    return duration * root_a / root_a.sum()


def reschedule(
    landscape: Landscape, curve: Curve, duration: float, new_duration: float, *, samples: int = 101
) -> Path:
    """The same curve at constant Fisher–Rao speed: the schedule of least dissipation, ℒ²/2T (§4).

    Solves ``t'(s) = ℒ/(T √a(t))`` adaptively.

    Args:
        landscape: the loss with its metric.
        curve: t → θ(t), (P,).
        duration: the curve's own duration.
        new_duration: T.
        samples: points of the returned path.

    Raises:
        InputError: where the curve stands still (no speed to divide by).
    """
    rate = derivative(curve, duration)

    def speed(t: float) -> float:
        theta = np.asarray(curve(t), dtype=np.float64)
        value = np.sqrt(landscape.metric(theta).quadratic(rate(t)))
        if not value > 0:
            raise InputError(
                f"{landscape.name}: the curve stands still at t = {t:.4g}; give one with non-zero "
                "speed"
            )
        return float(value)

    tolerance = {"method": "DOP853", "rtol": 1e-11, "atol": 1e-13}
    total = solve_ivp(lambda t, y: [speed(t)], (0, duration), [0.0], **tolerance).y[0, -1]
    clock = solve_ivp(
        lambda s, y: [total / new_duration / speed(min(y[0], duration))],
        (0, new_duration),
        [0.0],
        dense_output=True,
        **tolerance,
    )
    if not clock.success:
        raise NotConverged(
            f"{landscape.name}: the schedule could not be integrated: {clock.message}"
        )

    def at(s: float) -> float:
        return float(np.clip(clock.sol(s)[0], 0.0, duration))

    return trace(
        landscape,
        lambda s: curve(at(s)),
        new_duration,
        velocity=lambda s: rate(at(s)) * (total / new_duration / speed(at(s))),
        samples=samples,
    )


def _relax(
    rate: Callable[[float, Array], Array],
    x0: Array,
    x1: Array,
    matrix: Callable[[Array], Array],
    name: str,
) -> Array:
    """Initial velocity of the geodesic to a few digits: a polygon of least energy, then the
    boundary-value problem.

    Shooting alone is lost when the ends are far: trial paths part exponentially in a space of
    negative curvature.
    """
    size, segments = len(x0), 40
    s = np.linspace(0, 1, segments + 1)
    line = x0 + np.outer(s, x1 - x0)

    def nodes(inner: Array) -> Array:
        return np.concatenate([x0[None], inner.reshape(-1, size), x1[None]])

    def residuals(inner: Array) -> Array:
        x = nodes(inner)
        steps, middles = np.diff(x, axis=0), (x[1:] + x[:-1]) / 2
        return np.concatenate(
            [np.linalg.cholesky(matrix(m)).T @ v for m, v in zip(middles, steps, strict=True)]
        )

    def ends(start: Array, end: Array) -> Array:
        return np.concatenate([start[:size] - x0, end[:size] - x1])

    def equations(_: Array, y: Array) -> Array:
        return np.stack([rate(0.0, column) for column in y.T], axis=1)

    pattern = np.eye(segments, segments - 1) + np.eye(segments, segments - 1, -1)
    sparsity = np.kron(pattern, np.ones((size, size)))
    try:
        with np.errstate(all="ignore"):
            polygon = nodes(
                least_squares(residuals, line[1:-1].ravel(), jac_sparsity=sparsity, max_nfev=200).x
            )
            slopes = np.gradient(polygon, s, axis=0)
            momenta = np.stack(
                [matrix(x) @ v for x, v in zip(polygon, slopes, strict=True)], axis=1
            )
            relaxed = solve_bvp(
                equations, ends, s, np.concatenate([polygon.T, momenta]), tol=1e-3, max_nodes=4000
            )
    except (np.linalg.LinAlgError, ValueError) as error:
        raise NotConverged(f"{name}: no geodesic found from {x0} to {x1} ({error})") from None
    if not relaxed.success:
        raise NotConverged(f"{name}: no geodesic found from {x0} to {x1} ({relaxed.message})")
    return np.asarray(np.linalg.solve(matrix(x0), relaxed.y[size:, 0]))


def _metric_derivatives(
    matrix: Callable[[Array], Array], theta: Array, scale: float
) -> list[Array]:
    """∂_k F by fourth-order central differences, one matrix a coordinate."""
    result = []
    for k in range(len(theta)):
        e = np.zeros(len(theta))
        e[k] = 1e-3 * min(max(abs(theta[k]), 1e-3 * scale), scale)
        near, far = (
            matrix(theta + e) - matrix(theta - e),
            matrix(theta + 2 * e) - matrix(theta - 2 * e),
        )
        result.append((8 * near - far) / (12 * e[k]))
    return result
