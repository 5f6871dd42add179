"""Training passes of the whole model: their inputs, their predictions, and what backward showed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.fisher.likelihoods import Bernoulli, Categorical, Likelihood
from thermo_opt.models import is_batched, map_tensors, repeated
from thermo_opt.optim.heads import Heads

NO_BACKWARD = -1
"""What `current_backward` gives while none is running."""


@dataclass
class ForwardPass:
    """One training pass of the model, or of the part of it that is called.

    Attributes:
        module: what was called, with ``args`` and ``kwargs``.
        outputs: its predictions, detached.
        autocast: (device type, dtype) if it ran in mixed precision.
        restore: sets the random states back to those before the pass.
        heads: where the predictions are in what the module returns.
        origins: of tensors among the arguments, by their identity, the pass of another part that
            made them and their place in what it returned.
        axis: where the model has the classes, once the pass was turned (`turn`).
        both: whether predictions run along both axes (`double`).
        shape: of the outputs as the model returned them.
        others: the heads that aren't predictions of the likelihood, such as a value beside a policy
            (`keep`).
        missed: whether the loss used more of what the module returned than the heads.
        backward: number of the backward pass that last came through.
        used_heads: those that got a gradient in any pass of the step.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Tensor
    autocast: tuple[str, torch.dtype] | None = None
    restore: Callable[[], None] | None = None
    heads: Heads = field(default_factory=Heads)
    origins: dict[int, tuple[ForwardPass, int]] = field(default_factory=dict)
    axis: int | None = None
    both: bool = False
    shape: torch.Size = field(init=False)
    others: list[int] = field(default_factory=list, init=False)
    used_heads: set[int] = field(default_factory=set, init=False)
    backward: int = field(default=NO_BACKWARD, init=False)
    missed: bool = field(default=False, init=False)
    _received: dict[int, Tensor] = field(default_factory=dict)
    _gradient: Tensor | None = None
    _counted: tuple[int, float] | None = None

    def __post_init__(self) -> None:
        self.shape = self.outputs.shape

    def receive(self, source: int, g: Tensor) -> None:
        """Backward has reached a source of the predictions (a head); ``g``: the gradient there."""
        self._received[source], self.backward = g, current_backward()
        self._gradient = self._counted = None

    def miss(self, source: int, g: Tensor) -> None:
        """Backward has reached predictions that are not among the heads."""
        self.missed = True

    @property
    def gradient(self) -> Tensor | None:
        """∂loss/∂outputs, where what was received has the outputs' shape."""
        if self._gradient is None and self._received:
            if self.heads.several:
                empty = torch.zeros_like(self.outputs[:, 0])
                given = [self._received.get(k, empty) for k in range(len(self.heads.places))]
                g = self.heads.together(given, 0.0)
            else:
                g = self._received[max(self._received)]
            self._gradient = g if g.shape == self.outputs.shape else None
        return self._gradient

    @gradient.setter
    def gradient(self, g: Tensor) -> None:
        """What is counted follows: the gradient at logits where log-probabilities were returned."""
        self._gradient, self._counted = g, None
        several = self.heads.several
        given = {k: g[:, k] for k in self._received} if several else {max(self._received): g}
        self._received.update(given)

    def keep(self, heads: Sequence[bool]) -> None:
        """Set the heads apart that aren't predictions of this likelihood."""
        self._received = {k: g for k, g in self._received.items() if heads[k]}
        self.others = [k for k, kept in enumerate(heads) if not kept]
        self._gradient = self._counted = None

    def turn(self, axis: int) -> None:
        """Have the classes, which lie along ``axis``, last, and other dimensions but the examples'
        as one: (n, t, c)."""
        self.axis, self._gradient, self._counted = axis, None, None
        self.outputs = self._turned(self.outputs)
        for source, g in self._received.items():
            if g.shape == self.shape:
                self._received[source] = self._turned(g)

    def double(self) -> None:
        """Have similarities (n, n) as predictions along both axes: (n, 2, n)."""
        self.both, self._gradient, self._counted = True, None, None
        self.outputs = self._turned(self.outputs)

    def predictions(self, result: Any) -> Tensor:
        """The predictions in what the module returned, turned as this pass is."""
        return self._turned(self.heads.together(self.heads.each(result)))

    def _turned(self, f: Tensor) -> Tensor:
        if self.both:
            return torch.stack([f, f.mT], 1)
        return f if self.axis is None else f.movedim(self.axis, -1).flatten(1, -2)

    @property
    def sources(self) -> set[int]:
        """The sources of the predictions that backward has reached."""
        return set(self._received)

    @property
    def used(self) -> bool:
        """Whether the pass took part in a backward pass."""
        return bool(self._received)

    @property
    def terms(self) -> int:
        """Predictions with a gradient."""
        return self._count()[0]

    @property
    def total(self) -> float:
        """Σ|∂loss/∂outputs|, at most 2 for a mean cross-entropy."""
        return self._count()[1]

    def active(self) -> Tensor | None:
        """Which predictions take part in the loss: those with a gradient, as padding and labels
        that are ignored have none; of heads without any, those that have one in another pass of the
        step. Boolean, of the outputs' leading shape; None for all of them."""
        g = self.gradient
        if g is None:
            return None
        found = (g != 0).any(-1) if g.dim() > 1 else g != 0
        if self.heads.several:
            elsewhere = torch.tensor([k in self.used_heads for k in range(found.shape[1])])
            found |= elsewhere.to(found.device) & ~found.any(0)
        return found if 0 < int(found.sum()) < found.numel() else None

    def _count(self) -> tuple[int, float]:
        if self._counted is None:
            terms, total = 0, 0.0
            for g in self._received.values():
                sizes = torch.linalg.vector_norm(g, 1, dim=-1) if g.dim() > 1 else g.abs()
                terms += int((sizes != 0).sum())
                total += float(sizes.sum(dtype=torch.float32))
            self._counted = terms, total
        return self._counted

    @property
    def examples(self) -> int:
        """Length of the outputs' first dimension."""
        return self.outputs.shape[0] if self.outputs.dim() else 1

    def inputs(self) -> Any:
        """The arguments in the form `thermo_opt.fisher.Batch` takes."""
        if self.kwargs and self.args:
            return {**{str(i): a for i, a in enumerate(self.args)}, **self.kwargs}
        if self.kwargs:
            return dict(self.kwargs)
        return self.args[0] if len(self.args) == 1 else tuple(self.args)

    def again(self, rows: Tensor | None = None) -> Tensor:
        """Outputs of the model now on the same inputs, or on ``rows`` of them, with the random
        draws that the pass had; the model is left as it was."""
        args: Any = self.args
        kwargs: Any = self.kwargs
        if rows is not None:
            count = self.examples

            def chosen(t: Tensor) -> Tensor:
                return t[rows.to(t.device)] if is_batched(t, count) else t

            args, kwargs = map_tensors(args, chosen), map_tensors(kwargs, chosen)
        with torch.no_grad(), repeated(self.module, self.restore), self.precision():
            return self.predictions(self.module(*args, **kwargs)).detach()

    def precision(self) -> AbstractContextManager[Any]:
        """The mixed precision in which the pass ran."""
        return nullcontext() if self.autocast is None else torch.autocast(*self.autocast)


