"""Blocks of a block-diagonal metric, each with a cached eigendecomposition (THEORY §7).

A block acts on tensors in its own coordinates: matrices (…, out, in) for Kronecker blocks, vectors
(…, k) for dense ones, any shape for diagonal ones. Leading dimensions are a batch of independent
blocks (groups of a convolution, channels). Every block is ``U diag(σ) Uᵀ`` for an orthogonal U, so
all of its linear algebra follows from `project`, `unproject`, `eigenvalues`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from thermo_opt.fisher import spectral


class Block(ABC):
    """A symmetric positive semi-definite operator with a known eigenbasis."""

    @property
    @abstractmethod
    def eigenvalues(self) -> Tensor:
        """Eigenvalues σ ≥ 0, in the shape of a projected vector."""

    @abstractmethod
    def project(self, v: Tensor) -> Tensor:
        """Coordinates ``Uᵀ v`` in the eigenbasis."""

    @abstractmethod
    def unproject(self, c: Tensor) -> Tensor:
        """``U c``: the inverse of `project`."""

    def matvec(self, v: Tensor) -> Tensor:
        """The block (undamped) times v."""
        return self.unproject(self.eigenvalues * self.project(v))

    def quadratic(self, v: Tensor) -> Tensor:
        """``vᵀ B v`` (undamped), a scalar tensor."""
        return (v * self.matvec(v)).sum()

    def solve(self, g: Tensor, damping: float = 0.0, cut: float = 0.0) -> Tensor:
        """``(B + λI)⁻¹ g``; with λ = 0 the pseudo-inverse that keeps eigenvalues above ``cut``."""
        return self.unproject(spectral.inverse(self.eigenvalues, damping, cut) * self.project(g))

    def dual_norm(self, g: Tensor, damping: float = 0.0, cut: float = 0.0) -> Tensor:
        """``gᵀ (B + λI)⁻¹ g``, a scalar tensor: this block's share of Δ."""
        return (spectral.inverse(self.eigenvalues, damping, cut) * self.project(g).square()).sum()

    def split(self, g: Tensor, cut: float = 0.0) -> tuple[Tensor, Tensor]:
        """Range and null components of g; the null part is ``U ((1 − mask) ∘ Uᵀ g)`` with mask = σ
        > cut."""
        null = self.unproject(torch.where(self.eigenvalues > cut, 0.0, self.project(g)))
        return g - null, null

    @abstractmethod
    def dense(self) -> Tensor:
        """The block as one matrix on the flattened coordinates. For small blocks: memory
        O(size²)."""

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        return float(self.eigenvalues.sum(dtype=torch.float64))

    @property
    def notes(self) -> list[str]:
        """What the eigensolver had to say; empty when it simply worked."""
        return []


class Factor:
    """One side of a Kronecker product: a matrix (…, k, k), or the diagonal (k,) of one, with its
    spectrum on demand."""

    def __init__(self, matrix: Tensor, diagonal: bool = False) -> None:
        self.matrix = matrix
        self.diagonal = diagonal
        self._spectrum: spectral.Spectrum | None = None

    @property
    def spectrum(self) -> spectral.Spectrum:
        """Cached eigendecomposition; for a diagonal side the values in place, and no basis is
        formed."""
        if self._spectrum is None:
            if self.diagonal:
                self._spectrum = spectral.Spectrum(
                    self.matrix.clamp(min=0), self.matrix.new_empty(0)
                )
            else:
                self._spectrum = spectral.eigh(self.matrix)
        return self._spectrum

    @property
    def decomposed(self) -> bool:
        """Whether a decomposition without a failure is at hand."""
        return self._spectrum is not None and not self._spectrum.note

    def update(self, matrix: Tensor, spectrum: spectral.Spectrum | None = None) -> None:
        """Replace the matrix, and its spectrum (given, or recomputed with the previous one as the
        last resort)."""
        last, self.matrix = self._spectrum, matrix
        if spectrum is None and not self.diagonal:
            spectrum = spectral.eigh(matrix, last=last)
        self._spectrum = spectrum

    @property
    def values(self) -> Tensor:
        """Eigenvalues (…, k)."""
        return self.spectrum.eigenvalues

    def left(self, v: Tensor) -> Tensor:
        """``M v`` with v (…, k, m)."""
        return self.matrix[..., None] * v if self.diagonal else self.matrix @ v

    def right(self, v: Tensor) -> Tensor:
        """``v M`` with v (…, m, k)."""
        return v * self.matrix if self.diagonal else v @ self.matrix

    def full(self) -> Tensor:
        """The matrix, a diagonal one spelt out."""
        return torch.diag_embed(self.matrix) if self.diagonal else self.matrix

    def full_basis(self) -> Tensor:
        """The eigenbasis, the unit basis of a diagonal side spelt out."""
        return (
            torch.diag_embed(torch.ones_like(self.matrix)) if self.diagonal else self.spectrum.basis
        )

    @property
    def trace(self) -> Tensor:
        """Trace (…,), without an eigendecomposition."""
        return (
            self.matrix.sum(-1) if self.diagonal else self.matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
        )


