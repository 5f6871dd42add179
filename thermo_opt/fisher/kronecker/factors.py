"""Statistics of Kronecker factors, with one normalisation throughout (theory §1).

For M loss terms (examples, or predicted tokens) with gradients g of each *unaveraged* loss term,
and a weight shared
over r positions, the block of ``F = (1/M) Σ J ᵀΛJ`` is approximated by ``A ⊗ G``:

- expand: ``A = mean over examples and positions of a aᵀ``, ``G = (1/M) Σ over examples and
positions of g gᵀ``;
- reduce: ``A = mean over examples of ā āᵀ`` with ā the mean over positions, ``G = (1/M) Σ (Σ_r
g)(Σ_r g)ᵀ``.

A backward pass of the mean loss yields g/M, so there ``G = M · Σ (g/M)(g/M)ᵀ``. Uses of one module
in a forward pass count as further positions. Sources: Martens & Grosse 2015; Grosse & Martens 2016;
Eschenhagen et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from thermo_opt.fisher.kronecker.rules import KfacApprox, KroneckerRule, Module

_COPIED = 1 << 15
"""Most numbers in input samples that are copied to append a column of ones: beyond it, summing
their columns is cheaper."""


@dataclass
class Moment:
    """A sum of outer products and how many rows it holds: ``total`` (…, k, k), or (k,) for one-hot
    rows."""

    total: Tensor
    rows: int

    @property
    def mean(self) -> Tensor:
        """Second moment of the rows."""
        return self.total / self.rows

    def add(self, other: Moment) -> None:
        """Accumulate another batch in place."""
        self.total += other.total
        self.rows += other.rows


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The precision of factors: float32 for half-precision layers, else the layer's own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def working(t: Tensor) -> Tensor:
    """The tensor in the precision of its factors."""
    dtype = working_dtype(t.dtype)
    return (
        t if t.dtype is dtype else t.to(dtype)
    )  # a call with nothing to do costs as much as a small operation


def outer(
    rows: Tensor, ones: bool = False, dtype: torch.dtype | None = None, diagonal: bool = False
) -> Tensor:
    """``Σ rows rowsᵀ``: (…, rows, k) → (…, k, k), or its diagonal (…, k); with ``ones``, a last
    column of ones joins in.

    The column costs a column sum rather than a copy of the rows. Half precision is accumulated in
    float32.
    """
    rows = working(rows) if dtype is None else rows.to(dtype)
    count, k = rows.shape[-2:]
    if diagonal:
        total = rows.square().sum(-2)
        return (
            torch.cat([total, total.new_full((*total.shape[:-1], 1), count)], -1) if ones else total
        )
    if not ones:
        return rows.mT @ rows
    total = rows.new_empty(*rows.shape[:-2], k + 1, k + 1)
    torch.matmul(rows.mT, rows, out=total[..., :k, :k])
    sums = rows.sum(-2)
    total[..., :k, k] = sums
    total[..., k, :k] = sums
    total[..., k, k] = count
    return total


def flatten(samples: Tensor, kfac_approx: KfacApprox, mean: bool) -> Tensor:
    """Samples (…, n, r, k) as rows (…, rows, k): every position ("expand") or its mean or sum an
    example ("reduce")."""
    if kfac_approx == "expand":
        return samples.flatten(-3, -2)
    return samples.mean(-2) if mean else samples.sum(-2)


def input_moment(
    rule: KroneckerRule,
    module: Module,
    x: Tensor,
    kfac_approx: KfacApprox = "expand",
    dtype: torch.dtype | None = None,
    diagonal: bool = False,
) -> Moment:
    """Sum for the input factor A of one use of ``module``, bias column included; its ``mean`` is A.
    Cost O(rows · in²).

    One-hot rules give token counts (vocabulary,), a diagonal A; ``diagonal`` asks for no more than
    that of any rule.
    """
    if not rule.covers(module, "weight"):
        samples = x
    elif kfac_approx == "reduce" and not rule.one_hot:
        samples = rule.mean_inputs(module, x)
    else:
        samples = rule.inputs(module, x)
    return samples_moment(rule, module, samples, kfac_approx, dtype, diagonal)


def samples_moment(
    rule: KroneckerRule,
    module: Module,
    samples: Tensor,
    kfac_approx: KfacApprox = "expand",
    dtype: torch.dtype | None = None,
    diagonal: bool = False,
) -> Moment:
    """`input_moment` from samples that ``rule.inputs`` has already made."""
    if rule.one_hot:
        indices = samples.flatten()
        counts = torch.bincount(indices, minlength=rule.shape(module)[2])
        return Moment(counts.to(dtype or working_dtype(module.weight.dtype)), indices.numel())
    if not rule.covers(module, "weight"):
        groups = rule.shape(module)[0]
        shape = (1,) if diagonal else (1, 1)
        one = torch.ones(
            (groups, *shape) if groups > 1 else shape,
            dtype=dtype or working_dtype(module.bias.dtype),
        )
        return Moment(one.to(module.bias.device), 1)
    rows = flatten(samples, kfac_approx, mean=True)
    ones = rule.covers(module, "bias")
    if ones and rows.numel() <= _COPIED:
        rows, ones = functional.pad(rows, (0, 1), value=1.0), False
    return Moment(outer(rows, ones, dtype, diagonal), rows.shape[-2])


def gradient_moment(
    rule: KroneckerRule,
    module: Module,
    x: Tensor,
    g: Tensor,
    kfac_approx: KfacApprox = "expand",
    dtype: torch.dtype | None = None,
    diagonal: bool = False,
) -> Tensor:
    """Sum for the output factor G of one use: ``Σ g gᵀ`` (…, out, out), or its diagonal. Cost
    O(rows · out²).

    Divide by M for unaveraged g, multiply by M for g of the mean loss.
    """
    rows = flatten(
        rule.gradients(module, x, g), "expand" if rule.one_hot else kfac_approx, mean=False
    )
    return outer(rows, dtype=dtype, diagonal=diagonal)


def example_gradients(a: Tensor, g: Tensor, ones: bool = False) -> Tensor:
    """Per-example gradient matrices ``Σ_r g_r a_rᵀ``: a (…, n, r, in), g (…, n, r, out) → (…, n,
    out, in[+1]).

    Cost O(n · r · out · in).
    """
    grads = g.mT @ a
    return torch.cat([grads, g.sum(-2).unsqueeze(-1)], dim=-1) if ones else grads


def squared_example_gradients(a: Tensor, g: Tensor, limit: int = 1 << 20) -> Tensor:
    """``Σ_n (Σ_r g_r a_rᵀ)²`` elementwise, (…, out, in); with both sides projected on an
    eigenbasis, EKFAC's eigenvalues.

    One matrix product where nothing is shared (r = 1); otherwise examples in turn, at most
    ``limit`` elements at a time.
    """
    if a.shape[-2] == 1:
        return g.squeeze(-2).square().mT @ a.squeeze(-2).square()
    size = g.shape[-1] * a.shape[-1] * a.shape[:-3].numel()
    chunk = max(1, limit // size)
    total = g.new_zeros(*g.shape[:-3], g.shape[-1], a.shape[-1])
    for x, y in zip(a.split(chunk, dim=-3), g.split(chunk, dim=-3), strict=True):
        grads = example_gradients(x, y)
        total += torch.linalg.vecdot(grads, grads, dim=-3)
    return total


def squared_one_hot_gradients(indices: Tensor, g: Tensor, size: int) -> Tensor:
    """`squared_example_gradients` for one-hot inputs: indices (n, r), g (n, r, out) → (out, size).
    O(n · r · out)."""
    keys = (indices + size * torch.arange(len(indices), device=indices.device)[:, None]).flatten()
    unique, where = keys.unique(return_inverse=True)
    sums = g.new_zeros(len(unique), g.shape[-1]).index_add_(0, where, g.flatten(0, 1))
    return g.new_zeros(size, g.shape[-1]).index_add_(0, unique % size, sums.square()).mT
