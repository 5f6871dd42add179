"""Blocks and their places: which parameters a block covers and how they become its coordinates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker.blocks import (
    Block,
    DenseBlock,
    DiagonalBlock,
    KroneckerBlock,
    nearest_product,
)
from thermo_opt.fisher.kronecker.layers import Layer
from thermo_opt.fisher.kronecker.rules import KroneckerRule


@dataclass(frozen=True)
class Placed:
    """A block, the positions of its parameters, and the maps parameters' tensors ↔ the block's
    coordinates."""

    name: str
    block: Block
    positions: tuple[int, ...]
    gather: Callable[[Sequence[Tensor]], Tensor]
    scatter: Callable[[Tensor], list[Tensor]]

    def take(self, v: Sequence[Tensor]) -> Tensor:
        """The block's coordinates of a list aligned with all trainable parameters."""
        return self.gather([v[i] for i in self.positions])


def place_kronecker(layer: Layer, block: KroneckerBlock) -> Placed:
    """The block of a layer's weight and bias, joined in one matrix."""
    rule, module = layer.rule, layer.module
    assert isinstance(rule, KroneckerRule)
    return Placed(
        layer.name,
        block,
        tuple(i for _, i in layer.own),
        lambda tensors: rule.to_matrix(module, tensors),
        lambda matrix: rule.from_matrix(module, matrix),
    )


def place_scale(layer: Layer, moment: Tensor) -> Placed:
    """The block of a layer's scale and shift: dense for a (k, k) moment, a 2×2 block a channel for
    a (d, 2, 2) one."""
    positions = tuple(i for _, i in layer.own)
    shapes = [tuple(getattr(layer.module, local).shape) for local, _ in layer.own]
    if moment.dim() == 2:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        return Placed(
            layer.name,
            DenseBlock(moment),
            positions,
            lambda tensors: torch.cat([t.flatten() for t in tensors]),
            lambda x: [
                part.reshape(shape) for part, shape in zip(x.split(sizes), shapes, strict=True)
            ],
        )
    return Placed(
        layer.name,
        DenseBlock(moment),
        positions,
        lambda tensors: torch.stack([t.flatten() for t in tensors], dim=-1),
        lambda x: [x[..., j].reshape(shape) for j, shape in enumerate(shapes)],
    )


def place_diagonal(name: str, position: int, values: Tensor) -> Placed:
    """A diagonal block of one parameter."""
    return Placed(
        name, DiagonalBlock(values), (position,), lambda tensors: tensors[0], lambda x: [x]
    )


def place_tied(
    position: int, weight: Tensor, terms: Sequence[tuple[Layer, Tensor, Tensor]]
) -> Placed | None:
    """One Kronecker block for a weight that several layers share: the nearest product of the sum of
    their blocks.

    ``terms``: (layer, A of the weight alone, G). None when the layers don't read the weight as one
    matrix or its transpose.
    """
    first = terms[0][0]
    rule, module = first.rule, first.module
    assert isinstance(rule, KroneckerRule)
    numbers = torch.arange(weight.numel()).reshape(weight.shape)
    reference = rule.weight_matrix(module, numbers)
    pairs = []
    for layer, A, G in terms:
        assert isinstance(layer.rule, KroneckerRule)
        matrix = layer.rule.weight_matrix(layer.module, numbers)
        if torch.equal(matrix, reference):
            pairs.append((A, G))
        elif torch.equal(matrix.mT, reference):
            pairs.append((G, A))
        else:
            return None
    sides = []
    for side in zip(*pairs, strict=True):
        full = any(t.dim() > 1 for t in side)
        sides.append([torch.diag_embed(t) if full and t.dim() == 1 else t for t in side])
    A, G = nearest_product(list(zip(*sides, strict=True)))
    return Placed(
        " = ".join(layer.name for layer, _, _ in terms),
        KroneckerBlock(A, G, diagonal_A=A.dim() == 1, diagonal_G=G.dim() == 1),
        (position,),
        lambda tensors: rule.weight_matrix(module, tensors[0]),
        lambda matrix: [rule.weight_tensor(module, matrix)],
    )
