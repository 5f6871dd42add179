"""The block of a layer that is linear in a matrix: running Kronecker factors ``A ⊗ G``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thermo_opt.fisher.kronecker import EigenvalueCorrectedBlock, Factor, KroneckerBlock
from thermo_opt.fisher.kronecker.blocks import KroneckerBasis
from thermo_opt.fisher.kronecker.coordinates import Coordinates, LayerMatrix, SharedWeight
from thermo_opt.fisher.kronecker.estimate import projected_squares
from thermo_opt.fisher.kronecker.layers import KroneckerLayer
from thermo_opt.fisher.kronecker.uses import ParameterUse
from thermo_opt.fisher.spectral import Spectrum, orthogonal_iteration
from thermo_opt.optim.kronecker.blocks import Average, LayerBlock, rtol_of
from thermo_opt.optim.kronecker.capture import (
    RunningAverage,
    add_all,
    group_by_shape,
    stack_averages,
)
from thermo_opt.optim.kronecker.inverses import KroneckerInverse, SpectralInverse
from thermo_opt.optim.kronecker.layer_factors import LayerFactors, add_captures

if TYPE_CHECKING:
    from thermo_opt.optim.metrics import KFAC

SETTLED = 30
"""Observations after which a running factor turns slowly enough for its basis to follow by warm
starts."""


class MatrixBlock(LayerBlock):
    """Weights and biases of a layer, or of each of a stack of layers of one shape: ``A ⊗ G`` per
    layer."""

    def __init__(
        self,
        layers: Sequence[KroneckerLayer],
        params: list[nn.Parameter],
        options: KFAC,
        name: str = "",
        coordinates: Coordinates | None = None,
    ) -> None:
        name = name or ", ".join(layer.name for layer in layers)
        super().__init__(name, params, coordinates or LayerMatrix(layers), options)
        self.layers: Sequence[KroneckerLayer] = layers
        own = {id(p) for p in params}
        divisible = not options.spectral and coordinates is None
        self.sides = [
            LayerFactors(
                layer,
                id(layer.module._parameters.get(layer.rule.own("bias"))) in own,
                options,
                divisible,
            )
            for layer in layers
        ]
        self.corrected = options.corrected
        self.eigenvalues = RunningAverage()
        self._awaited = False
        self._terms = 1.0
        self._basis: KroneckerBlock | None = None
        self._pair: tuple[Factor, Factor] | None = None

    @property
    def one_hot(self) -> bool:
        """Whether the inputs are indices, so that A is a diagonal."""
        return self.layers[0].rule.one_hot

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, out, in) of each layer's matrix."""
        return self.layers[0].shape

    # ---- stacks

    def shape_key(self) -> tuple[object, ...] | None:
        groups, out, inputs = self.shape
        side, rule = self.sides[0], self.layers[0].rule
        if self.options.spectral or self.one_hot or groups > 1:
            return None
        if side.diagonal_A or side.diagonal_G:
            return None
        like = self.params[0]
        matrix = torch.empty(out, inputs, dtype=like.dtype, device=like.device)
        parts = self.coordinates.scatter(matrix)
        if any(part._base is None for part in parts):
            return None  # a rule whose parameters are no views of its matrix
        return type(self), type(rule), self.shape, side.bias, side.limit, len(self.params)

    def merge(self, blocks: Sequence[LayerBlock]) -> MatrixBlock:
        own = [block for block in blocks if isinstance(block, MatrixBlock)]
        layers = [layer for block in own for layer in block.layers]
        whole = MatrixBlock(layers, [p for block in own for p in block.params], self.options)
        whole.sides = [side for block in own for side in block.sides]
        whole.captured_layers = list(range(len(whole.sides)))
        return whole

    # ---- from passes to running factors

    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        self.sides[place].capture(x, g, offset, self.corrected)

    def capture_use(self, place: int, use: ParameterUse, g: Tensor, offset: int) -> None:
        """Take one use of a bare parameter: g = ∂(mean loss)/∂(its result)."""
        self.sides[place].capture_use(use, g, offset)

    def captured(self, terms: float) -> list[Tensor] | None:
        self._terms = terms
        for places, captures in group_by_shape([side.pending for side in self.sides]):
            add_captures([self.sides[place] for place in places], captures)
        self.captured_layers = [j for j, side in enumerate(self.sides) if side.A]
        return [t for j in self.captured_layers for t in self.sides[j].captured(terms)] or None

    def row_means(self, tensors: int) -> int:
        return tensors - self.sides[0].blocks[1]

    def discard(self) -> None:
        for side in self.sides:
            side.discard()

    def update(self, captured: Sequence[Tensor]) -> None:
        self._awaited, self._pair = True, None
        each = len(captured) // len(self.captured_layers)
        averages = [self.sides[j].average for j in self.captured_layers]
        parts = [captured[each * i : each * (i + 1)] for i in range(len(averages))]
        add_all(averages, parts, self.options.factor_decay)

    def factors(self) -> tuple[Factor, Factor] | None:
        """Running (A, G), or None while some layer has not been seen; until `rest` the same
        ones."""
        if self._pair is None:
            self._pair = self._factors()
        return self._pair

    def _factors(self) -> tuple[Factor, Factor] | None:
        if not all(side.average.known for side in self.sides):
            return None
        value = stack_averages([side.average for side in self.sides])
        count = self.sides[0].blocks[1]
        A, G = value[:-count], value[-count:]
        return Factor(A, A[0].dim() == 1), Factor(G, G[0].dim() == 1)

    def trace(self) -> Tensor | None:
        pair = self.factors()
        return None if pair is None else (pair[0].trace * pair[1].trace).sum()

    def averages(self) -> list[RunningAverage]:
        return [*(side.average for side in self.sides), self.eigenvalues]

    # ---- diagonal blocks of wide factors

    def work(self, limit: int | None) -> tuple[float, float]:
        """Multiplications of (the layer's three passes, one `solve` with sides cut to ``limit``) as
        last captured."""
        groups, out, inputs = self.shape
        passes = sum(
            3.0
            * side.seen
            * (side.layer.shape[1] if side.layer.rule.one_hot else groups * out * inputs)
            for side in self.sides
        )
        side = self.sides[0]
        widths = []
        for k, diagonal in ((inputs, side.diagonal_A), (out, side.diagonal_G)):
            ends = side.bounds(k, limit) if self.divisible else [(0, k)]
            widths.append(1 if diagonal else max(e - s for s, e in ends))
        return passes, float(groups * out * inputs * sum(widths))

    @property
    def divisible(self) -> bool:
        """Whether the factors may be cut into diagonal blocks."""
        return self.sides[0].divisible

    def cut(self, limit: int | None, captured: Sequence[Tensor] = ()) -> list[Tensor]:
        """From now on keep diagonal blocks of side ≤ ``limit`` only; returns the factors
        ``captured`` so cut."""
        return self.sides[0].cut(limit, captured) if self.divisible else list(captured)

    # ---- the inverse

    def refresh(self, damping: float, compute: bool = True) -> None:
        pair = self.factors()
        if pair is None:
            return
        self.damping = damping
        if not self.options.spectral:
            last = self.inverse if isinstance(self.inverse, KroneckerInverse) else None
            self.inverse = KroneckerInverse(*pair, damping, last, self.scratch)
            return
        A, G = pair
        if self._basis is None:
            self._basis = KroneckerBlock(
                A.matrix,
                G.matrix,
                diagonal_A=A.diagonal,
                diagonal_G=G.diagonal,
            )
        for factor, matrix in ((self._basis.A, A.matrix), (self._basis.G, G.matrix)):
            if factor.diagonal:
                factor.update(matrix)
            elif compute:
                factor.update(matrix, self._warm(factor, matrix))
            else:
                zeros = matrix.new_zeros(matrix.shape[:-1])
                factor.update(matrix, Spectrum(zeros, torch.empty_like(matrix)))
        self.inverse = None

    def rest(self) -> None:
        self._pair = None
        if self.options.half_state and isinstance(self.inverse, KroneckerInverse):
            self.inverse.rest(self.factors)

    def _warm(self, factor: Factor, matrix: Tensor) -> Spectrum | None:
        """EKFAC's next basis, one QR step from the last.

        It costs half an eigendecomposition, and its axes turn slowly instead of being reordered, so
        that eigenvalues averaged over refreshes belong to the same axes. None (decompose anew) for
        other metrics, whose eigenvalues must be the factors' own, and while young averages still
        turn fast.
        """
        settled = all(side.average.count > SETTLED for side in self.sides)
        if not (self.corrected and settled and factor.decomposed):
            return None
        return orthogonal_iteration(matrix, factor.spectrum.basis)

    def broadcastable(self) -> list[Tensor]:
        if self._basis is None:
            return super().broadcastable()
        whole = [f for f in (self._basis.A, self._basis.G) if not f.diagonal]
        return [t for f in whole for t in (f.spectrum.basis, f.spectrum.eigenvalues)]

    def finish(self, average: Average) -> None:
        if self._basis is None:
            return
        block: KroneckerBasis = self._basis
        if self.corrected:
            self._correct(self._basis, average)
            if self.eigenvalues.known:
                block = EigenvalueCorrectedBlock(block, self.eigenvalues.value[0])
        cut = rtol_of(self.options, block.eigenvalues)
        self.inverse = SpectralInverse(block, self.damping, cut, self.options.atol)

    def _correct(self, basis: KroneckerBlock, average: Average) -> None:
        """Average the captured samples' squares in the eigenbasis into EKFAC's eigenvalues."""
        side = self.sides[0]
        squares: Tensor | None = None
        for a, rows, total in side.samples:
            inputs = a if self.one_hot else a.unsqueeze(-2)
            new = projected_squares(side.layer, basis, inputs, rows.unsqueeze(-2))
            new.mul_(total / rows.shape[-2])
            squares = new if squares is None else squares.add_(new)
        if squares is None and self._awaited:  # only other processes called the layer
            squares = torch.zeros_like(basis.eigenvalues)
        self._awaited = False
        if squares is not None:
            average([squares.mul_(self._terms)])
            self.eigenvalues.add([squares], self.options.factor_decay)
        side.samples = []

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.corrected and self._basis is not None:
            sides = (self._basis.A, self._basis.G)
            state["spectra"] = [
                [f.spectrum.eigenvalues, f.spectrum.basis] for f in sides if not f.diagonal
            ]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "spectra" in state and self._basis is not None:  # they depend on the path behind them
            saved = iter(state["spectra"])
            like = self.params[0]
            for factor in (self._basis.A, self._basis.G):
                if not factor.diagonal:
                    to = {"device": like.device, "dtype": factor.matrix.dtype}
                    values, basis = (t.to(**to).clone() for t in next(saved))
                    factor.update(factor.matrix, Spectrum(values, basis))
            self.finish(lambda tensors: None)


