"""Output distributions p(y | f): their negative log-likelihood and Fisher matrix Λ in the outputs f
(theory §1).

Outputs f are (n, c) or, for sequences, (n, t, c): one *prediction* per leading index, the
distribution's parameters along the last axis; (n,) is read as (n, 1) where a single number
describes the distribution. All results are in nats per prediction.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor
from torch.nn import functional

from thermo_opt import likelihoods
from thermo_opt.errors import InputError
from thermo_opt.likelihoods import FAMILIES, IGNORED


class Likelihood(ABC):
    """One output family. Methods act prediction by prediction; none divides by the number of
    predictions.

    Attributes:
        name: the family's.
        joint: whether all outputs of an example are one prediction, as an audit counts them,
            except of classes.
    """

    name: str = ""
    joint: bool = False

    def outputs(self, f: Tensor, targets: Tensor | None = None) -> Tensor:
        """Outputs as (..., c), classes last; raises `InputError` for what this family can't read.

        ``targets``: by whose shape the axis of the classes is told, where there are any.
        """
        likelihoods.checked_outputs(self.name, f)
        f = likelihoods.parameters_last(self.name, f, targets)
        if self.joint and f.dim() > 2 and self.name != "categorical":
            halves = f.chunk(2, -1) if self.name == "heteroscedastic" else (f,)
            return torch.cat([half.flatten(1) for half in halves], dim=-1)
        return f.unsqueeze(-1) if f.dim() == 1 else f

    def targets(self, f: Tensor, y: Tensor) -> Tensor:
        """Targets in the family's form (`thermo_opt.likelihoods`); raises `InputError` on
        disagreement."""
        y = likelihoods.checked_targets(self.name, f, y)
        return y.to(f.dtype) if self.name != "categorical" or y.is_floating_point() else y

    def mask(self, y: Tensor) -> Tensor | None:
        """Which predictions count, a bool tensor of the leading shape; None when all do."""
        mask: Tensor | None = likelihoods.counted_targets(self.name, y)
        return mask

    def refuse_probabilities(self, f: Tensor) -> None:
        """`InputError` for outputs that look like probabilities rather than logits."""
        likelihoods.refuse_probabilities(self.name, f)

    @abstractmethod
    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        """−log p(y | f), leading shape; 0 where the prediction isn't counted."""

    @abstractmethod
    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        """∂(−log p(y | f))/∂f, shape of f; 0 where the prediction isn't counted."""

    @abstractmethod
    def product(self, f: Tensor, u: Tensor) -> Tensor:
        """Λ(f) u, shape of f."""

    def variance(self, f: Tensor) -> Tensor:
        """tr Λ(f), leading shape: E|residual|² of targets drawn from the model."""
        return self.factor(f).square().sum((-2, -1))

    @abstractmethod
    def root(self, f: Tensor, u: Tensor) -> Tensor:
        """B(f) u, shape of f, with B Bᵀ = Λ(f)."""

    def root_transposed(self, f: Tensor, u: Tensor) -> Tensor:
        """B(f)ᵀu, shape of f; B is diagonal, hence symmetric, unless a family says otherwise."""
        return self.root(f, u)

    @abstractmethod
    def whitened(self, f: Tensor, y: Tensor) -> Tensor:
        """z = B⁺r, shape of f: the shortest z with B z = r, the residual; 0 where the prediction
        isn't counted."""

    def factor(self, f: Tensor) -> Tensor:
        """B(f) as a matrix, (..., c, c)."""
        units = torch.eye(f.shape[-1], dtype=f.dtype, device=f.device)
        return torch.stack([self.root(f, e.expand_as(f)) for e in units], dim=-1)

    def chi_squared(self, f: Tensor, y: Tensor) -> Tensor:
        """rᵀΛ⁺r = |z|², leading shape: its mean bounds Δ = gᵀF⁺g from above on the same batch
        (theory §5)."""
        return (self.whitened(f, y) ** 2).sum(-1)

    @abstractmethod
    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Targets drawn from the model's own p(y | f), valid for `residual`."""

    @abstractmethod
    def kl(self, f: Tensor, other: Tensor) -> Tensor:
        """KL(p_f ‖ p_other), leading shape."""

    def __repr__(self) -> str:
        return self.name


