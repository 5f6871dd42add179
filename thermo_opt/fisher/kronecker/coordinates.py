"""A block's coordinates: how the tensors of its parameters become one tensor, and back.

Shared by the metrics of a batch and by NGD-T's running metric, so that both speak of the same
matrix of a layer.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from thermo_opt.fisher.kronecker.layers import KroneckerLayer
from thermo_opt.fisher.kronecker.scratch import Scratch


class Coordinates(ABC):
    """The maps between tensors of the shapes of a block's parameters and the block's own tensor."""

    @abstractmethod
    def gather(self, tensors: Sequence[Tensor], scratch: Scratch | None = None) -> Tensor:
        """Parameter-shaped tensors as one tensor of the block, copied (where they must be) to new
        memory or to ``scratch``'s."""

    @abstractmethod
    def scatter(self, x: Tensor) -> list[Tensor]:
        """The inverse of `gather`: views of x where the layout allows."""


class ParameterItself(Coordinates):
    """One parameter, in its own shape."""

    def gather(self, tensors: Sequence[Tensor], scratch: Scratch | None = None) -> Tensor:
        return tensors[0]

    def scatter(self, x: Tensor) -> list[Tensor]:
        return [x]


class LayerMatrix(Coordinates):
    """Weight and bias of a layer as one matrix (…, out, in); of a stack of layers of one shape
    (m, out, in)."""

    def __init__(self, layers: Sequence[KroneckerLayer]) -> None:
        self.layers = tuple(layers)
        self._shapes = [[tuple(p.shape) for p in layer.parameters] for layer in self.layers]
        groups, *matrix = self.layers[0].shape
        self._shape = (len(self.layers), *matrix) if len(self.layers) > 1 else (*matrix,)
        self._joins = len(self.layers) > 1 or (groups == 1 and len(self._shapes[0]) > 1)

    def gather(self, tensors: Sequence[Tensor], scratch: Scratch | None = None) -> Tensor:
        first = self.layers[0]
        if not self._joins or (scratch is None and len(self.layers) == 1):
            return first.rule.to_matrix(first.module, tensors)
        if scratch is None:
            whole = tensors[0].new_empty(self._shape)
        else:
            whole = scratch.empty(self._shape, tensors[0], "gathered")
        parts = self.scatter(whole)
        if any(part._base is None for part in parts):  # no views: they can't be written through
            return first.rule.to_matrix(first.module, tensors)
        torch._foreach_copy_(parts, list(tensors))
        return whole

    def scatter(self, x: Tensor) -> list[Tensor]:
        matrices = [x] if len(self.layers) == 1 else x
        return [
            part.view(shape) if part.shape != shape else part
            for layer, matrix, shapes in zip(self.layers, matrices, self._shapes, strict=True)
            for part, shape in zip(
                layer.rule.from_matrix(layer.module, matrix), shapes, strict=True
            )
        ]


class SharedWeight(Coordinates):
    """A weight that several layers share, as the first of them reads it."""

    def __init__(self, layer: KroneckerLayer) -> None:
        self.layer = layer

    def gather(self, tensors: Sequence[Tensor], scratch: Scratch | None = None) -> Tensor:
        return self.layer.rule.weight_matrix(self.layer.module, tensors[0])

    def scatter(self, x: Tensor) -> list[Tensor]:
        return [self.layer.rule.weight_tensor(self.layer.module, x)]


class ScaleVector(Coordinates):
    """Scale and shift of a normalisation layer, joined: (k,); of a stack of layers (m, k).

    Args:
        shapes: the shapes of one layer's parameters.
        count: how many layers.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], count: int = 1) -> None:
        self._shapes = [torch.Size(shape) for shape in shapes] * count
        self._sizes = [math.prod(shape) for shape in self._shapes]
        self._count = count

    def gather(self, tensors: Sequence[Tensor], scratch: Scratch | None = None) -> Tensor:
        whole = torch.cat([t.reshape(-1) for t in tensors])
        return whole if self._count == 1 else whole.view(self._count, -1)

    def scatter(self, x: Tensor) -> list[Tensor]:
        parts = x.reshape(-1).split(self._sizes)
        return [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]


class ScaleChannels(Coordinates):
    """Scale and shift of a normalisation layer, side by side per channel: (d, 2)."""

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        self._shapes = [torch.Size(shape) for shape in shapes]

    def gather(self, tensors: Sequence[Tensor], scratch: Scratch | None = None) -> Tensor:
        return torch.stack([t.reshape(-1) for t in tensors], dim=-1)

    def scatter(self, x: Tensor) -> list[Tensor]:
        return [x[..., j].view(shape) for j, shape in enumerate(self._shapes)]
