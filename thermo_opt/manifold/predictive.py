"""The manifold of predictions: Fisher-Rao geometry of batches of predictive distributions, in
closed form.

A batch of n predictions is a point of a product of spheres (categorical and Bernoulli outputs: the
octant of radius 2 whose coordinates are 2√p) or of a Euclidean space (Gaussian outputs). `embed`
maps a model's outputs to that point; distances, the loss and its gradient are then cheap and exact.
Distances and losses are means over the n examples (nats).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thermo_opt.errors import InputError
from thermo_opt.manifold import normal

Array = NDArray[np.float64]
ON_SPHERES = ("categorical", "bernoulli")
"""Families whose predictions are points of spheres, with amplitudes √p as coordinates."""
_FLAT = ("gaussian", "poisson")
"""Families in whose coordinates the metric is the identity."""
_BLOCK = 1 << 17
"""Elements handled at a time, so that the temporaries of a row block stay in the processor's
cache."""

NARROW = 16
"""Up to this many classes, amplitudes lie in memory class by class, so that sums over classes add
long columns."""

_NEAR = 5e-6
"""From here on 1 - cos θ is taken from the inner product, whose rounding, a few 1e-16, is below
1e-10 of it."""

_TINY = float(np.finfo(np.float64).tiny)
"""Added to θ and sin θ it makes their ratio one where both are zero, and changes no other value."""


class Move(NamedTuple):
    """A move between two batches of predictions; each a mean over examples, in nats (§2, §5).

    Attributes:
        a: squared Fisher-Rao distance.
        d: first-order decrease of the loss along the geodesic; NaN without targets.
        chi2: the certificate Δ ≤ χ² at its start; NaN without targets.
    """

    a: float
    d: float
    chi2: float


@dataclass(frozen=True)
class Point:
    """Embedded predictions, as `embed` makes them.

    Attributes:
        w: (rows, width) amplitudes √p up to a factor; outputs in units of σ; 2√λ of Poisson rates;
            means and log-variances; or a sketch of √p.
        examples: n, over which means are taken.
        log_amplitude_y: (rows,) log √p(y) of classes; None without targets.
        residual: (rows, width) minus the loss's derivative by w, of the other families; None
            without targets.
        loss: (rows,) negative log-likelihood of each row (nats), or None.
        finite: whether every prediction, and every target's loss, is a number.
        scale: (rows,) the factors that make w unit amplitudes, or None where they are one: applying
            them costs as much as a distance, which needs them only once per row.
        weights: (rows,) of mean one, or None where all count alike.
        soft: (rows, width) targets as probabilities of all classes, with ``log_u``, log √p of all
            classes, and ``entropy``, the targets' mean entropy (nats), their least loss.
        counts: (rows, width) a Poisson's targets.
        sketched: whether w is a sketch, whose inner products are estimates (§13).
    """

    w: Array
    examples: int
    log_amplitude_y: Array | None = None
    residual: Array | None = None
    loss: Array | None = None
    finite: bool = True
    scale: Array | None = None
    weights: Array | None = None
    soft: Array | None = None
    log_u: Array | None = None
    entropy: float = 0.0
    counts: Array | None = None
    sketched: bool = False

    @cached_property
    def u(self) -> Array:
        """Unit amplitudes √p, or the other families' coordinates, (rows, width)."""
        return self.first(len(self.w))

    def first(self, rows: int) -> Array:
        """The first ``rows`` rows of ``u``, without the cost of the others."""
        return self.w[:rows] if self.scale is None else self.w[:rows] * self.scale[:rows, None]

    def mean(self, per_row: Array) -> float:
        """Weighted mean over examples of a number per row."""
        total = per_row.sum() if self.weights is None else per_row @ self.weights
        return float(total / self.examples)

    @property
    def mean_loss(self) -> float | None:
        """Mean negative log-likelihood per example (nats), or None without targets."""
        return None if self.loss is None else self.mean(self.loss)


