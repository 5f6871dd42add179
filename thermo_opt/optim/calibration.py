"""Calibration: budgets in realised nats, and the guard that keeps them there (theory §7,
"calibrated budget").

An approximate Fisher F̃ misjudges a step's KL by a factor that drifts slowly. The calibrated metric
is κF̃, and κ follows the ratio of realised to predicted KL, measured now and then on the step's own
minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from thermo_opt import arguments

PATIENCE = 8
"""At first, every ``step / PATIENCE`` steps are measured once, at most every ``every``."""

SELDOM = 32
"""From step ``SELDOM·every`` on, every ``step / SELDOM`` steps are measured once."""

RISE = 11.0
"""Largest ratio of realised to predicted KL that a measurement in the warm-up reports to κ, which
starts far too low."""

BAND = (1 / 1.5, 1.8)
"""Later measurements report ratios between these. Few predictions carry most of a step's KL, so
that a mean over some of them is mostly too low and sometimes far too high: κ follows the mean
ratio, not the mean of its logarithm, and the band is wider above."""

EXCESS = 1.25
"""A measured step that spends more than this many times its budget is shortened to it."""

JUMP = 4.0
"""A Δ this many times its running mean says that the gradient has left what the curvature was
estimated on."""

BREACH = 3.0
"""A realised KL this many times the predicted one says that the curvature is out of date."""


@dataclass
class Calibration:
    """The scale κ of the metric, when to measure, and when to distrust.

    Measured at every step at first, then at intervals that grow with the step up to ``every`` (from
    step SELDOM·every on, slowly beyond), and whenever Δ jumps. Before step ``warmup`` κ may rise
    fast. κ moves by a share ``gain`` of what the measured ratio asks for, so that noise of one
    minibatch is averaged over a few measurements.

    Args:
        every: steps between measurements.
        predictions: about how many predictions a measurement reads, in 4 examples at least (None:
            the whole minibatch). A model with Dropout or BatchNorm in training mode is measured on
            the whole minibatch.
        warmup: steps in which κ may rise fast.
        gain: share of the measured correction that κ takes.

    Attributes:
        kappa: κ. usual: running mean of Δ in the uncalibrated metric.
        last: the last step that corrected κ. breached: whether the last measurement says that the
            curvature is out of date.
    """

    every: int = 10
    predictions: int | None = 32
    warmup: int = 30
    gain: float = 0.7
    kappa: float = field(default=1.0, init=False)
    usual: float = field(default=0.0, init=False)
    last: int = field(default=-1, init=False)
    breached: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        arguments.whole("every", self.every)
        if self.predictions is not None:
            arguments.whole("predictions", self.predictions)

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a measurement at this step (0, 1, 2, …)."""
        return step - self.last >= min(max(step // PATIENCE, 1), max(self.every, step // SELDOM))

    def wanted(self, step: int, delta: float) -> bool:
        """Whether to measure this step: its turn has come, or its Δ (in the uncalibrated metric)
        stands out."""
        self.breached = False
        jumped = self.usual > 0 and delta > JUMP * self.usual
        self.usual = (
            delta if self.usual == 0 else 0.9 * self.usual + 0.1 * min(delta, JUMP * self.usual)
        )
        return jumped or self.due(step)

    def observe(self, step: int, predicted: float, realised: float) -> None:
        """Take one step's predicted and realised KL (nats). Only steps measured in turn correct κ:
        those measured for a jump of Δ are not typical, and say whether the curvature is out of
        date."""
        ratio = realised / predicted
        if self.due(step):
            low, high = BAND
            if step < self.warmup:
                self.kappa *= min(max(ratio, low), RISE) ** self.gain
            else:
                self.kappa *= 1 + self.gain * (min(max(ratio, low), high) - 1)
            self.last = step
        self.breached = ratio > BREACH

    def state_dict(self) -> dict[str, Any]:
        """κ, the running mean of Δ and what the last measurement said."""
        return {
            "kappa": self.kappa,
            "usual": self.usual,
            "last": self.last,
            "breached": self.breached,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.kappa, self.usual = float(state["kappa"]), float(state["usual"])
        self.last, self.breached = int(state["last"]), bool(state["breached"])
