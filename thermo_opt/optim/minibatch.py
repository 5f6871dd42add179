"""A metric of the step's own minibatch, made anew at each step: exact, for small work."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from thermo_opt import fisher
from thermo_opt.errors import InputError
from thermo_opt.fisher.metric import dot
from thermo_opt.likelihoods import class_axis
from thermo_opt.optim.training_metric import (
    Gradients,
    Setup,
    StepInputs,
    StepLengths,
    TrainingMetric,
    UpdateRule,
)

DAMPING = 1e-3
"""λ where none is asked for."""


class MinibatchMetric(TrainingMetric):
    """A `thermo_opt.fisher` metric of each minibatch, with momentum of its natural gradients."""

    def __init__(
        self, kind: str, setup: Setup, eta_null: float | None, options: Mapping[str, Any]
    ) -> None:
        self.kind, self.options = kind, dict(options)
        self.eta_null = eta_null or 0.0
        self.metric: fisher.Metric | None = None
        self.damping: float | None = None
        self._splits = eta_null is not None
        self._momentum: list[Tensor] | None = None
        self._order: list[int] = []
        self.rebuild(setup)
        self._direction: list[Tensor] = []
        self._null: list[Tensor] | None = None
        self._weights: list[float] = []

    def rebuild(self, setup: Setup) -> None:
        trainable = [p for p in setup.model.parameters() if p.requires_grad]
        if {id(p) for p in trainable} != {id(p) for p in setup.params if p.requires_grad}:
            raise InputError(
                f"metric={self.kind!r} covers all trainable parameters of the model, but the "
                "optimizer was given only some of them; freeze the others with "
                "requires_grad_(False), or use metric='kfac'"
            )
        if self._momentum is not None:
            known = {id(self.setup.params[i]): k for k, i in enumerate(self._order)}
            old = self._momentum
            self._momentum = [
                old[known[id(p)]] if id(p) in known else torch.zeros_like(p) for p in trainable
            ]
        order = {id(p): i for i, p in enumerate(setup.params)}
        self._order = [order[id(p)] for p in trainable]
        self.setup: Setup = setup

    @property
    def hooked(self) -> bool:
        return True

    def update(self, gradients: Gradients, seen: StepInputs, damping: float | None) -> None:
        self.metric = None
        if not all(bool(torch.isfinite(g).all()) for g in gradients if g is not None):
            return
        if seen.last is None or seen.last.module is not self.setup.model:
            raise InputError(
                f"metric={self.kind!r} needs the model's inputs, but no forward pass of the model "
                "itself was seen since the last step; call the model that was given to NGDT (not a "
                "part of it)"
            )
        if seen.last.heads.places not in ((), (0,)):
            raise InputError(
                f"metric={self.kind!r} takes the first tensor that the model returns for all "
                "of its predictions, and the loss uses others: return the predictions alone, or "
                "use metric='kfac'"
            )
        axis, usual = seen.last.axis, class_axis(seen.last.shape)
        if axis is not None and axis != usual:
            raise InputError(
                f"metric={self.kind!r} looks for the classes of outputs {tuple(seen.last.shape)} "
                f"along axis {usual}, and the loss has them along axis {axis}: let the model "
                "return them there, or use metric='kfac'"
            )
        self.damping = DAMPING if damping is None else damping
        batch = fisher.Batch(seen.last.inputs())
        model, likelihood = self.setup.model, self.setup.likelihood
        with warnings.catch_warnings():
            # Evaluation mode for Dropout and BatchNorm, which Minibatch documents.
            warnings.simplefilter("ignore", UserWarning)
            made = fisher.make(self.kind, model, batch, likelihood, self.damping, **self.options)
        self.metric = made

    def direction(self, gradients: Gradients, rule: UpdateRule) -> StepLengths:
        metric, self._null = self.metric, None
        if metric is None:
            return StepLengths.unknown()
        params = [self.setup.params[i] for i in self._order]
        found = [gradients[i] for i in self._order]
        g = [torch.zeros_like(p) if t is None else t for t, p in zip(found, params, strict=True)]
        if self._splits:
            g_range, self._null = metric.split(g)
            u = metric.solve(g_range)
        else:
            u = metric.solve(g)
        last = self._direction
        # Parameters that were frozen or freed since have another list.
        kept = [t.shape for t in last] == [t.shape for t in g]
        delta, along = dot(g, u), dot(g, last) if kept else 0.0
        if not math.isfinite(delta):
            return StepLengths.unknown()
        if rule.momentum:
            old = self._momentum or [torch.zeros_like(t) for t in u]
            b = [rule.momentum * m + t for m, t in zip(old, u, strict=True)]
            self._momentum = [m if t is None else n for m, t, n in zip(old, found, b, strict=True)]
            u = [rule.share * t for t in b]
        self._weights = [
            0.0 if t is None else rule.weights[i] for t, i in zip(found, self._order, strict=True)
        ]
        decay = [rule.decay[i] for i in self._order]
        self._direction = [
            w * (t + rate * p.detach() if rate else t)
            for t, p, rate, w in zip(u, params, decay, self._weights, strict=True)
        ]
        a = metric.quadratic(self._direction)
        return StepLengths([a], [delta], [dot(g, self._direction)], [along])

    def apply(self, sizes: Sequence[float], null_size: float) -> None:
        for k, i in enumerate(self._order):
            p = self.setup.params[i]
            p.add_(self._direction[k].to(p.dtype), alpha=-sizes[0])
            if self._null is not None and null_size:
                p.add_(self._null[k].to(p.dtype), alpha=-null_size * self._weights[k])

    def diagnostics(self) -> dict[str, float | None]:
        known = self.metric is not None and self.kind != "exact"
        rank = self.metric.diagnostics().get("rank") if known and self.metric else None
        return {"rank": rank, "damping": self.damping}

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self._momentum, "direction": self._direction}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        def own(saved: Sequence[Tensor]) -> list[Tensor]:
            pairs = [(t, self.setup.params[i]) for t, i in zip(saved, self._order, strict=True)]
            if any(t.shape != p.shape for t, p in pairs):
                raise InputError("the saved optimizer state is of another model: other shapes")
            return [t.to(device=p.device, dtype=p.dtype).clone() for t, p in pairs]

        momentum, direction = state["momentum"], state.get("direction")
        self._momentum = None if momentum is None else own(momentum)
        self._direction = own(direction) if direction else []
