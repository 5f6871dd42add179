"""Examples that count differently: F = Σ w_i J_iᵀΛ_iJ_i / Σ w_i, and the loss and gradient alike
(theory §1).

A weight travels as one more output of which nothing is predicted: `WeightedModel` appends it to the
outputs, `WeightedLikelihood` takes it off again and multiplies by it what is summed over
predictions. Everything that is made of a predictor's sums is then weighted, brackets included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt import likelihoods
from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.models import call, outputs_of


class WeightedModel(nn.Module):
    """A model whose inputs are ``{"inputs": its own, "weights": …}`` and whose outputs have the
    weight of each prediction as their last column.

    ``targets``: of all examples, by whose shape the axis of the classes is told. Names of its
    parameters begin with ``model.``.
    """

    def __init__(self, model: nn.Module, family: Likelihood, targets: Tensor) -> None:
        super().__init__()
        self.model, self.family, self.targets = model, family, targets

    def forward(self, inputs: Any, weights: Tensor) -> Tensor:
        """(…, c + 1): outputs, then weights."""
        f = self.family.outputs(outputs_of(call(self.model, inputs)), self.targets)
        return torch.cat([f, weights.to(f).unsqueeze(-1)], dim=-1)


class WeightedLikelihood(Likelihood):
    """A family whose predictions are weighted by the last column of the outputs, √w in the roots of
    Λ."""

    def __init__(self, family: Likelihood) -> None:
        self.family, self.name, self.joint = family, family.name, family.joint

    def outputs(self, f: Tensor, targets: Tensor | None = None) -> Tensor:
        """As `WeightedModel` gives them."""
        return f

    def targets(self, f: Tensor, y: Tensor) -> Tensor:
        """The family's."""
        return self.family.targets(f[..., :-1], y)

    def mask(self, y: Tensor) -> Tensor | None:
        """The family's: a weight of zero counts nothing by itself."""
        return self.family.mask(y)

    def refuse_probabilities(self, f: Tensor) -> None:
        """As the family does."""
        self.family.refuse_probabilities(f[..., :-1])

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """w times the family's."""
        return f[..., -1] * self.family.nll(f[..., :-1], y)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """w times the family's; none in the weight."""
        return _widened(f[..., -1:] * self.family.residual(f[..., :-1], y))

    def product(self, f: Tensor, u: Tensor) -> Tensor:
        """w Λ u."""
        return _widened(f[..., -1:] * self.family.product(f[..., :-1], u[..., :-1]))

    def variance(self, f: Tensor) -> Tensor:
        """w tr Λ, of which the mean is the trace of the weighted Λ."""
        return f[..., -1] * self.family.variance(f[..., :-1])

    def root(self, f: Tensor, u: Tensor) -> Tensor:
        """√w B u."""
        return _widened(f[..., -1:].sqrt() * self.family.root(f[..., :-1], u[..., :-1]))

    def root_transposed(self, f: Tensor, u: Tensor) -> Tensor:
        """√w Bᵀu."""
        return _widened(f[..., -1:].sqrt() * self.family.root_transposed(f[..., :-1], u[..., :-1]))

    def whitened(self, f: Tensor, y: Tensor) -> Tensor:
        """√w z, as (√w B)(√w z) = w r."""
        return _widened(f[..., -1:].sqrt() * self.family.whitened(f[..., :-1], y))

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The family's."""
        return self.family.sample(f[..., :-1], generator)

    def kl(self, f: Tensor, other: Tensor) -> Tensor:
        """w KL."""
        return f[..., -1] * self.family.kl(f[..., :-1], other[..., :-1])


def weighed(
    model: nn.Module, batch: tuple[Any, Tensor], family: Likelihood, weights: Tensor
) -> tuple[WeightedModel, tuple[Any, Tensor], WeightedLikelihood]:
    """Model, batch and family with weights (leading shape of the outputs, `mean_one`)."""
    inputs, targets = batch
    return (
        WeightedModel(model, family, targets),
        ({"inputs": inputs, "weights": weights}, targets),
        WeightedLikelihood(family),
    )


def mean_one(weights: Tensor, counted: Tensor | None, leading: tuple[int, ...]) -> Tensor:
    """Weights of examples (n,) or predictions as (leading), of mean one over the counted ones.

    Raises:
        InputError: a shape that doesn't fit, negative or non-finite weights, or none that counts.
    """
    w: Tensor = likelihoods.checked_weights(weights.double(), leading)
    if counted is not None:
        w = w * counted.to(w.device)
    n = w.numel() if counted is None else int(counted.sum())
    if not float(w.sum()) > 0:
        raise InputError("no prediction has both a target that counts and a weight above 0")
    return w * (n / w.sum())


def _widened(f: Tensor) -> Tensor:
    return torch.nn.functional.pad(f, (0, 1))
