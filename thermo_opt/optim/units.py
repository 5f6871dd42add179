"""Units of the training metric: the parameters of a layer, their running curvature, and the block's
cached solver.

A unit turns what passes through its layer in an ordinary training step into running factors (an
average with memory ``decay``), and its factors into a `Solver` when its turn to be refreshed comes.
The layer rules are those of `thermo_opt.fisher.kronecker`, so what NGD-T spends and what the audit
measures are one thing.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.fisher.kronecker import DenseBlock, ScaleRule
from thermo_opt.fisher.kronecker.estimate import DENSE_SCALES
from thermo_opt.fisher.kronecker.factors import working
from thermo_opt.fisher.kronecker.layers import Layer
from thermo_opt.fisher.spectral import default_rtol
from thermo_opt.optim.solvers import (
    Damped,
    DenseInverse,
    DiagonalInverse,
    Solver,
    Spectral,
    invert,
    traces,
)

Average = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Settings:
    """How curvature is estimated and inverted; one object for all units.

    ``spectral``: eigenbases instead of Cholesky inverses. ``corrected``: EKFAC's eigenvalues (needs
    ``spectral``). ``rows``: most rows (examples × shared positions) that a layer's factors see at
    one refresh, None for all of them. ``overhead``: largest share of the passes' multiplications
    that solving may cost; wide factors are cut into diagonal blocks (no narrower than 128) to fit.
    """

    decay: float = 0.95
    rows: int | None = 256
    overhead: float = 0.05
    setting: str = "expand"
    spectral: bool = False
    corrected: bool = False
    rtol: float | None = None
    atol: float = 0.0


FORGET = 4
"""The share of the n-th observation in a young average is FORGET/(n + FORGET): what was seen in the
first fraction of a run is forgotten as fast as curvature moves away from it (polynomial-decay
averaging, Shamir & Zhang 2013)."""


@dataclass
class Running:
    """Average of tensors that remembers a constant fraction of the observations so far, and from
    then on 1/(1−decay) of them."""

    count: int = 0
    value: list[Tensor] = field(default_factory=list)

    def add(self, new: Sequence[Tensor], decay: float) -> None:
        """Fold one observation in."""
        if not self.value:
            self.value = [t.clone() for t in new]
        else:
            keep = min(decay, self.count / (self.count + FORGET))
            torch._foreach_lerp_(self.value, list(new), 1 - keep)
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "value": list(self.value)}

    def load_state_dict(self, state: dict[str, Any], like: Tensor) -> None:
        self.count = int(state["count"])
        self.value = [t.to(device=like.device).clone() for t in state["value"]]


@dataclass
class Use:
    """Rows of one use of a layer in a pass: its inputs ``x`` (…, r, k) and output gradients ``g``;
    the latter stand for ``total`` rows."""

    x: Tensor
    g: Tensor
    total: float

    def kept(self) -> Use:
        """The same in memory of its own, so that the pass's activations can go."""
        x, g = (t.clone(memory_format=torch.contiguous_format) for t in (self.x, self.g))
        return Use(x, g, self.total)


def together(uses: Sequence[Use]) -> tuple[Tensor, Tensor]:
    """x and g of uses of equal shapes as one batch (m, …); as they are if there is but one."""
    if len(uses) == 1:
        return uses[0].x, uses[0].g
    return torch.stack([use.x for use in uses]), torch.stack([use.g for use in uses])


def alike(uses: Sequence[Use | None]) -> list[tuple[list[int], list[Use]]]:
    """Uses that can be treated as one batch, and where in the list they stand."""
    found: dict[tuple[object, ...], tuple[list[int], list[Use]]] = {}
    for place, use in enumerate(uses):
        if use is not None:
            key = (use.x.shape, use.x.dtype, use.g.shape, use.g.dtype, use.total)
            places, same = found.setdefault(key, ([], []))
            places.append(place)
            same.append(use)
    return list(found.values())


