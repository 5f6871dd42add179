"""One side of a Kronecker product, and how a damping is divided between the two sides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thermo_opt.fisher import spectral

Amount = Tensor | float
"""A multiple of the identity: a number, or one per matrix of a batch."""


class Factor:
    """One side of a Kronecker product: a matrix (…, k, k), its diagonal (…, k), or its diagonal
    blocks.

    Leading dimensions are a batch of factors. The spectrum is made on demand, and only of a factor
    that is whole or a diagonal.

    Args:
        blocks: the matrix, or the list of its diagonal blocks.
        diagonal: whether the one block is a diagonal.
    """

    def __init__(self, blocks: Tensor | Sequence[Tensor], diagonal: bool = False) -> None:
        self.blocks = [blocks] if isinstance(blocks, Tensor) else list(blocks)
        self.diagonal = diagonal
        ends = list(itertools.accumulate(block.shape[-1] for block in self.blocks))
        self.ends = list(zip([0, *ends], ends, strict=False))
        self._spectrum: spectral.Spectrum | None = None

    @property
    def matrix(self) -> Tensor:
        """The factor that is whole, or its diagonal."""
        (matrix,) = self.blocks
        return matrix

    # ---- products

    def left(self, v: Tensor) -> Tensor:
        """``M v`` with v (…, k, m)."""
        parts = [self.block_left(j, v[..., s:e, :]) for j, (s, e) in enumerate(self.ends)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def right(self, v: Tensor) -> Tensor:
        """``v M`` with v (…, m, k)."""
        parts = [self.block_right(j, v[..., s:e]) for j, (s, e) in enumerate(self.ends)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def block_left(self, j: int, v: Tensor) -> Tensor:
        """Block j times v."""
        return self.blocks[j][..., None] * v if self.diagonal else self.blocks[j] @ v

    def block_right(self, j: int, v: Tensor) -> Tensor:
        """v times block j."""
        return v * self.blocks[j] if self.diagonal else v @ self.blocks[j]

    def full(self) -> Tensor:
        """The matrix, a diagonal one spelt out."""
        return torch.diag_embed(self.matrix) if self.diagonal else self.matrix

    # ---- the diagonal

    @property
    def diagonals(self) -> list[Tensor]:
        """The diagonal of each block (…, k)."""
        if self.diagonal:
            return self.blocks
        return [block.diagonal(dim1=-2, dim2=-1) for block in self.blocks]

    @property
    def trace(self) -> Tensor:
        """Trace (…,), without an eigendecomposition."""
        sums = [diagonal.sum(-1) for diagonal in self.diagonals]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)

    @property
    def mean(self) -> Tensor:
        """Mean of the diagonal (…,), which is that of the eigenvalues."""
        diagonals = self.diagonals
        return (diagonals[0] if len(diagonals) == 1 else torch.cat(diagonals, dim=-1)).mean(-1)

    # ---- the spectrum

    @property
    def spectrum(self) -> spectral.Spectrum:
        """Cached eigendecomposition; of a diagonal side the values in place, without a basis."""
        if self._spectrum is None:
            if self.diagonal:
                values = self.matrix.clamp(min=0)
                self._spectrum = spectral.Spectrum(values, self.matrix.new_empty(0))
            else:
                self._spectrum = spectral.eigh(self.matrix)
        return self._spectrum

    @property
    def decomposed(self) -> bool:
        """Whether a decomposition without a failure is at hand."""
        return self._spectrum is not None and not self._spectrum.note

    @property
    def note(self) -> str:
        """What the eigensolver had to say; empty when it simply worked or did not run."""
        return "" if self._spectrum is None else self._spectrum.note

    def update(self, matrix: Tensor, spectrum: spectral.Spectrum | None = None) -> None:
        """Replace the matrix, and its spectrum (given, or recomputed with the previous one as the
        last resort)."""
        last, self.blocks = self._spectrum, [matrix]
        if spectrum is None and not self.diagonal:
            spectrum = spectral.eigh(matrix, last=last)
        self._spectrum = spectrum

    @property
    def values(self) -> Tensor:
        """Eigenvalues (…, k)."""
        return self.spectrum.eigenvalues


def factored_damping(A: Factor, G: Factor, damping: float) -> tuple[Amount, Amount]:
    """The two sides' shares ``(π√λ, √λ/π)`` of a damping λ, π² = (tr A/dim A)/(tr G/dim G).

    An approximation to ``A ⊗ G + λI`` that keeps the Kronecker form (Martens & Grosse 2015, §6.3).
    π = 1 where a trace is zero. Returns numbers, or tensors of one number per factor of a batch.
    """
    mean_a, mean_g = A.mean, G.mean
    if mean_a.dim() == mean_g.dim() == 0:
        a, g = torch.stack([mean_a, mean_g.to(mean_a.dtype)]).tolist()
        ratio = a / g if g != 0 else 0.0
        root = math.sqrt(ratio) if 0 < ratio < math.inf else 1.0
        return root * damping**0.5, damping**0.5 / root
    pi = (mean_a / mean_g).sqrt()
    pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))
    return pi * damping**0.5, damping**0.5 / pi


def nearest_product(terms: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One Kronecker pair for a sum ``S = Σ X_k ⊗ Y_k``: the product of the partial traces of S over
    its trace.

    For a weight used by several layers (tied weights): exact when there is one term, and it keeps
    the trace and both partial traces of S. Each term is (X, Y), both full matrices or both
    diagonals on a side.
    """
    weights = [tuple(Factor(side, side.dim() == 1).trace for side in pair) for pair in terms]
    total = sum(tx * ty for tx, ty in weights)
    if len(terms) == 1 or float(total) == 0.0:
        return terms[0]
    left = torch.stack([x * ty for (x, _), (_, ty) in zip(terms, weights, strict=True)]).sum(0)
    right = torch.stack([y * tx for (_, y), (tx, _) in zip(terms, weights, strict=True)]).sum(0)
    return left, right / total
