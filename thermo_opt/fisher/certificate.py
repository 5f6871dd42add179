"""Brackets of the natural-gradient norm of a batch's own gradient, from products in the space of
outputs.

With S = BᵀJ/√n the Fisher is F = SᵀS, and the batch's gradient is g = Sᵀρ, ρ = z/√n with z the
whitened residuals (B z = r). Hence

    Δ_λ = gᵀ(F+λI)⁻¹g = χ² − min_v (|ρ − Sv|² + λ|v|²),      χ² = |ρ|²  (theory §5),

what a ridge regression of the residuals on S explains, which `thermo_opt.fisher.ridge` brackets. It
knows χ², so the upper bound starts there, instead of at |g|²/λ, and stays useful when λ is far
below F's eigenvalues.

The score rows of some examples are formed once and eliminated: half of these are those with the
largest residuals (late in training a few examples hold most of χ²), half are evenly spread over the
rest. It pays for models that use a weight many times an example, such as convolutions; for a
perceptron a product with F is so cheap that few rows are worth their Gram matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from thermo_opt.fisher import ridge
from thermo_opt.fisher.exact import JacobianMetric
from thermo_opt.fisher.metric import Bracket, flatten, unflatten
from thermo_opt.fisher.predictor import Part
from thermo_opt.fisher.scores import FisherType, score_rows

KNOWN_SHARE = (4, 16)
"""One example in so many has its score rows formed, at most and at least: fewer than that save too
few products."""

KNOWN_ROWS = 512
"""Most score rows formed (a Gram matrix of 2 MB)."""

KNOWN_ENTRIES = 2**26
"""Most numbers in them (512 MB)."""

KNOWN_WORK = 32
"""Most operations for their Gram matrix, in forward passes' (a product with F is about four)."""


def gradient_norm(
    metric: JacobianMetric, rtol: float = 0.1, max_iterations: int = 100, known: int | None = None
) -> Bracket:
    """A certified bracket of Δ_λ = gᵀF_λ⁻¹g for g = ∇L of the metric's own batch, tighter than
    `dual_norm` can be.

    Works in the space of outputs, where g is the image of the residuals and their χ² is known
    (theory §5). ``rtol``: the relative width to stop at. ``max_iterations``, ``known``: as in
    `gradient_brackets`. Needs targets. With λ = 0: the point gᵀF⁺g through the score matrix.
    """
    if metric.damping == 0:
        return metric.dual_norm(metric.predictor.loss_and_gradient()[1])
    best = Bracket(0.0, math.inf)
    for best in gradient_brackets(metric.precise(), max_iterations, known):
        if best.relative_width <= rtol:
            break
    return best


def gradient_brackets(
    metric: JacobianMetric, max_iterations: int = 100, known: int | None = None
) -> Iterator[Bracket]:
    """Monotone brackets of Δ_λ = gᵀF_λ⁻¹g, g = ∇L on the metric's batch; the first is (0, χ²) and
    costs no product.

    Needs λ > 0 and targets. ``known``: how many examples' score rows to form, at the cost of c
    backward passes on each (None: as many as pay, within `KNOWN_SHARE`, `KNOWN_ROWS`,
    `KNOWN_ENTRIES` and `KNOWN_WORK`; 0 where an example alone has more rows, as long sequences do).
    Memory: those rows, seven vectors of parameters, and 8·n·c bytes a step, beside the metric's
    own. (0, 0) where every residual is zero.
    """
    metric.predictor.require_targets("the gradient's norm")
    space = _Outputs(metric)
    rho = space.residual()
    count = space.affordable() if known is None else known
    rows = (
        space.known_rows(rho, count) if count and bool(rho.any()) and max_iterations > 0 else None
    )
    yield from ridge.brackets(
        space.push,
        space.pull,
        rho,
        metric.damping,
        known=rows,
        max_iterations=max_iterations,
        roundoff=max(metric.roundoff, 1e-16),
    )


