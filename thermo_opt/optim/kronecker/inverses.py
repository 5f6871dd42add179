"""Inverses of one block of the running metric: F_λ⁻¹ v and F_λ v with cached inverses (theory §7).

Two families. *Cholesky* (`KroneckerInverse`, `DenseInverse`): inverses of damped factors, the fast
default: half the products of an eigenbasis at each step and a fifth of its cost at each refresh.
*Spectral* (`SpectralInverse`): an eigenbasis, which exact Tikhonov damping, truncation, null-space
steps and EKFAC need. Each uses one F_λ for solve and matvec, so that |ε| ≤ 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thermo_opt.fisher import spectral
from thermo_opt.fisher.kronecker import Block, Factor, factored_damping
from thermo_opt.fisher.kronecker.factor import Amount
from thermo_opt.fisher.kronecker.scratch import Scratch
from thermo_opt.optim.kronecker.cholesky import TOGETHER, plain_inverses, positive_inverse, shifted
from thermo_opt.optim.kronecker.half import Half, rounded, same


class BlockInverse(ABC):
    """F_λ of one block and its inverse, in the block's coordinates."""

    @property
    def notes(self) -> list[str]:
        """What went wrong in the last refresh, if anything."""
        return []

    @property
    def damped(self) -> Sequence[DampedInverse]:
        """The matrices that `invert` must invert before the first `solve`."""
        return ()

    @property
    def rank(self) -> int | None:
        """How many eigenvalues are above the threshold; None where none are computed."""
        return None

    @abstractmethod
    def solve(self, v: Tensor) -> Tensor:
        """F_λ⁻¹ v (spectral with λ = 0: F⁺v)."""

    @abstractmethod
    def matvec(self, v: Tensor) -> Tensor:
        """F_λ v."""

    def image(self, v: Tensor) -> Tensor:
        """F_λ v in memory that the next product may use again."""
        return self.matvec(v)

    def rest(self, factors: Callable[[], tuple[Factor, Factor] | None]) -> None:
        """Keep no more between steps than must be; ``factors`` gives the running factors again."""
        return

    def null(self, v: Tensor) -> Tensor:
        """P₀v, the part of v in the truncated space; zero where nothing is truncated."""
        return torch.zeros_like(v)

    def accumulate(self, b: Tensor, mu: float, v: Tensor) -> None:
        """b ← μ b + F_λ⁻¹ v, in place."""
        b.mul_(mu).add_(self.solve(v))


