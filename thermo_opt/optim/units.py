"""Units of the training metric: the parameters of a layer, their running curvature, and the block's cached solver.

A unit turns what passes through its layer in an ordinary training step into running factors (an average with memory ``decay``),
and its factors into a `Solver` when its turn to be refreshed comes. The layer rules are those of `thermo_opt.fisher.kronecker`, so
what NGD-T spends and what the audit measures are one thing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.fisher.kronecker import (
    DenseBlock,
    EigenvalueCorrectedBlock,
    Factor,
    KroneckerBlock,
    KroneckerRule,
    ScaleRule,
)
from thermo_opt.fisher.kronecker.estimate import DENSE_SCALES, projected_squares
from thermo_opt.fisher.kronecker.factors import flatten, outer
from thermo_opt.fisher.kronecker.layers import Layer
from thermo_opt.fisher.kronecker.placement import place_tied
from thermo_opt.fisher.kronecker.rules import ConvRule
from thermo_opt.fisher.spectral import Spectrum, default_rtol, orthogonal_iteration
from thermo_opt.optim.solvers import DenseInverse, DiagonalInverse, KroneckerInverse, Solver, Spectral

SETTLED = 30
"""Observations after which a running factor turns slowly enough for its basis to follow by warm starts."""

Average = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Settings:
    """How curvature is estimated and inverted; one object for all units.

    ``spectral``: eigenbases instead of Cholesky inverses. ``corrected``: EKFAC's eigenvalues (needs ``spectral``). ``rows``: most
    rows (examples × shared positions) that a layer's factors see at one refresh, None for all of them. ``overhead``: largest share of
    the passes' multiplications that solving may cost; wide factors are cut into diagonal blocks (no narrower than 128) to fit.
    """

    decay: float = 0.95
    rows: int | None = 256
    overhead: float = 0.05
    setting: str = "expand"
    spectral: bool = False
    corrected: bool = False
    rtol: float | None = None
    atol: float = 0.0


@dataclass
class Running:
    """Exponential average of tensors; the first observation counts fully, and the memory grows to 1/(1−decay)."""

    count: int = 0
    value: list[Tensor] = field(default_factory=list)

    def add(self, new: Sequence[Tensor], decay: float) -> None:
        """Fold one observation in."""
        if not self.value:
            self.value = [t.clone() for t in new]
        else:
            keep = min(decay, self.count / (self.count + 1))
            for old, fresh in zip(self.value, new, strict=True):
                old.mul_(keep).add_(fresh, alpha=1 - keep)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "value": list(self.value)}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        self.count = int(state["count"])
        self.value = [t.to(device=like.device).clone() for t in state["value"]]


class Unit(ABC):
    """Parameters that share one block, in the block's coordinates: `gather` and `scatter` go to and fro.

    ``squared``: bᵀF_λb of the momentum b; ``crossed``: bᵀF_λw and ``decayed``: wᵀF_λw with the weight-decay direction w. They
    are carried from step to step by inner products alone, because F_λ(F_λ⁻¹g) = g, and recomputed after each refresh, when they are ``stale``. ``places``: where
    the parameters stand in the optimizer's list, None for one it was not given.
    """

    def __init__(self, name: str, params: list[nn.Parameter], settings: Settings) -> None:
        self.name, self.params, self.settings = name, params, settings
        self.places: list[int | None] = []
        self.solver: Solver | None = None
        self.damping = 0.0
        self.momentum: Tensor | None = None
        self.squared = self.crossed = self.decayed = 0.0
        self.stale = False

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Parameter-shaped tensors as the block's coordinates."""
        return tensors[0]

    def scatter(self, x: Tensor) -> list[Tensor]:
        """The inverse of `gather`."""
        return [x]

    @abstractmethod
    def observed(self, terms: float) -> list[Tensor] | None:
        """What was captured since the last call, as tensors whose plain mean over processes is right; None if nothing was.

        ``terms``: the loss terms M that the captured gradients average over (over the square of a loss scale, if there is one).
        """

    @abstractmethod
    def fold(self, observed: Sequence[Tensor]) -> None:
        """Fold observations into the running curvature."""

    @abstractmethod
    def refresh(self, damping: float, compute: bool = True) -> None:
        """Build the solver; with ``compute=False`` its costly tensors are left for another process to fill."""

    def running(self) -> list[Running]:
        """The running averages, for saving."""
        return []

    def shared(self) -> list[Tensor]:
        """Costly tensors of the last refresh, in place, for broadcasting."""
        return [] if self.solver is None else self.solver.cached()

    def finish(self, average: Average) -> None:
        """Called after `shared` tensors have arrived; ``average`` replaces tensors by their means over processes."""
        return

    def discard(self) -> None:
        """Forget what was captured since the last refresh."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; solvers are rebuilt from the factors, which gives the same bits."""
        return {
            "running": [r.state_dict() for r in self.running()],
            "ready": self.solver is not None,
            "damping": self.damping,
            "momentum": self.momentum,
            "lengths": [self.squared, self.crossed, self.decayed],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        like = self.params[0]
        for running, saved in zip(self.running(), state["running"], strict=True):
            running.load_state_dict(saved, like)
        momentum = state["momentum"]
        self.momentum = None if momentum is None else momentum.to(device=like.device).clone()
        self.solver = None
        if state["ready"]:
            self.refresh(float(state["damping"]))
            self.finish(lambda tensors: None)
        self.squared, self.crossed, self.decayed = (float(x) for x in state["lengths"])


class DiagonalUnit(Unit):
    """One parameter that no layer rule covers: ``F ≈ diag(M ĝ²)`` from minibatch gradients ĝ of M loss terms (THEORY §9)."""

    def __init__(self, name: str, params: list[nn.Parameter], settings: Settings) -> None:
        super().__init__(name, params, settings)
        self.average = Running()
        self._pending: Tensor | None = None

    def see(self, gradient: Tensor) -> None:
        """Take the gradient of the step's mean loss."""
        self._pending = gradient.to(_statistics(gradient.dtype)).square()

    def observed(self, terms: float) -> list[Tensor] | None:
        pending, self._pending = self._pending, None
        return None if pending is None else [pending.mul_(terms)]

    def fold(self, observed: Sequence[Tensor]) -> None:
        self.average.add(observed, self.settings.decay)

    def refresh(self, damping: float, compute: bool = True) -> None:
        if self.average.value:
            self.damping = damping
            values = self.average.value[0]
            self.solver = DiagonalInverse(values, damping, _rtol(self.settings, values), self.settings.atol)

    def running(self) -> list[Running]:
        return [self.average]


class LayerUnit(Unit):
    """A unit fed by its layers' inputs and output gradients."""

    layers: list[Layer]

    @abstractmethod
    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        """Take one use of layer ``place``: its input x, and g = ∂(mean loss)/∂(its output).

        ``offset`` varies with the step and decides which rows a subsample takes.
        """


class ScaleUnit(LayerUnit):
    """Scale and shift of a normalisation layer: one dense block (2d × 2d), or 2 × 2 a channel where that is too large."""

    def __init__(self, layer: Layer, params: list[nn.Parameter], settings: Settings) -> None:
        super().__init__(layer.name, params, settings)
        self.layers = [layer]
        self.sizes = [p.numel() for p in params]
        self.dense = sum(self.sizes) <= DENSE_SCALES
        self.average = Running()
        self._pending: Tensor | None = None

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = [t.flatten() for t in tensors]
        return torch.cat(flat) if self.dense else torch.stack(flat, dim=-1)

    def scatter(self, x: Tensor) -> list[Tensor]:
        if not self.dense:
            return [x[:, j].view_as(p) for j, p in enumerate(self.params)]
        return [part.view_as(p) for part, p in zip(x.split(self.sizes), self.params, strict=True)]

    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        layer = self.layers[0]
        rule = layer.rule
        assert isinstance(rule, ScaleRule)
        total = g.numel() // max(p.numel() for p in self.params)
        if rule.axes == "last":  # positions are independent: thin them before any arithmetic
            width = max(p.numel() for p in self.params)
            shape = layer.module.weight.shape
            x, g = (_thin(t.reshape(-1, width), self.settings.rows, offset).unflatten(-1, shape) for t in (x, g))
            rows = rule.rows(layer.module, rule.normalised(layer.module, x), g, "expand")
        else:
            rows = rule.rows(layer.module, rule.normalised(layer.module, x), g, "reduce")
            total = rows.shape[0]
            rows = _thin(rows, self.settings.rows, offset)
        if self.dense:
            moment = outer(rows)
        else:
            channels = rows.to(_statistics(rows.dtype)).unflatten(-1, (len(self.params), -1))
            moment = torch.einsum("npd,nqd->dpq", channels, channels)
        moment.mul_(total / rows.shape[0])
        self._pending = moment if self._pending is None else self._pending.add_(moment)

    def observed(self, terms: float) -> list[Tensor] | None:
        pending, self._pending = self._pending, None
        return None if pending is None else [pending.mul_(terms)]

    def discard(self) -> None:
        self._pending = None

    def fold(self, observed: Sequence[Tensor]) -> None:
        self.average.add(observed, self.settings.decay)

    def refresh(self, damping: float, compute: bool = True) -> None:
        if not self.average.value:
            return
        matrix = self.average.value[0]
        self.damping = damping
        if self.settings.spectral:
            self.solver = Spectral(DenseBlock(matrix), damping, _rtol(self.settings, matrix), self.settings.atol)
        else:
            last = self.solver if isinstance(self.solver, DenseInverse) else None
            self.solver = DenseInverse(matrix, damping, last, compute)

    def running(self) -> list[Running]:
        return [self.average]


def bounds(size: int, limit: int | None) -> list[tuple[int, int]]:
    """0 … size in equal parts no longer than ``limit``."""
    parts = 1 if limit is None else math.ceil(size / limit)
    step = math.ceil(size / parts)
    return [(start, min(start + step, size)) for start in range(0, size, step)]


class _Side:
    """Captured and running A and G of one layer, as lists of diagonal blocks."""

    def __init__(self, layer: Layer, bias: bool) -> None:
        self.layer, self.bias = layer, bias
        self.average = Running()
        self.limit: int | None = None
        self.A: list[Tensor] = []
        self.A_rows = 0
        self.G: list[Tensor] = []
        self.rows = 0.0
        self.samples: list[tuple[Tensor, Tensor, float]] = []

    def add(self, A: list[Tensor], A_rows: int, G: list[Tensor], rows: float) -> None:
        """Take sums of outer products of one use: A over ``A_rows`` rows, G standing for ``rows`` rows."""
        if self.A:
            torch._foreach_add_(self.A, A)
            torch._foreach_add_(self.G, G)
        else:
            self.A, self.G, self.A_rows, self.rows = A, G, 0, 0.0
        self.A_rows += A_rows
        self.rows += rows

    def observed(self, terms: float) -> list[Tensor]:
        found = [A.div_(self.A_rows) for A in self.A] + [G.mul_(terms) for G in self.G]
        self.A, self.G = [], []
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
    """Weight and bias of one layer, ``A ⊗ G``; or a weight that several layers share (the nearest single product of their sum)."""

    def __init__(self, layers: list[Layer], params: list[nn.Parameter], settings: Settings) -> None:
        super().__init__(" = ".join(layer.name for layer in layers), params, settings)
        self.layers = layers
        rules = [layer.rule for layer in layers]
        assert all(isinstance(rule, KroneckerRule) for rule in rules)
        self.tied = len(layers) > 1
        self.sides = [
            _Side(layer, not self.tied and any(p is getattr(layer.module, "bias", None) for p in params))
            for layer in layers
        ]
        self.corrected = settings.corrected and not self.tied
        self.eigenvalues = Running()
        self._terms = 1.0
        self._block: KroneckerBlock | None = None

    @property
    def rule(self) -> KroneckerRule:
        """The rule of the (first) layer."""
        rule = self.layers[0].rule
        assert isinstance(rule, KroneckerRule)
        return rule

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        if self.tied:
            return self.rule.weight_matrix(self.layers[0].module, tensors[0])
        return self.rule.to_matrix(self.layers[0].module, tensors)

    def scatter(self, x: Tensor) -> list[Tensor]:
        if self.tied:
            return [self.rule.weight_tensor(self.layers[0].module, x)]
        parts = self.rule.from_matrix(self.layers[0].module, x)
        return [
            part.view(p.shape) if part.shape != p.shape else part for part, p in zip(parts, self.params, strict=True)
        ]

    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        side, layer = self.sides[place], self.layers[place]
        rule, module, settings = layer.rule, layer.module, self.settings
        assert isinstance(rule, KroneckerRule)
        if rule.one_hot:
            indices = rule.inputs(module, x)
            counts = torch.bincount(indices.flatten(), minlength=rule.shape(module)[2])
            A, A_rows = [counts.to(_statistics(g.dtype))], indices.numel()
            samples = rule.gradients(module, x, g)
            total = float(samples.shape[-3] * samples.shape[-2])
            rows = _thin(samples.flatten(-3, -2), settings.rows, offset)
            if self.corrected:
                side.samples.append((_thin(indices.reshape(-1, 1), settings.rows, offset), rows, total))
        else:
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
            a, rows = _thin(inputs, settings.rows, offset), _thin(gradients, settings.rows, offset)
            size, A_rows = a.shape[-1], a.shape[-2]
            A = [outer(a[..., s:e], ones=side.bias and e == size) for s, e in bounds(size, side.limit)]
            if self.corrected:
                side.samples.append((a, rows, total))
        G = [outer(rows[..., s:e]).mul_(total / rows.shape[-2]) for s, e in bounds(rows.shape[-1], side.limit)]
        side.add(A, A_rows, G, total)

    def observed(self, terms: float) -> list[Tensor] | None:
        found = [side.observed(terms) for side in self.sides]
        self._terms = terms
        return [t for side in found for t in side] if all(found) else None

    def discard(self) -> None:
        for side in self.sides:
            side.A, side.G, side.samples = [], [], []

    def work(self, limit: int | None) -> tuple[float, float]:
        """Multiplications of (the layer's three passes, one `solve` with sides cut to ``limit``) as last captured."""
        groups, out, inputs = self.rule.shape(self.layers[0].module)
        side_a, side_g = (k if limit is None or not self.divisible else min(k, limit) for k in (inputs, out))
        passes = sum(3.0 * side.rows * (out if self.rule.one_hot else groups * out * inputs) for side in self.sides)
        return passes, float(groups * out * inputs * (side_g + (1 if self.rule.one_hot else side_a)))

    @property
    def divisible(self) -> bool:
        """Whether the sides may be cut into diagonal blocks."""
        return not (self.tied or self.settings.spectral or self.rule.shape(self.layers[0].module)[0] > 1)

    def cut(self, limit: int | None, observed: list[Tensor] | None = None) -> list[Tensor]:
        """From now on keep diagonal blocks of side ≤ ``limit`` only; returns the whole sides ``observed`` so cut."""
        if not self.divisible:
            return observed or []
        side = self.sides[0]
        side.limit = limit
        return [b for t, bias in zip(observed or [], (side.bias, False), strict=False) for b in side.cut(t, bias)]

    def fold(self, observed: Sequence[Tensor]) -> None:
        each = len(observed) // len(self.sides)
        for i, side in enumerate(self.sides):
            side.average.add(observed[each * i : each * (i + 1)], self.settings.decay)

    def factors(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Running (A, G), each as a list of diagonal blocks, or None while some layer has not been seen."""
        if not all(side.average.value for side in self.sides):
            return None
        if not self.tied:
            value, side = self.sides[0].average.value, self.sides[0]
            groups, out, _ = self.rule.shape(self.layers[0].module)
            count = len(bounds(out, side.limit)) if groups == 1 else 1
            return value[:-count], value[-count:]
        terms = [(side.layer, side.average.value[0], side.average.value[1]) for side in self.sides]
        placed = place_tied(0, self.params[0], terms)
        if placed is None:
            return None
        assert isinstance(placed.block, KroneckerBlock)
        return [placed.block.A.matrix], [placed.block.G.matrix]

    def refresh(self, damping: float, compute: bool = True) -> None:
        pair = self.factors()
        if pair is None:
            return
        self.damping = damping
        if not self.settings.spectral:
            last = self.solver if isinstance(self.solver, KroneckerInverse) else None
            self.solver = KroneckerInverse(*pair, damping, last, compute)
            return
        (A,), (G,) = pair
        if self._block is None:
            self._block = KroneckerBlock(
                A, G, diagonal_A=self.rule.one_hot and A.dim() == 1, diagonal_G=G.dim() == 1 and A.dim() > 1
            )
        for factor, matrix in ((self._block.A, A), (self._block.G, G)):
            if factor.diagonal:
                factor.update(matrix)
            elif not compute:
                factor.update(matrix, Spectrum(matrix.new_zeros(matrix.shape[:-1]), torch.empty_like(matrix)))
            else:
                factor.update(matrix, self._warm(factor, matrix))
        self.solver = None

    def _warm(self, factor: Factor, matrix: Tensor) -> Spectrum | None:
        """EKFAC's next basis, one QR step from the last: half an eigendecomposition, and its axes turn slowly instead of being
        reordered, so that eigenvalues averaged over refreshes belong to the same axes. None (decompose anew) for other metrics, whose
        eigenvalues must be the factors' own, and while young averages still turn fast."""
        settled = all(side.average.count > SETTLED for side in self.sides)
        if not (self.corrected and settled and factor.decomposed):
            return None
        return orthogonal_iteration(matrix, factor.spectrum.basis)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.corrected and self._block is not None:
            sides = (self._block.A, self._block.G)
            state["spectra"] = [[f.spectrum.eigenvalues, f.spectrum.basis] for f in sides if not f.diagonal]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if "spectra" in state and self._block is not None:  # bases depend on the path that led to them
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
                new = projected_squares(side.layer, block, inputs, rows.unsqueeze(-2)).mul_(total / rows.shape[-2])
                squares = new if squares is None else squares.add_(new)
            if squares is not None:
                average([squares.mul_(self._terms)])
                self.eigenvalues.add([squares], self.settings.decay)
            side.samples = []
            if self.eigenvalues.value:
                block = EigenvalueCorrectedBlock(block, self.eigenvalues.value[0])
        cut = _rtol(self.settings, block.eigenvalues)
        self.solver = Spectral(block, self.damping, cut, self.settings.atol)

    def running(self) -> list[Running]:
        return [*(side.average for side in self.sides), self.eigenvalues]


def _rtol(settings: Settings, values: Tensor) -> float:
    return default_rtol(max(values.shape), values.dtype) if settings.rtol is None else settings.rtol


def _statistics(dtype: torch.dtype) -> torch.dtype:
    """Factors are never held in half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _thin(rows: Tensor, most: int | None, offset: int) -> Tensor:
    """At most ``most`` of the rows (…, r, k), evenly spaced by an odd stride (so that no power-of-two layout aliases)."""
    count = rows.shape[-2]
    if most is None or count <= most:
        return rows
    stride = math.ceil(count / most) | 1
    return rows[..., offset % stride :: stride, :]


def _examples(t: Tensor, kept: int, offset: int) -> Tensor:
    """``kept`` examples (dimension 0), evenly spaced."""
    stride = max(len(t) // kept, 1)
    return t[offset % stride :: stride][:kept]
