"""A run's first predictions, as far as its universal frontier needs them (§5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy  # whose parts load when they are used

from thermo_opt.errors import InputError
from thermo_opt.manifold import Point, log_least_distance
from thermo_opt.manifold.level_set import gaussian_least_distance


@dataclass(frozen=True)
class InitialPredictions:
    """What D*(L*) depends on, for predictions with targets.

    Attributes:
        likelihood: the output family; heteroscedastic outputs have no least loss, hence no start.
        examples: n.
        log_p_y: (rows,) float64, log p(y) of each counted target of classes, several rows per
            example when it has several Bernoulli outputs. With soft targets, of their overlap with
            the prediction, from which D* is bounded below; ``entropy`` is then their least loss.
        weights: (rows,) of mean one, or None.
        residual: sqrt(mean_i |y_i - f_i|²/σ²) of Gaussian outputs, ``width`` of them per example
            with variance ``sigma2``.
        rates, counts: (n, width) 2√λ and y of a Poisson.
        first_loss: mean loss of these predictions (nats).
    """

    likelihood: str
    examples: int
    log_p_y: np.ndarray | None = None
    residual: float = np.nan
    width: int = 0
    sigma2: float = 1.0
    weights: np.ndarray | None = None
    entropy: float = 0.0
    rates: np.ndarray | None = None
    counts: np.ndarray | None = None
    first_loss: float | None = None

    @classmethod
    def of(cls, point: Point, likelihood: str, sigma2: float = 1.0) -> InitialPredictions | None:
        """The start of a run whose first predictions are ``point``; None without targets, or
        where no least distance is known (heteroscedastic outputs)."""
        if likelihood == "heteroscedastic":
            return None
        first_loss = point.mean_loss
        if point.counts is not None:
            return cls(
                likelihood,
                point.examples,
                weights=point.weights,
                rates=point.u,
                counts=point.counts,
                first_loss=first_loss,
            )
        if point.residual is not None:
            square = np.einsum("ij,ij->i", point.residual, point.residual)
            return cls(
                likelihood,
                point.examples,
                residual=float(np.sqrt(point.mean(square))),
                width=point.residual.shape[1],
                sigma2=sigma2,
            )
        if point.log_amplitude_y is None:
            return None
        return cls(
            likelihood,
            point.examples,
            np.minimum(2 * point.log_amplitude_y, 0.0),
            weights=point.weights,
            entropy=point.entropy,
            first_loss=first_loss if point.soft is not None else None,
        )

    @cached_property
    def least_loss(self) -> float:
        """The least mean loss that any predictions have (nats): 0 for classes, the targets' entropy
        for soft ones, the density's constant for Gaussian outputs."""
        if self.counts is not None:
            y = self.counts
            return self._mean(
                (y - scipy.special.xlogy(y, y) + scipy.special.gammaln(y + 1)).sum(axis=1)
            )
        if self.log_p_y is not None:
            return self.entropy
        return 0.5 * self.width * float(np.log(2 * np.pi * self.sigma2))

    @cached_property
    def loss(self) -> float:
        """Mean loss at the start (nats)."""
        if self.first_loss is not None:
            return self.first_loss
        if self.log_p_y is not None:
            return -self._mean(self.log_p_y)
        return self.least_loss + 0.5 * self.residual**2

    def least_distance(self, loss: float) -> float:
        """D*(loss), least Fisher-Rao distance from here to any predictions with this mean loss; of
        soft targets a lower bound of it. Cost as `least_distance`."""
        if loss < self.least_loss * (1 - 1e-12) - 1e-12:
            raise InputError(
                f"target loss {loss} lies below the least possible, {self.least_loss:.6g}"
            )
        above = max(loss - self.least_loss, 0.0)
        if self.rates is not None:
            return self._poisson_distance(loss)
        if self.log_p_y is None:
            return gaussian_least_distance(self.residual, float(np.sqrt(2 * above)))
        # several Bernoulli outputs per example: distances and losses add over them
        scale = self.examples / len(self.log_p_y)
        return float(
            log_least_distance(self.log_p_y, above * scale, weights=self.weights) / np.sqrt(scale)
        )

    def _mean(self, per_row: np.ndarray) -> float:
        total = per_row.sum() if self.weights is None else per_row @ self.weights
        return float(total / self.examples)

    def _poisson_distance(self, loss: float) -> float:
        """Where the metric is flat in u = 2√λ, the nearest point with multiplier μ solves
        ``u' - u + μ (u'/2 - 2y/u') = 0``, a quadratic; μ by bracketing."""
        assert self.rates is not None
        assert self.counts is not None
        u, y = self.rates, self.counts

        def nearest(mu: float) -> np.ndarray:
            return (u + np.sqrt(u * u + 8 * mu * y * (1 + mu / 2))) / (2 + mu)

        def excess(log_mu: float) -> float:
            v = nearest(float(np.exp(log_mu)))
            nll = 0.25 * v * v - 2 * scipy.special.xlogy(y, 0.5 * v) + scipy.special.gammaln(y + 1)
            return self._mean(nll.sum(axis=1)) - loss

        if self.loss <= loss:
            return 0.0
        if excess(40.0) > 0:
            v = nearest(float(np.exp(40.0)))  # the least loss itself
        else:
            v = nearest(float(np.exp(scipy.optimize.brentq(excess, -40.0, 40.0, xtol=1e-12))))
        return float(np.sqrt(self._mean(np.square(u - v).sum(axis=1))))
