"""Blocks of a block-diagonal metric, each with a cached eigendecomposition (theory §7).

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
from thermo_opt.fisher.kronecker.factor import Factor


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


class KroneckerBasis(Block):
    """A block whose eigenvectors are products of those of two factors A and G.

    It acts on matrices V (…, out, in); products cost O(out · in · (out + in)); the
    eigendecompositions, O(out³ + in³), are made on first use and kept.
    """

    def __init__(self, A: Factor, G: Factor) -> None:
        self.A, self.G = A, G

    def project(self, v: Tensor) -> Tensor:
        if not self.A.diagonal:
            v = v @ self.A.spectrum.basis
        return v if self.G.diagonal else self.G.spectrum.basis.mT @ v

    def unproject(self, c: Tensor) -> Tensor:
        if not self.A.diagonal:
            c = c @ self.A.spectrum.basis.mT
        return c if self.G.diagonal else self.G.spectrum.basis @ c

    @property
    def notes(self) -> list[str]:
        return [f"{side}: {f.note}" for side, f in (("A", self.A), ("G", self.G)) if f.note]


class KroneckerBlock(KroneckerBasis):
    """``A ⊗ G``, acting on matrices V (…, out, in) as ``G V A``; eigenvalues ``g_i a_j`` in the
    basis U_G · U_Aᵀ.

    ``A``: input side (…, in, in), or (in,) with ``diagonal_A``; ``G``: output side, likewise.
    """

    def __init__(
        self, A: Tensor, G: Tensor, diagonal_A: bool = False, diagonal_G: bool = False
    ) -> None:
        super().__init__(Factor(A, diagonal_A), Factor(G, diagonal_G))

    @property
    def eigenvalues(self) -> Tensor:
        return self.G.values[..., :, None] * self.A.values[..., None, :]

    def matvec(self, v: Tensor) -> Tensor:
        return self.G.left(self.A.right(v))

    def dense(self) -> Tensor:
        return _block_diagonal(_kron(self.G.full(), self.A.full()))

    @property
    def trace(self) -> float:
        return float((self.A.trace * self.G.trace).sum())


class EigenvalueCorrectedBlock(KroneckerBasis):
    """EKFAC: the eigenbasis of ``A ⊗ G`` with eigenvalues (…, out, in) equal to the second moments
    of the per-example gradients projected on it, the closest such operator to F in Frobenius norm
    (George et al. 2018)."""

    def __init__(self, base: KroneckerBasis, eigenvalues: Tensor) -> None:
        super().__init__(base.A, base.G)
        self._eigenvalues = eigenvalues

    @property
    def eigenvalues(self) -> Tensor:
        return self._eigenvalues

    def dense(self) -> Tensor:
        sides = [
            torch.eye(f.values.shape[-1], dtype=f.values.dtype, device=f.values.device)
            if f.diagonal
            else f.spectrum.basis
            for f in (self.G, self.A)
        ]
        basis = _kron(*sides)
        return _block_diagonal(basis * self.eigenvalues.flatten(-2)[..., None, :] @ basis.mT)


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
        return float(self.factor.trace.sum())

    @property
    def notes(self) -> list[str]:
        return [self.factor.note] if self.factor.note else []


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


def _kron(G: Tensor, A: Tensor) -> Tensor:
    """Kronecker product over the last two dimensions, for row-major flattening of (out, in)."""
    out, inputs = G.shape[-1], A.shape[-1]
    product = G[..., :, None, :, None] * A[..., None, :, None, :]
    return product.reshape(*product.shape[:-4], out * inputs, out * inputs)


def _block_diagonal(stack: Tensor) -> Tensor:
    return stack if stack.dim() == 2 else torch.block_diag(*stack.flatten(0, -3))
