"""Solvers of one block of the training metric: F_λ⁻¹ v and F_λ v with everything that can be cached cached (THEORY §7).

Two families. *Inverses* (`KroneckerInverse`, `DenseInverse`): Cholesky inverses of damped factors, the fast default: half the
products of an eigenbasis at each step and a fifth of its cost at each refresh. *Spectral* (`Spectral`): an eigenbasis, which exact
Tikhonov damping, truncation, null-space steps and EKFAC need. Each uses one F_λ for solve and matvec, so that |ε| ≤ 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from thermo_opt.fisher import spectral
from thermo_opt.fisher.kronecker import Block
from thermo_opt.optim.inverse import Amount, positive_inverse, shifted


class Solver(ABC):
    """F_λ of one block, in the block's coordinates."""

    notes: list[str]

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """F_λ⁻¹ v (spectral with λ = 0: F⁺v)."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """F_λ v."""

    def accumulate(self, b: Tensor, mu: float, v: Tensor) -> None:
        """b ← μ b + F_λ⁻¹ v, in place."""
        b.mul_(mu).add_(self.solve(v))

    def cached(self) -> list[Tensor]:
        """The costly tensors of a refresh, for one process to compute and the others to receive."""
        return []


def _mean_of_blocks(blocks: Sequence[Tensor]) -> Tensor:
    """Mean of a side's diagonal: a scalar, or one a group."""
    diagonals = [block if block.dim() == 1 else block.diagonal(dim1=-2, dim2=-1) for block in blocks]
    return diagonals[0].mean(-1) if len(diagonals) == 1 else torch.cat(diagonals).mean()


def damping_split(A: Sequence[Tensor], G: Sequence[Tensor], damping: float) -> tuple[Amount, Amount]:
    """The sides' shares (π√λ, √λ/π), π² = (tr A/dim A)/(tr G/dim G): Martens & Grosse 2015, §6.3. π = 1 where a trace is 0.

    Each side is a list of diagonal blocks. Numbers, or tensors of one number a group.
    """
    mean_a, mean_g = _mean_of_blocks(A), _mean_of_blocks(G)
    if mean_a.dim() == mean_g.dim() == 0:
        a, g = torch.stack([mean_a, mean_g.to(mean_a.dtype)]).tolist()
        ratio = a / g if g != 0 else 0.0
        root = math.sqrt(ratio) if 0 < ratio < math.inf else 1.0
        return root * damping**0.5, damping**0.5 / root
    pi = (mean_a / mean_g).sqrt()
    pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))
    return pi * damping**0.5, damping**0.5 / pi


