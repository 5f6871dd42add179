"""What NGDT asks of a metric in training: a direction from gradients, its length in the metric, and
its null-space part.

Vectors are lists aligned with ``params``, the trainable parameters that the optimizer holds. Two
kinds: `BatchCurvature`, any `thermo_opt.fisher` metric made anew on each minibatch (exact, for
small work), and `KroneckerCurvature`, running Kronecker factors.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt import fisher
from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.metric import dot
from thermo_opt.optim.observer import Forward

BATCH_DAMPING = 1e-3
"""λ of a metric of the step's own minibatch, where none is asked for."""


@dataclass(frozen=True)
class Passes:
    """A step's forward passes: the last of them, the loss terms that all together average over (0
    if they weren't counted), and the scale by which a GradScaler has multiplied the loss."""

    last: Forward | None
    terms: float
    scale: float


@dataclass(frozen=True)
class Recipe:
    """How one step's update is put together.

    ``momentum`` μ: b ← μ b + F_λ⁻¹g. ``decay``: weight decay of each parameter, the update is v = b
    + decay·θ. ``weights``: relative learning rate of each parameter (the largest is 1), by which
    its part of v is multiplied.
    """

    momentum: float
    decay: Sequence[float]
    weights: Sequence[float]
    null: bool


@dataclass
class Lengths:
    """Squared length a = vᵀF_λv, Δ = gᵀF_λ⁻¹g and decrease gᵀv of a step's direction, one entry a
    pool of parameters."""

    a: list[float]
    delta: list[float]
    decrease: list[float]

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return all(math.isfinite(x) for x in (*self.a, *self.delta, *self.decrease))


class Curvature(ABC):
    """A metric in training. `direction` leaves the update's direction inside; `apply` moves the
    parameters along it."""

    params: list[nn.Parameter]
    needs_forward: bool = False
    """Whether every step needs the model's inputs."""

    @property
    def hooked(self) -> bool:
        """Whether the coming step needs to see the model's passes."""
        return self.needs_forward

    def arm(self, step: int, urgent: bool = False) -> None:
        """Prepare for the forward and backward passes of this step (0, 1, 2, …); ``urgent``:
        refresh everything in it."""
        return

    @abstractmethod
    def update(self, gradients: Sequence[Tensor], passes: Passes, damping: float | None) -> None:
        """Bring the metric up to date with what this step's passes showed. ``damping``: λ, or None
        for the metric's own choice."""

    @abstractmethod
    def direction(self, gradients: Sequence[Tensor], recipe: Recipe) -> Lengths:
        """Compute the update's direction v and its lengths. State changes only if all of it is
        finite."""

    @abstractmethod
    def apply(self, sizes: Sequence[float], null_size: float) -> None:
        """θ ← θ − size·v (one size a pool, times the recipe's weights) − null_size·P₀g."""

    def discard(self) -> None:
        """Forget what was captured for a step that is skipped."""
        return

    def close(self) -> None:
        """Remove every hook from the model."""
        return

    def diagnostics(self) -> dict[str, float | None]:
        """Plain numbers for ``NGDT.last_step``."""
        return {}

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""


class BatchCurvature(Curvature):
    """A `thermo_opt.fisher` metric of the step's own minibatch (kinds "exact", "dense", "low-rank",
    "diagonal"), made anew each step."""

    needs_forward = True

    def __init__(
        self,
        kind: str,
        model: nn.Module,
        params: list[nn.Parameter],
        likelihood: Likelihood,
        options: dict[str, Any],
    ) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        if {id(p) for p in trainable} != {id(p) for p in params}:
            raise InputError(
                f"metric={kind!r} covers all trainable parameters of the model, but the optimizer "
                "was given only some of them; "
                "freeze the others with requires_grad_(False), or use metric='kfac'"
            )
        order = {id(p): i for i, p in enumerate(params)}
        self._order = [order[id(p)] for p in trainable]
        self.kind, self.model, self.params = kind, model, params
        self.likelihood, self.options = likelihood, options
        self.metric: fisher.Metric | None = None
        self.damping: float | None = None
        self._momentum: list[Tensor] | None = None
        self._direction: list[Tensor] = []
        self._null: list[Tensor] | None = None
        self._weights: list[float] = []

    def update(self, gradients: Sequence[Tensor], passes: Passes, damping: float | None) -> None:
        if passes.last is None:
            raise InputError(
                f"metric={self.kind!r} needs the model's inputs, but no forward pass of the model "
                "itself was seen since the last "
                "step; call the model that was given to NGDT (not a part of it)"
            )
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", UserWarning
            )  # evaluation mode for Dropout and BatchNorm: documented in NGDT
            batch = fisher.Batch(passes.last.inputs())
            self.damping = BATCH_DAMPING if damping is None else damping
            self.metric = fisher.make(
                self.kind, self.model, batch, self.likelihood, self.damping, **self.options
            )

    def direction(self, gradients: Sequence[Tensor], recipe: Recipe) -> Lengths:
        metric = self.metric
        assert metric is not None
        g = [gradients[i] for i in self._order]
        decay = [recipe.decay[i] for i in self._order]
        self._null = None
        if not all(bool(torch.isfinite(t).all()) for t in g):
            return Lengths([math.nan], [math.nan], [math.nan])
        if recipe.null:
            g_range, self._null = metric.split(g)
            u = metric.solve(g_range)
        else:
            u = metric.solve(g)
        delta = dot(g, u)
        if not math.isfinite(delta):
            return Lengths([math.nan], [delta], [math.nan])
        if recipe.momentum:
            old = self._momentum or [torch.zeros_like(t) for t in u]
            self._momentum = u = [recipe.momentum * m + t for m, t in zip(old, u, strict=True)]
        weights = self._weights = [recipe.weights[i] for i in self._order]
        params = [self.params[i] for i in self._order]
        self._direction = [
            w * (t + rate * p.detach() if rate else t)
            for t, p, rate, w in zip(u, params, decay, weights, strict=True)
        ]
        return Lengths([metric.quadratic(self._direction)], [delta], [dot(g, self._direction)])

    def apply(self, sizes: Sequence[float], null_size: float) -> None:
        for k, i in enumerate(self._order):
            self.params[i].add_(self._direction[k].to(self.params[i].dtype), alpha=-sizes[0])
            if self._null is not None and null_size:
                self.params[i].add_(
                    self._null[k].to(self.params[i].dtype), alpha=-null_size * self._weights[k]
                )

    def diagnostics(self) -> dict[str, float | None]:
        rank = (
            None
            if self.metric is None or self.kind == "exact"
            else self.metric.diagnostics().get("rank")
        )
        return {"rank": rank, "damping": self.damping}

    def state_dict(self) -> dict[str, Any]:
        return {"momentum": self._momentum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        momentum = state["momentum"]
        self._momentum = None
        if momentum is not None:
            self._momentum = [
                t.to(device=self.params[i].device).clone()
                for t, i in zip(momentum, self._order, strict=True)
            ]
