"""The universal frontier: the least Fisher-Rao distance from today's predictions to any with a
given loss (§5).

No optimizer and no architecture can reach mean loss L* having gone less far, so ``Q T ≥ D*(L*)²/2``
for every run.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from thermo_opt.errors import InputError
from thermo_opt.manifold.predictive import target_probabilities

Array = NDArray[np.float64]

_SKETCH = 4096
"""Examples on which the multiplier is found first; the full batch then only polishes it."""


def least_distance(p_y: ArrayLike, target_loss: float) -> float:
    """Least distance D*(L*) from given predictions to any with mean loss ≤ L*, √nats (§5).

    Solves the convex program by one multiplier μ and one root ``φ' + μ tan φ' = φ`` per example,
    Newton in both: O(n) per sweep, about a dozen sweeps.

    Args:
        p_y: (n,) probabilities that the predictions give to their targets.
        target_loss: L* ≥ 0, nats per example.

    Returns:
        D*; 0 when the loss is there already.

    Raises:
        InputError: for a negative or NaN target, or probabilities outside [0, 1].
    """
    p = target_probabilities(p_y)
    # arctan2 keeps the digits of a small angle that arccos √p would lose near p = 1.
    return angle_least_distance(np.arctan2(np.sqrt(1 - p), np.sqrt(p)), target_loss)


def log_least_distance(
    log_p_y: ArrayLike, target_loss: float, weights: Array | None = None
) -> float:
    """`least_distance` from log-probabilities: exact where p underflows to 0 or rounds to 1.

    ``weights`` (n,) of mean one: of the examples in both means, or None.
    """
    log_p = np.asarray(log_p_y, dtype=np.float64).reshape(-1)
    if log_p.size == 0 or not np.all(log_p <= 0):
        raise InputError("log_p_y must hold at least one log-probability, none above 0")
    phi = np.arctan2(np.sqrt(-np.expm1(log_p)), np.exp(log_p / 2))
    return angle_least_distance(phi, target_loss, weights)


def angle_least_distance(phi: Array, target_loss: float, weights: Array | None = None) -> float:
    """D*(L*) for angles ``φ_i = arccos √p_i(y_i)`` in [0, π/2] (see `least_distance`)."""
    if not target_loss >= 0:
        raise InputError(
            f"target loss {target_loss} can't be: a negative log-likelihood of classes is at least "
            "0"
        )
    if target_loss == 0:
        return float(2 * np.sqrt(_mean(phi * phi, weights)))
    with np.errstate(divide="ignore"):
        if -2 * _mean(np.log(np.cos(phi)), weights) <= target_loss:
            return 0.0
    few = slice(None, None, max(1, len(phi) // _SKETCH))
    few_weights = None if weights is None else weights[few] / np.mean(weights[few])
    log_mu = _multiplier(phi[few], few_weights, target_loss, 0.0, tolerance=1e-6)[0]
    _, x = _multiplier(phi, weights, target_loss, log_mu, tolerance=1e-13)
    gap = phi - x
    if weights is None:
        return float(2 * np.sqrt(np.dot(gap, gap) / len(phi)))
    return float(2 * np.sqrt(_mean(gap * gap, weights)))


def _mean(values: Array, weights: Array | None) -> float:
    return float(np.mean(values) if weights is None else values @ weights / len(values))


def _multiplier(
    phi: Array, weights: Array | None, target_loss: float, log_mu: float, tolerance: float
) -> tuple[float, Array]:
    """The log of μ at which the mean loss is L*, and the angles φ' there: safeguarded Newton on log
    L against log μ."""
    low, high = -80.0, 80.0
    x: Array | None = None
    for _ in range(100):
        mu = np.exp(log_mu)
        x = _shrink(phi, mu, x)
        t = np.tan(x)
        loss = _mean(np.log1p(t * t), weights)
        residual = np.log(loss / target_loss) if loss > 0 else -np.inf
        if abs(residual) <= tolerance or high - low < 1e-15 * max(1.0, abs(log_mu)):
            break
        if residual > 0:
            low = log_mu
        else:
            high = log_mu
        # d loss / d log μ, from the implicit derivative dx/dμ = -tan x / (1 + μ sec² x)
        slope = -2 * mu * _mean(t * t / (1 + mu * (1 + t * t)), weights) / loss if loss > 0 else 0.0
        proposal = log_mu - residual / slope if slope < 0 else np.nan
        log_mu = float(proposal) if low < proposal < high else 0.5 * (low + high)
    assert x is not None
    return log_mu, x


def _shrink(phi: Array, mu: float, start: Array | None) -> Array:
    """Root in [0, φ] of ``x + μ tan x = φ`` for each φ: Newton, monotone from above since the left
    side is convex."""
    # two upper bounds of the root (tan x ≥ x; the left side exceeds μ tan x) and one lower (cot y ≤
    # 1/y, y = π/2 - x)
    upper = np.minimum(phi / (1 + mu), np.arctan2(phi, mu))
    psi = np.pi / 2 - phi
    lower = np.maximum(np.pi / 2 - 0.5 * (psi + np.sqrt(psi * psi + 4 * mu)), 0.0)
    x = np.clip(lower if start is None else start, lower, upper)
    for _ in range(60):
        t = np.tan(x)
        step = (x + mu * t - phi) / (1 + mu * (1 + t * t))
        x = np.clip(x - step, lower, upper)
        if np.max(np.abs(step) / np.maximum(x, 1e-300), initial=0.0) < 1e-12 or not np.any(step):
            break
    return x


def gaussian_least_distance(residual_norm: float, target_residual_norm: float) -> float:
    """D* for Gaussian outputs: loss balls are spheres, so the nearest point lies on the ray towards
    the targets.

    Arguments: ``sqrt(mean_i |y_i - f_i|²/σ²)`` now and at the target loss.
    """
    return max(0.0, residual_norm - target_residual_norm)
