"""What a run has spent so far, while it is being recorded: the scalars that a live plot shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from thermo_opt.manifold import Point, embed, move, squared_distance
from thermo_opt.runs.probe import Probe

PREFIX = "thermo/"
"""What every live scalar's name begins with."""

OPTIMIZER_SCALARS = ("alignment", "realised", "kappa")
"""Entries of ``optimizer.last_step`` that are shown live (`thermo_opt.NGDT` has them)."""


class Progress:
    """Dissipation, efficiency, probe loss and alignment of a recorded path so far (theory §3, §4).

    Feed it the probe's outputs at each snapshot (`add`) and the optimizer's own numbers at each
    step (`hear`). Numbers are those of the outputs lens at the recorded stride, so a stride above
    one makes the dissipation a lower and the efficiency an upper bound. Memory: two embedded
    predictions. Cost per snapshot: one embedding and two distances, O(n c).
    """

    def __init__(
        self,
        probe: Probe | None,
        likelihood: str,
        sigma2: float | None = None,
        kind: str | None = None,
    ) -> None:
        known = (None, None) if probe is None else (probe.targets, probe.weights)
        self._targets, self._weights = (
            None if t is None else t.detach().cpu().numpy() for t in known
        )
        self._likelihood, self._kind = likelihood, kind or "logits"
        self._sigma2 = 1.0 if sigma2 is None else sigma2
        self._nats = sigma2 is not None or likelihood != "gaussian"  # else ratios alone are known
        self._first: tuple[int, Point] | None = None
        self._last: tuple[int, Point] | None = None
        self._dissipation = 0.0
        self._values: dict[str, float] = {}

    def add(self, step: int, outputs: Tensor) -> None:
        """Take the probe's outputs (n, …) after ``step`` steps; non-finite ones leave no number."""
        point = embed(
            outputs.float().numpy(),
            self._targets,
            weights=self._weights,
            kind=self._kind,
            likelihood=self._likelihood,
            sigma2=self._sigma2,
        )
        for name in ("dissipation", "efficiency", "loss", "alignment_lower"):
            self._values.pop(name, None)
        if not point.finite:
            self._first = self._last = None  # the path is broken: nothing after it is known
            self._dissipation = math.nan
            return
        if point.mean_loss is not None and self._nats:
            self._values["loss"] = point.mean_loss
        if self._first is None or self._last is None:
            self._first = self._last = (step, point)
            return
        (start, first), (before, last) = self._first, self._last
        interval = move(last, point, self._likelihood)
        self._dissipation += interval.a / (2 * (step - before))
        if self._nats:
            self._values["dissipation"] = self._dissipation
        if self._dissipation > 0:
            squared = squared_distance(first, point, self._likelihood)
            self._values["efficiency"] = squared / (2 * self._dissipation * (step - start))
        if step - before == 1 and interval.a * interval.chi2 > 0:
            self._values["alignment_lower"] = (
                interval.d * abs(interval.d) / (interval.a * interval.chi2)
            )
        self._last = (step, point)

    def hear(self, last_step: Any) -> None:
        """Take an optimizer's ``last_step``, where it has one; what it doesn't know keeps its
        latest value."""
        if isinstance(last_step, Mapping):
            known = {name: last_step.get(name) for name in OPTIMIZER_SCALARS}
            self._values |= {name: float(x) for name, x in known.items() if x is not None}

    @property
    def scalars(self) -> dict[str, float]:
        """The finite numbers known now, by the names ``thermo/…``."""
        return {PREFIX + name: x for name, x in self._values.items() if math.isfinite(x)}
