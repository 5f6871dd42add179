"""Inverses of damped factors that never raise in the middle of training."""

from __future__ import annotations

import torch
from torch import Tensor

JITTERS = (1e-6, 1e-4, 1e-2)
"""Multiples of the mean diagonal added, in turn, to a matrix that is not numerically positive definite."""


def positive_inverse(matrix: Tensor) -> tuple[Tensor | None, str]:
    """(M⁻¹, note) of a symmetric positive definite matrix (…, k, k) by Cholesky, about k³ multiplications.

    The ladder: the given precision; float64; float64 with jitter on the diagonal. ``(None, note)`` where all of it fails, for the
    caller to keep its last inverse. The note is empty when the plain solver succeeded.
    """
    if not bool(torch.isfinite(matrix).all()):
        return None, "factor is not finite"
    factor, info = torch.linalg.cholesky_ex(matrix)
    if not bool(info.any()):
        return torch.cholesky_inverse(factor), ""
    precise = matrix.double()
    mean = precise.diagonal(dim1=-2, dim2=-1).abs().mean(-1)[..., None]
    for jitter in (0.0, *JITTERS):
        factor, info = torch.linalg.cholesky_ex(precise + torch.diag_embed((jitter * mean).expand(matrix.shape[:-1])))
        if not bool(info.any()):
            note = "Cholesky failed; retried in float64" + (f" with jitter {jitter:g}" if jitter else "")
            return torch.cholesky_inverse(factor).to(matrix.dtype), note
    return None, "factor is not positive definite"