class DampedInverse:
    """``M + cI`` of a block (k,), (k, k) or a batch (m, k, k), and its inverse, which `invert`
    fills in unless the block is a diagonal.

    One that can't be inverted keeps the inverse of ``last``, or becomes a multiple of the identity,
    and says so in ``notes``. The block is not copied: `matrix` is right until the running factors
    change, which makes a new one. ``into``: where the inverse goes.
    """

    def __init__(
        self, block: Tensor, amount: Amount, last: DampedInverse | None, into: Tensor | None = None
    ) -> None:
        self.notes: list[str] = []
        self._block: Callable[[], Tensor] | None = None
        self._whole: Tensor | None = block
        self._half: Half | None = None
        self.amount, self._last = amount, last
        if last is not None:
            last._last = None  # no chain of all that were before
        self.diagonal = block.dim() == 1
        if self.diagonal:
            self._inverse: Tensor | None = (block + amount).reciprocal()
        else:
            self._inverse = torch.empty_like(block) if into is None else into

    @property
    def block(self) -> Tensor:
        """The block without damping."""
        if self._whole is None:
            assert self._block is not None
            return self._block()
        return self._whole

    @block.setter
    def block(self, block: Tensor) -> None:
        self._whole = block

    @property
    def inverse(self) -> Tensor:
        """The inverse; of one kept in half precision a copy."""
        if self._inverse is None:
            assert self._half is not None
            return self._half.whole()
        return self._inverse

    def rest(self, block: Callable[[], Tensor], half: Half | None = None) -> None:
        """Keep the inverse in half precision, ``half`` if it is at hand, and ask for the block when
        it is needed."""
        if self._inverse is not None:
            if not self.awake:
                return
            self._half, self._inverse = half or Half.of(self._inverse), None
        if not self.notes:  # else it is another one than the running factors say
            self._whole, self._block = None, block

    @property
    def awake(self) -> bool:
        """Whether there is an inverse that `rest` would keep in half precision."""
        inverse = self._inverse
        return not self.diagonal and inverse is not None and inverse.dtype == torch.float32

    def wake(self, block: Tensor) -> None:
        """Have the block at hand, until the next `rest`."""
        if self._whole is None:
            self._whole = block

    def climb(self) -> None:
        """Find the inverse by the ladder, each of a batch for itself."""
        if self.block.dim() == 2:
            self._climb()
            return
        each = [self[j] for j in range(len(self.block))]
        for one in each:
            one._climb()
        self.notes = sorted({note for one in each for note in one.notes})
        self.block = torch.stack([one.block for one in each])
        self.amount = torch.stack([torch.as_tensor(one.amount) for one in each]).to(self.block)

    def forget(self) -> None:
        """Let go of the inverse before this one, which is known now."""
        self._last = None

    def _climb(self) -> None:
        inverse, note = positive_inverse(self.block, self.amount)
        if inverse is None:
            if self._last is not None:
                inverse = self._last.inverse
                note += "; kept the last inverse"
            else:
                mean = torch.nan_to_num(Factor(self.block).mean, posinf=0.0, neginf=0.0).abs() + 1.0
                inverse = torch.diag_embed((1 / mean).expand(self.block.shape[-1]))
                note += "; used a multiple of the identity"
            self.block, self.amount = torch.linalg.inv(inverse.double()).to(self.block.dtype), 0.0
        self.inverse.copy_(inverse)
        if note:
            self.notes.append(note)

    def __getitem__(self, j: int) -> DampedInverse:
        """One of a batch."""
        amount = self.amount[j] if isinstance(self.amount, Tensor) else self.amount
        return DampedInverse(
            self.block[j], amount, None if self._last is None else self._last[j], self.inverse[j]
        )

    @property
    def matrix(self) -> Tensor:
        """``M + cI``; a diagonal stays one."""
        return shifted(self.block, self.amount)

    def times(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``(M + cI) v`` with v (…, k, m)."""
        if self.diagonal:
            return torch.mul(self.matrix[..., None], v, out=out)
        return self._shift(torch.matmul(self.block, v, out=out), v)

    def times_left(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``v (M + cI)`` with v (…, m, k)."""
        if self.diagonal:
            return torch.mul(v, self.matrix, out=out)
        return self._shift(torch.matmul(v, self.block, out=out), v)

    def _shift(self, image: Tensor, v: Tensor) -> Tensor:
        if isinstance(self.amount, Tensor):
            return image.addcmul_(v, self.amount[..., None, None])
        return image.add_(v, alpha=self.amount)


def invert(parts: Sequence[DampedInverse]) -> None:
    """Invert damped blocks, those of one size in one batch.

    Give it all of one parameter block and nothing else: a resumed run rebuilds each by itself, and
    the same batch gives the same bits.
    """
    keys = ((part.block.shape[-1], part.block.dtype, part.block.device) for part in parts)
    for places in same(keys):
        group = [parts[k] for k in places]
        count = max(TOGETHER // max(part.block.numel() for part in group), 1)
        for start in range(0, len(group), count):
            batch = group[start : start + count]
            inverses = plain_inverses(
                [part.block for part in batch], [part.amount for part in batch]
            )
            if inverses is not None:
                torch._foreach_copy_([part.inverse for part in batch], inverses)
            for part in batch:
                if inverses is None:  # each for itself, so that only those that fail are affected
                    part.climb()
                part.forget()


class DampedFactor(Factor):
    """``M + cI`` of one side of a Kronecker product, with its inverse: whole, its diagonal blocks,
    or one diagonal (k,)."""

    def __init__(self, factor: Factor, amount: Amount, last: DampedFactor | None) -> None:
        super().__init__(factor.blocks, factor.diagonal)
        blocks = self.blocks
        self._equal: Tensor | Half | None = None
        places: Sequence[Tensor | None] = [None] * len(blocks)
        if len({block.shape for block in blocks}) == 1 < len(blocks):
            *batch, k, _ = blocks[0].shape
            self._equal = blocks[0].new_empty(*batch, len(blocks), k, k)
            places = self._equal.unbind(-3)
        before = [None] * len(blocks) if last is None else last.parts
        self.parts: list[DampedInverse] = [
            DampedInverse(block, amount, last_part, place)
            for block, last_part, place in zip(blocks, before, places, strict=True)
        ]

    @property
    def equal(self) -> Tensor | None:
        """The inverses of several blocks of one size as one tensor (…, blocks, k, k)."""
        return self._equal.whole() if isinstance(self._equal, Half) else self._equal

    def rest(self, blocks: Callable[[], Sequence[Tensor]]) -> None:
        """Keep the inverses in half precision, and ask for the blocks when they are needed."""
        halves: Sequence[Half | None] = [None] * len(self.parts)
        if isinstance(self._equal, Tensor) and self._equal.dtype == torch.float32:
            self._equal = Half.of(self._equal)
            halves = self._equal.unbind(-3)
        elif all(part.awake for part in self.parts):
            halves = rounded(self.inverses)
        for j, (part, half) in enumerate(zip(self.parts, halves, strict=True)):
            part.rest(lambda j=j: blocks()[j], half)  # type: ignore[misc]
        if not any(part.notes for part in self.parts):
            self.blocks = []

    def wake(self, blocks: Sequence[Tensor]) -> None:
        """Have the blocks at hand, until the next `rest`."""
        for part, block in zip(self.parts, blocks, strict=True):
            part.wake(block)

    @property
    def inverses(self) -> list[Tensor]:
        """The blocks of ``(M + cI)⁻¹``."""
        equal = self.equal
        if equal is not None:
            return list(equal.unbind(-3))
        return [part.inverse for part in self.parts]

    def left(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(v) if out is None else out
        for (start, end), part in zip(self.ends, self.parts, strict=True):
            part.times(v[..., start:end, :], out[..., start:end, :])
        return out

    def right(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        out = torch.empty_like(v) if out is None else out
        for (start, end), part in zip(self.ends, self.parts, strict=True):
            part.times_left(v[..., start:end], out[..., start:end])
        return out

    def solve_right(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """``v (M + cI)⁻¹`` with v (…, m, k)."""
        if len(self.parts) == 1:
            product = torch.mul if self.parts[0].diagonal else torch.matmul
            return product(v, self.parts[0].inverse, out=out)
        out = torch.empty_like(v) if out is None else out
        for (start, end), inverse in zip(self.ends, self.inverses, strict=True):
            torch.matmul(v[..., start:end], inverse, out=out[..., start:end])
        return out

    def solve_left(self, v: Tensor) -> Tensor:
        """``(M + cI)⁻¹ v`` with v (…, k, m)."""
        if len(self.parts) == 1:
            inverse = self.parts[0].inverse
            return inverse[..., None] * v if inverse.dim() == 1 else inverse @ v
        equal = self.equal
        if equal is not None:  # one product of a stack runs by threads, small ones don't
            return (equal @ v.unflatten(-2, (len(self.parts), -1))).flatten(-3, -2)
        out = torch.empty_like(v)
        for (start, end), part in zip(self.ends, self.parts, strict=True):
            torch.matmul(part.inverse, v[..., start:end, :], out=out[..., start:end, :])
        return out


class KroneckerInverse(BlockInverse):
    """``(A + π√λ I) ⊗ (G + √λ/π I)`` on matrices V (…, out, in), each side one matrix, its diagonal
    blocks, or a diagonal.

    A leading dimension is a batch of products (the groups of a convolution, or a stack of layers).
    Refresh: Cholesky inverses, Σ k³ over blocks; solve: out·in·(k_A + k_G) multiplications for
    blocks of side k.
    """

    def __init__(
        self,
        A: Factor,
        G: Factor,
        damping: float,
        last: KroneckerInverse | None,
        scratch: Scratch | None = None,
    ) -> None:
        self.scratch = scratch or Scratch()
        self._factors: Callable[[], tuple[Factor, Factor] | None] | None = None
        on_a, on_g = factored_damping(A, G, damping)
        self.A: DampedFactor = DampedFactor(A, on_a, None if last is None else last.A)
        self.G: DampedFactor = DampedFactor(G, on_g, None if last is None else last.G)

    @property
    def notes(self) -> list[str]:
        return [
            f"{name}: {n}"
            for name, side in (("A", self.A), ("G", self.G))
            for p in side.parts
            for n in p.notes
        ]

    @property
    def damped(self) -> Sequence[DampedInverse]:
        return [part for side in (self.A, self.G) for part in side.parts if not part.diagonal]

    def solve(self, v: Tensor) -> Tensor:
        return self.G.solve_left(self.A.solve_right(v))

    def accumulate(self, b: Tensor, mu: float, v: Tensor) -> None:
        if self.G.parts[0].diagonal:
            super().accumulate(b, mu, v)
            return
        half = self.A.solve_right(v, self.scratch.like(v, "half"))
        equal = self.G.equal
        if equal is not None:
            k, columns = equal.shape[-1], v.shape[-1]
            rows, inverses = half.view(-1, k, columns), equal.view(-1, k, k)
            b.view(-1, k, columns).baddbmm_(inverses, rows, beta=mu)
            return
        for (start, end), block in zip(self.G.ends, self.G.inverses, strict=True):
            into = b[..., start:end, :]
            add = into.addmm_ if into.dim() == 2 else into.baddbmm_
            add(block, half[..., start:end, :], beta=mu)

    def rest(self, factors: Callable[[], tuple[Factor, Factor] | None]) -> None:
        def side(number: int) -> Sequence[Tensor]:
            pair = factors()
            assert pair is not None
            return pair[number].blocks

        self._factors = factors
        self.A.rest(lambda: side(0))
        self.G.rest(lambda: side(1))

    def _wake(self) -> None:
        pair = None if self._factors is None else self._factors()
        if pair is not None:
            self.A.wake(pair[0].blocks)
            self.G.wake(pair[1].blocks)

    def matvec(self, v: Tensor) -> Tensor:
        self._wake()
        return self.G.left(self.A.right(v))

    def image(self, v: Tensor) -> Tensor:
        self._wake()
        half = self.A.right(v, self.scratch.like(v, "half"))
        return self.G.left(half, self.scratch.like(v, "image"))


class DenseInverse(BlockInverse):
    """``M + λI`` on vectors (…, k), inverted by Cholesky."""

    def __init__(self, matrix: Tensor, damping: float, last: DenseInverse | None) -> None:
        self.part: DampedInverse = DampedInverse(
            matrix, damping, None if last is None else last.part
        )

    @property
    def notes(self) -> list[str]:
        return self.part.notes

    @property
    def damped(self) -> Sequence[DampedInverse]:
        return (self.part,)

    def solve(self, v: Tensor) -> Tensor:
        # The inverse is symmetric: a row times it reads it in order.
        return (v[..., None, :] @ self.part.inverse)[..., 0, :]

    def matvec(self, v: Tensor) -> Tensor:
        return self.part.times_left(v[..., None, :])[..., 0, :]


class DiagonalInverse(BlockInverse):
    """``diag(f) + λ``; with λ = 0 entries ≤ cut are the null space."""

    def __init__(
        self, values: Tensor, damping: float, rtol: float = 0.0, atol: float = 0.0
    ) -> None:
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


class SpectralInverse(BlockInverse):
    """Any block with an eigenbasis, ``U diag(σ) Uᵀ + λI``; with λ = 0 eigenvalues ≤ max(rtol·σ_max,
    atol) are truncated.

    In a Kronecker basis the σ are the products a_i g_j, and the threshold acts on the products.
    """

    def __init__(self, block: Block, damping: float, rtol: float, atol: float) -> None:
        self.block, self.damping = block, damping
        self.cut = spectral.threshold(float(block.eigenvalues.max()), rtol, atol)
        self.inverse = spectral.inverse(block.eigenvalues, damping, self.cut)

    @property
    def notes(self) -> list[str]:
        return self.block.notes

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
