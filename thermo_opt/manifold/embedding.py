"""From a model's outputs to points of the manifold of predictions."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy  # whose parts load when they are used
from numpy.typing import ArrayLike, NDArray

from thermo_opt import likelihoods
from thermo_opt.errors import InputError
from thermo_opt.manifold import normal
from thermo_opt.manifold.predictive import (
    NARROW,
    Array,
    Point,
    block_rows,
    inner_products,
    row_distances,
)

_SAFE = 1e130
"""Squared norms within this factor of one come from amplitudes that neither overflowed nor lost
digits to underflow."""


def embed(
    outputs: ArrayLike,
    targets: ArrayLike | None = None,
    *,
    weights: ArrayLike | None = None,
    likelihood: str = "categorical",
    kind: str = "logits",
    sigma2: float = 1.0,
) -> Point:
    """Embed a model's outputs in the manifold of predictions.

    Each counted position of categorical outputs is an example. For the other families the first
    axis counts examples, over the others the independent outputs' squared distances and losses add
    up. Amplitudes are computed in float64 from logits as ``exp((z-max)/2)`` normalised, so neither
    underflow of p nor p ≈ q loses digits. Cost O(n c).

    Args:
        outputs: of the family's form, see `thermo_opt.likelihoods`; classes along the last axis, or
            along axis 1 by torch's convention (`thermo_opt.likelihoods.class_axis`).
        targets: of the family's form; predictions whose target is −100 are left out.
        weights: of examples, or of predictions where these are counted one by one; only their
            ratios matter. Those of weight 0 are left out.
        likelihood: the output family.
        kind: "logits", "log-probabilities" or "probabilities" of classes.
        sigma2: the Gaussian's variance.

    Raises:
        InputError: shapes, classes, weights or probabilities that can't be.
    """
    likelihoods.known(likelihood)
    likelihoods.known_kind(kind)
    f = np.asarray(outputs)
    y = None if targets is None else np.asarray(targets)
    if f.ndim == 0 or f.size == 0:
        raise InputError("the probe has no predictions: give it at least one example")
    f = likelihoods.parameters_last(likelihood, f, y)
    if y is not None:
        y = likelihoods.checked_targets(likelihood, f, y)
    w = None if weights is None else np.asarray(weights, dtype=np.float64)
    if likelihood == "categorical":
        return _categorical(f, y, w, kind)
    if likelihood == "bernoulli":
        return _bernoulli(f, y, w, kind)
    if w is not None:
        w = likelihoods.checked_weights(w, f.shape[:1])
        f, w, y = f[w > 0], w[w > 0], None if y is None else y[w > 0]
    rows = f.reshape(len(f), -1).astype(np.float64)
    targets_of_rows = None if y is None else y.reshape(len(f), -1).astype(np.float64)
    if likelihood == "heteroscedastic":
        return _heteroscedastic(f, y, w)
    return _flat(rows, targets_of_rows, w, likelihood, sigma2)


def _flat(f: Array, y: Array | None, w: Array | None, likelihood: str, sigma2: float) -> Point:
    """Gaussian means f/σ, or Poisson rates as 2√λ: coordinates in which the metric is the
    identity."""
    weights = _normalised(w)
    if likelihood == "poisson":
        with np.errstate(over="ignore"):
            u = 2 * np.exp(0.5 * f)
        finite = bool(np.isfinite(u).all())
        if y is None:
            return Point(u, len(f), finite=finite, weights=weights)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            residual = np.where(y > 0, 2 * y / u, 0.0) - 0.5 * u
            loss = (0.25 * u * u - np.where(y > 0, y * f, 0.0) + scipy.special.gammaln(y + 1)).sum(
                axis=1
            )
        return Point(u, len(f), None, residual, loss, finite, weights=weights, counts=y)
    if not sigma2 > 0:
        raise InputError(f"sigma2 must be positive, not {sigma2}")
    u = f / np.sqrt(sigma2)
    finite = bool(np.isfinite(u).all())
    if y is None:
        return Point(u, len(f), finite=finite, weights=weights)
    residual = y / np.sqrt(sigma2) - u
    constant = 0.5 * u.shape[1] * np.log(2 * np.pi * sigma2)
    loss = 0.5 * np.einsum("ij,ij->i", residual, residual) + constant
    return Point(u, len(f), None, residual, loss, finite, weights=weights)


def _heteroscedastic(f: NDArray[Any], y: NDArray[Any] | None, w: Array | None) -> Point:
    """Coordinates (μ, ln σ²) of each example's normals, `normal`'s; the residual is minus the
    score."""
    half = f.shape[-1] // 2
    halves = [part.reshape(len(f), -1) for part in (f[..., :half], f[..., half:])]
    u = np.concatenate(halves, axis=1).astype(np.float64)
    finite, weights = bool(np.isfinite(u).all()), _normalised(w)
    if y is None:
        return Point(u, len(f), finite=finite, weights=weights)
    loss, score = normal.loss_and_score(u, y.reshape(len(f), -1).astype(np.float64))
    return Point(u, len(f), None, -score, loss, finite, weights=weights)


def _categorical(f: NDArray[Any], y: NDArray[Any] | None, w: Array | None, kind: str) -> Point:
    classes = f.shape[-1]
    counted = None if y is None else likelihoods.counted_targets("categorical", y)
    if w is not None:
        w = likelihoods.checked_weights(w, f.shape[:-1])
        counted = (w > 0) if counted is None else counted & (w > 0)
    soft = y is not None and likelihoods.is_soft("categorical", y)
    rows = f.reshape(-1, classes)
    if y is not None:
        y = y.reshape(-1, classes) if soft else y.reshape(-1)
    w = None if w is None else w.reshape(-1)
    if counted is not None and not counted.all():
        kept = counted.reshape(-1)
        rows, y, w = rows[kept], None if y is None else y[kept], None if w is None else w[kept]
        if len(rows) == 0:
            raise InputError("every prediction of the probe is left out: nothing is left to count")
    weights = _normalised(w)
    if soft:
        assert y is not None
        return _with_soft_targets(_log_amplitudes(rows, kind), y, len(rows), weights)
    return _with_classes(rows, y, weights, kind)


def _with_classes(
    rows: NDArray[Any], y: NDArray[Any] | None, weights: Array | None, kind: str
) -> Point:
    classes = rows.shape[-1]
    n = len(rows)
    w = np.empty((n, classes), dtype=np.float64, order="F" if classes <= NARROW else "C")
    norm2, log_y = np.empty(n), None if y is None else np.empty(n)
    at_target = None if y is None else _places(w, y)
    finite = True
    block = block_rows(classes)
    for start in range(0, n, block):
        part = slice(start, min(start + block, n))
        z = w[part]
        if kind != "probabilities":
            np.multiply(rows[part], 0.5, out=z)
            if log_y is not None and at_target is not None:
                log_y[part] = w.ravel(order="A").take(at_target[part])
            with np.errstate(over="ignore", invalid="ignore"):
                np.exp(z, out=z)
                square = inner_products(z, z, out=norm2[part])
                # Rarely needed, and written so that NaN needs it too: a shift by each row's largest
                # logit.
                if not (square.min() > 1 / _SAFE and square.max() < _SAFE):
                    np.multiply(rows[part], 0.5, out=z)
                    largest = z.max(axis=1)
                    z -= largest[:, None]
                    if log_y is not None:
                        log_y[part] -= largest
                    np.exp(z, out=z)
                    finite = finite and bool(np.isfinite(inner_products(z, z, out=square)).all())
        else:
            p = _checked_probabilities(rows[part])
            finite = finite and bool(np.isfinite(p).all())
            np.sqrt(p, out=z)
            if log_y is not None and y is not None:
                with np.errstate(divide="ignore"):
                    log_y[part] = 0.5 * np.log(p[np.arange(len(p)), y[part]])
    scale = None
    if kind != "probabilities":
        scale = np.divide(1, np.sqrt(norm2, out=norm2), out=norm2)
        if log_y is not None:
            log_y += np.log(scale)
            np.minimum(
                log_y, 0.0, out=log_y
            )  # a saturated prediction's probability may round to just above 1
    loss = None if log_y is None else -2 * log_y
    return Point(w, n, log_y, None, loss, finite, scale, weights=weights)


def _with_soft_targets(
    log_u: Array, t: NDArray[Any], examples: int, weights: Array | None
) -> Point:
    """Rows of amplitudes with a probability t for each of their classes.

    ``log_amplitude_y`` is that of the overlap Σ √(t p): by Jensen's inequality the loss exceeds the
    targets' entropy by at least −2 log of it, which bounds D* from below as one class would (§5).
    """
    t = np.asarray(t, dtype=np.float64)
    t = t / t.sum(axis=1, keepdims=True)
    u = np.exp(log_u)
    finite = bool(np.isfinite(u).all())
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = -2 * np.where(t > 0, t * log_u, 0.0).sum(axis=1)
        overlap = np.minimum(np.log(inner_products(np.sqrt(t), u, out=np.empty(len(u)))), 0.0)
    entropy = float(-scipy.special.xlogy(t, t).sum(axis=1) @ _weight(weights, len(t)) / examples)
    return Point(
        u,
        examples,
        overlap,
        None,
        loss,
        finite,
        weights=weights,
        soft=t,
        log_u=log_u,
        entropy=entropy,
    )


def _weight(weights: Array | None, rows: int) -> Array:
    return np.ones(rows) if weights is None else weights


def _log_amplitudes(rows: NDArray[Any], kind: str) -> Array:
    """log √p of every class, (n, c)."""
    if kind == "probabilities":
        with np.errstate(divide="ignore"):
            return 0.5 * np.log(_checked_probabilities(rows))
    z = rows.astype(np.float64)
    z = 0.5 * (z - z.max(axis=1, keepdims=True))
    with np.errstate(invalid="ignore"):
        return z - 0.5 * np.log(np.exp(2 * z).sum(axis=1, keepdims=True))


def _places(w: Array, y: NDArray[Any]) -> NDArray[np.intp]:
    """Where the entries w[i, y_i] lie in w's memory: taking them from there is cheaper than
    indexing rows and columns."""
    down, across = (stride // w.itemsize for stride in w.strides)
    places = np.multiply(y, across, dtype=np.intp, casting="unsafe")
    places += np.arange(0, len(w) * down, down)
    return places


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


def _bernoulli(f: NDArray[Any], y: NDArray[Any] | None, w: Array | None, kind: str) -> Point:
    z, examples = f.reshape(-1).astype(np.float64), len(f)
    if w is not None:
        w = likelihoods.checked_weights(w, f.shape)
        examples = int((w.reshape(len(f), -1) > 0).any(axis=1).sum())
        kept = w.reshape(-1) > 0
        z, w = z[kept], w.reshape(-1)[kept]
        y = None if y is None else y.reshape(-1)[kept]
    if kind == "probabilities":
        if np.any((z < 0) | (z > 1)):
            raise InputError(
                "Bernoulli probabilities must lie in [0, 1]: pass logits with kind='logits' instead"
            )
        with np.errstate(divide="ignore"):
            log_u = 0.5 * np.log(np.stack([1 - z, z]).T)
    elif kind == "log-probabilities":
        if np.any(z > 0):
            raise InputError(
                "log-probabilities must not be above 0: pass logits with kind='logits'"
            )
        with np.errstate(divide="ignore"):
            log_u = 0.5 * np.stack([np.log(-np.expm1(z)), z]).T
    else:
        log_u = -0.5 * np.stack([np.logaddexp(0, z), np.logaddexp(0, -z)]).T
    finite, weights = bool(np.isfinite(z).all()), _normalised(w)
    if y is None:
        return Point(np.exp(log_u), examples, finite=finite, weights=weights)
    y = y.reshape(-1)
    if not np.isin(y, (0, 1)).all():
        return _with_soft_targets(log_u, np.stack([1 - y, y]).T, examples, weights)
    log_y = log_u[np.arange(len(y)), y.astype(np.int64)]
    return Point(np.exp(log_u), examples, log_y, None, -2 * log_y, finite, weights=weights)


def _normalised(w: Array | None) -> Array | None:
    """Weights of mean one; None where they are all the same."""
    if w is None or len(w) == 0 or np.ptp(w) == 0:
        return None
    return np.ascontiguousarray(w, dtype=np.float64) / float(np.mean(w))


def fisher_rao(
    p: ArrayLike,
    q: ArrayLike,
    *,
    likelihood: str = "categorical",
    kind: str = "probabilities",
    sigma2: float = 1.0,
    per_example: bool = False,
) -> float | Array:
    """Fisher-Rao distance D between two batches of predictions, ``sqrt(mean_i D_i²)`` (§4).

    Relative error below 1e-6 down to distances of 1e-7 and at logits of ±1000. Cost O(n c). Source:
    Rao 1945; §10 lists the closed forms.

    Args:
        p: categorical (..., c), heteroscedastic (n, ..., 2c), other families (n, ...); parameters
            along the last axis.
        q: the same shape.
        likelihood: the output family (`thermo_opt.likelihoods`).
        kind: what they are of classes: "probabilities", "log-probabilities" or "logits".
        sigma2: variance of Gaussian outputs.
        per_example: give the distances D_i.

    Returns:
        D in √nats, or (n,) the distances D_i.

    Raises:
        InputError: unequal shapes, NaN, or probabilities that aren't.
    """
    if np.shape(p) != np.shape(q):
        raise InputError(f"p has shape {np.shape(p)} and q {np.shape(q)}: they must agree")
    if likelihood == "categorical" and np.ndim(p) > 2:
        p, q = (np.reshape(x, (-1, np.shape(x)[-1])) for x in (p, q))
    a, b = (embed(x, likelihood=likelihood, kind=kind, sigma2=sigma2) for x in (p, q))
    if not (a.finite and b.finite):
        raise InputError("p or q holds NaN or infinite entries")
    distance = row_distances(a, b, likelihood)
    if not per_example:
        return float(np.sqrt(np.dot(distance, distance) / a.examples))
    return np.sqrt(np.square(distance).reshape(a.examples, -1).sum(axis=1))
