"""Calibration: budgets in realised nats (THEORY §7, "calibrated budget").

An approximate Fisher F̃ misjudges a step's KL by a factor that drifts slowly. The calibrated metric is κF̃, and κ follows the
ratio of realised to predicted KL, measured now and then on the step's own minibatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RISE, FALL = 11.0, 0.6
"""Largest and smallest ratio of realised to predicted KL that one measurement may report to κ: underestimated cost is dangerous
and believed at once, overestimated cost is only slow and believed by and by."""


@dataclass
class Calibration:
    """The scale κ of the metric, and when to measure.

    Measured on each of the first ``warmup`` steps and on every ``every``-th later. κ moves by the measured ratio to the power
    ``gain``, so that noise of one minibatch is averaged over a few measurements.
    """

    every: int = 10
    warmup: int = 30
    gain: float = 0.5
    kappa: float = 1.0

    def due(self, step: int) -> bool:
        """Whether the realised KL of this step (0, 1, 2, …) is to be measured."""
        return step < self.warmup or step % self.every == 0

    def observe(self, predicted: float, realised: float) -> None:
        """Correct κ from one step's predicted and realised KL (nats)."""
        if predicted > 0:
            ratio = min(max(realised / predicted, FALL), RISE)
            self.kappa *= ratio**self.gain

    def state_dict(self) -> dict[str, Any]:
        return {"kappa": self.kappa}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kappa = float(state["kappa"])
