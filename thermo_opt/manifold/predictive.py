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
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thermo_opt.errors import InputError

Array = NDArray[np.float64]
Likelihood = Literal["categorical", "bernoulli", "gaussian"]
LIKELIHOODS = ("categorical", "bernoulli", "gaussian")

_BLOCK = 1 << 17
"""Elements handled at a time, so that the temporaries of a row block stay in the processor's
cache."""

_NARROW = 16
"""Up to this many classes, amplitudes lie in memory class by class, so that sums over classes add
long columns."""

_NEAR = 5e-6
"""From here on 1 - cos θ is taken from the inner product, whose rounding, a few 1e-16, is below
1e-10 of it."""

_TINY = float(np.finfo(np.float64).tiny)
"""Added to θ and sin θ it makes their ratio one where both are zero, and changes no other value."""

_SAFE = 1e130
"""Squared norms within this factor of one come from amplitudes that neither overflowed nor lost
digits to underflow."""


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
    """Embedded predictions. ``w`` (rows, width): amplitudes √p up to a factor, or outputs in units
    of σ. ``examples``: n.

    ``log_amplitude_y`` (rows,): log √p(y), categorical and Bernoulli; ``residual`` (rows, width):
    (y - f)/σ, Gaussian; both None without targets. ``loss`` (rows,): negative log-likelihood of
    each row (nats), or None. ``finite``: whether every prediction, and every target's loss, is a
    number. ``scale`` (rows,): the factors that make w unit amplitudes, or None where they are one:
    applying them costs as much as a distance, which needs them only once a row.
    """

    w: Array
    examples: int
    log_amplitude_y: Array | None = None
    residual: Array | None = None
    loss: Array | None = None
    finite: bool = True
    scale: Array | None = None

    @cached_property
    def u(self) -> Array:
        """Unit amplitudes √p, or outputs in units of σ, (rows, width)."""
        return self.first(len(self.w))

    def first(self, rows: int) -> Array:
        """The first ``rows`` rows of ``u``, without the cost of the others."""
        return self.w[:rows] if self.scale is None else self.w[:rows] * self.scale[:rows, None]

    @property
    def mean_loss(self) -> float | None:
        """Mean negative log-likelihood per example (nats), or None without targets."""
        return None if self.loss is None else float(self.loss.sum() / self.examples)


def embed(
    outputs: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    likelihood: str = "categorical",
    kind: Literal["logits", "probabilities"] = "logits",
    sigma2: float = 1.0,
    ignore_index: int = -100,
) -> Point:
    """Embed a model's outputs in the manifold of predictions (§4).

    Amplitudes are computed in float64 from logits as ``exp((z-max)/2)``, normalised, so neither
    underflow of p nor p ≈ q loses digits. Cost O(n c).

    Args:
        outputs: categorical (..., c); Bernoulli or Gaussian (n, ...), where the first axis counts
            examples and the squared distances and losses of the other axes add up.
        targets: categorical (...) class indices; else targets of the outputs' shape. None: no loss.
        likelihood: "categorical", "bernoulli" or "gaussian".
        kind: "logits", or "probabilities" where the outputs are p.
        sigma2: the Gaussian variance.
        ignore_index: class index of predictions that don't count; each counted one is an example.

    Raises:
        InputError: for shapes, classes or probabilities that can't be.
    """
    if likelihood not in LIKELIHOODS:
        raise InputError(
            f"likelihood {likelihood!r} is unknown: use one of {', '.join(LIKELIHOODS)}"
        )
    if kind not in ("logits", "probabilities"):
        raise InputError(f"kind {kind!r} is unknown: use 'logits' or 'probabilities'")
    f = np.asarray(outputs)
    y = None if targets is None else np.asarray(targets)
    if f.ndim == 0 or f.size == 0:
        raise InputError("the probe has no predictions: give it at least one example")
    if likelihood == "categorical":
        return _embed_categorical(f, y, kind, ignore_index)
    if y is not None and y.shape != f.shape:
        if y.size != f.size:
            raise InputError(f"targets of shape {y.shape} don't match outputs of shape {f.shape}")
        y = y.reshape(f.shape)
    if likelihood == "bernoulli":
        return _embed_bernoulli(f, y, kind)
    if not sigma2 > 0:
        raise InputError(f"sigma2 must be positive, not {sigma2}")
    u = f.reshape(len(f), -1).astype(np.float64) / np.sqrt(sigma2)
    finite = bool(np.isfinite(u).all())
    if y is None:
        return Point(u, len(f), finite=finite)
    residual = y.reshape(len(f), -1) / np.sqrt(sigma2) - u
    constant = 0.5 * u.shape[1] * np.log(2 * np.pi * sigma2)
    return Point(
        u,
        len(f),
        None,
        residual,
        0.5 * np.einsum("ij,ij->i", residual, residual) + constant,
        finite,
    )