class KroneckerBlock(Block):
    """``A ⊗ G``, acting on matrices V (…, out, in) as ``G V A``; eigenvalues ``g_i a_j`` in the
    basis U_G · U_Aᵀ.

    ``A``: input side (…, in, in), or (in,) with ``diagonal_A``; ``G``: output side, likewise.
    Products cost O(out · in · (out + in)); the eigendecompositions, O(out³ + in³), are made on
    first use and kept.
    """

    def __init__(
        self, A: Tensor, G: Tensor, diagonal_A: bool = False, diagonal_G: bool = False
    ) -> None:
        self.A = Factor(A, diagonal_A)
        self.G = Factor(G, diagonal_G)

    @property
    def eigenvalues(self) -> Tensor:
        return self.G.values[..., :, None] * self.A.values[..., None, :]

    def project(self, v: Tensor) -> Tensor:
        if not self.A.diagonal:
            v = v @ self.A.spectrum.basis
        return v if self.G.diagonal else self.G.spectrum.basis.mT @ v

    def unproject(self, c: Tensor) -> Tensor:
        if not self.A.diagonal:
            c = c @ self.A.spectrum.basis.mT
        return c if self.G.diagonal else self.G.spectrum.basis @ c

    def matvec(self, v: Tensor) -> Tensor:
        return self.G.left(self.A.right(v))

    def solve_factored(self, g: Tensor, damping: float) -> Tensor:
        """``((A + π√λ I) ⊗ (G + √λ/π I))⁻¹ g`` (Martens & Grosse 2015, §6.3), π as in
        `factored_damping`."""
        on_a, on_g = factored_damping(self.A, self.G, damping)
        values = (self.G.values + on_g[..., None])[..., :, None] * (
            self.A.values + on_a[..., None]
        )[..., None, :]
        return self.unproject(self.project(g) / values)

    def dense(self) -> Tensor:
        return _block_diagonal(_kron(self.G.full(), self.A.full()))

    @property
    def trace(self) -> float:
        return float(
            (
                self.A.full().diagonal(dim1=-2, dim2=-1).sum(-1)
                * self.G.full().diagonal(dim1=-2, dim2=-1).sum(-1)
            ).sum()
        )

    @property
    def notes(self) -> list[str]:
        return [
            f"{side}: {note}"
            for side, factor in (("A", self.A), ("G", self.G))
            if factor._spectrum is not None and (note := factor._spectrum.note)
        ]


class EigenvalueCorrectedBlock(KroneckerBlock):
    """EKFAC: the eigenbasis of ``A ⊗ G`` with eigenvalues (…, out, in) equal to the second moments
    of the per-example gradients projected on it, the closest such operator to F in Frobenius norm
    (George et al. 2018)."""

    def __init__(self, base: KroneckerBlock, eigenvalues: Tensor) -> None:
        self.A, self.G = base.A, base.G
        self._eigenvalues = eigenvalues

    @property
    def eigenvalues(self) -> Tensor:
        return self._eigenvalues

    def matvec(self, v: Tensor) -> Tensor:
        return Block.matvec(self, v)

    def dense(self) -> Tensor:
        sides = [
            torch.eye(f.values.shape[-1], dtype=f.values.dtype, device=f.values.device)
            if f.diagonal
            else f.spectrum.basis
            for f in (self.G, self.A)
        ]
        basis = _kron(*sides)
        return _block_diagonal(basis * self.eigenvalues.flatten(-2)[..., None, :] @ basis.mT)

    @property
    def trace(self) -> float:
        return Block.trace.fget(self)  # type: ignore[attr-defined]


