"""Regulators: from the dissipation a step would cost to its size η_T (theory §7)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from thermo_opt.errors import InputError

Schedule = float | Callable[[int], float]
"""A number, or a function of the step (0, 1, 2, …)."""


def value_at(value: Schedule, step: int, name: str, *, zero: bool = False) -> float:
    """The value of a schedule at this step; `InputError` unless it is finite and positive (or, with
    ``zero``, not negative)."""
    number = float(value(step)) if callable(value) else float(value)
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        where = f" at step {step}" if callable(value) else ""
        raise InputError(
            f"{name} must be a finite number {'≥' if zero else '>'} 0, got {number!r}{where}"
        )
    return number


class Regulator(Protocol):
    """Anything that turns a step's cost into its size.

    With an attribute ``follows_signal`` that is true, steps are then shortened where their
    gradients turn out to be noise (`optim.signal`).
    """

    def step_size(self, a: float, step: int) -> float:
        """η_T for the update −η_T v with ``a = vᵀFv`` (equal to Δ for v = F⁺g), at this step (0, 1,
        2, …)."""

    def budget_at(self, step: int) -> float | None:
        """The dissipation (nats) no step should exceed, or None where the regulator fixes something
        else."""


@dataclass(frozen=True)
class Dissipation:
    """``η_T = min(η_max, √(2 Q_budget / a))``: the step dissipates ½η²a = Q_budget nats until η_max
    binds.

    No step within the budget predicts a larger decrease (theory §3, §7). With ``follows_signal``
    the budget is an upper bound: steps are shortened where their gradients are mostly noise.
    Without, this is K-FAC's KL clipping (Ba, Grosse & Martens 2017) with kl_clip = 2 Q_budget and
    learning rate η_max, and TRPO's step length (Schulman et al. 2015; ACKTR, Wu et al. 2017).
    """

    budget: Schedule = 0.01
    eta_max: Schedule = 1.0
    follows_signal: bool = True

    def step_size(self, a: float, step: int) -> float:
        limit = value_at(self.eta_max, step, "eta_max")
        budget = value_at(self.budget, step, "budget")
        return min(limit, math.sqrt(2 * budget / a)) if a > 0 else limit

    def budget_at(self, step: int) -> float | None:
        return value_at(self.budget, step, "budget")


@dataclass(frozen=True)
class Heat:
    """``η_T = clip(η_0 Q_budget/(a + ε), η_min, η_max)``: the mapping in the paper's public
    reference code.

    It fixes the predicted decrease, η a = η_0 Q_budget, and not the dissipation: with Q_budget =
    0.1 and Δ ≈ 3·10³ its step dissipates 1.6·10⁻⁶ nats. For reproducing the paper.
    """

    budget: Schedule = 0.1
    eta_0: float = 1.0
    eta_min: float = 0.0
    eta_max: Schedule = 1.0
    epsilon: float = 1e-12
    follows_signal: ClassVar[bool] = False

    def step_size(self, a: float, step: int) -> float:
        raw = self.eta_0 * value_at(self.budget, step, "budget") / (a + self.epsilon)
        return min(max(raw, self.eta_min), value_at(self.eta_max, step, "eta_max"))

    def budget_at(self, step: int) -> float | None:
        value_at(self.budget, step, "budget")
        return None


@dataclass(frozen=True)
class Fixed:
    """``η_T = η`` whatever the step costs: plain natural-gradient descent."""

    eta: Schedule = 1.0
    follows_signal: ClassVar[bool] = False

    def step_size(self, a: float, step: int) -> float:
        return value_at(self.eta, step, "eta")

    def budget_at(self, step: int) -> float | None:
        return None


def named(name: str | Regulator, budget: Schedule, eta_max: Schedule) -> Regulator:
    """The regulator of this name with this budget; a regulator object is returned as it is.

    For "fixed", ``eta_max`` is the step size itself.
    """
    if not isinstance(name, str):
        return name
    makers: dict[str, Callable[[], Regulator]] = {
        "dissipation": lambda: Dissipation(budget, eta_max),
        "kl-clip": lambda: Dissipation(budget, eta_max, follows_signal=False),
        "heat": lambda: Heat(budget, eta_max=eta_max),
        "fixed": lambda: Fixed(eta_max),
    }
    if name not in makers:
        raise InputError(f"regulator {name!r} is not one of {', '.join(makers)}")
    return makers[name]()
