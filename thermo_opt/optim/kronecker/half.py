"""Symmetric matrices in half precision, each with a scale of its own.

Entries carry a relative error of 2⁻¹² at most down to 6·10⁻⁵ of the matrix's largest, and an
absolute one of 3·10⁻⁸ of it below: far less than the damping of a factor, and than what a few
hundred sampled rows say of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Half:
    """Positive semi-definite float32 matrices (…, k, k) kept in 16 bits an entry, as multiples of a
    power of two per matrix: that above its largest entry, which is on the diagonal.

    `whole` gives float32 back; what it gives is kept without further loss.
    """

    def __init__(self, values: Tensor, scale: Tensor) -> None:
        self.values, self.scale = values, scale

    @classmethod
    def of(cls, t: Tensor) -> Half:
        """The tensor rounded."""
        largest = t.diagonal(dim1=-2, dim2=-1).amax(-1)[..., None, None]
        known = torch.isfinite(largest) & (largest > 0)
        exponent = torch.where(known, largest, torch.ones_like(largest)).log2().ceil()
        scale = exponent.clamp(-126, 126).exp2()
        return cls((t / scale).half(), scale)

    def unbind(self, dim: int) -> list[Half]:
        """The parts along a leading dimension: views."""
        pairs = zip(self.values.unbind(dim), self.scale.unbind(dim), strict=True)
        return [Half(values, scale) for values, scale in pairs]

    def whole(self) -> Tensor:
        """The tensor in float32."""
        return self.values.float().mul_(self.scale)
