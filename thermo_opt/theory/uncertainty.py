"""Entropy production of an ensemble bounded from below by a thermodynamic uncertainty relation
(theory §14).

A current that is precise costs entropy. For overdamped Langevin dynamics (coordinates even under
time reversal, noise of constant strength) any current J that is odd under time reversal, such as a
displacement, obeys

    steady state     Σ ≥ 2⟨J⟩²/Var J                  Gingrich et al. 2016; Horowitz & Gingrich 2017
    any start        Σ ≥ 2(τ d⟨J⟩/dτ)²/Var J          Liu, Gong & Ueda 2020 (constant protocol)
    N discrete steps Σ ≥ N ln(1 + 2⟨J⟩²/(N Var J))    Proesmans & Van den Broeck 2017 (steady state)

Σ in nats (units of k_B). They do not hold with momentum, whose velocities are odd. NumPy only.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from thermo_opt.noise import Estimate

_LEAST = 3


def steady_bound(currents: ArrayLike) -> Estimate:
    """2⟨J⟩²/Var J of a steady state, with its standard error.

    Args:
        currents: (R,) time-integrated current of each of R independent runs.

    Raises:
        ValueError: fewer than three runs, or currents that don't vary.
    """
    j, variance = _moments(currents)
    mean = float(j.mean())
    return _bound(mean, variance, len(j))


def relaxing_bound(currents: ArrayLike, times: ArrayLike) -> Estimate:
    """2(τ d⟨J⟩/dτ)²/Var J at the end of a relaxation from any start, the protocol constant.

    Args:
        currents: (R, K) current of each run, integrated up to each of K times; the last two times
            give the rate of its mean.
        times: (K,) increasing, from the start of the relaxation at 0.

    Raises:
        ValueError: fewer than two times or three runs, or currents that don't vary.
    """
    j, t = np.asarray(currents, dtype=np.float64), np.asarray(times, dtype=np.float64)
    if j.ndim != 2 or j.shape[1] != len(t) or len(t) < 2 or not (np.diff(t) > 0).all():
        raise ValueError("give currents (runs, times) and as many increasing times")
    last, variance = _moments(j[:, -1])
    rate = (j[:, -1] - j[:, -2]) / (t[-1] - t[-2])
    shown = t[-1] * rate
    found = _bound(float(shown.mean()), variance, len(last))
    # the rate has its own scatter, not that of the current
    error = 4 * abs(shown.mean()) * shown.std(ddof=1) / np.sqrt(len(last)) / variance
    return Estimate(found.value, float(np.hypot(error, found.value * np.sqrt(2 / (len(j) - 1)))))


def discrete_bound(currents: ArrayLike, steps: int) -> Estimate:
    """N ln(1 + 2⟨J⟩²/(N Var J)) of a steady state of N steps in discrete time.

    Args:
        currents: (R,) current of each run summed over its steps.
        steps: N.

    Raises:
        ValueError: fewer than three runs, currents that don't vary, or no steps.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; give at least 1")
    found = steady_bound(currents)
    value = steps * np.log1p(found.value / steps)
    return Estimate(float(value), float(found.error / (1 + found.value / steps)))


def _moments(currents: ArrayLike) -> tuple[np.ndarray, float]:
    j = np.asarray(currents, dtype=np.float64)
    if j.ndim != 1 or len(j) < _LEAST:
        raise ValueError(f"a bound needs the currents of {_LEAST} runs at least")
    variance = float(j.var(ddof=1))
    if not variance > 0:
        raise ValueError("the current is the same in all runs: it bounds nothing")
    return j, variance


def _bound(mean: float, variance: float, count: int) -> Estimate:
    """2m²/v freed of the bias of m² and of 1/v, with its error to first order."""
    value = 2 * max(mean**2 - variance / count, 0.0) / variance * (count - 3) / (count - 1)
    relative = np.sqrt(4 * variance / count / mean**2 + 2 / (count - 1)) if mean else np.inf
    error = value * relative if value > 0 else 2 / count
    return Estimate(float(value), float(error))
