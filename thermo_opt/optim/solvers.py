"""Solvers of one block of the training metric: F_λ⁻¹ v and F_λ v with everything that can be cached cached (THEORY §7).

Two families. *Inverses* (`KroneckerInverse`, `DenseInverse`): Cholesky inverses of damped factors, the fast default: half the
products of an eigenbasis at each step and a fifth of its cost at each refresh. *Spectral* (`Spectral`): an eigenbasis, which exact
Tikhonov damping, truncation, null-space steps and EKFAC need. Each uses one F_λ for solve and matvec, so that |ε| ≤ 1.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from thermo_opt.fisher import spectral
from thermo_opt.fisher.kronecker import Block
from thermo_opt.optim.inverse import Amount, plain_inverse, positive_inverse, shifted


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
    """Mean of a side's diagonal: a scalar, or one a product of a batch."""
    diagonals = [block if block.dim() == 1 else block.diagonal(dim1=-2, dim2=-1) for block in blocks]
    return (diagonals[0] if len(diagonals) == 1 else torch.cat(diagonals, dim=-1)).mean(-1)


def damping_split(A: Sequence[Tensor], G: Sequence[Tensor], damping: float) -> tuple[Amount, Amount]:
    """The sides' shares (π√λ, √λ/π), π² = (tr A/dim A)/(tr G/dim G): Martens & Grosse 2015, §6.3. π = 1 where a trace is 0.

    Each side is a list of diagonal blocks. Numbers, or tensors of one number a product of a batch.
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


class Damped:
    """``M + cI`` of a block (k,), (k, k) or a batch (m, k, k), and its inverse.

    One that can't be inverted keeps the inverse of ``last``, or becomes a multiple of the identity, and says so in ``notes``. The block
    is not copied: `matrix` is right until the running factors change, which makes a new one. With ``compute=False`` the inverse is
    left for another process to fill.
    """

    def __init__(self, block: Tensor, amount: Amount, last: Damped | None, compute: bool = True) -> None:
        self.notes: list[str] = []
        self.block, self.amount = block, amount
        self.inverse: Tensor
        if block.dim() == 1:
            self.inverse = (block + amount).reciprocal()
        elif not compute:
            self.inverse = torch.empty_like(block)
        elif block.dim() == 2:
            self._invert(last)
        else:
            whole = plain_inverse(block, amount)
            if whole is None:  # one by one, so that only those that fail are affected
                amounts = amount if isinstance(amount, Tensor) else block.new_full(block.shape[:1], amount)
                each = [
                    Damped(b, c, None if last is None else last[j])
                    for j, (b, c) in enumerate(zip(block, amounts, strict=True))
                ]
                self.notes = sorted({note for one in each for note in one.notes})
                self.block = torch.stack([one.block for one in each])
                self.amount = torch.stack([torch.as_tensor(one.amount, dtype=block.dtype) for one in each]).to(block)
                whole = torch.stack([one.inverse for one in each])
            self.inverse = whole

    def _invert(self, last: Damped | None) -> None:
        inverse, note = positive_inverse(self.block, self.amount)
        if inverse is None:
            if last is not None:
                inverse = last.inverse
                note += "; kept the last inverse"
            else:
                mean = torch.nan_to_num(_mean_of_blocks([self.block]), posinf=0.0, neginf=0.0).abs() + 1.0
                inverse = torch.diag_embed((1 / mean).expand(self.block.shape[-1]))
                note += "; used a multiple of the identity"
            self.block, self.amount = torch.linalg.inv(inverse.double()).to(self.block.dtype), 0.0
        self.inverse = inverse
        if note:
            self.notes.append(note)

    def __getitem__(self, j: int) -> Damped:
        """One of a batch."""
        one = Damped.__new__(Damped)
        one.notes, one.block, one.inverse = [], self.block[j], self.inverse[j]
        one.amount = self.amount[j] if isinstance(self.amount, Tensor) else self.amount
        return one

    @property
    def matrix(self) -> Tensor:
        """``M + cI``; a diagonal stays one."""
        return shifted(self.block, self.amount)


class Side:
    """One side of a damped Kronecker product: its diagonal blocks, or one diagonal (k,).

    ``equal``: the inverses of several blocks of one size as one tensor (…, blocks, k, k), of which they are views.
    """

    def __init__(self, blocks: Sequence[Tensor], amount: Amount, last: Side | None, compute: bool = True) -> None:
        self.parts: list[Damped] = [
            Damped(block, amount, None if last is None else last.parts[i], compute) for i, block in enumerate(blocks)
        ]
        self.notes = [note for part in self.parts for note in part.notes]
        self.equal: Tensor | None = None
        if len({block.shape for block in blocks}) == 1 < len(blocks):
            self.equal = torch.stack([part.inverse for part in self.parts], dim=-3)
            for i, part in enumerate(self.parts):
                part.inverse = self.equal[..., i, :, :]
        ends = list(itertools.accumulate(block.shape[-1] for block in blocks))
        self.ends = list(zip([0, *ends], ends, strict=False))

    @property
    def inverses(self) -> list[Tensor]:
        """The blocks of ``(M + cI)⁻¹``."""
        return [part.inverse for part in self.parts]

    @property
    def damped(self) -> list[Tensor]:
        """The blocks of ``M + cI``."""
        return [part.matrix for part in self.parts]

    def right(self, v: Tensor, matrices: Sequence[Tensor]) -> Tensor:
        """``v M`` with v (…, m, k)."""
        if len(matrices) == 1:
            return v * matrices[0] if matrices[0].dim() == 1 else v @ matrices[0]
        out = torch.empty_like(v)
        for (start, end), block in zip(self.ends, matrices, strict=True):
            torch.matmul(v[..., start:end], block, out=out[..., start:end])
        return out

    def left(self, matrices: Sequence[Tensor], v: Tensor) -> Tensor:
        """``M v`` with v (…, k, m)."""
        if len(matrices) == 1:
            return matrices[0][..., None] * v if matrices[0].dim() == 1 else matrices[0] @ v
        if self.equal is not None:  # one product of a stack runs by threads, several small ones don't
            rows = v.unflatten(-2, (len(matrices), -1))
            return (torch.stack(list(matrices), dim=-3) @ rows).flatten(-3, -2)
        out = torch.empty_like(v)
        for (start, end), block in zip(self.ends, matrices, strict=True):
            torch.matmul(block, v[..., start:end, :], out=out[..., start:end, :])
        return out


class KroneckerInverse(Solver):
    """``(A + π√λ I) ⊗ (G + √λ/π I)`` on matrices V (…, out, in), each side one matrix, its diagonal blocks, or a diagonal.

    A leading dimension is a batch of products (the groups of a convolution, or a stack of layers). Refresh: Cholesky inverses, Σ k³
    over blocks; solve: out·in·(k_A + k_G) multiplications for blocks of side k.
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
        if self.G.inverses[0].dim() == 1:
            super().accumulate(b, mu, v)
            return
        half = self.A.right(v, self.A.inverses)
        if self.G.equal is not None:
            k, columns = self.G.equal.shape[-1], v.shape[-1]
            rows, inverses = half.view(-1, k, columns), self.G.equal.view(-1, k, k)
            b.view(-1, k, columns).baddbmm_(inverses, rows, beta=mu)
            return
        for (start, end), block in zip(self.G.ends, self.G.inverses, strict=True):
            into = b[..., start:end, :]
            add = into.addmm_ if into.dim() == 2 else into.baddbmm_
            add(block, half[..., start:end, :], beta=mu)

    def matvec(self, v: Tensor) -> Tensor:
        return self.G.left(self.G.damped, self.A.right(v, self.A.damped))

    def cached(self) -> list[Tensor]:
        return [t for side in (self.A, self.G) for t in side.inverses if t.dim() > 1]


class DenseInverse(Solver):
    """``M + λI`` on vectors (…, k), inverted by Cholesky."""

    def __init__(self, matrix: Tensor, damping: float, last: DenseInverse | None, compute: bool = True) -> None:
        self.part: Damped = Damped(matrix, damping, None if last is None else last.part, compute)
        self.notes = self.part.notes

    def solve(self, v: Tensor) -> Tensor:
        return (v[..., None, :] @ self.part.inverse)[..., 0, :]  # symmetric: a row times it reads it in order

    def matvec(self, v: Tensor) -> Tensor:
        return (v[..., None, :] @ self.part.matrix)[..., 0, :]

    def cached(self) -> list[Tensor]:
        return [self.part.inverse]


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
