"""Statistics of Kronecker factors, with one normalisation throughout (THEORY §1).

For M loss terms (examples, or predicted tokens) with gradients g of each *unaveraged* loss term, and a weight shared
over r positions, the block of ``F = (1/M) Σ J ᵀΛJ`` is approximated by ``A ⊗ G``:

- expand: ``A = mean over examples and positions of a aᵀ``, ``G = (1/M) Σ over examples and positions of g gᵀ``;
- reduce: ``A = mean over examples of ā āᵀ`` with ā the mean over positions, ``G = (1/M) Σ (Σ_r g)(Σ_r g)ᵀ``.

A backward pass of the mean loss yields g/M, so there ``G = M · Σ (g/M)(g/M)ᵀ``. Uses of one module in a forward pass
count as further positions. Sources: Martens & Grosse 2015; Grosse & Martens 2016; Eschenhagen et al. 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker.rules import KroneckerRule, Layer, Setting


@dataclass
class Moment:
    """A sum of outer products and how many rows it holds: ``total`` (…, k, k), or (k,) for one-hot rows."""

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


def outer(rows: Tensor, ones: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """``Σ rows rowsᵀ``: (…, rows, k) → (…, k, k); with ``ones``, a last column of ones joins in.

    The column costs a column sum rather than a copy of the rows. Half precision is accumulated in float32.
    """
    if dtype is None and rows.dtype in (torch.float16, torch.bfloat16):
        dtype = torch.float32
    if dtype is not None:
        rows = rows.to(dtype)
    if not ones:
        return rows.mT @ rows
    count, k = rows.shape[-2:]
    total = rows.new_empty(*rows.shape[:-2], k + 1, k + 1)
    total[..., :k, :k] = rows.mT @ rows
    sums = rows.sum(-2)
    total[..., :k, k] = sums
    total[..., k, :k] = sums
    total[..., k, k] = count
    return total


def flatten(samples: Tensor, setting: Setting, mean: bool) -> Tensor:
    """Samples (…, n, r, k) as rows (…, rows, k): every position ("expand") or its mean or sum an example ("reduce")."""
    if setting == "expand":
        return samples.flatten(-3, -2)
    return samples.mean(-2) if mean else samples.sum(-2)


def input_moment(
    rule: KroneckerRule, module: Layer, x: Tensor, setting: Setting = "expand", dtype: torch.dtype | None = None
) -> Moment:
    """Sum for the input factor A of one use of ``module``, bias column included; its ``mean`` is A.

    One-hot rules give token counts (vocabulary,), a diagonal A. Cost O(rows · in²).
    """
    bias = rule.covers(module, "bias")
    if rule.one_hot:
        indices = rule.inputs(module, x).flatten()
        size = rule.shape(module)[2]
        kind = dtype or module.weight.dtype
        return Moment(torch.bincount(indices, minlength=size).to(kind), indices.numel())
    if not rule.covers(module, "weight"):
        groups = rule.shape(module)[0]
        kind = dtype or module.bias.dtype
        shape = (groups, 1, 1) if groups > 1 else (1, 1)
        return Moment(torch.ones(shape, dtype=kind, device=x.device), 1)
    rows = flatten(rule.inputs(module, x), setting, mean=True)
    return Moment(outer(rows, ones=bias, dtype=dtype), rows.shape[-2])


def gradient_moment(
    rule: KroneckerRule,
    module: Layer,
    x: Tensor,
    g: Tensor,
    setting: Setting = "expand",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Sum for the output factor G of one use: ``Σ g gᵀ`` (…, out, out). Cost O(rows · out²).

    Divide by M for unaveraged g, multiply by M for g of the mean loss.
    """
    samples = rule.gradients(module, x, g)
    return outer(flatten(samples, "expand" if rule.one_hot else setting, mean=False), dtype=dtype)


def example_gradients(a: Tensor, g: Tensor, ones: bool = False) -> Tensor:
    """Per-example gradient matrices ``Σ_r g_r a_rᵀ``: a (…, n, r, in), g (…, n, r, out) → (…, n, out, in[+1]).

    Either side may already be projected on an eigenbasis (then ``a`` has its ones column folded in). Cost O(n · r ·
    out · in).
    """
    grads = g.mT @ a
    return torch.cat([grads, g.sum(-2).unsqueeze(-1)], dim=-1) if ones else grads
