"""The unit of a layer that is linear in a matrix: running Kronecker factors ``A ⊗ G``, and their
solver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from thermo_opt.fisher.kronecker import (
    EigenvalueCorrectedBlock,
    Factor,
    KroneckerBlock,
    KroneckerRule,
)
from thermo_opt.fisher.kronecker.estimate import projected_squares
from thermo_opt.fisher.kronecker.factors import flatten, working_dtype
from thermo_opt.fisher.kronecker.layers import Layer
from thermo_opt.fisher.kronecker.placement import place_tied
from thermo_opt.fisher.kronecker.rules import ConvRule
from thermo_opt.fisher.spectral import Spectrum, orthogonal_iteration
from thermo_opt.optim.solvers import KroneckerInverse, Spectral, traces
from thermo_opt.optim.units import (
    Average,
    LayerUnit,
    Running,
    Settings,
    Use,
    alike,
    rtol_of,
    second_moment,
    stack,
    thin,
    together,
)

SETTLED = 30
"""Observations after which a running factor turns slowly enough for its basis to follow by warm
starts."""


def bounds(size: int, limit: int | None) -> list[tuple[int, int]]:
    """0 … size in equal parts no longer than ``limit``; at least one, however short."""
    parts = 1 if limit is None else max(math.ceil(size / limit), 1)
    step = max(math.ceil(size / parts), 1)
    return [(start, min(start + step, size)) for start in range(0, max(size, 1), step)]


class _Side:
    """Captured and running A and G of one layer, as lists of diagonal blocks."""

    def __init__(self, layer: Layer, bias: bool) -> None:
        self.layer, self.bias = layer, bias
        self.average = Running()
        self.limit: int | None = None
        self.use: Use | None = None
        self.A: list[Tensor] = []
        self.A_rows = 0
        self.G: list[Tensor] = []
        self.rows = 0.0
        self.samples: list[tuple[Tensor, Tensor, float]] = []

    def add(self, A: list[Tensor], A_rows: int, G: list[Tensor], rows: float) -> None:
        """Take one use: A, the mean of outer products over ``A_rows`` rows, and G, their sum over
        ``rows`` rows."""
        if self.A:
            torch._foreach_lerp_(self.A, A, A_rows / (self.A_rows + A_rows))
            torch._foreach_add_(self.G, G)
        else:
            self.A, self.G, self.A_rows, self.rows = A, G, 0, 0.0
        self.A_rows += A_rows
        self.rows += rows

    def observed(self, terms: float) -> list[Tensor]:
        torch._foreach_mul_(self.G, terms)
        found = self.A + self.G
        self.use, self.A, self.G = None, [], []
        return found

    def cut(self, side: Tensor, bias: bool) -> list[Tensor]:
        """The diagonal blocks of a whole side."""
        if side.dim() != 2:
            return [side]
        size = side.shape[-1] - bias
        return [
            side[s : e + (bias and e == size), s : e + (bias and e == size)].clone()
            for s, e in bounds(size, self.limit)
        ]


class KroneckerUnit(LayerUnit):
    """Weights and biases of a layer, or of each of a stack of layers of one shape: ``A ⊗ G`` a
    layer."""

    def __init__(
        self, layers: list[Layer], params: list[nn.Parameter], settings: Settings, name: str = ""
    ) -> None:
        super().__init__(name or ", ".join(layer.name for layer in layers), params, settings)
        self.layers = layers
        self.sides = [
            _Side(layer, any(p is getattr(layer.module, "bias", None) for p in params))
            for layer in layers
        ]
        self.corrected = settings.corrected
        self.eigenvalues = Running()
        self._seen: list[_Side] = []
        self._terms = 1.0
        self._block: KroneckerBlock | None = None

    @property
    def rule(self) -> KroneckerRule:
        """The rule of the (first) layer."""
        rule = self.layers[0].rule
        assert isinstance(rule, KroneckerRule)
        return rule

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, out, in) of each layer's matrix."""
        return self.rule.shape(self.layers[0].module)

    def kind(self) -> tuple[object, ...] | None:
        side = self.sides[0]
        groups, out, inputs = self.shape
        if self.settings.spectral or self.rule.one_hot or groups > 1:
            return None
        if any(part._base is None for part in self.scatter(self.params[0].new_empty(out, inputs))):
            return None  # a rule whose parameters are no views of its matrix
        return type(self), type(self.rule), self.shape, side.bias, side.limit, len(self.params)

    def joined(self, units: Sequence[LayerUnit]) -> KroneckerUnit:
        layers, params = (
            [la for u in units for la in u.layers],
            [p for u in units for p in u.params],
        )
        unit = KroneckerUnit(layers, params, self.settings)
        unit.sides = unit._seen = [
            side for u in units if isinstance(u, KroneckerUnit) for side in u.sides
        ]
        return unit

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        if len(self.layers) == 1:
            return self.rule.to_matrix(self.layers[0].module, tensors)
        _, out, inputs = self.shape
        whole = tensors[0].new_empty(len(self.layers), out, inputs)
        torch._foreach_copy_(self.scatter(whole), list(tensors))
        return whole

    def scatter(self, x: Tensor) -> list[Tensor]:
        matrices = [x] if len(self.layers) == 1 else x
        return [
            part.view(p.shape) if part.shape != p.shape else part
            for layer, matrix, own in zip(
                self.layers, matrices, self._each(self.params), strict=True
            )
            for part, p in zip(self.rule.from_matrix(layer.module, matrix), own, strict=True)
        ]

    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        side, layer = self.sides[place], self.layers[place]
        rule, module, settings = layer.rule, layer.module, self.settings
        assert isinstance(rule, KroneckerRule)
        if rule.one_hot:
            indices = rule.inputs(module, x)
            counts = torch.bincount(indices.flatten(), minlength=rule.shape(module)[2])
            A_rows = indices.numel()
            A = [counts.to(working_dtype(g.dtype)).div_(A_rows)]
            samples = rule.gradients(module, x, g)
            total = float(samples.shape[-3] * samples.shape[-2])
            rows = thin(samples.flatten(-3, -2), settings.rows, offset)
            if self.corrected:
                side.samples.append(
                    (thin(indices.reshape(-1, 1), settings.rows, offset), rows, total)
                )
            side.add(A, A_rows, self._squares(rows, total), total)
            return
        examples = x.shape[0] if x.dim() > 1 else 1
        positions = math.prod(g.shape[2:]) if isinstance(rule, ConvRule) else 1
        kept = examples
        if settings.rows is not None and isinstance(rule, ConvRule):
            # Unfolding is the cost here: take a few examples whole, several times the rows wanted.
            kept = min(examples, max(8, math.ceil(8 * settings.rows / positions)))
            x, g = _examples(x, kept, offset), _examples(g, kept, offset)
        inputs = flatten(rule.inputs(module, x), settings.setting, mean=True)
        gradients = flatten(rule.gradients(module, x, g), settings.setting, mean=False)
        total = gradients.shape[-2] * examples / kept
        use = Use(
            thin(inputs, settings.rows, offset), thin(gradients, settings.rows, offset), total
        )
        if self.corrected:
            side.samples.append((use.x, use.g, total))
        if not rule.covers(module, "weight"):  # the bias alone: its input is 1
            use.x = use.x[..., :0]
        if side.use is None and settings.rows is not None:
            side.use = use.kept()
        else:
            self._add([side], [use])

    def _add(self, sides: Sequence[_Side], uses: Sequence[Use]) -> None:
        """Turn rows into factors."""
        a, rows = together(uses)
        bias, size, A_rows = sides[0].bias, a.shape[-1], a.shape[-2]
        if bias:
            a = functional.pad(a, (0, 1), value=1.0)
        A = [
            second_moment(a[..., s : e + (bias and e == size)], 1 / A_rows)
            for s, e in bounds(size, sides[0].limit)
        ]
        G = self._squares(rows, uses[0].total)
        for j, (side, use) in enumerate(zip(sides, uses, strict=True)):
            own_A, own_G = (A, G) if len(uses) == 1 else ([t[j] for t in A], [t[j] for t in G])
            side.add(own_A, A_rows, own_G, use.total)

    def _squares(self, rows: Tensor, total: float) -> list[Tensor]:
        """The blocks of G, of gradients that stand for ``total`` rows."""
        limit = self.sides[0].limit
        return [
            second_moment(rows[..., s:e], total / rows.shape[-2])
            for s, e in bounds(rows.shape[-1], limit)
        ]

    def observed(self, terms: float) -> list[Tensor] | None:
        self._terms = terms
        for places, uses in alike([side.use for side in self.sides]):
            self._add([self.sides[place] for place in places], uses)
        self._seen = [side for side in self.sides if side.A]
        return [t for side in self._seen for t in side.observed(terms)] or None

    def discard(self) -> None:
        for side in self.sides:
            side.use, side.A, side.G, side.samples = None, [], [], []

    def work(self, limit: int | None) -> tuple[float, float]:
        """Multiplications of (the layer's three passes, one `solve` with sides cut to ``limit``) as
        last captured."""
        groups, out, inputs = self.shape
        side_a, side_g = (
            k if limit is None or not self.divisible else min(k, limit) for k in (inputs, out)
        )
        passes = sum(
            3.0 * side.rows * (out if self.rule.one_hot else groups * out * inputs)
            for side in self.sides
        )
        return passes, float(
            groups * out * inputs * (side_g + (1 if self.rule.one_hot else side_a))
        )

    @property
    def divisible(self) -> bool:
        """Whether the sides may be cut into diagonal blocks."""
        return not self.settings.spectral and self.shape[0] == 1

    def cut(self, limit: int | None, observed: list[Tensor] | None = None) -> list[Tensor]:
        """From now on keep diagonal blocks of side ≤ ``limit`` only; returns the whole sides
        ``observed`` so cut."""
        if not self.divisible:
            return observed or []
        side = self.sides[0]
        side.limit = limit
        return [
            b
            for t, bias in zip(observed or [], (side.bias, False), strict=False)
            for b in side.cut(t, bias)
        ]

    def fold(self, observed: Sequence[Tensor]) -> None:
        each = len(observed) // len(self._seen)
        for i, side in enumerate(self._seen):
            side.average.add(observed[each * i : each * (i + 1)], self.settings.decay)

    def factors(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Running (A, G), each as a list of diagonal blocks, or None while some layer has not been
        seen."""
        if not all(side.average.value for side in self.sides):
            return None
        value = stack([side.average for side in self.sides])
        groups, out, _ = self.shape
        count = len(bounds(out, self.sides[0].limit)) if groups == 1 else 1
        return value[:-count], value[-count:]

    def trace(self) -> Tensor | None:
        pair = self.factors()
        return None if pair is None else (traces(pair[0]) * traces(pair[1])).sum()

    def refresh(self, damping: float, compute: bool = True) -> None:
        pair = self.factors()
        if pair is None:
            return
        self.damping = damping
        if not self.settings.spectral:
            last = self.solver if isinstance(self.solver, KroneckerInverse) else None
            self.solver = KroneckerInverse(*pair, damping, last)
            return
        (A,), (G,) = pair
        if self._block is None:
            self._block = KroneckerBlock(
                A,
                G,
                diagonal_A=self.rule.one_hot and A.dim() == 1,
                diagonal_G=G.dim() == 1 and A.dim() > 1,
            )
        for factor, matrix in ((self._block.A, A), (self._block.G, G)):
            if factor.diagonal:
                factor.update(matrix)
            elif not compute:
                factor.update(
                    matrix, Spectrum(matrix.new_zeros(matrix.shape[:-1]), torch.empty_like(matrix))
                )
            else:
                factor.update(matrix, self._warm(factor, matrix))
        self.solver = None

    def _warm(self, factor: Factor, matrix: Tensor) -> Spectrum | None:
        """EKFAC's next basis, one QR step from the last: half an eigendecomposition, and its axes
        turn slowly instead of being reordered, so that eigenvalues averaged over refreshes belong
        to the same axes. None (decompose anew) for other metrics, whose eigenvalues must be the
        factors' own, and while young averages still turn fast."""
        settled = all(side.average.count > SETTLED for side in self.sides)
        if not (self.corrected and settled and factor.decomposed):
            return None
        return orthogonal_iteration(matrix, factor.spectrum.basis)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.corrected and self._block is not None:
            sides = (self._block.A, self._block.G)
            state["spectra"] = [
                [f.spectrum.eigenvalues, f.spectrum.basis] for f in sides if not f.diagonal
            ]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if (
            "spectra" in state and self._block is not None
        ):  # bases depend on the path that led to them
            saved = iter(state["spectra"])
            like = self.params[0]
            for factor in (self._block.A, self._block.G):
                if not factor.diagonal:
                    values, basis = (t.to(device=like.device).clone() for t in next(saved))
                    factor.update(factor.matrix, Spectrum(values, basis))
            self.finish(lambda tensors: None)

    def shared(self) -> list[Tensor]:
        if self._block is None:
            return super().shared()
        sides: list[Factor] = [f for f in (self._block.A, self._block.G) if not f.diagonal]
        return [t for f in sides for t in (f.spectrum.basis, f.spectrum.eigenvalues)]

    def finish(self, average: Average) -> None:
        if self._block is None:
            return
        block = self._block
        if self.corrected:
            side = self.sides[0]
            squares: Tensor | None = None
            for a, rows, total in side.samples:
                inputs = a if self.rule.one_hot else a.unsqueeze(-2)
                new = projected_squares(side.layer, block, inputs, rows.unsqueeze(-2)).mul_(
                    total / rows.shape[-2]
                )
                squares = new if squares is None else squares.add_(new)
            if squares is not None:
                average([squares.mul_(self._terms)])
                self.eigenvalues.add([squares], self.settings.decay)
            side.samples = []
            if self.eigenvalues.value:
                block = EigenvalueCorrectedBlock(block, self.eigenvalues.value[0])
        cut = rtol_of(self.settings, block.eigenvalues)
        self.solver = Spectral(block, self.damping, cut, self.settings.atol)

    def running(self) -> list[Running]:
        return [*(side.average for side in self.sides), self.eigenvalues]


class TiedUnit(KroneckerUnit):
    """A weight that several layers share: the nearest single product to the sum of theirs."""

    def __init__(self, layers: list[Layer], weight: nn.Parameter, settings: Settings) -> None:
        super().__init__(layers, [weight], settings, " = ".join(layer.name for layer in layers))
        self.corrected = False

    def kind(self) -> tuple[object, ...] | None:
        return None

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.rule.weight_matrix(self.layers[0].module, tensors[0])

    def scatter(self, x: Tensor) -> list[Tensor]:
        return [self.rule.weight_tensor(self.layers[0].module, x)]

    def observed(self, terms: float) -> list[Tensor] | None:
        found = super().observed(terms)
        return found if len(self._seen) == len(self.sides) else None

    @property
    def divisible(self) -> bool:
        return False

    def factors(self) -> tuple[list[Tensor], list[Tensor]] | None:
        if not all(side.average.value for side in self.sides):
            return None
        terms = [(side.layer, side.average.value[0], side.average.value[1]) for side in self.sides]
        placed = place_tied(0, self.params[0], terms)
        if placed is None:
            return None
        assert isinstance(placed.block, KroneckerBlock)
        return [placed.block.A.matrix], [placed.block.G.matrix]


def _examples(t: Tensor, kept: int, offset: int) -> Tensor:
    """``kept`` examples (dimension 0), evenly spaced."""
    stride = max(len(t) // kept, 1)
    return t[offset % stride :: stride][:kept]
