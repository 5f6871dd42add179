"""What is kept of a layer's passes until its factors are made, and running averages of factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker.factors import working, working_dtype
from thermo_opt.optim.kronecker.half import Half, rounded, same, wholes

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
    there = [(place, c) for place, c in enumerate(captures) if c is not None]
    groups = same((c.x.shape, c.x.dtype, c.g.shape, c.g.dtype, c.total) for _, c in there)
    return [([there[k][0] for k in group], [there[k][1] for k in group]) for group in groups]


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
    def known(self) -> bool:
        """Whether there is an observation."""
        return bool(self._kept)

    @property
    def value(self) -> list[Tensor]:
        """The average; of what is kept in half precision a copy."""
        spelt = iter(wholes([t for t in self._kept if isinstance(t, Half)]))
        return [next(spelt) if isinstance(t, Half) else t for t in self._kept]

    @value.setter
    def value(self, tensors: Sequence[Tensor]) -> None:
        chosen = [self.half and t.dim() > 1 and t.dtype == torch.float32 for t in tensors]
        short = iter(rounded([t for t, half in zip(tensors, chosen, strict=True) if half]))
        self._kept = [next(short) if half else t for t, half in zip(tensors, chosen, strict=True)]

    def add(self, new: Sequence[Tensor], decay: float) -> None:
        """Add one observation."""
        add_all([self], [new], decay)

    def state_dict(self) -> dict[str, Any]:
        """The count and the tensors, those of half precision spelt out."""
        return {"count": self.count, "value": self.value}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        """Restore what `state_dict` gave, on the device and in the precision of ``like``."""
        self.count = int(state["count"])
        to = {"device": like.device, "dtype": working_dtype(like.dtype)}
        self.value = [t.to(**to).clone() for t in state["value"]]


def add_all(
    averages: Sequence[RunningAverage], observations: Sequence[Sequence[Tensor]], decay: float
) -> None:
    """Add one observation to each average: what is kept in half precision in one batch for each
    shape, the rest in one call."""
    entries: list[_Entry] = []
    for average, new in zip(averages, observations, strict=True):
        if average.known:
            weight = 1 - min(decay, average.count / (average.count + FORGET))
            entries += [_Entry(average, k, t, weight) for k, t in enumerate(new)]
        else:
            average.value = [t.clone() for t in new]
        average.count += 1
    for group in same(entry.key for entry in entries):
        batch = [entries[i] for i in group]
        new, weight = [entry.new for entry in batch], batch[0].weight
        halves = [t for entry in batch if isinstance(t := entry.kept, Half)]
        if halves:
            sums = Half.stack(halves).whole().lerp_(torch.stack(new), weight)
            for entry, half in zip(batch, Half.of(sums).unbind(0), strict=True):
                entry.average._kept[entry.place] = half
        else:
            kept = [t for entry in batch if isinstance(t := entry.kept, Tensor)]
            torch._foreach_lerp_(kept, new, weight)


class _Entry(NamedTuple):
    """One tensor of a running average, with what is to be added to it and its weight."""

    average: RunningAverage
    place: int
    new: Tensor
    weight: float

    @property
    def kept(self) -> Tensor | Half:
        return self.average._kept[self.place]

    @property
    def key(self) -> object:
        """Equal for what may be added to in one call."""
        half = isinstance(self.kept, Half)
        return self.weight, (self.new.shape, self.new.dtype) if half else None


def stack_averages(averages: Sequence[RunningAverage]) -> list[Tensor]:
    """The running averages of a stack's layers as tensors (m, …); the averages become views of
    them, and stay so, unless they are kept in half precision."""
    if len(averages) == 1:
        return averages[0].value
    if averages[0].half:
        return [_stack(parts) for parts in zip(*(a._kept for a in averages), strict=True)]
    values = [average.value for average in averages]
    whole = [t._base for t in values[0] if t._base is not None]
    if len(whole) < len(values[0]):
        whole = [torch.stack(parts) for parts in zip(*values, strict=True)]
        for j, average in enumerate(averages):
            average.value = [t[j] for t in whole]
    return whole


def _stack(parts: Sequence[Tensor | Half]) -> Tensor:
    halves = [part for part in parts if isinstance(part, Half)]
    if len(halves) == len(parts):
        return Half.stack(halves).whole()
    return torch.stack([part.whole() if isinstance(part, Half) else part for part in parts])