def block_rows(width: int) -> int:
    """How many rows are handled at a time."""
    return max(1, _BLOCK // width)


def inner_products(x: Array, y: Array, out: Array) -> Array:
    """Inner product of each row of x with that of y, into ``out``: long rows by BLAS one by one,
    short ones together."""
    if x.shape[1] > 4 * NARROW and x.flags.c_contiguous and y.flags.c_contiguous:
        np.matmul(x[:, None, :], y[:, :, None], out=out[:, None, None])
        return out
    return np.einsum("ij,ij->i", x, y, out=out)


def _angles(p: Point, q: Point) -> tuple[Array, Array]:
    """Angle θ of each row between unit amplitudes, and 1 - cos θ: exact however close p and q are.

    Inner products give both for half the memory traffic of differences, but only to an absolute
    1e-16: rows that have hardly moved need the differences, and where several of the first few rows
    are such, all rows get them at once.
    """
    if p.w.shape != q.w.shape:
        raise InputError(f"predictions of shapes {p.w.shape} and {q.w.shape} can't be compared")
    if p.sketched or np.count_nonzero(_cosines(p, q, slice(16)) > 1 - _NEAR) > 2:
        versine = _versines(p, q, slice(None))
        return _angles_of(versine), versine
    cosine = _cosines(p, q, slice(None))
    versine = 1 - cosine
    if versine.min(initial=1.0) >= _NEAR:
        return np.arccos(cosine, out=cosine), versine
    near = np.flatnonzero(versine < _NEAR)
    theta = np.arccos(np.minimum(cosine, 1.0, out=cosine), out=cosine)
    versine[near] = _versines(p, q, near)
    theta[near] = _angles_of(versine[near])
    return theta, versine


def _angles_of(versine: Array) -> Array:
    return 2 * np.arcsin(np.sqrt(0.5 * versine))


def _cosines(p: Point, q: Point, rows: slice) -> Array:
    """cos θ of some rows, the inner product of the unit amplitudes."""
    u, v = p.w[rows], q.w[rows]
    cosine = inner_products(u, v, out=np.empty(len(u)))
    for x in (p, q):
        if x.scale is not None:
            cosine *= x.scale[rows]
    return cosine


def _versines(p: Point, q: Point, rows: slice | NDArray[np.intp]) -> Array:
    """1 - cos θ of some rows as half the squared chord |u - v|²: to all digits, at more than twice
    the work."""
    u, v = p.w[rows], q.w[rows]
    ones = np.ones(len(u))
    a, b = (ones if x.scale is None else x.scale[rows] for x in (p, q))
    ratio = a / b
    chord2 = np.empty(len(u))
    block = block_rows(u.shape[1])
    for start in range(0, len(u), block):
        part = slice(start, start + block)
        gap = u[part] * ratio[part, None]
        gap -= v[part]
        inner_products(gap, gap, out=chord2[part])
    # Disjoint supports make the chord √2 but for rounding; nothing lies further apart on the
    # octant.
    return np.minimum(0.5 * chord2 * b * b, 1.0)


def row_distances(p: Point, q: Point, likelihood: str = "categorical") -> Array:
    """Fisher-Rao distance of each row: ``2 arccos Σ √(pq)`` of classes, ``|f - f'|/σ`` of Gaussian
    outputs; §10 lists the others. O(n c)."""
    if likelihood in ON_SPHERES:
        return 2 * _angles(p, q)[0]
    if p.u.shape != q.u.shape:
        raise InputError(f"predictions of shapes {p.u.shape} and {q.u.shape} can't be compared")
    if likelihood == "heteroscedastic":
        return normal.distances(p.u, q.u)
    return np.linalg.norm(p.u - q.u, axis=1)


def squared_distance(p: Point, q: Point, likelihood: str = "categorical") -> float:
    """D² between two batches: mean over examples of the squared Fisher-Rao distance (nats)."""
    distance = row_distances(p, q, likelihood)
    if p.weights is None:
        return float(np.dot(distance, distance) / p.examples)
    return p.mean(distance * distance)


def move(p: Point, q: Point, likelihood: str = "categorical") -> Move:
    """Squared distance, first-order decrease and χ² certificate of the move from p to q (§2, §5).

    With θ the angle of a row and y its target, the geodesic leaves p with a velocity whose decrease
    of the loss -2 log √p(y) is ``d = 2 (θ/sin θ)(√(q_y/p_y) - cos θ)``; by Cauchy-Schwarz
    ``d² ≤ a χ²`` exactly. Cost O(n c).
    """
    if likelihood == "heteroscedastic":
        a = squared_distance(p, q, likelihood)
        if p.residual is None:
            return Move(a, np.nan, np.nan)
        chi2 = chi_squared_rows(p, likelihood)
        assert chi2 is not None
        d = p.mean(normal.decrease(p.u, q.u, -p.residual))
        return Move(a, d, float(chi2.sum() / p.examples))
    if likelihood in _FLAT:
        gap = q.u - p.u
        a = _mean_product(p, gap, gap)
        if p.residual is None:
            return Move(a, np.nan, np.nan)
        return Move(a, _mean_product(p, p.residual, gap), _mean_product(p, p.residual, p.residual))
    theta, versine = _angles(p, q)
    weighted = theta if p.weights is None else theta * p.weights
    a = float(4 * np.dot(theta, weighted) / p.examples)
    if p.log_amplitude_y is None or q.log_amplitude_y is None:
        return Move(a, np.nan, np.nan)
    sine = 2 - versine
    sine *= versine
    np.sqrt(sine, out=sine)
    sine += _TINY
    theta += _TINY
    ratio = np.divide(theta, sine, out=theta)
    if p.weights is not None:
        ratio *= p.weights
    with np.errstate(over="ignore", invalid="ignore"):
        # √(q_y/p_y) - cos θ, each term near 1 for a small move: expm1 and 1 - cos θ keep the
        # digits.
        gain = _gain(p, q)
        gain += versine
        d = float(2 * np.dot(ratio, gain) / p.examples)
    chi2 = chi_squared_rows(p, likelihood)
    assert chi2 is not None
    return Move(a, d, float(chi2.sum() / p.examples))


def _mean_product(p: Point, x: Array, y: Array) -> float:
    if p.weights is None:
        return float(np.einsum("ij,ij->", x, y) / p.examples)
    return p.mean(np.einsum("ij,ij->i", x, y))


def _gain(p: Point, q: Point) -> Array:
    """√(q_y/p_y) - 1 of each row, the mean over its targets."""
    assert p.log_amplitude_y is not None
    assert q.log_amplitude_y is not None
    if p.soft is None:
        return np.expm1(q.log_amplitude_y - p.log_amplitude_y)
    assert p.log_u is not None
    assert q.log_u is not None
    return np.where(p.soft > 0, p.soft * np.expm1(q.log_u - p.log_u), 0.0).sum(axis=1)


def chi_squared_rows(p: Point, likelihood: str) -> Array | None:
    """χ² of each row, weights included; None without targets."""
    if p.log_amplitude_y is None and p.residual is None:
        return None
    with np.errstate(over="ignore"):
        if p.soft is not None:
            assert p.log_u is not None
            rows = np.where(p.soft > 0, p.soft**2 * np.exp(-2 * p.log_u), 0.0).sum(axis=1) - 1
        elif p.log_amplitude_y is not None:
            rows = np.expm1(-2 * p.log_amplitude_y)
        elif likelihood == "heteroscedastic":
            assert p.residual is not None
            rows = normal.chi_squared(p.u, p.residual)
        else:
            assert p.residual is not None
            rows = np.einsum("ij,ij->i", p.residual, p.residual)
    return rows if p.weights is None else rows * p.weights


def chi_squared(p_y: ArrayLike) -> float:
    """Free certificate ``Δ ≤ χ² = mean_i (1/p_i(y_i) − 1)`` for softmax outputs, nats (§5).

    Args:
        p_y: (n,) probabilities of the targets.

    Returns:
        χ²; infinite when some target has probability zero. Cost O(n).

    Raises:
        InputError: for probabilities outside [0, 1].
    """
    p = target_probabilities(p_y)
    with np.errstate(divide="ignore"):
        return float(np.mean((1 - p) / p))


def target_probabilities(p_y: ArrayLike) -> Array:
    """(n,) probabilities, or `InputError`."""
    p = np.asarray(p_y, dtype=np.float64).reshape(-1)
    if p.size == 0 or not np.all((p >= 0) & (p <= 1)):
        raise InputError("p_y must hold at least one probability, each within [0, 1]")
    return p
