"""Inverses of damped factors that never raise in the middle of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

JITTERS = (1e-6, 1e-4, 1e-2)
"""Multiples of the mean diagonal added, in turn, to a matrix that is not numerically positive definite."""


def positive_inverse(matrix: Tensor) -> tuple[Tensor | None, str]:
    """(M⁻¹, note) of a symmetric positive definite matrix (…, k, k) by Cholesky, about k³ multiplications.

    The ladder: the given precision; float64; float64 with jitter on the diagonal. ``(None, note)`` where all of it fails, for the
    caller to keep its last inverse. The note is empty when the plain solver succeeded.
    """
    if not all_finite(matrix):
        return None, "factor is not finite"
    k = matrix.shape[-1]
    bordered = _bordered(matrix) if k >= 128 and k % 64 == 0 else matrix
    factor, info = torch.linalg.cholesky_ex(bordered)
    if not bool(info.any()):
        # LAPACK's result is column-major: its transpose, which equals it, is laid out as the products want it.
        return torch.cholesky_inverse(factor).mT[..., :k, :k].contiguous(), ""
    precise = matrix.double()
    mean = precise.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None]
    for jitter in (0.0, *JITTERS):
        factor, info = torch.linalg.cholesky_ex(precise + torch.diag_embed((jitter * mean).expand(matrix.shape[:-1])))
        if not bool(info.any()):
            note = "Cholesky failed; retried in float64" + (f" with jitter {jitter:g}" if jitter else "")
            return torch.cholesky_inverse(factor).to(matrix.dtype), note
    return None, "factor is not positive definite"


def all_finite(t: Tensor) -> bool:
    """Whether a tensor holds no NaN or infinity: the sum of one that does is never finite. (A sum that overflows counts too.)"""
    return math.isfinite(float(t.sum()))


def _bordered(matrix: Tensor) -> Tensor:
    """``diag(M, 1)``: rows a power of two long fall on the same cache lines, which makes LAPACK's Cholesky up to four times slower."""
    k = matrix.shape[-1]
    out = matrix.new_zeros(*matrix.shape[:-2], k + 1, k + 1)
    out[..., :k, :k] = matrix
    out[..., k, k] = 1.0
    return out
