"""What rounding of the outputs does to distances: the floor below which a move says nothing (theory
§4)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

FRACTION_BITS = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}
"""Bits behind the leading one, by dtype."""
_LEAST_EXPONENT = {"bfloat16": -126, "float16": -14, "float32": -126, "float64": -1022}
_ENOUGH = 64
"""Distinct values from which on a shared coarse grid can't be chance."""
ABOVE = 10.0
"""A squared length below this many floors has no direction and no exponent that could be told from
rounding's."""


def ulp(z: Any, dtype: str) -> Array:
    """The unit in the last place of each number, as ``dtype`` would hold it."""
    exponent = np.frexp(np.abs(np.asarray(z, dtype=np.float64)))[1] - 1
    return np.ldexp(1.0, np.maximum(exponent, _LEAST_EXPONENT[dtype]) - FRACTION_BITS[dtype])


def rounding_floor(
    outputs: Any,
    dtype: str,
    likelihood: str = "categorical",
    sigma2: float = 1.0,
    kind: str | None = None,
) -> float:
    """a₀, the squared length (nats) that two independent roundings of the outputs feign where
    nothing moved (§4).

    ``a₀ = mean_i Σ_y Λ_yy ulp(z_y)²/6`` with Λ the Fisher matrix in the outputs, so ``Σ_y p_y(1 −
    p_y) ulp(z_y)²/6`` for logits. Cost O(n c).

    Args:
        outputs: logits (..., c), or the family's parameters, their last axis as in
            `thermo_opt.likelihoods`.
        dtype: in which they were computed, a key of `FRACTION_BITS`; wider storage doesn't help.
        likelihood: the output family.
        sigma2: the Gaussian's variance.
        kind: what outputs of classes are, see `thermo_opt.likelihoods.KINDS`.
    """
    z = np.asarray(outputs, dtype=np.float64)
    examples = int(np.prod(z.shape[:-1])) if likelihood == "categorical" else len(z)
    square = ulp(z, dtype) ** 2 / 6
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "probabilities":
            other = 1 - z if likelihood == "bernoulli" else 1.0
            total = float(np.sum(square[z > 0] / (z * other)[z > 0]))
        else:
            if kind == "log-probabilities" and likelihood == "bernoulli":
                z = z - np.log(-np.expm1(z))
            total = float(np.nansum(_fisher_diagonal(z, likelihood, sigma2) * square))
    return total / examples


def _fisher_diagonal(z: Array, likelihood: str, sigma2: float) -> Array:
    if likelihood == "categorical":
        p = np.exp(z - z.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        return p * (1 - p)
    if likelihood == "bernoulli":
        return 0.25 / np.cosh(z / 2) ** 2
    if likelihood == "poisson":
        return np.exp(z)
    if likelihood == "heteroscedastic":
        c = z.shape[-1] // 2
        return np.concatenate([np.exp(-z[..., c:]), np.full_like(z[..., c:], 0.5)], axis=-1)
    return np.full_like(z, 1 / sigma2)


def computed_dtype(outputs: NDArray[Any], stored: str) -> str:
    """The dtype in which outputs were computed: the one they are stored in, or a coarser one whose
    grid they all lie on.

    A model under autocast often returns float32 that bfloat16 was widened to. Fewer than 64
    distinct values prove nothing and are taken for what they are stored as.
    """
    stored = stored if stored in FRACTION_BITS else "float64"
    if FRACTION_BITS[stored] <= FRACTION_BITS["float16"]:
        return stored
    z = np.asarray(outputs, dtype=np.float64).reshape(-1)[: 1 << 16]
    z = z[np.isfinite(z)]
    if len(np.unique(z)) < _ENOUGH:
        return stored
    for coarser in ("bfloat16", "float16", "float32"):
        if FRACTION_BITS[coarser] < FRACTION_BITS[stored] and not np.any(
            np.fmod(z, ulp(z, coarser))
        ):
            return coarser
    return stored
