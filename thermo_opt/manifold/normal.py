"""Fisher-Rao geometry of independent normals whose variance is predicted too: a product of
hyperbolic planes (§10).

Coordinates are those a network puts out: means μ and log-variances s = ln σ². The metric there is
dμ²/σ² + ds²/2, the distance √2 arccosh(1 + ((μ−μ')²/2 + (σ−σ')²)/(2σσ')). Everything is written so
that close normals lose no digits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def distances(p: Array, q: Array) -> Array:
    """Distance of each row, (n, 2c) → (n,): the c normals' squared distances add up."""
    return np.sqrt(2 * np.square(_angle(_gap(p, q))).sum(axis=1))


def decrease(p: Array, q: Array, score: Array) -> Array:
    """First-order decrease of the loss along the geodesic from p to q, per row.

    Args:
        p: coordinates (n, 2c) of the start.
        q: coordinates of the end, same shape.
        score: ∂(−log p(y))/∂(μ, s) at p, same shape.
    """
    c = p.shape[1] // 2
    gap = _gap(p, q)
    shift = p[:, :c] - q[:, :c]
    width = np.exp(-0.5 * (p[:, c:] + q[:, c:]))  # 1/(σσ')
    by_mean = 0.5 * shift * width
    by_log_variance = 0.5 * np.sinh(0.5 * (p[:, c:] - q[:, c:])) - 0.125 * shift * shift * width
    theta = _angle(gap)
    ratio = np.divide(theta, np.sinh(theta), out=np.ones_like(theta), where=theta > 0)
    # minus the gradient of half the squared distance is the geodesic's velocity at p
    slope = np.exp(p[:, c:]) * score[:, :c] * by_mean + 2 * score[:, c:] * by_log_variance
    return 2 * (ratio * slope).sum(axis=1)


def loss_and_score(p: Array, y: Array) -> tuple[Array, Array]:
    """(−log p(y) of each row in nats, its derivative by (μ, s)) for targets (n, c)."""
    c = p.shape[1] // 2
    z = (p[:, :c] - y) * np.exp(-0.5 * p[:, c:])
    loss = 0.5 * (np.log(2 * np.pi) + p[:, c:] + z * z).sum(axis=1)
    return loss, np.concatenate([z * np.exp(-0.5 * p[:, c:]), 0.5 * (1 - z * z)], axis=1)


def chi_squared(p: Array, score: Array) -> Array:
    """The score's squared length in the inverse metric, per row: its mean bounds Δ from above
    (§5)."""
    c = p.shape[1] // 2
    return (np.exp(p[:, c:]) * score[:, :c] ** 2 + 2 * score[:, c:] ** 2).sum(axis=1)


def _gap(p: Array, q: Array) -> Array:
    """cosh θ − 1 of each normal, θ its distance over √2."""
    c = p.shape[1] // 2
    shift, spread = p[:, :c] - q[:, :c], p[:, c:] - q[:, c:]
    return (
        0.25 * shift * shift * np.exp(-0.5 * (p[:, c:] + q[:, c:]))
        + 2 * np.sinh(0.25 * spread) ** 2
    )


def _angle(gap: Array) -> Array:
    return 2 * np.arcsinh(np.sqrt(0.5 * gap))