class Unit(ABC):
    """Parameters that share one block, in the block's coordinates: `gather` and `scatter` go to and
    fro.

    ``squared``: bᵀF_λb of the momentum b; ``crossed``: bᵀF_λw and ``decayed``: wᵀF_λw with the
    weight-decay direction w. They are carried from step to step by inner products alone, because
    F_λ(F_λ⁻¹g) = g, and recomputed after each refresh, when they are ``stale``. ``total``: tr F of
    the running curvature when last asked for. ``places``: where the parameters stand in the
    optimizer's list, None for one it was not given.
    """

    def __init__(self, name: str, params: list[nn.Parameter], settings: Settings) -> None:
        self.name, self.params, self.settings = name, params, settings
        self.places: list[int | None] = []
        self.solver: Solver | None = None
        self.total: float | None = None
        self.damping = 0.0
        self.momentum: Tensor | None = None
        self.squared = self.crossed = self.decayed = 0.0
        self.stale = False
        self._scattered: tuple[Tensor | None, list[Tensor]] = (None, [])

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        """Parameter-shaped tensors as the block's coordinates."""
        return tensors[0]

    def scatter(self, x: Tensor) -> list[Tensor]:
        """The inverse of `gather`."""
        return [x]

    def scattered_momentum(self) -> list[Tensor]:
        """`scatter` of the momentum, made once where it is updated in place."""
        assert self.momentum is not None
        last, parts = self._scattered
        if last is not self.momentum:
            parts = self.scatter(self.momentum)
            self._scattered = (
                (self.momentum, parts) if all(p._base is not None for p in parts) else (None, parts)
            )
        return parts

    @abstractmethod
    def observed(self, terms: float) -> list[Tensor] | None:
        """What was captured since the last call, as tensors whose plain mean over processes is
        right; None if nothing was.

        ``terms``: the loss terms M that the captured gradients average over (over the square of a
        loss scale, if there is one).
        """

    @abstractmethod
    def fold(self, observed: Sequence[Tensor]) -> None:
        """Fold observations into the running curvature."""

    @abstractmethod
    def trace(self) -> Tensor | None:
        """tr F of the running curvature, or None while there is none."""

    @abstractmethod
    def refresh(self, damping: float, compute: bool = True) -> None:
        """Build the solver, up to its inverses (`invert`); with ``compute=False`` eigenbases, too,
        are left for another process to fill."""

    def running(self) -> list[Running]:
        """The running averages, for saving."""
        return []

    def shared(self) -> list[Tensor]:
        """Costly tensors of the last refresh, in place, for broadcasting."""
        return [part.inverse for part in self.damped]

    @property
    def damped(self) -> Sequence[Damped]:
        """The matrices that wait for their inverses after `refresh`."""
        return () if self.solver is None else self.solver.damped

    def finish(self, average: Average) -> None:
        """Called after `shared` tensors have arrived; ``average`` replaces tensors by their means
        over processes."""
        return

    def discard(self) -> None:
        """Forget what was captured since the last refresh."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; the solver is rebuilt from the factors by the call that
        made it, which gives the same bits."""
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
            invert(self.damped)
            self.finish(lambda tensors: None)
        self.squared, self.crossed, self.decayed = (float(x) for x in state["lengths"])


class DiagonalUnit(Unit):
    """One parameter that no layer rule covers: ``F ≈ diag(M ĝ²)`` from minibatch gradients ĝ of M
    loss terms (THEORY §9)."""

    def __init__(self, name: str, params: list[nn.Parameter], settings: Settings) -> None:
        super().__init__(name, params, settings)
        self.average = Running()
        self._pending: Tensor | None = None

    def see(self, gradient: Tensor) -> None:
        """Take the gradient of the step's mean loss."""
        self._pending = working(gradient).square()

    def observed(self, terms: float) -> list[Tensor] | None:
        pending, self._pending = self._pending, None
        return None if pending is None else [pending.mul_(terms)]

    def fold(self, observed: Sequence[Tensor]) -> None:
        self.average.add(observed, self.settings.decay)

    def trace(self) -> Tensor | None:
        return self.average.value[0].sum() if self.average.value else None

    def refresh(self, damping: float, compute: bool = True) -> None:
        if self.average.value:
            self.damping = damping
            values = self.average.value[0]
            self.solver = DiagonalInverse(
                values, damping, rtol_of(self.settings, values), self.settings.atol
            )

    def running(self) -> list[Running]:
        return [self.average]


