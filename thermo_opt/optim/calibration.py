"""Calibration: budgets in realised nats, and the guard that keeps them there (theory §7,
"calibrated budget").

An approximate Fisher F̃ misjudges a step's KL by a factor κ that drifts, and that is larger on a
minibatch whose gradient is larger: the KL is measured on the very examples that pull. By
Cauchy–Schwarz on that minibatch, with its own Fisher F_B,

    vᵀF_Bv ≥ (gᵀv)²/χ²,     χ² = mean(1/p(y) − 1)

so that for v = F̃⁻¹g the ratio vᵀF_Bv / vᵀF̃v grows up to in proportion to Δ = gᵀF̃⁻¹g. The
calibrated metric of a step is therefore κ (Δ/Δ̄)^POWER F̃, Δ̄ a running geometric mean, and κ
follows the ratio of realised to predicted KL, measured now and then on the step's own minibatch.
Where the update is longer than its gradient, because momentum carries an earlier surprise, its own
length a stands for Δ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from thermo_opt import arguments
from thermo_opt.errors import InputError

POWER = 0.75
"""Between 0 (Δ says nothing of the KL) and 1 (the bound is met). Ratios of realised to predicted KL
over ten small networks spread least between 0.5 and 1."""

MEMORY = 0.9
"""Of the running mean of log Δ."""

SURGE = (0.3, 1e4)
"""Bounds of (Δ/Δ̄)^POWER. A minibatch without a gradient of its own still feels the momentum."""

RISE = 11.0
"""Largest ratio of realised to predicted KL that a measurement in the warm-up reports to κ, which
starts far too low; the very first may report `FIRST`."""

FIRST = 1e4

BAND = (0.5, 2.5)
"""Later measurements report ratios between these. κ follows the mean ratio, not the mean of its
logarithm, and the band is wider above: few predictions carry most of a step's KL."""

FIRST_STEPS = 8
"""Each of as many first steps is measured, and no two measurements are further apart than this part
of the steps taken before them."""

EXPECTED = 1.6
"""A ratio within this factor of 1 was foreseen: the next measurement may wait twice as long, where
the last ones were steady."""

IDLE = 0.1
"""A step that spends less than this part of what it might need not be foreseen. It does lower κ:
where η_max binds, it is a κ too high that makes steps idle, and they would for ever."""

STEADY = 2.0
"""The last measurements were steady if their log ratios are below log of this in the root mean
square."""

RECENT = 0.7
"""Memory of the mean square of log(realised/predicted)."""

OUTLIER = 100.0
"""One measurement enters that mean with no larger ratio."""

SELDOM = 32
"""From step ``SELDOM·every`` on, measurements may be ``step / SELDOM`` steps apart."""

EXCESS = 1.25
"""A measured step that spends more than this many times its budget is shortened to it."""

JUMP = 2.0
"""A step whose Δ is this many times the running mean is measured out of turn, and from the end of
the warm-up on the whole minibatch: one example that pulls may not be in a sample."""

FALL = 2.5
"""So is a step that is priced at less than this part of what the last measured one was: what made
that one dear may not be over."""

WILD = 2.0
"""While the last measurements miss by more than this (mean square of the log ratio: four times), a
sample of the examples may miss those that carry the KL, so that all are read."""

BREACH = 3.0
"""A realised KL this many times the predicted one says that the curvature is out of date."""

RESOLUTION = 1e-9
"""Nats below which a predicted KL teaches nothing in any precision."""

ABOVE_FLOOR = 10.0
"""A KL below this many of what rounding alone would feign can't be told from it."""