class TiedBlock(MatrixBlock):
    """A weight that several layers share: the nearest single product to the sum of theirs. Layers
    that are never called (another name of the same table) have none."""

    def __init__(
        self, layers: Sequence[KroneckerLayer], weight: nn.Parameter, options: KFAC
    ) -> None:
        name = " = ".join(layer.name for layer in layers)
        super().__init__(layers, [weight], options, name, SharedWeight(layers[0]))
        self.corrected = False
        self._turned = [_turned(layer, layers[0]) for layer in layers]

    def shape_key(self) -> tuple[object, ...] | None:
        return None

    @property
    def divisible(self) -> bool:
        """Whether narrow sides, which all layers share, may be cut; a wide one is a diagonal."""
        return not self.options.spectral

    def cut(self, limit: int | None, captured: Sequence[Tensor] = ()) -> list[Tensor]:
        if not self.divisible:
            return list(captured)
        rest, parts = list(captured), []
        for j, side in enumerate(self.sides):
            count = sum(side.blocks) if rest and j in self.captured_layers else 0
            parts += side.cut(limit, rest[:count])
            rest = rest[count:]
        return parts

    def _factors(self) -> tuple[Factor, Factor] | None:
        pairs = zip(self.sides, self._turned, strict=True)
        seen = [(side, turned) for side, turned in pairs if side.average.known]
        if not seen or None in self._turned:
            return None
        terms = []
        for side, turned in seen:
            value, count = side.average.value, side.blocks[0]
            A, G = value[:count], value[count:]
            terms.append((G, A) if turned else (A, G))
        A, G = nearest_blocks(terms)
        return Factor(A, A[0].dim() == 1), Factor(G, G[0].dim() == 1)


