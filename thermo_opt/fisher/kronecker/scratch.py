"""Memory that is used again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

LEAST = 1 << 20
"""Fewer numbers are not worth holding: the allocator has such memory at hand."""


class Scratch:
    """Memory for intermediate products, used again for every block and step: fresh memory of that
    size costs the operating system as much as the product.

    Cost: the largest block, once for each name.
    """

    def __init__(self) -> None:
        self._held: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, t: Tensor, name: str) -> Tensor:
        """A tensor of the shape of ``t`` whose content the next call with this name may replace."""
        return self.empty(t.shape, t, name)

    def empty(self, shape: Sequence[int], like: Tensor, name: str) -> Tensor:
        """The same of another shape, on the device and in the dtype of ``like``."""
        key, size = (name, like.dtype, like.device), math.prod(shape)
        if size < LEAST:
            return torch.empty(*shape, dtype=like.dtype, device=like.device)
        held = self._held.get(key)
        if held is None or held.numel() < size:
            self._held.pop(key, None)
            held = self._held[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(*shape)
