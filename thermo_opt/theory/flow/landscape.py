"""What a flow runs on: a loss with a metric at every point."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]
Curve = Callable[[float], Array]


class NotConverged(RuntimeError):
    """A solver gave up, so the quantity asked for is not known; the message says where."""


class LocalMetric(Protocol):
    """The metric at one point θ, acting on flat vectors of shape (P,)."""

    def quadratic(self, v: Array) -> float:
        """vᵀFv."""

    def solve(self, g: Array) -> Array:
        """F⁺g."""


class DenseMetric:
    """A metric given as a (P, P) matrix; `solve` is its spectral pseudo-inverse, threshold
    ``rtol·σ_max``. O(P³)."""

    def __init__(self, matrix: ArrayLike, rtol: float = 1e-12) -> None:
        self.matrix = np.asarray(matrix, dtype=np.float64)
        self.rtol = rtol

    def quadratic(self, v: Array) -> float:
        """vᵀFv."""
        return float(v @ self.matrix @ v)

    def solve(self, g: Array) -> Array:
        """F⁺g, the least-norm solution on the range of F."""
        values, vectors = np.linalg.eigh(self.matrix)
        kept = values > self.rtol * max(values[-1], 0.0)
        return vectors[:, kept] @ ((vectors[:, kept].T @ g) / values[kept])


@dataclass(frozen=True)
class Landscape:
    """A loss L(θ) in nats with a metric at each θ, (P,).

    ``predict(θ)``, outputs on a fixed probe (logits (n, c) or means (n, …)), makes its paths
    auditable, with ``targets``, ``likelihood`` and the Gaussian variance ``sigma2``.
    """

    name: str
    metric: Callable[[Array], LocalMetric]
    loss: Callable[[Array], float]
    gradient: Callable[[Array], Array]
    predict: Callable[[Array], Array] | None = None
    targets: Array | None = None
    likelihood: str = "categorical"
    sigma2: float = 1.0
