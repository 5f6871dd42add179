"""Solvers of one block of the training metric: F_λ⁻¹ v and F_λ v with everything that can be cached cached (THEORY §7).

Two families. *Inverses* (`KroneckerInverse`, `DenseInverse`): Cholesky inverses of damped factors, the fast default: half the
products of an eigenbasis at each step and a fifth of its cost at each refresh. *Spectral* (`Spectral`): an eigenbasis, which exact
Tikhonov damping, truncation, null-space steps and EKFAC need. Each uses one F_λ for solve and matvec, so that |ε| ≤ 1.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from thermo_opt.fisher import spectral
from thermo_opt.fisher.kronecker import Block
from thermo_opt.optim.inverse import positive_inverse


class Solver(Protocol):
    """F_λ of one block, in the block's coordinates."""

    notes: list[str]

    def solve(self, v: Tensor) -> Tensor:
        """F_λ⁻¹ v (spectral with λ = 0: F⁺v)."""

    def matvec(self, v: Tensor) -> Tensor:
        """F_λ v."""

    def cached(self) -> list[Tensor]:
        """The costly tensors of a refresh, for one process to compute and the others to receive."""


def _shift(matrix: Tensor, amount: Tensor | float) -> Tensor:
    """M + cI; a diagonal (k,) stays one."""
    if matrix.dim() == 1:
        return matrix + amount
    shifted = matrix.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    diagonal += amount[..., None] if isinstance(amount, Tensor) and amount.dim() else amount
    return shifted


def _mean_diagonal(matrix: Tensor) -> Tensor:
    return matrix.mean(-1) if matrix.dim() == 1 else matrix.diagonal(dim1=-2, dim2=-1).mean(-1)


def damping_split(A: Tensor, G: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The sides' shares (π√λ, √λ/π), π² = (tr A/dim A)/(tr G/dim G): Martens & Grosse 2015, §6.3. π = 1 where a trace is 0."""
    pi = (_mean_diagonal(A) / _mean_diagonal(G)).sqrt()
    pi = torch.where(torch.isfinite(pi) & (pi > 0), pi, torch.ones_like(pi))
    return pi * damping**0.5, damping**0.5 / pi


class KroneckerInverse:
    """``(A + π√λ I) ⊗ (G + √λ/π I)`` on matrices V (…, out, in); a side given as (k,) is diagonal.

    Refresh: two Cholesky inverses, O(in³ + out³); solve: O(out·in·(out + in)). A side whose inverse fails keeps that of ``last``.
    """

    def __init__(
        self, A: Tensor, G: Tensor, damping: float, last: KroneckerInverse | None, compute: bool = True
    ) -> None:
        self.A: Tensor
        self.G: Tensor
        self.A_inverse: Tensor
        self.G_inverse: Tensor
        on_a, on_g = damping_split(A, G, damping)
        self.notes: list[str] = []
        self.A, self.A_inverse = self._side("A", A, on_a, None if last is None else (last.A, last.A_inverse), compute)
        self.G, self.G_inverse = self._side("G", G, on_g, None if last is None else (last.G, last.G_inverse), compute)

    def _side(
        self, name: str, matrix: Tensor, amount: Tensor, last: tuple[Tensor, Tensor] | None, compute: bool
    ) -> tuple[Tensor, Tensor]:
        damped = _shift(matrix, amount)
        if damped.dim() == 1:
            return damped, damped.reciprocal()
        if not compute:
            return damped, torch.empty_like(damped)
        inverse, note = positive_inverse(damped)
        if inverse is not None:
            if note:
                self.notes.append(f"{name}: {note}")
            return damped, inverse
        self.notes.append(f"{name}: {note}; kept the last inverse")
        if last is not None:
            return last
        mean = _mean_diagonal(torch.nan_to_num(damped, posinf=0.0, neginf=0.0)).abs() + 1.0
        unit = torch.diag_embed(mean[..., None].expand(damped.shape[:-1]))
        return unit, torch.diag_embed((1 / mean)[..., None].expand(damped.shape[:-1]))

    def solve(self, v: Tensor) -> Tensor:
        right = v * self.A_inverse if self.A_inverse.dim() == 1 else v @ self.A_inverse
        return self.G_inverse @ right

    def matvec(self, v: Tensor) -> Tensor:
        return self.G @ (v * self.A if self.A.dim() == 1 else v @ self.A)

    def cached(self) -> list[Tensor]:
        return [t for t in (self.A_inverse, self.G_inverse) if t.dim() > 1]


class DenseInverse:
    """``M + λI`` on vectors (…, k), inverted by Cholesky."""

    def __init__(self, matrix: Tensor, damping: float, last: DenseInverse | None, compute: bool = True) -> None:
        self.notes: list[str] = []
        self.matrix = _shift(matrix, damping)
        if not compute:
            self.inverse = torch.empty_like(matrix)
            return
        inverse, note = positive_inverse(self.matrix)
        if note:
            self.notes.append(note)
        if inverse is None:
            self.notes.append("kept the last inverse")
            eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
            self.matrix, inverse = (eye, eye) if last is None else (last.matrix, last.inverse)
        self.inverse = inverse

    def solve(self, v: Tensor) -> Tensor:
        return (self.inverse @ v[..., None])[..., 0]

    def matvec(self, v: Tensor) -> Tensor:
        return (self.matrix @ v[..., None])[..., 0]

    def cached(self) -> list[Tensor]:
        return [self.inverse]


class DiagonalInverse:
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

    def cached(self) -> list[Tensor]:
        return []


class Spectral:
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

    def cached(self) -> list[Tensor]:
        return []
