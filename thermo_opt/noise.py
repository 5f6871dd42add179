"""Signal and noise of minibatch steps (theory §11): unbiased estimates from replica steps,
transport from long lags.

With u = 2√p per example and δ, δ' the displacements of u that two independent minibatches cause
from one state:

    Q_noise = ½ E(|δ|² − ⟨δ,δ'⟩) = ½ tr Cov(δ)      Q_drift = ½ E⟨δ,δ'⟩ = ½ |E δ|²

NumPy only; squares and products are means over examples, quantities are nats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_FORGOTTEN = 1.5
"""Distance in time of two displacements over the optimizer's memory: momentum then carries hardly
any noise from one to the other."""
_LEAST_WINDOWS = 4
"""Fewer stretches of a path give a standard error that is itself a guess."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, both in the same unit; ``error`` is NaN where a single
    sample gives none."""

    value: float
    error: float

    @property
    def significant(self) -> bool:
        """Whether the value stands out from zero by two standard errors."""
        return bool(self.value > 2 * self.error)


def noise_and_drift(delta: ArrayLike, other: ArrayLike) -> tuple[float, float]:
    """Unbiased (Q_noise, Q_drift) of one step from two independent displacements from the same
    state (§11).

    Args:
        delta: (n, width) displacement of u in one step, examples along the first axis.
        other: the same in a step with an independent minibatch.

    Returns:
        ½(½(|δ|² + |δ'|²) − ⟨δ,δ'⟩) and ½⟨δ,δ'⟩, means over examples. Either can come out negative:
        they are samples.
    """
    x, y = (np.asarray(d, dtype=np.float64).reshape(len(np.asarray(d)), -1) for d in (delta, other))
    if x.shape != y.shape:
        raise ValueError(f"displacements of shapes {x.shape} and {y.shape} can't be compared")
    cross = float(np.einsum("ij,ij->", x, y)) / len(x)
    gap = x - y  # |δ|² + |δ'|² − 2⟨δ,δ'⟩, without the cancellation
    return 0.25 * float(np.einsum("ij,ij->", gap, gap)) / len(x), 0.5 * cross


def over_run(samples: ArrayLike, steps: ArrayLike, total: int, start: int = 0) -> Estimate:
    """Sum over a run, or a stretch of it, of a per-step quantity sampled at some of its steps.

    Steps between samples are interpolated, those beyond have the nearest's value. The error comes
    from each sample's difference from the mean of its two neighbours, so that neither a trend over
    training nor scatter that changes with it counts as scatter elsewhere.

    Args:
        samples: (K,) values at the sampled steps.
        steps: (K,) their numbers, increasing.
        total: the number of steps of the run, or the end of the stretch.
        start: the first step of the stretch.
    """
    x, at = np.asarray(samples, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    if len(x) == 0 or len(x) != len(at):
        raise ValueError("there must be one step number for each of at least one sample")
    every = np.arange(int(start), int(total))
    left = np.clip(np.searchsorted(at, every, side="right") - 1, 0, len(at) - 1)
    right = np.minimum(left + 1, len(at) - 1)
    gap = np.maximum(at[right] - at[left], 1.0)
    share = np.clip((every - at[left]) / gap, 0.0, 1.0)
    weights = np.bincount(left, 1 - share, len(at)) + np.bincount(right, share, len(at))
    value = float(weights @ x)
    if len(x) < 2:
        return Estimate(value, float("nan"))
    return Estimate(value, float(np.sqrt(_variances(x) @ weights**2)))


def _variances(x: Array) -> Array:
    """(K,) variance of each sample, from its own neighbourhood."""
    if len(x) == 2:
        return np.full(2, float(np.diff(x)[0]) ** 2 / 2)
    bent = x[1:-1] - 0.5 * (x[:-2] + x[2:])  # of variance 3/2 of a sample's
    inner = bent**2 / 1.5
    return np.concatenate([inner[:1], inner, inner[-1:]])


def ratio(top: Estimate, bottom: Estimate, factor: float = 1.0) -> Estimate:
    """factor · top/bottom, its error to first order from independent ones."""
    value = factor * top.value / bottom.value
    relative = np.hypot(top.error / top.value, bottom.error / bottom.value) if top.value else np.nan
    return Estimate(float(value), float(abs(value) * relative))


@dataclass(frozen=True)
class Transport:
    """What of a path's motion lasts (§11): Q_transport over the run and along it.

    Attributes:
        total: Q_transport over all steps, nats, with its standard error.
        lag: the lag of the products it was read from, in steps; 1 where neighbours' were.
        step: (K,) steps that the samples belong to, increasing.
        rate: (K,) samples of Q_transport per step, nats. Single ones may be negative.
        grows: whether a lag twice as long gives significantly more, so that the total is a lower
            bound: shorter lags still count the undoing of noise, with a minus.
        balanced: whether it is `balanced_transport`.
    """

    total: Estimate
    lag: float
    step: Array
    rate: Array
    grows: bool = False
    balanced: bool = False


def balanced_transport(
    adjacent: Sequence[tuple[int, float]],
    drift: ArrayLike,
    at: ArrayLike,
    total: int,
    drift_error: float = 0.0,
) -> Transport | None:
    """Q_transport of an optimizer without memory from replicas and neighbouring steps (§11).

    Where fluctuations are stationary, noise gains per step what the drift takes from it (the
    fluctuation–dissipation balance of Yaida 2018), so that neighbouring steps are correlated by
    what undoes noise, with a minus: ``½⟨δ_k, δ_{k+1}⟩ = transport − housekeeping``, beside
    ``Q_drift = transport + housekeeping``. Half their sum is the transport: exact for a
    linear-Gaussian model under SGD, at any speed of its modes, without any choice of lag.

    Args:
        adjacent: (k, ⟨δ_k, δ_{k+1}⟩) of neighbouring steps.
        drift: (K,) samples of Q_drift at some steps.
        at: (K,) numbers of these steps.
        total: the number of steps of the run.
        drift_error: error of Q_drift over the run that its samples share, and so don't show.

    Returns:
        The transport, with a sample at each step of ``at`` that has products near it; None with too
        few samples.
    """
    at, drift = np.asarray(at, dtype=np.float64), np.asarray(drift, dtype=np.float64)
    # a product belongs to both its steps: to the sample that is nearest to each
    step = np.array([k + j for j in (0, 1) for k, _ in adjacent], dtype=np.float64)
    product = np.array([0.5 * x for _ in (0, 1) for _, x in adjacent])
    near = np.searchsorted(0.5 * (at[1:] + at[:-1]), step, side="right")
    count = np.bincount(near, minlength=len(at))
    if np.count_nonzero(count) < _LEAST_WINDOWS:
        return None
    found = np.bincount(near, product, len(at))
    has = count > 0
    rate = 0.5 * (drift[has] + found[has] / count[has])
    summed = over_run(rate, at[has], total)
    error = float(np.hypot(summed.error, 0.5 * drift_error))
    return Transport(Estimate(summed.value, error), 1.0, at[has], rate, balanced=True)


def lasting_transport(
    products: Mapping[int, Sequence[tuple[int, float]]],
    steps: ArrayLike,
    memory: float = 1.0,
) -> Transport | None:
    """Q_transport of a path from products of displacements that lie apart in time (§11).

    ⟨Δ_k, Δ_{k+2m}⟩ of displacements over m snapshots, divided by m², is the squared velocity at
    the middle, k + 3m/2 (exactly so where the velocity changes exponentially along a line). Noise
    of single steps is not in it, and noise that the dynamics undo within m steps hardly, as
    −exp(−m/relaxation time) of the housekeeping. The shortest m is taken that is far beyond the
    optimizer's memory (2m ≥ 1.5 memory) and with which twice m agrees within two standard errors;
    before its first window shorter such m are used, and before the first of all its value. Where
    neighbouring displacements turn back, m = 1 is left out: a motion to and fro, as near the
    largest stable learning rate, agrees with itself two displacements later.

    Args:
        products: per m, in snapshots, the (first snapshot, product) of stretches of 3m snapshots;
            under 0 those of neighbouring displacements, ⟨Δ_k, Δ_{k+1}⟩.
        steps: (K+1,) step numbers of the snapshots, evenly spaced (but for the last).
        memory: the optimizer's memory in steps, 1/(1−μ) for momentum μ.

    Returns:
        The transport; None where the path is too short for any.
    """
    at = np.asarray(steps, dtype=np.float64)
    if len(at) < 2:
        return None
    stride, total = at[1] - at[0], int(at[-1])
    usable = sorted(
        m
        for m, found in products.items()
        if m > 0 and 2 * m * stride >= _FORGOTTEN * memory and len(found) >= _LEAST_WINDOWS
    )
    if _turns_back(products.get(0, ()), at, total):
        usable = [m for m in usable if m > 1]
    if not usable:
        return None
    found = {m: _windows(products, usable, m, at, stride) for m in usable}
    sums = {m: over_run(rate, step, total) for m, (step, rate) in found.items()}
    chosen, grows = usable[0], False
    for m in usable:
        chosen, grows = m, False
        twice = sums.get(2 * m)
        if twice is None:
            break
        grows = twice.value - sums[m].value > 2 * twice.error
        if not grows:
            break
    step, rate = found[chosen]
    return Transport(sums[chosen], float(chosen * stride), step, rate, grows)


def oscillates(products: Mapping[int, Sequence[tuple[int, float]]], steps: ArrayLike) -> bool:
    """Whether a path goes to and fro: what a displacement does, the next undoes and the one after
    that does again. Modes of ηh > 1 do, near the largest stable learning rate; their fluctuations
    last no longer than a few steps.

    Args:
        products: as in `lasting_transport`.
        steps: (K+1,) step numbers of the snapshots.
    """
    at = np.asarray(steps, dtype=np.float64)
    total = int(at[-1])
    return _turns_back(products.get(0, ()), at, total) and _stands_out(
        products.get(1, ()), at, total
    )


def _turns_back(neighbours: Sequence[tuple[int, float]], at: Array, total: int) -> bool:
    """Whether neighbouring displacements undo each other, by two standard errors."""
    return _stands_out([(k, -x) for k, x in neighbours], at, total)


def _stands_out(products: Sequence[tuple[int, float]], at: Array, total: int) -> bool:
    if len(products) < _LEAST_WINDOWS:
        return False
    steps = [at[k] for k, _ in products]
    return over_run([x for _, x in products], steps, total).significant


def _windows(
    products: Mapping[int, Sequence[tuple[int, float]]],
    usable: Sequence[int],
    m: int,
    at: Array,
    stride: float,
) -> tuple[Array, Array]:
    """(middles, rates) of the windows at m and, before the first of them, at shorter ones."""
    middles: list[float] = []
    rates: list[float] = []
    first = np.inf
    for short in sorted((s for s in usable if s <= m), reverse=True):
        here = [
            (at[k] + 1.5 * short * stride, 0.5 * product / (short * stride) ** 2)
            for k, product in products[short]
            if at[k] + 1.5 * short * stride < first
        ]
        if here:
            middles = [x for x, _ in here] + middles
            rates = [y for _, y in here] + rates
            first = middles[0]
    return np.array(middles), np.array(rates)
