"""What NGDT asks of a metric in training: a direction from gradients, and its length.

Vectors are lists aligned with `Setup.params`, the parameters that the optimizer holds. Two kinds:
`MinibatchMetric`, any `thermo_opt.fisher` metric made anew on each minibatch (exact, for small
work), and `KroneckerMetric`, running Kronecker factors.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.optim.forward_pass import ForwardPass
from thermo_opt.optim.processes import Processes

Gradients = Sequence[Tensor | None]
"""One gradient per parameter of the optimizer; None for one that took no part in the loss."""


@dataclass(frozen=True)
class Setup:
    """What a metric is attached to.

    Attributes:
        model: the module whose passes are seen.
        params: the parameters that the optimizer holds.
        groups: number of the parameter group of each of ``params``.
        pools: number of the pool of each: what shares one part of the budget.
        likelihood: what the model's outputs say of the targets.
        processes: those that train together.
        compiled: whether (a part of) the model is compiled.
    """

    model: nn.Module
    params: list[nn.Parameter]
    groups: Sequence[int]
    pools: Sequence[int]
    likelihood: Likelihood
    processes: Processes
    compiled: bool


@dataclass(frozen=True)
class StepInputs:
    """What one step's passes showed.

    Attributes:
        last: the largest of the forward passes (of equal ones the last); None if none was seen.
        terms: the loss terms that all passes together average over; 0 where the metric
            has no use for them.
        scale: by how much a GradScaler has multiplied the loss.
        left: `loss_left` (nats), the mean over processes.
        measured: the passes whose predictions the step's KL is of.
    """

    last: ForwardPass | None
    terms: float
    scale: float
    left: float
    measured: Sequence[ForwardPass] = ()


@dataclass(frozen=True)
class UpdateRule:
    """How one step's update v is put together from natural gradients.

    Attributes:
        momentum: μ in b ← μ b + F_λ⁻¹g.
        decay: weight decay of each parameter: v = (1−μ) b + decay·θ, so that v is an average of
            natural gradients, whose length never exceeds that of the longest.
        weights: relative learning rate of each parameter (the largest is 1), by which its part of
            v is multiplied.
    """

    momentum: float
    decay: Sequence[float]
    weights: Sequence[float]

    @property
    def share(self) -> float:
        """1 − μ, the weight of b in v."""
        return 1.0 - self.momentum


@dataclass
class StepLengths:
    """Of a step's update v: a = vᵀF_λv, Δ = gᵀF_λ⁻¹g, the decrease gᵀv, and the product of g with
    the update before, one entry per pool."""

    a: list[float]
    delta: list[float]
    decrease: list[float]
    along: list[float]

    @classmethod
    def unknown(cls) -> StepLengths:
        """Of a step whose gradient or update is not finite."""
        return cls([math.nan], [math.nan], [math.nan], [math.nan])

    @property
    def finite(self) -> bool:
        """Whether every number is finite."""
        return all(math.isfinite(x) for x in (*self.a, *self.delta, *self.decrease))


class TrainingMetric(ABC):
    """A metric in training: `arm` before the passes of a step, then `update`, `direction`, `apply`.

    Attributes:
        kind: the metric's name, which its saved state carries.
        eta_null: size of the step in the null space; 0 where none is taken.
        prior: factor on what damping's prior is worth (`optim.inflation`).
        reads_gradients: whether it reads gradients inside the user's own backward pass, which a
            GradScaler scales.
    """

    kind: str
    eta_null: float = 0.0
    prior: float = 1.0
    reads_gradients: bool = False

    @property
    @abstractmethod
    def hooked(self) -> bool:
        """Whether the coming step needs to see the model's passes."""

    @property
    def unruled(self) -> set[int]:
        """Places of the parameters that no layer rule covers."""
        return set()

    def arm(self, step: int, urgent: bool = False) -> None:
        """Prepare for the passes of this step (0, 1, 2, …); ``urgent``: refresh everything."""
        return

    @abstractmethod
    def rebuild(self, setup: Setup) -> None:
        """Cover the parameters that train now; what is known of the others is kept."""

    @abstractmethod
    def update(self, gradients: Gradients, seen: StepInputs, damping: float | None) -> None:
        """Bring the metric up to date with what this step's passes showed.

        Args:
            gradients: of the mean loss, one per parameter; None for one that took no part.
            seen: the passes.
            damping: λ, or None for the metric's own choice.
        """

    @abstractmethod
    def direction(self, gradients: Gradients, rule: UpdateRule) -> StepLengths:
        """Compute the update v, which stays inside, and its lengths. A parameter without a gradient
        is not moved, neither by momentum nor by weight decay.

        If any gradient is not finite, nothing is changed; the lengths then aren't finite either.
        """

    @abstractmethod
    def apply(self, sizes: Sequence[float], null_size: float) -> None:
        """θ ← θ − size·v (one size per pool, times the rule's weights) − null_size·P₀g."""

    def retrace(self, sizes: Sequence[float], rule: UpdateRule) -> None:
        """θ ← θ + size·v for the update v of the step before, whose ``sizes`` are given: back along
        it. Before this step's `direction`; the same after a state was loaded. Of metrics with
        momentum in their state alone."""
        raise NotImplementedError

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
