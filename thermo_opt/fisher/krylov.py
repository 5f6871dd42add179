"""Krylov certificates for Δ_λ = gᵀ(F+λI)⁻¹g and a certified solver, from products with F alone
(theory §5).

k steps of Lanczos on F from g give the tridiagonal T_k. Gauss quadrature, ‖g‖² e₁ᵀ(T_k+λ)⁻¹e₁, is a
lower bound of Δ_λ; Gauss–Radau with a prescribed node at the spectrum's lower end, λ, is an upper
bound; both tighten with every product (Golub & Meurant, "Matrices, Moments and Quadrature", 2010,
ch. 6). Both are evaluated by recurrences on the pivots of T_k + s whose terms are all positive, so
nothing cancels.

Rounding. With full reorthogonalisation the computed T_k is that of F + E for a symmetric E no
larger than

    η = 16 u ‖F‖ + 2 ‖(the products' part along earlier basis vectors, which exact arithmetic makes
    zero)‖_F,

the first term the unit roundoff u of the products, the second measured as it happens. Since F ≼
F+E+ηI and F ≽ F+E−ηI, the Gauss rule at λ+η and the Gauss–Radau rule at λ−η (node −η) bound the
true Δ_λ. When λ ≤ 2η the products are too coarse for an upper bound better than ‖g‖²/λ, and that is
what is returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.fisher.metric import Bracket

FlatOperator = Callable[[Tensor], Tensor]
"""A linear map on float64 vectors (P,)."""


class Shifted(NamedTuple):
    """A positive semi-definite ``operator``, the ``damping`` to add to it, and how much it
    magnifies rounding."""

    operator: FlatOperator
    damping: float
    amplification: float


def brackets(
    operator: FlatOperator,
    g: Tensor,
    damping: float,
    *,
    max_iterations: int = 100,
    roundoff: float = torch.finfo(torch.float64).eps,
    amplification: float = 1.0,
) -> Iterator[Bracket]:
    """Ever tighter brackets of gᵀ(F+λI)⁻¹g, one a product with ``operator`` = F (symmetric,
    positive semi-definite).

    ``g`` (P,); ``damping`` λ > 0; ``roundoff`` the relative error u of a product, ``amplification``
    a factor by which ``operator`` magnifies it (`preconditioned`). The first bracket costs no
    product; the last is exact but for rounding when the Krylov space is exhausted. Yields (0, 0)
    for g = 0. Memory 8·k·P bytes after k products.
    """
    if not (math.isfinite(damping) and damping > 0):
        raise InputError(
            "a Krylov bracket needs damping > 0: the upper bound rests on the spectrum's lower end "
            "λ"
        )
    if not bool(torch.isfinite(g).all()):
        raise InputError("g holds NaN or infinity")
    g = g.detach().double()
    length = float(torch.linalg.vector_norm(g))
    if length == 0.0:
        yield Bracket(0.0, 0.0)
        return
    lower, upper = 0.0, length**2 / damping * (1 + 1e-14)
    yield Bracket(lower, upper)

    basis = torch.empty((0, g.numel()), dtype=torch.float64, device=g.device)
    alphas: list[float] = []
    betas: list[float] = []
    vector, stray = g / length, 0.0
    for _ in range(min(max_iterations, g.numel())):
        basis = append(basis, len(alphas), vector)
        kept = basis[: len(alphas) + 1]
        product = operator(vector).detach().double()
        if not bool(torch.isfinite(product).all()):
            raise InputError(
                "a product with the metric is not finite; check the model's weights and the batch"
            )
        # Two passes of classical Gram–Schmidt keep the basis orthogonal to working precision
        # ("twice is enough").
        first = kept @ product
        product = product - kept.T @ first
        product = product - kept.T @ (kept @ product)
        alphas.append(float(first[-1]))
        stray += (
            float((first[:-2] ** 2).sum()) + (float(first[-2]) - betas[-1]) ** 2 if betas else 0.0
        )
        beta = float(torch.linalg.vector_norm(product))
        error = 16 * roundoff * amplification * _norm(alphas, [*betas, beta]) + 2 * math.sqrt(stray)

        low, high = _rules(alphas, betas, beta, damping, error)
        # The recurrences' own scalars: a few roundings a step, all of positive terms.
        slack = 8 * (len(alphas) + 4) * torch.finfo(torch.float64).eps
        lower, upper = (
            max(lower, length**2 * low * (1 - slack)),
            min(upper, length**2 * high * (1 + slack)),
        )
        yield Bracket(min(lower, upper), upper)
        if beta <= error:  # the Krylov space is invariant: nothing more to learn
            return
        betas.append(beta)
        vector = product / beta


def bracket(
    operator: FlatOperator, g: Tensor, damping: float, *, rtol: float = 0.1, **options: Any
) -> Bracket:
    """The first of `brackets` with relative width ≤ ``rtol``, else the tightest within
    ``max_iterations`` products."""
    best = Bracket(0.0, math.inf)
    for best in brackets(operator, g, damping, **options):
        if best.relative_width <= rtol:
            break
    return best


def preconditioned(
    operator: FlatOperator, damping: float, inverse_root: FlatOperator, norm: float
) -> Shifted:
    """Brackets of gᵀ(F+λI)⁻¹g through M^{-1/2}, for any symmetric M ≽ λI such as a K-FAC
    approximation of F+λI.

    ``inverse_root`` is v ↦ M^{-1/2}v, symmetric, and ``norm`` ≥ ‖M‖. Δ_λ = bᵀB⁻¹b with b =
    M^{-1/2}g and B = M^{-1/2}(F+λI)M^{-1/2} ≽ (λ/‖M‖)I, so the certificate stays valid however poor
    M is; it tightens sooner when M is good. Use as ``brackets(p.operator, inverse_root(g),
    p.damping, amplification=p.amplification)``.
    """
    node = damping / norm

    def shifted(v: Tensor) -> Tensor:
        w = inverse_root(v)
        return inverse_root(operator(w) + damping * w) - node * v

    # F = (Λ^½J)ᵀ(Λ^½J), so rounding in J or Jᵀ reaches B through one factor ‖M^{-1/2}‖ ≤ λ^{-½} and
    # one √‖F+λI‖ ≤ √(‖B‖‖M‖).
    return Shifted(shifted, node, math.sqrt(norm / damping))


def conjugate_gradient(
    operator: FlatOperator,
    g: Tensor,
    damping: float,
    *,
    rtol: float = 1e-10,
    max_iterations: int = 10_000,
) -> tuple[Tensor, float]:
    """x with (F+λI)x = g, and a certified bound of its relative error, ‖g − F_λx‖/(λ‖x‖).

    Stops when that bound is ≤ ``rtol`` or stagnates at what the products' rounding allows. Cost:
    one product an iteration, four vectors of memory. Needs λ > 0.
    """
    g = g.detach().double()
    x, residual = torch.zeros_like(g), g.clone()
    direction, squared = residual.clone(), float(residual @ residual)
    best, since = math.inf, 0
    answer = x
    if squared == 0.0:
        return x, 0.0
    for _ in range(max_iterations):
        product = operator(direction) + damping * direction
        step = squared / float(direction @ product)
        x = x + step * direction
        residual = residual - step * product
        new = float(residual @ residual)
        error = math.sqrt(new) / (damping * float(torch.linalg.vector_norm(x)))
        since = 0 if error < 0.5 * best else since + 1
        if error < best:
            best, answer = error, x
        # Rounding ends CG's progress long before this many steps without halving the residual.
        if error <= 0.1 * rtol or since > 200 + g.numel() // 10 or new == 0.0:
            break
        direction = residual + (new / squared) * direction
        squared = new
    true = g - (operator(answer) + damping * answer)
    return answer, float(torch.linalg.vector_norm(true)) / (
        damping * float(torch.linalg.vector_norm(answer))
    )


def append(basis: Tensor, used: int, vector: Tensor) -> Tensor:
    """``basis`` (k, P) with row ``used`` set, grown by doubling."""
    if used == basis.shape[0]:
        grown = torch.empty(
            (max(8, 2 * used), vector.numel()), dtype=torch.float64, device=vector.device
        )
        grown[:used] = basis[:used]
        basis = grown
    basis[used] = vector
    return basis


def _norm(alphas: list[float], betas: list[float]) -> float:
    """A bound of ‖T_k‖ by its largest absolute row sum."""
    return max(
        a + left + right
        for a, left, right in zip(map(abs, alphas), [0.0, *betas], betas, strict=False)
    )


def _rules(
    alphas: list[float], betas: list[float], beta: float, damping: float, error: float
) -> tuple[float, float]:
    """(Gauss at λ+η, Gauss–Radau at λ−η) of e₁ᵀ(T+s)⁻¹e₁, from T's entries and the next
    off-diagonal β_k.

    With pivots p_i of T+s and ℓ_i = Π_{j<i} β_j/p_j the Gauss rule is Σ ℓ_i²/p_i. Gauss–Radau adds
    (β_k ℓ_k/p_k)²/D, where D follows from D_1 = λ−2η, D_{i+1} = λ−2η + β_i² D_i/(p_i q_i), q_i the
    pivots of T+η.
    """
    low, link, pivot, previous = 0.0, 1.0, 0.0, 0.0
    for i, a in enumerate(alphas):
        pivot = a + damping + error - (previous**2 / pivot if i else 0.0)
        if pivot <= 0:
            break
        low += link**2 / pivot
        previous = betas[i] if i < len(betas) else beta
        link *= previous / pivot

    if damping <= 2 * error:
        return low, math.inf
    base = damping - 2 * error
    high, link, gap, p, q, previous, certain = 0.0, 1.0, base, 0.0, 0.0, 0.0, True
    for i, a in enumerate(alphas):
        p = a + damping - error - (previous**2 / p if i else 0.0)
        q = a + error - (previous**2 / q if i and certain else 0.0)
        if p <= 0:
            return low, math.inf
        high += link**2 / p
        previous = betas[i] if i < len(betas) else beta
        link *= previous / p
        certain = certain and q > 0
        gap = base + (previous**2 * gap / (p * q) if certain else 0.0)
    return low, high + link**2 / gap
