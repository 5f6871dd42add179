"""Symmetric matrices in half precision, each with a scale of its own.

Entries carry a relative error of 2⁻¹² at most down to 6·10⁻⁵ of the matrix's largest, and an
absolute one of 3·10⁻⁸ of it below: far less than the damping of a factor, and than what a few
hundred sampled rows say of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
        scale = largest.clamp(2.0**-126, 2.0**126).log2_().ceil_().exp2_()
        return cls((t / scale).half(), scale)

    @classmethod
    def stack(cls, parts: Sequence[Half]) -> Half:
        """Those of one shape as one, with a new first dimension; one alone as a view."""
        if len(parts) == 1:
            return cls(parts[0].values[None], parts[0].scale[None])
        return cls(torch.stack([p.values for p in parts]), torch.stack([p.scale for p in parts]))

    def unbind(self, dim: int) -> list[Half]:
        """The parts along a leading dimension: views."""
        pairs = zip(self.values.unbind(dim), self.scale.unbind(dim), strict=True)
        return [Half(values, scale) for values, scale in pairs]

    def whole(self) -> Tensor:
        """The tensor in float32."""
        return self.values.float().mul_(self.scale)


def rounded(tensors: Sequence[Tensor]) -> list[Half]:
    """`Half.of` each of them, those of one shape as one batch."""
    found: list[Half | None] = [None] * len(tensors)
    for places in same(t.shape for t in tensors):
        batch = torch.stack([tensors[k] for k in places])
        for k, half in zip(places, Half.of(batch).unbind(0), strict=True):
            found[k] = half
    return [half for half in found if half is not None]


def wholes(halves: Sequence[Half]) -> list[Tensor]:
    """Each of them in float32, those of one shape as one batch."""
    found: list[Tensor | None] = [None] * len(halves)
    for places in same(half.values.shape for half in halves):
        batch = Half.stack([halves[k] for k in places]).whole()
        for k, whole in zip(places, batch.unbind(0), strict=True):
            found[k] = whole
    return [whole for whole in found if whole is not None]


def same(keys: Iterable[object]) -> list[list[int]]:
    """Places of equal keys, together."""
    groups: dict[object, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return list(groups.values())