class Side:
    """One side of a damped Kronecker product, ``M + cI``, and its inverse: diagonal blocks (…, k, k), or one diagonal (k,).

    Several blocks only for plain matrices. A block whose inverse fails keeps that of ``last``, or becomes a multiple of the identity.
    The blocks are not copied: `damped` is right until the running factors change, which makes a new solver.
    """

    def __init__(self, blocks: Sequence[Tensor], amount: Amount, last: Side | None, compute: bool = True) -> None:
        self.notes: list[str] = []
        self.blocks: list[Tensor] = []
        self.amounts: list[Amount] = []
        self.inverses: list[Tensor] = []
        self.ends: list[tuple[int, int]] = []
        start = 0
        for i, block in enumerate(blocks):
            shift = amount
            inverse: Tensor | None
            if block.dim() == 1:
                inverse = (block + amount).reciprocal()
            elif not compute:
                inverse = torch.empty_like(block)
            else:
                inverse, note = positive_inverse(block, amount)
                if inverse is None:
                    shift = 0.0
                    if last is not None:
                        inverse = last.inverses[i]
                        note += "; kept the last inverse"
                    else:
                        mean = torch.nan_to_num(_mean_of_blocks([block]), posinf=0.0, neginf=0.0).abs() + 1.0
                        inverse = torch.diag_embed((1 / mean)[..., None].expand(block.shape[:-1]))
                        note += "; used a multiple of the identity"
                    block = torch.linalg.inv(inverse.double()).to(block.dtype)
                if note:
                    self.notes.append(note)
            self.blocks.append(block)
            self.amounts.append(shift)
            self.inverses.append(inverse)
            self.ends.append((start, start + block.shape[-1]))
            start += block.shape[-1]

    def damped(self) -> list[Tensor]:
        """The blocks of ``M + cI``."""
        return [shifted(block, amount) for block, amount in zip(self.blocks, self.amounts, strict=True)]

    def right(self, v: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """``v M`` with v (…, m, k)."""
        if len(matrices) == 1:
            return v * matrices[0] if matrices[0].dim() == 1 else v @ matrices[0]
        out = torch.empty_like(v)
        for (start, end), block in zip(self.ends, matrices, strict=True):
            torch.mm(v[:, start:end], block, out=out[:, start:end])
        return out

    def left(self, matrices: Sequence[Tensor], v: Tensor) -> Tensor:
        """``M v`` with v (…, k, m)."""
        if len(matrices) == 1:
            return matrices[0][..., None] * v if matrices[0].dim() == 1 else matrices[0] @ v
        out = torch.empty_like(v)
        for (start, end), block in zip(self.ends, matrices, strict=True):
            torch.mm(block, v[start:end], out=out[start:end])
        return out


class KroneckerInverse(Solver):
    """``(A + π√λ I) ⊗ (G + √λ/π I)`` on matrices V (…, out, in), each side one matrix, its diagonal blocks, or a diagonal.

    Refresh: Cholesky inverses, Σ k³ over blocks; solve: out·in·(k_A + k_G) multiplications for blocks of side k.
    """

    def __init__(
        self,
        A: Sequence[Tensor],
        G: Sequence[Tensor],
        damping: float,
        last: KroneckerInverse | None,
        compute: bool = True,
    ) -> None:
        on_a, on_g = damping_split(A, G, damping)
        last_a, last_g = (None, None) if last is None else (last.A, last.G)
        self.A: Side = Side(A, on_a, last_a, compute)
        self.G: Side = Side(G, on_g, last_g, compute)
        self.notes = [f"A: {n}" for n in self.A.notes] + [f"G: {n}" for n in self.G.notes]

    def solve(self, v: Tensor) -> Tensor:
        return self.G.left(self.G.inverses, self.A.right(v, self.A.inverses))

    def accumulate(self, b: Tensor, mu: float, v: Tensor) -> None:
        if v.dim() > 2 or self.G.inverses[0].dim() == 1:
            super().accumulate(b, mu, v)
            return
        half = self.A.right(v, self.A.inverses)
        for (start, end), block in zip(self.G.ends, self.G.inverses, strict=True):
            b[start:end].addmm_(block, half[start:end], beta=mu)

    def matvec(self, v: Tensor) -> Tensor:
        return self.G.left(self.G.damped(), self.A.right(v, self.A.damped()))

    def cached(self) -> list[Tensor]:
        return [t for side in (self.A, self.G) for t in side.inverses if t.dim() > 1]


class DenseInverse(Solver):
    """``M + λI`` on vectors (…, k), inverted by Cholesky."""

    def __init__(self, matrix: Tensor, damping: float, last: DenseInverse | None, compute: bool = True) -> None:
        self.notes: list[str] = []
        self.matrix, self.damping = matrix, damping
        if not compute:
            self.inverse = torch.empty_like(matrix)
            return
        inverse, note = positive_inverse(matrix, damping)
        if note:
            self.notes.append(note)
        if inverse is None:
            self.notes.append("kept the last inverse")
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
            inverse = eye if last is None else last.inverse
            self.matrix, self.damping = torch.linalg.inv(inverse.double()).to(matrix.dtype), 0.0
        self.inverse = inverse

    def solve(self, v: Tensor) -> Tensor:
        return (self.inverse @ v[..., None])[..., 0]

    def matvec(self, v: Tensor) -> Tensor:
        return (self.matrix @ v[..., None])[..., 0] + self.damping * v

    def cached(self) -> list[Tensor]:
        return [self.inverse]


class DiagonalInverse(Solver):
    """``diag(f) + λ``; with λ = 0 entries ≤ cut are the null space."""

    def __init__(self, values: Tensor, damping: float, rtol: float = 0.0, atol: float = 0.0) -> None:
        self.notes: list[str] = []
        self.cut = spectral.threshold(float(values.max()), rtol, atol)
        self.values, self.damping = values, damping
        self.inverse = spectral.inverse(values, damping, self.cut)

    def solve(self, v: Tensor) -> Tensor:
        return self.inverse * v

    def matvec(self, v: Tensor) -> Tensor:
        return (self.values + self.damping) * v

    def null(self, v: Tensor) -> Tensor:
        return torch.where(self.values > self.cut, 0.0, v)

    @property
    def rank(self) -> int:
        """Number of entries above the threshold."""
        return int((self.values > self.cut).sum())


class Spectral(Solver):
    """Any block with an eigenbasis, ``U diag(σ) Uᵀ + λI``; with λ = 0 eigenvalues ≤ max(rtol·σ_max, atol) are truncated.

    In a Kronecker basis the σ are the products a_i g_j, and the threshold acts on the products.
    """

    def __init__(self, block: Block, damping: float, rtol: float, atol: float) -> None:
        self.block, self.damping = block, damping
        self.cut = spectral.threshold(float(block.eigenvalues.max()), rtol, atol)
        self.inverse = spectral.inverse(block.eigenvalues, damping, self.cut)
        self.notes = block.notes

    def solve(self, v: Tensor) -> Tensor:
        return self.block.unproject(self.inverse * self.block.project(v))

    def matvec(self, v: Tensor) -> Tensor:
        return self.block.matvec(v) + self.damping * v

    def null(self, v: Tensor) -> Tensor:
        """P₀v, the part of v in the truncated space, whatever the damping."""
        return self.block.split(v, self.cut)[1]

    @property
    def rank(self) -> int:
        """Number of eigenvalues above the threshold."""
        return int((self.block.eigenvalues > self.cut).sum())