class DenseBlock(Block):
    """A matrix (…, k, k) acting on vectors (…, k)."""

    def __init__(self, matrix: Tensor) -> None:
        self.factor = Factor(matrix)

    @property
    def eigenvalues(self) -> Tensor:
        return self.factor.values

    def project(self, v: Tensor) -> Tensor:
        return (self.factor.spectrum.basis.mT @ v[..., None])[..., 0]

    def unproject(self, c: Tensor) -> Tensor:
        return (self.factor.spectrum.basis @ c[..., None])[..., 0]

    def matvec(self, v: Tensor) -> Tensor:
        return (self.factor.matrix @ v[..., None])[..., 0]

    def dense(self) -> Tensor:
        return _block_diagonal(self.factor.matrix)

    @property
    def trace(self) -> float:
        return float(self.factor.matrix.diagonal(dim1=-2, dim2=-1).sum())

    @property
    def notes(self) -> list[str]:
        spectrum = self.factor._spectrum
        return [spectrum.note] if spectrum is not None and spectrum.note else []


class DiagonalBlock(Block):
    """A diagonal, in the shape of the vectors it acts on."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.clamp(min=0)

    @property
    def eigenvalues(self) -> Tensor:
        return self._values

    def project(self, v: Tensor) -> Tensor:
        return v

    def unproject(self, c: Tensor) -> Tensor:
        return c

    def dense(self) -> Tensor:
        return torch.diag(self._values.flatten())


def factored_damping(A: Factor, G: Factor, damping: float) -> tuple[Tensor, Tensor]:
    """The two sides' shares ``(π√λ, √λ/π)`` of a damping λ, with ``π² = (tr A / dim A) / (tr G /
    dim G)``.

    An approximation to ``A ⊗ G + λI`` that keeps the Kronecker form (Martens & Grosse 2015, §6.3).
    π = 1 if a trace is zero.
    """
    mean_a, mean_g = A.values.mean(-1), G.values.mean(-1)
    pi = (mean_a / mean_g).sqrt()
    pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, 1.0)
    return pi * damping**0.5, damping**0.5 / pi


def nearest_product(terms: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One Kronecker pair for a sum ``S = Σ X_k ⊗ Y_k``: the product of the partial traces of S over
    its trace.

    For a weight used by several layers (tied weights): exact when there is one term, and it keeps
    the trace and both partial traces of S. Each term is (X, Y), both full matrices or both
    diagonals on a side.
    """
    weights = [(_trace(x), _trace(y)) for x, y in terms]
    total = sum(tx * ty for tx, ty in weights)
    if len(terms) == 1 or float(total) == 0.0:
        return terms[0]
    left = torch.stack([x * ty for (x, _), (_, ty) in zip(terms, weights, strict=True)]).sum(0)
    right = torch.stack([y * tx for (_, y), (tx, _) in zip(terms, weights, strict=True)]).sum(0)
    return left, right / total


def _trace(side: Tensor) -> Tensor:
    return side.sum() if side.dim() == 1 else side.diagonal(dim1=-2, dim2=-1).sum()


def _kron(G: Tensor, A: Tensor) -> Tensor:
    """Kronecker product over the last two dimensions, for row-major flattening of (out, in)."""
    out, inputs = G.shape[-1], A.shape[-1]
    product = G[..., :, None, :, None] * A[..., None, :, None, :]
    return product.reshape(*product.shape[:-4], out * inputs, out * inputs)


def _block_diagonal(stack: Tensor) -> Tensor:
    return stack if stack.dim() == 2 else torch.block_diag(*stack.flatten(0, -3))
