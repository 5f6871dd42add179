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

_LEAST_BLOCKS = 6
"""Fewer independent stretches of a path give a standard error that is itself a guess."""


@dataclass(frozen=True)
class Estimate:
    """A number and its standard error, both in the same unit; ``error`` is NaN where a single
    sample gives none."""

    value: float
    error: float

    @property
    def told(self) -> bool:
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


def over_run(samples: ArrayLike, steps: ArrayLike, total: int) -> Estimate:
    """Sum over a run of a per-step quantity sampled at some of its steps.

    Steps between samples are interpolated, those beyond have the nearest's value. The error comes
    from differences of successive samples, so that a trend over training doesn't count as scatter.

    Args:
        samples: (K,) values at the sampled steps.
        steps: (K,) their numbers, increasing.
        total: the number of steps of the run.
    """
    x, at = np.asarray(samples, dtype=np.float64), np.asarray(steps, dtype=np.float64)
    if len(x) == 0 or len(x) != len(at):
        raise ValueError("there must be one step number for each of at least one sample")
    every = np.arange(int(total))
    left = np.clip(np.searchsorted(at, every, side="right") - 1, 0, len(at) - 1)
    right = np.minimum(left + 1, len(at) - 1)
    gap = np.maximum(at[right] - at[left], 1.0)
    share = np.clip((every - at[left]) / gap, 0.0, 1.0)
    weights = np.bincount(left, 1 - share, len(at)) + np.bincount(right, share, len(at))
    value = float(weights @ x)
    if len(x) < 2:
        return Estimate(value, float("nan"))
    variance = float(np.mean(np.diff(x) ** 2)) / 2
    return Estimate(value, float(np.sqrt(variance * (weights @ weights))))


def transport(
    chords: Mapping[int, Sequence[tuple[int, int, float]]],
    stride_steps: float = 1.0,
    memory: float = 1.0,
) -> Estimate | None:
    """Q_transport of a path (nats) from the slope B of ``a^(m)/m = A + B m`` (§11): what survives
    at long lags.

    White noise adds the same to a^(m)/m at every m and steady motion adds B m, so that the
    difference between a long and a short stride, within the same stretch of the path, holds the
    motion alone. A step transports ½B.

    Args:
        chords: for each stride m, in snapshots, the (first, last, a) of chords that follow one
            another along the path.
        stride_steps: optimizer steps between snapshots.
        memory: the optimizer's memory in steps, 1/(1−μ) for momentum μ; shorter strides aren't
            used.

    Returns:
        The sum over the path with its standard error from stretch to stretch; None where the path
        is too short to tell.
    """
    whole = {m: [c for c in found if c[1] - c[0] == m] for m, found in chords.items()}
    usable = [m for m, found in sorted(whole.items()) if found]
    short = [m for m in usable if m * stride_steps >= memory]
    long = [m for m in usable if len(whole[m]) >= _LEAST_BLOCKS]
    if not short or not long or long[-1] < 4 * short[0]:
        return None
    m, big = short[0], long[-1]
    starts, a = (np.array([c[0] for c in whole[m]]), np.array([c[2] for c in whole[m]]))
    found = []
    for first, last, chord in whole[big]:
        inside = a[(starts >= first) & (starts + m <= last)]
        if len(inside):
            slope = (chord / big - float(inside.mean()) / m) / (big - m)
            found.append(
                0.5 * slope * big
            )  # per step ½ B over stride_steps², times the steps of this stretch
    parts = np.array(found) / stride_steps
    if len(parts) < _LEAST_BLOCKS:
        return None
    covered = whole[big][-1][1] - whole[big][0][0]
    scale = max(last for _, last, _ in chords[big]) / covered if covered else 1.0
    variance = float(np.mean(np.diff(parts) ** 2)) / 2
    return Estimate(float(parts.sum()) * scale, float(np.sqrt(variance * len(parts))) * scale)
