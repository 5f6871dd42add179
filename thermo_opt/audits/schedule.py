"""A learning-rate schedule read from an audit: the recorded path at constant Fisher–Rao speed
(§12)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from thermo_opt import noise
from thermo_opt.audits.results import Audit
from thermo_opt.errors import InputError
from thermo_opt.lenses.results import LensAudit

_NOTHING = 0.02
"""Share of the dissipation below which a saving is not worth a change."""
_QUIET = 0.05
"""Share of noise in the dissipation up to which single steps tell the speed."""
_BALLISTIC = 0.95
"""Exponent H from which on a path of unknown noise counts as free of it."""
_UNSTABLE = 0.8
"""ηh of the typical mode beyond which longer steps don't walk the same path."""
_NARROWEST, _WIDENING = 3, 0.25
"""Half width of the window over which noisy steps are averaged: at least so many steps, and this
share of the steps before."""


@dataclass(frozen=True)
class EvenSchedule:
    """Learning rates at which each step moves equally far, at the run's own Σ lr and steps.

    Attributes:
        learning_rates: (T,) one per optimizer step.
        dissipation: What the run dissipated (nats).
        predicted_dissipation: What it would with these rates: exact for a deterministic flow along
            one path, an estimate for minibatch runs. It presumes that training is stable at the
            largest of them, which may be several times the run's own.
        error: Standard error of the predicted dissipation, from the scatter of single steps.
        smoothed: Whether steps were averaged, those of a minibatch run being mostly noise.
        overshoot: ηh of the typical mode of noise, from housekeeping over noise, which is ηh/(2 −
            ηh) for an optimizer without momentum, or else from how far each step undoes the one
            before; None where not told. Modes beyond 2 diverge, and
            from about 0.8 on longer steps don't walk the same path: the prediction fails.
    """

    learning_rates: np.ndarray
    dissipation: float
    predicted_dissipation: float
    error: float = 0.0
    smoothed: bool = False
    overshoot: float | None = None

    @property
    def near_instability(self) -> bool:
        """Whether the run was so near to the largest stable learning rate that no prediction
        holds."""
        return self.overshoot is not None and self.overshoot > _UNSTABLE

    @property
    def saving(self) -> float:
        """Predicted share of the dissipation saved, in [0, 1)."""
        return 1 - self.predicted_dissipation / self.dissipation if self.dissipation > 0 else 0.0

    @property
    def saving_error(self) -> float:
        """Its standard error."""
        return self.error / self.dissipation if self.dissipation > 0 else 0.0

    @property
    def worthwhile(self) -> bool:
        """Whether the predicted saving is more than 2 % and than two standard errors, and can be
        trusted."""
        return not self.near_instability and self.saving > max(_NOTHING, 2 * self.saving_error)

    def lr_lambda(self) -> Callable[[int], float]:
        """The factor on the first learning rate at each step, for
        ``torch.optim.lr_scheduler.LambdaLR`` on an optimizer whose rate is ``learning_rates[0]``;
        beyond the last step, the last factor."""
        factors = self.learning_rates / self.learning_rates[0]
        return lambda step: float(factors[min(step, len(factors) - 1)])

    def stretched(self, steps: int) -> EvenSchedule:
        """The same schedule over another number of steps, at the same Σ lr: the same path walked
        more slowly or faster, so that the predicted dissipation goes as 1/steps (§4).

        Args:
            steps: how many.
        """
        if steps < 1:
            raise InputError(f"steps is {steps}; give at least 1")
        time = np.concatenate([[0.0], np.cumsum(self.learning_rates)])
        at = np.linspace(0, len(self.learning_rates), steps + 1)
        rates = np.diff(np.interp(at, np.arange(len(time)), time))
        ratio = len(self.learning_rates) / steps
        return EvenSchedule(
            rates,
            self.dissipation,
            self.predicted_dissipation * ratio,
            self.error * ratio,
            self.smoothed,
            self.overshoot,
        )


