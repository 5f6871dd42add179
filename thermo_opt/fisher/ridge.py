"""Certified brackets of how much of ρ a ridge regression on S explains, from products with S and Sᵀ
(theory §5).

    Δ_λ = χ² − min_v φ(v),      φ(v) = |ρ − Sv|² + λ|v|²,      χ² = |ρ|².

Any v gives a lower bound, χ² − φ(v), and any x in the space of ρ the upper bound ψ(x) = |ρ − x|² +
|Sᵀx|²/λ; at the optimum, v = Sᵀx/λ and x = ρ − Sv, they meet (Fenchel duality). So the ends are
*values at points*, and how those points were found cannot make them wrong, only loose. They are
found by conjugate gradients for the dual, (SSᵀ + λ)x = λρ, whose x minimises ψ; v is the
combination of v's met so far with the least φ, two at a time (residual smoothing: Zhou & Walker,
SIAM J. Sci. Comput. 15, 1994).

Known rows. Where some rows S_m are held as a matrix, their share x_m is eliminated exactly by a
Cholesky factor of S_mS_mᵀ + λ. What remains is (I + S_r N⁻¹S_rᵀ) x_r = ρ_r − S_r N⁻¹S_mᵀρ_m with N
= S_mᵀS_m + λ ≼ SᵀS + λ: the conjugate gradients then see SᵀS + λ preconditioned by its part on the
subset, with smallest eigenvalue at least 1. This changes no formula above.

Rounding. A product is off by at most 16 u ‖S‖ times its argument's length. Summed along the
iteration, this bounds how far the running v is from Sᵀx/λ and the running Sv from S times v, and
both are added to the ends. The effect on Δ_λ is of the order u ‖S‖/√λ: the square root of the
condition number only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.fisher.krylov import FlatOperator, append
from thermo_opt.fisher.metric import Bracket

_EPS = torch.finfo(torch.float64).eps


class KnownRows:
    """S_m, some rows of S (r, P) in float64, where they stand (a mask of ρ's length), and the
    factor of S_mS_mᵀ + λ.

    Cost r²P for the Gram matrix and r³/3 for the factor; memory 8·r·(P + 2r) bytes. `ValueError`
    where λ is lost in the rounding of the Gram matrix.
    """

    def __init__(self, rows: Tensor, where: Tensor, damping: float) -> None:
        self.rows, self.where, self.rest = rows, where, ~where
        gram = rows @ rows.T
        self.norm = (
            math.sqrt(float(gram.abs().sum(1).max())) if len(rows) else 0.0
        )  # at least ‖S_m‖
        gram.diagonal().add_(damping)
        self._factor, failed = torch.linalg.cholesky_ex(gram)
        if int(failed):
            raise ValueError("S_mS_mᵀ + λ is not positive definite in float64")

    def solve(self, b: Tensor) -> Tensor:
        """(S_mS_mᵀ + λ)⁻¹b."""
        return torch.cholesky_solve(b.unsqueeze(1), self._factor).squeeze(1)


def brackets(
    push: FlatOperator,
    pull: FlatOperator,
    rho: Tensor,
    damping: float,
    *,
    known: KnownRows | None = None,
    max_iterations: int = 100,
    roundoff: float = _EPS,
) -> Iterator[Bracket]:
    """Ever tighter brackets of Δ_λ, one a product (``push`` = S and ``pull`` = Sᵀ) with relative
    rounding ``roundoff``.

    ``rho`` (N,) float64; ``damping`` λ > 0. The first bracket, (0, χ²), costs no product; with
    ``known`` rows the second costs one ``push``, and is exact where all are known. Memory 8·(k·N +
    7P) bytes after k products.
    """
    chi = float(rho @ rho)
    slack = 16 * _EPS * chi  # of χ² and of sums of squares that are at most about χ²
    lower, upper = 0.0, chi + slack
    yield Bracket(lower, upper)
    if chi == 0.0 or max_iterations < 1:
        return
    point = _Point(rho, damping, 16 * roundoff)
    fit = _Fit()
    residual, steps = rho, max_iterations
    if known is not None:
        z = known.solve(rho[known.where])
        image = known.rows.T @ z
        point.largest = known.norm
        point.move(1.0, _scatter(damping * z, known.where), image, _finite(push(image)))
        residual, steps = (rho - point.x - point.image)[known.rest], steps - 1
        fit.consider(point)
        lower, upper = max(lower, chi - fit.value(point) - slack), min(upper, point.dual() + slack)
        yield Bracket(min(lower, upper), upper)

    basis = torch.empty((0, residual.numel()), dtype=rho.dtype, device=rho.device)
    direction, squared = residual, float(residual @ residual)
    for k in range(min(steps, residual.numel())):
        if squared <= (16 * roundoff) ** 2 * chi:  # nothing left to learn
            return
        basis = append(basis, k, residual / math.sqrt(squared))
        d = direction if known is None else _scatter(direction, known.rest)
        pulled = _finite(pull(d))
        if known is not None:
            y = known.solve(known.rows @ pulled)
            d[known.where] = -y
            pulled = pulled - known.rows.T @ y
        w = pulled / damping
        image = _finite(push(w))
        applied = direction + (image if known is None else image[known.rest])
        curvature = float(direction @ applied)
        if curvature <= 0:  # exactly, at least |direction|²: the products are too coarse to go on
            return
        step = squared / curvature
        point.move(step, d, w, image)
        fit.consider(point)
        lower, upper = max(lower, chi - fit.value(point) - slack), min(upper, point.dual() + slack)
        yield Bracket(min(lower, upper), upper)

        # Residuals are orthogonal in exact arithmetic; kept so, convergence isn't delayed by
        # rounding.
        residual = residual - step * applied
        kept = basis[: k + 1]
        residual = residual - kept.T @ (kept @ residual)
        new = float(residual @ residual)
        direction, squared = residual + (new / squared) * direction, new


class _Point:
    """x, v ≈ Sᵀx/λ and Sv, moved together, with bounds of what rounding has put between them."""

    def __init__(self, rho: Tensor, damping: float, unit: float) -> None:
        self.rho, self.damping, self.unit = rho, damping, unit
        self.x, self.v, self.image = torch.zeros_like(rho), torch.zeros(()), torch.zeros_like(rho)
        self.largest = 0.0  # of ‖Sw‖/‖w‖ and ‖Sᵀd‖/‖d‖ met so far, for ‖S‖
        self._travel_x = self._travel_v = 0.0  # lengths of all arguments of the products

    def move(self, step: float, d: Tensor, w: Tensor, image: Tensor) -> None:
        """x += step·d, v += step·w with w = Sᵀd/λ, Sv += step·Sw."""
        length_d, length_w, length_image = map(_length, (d, w, image))
        if length_d and length_w:
            self.largest = max(
                self.largest, self.damping * length_w / length_d, length_image / length_w
            )
        self.x, self.v, self.image = self.x + step * d, self.v + step * w, self.image + step * image
        self._travel_x += abs(step) * length_d + _length(self.x)
        self._travel_v += abs(step) * length_w + _length(self.v)

    @property
    def image_error(self) -> float:
        """How far the running Sv may be from S times v."""
        return self.unit * self.largest * self._travel_v

    def dual(self) -> float:
        """ψ(x) from above."""
        error = self.unit * (self.largest * self._travel_x / self.damping + self._travel_v)
        length = _length(self.v) + error
        return float((self.rho - self.x).square().sum()) + self.damping * length**2


class _Fit:
    """The v with the least φ among combinations of those considered, its Sv, and the rounding of
    the latter."""

    def __init__(self) -> None:
        self.v: Tensor = torch.zeros(())
        self.image: Tensor = torch.zeros(())
        self.error = 0.0

    def consider(self, point: _Point) -> None:
        """Move towards the point's v as far as φ falls."""
        v, image = point.v - self.v, point.image - self.image
        curvature = float(image @ image) + point.damping * float(v @ v)
        if curvature <= 0:
            return
        slope = float((point.rho - self.image) @ image) - point.damping * float((self.v * v).sum())
        share = slope / curvature
        self.v, self.image = self.v + share * v, self.image + share * image
        self.error = abs(1 - share) * self.error + abs(share) * point.image_error

    def value(self, point: _Point) -> float:
        """φ(v) from above."""
        # The sums above round too; each by less than the unit that the products' error is counted
        # in.
        error = self.error + point.unit * (point.largest * _length(self.v) + _length(self.image))
        return (_length(point.rho - self.image) + error) ** 2 + point.damping * _length(self.v) ** 2


def _length(t: Tensor) -> float:
    return float(torch.linalg.vector_norm(t))


def _finite(product: Tensor) -> Tensor:
    if not bool(torch.isfinite(product).all()):
        raise InputError(
            "a product with the metric is not finite; check the model's weights and the batch"
        )
    return product


def _scatter(values: Tensor, where: Tensor) -> Tensor:
    whole = torch.zeros(where.shape, dtype=values.dtype, device=values.device)
    whole[where] = values
    return whole