@dataclass
class Calibration:
    """The scale κ of the metric, when to measure, and when to distrust.

    Every one of the first steps is measured. Later the wait doubles, up to ``every`` steps, after
    each measurement that was foreseen, and is cut to a quarter after one that was not, or where the
    last ones were not steady; a step whose Δ jumps is measured at once. Before step ``warmup`` κ
    may rise fast. κ moves by a share ``gain`` of what the measured ratio asks for, so that noise of
    one minibatch is averaged over a few measurements.

    Args:
        every: most steps between measurements, more only in long trainings; 1: every step is
            measured, always.
        predictions: about how many predictions a measurement reads, in 4 examples at least (None:
            the whole minibatch). They are drawn anew every time, in proportion to how much their KL
            is likely to change. The whole minibatch is read where a model's outputs for some
            examples depend on the others, where nearly all predictions are certain, where the drawn
            ones say that the step overspends, where Δ jumps, and while measurements come out
            wildly.
        warmup: steps in which κ may rise fast.
        gain: share of the measured correction that κ takes.

    Attributes:
        kappa: κ. level: Δ̄, the running mean of Δ in the uncalibrated metric.
        last: the last step that was measured. wait: steps from there to the next measurement.
        breached: whether the last measurement says that the curvature is out of date.
        unsteady: running mean square of log(realised/predicted).
        price: κ (Δ/Δ̄)^POWER of the last measured step; 0 before it.
    """

    every: int = 10
    predictions: int | None = 64
    warmup: int = 30
    gain: float = 0.7
    kappa: float = field(default=1.0, init=False)
    level: float = field(default=0.0, init=False)
    last: int = field(default=-1, init=False)
    wait: int = field(default=1, init=False)
    breached: bool = field(default=False, init=False)
    unsteady: float = field(default=0.0, init=False)
    price: float = field(default=0.0, init=False)
    _jumped: bool = field(default=False, init=False, repr=False)
    _price: float = field(default=0.0, init=False, repr=False)
    _overrated: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        arguments.whole("every", self.every)
        if self.predictions is not None:
            arguments.whole("predictions", self.predictions)

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a measurement at this step (0, 1, 2, …)."""
        return step - self.last >= self.wait

    def scale(self, delta: float) -> float:
        """κ (Δ/Δ̄)^POWER for a step of this Δ, or a where that is larger (in the uncalibrated
        metric); the running mean moves towards it."""
        self._price = self._scaled(delta)
        return self._price

    def _scaled(self, delta: float) -> float:
        if not delta > 0:
            return self.kappa
        if not self.level > 0:
            self.level = delta
        self._jumped = delta > JUMP * self.level
        self.level = math.exp(MEMORY * math.log(self.level) + (1 - MEMORY) * math.log(delta))
        low, high = SURGE
        surge = (delta / self.level) ** POWER
        self._overrated = surge < low
        return self.kappa * min(max(surge, low), high)

    def wanted(self, step: int) -> bool:
        """Whether to measure this step: its turn has come, or its Δ stands out, or it is cheap."""
        self.breached = False
        return self._jumped or self.due(step) or FALL * self._price < self.price

    def sample(self, step: int, shocked: bool = False) -> int | None:
        """About how many predictions to read at this step; None: all of them, as where the step
        before is known to have gone wrong (``shocked``)."""
        wild = step >= self.warmup and (self.unsteady > WILD or self._jumped)
        return None if wild or shocked else self.predictions

    def observe(
        self,
        step: int,
        predicted: float,
        realised: float,
        floor: float = 0.0,
        certain: bool = False,
        limit: float = 0.0,
        held: bool = False,
    ) -> None:
        """Take one step's predicted and realised KL (nats).

        Args:
            step: its number.
            predicted: its KL in the metric.
            realised: the KL measured.
            floor: what rounding alone would realise; a step that can't be told from it teaches
                nothing.
            certain: whether nearly all predictions were, and nothing else bounds the step. The
                metric of a certain prediction says nothing of it: the next one is measured, too.
            limit: what the step might have spent. A small part of it need not be foreseen.
            held: whether what the loss has left held the step back. Then κ does not fall: steps
                would grow until one spends all that is left, which undoes what was learnt.
        """
        self._learn(step, predicted, realised, floor, IDLE * limit, held)
        self.price = self._price
        if certain or 0 < EXCESS * limit < realised:
            self.wait = 1

    def _learn(
        self,
        step: int,
        predicted: float,
        realised: float,
        floor: float,
        idle: float,
        held: bool,
    ) -> None:
        ratio = realised / predicted if predicted > 0 else math.inf
        drowned = max(predicted, realised) <= ABOVE_FLOOR * floor
        if drowned or not predicted > RESOLUTION or (self._overrated and ratio < 1):
            self.last = step
            return
        idles = max(predicted, realised) < idle
        low, high = BAND
        if self.last < 0:
            self.kappa *= min(max(ratio, low), FIRST)
        elif step < self.warmup:
            self.kappa *= min(max(ratio, low), RISE) ** self.gain
        elif ratio > 1 or not held:
            self.kappa *= 1 + self.gain * (min(max(ratio, low), high) - 1)
        self.last = step
        miss = 0.0 if idles else math.log(min(max(ratio, 1 / OUTLIER), OUTLIER))
        self.unsteady = RECENT * self.unsteady + (1 - RECENT) * miss * miss
        steady = self.unsteady < math.log(STEADY) ** 2
        foreseen = steady and abs(miss) < math.log(EXPECTED)
        if step >= FIRST_STEPS:
            most = min(max(self.every, step // SELDOM), max(step // FIRST_STEPS, 1))
            most = most if self.every > 1 else 1
            self.wait = min(2 * self.wait, most) if foreseen else max(self.wait // 4, 1)
        self.breached = ratio > BREACH

    def state_dict(self) -> dict[str, Any]:
        """κ, the running mean of Δ and what the last measurement said."""
        return {
            "kappa": self.kappa,
            "level": self.level,
            "last": self.last,
            "wait": self.wait,
            "breached": self.breached,
            "unsteady": self.unsteady,
            "price": self.price,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InputError: when κ isn't positive.
        """
        if not float(state["kappa"]) > 0:
            raise InputError(f"the saved κ is {state['kappa']!r:.40}, not above 0")
        self.kappa, self.level = float(state["kappa"]), float(state.get("level", 0.0))
        self.last, self.wait = int(state["last"]), int(state.get("wait", 1))
        self.breached = bool(state["breached"])
        self.unsteady = float(state.get("unsteady", 0.0))
        self.price = float(state.get("price", 0.0))
