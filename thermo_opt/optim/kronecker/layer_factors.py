"""The Kronecker factors A and G of one layer: from its passes to running averages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from thermo_opt.fisher.kronecker.factors import flatten, working, working_dtype
from thermo_opt.fisher.kronecker.layers import KroneckerLayer
from thermo_opt.fisher.kronecker.rules import ConvRule
from thermo_opt.fisher.kronecker.uses import ParameterUse
from thermo_opt.optim.kronecker.capture import (
    Capture,
    RunningAverage,
    second_moment,
    stacked,
    thin,
)

if TYPE_CHECKING:
    from thermo_opt.optim.metrics import KFAC


WIDE = 2048
"""A wider side never has a whole factor, not even in the first step: its diagonal blocks have a
side ≤ `WIDE_BLOCK`, or where blocks can't be used its output side keeps its diagonal."""

WIDE_BLOCK = 256
"""Largest side of a diagonal block of a wide factor."""

DIAGONAL = 8192
"""A side wider than this, such as a vocabulary, keeps the diagonal of its factor."""


def bounds(size: int, limit: int | None) -> list[tuple[int, int]]:
    """0 … size in equal parts no longer than ``limit``; at least one, however short."""
    parts = 1 if limit is None else max(math.ceil(size / limit), 1)
    step = max(math.ceil(size / parts), 1)
    return [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]


