"""Output gradients whose outer products make up Λ, and their backward passes to chosen places in
the graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from thermo_opt.errors import InputError
from thermo_opt.fisher.kronecker.factors import working
from thermo_opt.fisher.predictor import Part, Predictor
from thermo_opt.fisher.scores import FisherType, check_fisher_type, cotangents

_BATCHED_ELEMENTS = 1 << 22
"""Most gradient elements in one batched backward pass; beyond it one pass a column is as fast and
smaller."""


@dataclass(frozen=True)
class Columns:
    """Columns s with ``E[Σ s sᵀ] = Λ`` per loss term, for one ``fisher_type`` (see
    `thermo_opt.fisher.scores`).

    All loss terms travel back together. Those of one sequence meet in layers that mix positions
    (attention), and those of the whole batch in a table of positions broadcast over it; random
    signs, one a loss term, keep their cross terms out of the mean. They change nothing where each
    row of a layer belongs to one loss term. The same seed gives the same columns in every pass.
    """

    predictor: Predictor
    fisher_type: FisherType = "type-2"
    samples: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_fisher_type(self.predictor, self.fisher_type)
        if self.samples < 1:
            raise InputError(f"samples must be at least 1, got {self.samples!r}")

    @property
    def single(self) -> bool:
        """Whether there is one column, so that one plain backward pass is enough."""
        return self.fisher_type == "empirical" or (self.fisher_type == "mc" and self.samples == 1)

    def at(self, number: int, part: Part, f: Tensor) -> Tensor:
        """(K, *f.shape) columns for microbatch ``number`` with outputs f; zero where a prediction
        isn't counted."""
        generator = torch.Generator(device=f.device).manual_seed(self.seed + number)
        columns = cotangents(
            self.predictor, part, f.detach(), self.fisher_type, self.samples, generator
        ).movedim(-1, 0)
        if (
            self.fisher_type == "mc"
        ):  # draws are independent and their scores have mean zero already
            return columns
        bits = torch.randint(
            0, 2, f.shape[:-1], generator=generator, dtype=f.dtype, device=f.device
        )
        return columns.mul_(torch.rsub(bits, 1, alpha=2).unsqueeze(-1))


def pull_back(
    f: Tensor,
    columns: Tensor,
    ends: Sequence[GradientEdge] | Sequence[Tensor],
    sizes: Sequence[int],
) -> Iterator[list[Tensor | None]]:
    """Gradients at ``ends`` for all columns, some at a time: lists of tensors (K', *shape), None
    where unconnected.

    No weight gradients are computed on the way: about half the cost of an ordinary backward pass a
    column.
    """
    chunk = max(1, min(len(columns), _BATCHED_ELEMENTS // max(sum(sizes), 1)))
    pieces = columns.split(chunk) if len(columns) > chunk else (columns,)
    for number, piece in enumerate(pieces):
        keep = number < len(pieces) - 1
        if len(piece) > 1:
            grads = torch.autograd.grad(
                f, ends, piece, retain_graph=keep, allow_unused=True, is_grads_batched=True
            )
        else:
            one = torch.autograd.grad(f, ends, piece[0], retain_graph=keep, allow_unused=True)
            grads = tuple(None if g is None else g.unsqueeze(0) for g in one)
        yield [None if g is None else working(g) for g in grads]


def one_by_one(predictor: Predictor) -> Predictor:
    """The same predictor with microbatches of one example."""
    single = copy.copy(predictor)
    single.microbatch, single._parts = 1, None
    return single