class LayerUnit(Unit):
    """A unit fed by its layers' inputs and output gradients: one layer, or a stack of layers of one
    shape.

    A stack's coordinates, factors and inverses have a leading dimension, one entry a layer, so that
    many small products run as one.
    """

    layers: list[Layer]

    @abstractmethod
    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        """Take one use of layer ``place``: its input x, and g = ∂(mean loss)/∂(its output).

        ``offset`` varies with the step and decides which rows a subsample takes.
        """

    @abstractmethod
    def kind(self) -> tuple[object, ...] | None:
        """Units of the same kind may be stacked; None: not with any."""

    @abstractmethod
    def joined(self, units: Sequence[LayerUnit]) -> LayerUnit:
        """The stack of ``units``, all of this unit's kind and none of them refreshed yet; what they
        observed last is to be folded into it, one after the other."""

    def _each(self, tensors: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Tensors aligned with `params`, layer by layer."""
        count = len(self.params) // len(self.layers)
        return [tensors[i : i + count] for i in range(0, len(tensors), count)]


def stack(averages: Sequence[Running]) -> list[Tensor]:
    """The running averages of a stack's layers as tensors (m, …); the averages become views of
    them, and stay so."""
    values = [average.value for average in averages]
    if len(values) == 1:
        return values[0]
    whole = [t._base for t in values[0] if t._base is not None]
    if len(whole) < len(values[0]):
        whole = [torch.stack(parts) for parts in zip(*values, strict=True)]
        for j, average in enumerate(averages):
            average.value = [t[j] for t in whole]
    return whole


class ScaleUnit(LayerUnit):
    """Scale and shift of normalisation layers: one dense block (2d × 2d) a layer, or 2 × 2 a
    channel where that is too large."""

    def __init__(self, layers: list[Layer], params: list[nn.Parameter], settings: Settings) -> None:
        super().__init__(", ".join(layer.name for layer in layers), params, settings)
        self.layers = layers
        self.sizes = [p.numel() for p in self._each(params)[0]]
        self.dense = sum(self.sizes) <= DENSE_SCALES
        self.averages = [Running() for _ in layers]
        self._uses: list[Use | None] = [None] * len(layers)
        self._pending: list[Tensor | None] = [None] * len(layers)
        self._seen: list[int] = []

    def kind(self) -> tuple[object, ...] | None:
        module = self.layers[0].module
        stackable = self.dense and not self.settings.spectral
        return (
            (ScaleUnit, type(module), getattr(module, "eps", None), tuple(self.sizes))
            if stackable
            else None
        )

    def joined(self, units: Sequence[LayerUnit]) -> ScaleUnit:
        layers, params = (
            [la for u in units for la in u.layers],
            [p for u in units for p in u.params],
        )
        unit = ScaleUnit(layers, params, self.settings)
        unit._seen = list(range(len(layers)))
        return unit

    def gather(self, tensors: Sequence[Tensor]) -> Tensor:
        flat = [t.reshape(-1) for t in tensors]
        if not self.dense:
            return torch.stack(flat, dim=-1)
        whole = torch.cat(flat)
        return whole if len(self.layers) == 1 else whole.view(len(self.layers), -1)

    def scatter(self, x: Tensor) -> list[Tensor]:
        if not self.dense:
            return [x[:, j].view_as(p) for j, p in enumerate(self.params)]
        parts = x.reshape(-1).split(self.sizes * len(self.layers))
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]

    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        layer = self.layers[place]
        rule, most = layer.rule, self.settings.rows
        assert isinstance(rule, ScaleRule)
        width = max(self.sizes)
        total = float(g.numel() // width)
        if rule.axes == "last":  # positions are independent: thin them before any arithmetic
            x, g = (thin(t.reshape(-1, width), most, offset) for t in (x, g))
            use = Use(x, g, total)
        else:
            rows = rule.rows(layer.module, rule.normalised(layer.module, x), g, "reduce")
            use = Use(rows.new_empty(0), thin(rows, most, offset), float(len(rows)))
        if self._uses[place] is None and most is not None:
            self._uses[place] = use.kept()
        else:
            self._add([place], [use])

    def _add(self, places: Sequence[int], uses: Sequence[Use]) -> None:
        """Turn rows into second moments."""
        layer = self.layers[places[0]]
        rule = layer.rule
        assert isinstance(rule, ScaleRule)
        x, rows = together(uses)
        if rule.axes == "last":
            shape = layer.module.weight.shape
            x, g = (t.flatten(0, -2).unflatten(-1, shape) for t in (x, rows))
            rows = rule.rows(layer.module, rule.normalised(layer.module, x), g, "expand").view(
                *rows.shape[:-1], -1
            )
        scale = uses[0].total / rows.shape[-2]
        if self.dense:
            moments = second_moment(rows, scale)
        else:
            channels = working(rows).unflatten(-1, (len(self.sizes), -1))
            moments = torch.einsum("...npd,...nqd->...dpq", channels, channels).mul_(scale)
        for place, moment in zip(places, moments if len(uses) > 1 else [moments], strict=True):
            pending = self._pending[place]
            self._pending[place] = moment if pending is None else pending.add_(moment)

    def observed(self, terms: float) -> list[Tensor] | None:
        for places, uses in alike(self._uses):
            self._add(places, uses)
        pending = self._pending
        self.discard()
        self._seen = [j for j, moment in enumerate(pending) if moment is not None]
        return [moment.mul_(terms) for moment in pending if moment is not None] or None

    def discard(self) -> None:
        self._uses = [None] * len(self.layers)
        self._pending = [None] * len(self.layers)

    def fold(self, observed: Sequence[Tensor]) -> None:
        for j, moment in zip(self._seen, observed, strict=True):
            self.averages[j].add([moment], self.settings.decay)

    def trace(self) -> Tensor | None:
        moments = [t for average in self.averages for t in average.value]
        return (
            torch.stack([traces([moment]).sum() for moment in moments]).sum() if moments else None
        )

    def refresh(self, damping: float, compute: bool = True) -> None:
        if not all(average.value for average in self.averages):
            return
        (matrix,) = stack(self.averages)
        self.damping = damping
        if self.settings.spectral:
            self.solver = Spectral(
                DenseBlock(matrix), damping, rtol_of(self.settings, matrix), self.settings.atol
            )
        else:
            last = self.solver if isinstance(self.solver, DenseInverse) else None
            self.solver = DenseInverse(matrix, damping, last)

    def running(self) -> list[Running]:
        return self.averages


def rtol_of(settings: Settings, values: Tensor) -> float:
    """The relative threshold for eigenvalues ``values``: the user's, or the default of their shape
    and precision."""
    return default_rtol(max(values.shape), values.dtype) if settings.rtol is None else settings.rtol


def second_moment(rows: Tensor, scale: float) -> Tensor:
    """``scale · rowsᵀ rows`` of rows (…, r, k), in one pass."""
    rows = working(rows)
    out = rows.new_empty(*rows.shape[:-2], rows.shape[-1], rows.shape[-1])
    add = out.addmm_ if out.dim() == 2 else out.baddbmm_
    return add(rows.mT, rows, beta=0.0, alpha=scale)


def thin(rows: Tensor, most: int | None, offset: int) -> Tensor:
    """At most ``most`` of the rows (…, r, k), evenly spaced by an odd stride (so that no
    power-of-two layout aliases)."""
    count = rows.shape[-2]
    if most is None or count <= most:
        return rows
    stride = math.ceil(count / most) | 1
    return rows[..., offset % stride :: stride, :]
