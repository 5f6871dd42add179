"""Blocks and their places: which parameters a block covers, in which coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker.blocks import Block, DenseBlock, DiagonalBlock, KroneckerBlock
from thermo_opt.fisher.kronecker.coordinates import (
    Coordinates,
    LayerMatrix,
    ParameterItself,
    ScaleChannels,
    ScaleVector,
    SharedWeight,
)
from thermo_opt.fisher.kronecker.factor import nearest_product
from thermo_opt.fisher.kronecker.layers import KroneckerLayer, ScaleLayer


@dataclass(frozen=True)
class Placed:
    """A block, the positions of its parameters, and its coordinates."""

    name: str
    block: Block
    positions: tuple[int, ...]
    coordinates: Coordinates

    def take(self, v: Sequence[Tensor]) -> Tensor:
        """The block's coordinates of a list aligned with all trainable parameters."""
        return self.coordinates.gather([v[i] for i in self.positions])


def place_kronecker(layer: KroneckerLayer, block: KroneckerBlock) -> Placed:
    """The block of a layer's weight and bias, joined in one matrix."""
    return Placed(layer.name, block, tuple(i for _, i in layer.own), LayerMatrix([layer]))


def place_scale(layer: ScaleLayer, moment: Tensor) -> Placed:
    """The block of a layer's scale and shift: dense for a (k, k) moment, a 2×2 block per channel
    for a (d, 2, 2) one."""
    shapes = [p.shape for p in layer.parameters]
    coordinates = ScaleVector(shapes) if moment.dim() == 2 else ScaleChannels(shapes)
    return Placed(layer.name, DenseBlock(moment), tuple(i for _, i in layer.own), coordinates)


def place_diagonal(name: str, position: int, values: Tensor) -> Placed:
    """A diagonal block of one parameter."""
    return Placed(name, DiagonalBlock(values), (position,), ParameterItself())


def place_tied(
    position: int, weight: Tensor, terms: Sequence[tuple[KroneckerLayer, Tensor, Tensor]]
) -> Placed | None:
    """One Kronecker block for a weight that several layers share.

    None when the layers don't read the weight as one matrix or its transpose (`tied_product`).
    """
    pair = tied_product(weight, terms)
    if pair is None:
        return None
    A, G = pair
    return Placed(
        " = ".join(layer.name for layer, _, _ in terms),
        KroneckerBlock(A, G, diagonal_A=A.dim() == 1, diagonal_G=G.dim() == 1),
        (position,),
        SharedWeight(terms[0][0]),
    )


def tied_product(
    weight: Tensor, terms: Sequence[tuple[KroneckerLayer, Tensor, Tensor]]
) -> tuple[Tensor, Tensor] | None:
    """(A, G) of a weight that several layers share: the nearest product of the sum of their blocks.

    ``terms``: (layer, A of the weight alone, G). None when the layers don't read the weight as one
    matrix or its transpose.
    """
    numbers = torch.arange(weight.numel()).reshape(weight.shape)
    reference = SharedWeight(terms[0][0]).gather([numbers])
    pairs = []
    for layer, A, G in terms:
        matrix = SharedWeight(layer).gather([numbers])
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
    return nearest_product(list(zip(*sides, strict=True)))
