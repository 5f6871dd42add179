"""Brackets of the natural-gradient norm of a batch's own gradient, from Krylov steps in the space of outputs.

With S = BᵀJ/√n the Fisher is F = SᵀS, and the batch's gradient is g = Sᵀρ, ρ = z/√n with z the whitened residuals
(B z = r). Hence (push-through identity)

    Δ_λ = gᵀ(F+λI)⁻¹g = |ρ|² − λ ρᵀ(SSᵀ+λI)⁻¹ρ,      |ρ|² = χ²  (THEORY §5),

and a bracket of the last form is one of Δ_λ. A step costs the same two products as one with F, but the quadrature now
knows χ² as well: the upper bound starts at χ², instead of |g|²/λ, and stays useful when λ is far below F's eigenvalues.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from thermo_opt.fisher.krylov import brackets
from thermo_opt.fisher.metric import Bracket

if TYPE_CHECKING:
    from thermo_opt.fisher.exact import JacobianMetric
    from thermo_opt.fisher.predictor import Part


def gradient_brackets(metric: JacobianMetric, max_iterations: int = 100) -> Iterator[Bracket]:
    """Monotone brackets of Δ_λ = gᵀF_λ⁻¹g, g = ∇L on the metric's batch; the first is (0, χ²) and costs no product.

    Needs λ > 0 and targets. Memory 8·n·c numbers a step beside the metric's own. (0, 0) where every residual is zero.
    """
    metric.predictor.require_targets("the gradient's norm")
    space = _Outputs(metric)
    rho = space.residual()
    chi = float(rho @ rho)
    # Rounding of χ² and of the subtraction below, both relative to χ².
    slack = 8 * torch.finfo(torch.float64).eps * chi
    lower, upper = 0.0, chi + slack
    yield Bracket(lower, upper)
    if chi == 0.0:
        return
    steps = brackets(
        space.product, rho, metric.damping, max_iterations=max_iterations, roundoff=max(metric.roundoff, 1e-16)
    )
    next(steps)
    for inner in steps:
        lower = max(lower, chi - metric.damping * inner.upper - slack)
        upper = min(upper, chi - metric.damping * inner.lower + slack)
        yield Bracket(lower, max(lower, upper))


class _Outputs:
    """S and Sᵀ of a metric on flat vectors of whitened outputs, microbatch after microbatch."""

    def __init__(self, metric: JacobianMetric) -> None:
        self.metric, self.predictor = metric, metric.predictor
        self.outputs = []
        for part in self.predictor.parts:
            with torch.no_grad(), self.predictor.evaluation():
                self.outputs.append(self.predictor.call(self.predictor.values, part.inputs))
        self.empirical = metric.curvature == "empirical"
        self.shapes = [f.shape[:-1] if self.empirical else f.shape for f in self.outputs]

    def residual(self) -> Tensor:
        """ρ = z/√n, float64; for the empirical Fisher, whose B is the residual itself, z = 1."""
        chunks = []
        for part, f in zip(self.predictor.parts, self.outputs, strict=True):
            assert part.targets is not None
            z = torch.ones_like(f[..., 0]) if self.empirical else self.predictor.likelihood.whitened(f, part.targets)
            chunks.append(self._counted(part, z).double().reshape(-1))
        return torch.cat(chunks) / self.predictor.count**0.5

    def product(self, u: Tensor) -> Tensor:
        """SSᵀu."""
        pieces = [
            x.view(shape) for x, shape in zip(u.split([s.numel() for s in self.shapes]), self.shapes, strict=True)
        ]
        pulled = self.metric.zeros()
        for part, f, x in zip(self.predictor.parts, self.outputs, pieces, strict=True):
            for total, extra in zip(pulled, self.metric.pull(part, self._root(part, f, x.to(f.dtype))), strict=True):
                total.add_(extra)
        out = []
        for part in self.predictor.parts:
            f, tangent = self.metric.push(part, pulled)
            out.append(self._transposed(part, f, tangent).double().reshape(-1))
        return torch.cat(out) / self.predictor.count

    def _root(self, part: Part, f: Tensor, u: Tensor) -> Tensor:
        if self.empirical:
            assert part.targets is not None
            return self.predictor.likelihood.residual(f, part.targets) * self._counted(part, u).unsqueeze(-1)
        return self._counted(part, self.predictor.likelihood.root(f, u))

    def _transposed(self, part: Part, f: Tensor, t: Tensor) -> Tensor:
        if self.empirical:
            assert part.targets is not None
            return self._counted(part, (self.predictor.likelihood.residual(f, part.targets) * t).sum(-1))
        return self._counted(part, self.predictor.likelihood.root_transposed(f, t))

    def _counted(self, part: Part, values: Tensor) -> Tensor:
        if part.mask is None:
            return values
        mask = part.mask if values.dim() == part.mask.dim() else part.mask.unsqueeze(-1)
        return torch.where(mask, values, 0.0)
