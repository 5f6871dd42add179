"""How much of a step fits its own minibatch alone (theory §7, "inflation").

A step follows the noise of its minibatch, too, so that it changes the predictions there more than
elsewhere. For a measured step δ, with the next minibatch B' for elsewhere,

    I = KL of the predictions on its own minibatch to those after δ
        / KL of the predictions on B' to those before δ

near 1 where a minibatch holds far more predictions than directions are fitted, several times that
where it does not, or where its examples share statistics (batch normalization). I is followed by
its mean logarithm, and says two things:

- what damping's prior is worth: (I − 1)/`USUAL` times the usual number of predictions
  (`kronecker.refresh`), since shrinking is called for as far as steps fit noise;
- the default budget: where steps spend most of their nats on their own minibatch from the start,
  they have more of them, so that a quarter of the usual budget arrives elsewhere. An I that only
  grows as examples are learnt by heart asks for no larger steps, so that the first steps decide.

Cost: at the step after a measured one, the weights are moved back along the last step and put back,
and a sample of the new minibatch is run through the model, as for a measurement. (Cf. the gap
between training and fresh examples as a count of effective parameters: Moody 1991, Murata,
Yoshizawa & Amari 1994.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from thermo_opt.errors import InputError

MEMORY = 0.9
"""Of the running mean of log I; at first it is the plain mean."""

USUAL = 0.2
"""I − 1 where the prior is worth its usual number of predictions."""

WORTH = (0.3, 30.0)
"""Bounds of the factor on the prior. Of 25 small tasks three that overfit (a table with 3,000 rows,
a graph with 200 labels, 369 tumours) end at 0.82, 0.94 and 0.79 of their losses with the prior as
it was; in the geometric mean all end as low."""

SETTLED = 30
"""Steps after which the budget is decided: until then κ is only being found out."""

SHARE = 0.25
"""Of the usual budget that should arrive on other examples."""

MOST = 10.0
"""The default budget grows by no more."""

FOLLOWED = 3
"""Measurements before the prior follows."""

DECIDED = 8
"""Measurements before the budget is decided."""

OUTLIER = (0.1, 100.0)
"""One measurement reports an I between these."""


@dataclass
class Inflation:
    """The running I, and the last step as far as it is still to be measured elsewhere.

    Attributes:
        log: mean log I. count: measurements so far. settled: I after `SETTLED` steps; 0 before.
        own: nats of the last step on its own minibatch; 0: it was not measured.
        sizes: of that step, per pool.
    """

    log: float = 0.0
    count: int = 0
    settled: float = 0.0
    own: float = 0.0
    sizes: tuple[float, ...] = ()

    def took(self, sizes: Sequence[float], own: float | None) -> None:
        """Remember the step that was taken and what it was measured to cost (None: not)."""
        measured = own is not None and own > 0
        self.own, self.sizes = (float(own or 0.0), tuple(sizes)) if measured else (0.0, ())

    def observe(self, step: int, other: float) -> None:
        """Take the last step's KL on the minibatch of this step (0, 1, 2, …), in nats."""
        if other > 0 and math.isfinite(self.own / other):
            low, high = OUTLIER
            found = math.log(min(max(self.own / other, low), high))
            self.count += 1
            self.log += max(1 / self.count, 1 - MEMORY) * (found - self.log)
        if step >= SETTLED and self.count >= DECIDED and not self.settled:
            self.settled = math.exp(self.log)

    @property
    def ratio(self) -> float | None:
        """I; None before it was seen."""
        return math.exp(self.log) if self.count else None

    @property
    def prior(self) -> float:
        """The factor on what damping's prior is worth; 1 while little is known."""
        if self.count < FOLLOWED:
            return 1.0
        low, high = WORTH
        return min(max((math.exp(self.log) - 1) / USUAL, low), high)

    @property
    def budget(self) -> float:
        """The factor on the default budget."""
        return min(max(SHARE * self.settled, 1.0), MOST)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "log": self.log,
            "count": self.count,
            "settled": self.settled,
            "own": self.own,
            "sizes": list(self.sizes),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InputError: when a number can't be what was saved.
        """
        largest = 1.01 * OUTLIER[1]
        ratio = abs(float(state["log"])) < math.log(largest)
        settled = 0 <= float(state["settled"]) < largest
        if not (ratio and settled and float(state["own"]) >= 0 and int(state["count"]) >= 0):
            raise InputError("the saved optimizer state is damaged: its inflation can't be")
        self.log, self.count = float(state["log"]), int(state["count"])
        self.settled, self.own = float(state["settled"]), float(state["own"])
        self.sizes = tuple(float(size) for size in state["sizes"])