def nearest_blocks(terms: Sequence[tuple[list[Tensor], list[Tensor]]]) -> tuple[list[Tensor], ...]:
    """`nearest_product` of terms whose sides are lists of the diagonal blocks of one cut, or one
    diagonal."""
    sides = []
    for side in zip(*terms, strict=True):
        cut = next(([len(b) for b in blocks] for blocks in side if blocks[0].dim() > 1), None)
        sides.append(
            [
                blocks
                if cut is None or blocks[0].dim() > 1
                else [torch.diag_embed(part) for part in blocks[0].split(cut)]
                for blocks in side
            ]
        )
    traces = [[Factor(blocks, blocks[0].dim() == 1).trace for blocks in side] for side in sides]
    total = sum(x * y for x, y in zip(*traces, strict=True))
    if len(terms) == 1 or float(total) == 0.0:
        return sides[0][0], sides[1][0]
    left, right = (
        [
            torch.stack([t * block for t, block in zip(other, parts, strict=True)]).sum(0)
            for parts in zip(*side, strict=True)
        ]
        for side, other in zip(sides, reversed(traces), strict=True)
    )
    return left, [block / total for block in right]


def _turned(layer: KroneckerLayer, first: KroneckerLayer) -> bool | None:
    """Whether a layer reads the weight that it shares as the transpose of what the first reads;
    None where it reads another matrix."""
    weight = torch.empty(layer.parameters[0].shape, device="meta")
    own, reference = (SharedWeight(one).gather([weight]) for one in (layer, first))
    if any(t is not weight and t._base is not weight for t in (own, reference)):
        same = type(layer.rule) is type(first.rule) and own.shape == reference.shape
        return False if same else None
    for turned, matrix in ((False, own), (True, own.mT)):
        if (matrix.shape, matrix.stride()) == (reference.shape, reference.stride()):
            return turned
    return None
