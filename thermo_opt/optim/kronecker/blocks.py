"""Parameter blocks of the running metric: the parameters of a layer, their running curvature, the
cached inverse and the momentum.

A block turns what passes through its layer in an ordinary training step into running factors, and
its factors into a `BlockInverse` when its turn to be refreshed comes. The layer rules are those of
`thermo_opt.fisher.kronecker`, so that what NGD-T spends and what the audit measures are one thing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.fisher.kronecker import DenseBlock, Factor
from thermo_opt.fisher.kronecker.coordinates import (
    Coordinates,
    ParameterItself,
    ScaleChannels,
    ScaleVector,
)
from thermo_opt.fisher.kronecker.factors import working, working_dtype
from thermo_opt.fisher.kronecker.layers import KroneckerLayer, ScaleLayer
from thermo_opt.fisher.kronecker.scratch import Scratch
from thermo_opt.fisher.spectral import default_rtol
from thermo_opt.optim.kronecker.capture import (
    Capture,
    RunningAverage,
    add_all,
    group_by_shape,
    second_moment,
    stack_averages,
    stacked,
    thin,
)
from thermo_opt.optim.kronecker.inverses import (
    BlockInverse,
    DampedInverse,
    DenseInverse,
    DiagonalInverse,
    SpectralInverse,
    invert,
)
from thermo_opt.optim.kronecker.momentum import CarriedMomentum
from thermo_opt.optim.sharding import zeros_like

if TYPE_CHECKING:
    from thermo_opt.optim.metrics import KFAC

Average = Callable[[Sequence[Tensor]], None]
"""Replaces tensors by their means over processes."""


class ParameterBlock(ABC):
    """Parameters that share one block of the metric.

    At a refresh: `captured`, `update`, `refresh`, then `finish`; at each step the momentum and the
    inverse are used through `coordinates`.

    Attributes:
        places: where the parameters stand in the optimizer's list, None for one it does not train.
        inverse: F_λ and its inverse; None while there is no curvature.
        total: tr F of the running curvature when last asked for.
        momentum: natural gradients summed, with their lengths.
        captured_layers: which of the block's layers the last `captured` is of.
        scratch: memory that the blocks of a model share.
    """

    def __init__(
        self, name: str, params: list[nn.Parameter], coordinates: Coordinates, options: KFAC
    ) -> None:
        self.name, self.params, self.options = name, params, options
        self.coordinates = coordinates
        self.places: list[int | None] = []
        self.inverse: BlockInverse | None = None
        self.total: float | None = None
        self.damping = 0.0
        self.momentum = CarriedMomentum()
        self.captured_layers: list[int] = [0]
        self.scratch = Scratch()
        self._scattered: tuple[Tensor | None, list[Tensor]] = (None, [])

    @property
    def layer_count(self) -> int:
        """How many layers of the model the block stands for."""
        return 1

    def own(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Of tensors aligned with the optimizer's list, those of the block that there are."""
        found = [tensors[i] for i in self.places if i is not None]
        return [t for t in found if t is not None]

    def gather(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Of tensors aligned with the optimizer's list, those of the block, in its coordinates;
        zero for those that are missing. The next call may use the memory again."""
        found = [None if i is None else tensors[i] for i in self.places]
        own = [zeros_like(p) if t is None else t for t, p in zip(found, self.params, strict=True)]
        return self.coordinates.gather(own, self.scratch)

    def mask(self, tensors: Sequence[Tensor | None]) -> Tensor | None:
        """1 where the block has a tensor, 0 where it is missing; None where none is."""
        found = [None if i is None else tensors[i] for i in self.places]
        given = [i is None or t is not None for i, t in zip(self.places, found, strict=True)]
        if all(given):
            return None
        pairs = zip(self.params, given, strict=True)
        return working(self.coordinates.gather([zeros_like(p) + float(x) for p, x in pairs]))

    def scattered_momentum(self) -> list[Tensor]:
        """The momentum as tensors of the parameters' shapes: views, made once, where it can be."""
        b = self.momentum.vector
        if b is None:
            return []
        last, parts = self._scattered
        if last is not b:
            parts = self.coordinates.scatter(b)
            views = all(p._base is not None for p in parts)
            self._scattered = (b, parts) if views else (None, parts)
        return parts

    @abstractmethod
    def captured(self, terms: float) -> list[Tensor] | None:
        """What was captured since the last call, as tensors whose plain mean over processes is
        right; None if nothing was.

        ``terms``: the loss terms M that the captured gradients average over (over the square of a
        loss scale, if there is one).
        """

    def row_means(self, tensors: int) -> int:
        """How many of the ``tensors`` that one layer captured, the first ones, are means over the
        rows that the layer was called with; the others are sums."""
        return 0

    @abstractmethod
    def update(self, captured: Sequence[Tensor]) -> None:
        """Average new observations into the running curvature."""

    @abstractmethod
    def trace(self) -> Tensor | None:
        """tr F of the running curvature, or None while there is none."""

    @abstractmethod
    def refresh(self, damping: float, compute: bool = True) -> None:
        """Make the inverse of the running curvature, up to what `invert` computes; with
        ``compute=False`` eigenbases, too, are left for another process to fill."""

    def averages(self) -> list[RunningAverage]:
        """The running averages, for saving."""
        return []

    def broadcastable(self) -> list[Tensor]:
        """Costly tensors of the last refresh, in place, for sending to other processes."""
        return [part.inverse for part in self.damped]

    @property
    def damped(self) -> Sequence[DampedInverse]:
        """The matrices that wait for their inverses after `refresh`."""
        return () if self.inverse is None else self.inverse.damped

    def finish(self, average: Average) -> None:
        """Called after `broadcastable` tensors have arrived."""
        return

    def rest(self) -> None:
        """Keep no more between refreshes than must be."""
        return

    def discard(self) -> None:
        """Forget what was captured since the last refresh."""
        return

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs; the inverse is rebuilt from the factors by the call that
        made it, which gives the same bits."""
        m = self.momentum
        return {
            "running": [average.state_dict() for average in self.averages()],
            "ready": self.inverse is not None,
            "damping": self.damping,
            "momentum": m.vector,
            "lengths": [m.squared, m.crossed, m.decayed],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        like = self.params[0]
        for average, saved in zip(self.averages(), state["running"], strict=True):
            average.load_state_dict(saved, like)
        b = state["momentum"]
        if b is not None:
            b = b.to(device=like.device, dtype=working_dtype(like.dtype)).clone()
            zero = self.coordinates.gather([zeros_like(p) for p in self.params])
            if b.shape != zero.shape:
                raise InputError(_other(self.name))
        squared, crossed, decayed = (float(x) for x in state["lengths"])
        self.momentum = CarriedMomentum(b, squared, crossed, decayed)
        self.inverse = None
        if state["ready"]:
            self.refresh(float(state["damping"]))
            invert(self.damped)
            self.finish(lambda tensors: None)
        self._check()
        self.rest()

    def _check(self) -> None:
        """Refuse factors that don't belong to these parameters."""
        if self.inverse is None:
            return
        zero = working(self.coordinates.gather([zeros_like(p) for p in self.params]))
        try:
            fits = self.inverse.solve(zero).shape == zero.shape
        except RuntimeError:  # torch's: the shapes don't match
            fits = False
        if not fits:
            raise InputError(_other(self.name))


def _other(name: str) -> str:
    return (
        f"the saved optimizer state is of another model: what it holds for {name!r} has other "
        "shapes"
    )


class UnruledBlock(ParameterBlock):
    """One parameter that no layer rule covers: ``F ≈ diag(M ĝ²)`` from minibatch gradients ĝ of M
    loss terms (theory §9)."""

    def __init__(self, name: str, params: list[nn.Parameter], options: KFAC) -> None:
        super().__init__(name, params, ParameterItself(), options)
        self.average = RunningAverage()
        self._pending: Tensor | None = None

    def see(self, gradient: Tensor) -> None:
        """Take the gradient of the step's mean loss."""
        self._pending = working(gradient).square()

    def captured(self, terms: float) -> list[Tensor] | None:
        pending, self._pending = self._pending, None
        return None if pending is None else [pending.mul_(terms)]

    def update(self, captured: Sequence[Tensor]) -> None:
        self.average.add(captured, self.options.factor_decay)

    def trace(self) -> Tensor | None:
        return self.average.value[0].sum() if self.average.known else None

    def refresh(self, damping: float, compute: bool = True) -> None:
        if self.average.known:
            self.damping = damping
            values = self.average.value[0]
            rtol = rtol_of(self.options, values)
            self.inverse = DiagonalInverse(values, damping, rtol, self.options.atol)

    def averages(self) -> list[RunningAverage]:
        return [self.average]


class LayerBlock(ParameterBlock):
    """A block fed by its layers' inputs and output gradients: one layer, or a stack of layers of
    one shape.

    A stack's coordinates, factors and inverses have a leading dimension, one entry per layer, so
    that many small products run as one.
    """

    layers: Sequence[KroneckerLayer | ScaleLayer]

    @property
    def layer_count(self) -> int:
        return len(self.layers)

    @abstractmethod
    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        """Take one call of layer ``place``: its input x, and g = ∂(mean loss)/∂(its output).

        ``offset`` varies with the step and decides which rows a subsample takes.
        """

    @abstractmethod
    def shape_key(self) -> tuple[object, ...] | None:
        """Blocks of equal keys may be stacked; None: not with any."""

    @abstractmethod
    def merge(self, blocks: Sequence[LayerBlock]) -> LayerBlock:
        """The stack of ``blocks``, all of this block's key and none of them refreshed yet; what
        they captured last is to be given to its `update`, one after the other."""


class NormBlock(LayerBlock):
    """Scale and shift of normalisation layers: one dense block (2d × 2d) per layer, or 2 × 2 per
    channel where that is too large."""

    def __init__(
        self, layers: Sequence[ScaleLayer], params: list[nn.Parameter], options: KFAC
    ) -> None:
        shapes = [p.shape for p in layers[0].parameters]
        self.layers: Sequence[ScaleLayer] = layers
        self.dense = layers[0].dense
        coordinates = ScaleVector(shapes, len(layers)) if self.dense else ScaleChannels(shapes)
        super().__init__(", ".join(layer.name for layer in layers), params, coordinates, options)
        self._averages = [RunningAverage() for _ in layers]
        self._captures: list[Capture | None] = [None] * len(layers)
        self._pending: list[Tensor | None] = [None] * len(layers)

    def shape_key(self) -> tuple[object, ...] | None:
        first = self.layers[0]
        if not self.dense or self.options.spectral:
            return None
        eps = getattr(first.module, "eps", None)
        return NormBlock, type(first.module), first.rule, eps, tuple(first.sizes)

    def merge(self, blocks: Sequence[LayerBlock]) -> NormBlock:
        own = [block for block in blocks if isinstance(block, NormBlock)]
        layers = [layer for block in own for layer in block.layers]
        whole = NormBlock(layers, [p for block in own for p in block.params], self.options)
        whole.captured_layers = list(range(len(layers)))
        return whole

    def capture(self, place: int, x: Tensor, g: Tensor, offset: int) -> None:
        layer, most = self.layers[place], self.options.max_rows
        width = max(layer.sizes)
        if layer.rule.axes == "last":  # positions are independent: thin them before arithmetic
            total = float(g.numel() // width)
            x, g = (thin(t.reshape(-1, width), most, offset) for t in (x, g))
            capture = Capture(x, g, total)
        else:
            normalised = layer.rule.normalised(layer.module, x)
            rows = layer.rule.rows(layer.module, normalised, g, "reduce")
            capture = Capture(rows.new_empty(0), thin(rows, most, offset), float(len(rows)))
        if self._captures[place] is None and most is not None:
            self._captures[place] = capture.copied()
        else:
            self._add([place], [capture])

    def _add(self, places: Sequence[int], captures: Sequence[Capture]) -> None:
        """Turn rows into second moments."""
        layer = self.layers[places[0]]
        rule, module = layer.rule, layer.module
        x, rows = stacked(captures)
        if rule.axes == "last":
            shape = layer.parameters[0].shape
            x, g = (t.flatten(0, -2).unflatten(-1, shape) for t in (x, rows))
            expanded = rule.rows(module, rule.normalised(module, x), g, "expand")
            rows = expanded.view(*rows.shape[:-1], -1)
        scale = captures[0].total / rows.shape[-2]
        if self.dense:
            moments = second_moment(rows, scale)
        else:
            channels = working(rows).unflatten(-1, (len(layer.sizes), -1))
            moments = torch.einsum("...npd,...nqd->...dpq", channels, channels).mul_(scale)
        for place, moment in zip(places, moments if len(captures) > 1 else [moments], strict=True):
            pending = self._pending[place]
            self._pending[place] = moment if pending is None else pending.add_(moment)

    def captured(self, terms: float) -> list[Tensor] | None:
        for places, captures in group_by_shape(self._captures):
            self._add(places, captures)
        pending = self._pending
        self.discard()
        self.captured_layers = [j for j, m in enumerate(pending) if m is not None]
        return [moment.mul_(terms) for moment in pending if moment is not None] or None

    def discard(self) -> None:
        self._captures = [None] * len(self.layers)
        self._pending = [None] * len(self.layers)

    def update(self, captured: Sequence[Tensor]) -> None:
        averages = [self._averages[j] for j in self.captured_layers]
        add_all(averages, [[moment] for moment in captured], self.options.factor_decay)

    def trace(self) -> Tensor | None:
        moments = [t for average in self._averages for t in average.value]
        if not moments:
            return None
        return Factor(torch.stack(moments)).trace.sum()

    def refresh(self, damping: float, compute: bool = True) -> None:
        if not all(average.known for average in self._averages):
            return
        (matrix,) = stack_averages(self._averages)
        self.damping = damping
        if self.options.spectral:
            rtol = rtol_of(self.options, matrix)
            self.inverse = SpectralInverse(DenseBlock(matrix), damping, rtol, self.options.atol)
        else:
            last = self.inverse if isinstance(self.inverse, DenseInverse) else None
            self.inverse = DenseInverse(matrix, damping, last)

    def averages(self) -> list[RunningAverage]:
        return self._averages


def rtol_of(options: KFAC, values: Tensor) -> float:
    """The relative threshold for eigenvalues ``values``: the user's, or the default of their shape
    and precision."""
    if options.rtol is not None:
        return options.rtol
    return default_rtol(max(values.shape, default=1), values.dtype)