class _Outputs:
    """S and Sᵀ of a metric on flat vectors of whitened outputs, microbatch after microbatch."""

    def __init__(self, metric: JacobianMetric) -> None:
        self.metric, self.predictor = metric, metric.predictor
        with (
            torch.no_grad(),
            self.predictor.evaluation(),
            FlopCounterMode(display=False) as counter,
        ):
            self.outputs = [
                self.predictor.call(self.predictor.values, part.inputs)
                for part in self.predictor.parts
            ]
        self.forward_work = counter.get_total_flops()
        self.empirical = metric.curvature == "empirical"
        self.shapes = [f.shape[:-1] if self.empirical else f.shape for f in self.outputs]

    def residual(self) -> Tensor:
        """ρ = z/√n, float64; for the empirical Fisher, whose B is the residual itself, z = 1."""
        chunks = []
        for part, f in zip(self.predictor.parts, self.outputs, strict=True):
            assert part.targets is not None
            z = (
                torch.ones_like(f[..., 0])
                if self.empirical
                else self.predictor.likelihood.whitened(f, part.targets)
            )
            chunks.append(self._counted(part, z).double().reshape(-1))
        return torch.cat(chunks) / self.predictor.count**0.5

    def pull(self, u: Tensor) -> Tensor:
        """Sᵀu, flat (P,), float64."""
        pieces = [
            x.view(shape)
            for x, shape in zip(u.split([s.numel() for s in self.shapes]), self.shapes, strict=True)
        ]
        pulled = self.metric.zeros()
        for part, f, x in zip(self.predictor.parts, self.outputs, pieces, strict=True):
            for total, extra in zip(
                pulled, self.metric.pull(part, self._root(part, f, x.to(f.dtype))), strict=True
            ):
                total.add_(extra)
        return flatten(pulled).double() / self.predictor.count**0.5

    def push(self, v: Tensor) -> Tensor:
        """S v for flat v."""
        vector = unflatten(v.to(self.metric.dtype), self.metric.shapes)
        out = []
        for part in self.predictor.parts:
            f, tangent = self.metric.push(part, vector)
            out.append(self._transposed(part, f, tangent).double().reshape(-1))
        return torch.cat(out) / self.predictor.count**0.5

    def affordable(self) -> int:
        """How many examples' rows are worth forming and within the limits."""
        each, size = self.shapes[0][1:].numel(), self.metric.size
        rows = min(
            KNOWN_ROWS,
            KNOWN_ENTRIES // size,
            math.isqrt(KNOWN_WORK * self.forward_work // (2 * size)),
        )
        most, least = (self.predictor.examples // share for share in KNOWN_SHARE)
        return min(most, rows // each) if rows // each >= least else 0

    def known_rows(self, rho: Tensor, count: int) -> ridge.KnownRows | None:
        """The score rows of ``count`` examples; None where they say nothing that float64 can
        resolve."""
        examples = _spread_choice(rho.view(self.predictor.examples, -1).square().sum(1), count)
        fisher_type: FisherType = "empirical" if self.empirical else "type-2"
        blocks = [
            block.double() for block in score_rows(self.predictor.subset(examples), fisher_type)
        ]
        where = torch.zeros(
            self.predictor.examples, rho.numel() // self.predictor.examples, dtype=torch.bool
        )
        where[examples] = True
        try:
            return ridge.KnownRows(
                torch.cat(blocks).div_(self.predictor.count**0.5),
                where.reshape(-1).to(rho.device),
                self.metric.damping,
            )
        except ValueError:
            return None

    def _root(self, part: Part, f: Tensor, u: Tensor) -> Tensor:
        if self.empirical:
            assert part.targets is not None
            return self.predictor.likelihood.residual(f, part.targets) * self._counted(
                part, u
            ).unsqueeze(-1)
        return self._counted(part, self.predictor.likelihood.root(f, u))

    def _transposed(self, part: Part, f: Tensor, t: Tensor) -> Tensor:
        if self.empirical:
            assert part.targets is not None
            return self._counted(
                part, (self.predictor.likelihood.residual(f, part.targets) * t).sum(-1)
            )
        return self._counted(part, self.predictor.likelihood.root_transposed(f, t))

    def _counted(self, part: Part, values: Tensor) -> Tensor:
        if part.mask is None:
            return values
        mask = part.mask if values.dim() == part.mask.dim() else part.mask.unsqueeze(-1)
        return torch.where(mask, values, 0.0)


def _spread_choice(weight: Tensor, count: int) -> Tensor:
    """Numbers, ascending, of ``count`` examples: those with the largest weight, and as many evenly
    spread over the rest."""
    order = weight.cpu().argsort(descending=True)
    first = (count + 1) // 2
    others = order[first:].sort().values
    even = torch.arange(count - first) * len(others) // max(1, count - first)
    return torch.cat([order[:first], others[even]]).sort().values