def even_schedule(audit: Audit) -> EvenSchedule:
    """Learning rates that walk the recorded path at constant Fisher–Rao speed (§12).

    With t_k = Σ η and ℓ_k = Σ √a, ``η′_k = t(ℓ_T (k+1)/T) − t(ℓ_T k/T)``: Σ η and the number of
    steps stay, and for a deterministic flow the dissipation falls to steadiness · Q. In a minibatch
    run √a of single steps is noise: there a is first averaged over windows (3 steps at least, and a
    quarter of the steps before, to both sides). Noise is part of the speed that is evened: it goes
    as η² too, and costs as much as drift.

    Args:
        audit: Of a run recorded at every step, through the outputs lens, whose log has the
            learning rate of every step.

    Returns:
        The schedule and its predicted dissipation. Cost O(T).

    Raises:
        InputError: When the run wasn't recorded at every step, or didn't log its learning rates.
    """
    lens = audit.lenses.get("outputs")
    if lens is None or not lens.summary["every_step"]:
        raise InputError(
            f"{audit.run}: an even schedule needs predictions recorded at every step: record with "
            "every=1"
        )
    ends = lens.steps["step_end"].to_numpy()
    lr = audit.curve["lr"].reindex(ends).to_numpy(float) if "lr" in audit.curve else np.array([])
    if len(lr) != len(ends) or not np.isfinite(lr).all() or not (lr >= 0).all() or lr.sum() <= 0:
        raise InputError(
            f"{audit.run}: an even schedule needs the learning rate of every step, which this run "
            "didn't log: record with the optimizer"
        )
    a = lens.steps["a"].to_numpy(float)
    if a.sum() <= 0:
        raise InputError(f"{audit.run}: its predictions never moved: there is nothing to even out")
    noisy = _noisy(lens)
    speed = np.sqrt(_averaged(a) if noisy else a)
    time = np.concatenate([[0.0], np.cumsum(lr)])
    way = np.concatenate([[0.0], np.cumsum(speed)])
    even = np.interp(np.linspace(0, way[-1], len(lr) + 1), way, time)
    q = float(a.sum() / 2)
    # the averaged speeds' own sum of squares, so that averaging alone predicts no saving
    predicted = q * way[-1] ** 2 / (len(lr) * float((speed**2).sum()))
    error = 0.0
    if noisy and len(a) > 1:
        error = noise.over_run(0.5 * a, np.arange(len(a)), len(a)).error * predicted / q
    over = _overshoot(lens) if noisy else None
    over = _to_and_fro(lens) if over is None else over
    return EvenSchedule(np.diff(even), q, float(predicted), float(error), noisy, over)


def _overshoot(lens: LensAudit) -> float | None:
    """ηh from housekeeping over noise, r = ηh/(2 − ηh) (§11)."""
    split = lens.split
    if split is None or not split.noise or split.drift is None or split.memory > 1:
        return None
    ratio = (split.drift - max(split.transport or 0.0, 0.0)) / split.noise
    return float(2 * ratio / (1 + ratio)) if ratio > 0 else 0.0


def _to_and_fro(lens: LensAudit) -> float | None:
    """ηh of what dominates a path that turns back at every second step: two steps of correlation
    −ηh/2 dissipate ½(1 − ηh/2) of what they do singly. None for other paths."""
    spent = lens.coarse.set_index("stride")["dissipation"]
    if not {1, 2} <= set(spent.index) or not spent[1] > 0:
        return None
    left = float(spent[2] / spent[1])
    return 2 * (1 - 2 * left) if left < 0.5 else None


def _noisy(lens: LensAudit) -> bool:
    """Whether single steps are mostly noise, as replicas say, or else the exponent H."""
    split = lens.split
    if split is not None and split.noise is not None:
        return split.noise > _QUIET * float(lens.summary["dissipation"] or np.inf)
    return lens.hurst is not None and lens.hurst < _BALLISTIC


def _averaged(a: np.ndarray) -> np.ndarray:
    """Means over windows that widen along the run."""
    k = np.arange(len(a))
    half = np.maximum(_NARROWEST, (_WIDENING * k).astype(int))
    low, high = np.maximum(k - half, 0), np.minimum(k + half + 1, len(a))
    total = np.concatenate([[0.0], np.cumsum(a)])
    return (total[high] - total[low]) / (high - low)