class Categorical(Likelihood):
    """Softmax over the last axis; f are logits, y class indices (leading shape), `IGNORED` not
    counted, or soft targets (shape of f), rows of which sum to 1. Λ = diag(p) − ppᵀ."""

    name = "categorical"

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point():
            return _counted(y, -(y * f.log_softmax(-1)).sum(-1))
        flat = functional.cross_entropy(
            f.reshape(-1, f.shape[-1]), y.reshape(-1), ignore_index=IGNORED, reduction="none"
        )
        return flat.view(y.shape)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point():
            return _counted(y, _softmax(f) - y)
        one_hot = torch.zeros_like(f).scatter_(-1, y.clamp_min(0).unsqueeze(-1), 1.0)
        return (_softmax(f) - one_hot).mul_((y != IGNORED).unsqueeze(-1))

    def product(self, f: Tensor, u: Tensor) -> Tensor:
        p = _softmax(f)
        pu = p * u
        return pu - p * pu.sum(-1, keepdim=True)

    def variance(self, f: Tensor) -> Tensor:
        return 1 - _softmax(f).square().sum(-1)

    def root(self, f: Tensor, u: Tensor) -> Tensor:
        # B = diag(√p) − p√pᵀ: its column y is √p_y (e_y − p), the score of class y weighted by
        # √p_y.
        p = _softmax(f)
        su = p.sqrt() * u
        return su - p * su.sum(-1, keepdim=True)

    def root_transposed(self, f: Tensor, u: Tensor) -> Tensor:
        p = _softmax(f)
        return p.sqrt() * (u - (p * u).sum(-1, keepdim=True))

    def whitened(self, f: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point():
            half = 0.5 * f.log_softmax(-1)
            return _counted(y, half.exp() - torch.where(y > 0, y * (-half).exp(), 0.0))
        counted, index = (y != IGNORED).unsqueeze(-1), y.clamp_min(0).unsqueeze(-1)
        log_p = f.log_softmax(-1)
        inverse_root = (-0.5 * log_p.gather(-1, index)).exp()
        z = (0.5 * log_p).exp().scatter_add(-1, index, -inverse_root)
        return torch.where(counted, z, 0.0)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        p = _softmax(f.detach())
        return torch.multinomial(p.reshape(-1, p.shape[-1]), 1, generator=generator).view(
            p.shape[:-1]
        )

    def kl(self, f: Tensor, other: Tensor) -> Tensor:
        log_p, log_q = f.log_softmax(-1), other.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)


class Bernoulli(Likelihood):
    """Independent binary outcomes; f are logits (..., c), y in [0, 1] of the same shape. Λ =
    diag(p(1−p))."""

    name = "bernoulli"

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(f, y, reduction="none").sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return f.sigmoid() - y

    def product(self, f: Tensor, u: Tensor) -> Tensor:
        return f.sigmoid() * (-f).sigmoid() * u

    def variance(self, f: Tensor) -> Tensor:
        return (f.sigmoid() * (-f).sigmoid()).sum(-1)

    def root(self, f: Tensor, u: Tensor) -> Tensor:
        return (f.sigmoid() * (-f).sigmoid()).sqrt() * u

    def whitened(self, f: Tensor, y: Tensor) -> Tensor:
        # (p − y)/√(p(1−p)), written so that confident logits don't divide by zero.
        return (1 - y) * (0.5 * f).exp() - y * (-0.5 * f).exp()

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.bernoulli(f.detach().sigmoid(), generator=generator)

    def kl(self, f: Tensor, other: Tensor) -> Tensor:
        change = functional.logsigmoid(f) - functional.logsigmoid(other)
        opposite = functional.logsigmoid(-f) - functional.logsigmoid(-other)
        return (f.sigmoid() * change + (-f).sigmoid() * opposite).sum(-1)


class Gaussian(Likelihood):
    """Independent normals with means f (..., c) and one known variance σ². Λ = I/σ²."""

    name = "gaussian"

    def __init__(self, sigma2: float = 1.0) -> None:
        self.sigma2 = float(sigma2)
        if not (math.isfinite(self.sigma2) and self.sigma2 > 0):
            raise InputError(f"sigma2 must be a finite number > 0, got {sigma2!r}")

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        constant = 0.5 * f.shape[-1] * math.log(2 * math.pi * self.sigma2)
        return 0.5 * ((f - y) ** 2).sum(-1) / self.sigma2 + constant

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y) / self.sigma2

    def product(self, f: Tensor, u: Tensor) -> Tensor:
        return u / self.sigma2

    def variance(self, f: Tensor) -> Tensor:
        return torch.full_like(f[..., 0], f.shape[-1] / self.sigma2)

    def root(self, f: Tensor, u: Tensor) -> Tensor:
        return u / math.sqrt(self.sigma2)

    def whitened(self, f: Tensor, y: Tensor) -> Tensor:
        return (f - y) / math.sqrt(self.sigma2)

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(f.shape, generator=generator, dtype=f.dtype, device=f.device)
        return f.detach() + math.sqrt(self.sigma2) * noise

    def kl(self, f: Tensor, other: Tensor) -> Tensor:
        return 0.5 * ((f - other) ** 2).sum(-1) / self.sigma2


