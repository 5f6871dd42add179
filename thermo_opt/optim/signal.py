"""How long a step pays: signal told from noise by the next minibatch (theory §7, "signal").

A step δ is computed from one minibatch; the gradient g' of the next one, taken where the step
ended, knows nothing of its noise. So the mean of −g'ᵀδ is what the loss itself still falls along δ
at its end: positive where the step stopped short of the minimum along its direction, negative where
it went beyond. With the curvature κF_λ of the calibrated metric

    r = −g'ᵀδ / (δᵀκF_λδ)        E r = η*/η − 1

for the step length η* that lowers the expected loss most, and noise of standard deviation about
1/√(2QN) for N predictions. The scale s ≤ 1, by which all steps are multiplied, follows r until E r
= MARGIN:

    log s ← log s + GAIN · clip(r − MARGIN, −1, 1)

In a quadratic loss with noisy gradients this is the Kalman gain, signal/(signal + noise). Where
minibatches are drawn without replacement it also ends training on what only the training set says:
then the gradients of disjoint minibatches are anti-correlated, and steps shrink. (Exact line search
in expectation; cf. Almeida et al. 1998 and Baydin et al. 2018 on adapting step sizes by the product
of successive gradients, Mahsereci & Hennig 2015 on noisy line search, and Mahsereci et al. 2017 on
early stopping without a validation set.) Cost: one inner product per block, which momentum needs
anyway.

Nor does a step pay that spends more than the loss has left (`forward_pass.loss_left`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

GAIN = 0.15
"""Share of r that the logarithm of the scale takes per step: a memory of about 1/GAIN steps."""

WARMUP = 30
"""Steps before the scale moves: until then κ, and so the cost that r is measured in, is only being
found out (`Calibration.warmup`)."""

MARGIN = -0.3
"""Steps end beyond the minimum along them, at 1.4 times its distance, where they still buy 0.8 of
what the best single step does. That one is too short for a whole training: what bounces back and
forth in a few stiff directions shortens all others (Wu et al. 2018, short-horizon bias). A
character transformer on tiny Shakespeare ends at 1.98 with −0.1, at 1.95 with −0.2, at 1.92 with
−0.3 (mean of two seeds, 800 steps); 25 small tasks at a constant rate end as low with −0.3 as with
−0.1 in the geometric mean, and 1.2 times as high with −0.6. Noise alone gives −1/2."""

LEAST = 0.01
"""The scale falls no lower, so that training wakes up within 1/GAIN · log(1/LEAST) steps when new
signal comes."""


@dataclass
class Signal:
    """The scale s of steps, and what is known of the last one.

    Attributes:
        scale: s, in [LEAST, 1].
        left: what the loss could still fall by when that was last seen (nats); None before.
        ratio: r of the last step; None before it is known.
        sizes: of the last step, per pool. spent: its predicted dissipation (nats).
    """

    scale: float = 1.0
    left: float | None = None
    ratio: float | None = None
    sizes: tuple[float, ...] = ()
    spent: float = 0.0

    def observe(self, step: int, along: list[float], left: float = math.inf) -> None:
        """Take g'ᵀv of the last update v with the gradient g' of this step (0, 1, 2, …), one entry
        per pool, and what the loss could still fall by (infinity: not seen)."""
        self.ratio = None
        self.left = left if math.isfinite(left) else self.left
        if len(self.sizes) != len(along) or not self.spent > 0:
            return
        remaining = sum(size * slope for size, slope in zip(self.sizes, along, strict=True))
        self.ratio = remaining / (2 * self.spent)
        if step >= WARMUP and math.isfinite(self.ratio):
            change = min(max(self.ratio - MARGIN, -1.0), 1.0)
            self.scale = min(max(self.scale * math.exp(GAIN * change), LEAST), 1.0)

    def took(self, sizes: list[float], spent: float) -> None:
        """Remember the step that was taken."""
        self.sizes, self.spent = tuple(sizes), spent

    def state_dict(self) -> dict[str, Any]:
        """The scale and the last step."""
        sizes = list(self.sizes)
        return {"scale": self.scale, "left": self.left, "sizes": sizes, "spent": self.spent}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.scale, self.spent = float(state["scale"]), float(state["spent"])
        left = state.get("left")
        self.left = None if left is None else float(left)
        self.sizes = tuple(float(size) for size in state["sizes"])
