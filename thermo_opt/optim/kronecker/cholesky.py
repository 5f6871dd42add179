"""Inverses of damped factors that never raise in the middle of training."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker.factor import Amount

JITTERS = (1e-6, 1e-4, 1e-2)
"""Multiples of the mean diagonal added, in turn, to a matrix that is not numerically positive
definite."""


SMALL = 300
"""Up to this side the inverse is L⁻ᵀL⁻¹: three times the multiplications of LAPACK's inverse from
the Cholesky factor, but in parallel. Time over LAPACK's: 1.1 with one thread; with two, 0.7 at side
128 and 0.8 at 256."""

TOGETHER = 1 << 20
"""Most numbers that are inverted in one batch (memory: three times as much)."""


def positive_inverse(matrix: Tensor, shift: Amount = 0.0) -> tuple[Tensor | None, str]:
    """((M + cI)⁻¹, note) of a symmetric positive definite matrix (k, k) by Cholesky, about k³
    multiplications.

    The ladder: the given precision; float64; float64 with jitter on the diagonal. ``(None, note)``
    where all of it fails, for the caller to keep its last inverse. The note is empty when the plain
    solver succeeded.
    """
    inverses = plain_inverses([matrix], [shift])
    if inverses is not None:
        return inverses[0], ""
    if not all_finite(matrix):
        return None, "factor is not finite"
    precise = shifted(matrix.double(), shift)
    mean = precise.diagonal().abs().mean()
    for jitter in (0.0, *JITTERS):
        factor, info = torch.linalg.cholesky_ex(
            precise + torch.diag_embed((jitter * mean).expand(len(matrix)))
        )
        if not bool(info.any()):
            note = "Cholesky failed; retried in float64" + (
                f" with jitter {jitter:g}" if jitter else ""
            )
            return torch.cholesky_inverse(factor).to(matrix.dtype), note
    return None, "factor is not positive definite"


def plain_inverses(matrices: Sequence[Tensor], shifts: Sequence[Amount]) -> list[Tensor] | None:
    """(M + cI)⁻¹ of matrices (k, k) or batches (m, k, k) of one side k, computed as one batch in
    the given precision.

    None where one of them is not positive definite (or not finite). The same batch gives the same
    bits; what an inverse shares its batch with may change its last digits, because a library's
    kernels depend on where in memory a matrix starts and on how many there are.
    """
    k, like = matrices[0].shape[-1], matrices[0]
    # A border diag(M, 1): rows a power of two long fall on the same cache lines, which makes
    # LAPACK's Cholesky up to four times slower.
    side = k + (k >= 128 and k % 64 == 0)
    counts = [len(m) if m.dim() == 3 else 1 for m in matrices]
    work = like.new_empty(sum(counts), side, side)
    inner, diagonal = work[:, :k, :k], work.diagonal(dim1=-2, dim2=-1)
    if side > k:
        work[:, k, :k] = 0.0  # the upper triangle is not read
        diagonal[:, k] = 1.0
    torch._foreach_copy_(
        [part.view_as(m) for part, m in zip(inner.split(counts), matrices, strict=True)],
        list(matrices),
    )
    _shift(inner, _together(shifts, counts, like))
    factor, info = torch.linalg.cholesky_ex(work)
    if bool(info.any()) or not all_finite(factor.diagonal(dim1=-2, dim2=-1)):
        return None
    if k <= SMALL or like.is_cuda:
        eye = torch.eye(side, dtype=like.dtype, device=like.device).expand_as(factor)
        root = torch.linalg.solve_triangular(factor, eye, upper=False)[:, :k, :k]
        whole = root.mT @ root
    else:  # LAPACK's result is column-major: its equal transpose is laid out as products want
        whole = torch.cholesky_inverse(factor).mT[:, :k, :k]
    parts = whole.split(counts)
    return [
        part if matrix.dim() == 3 else part[0] for part, matrix in zip(parts, matrices, strict=True)
    ]


def all_finite(*tensors: Tensor) -> bool:
    """Whether tensors hold no NaN or infinity: the sum of one that does is never finite.

    A sum that overflows counts too.
    """
    return math.isfinite(float(total(tensors)))


def total(tensors: Sequence[Tensor]) -> Tensor:
    """A number on the device that is finite only if all entries are: their sum, or on a GPU, where
    one call for all tensors is what counts, the sum of their sizes."""
    if tensors[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(tensors), 1)).sum()
    sums = [t.sum() for t in tensors]
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def shifted(matrix: Tensor, amount: Amount) -> Tensor:
    """M + cI, a diagonal (k,) staying one."""
    if matrix.dim() == 1:
        return matrix + amount
    return _shift(matrix.clone(), amount)


def _together(shifts: Sequence[Amount], counts: Sequence[int], like: Tensor) -> Amount:
    """The multiples for all matrices of a batch."""
    if not any(isinstance(shift, Tensor) for shift in shifts):
        return torch.tensor(
            [shift for shift, n in zip(shifts, counts, strict=True) for _ in range(n)],
            dtype=like.dtype,
            device=like.device,
        )
    return torch.cat(
        [
            torch.as_tensor(shift, dtype=like.dtype, device=like.device).expand(n)
            for shift, n in zip(shifts, counts, strict=True)
        ]
    )


def _shift(matrix: Tensor, amount: Amount) -> Tensor:
    """Add cI in place."""
    matrix.diagonal(dim1=-2, dim2=-1).add_(
        amount[..., None] if isinstance(amount, Tensor) and amount.dim() else amount
    )
    return matrix