def _embed_categorical(
    f: NDArray[Any], y: NDArray[Any] | None, kind: str, ignore_index: int
) -> Point:
    classes = f.shape[-1]
    rows = f.reshape(-1, classes)
    if y is not None:
        if y.shape != f.shape[:-1]:
            raise InputError(
                f"targets of shape {y.shape} don't match outputs of shape {f.shape}: expected "
                f"{f.shape[:-1]}"
            )
        if not np.issubdtype(y.dtype, np.integer):
            if not np.array_equal(y, np.round(y)):
                raise InputError("categorical targets must be class indices (integers)")
            y = y.astype(np.int64)
        y = y.reshape(-1)
        if 0 <= ignore_index < classes or y.min() < 0 or y.max() >= classes:
            counted = y != ignore_index
            rows, y = rows[counted], y[counted]
            if len(y) == 0:
                raise InputError("every target of the probe is ignored: nothing is left to count")
            wrong = y[(y < 0) | (y >= classes)]
            if len(wrong):
                raise InputError(
                    f"target {int(wrong[0])} lies outside the {classes} classes of the outputs (0 "
                    f"… {classes - 1})"
                )
    n = len(rows)
    w = np.empty((n, classes), dtype=np.float64, order="F" if classes <= _NARROW else "C")
    norm2, log_y = np.empty(n), None if y is None else np.empty(n)
    at_target = None if y is None else _places(w, y)
    finite = True
    block = max(1, _BLOCK // classes)
    for start in range(0, n, block):
        part = slice(start, min(start + block, n))
        z = w[part]
        if kind == "logits":
            np.multiply(rows[part], 0.5, out=z)
            if log_y is not None and at_target is not None:
                log_y[part] = w.ravel(order="A").take(at_target[part])
            with np.errstate(over="ignore", invalid="ignore"):
                np.exp(z, out=z)
                square = _inner(z, z, out=norm2[part])
                # Rarely needed, and written so that NaN needs it too: a shift by each row's largest
                # logit.
                if not (square.min() > 1 / _SAFE and square.max() < _SAFE):
                    np.multiply(rows[part], 0.5, out=z)
                    largest = z.max(axis=1)
                    z -= largest[:, None]
                    if log_y is not None:
                        log_y[part] -= largest
                    np.exp(z, out=z)
                    finite = finite and bool(np.isfinite(_inner(z, z, out=square)).all())
        else:
            p = _checked_probabilities(rows[part])
            finite = finite and bool(np.isfinite(p).all())
            np.sqrt(p, out=z)
            if log_y is not None and y is not None:
                with np.errstate(divide="ignore"):
                    log_y[part] = 0.5 * np.log(p[np.arange(len(p)), y[part]])
    scale = None
    if kind == "logits":
        scale = np.divide(1, np.sqrt(norm2, out=norm2), out=norm2)
        if log_y is not None:
            log_y += np.log(scale)
            np.minimum(
                log_y, 0.0, out=log_y
            )  # a saturated prediction's probability may round to just above 1
    return Point(w, n, log_y, None, None if log_y is None else -2 * log_y, finite, scale)


def _places(w: Array, y: NDArray[Any]) -> NDArray[np.intp]:
    """Where the entries w[i, y_i] lie in w's memory: taking them from there is cheaper than
    indexing rows and columns."""
    down, across = (stride // w.itemsize for stride in w.strides)
    places = np.multiply(y, across, dtype=np.intp, casting="unsafe")
    places += np.arange(0, len(w) * down, down)
    return places


def _inner(x: Array, y: Array, out: Array) -> Array:
    """Inner product of each row of x with that of y, into ``out``: long rows by BLAS one by one,
    short ones together."""
    if x.shape[1] > 4 * _NARROW and x.flags.c_contiguous and y.flags.c_contiguous:
        np.matmul(x[:, None, :], y[:, :, None], out=out[:, None, None])
        return out
    return np.einsum("ij,ij->i", x, y, out=out)


def _checked_probabilities(p: NDArray[Any]) -> Array:
    p = np.asarray(p, dtype=np.float64)
    total = p.sum(axis=-1, keepdims=True)
    # 1e-3 admits probabilities rounded to bf16 or printed to four digits; real logits never pass.
    if np.any(p < 0) or np.any(np.abs(total - 1) > 1e-3):
        raise InputError(
            "probabilities must be non-negative and sum to one: pass logits with kind='logits' "
            "instead"
        )
    return p / total


def _embed_bernoulli(f: NDArray[Any], y: NDArray[Any] | None, kind: str) -> Point:
    z = f.reshape(-1).astype(np.float64)
    if kind == "probabilities":
        if np.any((z < 0) | (z > 1)):
            raise InputError(
                "Bernoulli probabilities must lie in [0, 1]: pass logits with kind='logits' instead"
            )
        u = np.sqrt(np.stack([1 - z, z]).T)
        with np.errstate(divide="ignore"):
            log_u = np.log(u)
    else:
        log_u = -0.5 * np.stack([np.logaddexp(0, z), np.logaddexp(0, -z)]).T
        u = np.exp(log_u)
    finite = bool(np.isfinite(z).all())
    if y is None:
        return Point(u, len(f), finite=finite)
    y = y.reshape(-1)
    if not np.isin(y, (0, 1)).all():
        raise InputError("Bernoulli targets must be 0 or 1")
    log_y = log_u[np.arange(len(y)), y.astype(np.int64)]
    return Point(u, len(f), log_y, None, -2 * log_y, finite)


def _angles(p: Point, q: Point) -> tuple[Array, Array]:
    """Angle θ of each row between unit amplitudes, and 1 - cos θ: exact however close p and q are.

    Inner products give both for half the memory traffic of differences, but only to an absolute
    1e-16: rows that have hardly moved need the differences, and where several of the first few rows
    are such, all rows get them at once.
    """
    if p.w.shape != q.w.shape:
        raise InputError(f"predictions of shapes {p.w.shape} and {q.w.shape} can't be compared")
    if np.count_nonzero(_cosines(p, q, slice(16)) > 1 - _NEAR) > 2:
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
    cosine = _inner(u, v, out=np.empty(len(u)))
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
    block = max(1, _BLOCK // u.shape[1])
    for start in range(0, len(u), block):
        part = slice(start, start + block)
        gap = u[part] * ratio[part, None]
        gap -= v[part]
        _inner(gap, gap, out=chord2[part])
    # Disjoint supports make the chord √2 but for rounding; nothing lies further apart on the
    # octant.
    return np.minimum(0.5 * chord2 * b * b, 1.0)


def row_distances(p: Point, q: Point, likelihood: str = "categorical") -> Array:
    """Fisher-Rao distance of each row, ``2 arccos Σ √(pq)``, Gaussian ``|f − f'|/σ`` (§4).

    Args:
        p: embedded predictions.
        q: others of the same shape.
        likelihood: the one they were embedded with.

    Returns:
        (rows,) distances, √nats. Cost O(n c).
    """
    if likelihood == "gaussian":
        if p.u.shape != q.u.shape:
            raise InputError(f"predictions of shapes {p.u.shape} and {q.u.shape} can't be compared")
        return np.linalg.norm(p.u - q.u, axis=1)
    return 2 * _angles(p, q)[0]


def move(p: Point, q: Point, likelihood: str = "categorical") -> Move:
    """Squared distance, first-order decrease and χ² certificate of the move from p to q (§2, §5).

    With θ the angle of a row and y its target, the geodesic leaves p with a velocity whose decrease
    of the loss −2 log √p(y) is ``d = 2 (θ/sin θ)(√(q_y/p_y) − cos θ)``; by Cauchy-Schwarz
    ``d² ≤ a χ²`` exactly. Cost O(n c).

    Args:
        p: embedded predictions at the start.
        q: those at the end.
        likelihood: the one they were embedded with.
    """
    if likelihood == "gaussian":
        gap = q.u - p.u
        a = float(np.einsum("ij,ij->", gap, gap) / p.examples)
        if p.residual is None:
            return Move(a, np.nan, np.nan)
        d = float(np.einsum("ij,ij->", p.residual, gap) / p.examples)
        return Move(a, d, float(np.einsum("ij,ij->", p.residual, p.residual) / p.examples))
    theta, versine = _angles(p, q)
    a = float(4 * np.dot(theta, theta) / p.examples)
    if p.log_amplitude_y is None or q.log_amplitude_y is None:
        return Move(a, np.nan, np.nan)
    sine = 2 - versine
    sine *= versine
    np.sqrt(sine, out=sine)
    sine += _TINY
    theta += _TINY
    ratio = np.divide(theta, sine, out=theta)
    with np.errstate(over="ignore", invalid="ignore"):
        # √(q_y/p_y) - cos θ, each term near 1 for a small move: expm1 and 1 - cos θ keep the
        # digits.
        gain = np.expm1(q.log_amplitude_y - p.log_amplitude_y)
        gain += versine
        d = float(2 * np.dot(ratio, gain) / p.examples)
    return Move(a, d, _chi_squared(p.log_amplitude_y, p.examples))


def _chi_squared(log_amplitude_y: Array, examples: int) -> float:
    with np.errstate(over="ignore"):
        return float(np.expm1(-2 * log_amplitude_y).sum() / examples)


def chi_squared(p_y: ArrayLike) -> float:
    """Free certificate ``Δ ≤ χ² = mean_i (1/p_i(y_i) − 1)`` for softmax outputs, nats (§5).

    Args:
        p_y: (n,) probabilities of the targets.

    Returns:
        χ²; infinite when some target has probability zero. Cost O(n).

    Raises:
        InputError: for probabilities outside [0, 1].
    """
    p = _target_probabilities(p_y)
    with np.errstate(divide="ignore"):
        return float(np.mean((1 - p) / p))


def _target_probabilities(p_y: ArrayLike) -> Array:
    p = np.asarray(p_y, dtype=np.float64).reshape(-1)
    if p.size == 0 or not np.all((p >= 0) & (p <= 1)):
        raise InputError("p_y must hold at least one probability, each within [0, 1]")
    return p


def fisher_rao(
    p: ArrayLike,
    q: ArrayLike,
    *,
    likelihood: str = "categorical",
    kind: Literal["logits", "probabilities"] = "probabilities",
    sigma2: float = 1.0,
    per_example: bool = False,
) -> float | Array:
    """Fisher-Rao distance D between two batches of predictions, in √nats (§4, §10).

    ``D = sqrt(mean_i D_i²)`` over the examples. Relative error below 1e-6 down to distances of 1e-7
    and at logits of ±1000. Cost O(n c). Source: Rao 1945.

    Args:
        p: categorical (..., c), Bernoulli (n, ...) or Gaussian means (n, ...).
        q: the other batch, of the same shape.
        likelihood: "categorical", "bernoulli" or "gaussian".
        kind: whether p and q are "probabilities" or "logits"; ignored for Gaussian means.
        sigma2: the Gaussian variance.
        per_example: return the distances D_i, one per example, instead.

    Raises:
        InputError: for unequal shapes, NaN, or probabilities that can't be.
    """
    if np.shape(p) != np.shape(q):
        raise InputError(f"p has shape {np.shape(p)} and q {np.shape(q)}: they must agree")
    a, b = (embed(x, likelihood=likelihood, kind=kind, sigma2=sigma2) for x in (p, q))
    if not (a.finite and b.finite):
        raise InputError("p or q holds NaN or infinite entries")
    distance = row_distances(a, b, likelihood)
    if not per_example:
        return float(np.sqrt(np.dot(distance, distance) / a.examples))
    return np.sqrt(np.square(distance).reshape(a.examples, -1).sum(axis=1))
