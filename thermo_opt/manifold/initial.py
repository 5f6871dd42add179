"""A run's first predictions, as far as its universal frontier needs them (§5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from thermo_opt.errors import InputError
from thermo_opt.manifold import Point, log_least_distance
from thermo_opt.manifold.level_set import gaussian_least_distance


@dataclass(frozen=True)
class InitialPredictions:
    """What D*(L*) depends on: the targets' log-probabilities, or for Gaussian outputs the
    residual's norm.

    ``examples``: n. ``log_p_y`` (rows,) float64: log p(y) of each counted target, several rows an
    example when it has several Bernoulli outputs; None for Gaussian outputs, which have
    ``residual`` sqrt(mean_i |y_i - f_i|²/σ²) and ``width`` outputs of variance ``sigma2`` an
    example.
    """

    likelihood: str
    examples: int
    log_p_y: np.ndarray | None = None
    residual: float = np.nan
    width: int = 0
    sigma2: float = 1.0

    @classmethod
    def of(cls, point: Point, likelihood: str, sigma2: float = 1.0) -> InitialPredictions | None:
        """The start of a run whose first predictions are ``point``; None without targets."""
        if point.residual is not None:
            square = float(np.einsum("ij,ij->", point.residual, point.residual))
            norm = float(np.sqrt(square / point.examples))
            return cls(likelihood, point.examples, None, norm, point.residual.shape[1], sigma2)
        if point.log_amplitude_y is None:
            return None
        return cls(likelihood, point.examples, np.minimum(2 * point.log_amplitude_y, 0.0))

    @property
    def least_loss(self) -> float:
        """The least mean loss that any predictions have (nats): 0 for classes, the density's
        constant for Gaussian outputs."""
        return (
            0.0
            if self.log_p_y is not None
            else 0.5 * self.width * float(np.log(2 * np.pi * self.sigma2))
        )

    @cached_property
    def loss(self) -> float:
        """Mean loss at the start (nats)."""
        if self.log_p_y is not None:
            return float(-self.log_p_y.sum() / self.examples)
        return self.least_loss + 0.5 * self.residual**2

    def least_distance(self, loss: float) -> float:
        """D*(loss), least Fisher-Rao distance from here to any predictions with this mean loss.
        Cost as `least_distance`."""
        if loss < self.least_loss:
            raise InputError(
                f"target loss {loss} lies below the least possible, {self.least_loss:.6g}"
            )
        if self.log_p_y is None:
            return gaussian_least_distance(
                self.residual, float(np.sqrt(2 * (loss - self.least_loss)))
            )
        # several Bernoulli outputs an example: distances and losses add over them
        scale = self.examples / len(self.log_p_y)
        return float(log_least_distance(self.log_p_y, loss * scale) / np.sqrt(scale))
