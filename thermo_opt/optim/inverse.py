"""Inverses of damped factors that never raise in the middle of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor

JITTERS = (1e-6, 1e-4, 1e-2)
"""Multiples of the mean diagonal added, in turn, to a matrix that is not numerically positive definite."""


SMALL = 160
"""Up to this side the inverse is L⁻ᵀL⁻¹, three times the multiplications of LAPACK's inverse from the Cholesky factor but run by threads:
two take 0.7 of its time, one 1.1. The same on GPUs."""

Amount = Tensor | float
"""A multiple of the identity: a number, or one a matrix of a batch."""


def positive_inverse(matrix: Tensor, shift: Amount = 0.0) -> tuple[Tensor | None, str]:
    """((M + cI)⁻¹, note) of a symmetric positive definite matrix (…, k, k) by Cholesky, about k³ multiplications.

    The ladder: the given precision; float64; float64 with jitter on the diagonal. ``(None, note)`` where all of it fails, for the
    caller to keep its last inverse. The note is empty when the plain solver succeeded.
    """
    inverse = plain_inverse(matrix, shift)
    if inverse is not None:
        return inverse, ""
    if not all_finite(matrix):
        return None, "factor is not finite"
    precise = shifted(matrix.double(), shift)
    mean = precise.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None]
    for jitter in (0.0, *JITTERS):
        factor, info = torch.linalg.cholesky_ex(precise + torch.diag_embed((jitter * mean).expand(matrix.shape[:-1])))
        if not bool(info.any()):
            note = "Cholesky failed; retried in float64" + (f" with jitter {jitter:g}" if jitter else "")
            return torch.cholesky_inverse(factor).to(matrix.dtype), note
    return None, "factor is not positive definite"


def plain_inverse(matrix: Tensor, shift: Amount) -> Tensor | None:
    """(M + cI)⁻¹ of matrices (…, k, k) in the given precision, or None where one is not positive definite (or not finite)."""
    k = matrix.shape[-1]
    factor, info = torch.linalg.cholesky_ex(shifted(matrix, shift, border=k >= 128 and k % 64 == 0))
    if bool(info.any()) or not all_finite(factor.diagonal(dim1=-2, dim2=-1)):
        return None
    if k <= SMALL or matrix.is_cuda:
        eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device).expand_as(factor)
        root = torch.linalg.solve_triangular(factor, eye, upper=False)[..., :k, :k]
        return root.mT @ root
    # LAPACK's result is column-major: its transpose, which equals it, is laid out as the products want it.
    return torch.cholesky_inverse(factor).mT[..., :k, :k].contiguous()


def all_finite(t: Tensor) -> bool:
    """Whether a tensor holds no NaN or infinity: the sum of one that does is never finite. (A sum that overflows counts too.)"""
    return math.isfinite(float(t.sum()))


def shifted(matrix: Tensor, amount: Amount, border: bool = False) -> Tensor:
    """M + cI, a diagonal (k,) staying one; with ``border``, ``diag(M + cI, 1)``.

    The border serves Cholesky: rows a power of two long fall on the same cache lines, which makes LAPACK's up to four times slower.
    """
    if matrix.dim() == 1:
        return matrix + amount
    if border:
        k = matrix.shape[-1]
        out = matrix.new_zeros(*matrix.shape[:-2], k + 1, k + 1)
        out[..., :k, :k] = matrix
        out[..., k, k] = 1.0
        inner = out[..., :k, :k]
    else:
        out = inner = matrix.clone()
    diagonal = inner.diagonal(dim1=-2, dim2=-1)
    diagonal += amount[..., None] if isinstance(amount, Tensor) and amount.dim() else amount
    return out
