"""Momentum of natural gradients, and its lengths by inner products alone (theory §7).

The update is v = (1−μ) b + w: an average of natural gradients, so that a step of η_T = 1 is one
Newton step and not 1/(1−μ) of them. With b' = μb + F_λ⁻¹g and w the direction of weight decay,
while F_λ stays, exactly

    b'ᵀF_λb' = μ² bᵀF_λb + 2μ gᵀb + gᵀF_λ⁻¹g        b'ᵀF_λw = μ bᵀF_λw + gᵀw

so that the length of the update needs no product with F_λ. After a refresh of F_λ the lengths are
computed anew. b' is accumulated in place, and gᵀF_λ⁻¹g follows from gᵀb' − μ gᵀb.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from thermo_opt.optim.kronecker.inverses import BlockInverse


@dataclass(frozen=True)
class BlockLengths:
    """Of one block's update v = (1−μ) b + w: a = vᵀF_λv, Δ = gᵀF_λ⁻¹g, the decrease gᵀv, and
    ``along``, the product of g with the update before."""

    a: float
    delta: float
    decrease: float
    along: float


@dataclass
class CarriedMomentum:
    """Momentum b of one block, with bᵀF_λb, bᵀF_λw and wᵀF_λw carried from step to step.

    A step calls `begin`, `inner_products`, `accumulate` and `finish`, in this order; the numbers
    that `inner_products` and `accumulate` return stay on the device, so that all blocks' can be
    transferred at once.

    Attributes:
        vector: b, in the block's coordinates; None before the first step.
        squared: bᵀF_λb. crossed: bᵀF_λw. decayed: wᵀF_λw.
        stale: whether F_λ was refreshed since the lengths were computed.
    """

    vector: Tensor | None = None
    squared: float = 0.0
    crossed: float = 0.0
    decayed: float = 0.0
    stale: bool = False
    _fresh: bool = field(default=True, init=False)

    def begin(self, inverse: BlockInverse, w: Tensor | None) -> None:
        """Recompute what a refresh has outdated."""
        if self.stale:
            self._measure(inverse, w)
            self.stale = False

    def inner_products(self, g: Tensor, w: Tensor | None) -> list[Tensor]:
        """[gᵀb, gᵀw]; where there is no momentum yet, gᵀg takes the place of gᵀb, which then only
        says whether g is finite."""
        flat = g.reshape(-1)
        self._fresh = self.vector is None
        along = flat if self._fresh or self.vector is None else self.vector.reshape(-1)
        across = flat.new_zeros(()) if w is None else torch.dot(flat, w.reshape(-1).to(flat.dtype))
        return [torch.dot(flat, along), across]

    def accumulate(
        self, inverse: BlockInverse, g: Tensor, mu: float, mask: Tensor | None = None
    ) -> Tensor:
        """b ← μ b + F_λ⁻¹g, only where ``mask`` is 1; returns gᵀb."""
        old = None if mask is None or self.vector is None else self.vector.clone()
        if self._fresh or self.vector is None:
            self.vector = inverse.solve(g)
            self.squared = self.crossed = 0.0
        else:
            inverse.accumulate(self.vector, mu, g)
        if mask is not None:
            kept = torch.zeros_like(self.vector) if old is None else old
            self.vector = torch.where(mask > 0, self.vector, kept)
        return torch.dot(g.reshape(-1), self.vector.reshape(-1))

    def finish(
        self,
        inverse: BlockInverse,
        w: Tensor | None,
        mu: float,
        products: tuple[float, float],
        after: float,
        mask: Tensor | None = None,
    ) -> BlockLengths:
        """The lengths of v = (1−μ) b + w, from the numbers of `inner_products` before and ``after``
        `accumulate`.

        With a ``mask``, v is 0 where it is; its length then costs a product with F_λ.
        """
        along, across = products
        if self._fresh:
            along = 0.0
        delta = max(after - mu * along, 0.0)
        share = 1 - mu
        decrease, along_last = share * after + across, share * along + across
        if mask is not None and self.vector is not None:
            v = share * self.vector * mask
            v = v if w is None else v + w
            a = float(torch.dot(v.reshape(-1), inverse.image(v).reshape(-1)))
            self.stale = True
            return BlockLengths(max(a, 0.0), delta, decrease, along_last)
        self.squared = max(mu * mu * self.squared + 2 * mu * along + delta, 0.0)
        if w is None:
            self.crossed = self.decayed = 0.0
        else:
            self.crossed = mu * self.crossed + across
            if self.decayed == 0.0:
                self._measure(inverse, w)
        a = share * share * self.squared + 2 * share * self.crossed + self.decayed
        return BlockLengths(max(a, 0.0), delta, decrease, along_last)

    def _measure(self, inverse: BlockInverse, w: Tensor | None) -> None:
        """All lengths from scratch: one product with F_λ, two where there is weight decay."""
        if self.vector is None:
            return
        image = inverse.image(self.vector)
        self.squared = max(float(torch.dot(self.vector.reshape(-1), image.reshape(-1))), 0.0)
        if w is not None:
            w = w.to(image.dtype)
            self.crossed = float(torch.dot(w.reshape(-1), image.reshape(-1)))
            self.decayed = max(float(torch.dot(w.reshape(-1), inverse.image(w).reshape(-1))), 0.0)
