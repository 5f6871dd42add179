"""Spectral care: eigendecompositions that never raise in the middle of training, and where to
truncate (theory §7)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

JITTERS = (1e-12, 1e-9, 1e-6)
"""Multiples of the mean eigenvalue tried, in turn, on the diagonal of a matrix whose eigensolver
failed."""


@dataclass(frozen=True)
class Spectrum:
    """``matrix ≈ basis · diag(eigenvalues) · basisᵀ``: eigenvalues (…, k) ascending and ≥ 0, basis
    (…, k, k).

    ``note`` is empty when the plain solver succeeded, and otherwise says which remedy was used.
    """

    eigenvalues: Tensor
    basis: Tensor
    note: str = ""


def symmetrise(matrix: Tensor) -> Tensor:
    """``(M + Mᵀ)/2`` over the last two dimensions."""
    return (matrix + matrix.mT) / 2


def eigh(
    matrix: Tensor, last: Spectrum | None = None, dtype: torch.dtype | None = None
) -> Spectrum:
    """Eigendecomposition of a symmetric positive semi-definite matrix (…, k, k). Never raises on
    finite-shaped input.

    The ladder: the given precision (or ``dtype``); float64; float64 with jitter scaled to the mean
    eigenvalue; the basis of ``last`` with its Rayleigh quotients on this matrix (or, when the
    matrix is not finite, ``last`` itself); the unit basis with the diagonal. Negative eigenvalues,
    which are rounding, become 0. Cost O(k³); results in the matrix's own dtype.
    """
    kind = matrix.dtype
    work = kind if dtype is None else dtype
    if work in (torch.float16, torch.bfloat16):
        work = torch.float32
    if not bool(torch.isfinite(matrix).all()):
        return _not_finite(matrix, last)
    clean = symmetrise(matrix.to(work))
    attempts: list[tuple[torch.dtype, float]] = [(work, 0.0)]
    if work != torch.float64:
        attempts.append((torch.float64, 0.0))
    attempts += [(torch.float64, jitter) for jitter in JITTERS]
    for number, (precision, jitter) in enumerate(attempts):
        trial = clean.to(precision)
        scale = trial.diagonal(dim1=-2, dim2=-1).abs().mean(-1)
        shift = (jitter * scale)[..., None]
        if jitter:
            trial = trial + torch.diag_embed(shift.expand(*trial.shape[:-1]))
        try:
            values, basis = torch.linalg.eigh(trial)
        except (
            RuntimeError
        ):  # torch.linalg.LinAlgError, and what a broken LAPACK or cuSOLVER call raises
            continue
        if not bool(torch.isfinite(values).all() & torch.isfinite(basis).all()):
            continue
        note = ""
        if number:
            note = "eigensolver failed; retried in float64" + (
                f" with jitter {jitter:g}" if jitter else ""
            )
        return Spectrum((values - shift).clamp_(min=0).to(kind), basis.to(kind), note)
    if last is not None:
        values = rayleigh(clean.to(last.basis.dtype), last.basis)
        return Spectrum(
            values.clamp_(min=0).to(kind), last.basis, "eigensolver failed; kept the last basis"
        )
    return _unit(clean.to(kind), "eigensolver failed; used the unit basis")


def rayleigh(matrix: Tensor, basis: Tensor) -> Tensor:
    """Rayleigh quotients ``diag(Uᵀ M U)`` (…, k): the least-squares eigenvalues for a fixed basis.
    Cost O(k³)."""
    return ((matrix @ basis) * basis).sum(-2)


def orthogonal_iteration(matrix: Tensor, basis: Tensor, steps: int = 1) -> Spectrum:
    """A warm start instead of a full eigendecomposition: ``steps`` rounds of QR(M·U), then Rayleigh
    quotients.

    Cheap (a product and a QR a round) and right when the basis moves slowly between refreshes.
    ``basis``: columns by ascending eigenvalue, as `eigh` gives them; eigenvalues keep that order
    and are not sorted again. Falls back to the given basis, and says so, if QR fails or M is not
    finite.
    """
    if not bool(torch.isfinite(matrix).all()):
        zero = matrix.new_zeros(matrix.shape[:-1])
        return Spectrum(zero, basis, "matrix is not finite; kept the last basis and no eigenvalues")
    note, moved = "", basis
    for _ in range(steps):
        try:
            # The largest come last: orthogonalise them first, or the images of null directions,
            # mere rounding, would displace them.
            candidate = torch.linalg.qr((matrix @ moved).flip(-1)).Q.flip(-1)
        except RuntimeError:
            candidate = torch.full_like(moved, torch.nan)
        if not bool(torch.isfinite(candidate).all()):
            note = "QR failed; kept the last basis"
            break
        moved = candidate
    return Spectrum(rayleigh(matrix, moved).clamp_(min=0), moved, note)


def default_rtol(size: int, dtype: torch.dtype) -> float:
    """Relative threshold below which an eigenvalue is rounding: ``size · machine epsilon``, as for
    a matrix rank."""
    return size * torch.finfo(dtype).eps


def threshold(largest: float, rtol: float, atol: float = 0.0) -> float:
    """``max(rtol·σ_max, atol)`` (theory §7); always positive, so that exact zeros are in the null
    space."""
    return max(rtol * largest, atol, torch.finfo(torch.float64).tiny)


def inverse(eigenvalues: Tensor, damping: float, cut: float) -> Tensor:
    """Eigenvalues of the inverse: ``1/(σ+λ)`` when λ > 0 (Tikhonov), else ``1/σ`` where σ > cut and
    0 elsewhere."""
    if damping > 0:
        return 1.0 / (eigenvalues + damping)
    kept = eigenvalues > cut
    return torch.where(kept, 1.0 / torch.where(kept, eigenvalues, 1.0), 0.0)


def _not_finite(matrix: Tensor, last: Spectrum | None) -> Spectrum:
    if last is not None:
        return Spectrum(
            last.eigenvalues, last.basis, "matrix is not finite; kept the last decomposition"
        )
    clean = torch.nan_to_num(matrix, nan=0.0, posinf=0.0, neginf=0.0)
    return _unit(clean, "matrix is not finite; used the unit basis and its finite diagonal")


def _unit(matrix: Tensor, note: str) -> Spectrum:
    diagonal = matrix.diagonal(dim1=-2, dim2=-1).clamp(min=0)
    order = diagonal.argsort(-1)
    basis = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    basis = basis.expand(*matrix.shape).gather(-1, order[..., None, :].expand(*matrix.shape))
    return Spectrum(diagonal.gather(-1, order), basis, note)
