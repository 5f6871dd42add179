"""When curvature is refreshed, and how much damping a minibatch calls for.

**Refreshes** are frequent while curvature moves fast, rare later, and not all at once.

**Damping** follows the noise of the gradients that the inverse will multiply (theory §7). A
minibatch gradient of N predictions is Fθ* + ε with noise ε of covariance F/N. If the way θ* still
to go has prior precision τ in each parameter, the best linear estimate of it is (F + (τ/N) I)⁻¹g:
Tikhonov damping with λ = τ/N. Without such knowledge, the prior that knows as much as a few
predictions do has τ = `PRIOR`·tr F/d, d parameters (cf. the unit-information prior, Kass &
Wasserman, J. Am. Stat. Assoc. 90, 1995).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LEAST = 1e-4
"""λ is no less: factors of a few hundred rows say nothing about smaller eigenvalues."""

PRIOR = 10.0
"""Predictions that the prior is worth where steps cost 1.2 times as many nats on their own
minibatch as on others. Chosen on the studies' small networks, where 5 did nearly as well."""


def default_damping(trace: float, parameters: int, predictions: float, worth: float = 1.0) -> float:
    """``max(LEAST, PRIOR · worth · (tr F / d) / N)`` for the Fisher F of one prediction, d
    parameters and N predictions per minibatch; ``worth``: of the prior, over its usual one
    (`optim.inflation`)."""
    found = PRIOR * worth * trace / (parameters * predictions)
    return max(found, LEAST) if math.isfinite(found) else LEAST


@dataclass(frozen=True)
class RefreshSchedule:
    """Each block is refreshed every ``interval(step)`` steps, a power of two that grows with the
    step up to ``longest``.

    Curvature changes by a constant fraction in a constant fraction of the steps taken so far, so
    the interval is at most ``step / patience``. With ``staggered`` the blocks' turns are spread
    over the interval, so that no step pays for all. A function of the step alone: a resumed run
    needs no state.
    """

    longest: int = 32
    patience: int = 12
    staggered: bool = True

    def interval(self, step: int) -> int:
        """Steps between refreshes of one block at this step."""
        interval = 1
        while interval * 2 <= self.longest and interval * 2 * self.patience <= step:
            interval *= 2
        return interval

    def due(self, step: int, block: int, blocks: int) -> bool:
        """Whether block number ``block`` of ``blocks`` has its turn at this step."""
        interval = self.interval(step)
        phase = block * interval // blocks if self.staggered else 0
        return (step + phase) % interval == 0