class Poisson(Likelihood):
    """Independent counts with log-rates f (..., c), y ≥ 0 of the same shape. Λ = diag(eᶠ)."""

    name = "poisson"

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        return (f.exp() - y * f + torch.lgamma(y + 1)).sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        return f.exp() - y

    def product(self, f: Tensor, u: Tensor) -> Tensor:
        return f.exp() * u

    def variance(self, f: Tensor) -> Tensor:
        return f.exp().sum(-1)

    def root(self, f: Tensor, u: Tensor) -> Tensor:
        return (0.5 * f).exp() * u

    def whitened(self, f: Tensor, y: Tensor) -> Tensor:
        return (0.5 * f).exp() - y * (-0.5 * f).exp()

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.poisson(f.detach().exp(), generator=generator)

    def kl(self, f: Tensor, other: Tensor) -> Tensor:
        return (f.exp() * (f - other) - f.exp() + other.exp()).sum(-1)


class Heteroscedastic(Likelihood):
    """Independent normals whose variance is predicted too: f (..., 2c) holds c means μ, then c
    log-variances s; y (..., c). Λ = diag(e⁻ˢ, ½)."""

    name = "heteroscedastic"

    def nll(self, f: Tensor, y: Tensor) -> Tensor:
        mean, s = f.chunk(2, -1)
        return 0.5 * (math.log(2 * math.pi) + s + (mean - y) ** 2 * (-s).exp()).sum(-1)

    def residual(self, f: Tensor, y: Tensor) -> Tensor:
        mean, s = f.chunk(2, -1)
        pull = (mean - y) * (-s).exp()
        return torch.cat([pull, 0.5 * (1 - pull * (mean - y))], -1)

    def product(self, f: Tensor, u: Tensor) -> Tensor:
        return u * self._diagonal(f)

    def root(self, f: Tensor, u: Tensor) -> Tensor:
        return u * self._diagonal(f).sqrt()

    def whitened(self, f: Tensor, y: Tensor) -> Tensor:
        return self.residual(f, y) * self._diagonal(f).rsqrt()

    def sample(self, f: Tensor, generator: torch.Generator | None = None) -> Tensor:
        mean, s = f.detach().chunk(2, -1)
        noise = torch.randn(mean.shape, generator=generator, dtype=f.dtype, device=f.device)
        return mean + (0.5 * s).exp() * noise

    def kl(self, f: Tensor, other: Tensor) -> Tensor:
        (mean, s), (other_mean, other_s) = f.chunk(2, -1), other.chunk(2, -1)
        ratio = s - other_s
        gap = (mean - other_mean) ** 2 * (-other_s).exp()
        return 0.5 * (ratio.exp() - 1 - ratio + gap).sum(-1)

    @staticmethod
    def _diagonal(f: Tensor) -> Tensor:
        s = f.chunk(2, -1)[1]
        return torch.cat([(-s).exp(), torch.full_like(s, 0.5)], -1)


NAMES = FAMILIES
_FAMILIES: dict[str, type[Likelihood]] = {
    family.name: family for family in (Categorical, Bernoulli, Gaussian, Poisson, Heteroscedastic)
}


def likelihood(
    name: str | Likelihood, sigma2: float | None = None, *, joint: bool = False
) -> Likelihood:
    """The output family of this name.

    Args:
        name: one of `thermo_opt.likelihoods.FAMILIES`, or a family, which is given back.
        sigma2: the Gaussian's variance (1 if not given).
        joint: see `Likelihood`.
    """
    if isinstance(name, Likelihood):
        return name
    family = _FAMILIES[likelihoods.known(name)]
    made = Gaussian(1.0 if sigma2 is None else sigma2) if family is Gaussian else family()
    made.joint = joint
    return made


def _counted(y: Tensor, values: Tensor) -> Tensor:
    """``values`` of predictions with soft targets, 0 where these are `IGNORED`."""
    counted = y[..., 0] != IGNORED
    return torch.where(
        counted if values.dim() == counted.dim() else counted[..., None], values, 0.0
    )


def _softmax(f: Tensor) -> Tensor:
    """Softmax over the last axis."""
    # Few classes go column by column: the framework doesn't vectorise over rows shorter than a
    # register.
    return f.softmax(-1) if f.shape[-1] >= 16 else f.movedim(-1, 0).softmax(0).movedim(0, -1)