class LayerFactors:
    """Captured and running A and G of one layer, as lists of diagonal blocks.

    Attributes:
        bias: whether A has a last row for the bias.
        limit: largest side of a diagonal block; None: the factors are whole unless they are wide.
        diagonal_A, diagonal_G: whether the diagonal is all that is kept.
        seen: rows that stand for the layer in the last capture.
        rows: of each matrix of a stack, in the last capture.
        samples: (inputs, output gradients, rows they stand for), kept for EKFAC.
    """

    def __init__(
        self, layer: KroneckerLayer, bias: bool, options: KFAC, divisible: bool = True
    ) -> None:
        self.layer, self.bias, self.options = layer, bias, options
        groups, out, inputs = layer.shape
        self.diagonal_A = layer.rule.one_hot or (groups == 1 and inputs > DIAGONAL)
        self.diagonal_G = groups == 1 and out > (DIAGONAL if divisible else WIDE)
        self.divisible = divisible and groups == 1
        self.average = RunningAverage(half=options.half_state and not options.spectral)
        self.limit: int | None = None
        self.pending: Capture | None = None
        self.A: list[Tensor] = []
        self.G: list[Tensor] = []
        self.A_rows = 0
        self.seen = 0.0
        self.rows: list[float] = []
        self.samples: list[tuple[Tensor, Tensor, float]] = []

    def bounds(self, size: int, limit: int | None = None) -> list[tuple[int, int]]:
        """Where the diagonal blocks of a side of this size begin and end, under today's limit or
        another one; those of a wide side are parts of the blocks that it has without one."""
        limit = limit or self.limit
        if not self.divisible or size <= WIDE:
            return bounds(size, limit)
        return [
            (start + s, start + e)
            for start, end in bounds(size, WIDE_BLOCK)
            for s, e in bounds(end - start, limit)
        ]

    @property
    def blocks(self) -> tuple[int, int]:
        """The numbers of diagonal blocks of A and G; 1 for a diagonal."""
        groups, out, inputs = self.layer.shape
        if groups > 1:
            return 1, 1
        A = 1 if self.diagonal_A else len(self.bounds(inputs - self.bias))
        return A, 1 if self.diagonal_G else len(self.bounds(out))

    def capture(self, x: Tensor, g: Tensor, offset: int, keep_samples: bool) -> None:
        """Take one call: its input and the gradient at its output."""
        most = self.options.max_rows
        if self.layer.rule.one_hot:
            self._capture_indices(x, g, offset, keep_samples)
            return
        examples = kept = x.shape[0] if x.dim() > 1 else 1
        if most is not None and isinstance(self.layer.rule, ConvRule):
            # Unfolding is the cost here: take a few examples whole, several times the rows wanted.
            kept = min(examples, max(8, math.ceil(8 * most / math.prod(g.shape[2:]))))
            x, g = _examples(x, kept, offset), _examples(g, kept, offset)
        kind = self.options.kfac_approx
        inputs = flatten(self.layer.inputs(x), kind, mean=True)
        gradients = flatten(self.layer.gradients(x, g), kind, mean=False)
        total = gradients.shape[-2] * examples / kept
        capture = Capture(thin(inputs, most, offset), thin(gradients, most, offset), total)
        if keep_samples:
            self.samples.append((capture.x, capture.g, total))
        if not self.layer.covers("weight"):  # the bias alone: its input is 1
            capture.x = capture.x[..., :0]
        if self.pending is None and most is not None:
            self.pending = capture.copied()
        else:
            add_captures([self], [capture])

    def capture_use(self, use: ParameterUse, g: Tensor, offset: int) -> None:
        """Take one use of a bare parameter, with the gradient at its result."""
        most = self.options.max_rows
        stack, out, inputs = self.layer.shape
        if use.kind == "sum":  # every position of W is a row of its own: G is a multiple of I
            rows = g.reshape(-1, inputs)
            A = self.second_moments(thin(rows, most, offset))
            ends = [(0, out)] if self.diagonal_G else self.bounds(out)
            count = len(rows) / out
            eye = [torch.eye(e - s, dtype=A[0].dtype, device=g.device) for s, e in ends]
            G = [t.diagonal().clone() if self.diagonal_G else t for t in eye]
            self.add(A, len(rows), [t.mul_(count) for t in G], float(len(rows)))
            return
        x = use.operand()
        if use.start or (stack == 1 and not use.turned and g.shape[-1] < out):
            g = functional.pad(g, (use.start, out - use.start - g.shape[-1]))
        total = float(g.shape[-2])
        x, g = thin(x, most, offset), thin(g, most, offset)
        if use.turned:  # y = x W: the sides change their roles, and A ⊗ G stays what it is
            x, g = g, x
        if stack > 1:
            self._capture_stack(use.place, x, g, total)
        elif self.diagonal_A or self.diagonal_G or self.layer.rule.one_hot:
            self.add(self.second_moments(x), x.shape[-2], self.squares(g, total), total)
        else:
            add_captures([self], [Capture(x, g, total)])

    def _capture_stack(self, place: int | None, x: Tensor, g: Tensor, total: float) -> None:
        """The same for one matrix of a stack, or for all of them."""
        stack, out, inputs = self.layer.shape
        if not self.A:
            zero = working(x).new_zeros
            self.A, self.G = [zero(stack, inputs, inputs)], [zero(stack, out, out)]
            self.A_rows, self.seen, self.rows = 1, 0.0, [0.0] * stack
        if not x.shape[-2]:
            return
        A, G = second_moment(x, 1 / x.shape[-2]), second_moment(g, total / g.shape[-2])
        for j in range(stack) if place is None else (place,):
            one_A, one_G = (A[j], G[j]) if place is None else (A, G)
            self.A[0][j].lerp_(one_A, total / (self.rows[j] + total))
            self.G[0][j].add_(one_G)
            self.rows[j] += total
        self.seen += total / (1 if place is None else stack)

    def _capture_indices(self, x: Tensor, g: Tensor, offset: int, keep_samples: bool) -> None:
        """The same for one-hot inputs, whose A is the diagonal of their frequencies."""
        most = self.options.max_rows
        indices, samples = self.layer.inputs(x), self.layer.gradients(x, g)
        counts = torch.bincount(indices.flatten(), minlength=self.layer.shape[2])
        A = [counts.to(working_dtype(g.dtype)).div_(indices.numel())]
        total = float(samples.shape[-3] * samples.shape[-2])
        rows = thin(samples.flatten(-3, -2), most, offset)
        if keep_samples:
            self.samples.append((thin(indices.reshape(-1, 1), most, offset), rows, total))
        self.add(A, indices.numel(), self.squares(rows, total), total)

    def add(self, A: list[Tensor], A_rows: int, G: list[Tensor], rows: float) -> None:
        """Add one call: A, the mean of outer products over ``A_rows`` rows, and G, their sum over
        ``rows`` rows."""
        if self.A:
            torch._foreach_lerp_(self.A, A, A_rows / (self.A_rows + A_rows))
            torch._foreach_add_(self.G, G)
        else:
            self.A, self.G, self.A_rows, self.seen = A, G, 0, 0.0
        self.A_rows += A_rows
        self.seen += rows

    def second_moments(self, a: Tensor) -> list[Tensor]:
        """The blocks of A, of input rows (…, r, in), without the bias's one."""
        bias, size, scale = self.bias, a.shape[-1], 1 / a.shape[-2]
        if bias:
            a = functional.pad(a, (0, 1), value=1.0)
        if self.diagonal_A:
            return [second_moment(a, scale, diagonal=True)]
        ends = [(s, e + (bias and e == size)) for s, e in self.bounds(size)]
        return [second_moment(a[..., s:e], scale) for s, e in ends]

    def squares(self, rows: Tensor, total: float) -> list[Tensor]:
        """The blocks of G, of gradients (…, r, out) that stand for ``total`` rows."""
        scale = total / rows.shape[-2]
        if self.diagonal_G:
            return [second_moment(rows, scale, diagonal=True)]
        ends = self.bounds(rows.shape[-1])
        return [second_moment(rows[..., s:e], scale) for s, e in ends]

    def captured(self, terms: float) -> list[Tensor]:
        """The blocks of A, then those of G, of everything captured; forgets them."""
        torch._foreach_mul_(self.G, terms)
        if self.average.known and not all(self.rows):
            (A, *_) = self.average.value
            for j, rows in enumerate(self.rows):
                if not rows:  # an expert without tokens keeps the inputs it had
                    self.A[0][j] = A[j]
        found = self.A + self.G
        self.pending, self.A, self.G, self.rows = None, [], [], []
        return found

    def discard(self) -> None:
        """Forget what was captured."""
        self.pending, self.A, self.G, self.rows, self.samples = None, [], [], [], []

    def cut(self, limit: int | None, captured: Sequence[Tensor]) -> list[Tensor]:
        """From now on keep diagonal blocks of side ≤ ``limit``; returns those of ``captured``, the
        blocks of A and of G until now (none, if there are none)."""
        count = self.blocks[0]
        self.limit = limit
        parts: list[Tensor] = []
        for number, block in enumerate(captured):
            if block.dim() != 2:
                parts.append(block)
                continue
            bias = self.bias and number == count - 1
            size = block.shape[-1] - bias
            ends = [(s, e + (bias and e == size)) for s, e in bounds(size, limit)]
            parts += [block[s:e, s:e].clone() for s, e in ends] if len(ends) > 1 else [block]
        return parts


def add_captures(sides: Sequence[LayerFactors], captures: Sequence[Capture]) -> None:
    """Turn captures of equal shape, one per layer, into factors, all in one batch."""
    a, rows = stacked(captures)
    first, A_rows = sides[0], a.shape[-2]
    A, G = first.second_moments(a), first.squares(rows, captures[0].total)
    for j, (side, capture) in enumerate(zip(sides, captures, strict=True)):
        own_A, own_G = (A, G) if len(captures) == 1 else ([t[j] for t in A], [t[j] for t in G])
        side.add(own_A, A_rows, own_G, capture.total)


def _examples(t: Tensor, kept: int, offset: int) -> Tensor:
    """``kept`` examples (dimension 0), evenly spaced."""
    stride = max(len(t) // kept, 1)
    return t[offset % stride :: stride][:kept]