def current_backward() -> int:
    """Number of the backward pass that is running in this thread."""
    return int(torch._C._current_graph_task_id())


def of_one_loss(passes: Sequence[ForwardPass]) -> list[ForwardPass]:
    """Those that the last backward pass came through: of the same loss, while parts of an
    accumulated batch have losses of their own. The largest first; of equal ones the last."""
    last = max((one.backward for one in passes), default=NO_BACKWARD)
    same = [one for one in reversed(passes) if one.backward == last]
    return sorted(same, key=lambda one: -one.examples)


def autocast_now(device: torch.device) -> tuple[str, torch.dtype] | None:
    """(device type, dtype) of the mixed precision that is on, or None."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return device.type, torch.get_autocast_dtype(device.type)


def loss_left(likelihood: Likelihood, passes: Sequence[ForwardPass], scale: float) -> float:
    """The mean over predictions of ½ Σ|p − y|, the total variation between predictions and targets:
    no more than the cross-entropy of targets that are classes (nats), and close to it where it is
    small.

    Args:
        likelihood: what the outputs mean. Only "categorical" and "bernoulli" have a Fisher that
            vanishes with the loss.
        passes: all of the step's.
        scale: by how much the loss was multiplied, on purpose or by a GradScaler.

    Returns:
        Infinity where it isn't known.
    """
    total = sum(one.total for one in passes)
    if not isinstance(likelihood, Categorical | Bernoulli) or not total > 0:
        return math.inf
    return 0.5 * total / scale


def effective_terms(passes: Sequence[ForwardPass]) -> float:
    """The loss terms M that all passes together average over.

    Their number where all weigh the same. Parts of unequal size, each a mean of its own, weigh
    their terms differently: then M = (Σw)²/Σw² (Kish's effective sample size), with each part's
    mean |∂loss/∂outputs| for w.
    """
    counted = [one for one in passes if one.terms]
    if len({one.examples for one in counted}) <= 1:
        return float(sum(one.terms for one in counted))
    return sum(one.total for one in counted) ** 2 / sum(one.total**2 / one.terms for one in counted)
