"""What is kept of a layer's passes until its factors are made, and running averages of factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker.factors import working, working_dtype
from thermo_opt.optim.kronecker.half import Half

FORGET = 4
"""Weight of the n-th observation is 4/(n + 4) until it drops to 1 − decay, so that early, quickly
outdated factors are forgotten (polynomial-decay averaging, Shamir & Zhang 2013)."""


@dataclass
class Capture:
    """Rows of one call of a layer: its inputs ``x`` (…, r, k) and output gradients ``g`` (…, r, m),
    a sample of ``total`` rows."""

    x: Tensor
    g: Tensor
    total: float

    def copied(self) -> Capture:
        """The same in memory of its own, so that the pass's activations can be freed."""
        x, g = (t.clone(memory_format=torch.contiguous_format) for t in (self.x, self.g))
        return Capture(x, g, self.total)


def stacked(captures: Sequence[Capture]) -> tuple[Tensor, Tensor]:
    """x and g of captures of equal shapes as one batch (m, …); as they are if there is but one."""
    if len(captures) == 1:
        return captures[0].x, captures[0].g
    return torch.stack([c.x for c in captures]), torch.stack([c.g for c in captures])


def group_by_shape(captures: Sequence[Capture | None]) -> list[tuple[list[int], list[Capture]]]:
    """Group captures of equal shape and dtype: (indices, captures) per group."""
    found: dict[tuple[object, ...], tuple[list[int], list[Capture]]] = {}
    for place, c in enumerate(captures):
        if c is not None:
            key = (c.x.shape, c.x.dtype, c.g.shape, c.g.dtype, c.total)
            places, same = found.setdefault(key, ([], []))
            places.append(place)
            same.append(c)
    return list(found.values())


def thin(rows: Tensor, most: int | None, offset: int) -> Tensor:
    """At most ``most`` of the rows (…, r, k), evenly spaced by an odd stride (so that no
    power-of-two layout aliases)."""
    count = rows.shape[-2]
    if most is None or count <= most:
        return rows
    stride = math.ceil(count / most) | 1
    return rows[..., offset % stride :: stride, :]


def second_moment(rows: Tensor, scale: float, diagonal: bool = False) -> Tensor:
    """``scale · rowsᵀ rows`` of rows (…, r, k), in one pass; or the diagonal of that."""
    rows = working(rows)
    if diagonal:
        return rows.square().sum(-2).mul_(scale)
    out = rows.new_empty(*rows.shape[:-2], rows.shape[-1], rows.shape[-1])
    add = out.addmm_ if out.dim() == 2 else out.baddbmm_
    return add(rows.mT, rows, beta=0.0, alpha=scale)


@dataclass
class RunningAverage:
    """Average of tensors that remembers a constant fraction of the observations so far, and from
    then on 1/(1−decay) of them.

    Attributes:
        count: observations so far.
        half: whether float32 matrices are kept in half precision.
    """

    count: int = 0
    half: bool = False
    _kept: list[Tensor | Half] = field(default_factory=list)

    @property
    def value(self) -> list[Tensor]:
        """The average; of what is kept in half precision a copy."""
        return [t.whole() if isinstance(t, Half) else t for t in self._kept]

    @value.setter
    def value(self, tensors: Sequence[Tensor]) -> None:
        self._kept = [
            Half.of(t) if self.half and t.dim() > 1 and t.dtype == torch.float32 else t
            for t in tensors
        ]

    def add(self, new: Sequence[Tensor], decay: float) -> None:
        """Add one observation."""
        value = self.value
        if value:
            keep = min(decay, self.count / (self.count + FORGET))
            torch._foreach_lerp_(value, list(new), 1 - keep)
        else:
            value = [t.clone() for t in new]
        if self.half or not self.count:
            self.value = value
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """The count and the tensors, those of half precision spelt out."""
        return {"count": self.count, "value": self.value}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Restore what `state_dict` gave, on the device and in the precision of ``like``."""
        self.count = int(state["count"])
        to = {"device": like.device, "dtype": working_dtype(like.dtype)}
        self.value = [t.to(**to).clone() for t in state["value"]]


def stack_averages(averages: Sequence[RunningAverage]) -> list[Tensor]:
    """The running averages of a stack's layers as tensors (m, …); the averages become views of
    them, and stay so, unless they are kept in half precision."""
    values = [average.value for average in averages]
    if len(values) == 1:
        return values[0]
    if averages[0].half:
        return [torch.stack(parts) for parts in zip(*values, strict=True)]
    whole = [t._base for t in values[0] if t._base is not None]
    if len(whole) < len(values[0]):
        whole = [torch.stack(parts) for parts in zip(*values, strict=True)]
        for j, average in enumerate(averages):
            average.value = [t[j] for t in whole]
    return whole
