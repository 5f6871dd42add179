"""K-FAC and EKFAC as metrics computed once on a batch (theory §1, §7)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.fisher import spectral
from thermo_opt.fisher.kronecker.blocks import Block
from thermo_opt.fisher.kronecker.columns import Columns
from thermo_opt.fisher.kronecker.estimate import estimate
from thermo_opt.fisher.kronecker.factors import working_dtype
from thermo_opt.fisher.kronecker.placement import Placed
from thermo_opt.fisher.kronecker.rules import KFAC_APPROXIMATIONS
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.metric import Bracket, Metric, check_dense, dot
from thermo_opt.fisher.predictor import Predictor
from thermo_opt.fisher.scores import FisherType


class KroneckerMetric(Metric):
    """A block-diagonal metric whose blocks know their eigenbasis, so every operation is exact for
    it.

    ``rtol``, ``atol``: with λ = 0 eigenvalues below ``max(rtol·σ_max, atol)`` count as null, σ_max
    over all blocks (the products ``a_i g_j`` for Kronecker blocks). Products cost O(out · in · (out
    + in)) a layer; the first `solve`, `split`, `dual_norm` or `diagnostics` decomposes the factors,
    O(out³ + in³), once.
    """

    def __init__(
        self,
        kind: str,
        names: Sequence[str],
        like: Sequence[Tensor],
        blocks: Sequence[Placed],
        damping: float = 0.0,
        rtol: float | None = None,
        atol: float = 0.0,
    ) -> None:
        super().__init__(names, like, damping)
        self.kind = kind
        self.blocks = tuple(blocks)
        self.work = working_dtype(self.dtype)
        self._rtol, self._atol = rtol, atol
        self._cut: float | None = None

    @property
    def cut(self) -> float:
        """The eigenvalue at and below which a direction counts as null."""
        if self._cut is None:
            values = [placed.block.eigenvalues for placed in self.blocks]
            largest = max(float(v.max()) for v in values if v.numel())
            rtol = self._rtol
            if rtol is None:
                side = max(max(v.shape[-2:], default=1) for v in values)
                rtol = spectral.default_rtol(side, self.work)
            self._cut = spectral.threshold(largest, rtol, self._atol)
        return self._cut

    def _vector(self, v: Sequence[Tensor], name: str = "v") -> list[Tensor]:
        return [t.to(self.work) for t in self.vector(v, name, cast=False)]

    def _apply(
        self, v: Sequence[Tensor], operation: Callable[[Block, Tensor], Tensor]
    ) -> list[Tensor]:
        out: list[Tensor] = [torch.empty(0)] * len(self.shapes)
        for placed in self.blocks:
            result = placed.coordinates.scatter(operation(placed.block, placed.take(v)))
            for i, tensor in zip(placed.positions, result, strict=True):
                out[i] = tensor.reshape(self.shapes[i])
        return out

    def _own(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [t.to(self.dtype) for t in v]

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        v = self._vector(v)
        product = self._apply(v, lambda block, x: block.matvec(x))
        return self._own([p.add(t, alpha=self.damping) for p, t in zip(product, v, strict=True)])

    def quadratic(self, v: Sequence[Tensor]) -> float:
        """vᵀF_λv, summed over blocks."""
        return math.fsum(self.quadratic_by_block(v).values())

    def solve(self, g: Sequence[Tensor]) -> list[Tensor]:
        return self._own(self._solve(self._vector(g, "g")))

    def _solve(self, g: list[Tensor]) -> list[Tensor]:
        cut = self.cut if self.damping == 0 else 0.0
        return self._apply(g, lambda block, x: block.solve(x, self.damping, cut))

    def dual_norm(self, g: Sequence[Tensor]) -> Bracket:
        g = self._vector(g, "g")
        value = max(dot(g, self._solve(g)), 0.0)
        return Bracket(value, value)

    def inverse_root(self, v: Sequence[Tensor]) -> list[Tensor]:
        """``F_λ^{-1/2} v`` for λ > 0, symmetric in v: what a certified preconditioner needs
        (`JacobianMetric.dual_norm`)."""
        if self.damping == 0:
            raise InputError(
                "the inverse root needs damping > 0: the undamped metric may be singular"
            )
        roots = self._apply(
            self._vector(v),
            lambda block, x: block.unproject(
                (block.eigenvalues + self.damping).rsqrt() * block.project(x)
            ),
        )
        return self._own(roots)

    def largest(self) -> float:
        """The largest eigenvalue of F_λ, over all blocks."""
        return max(float(placed.block.eigenvalues.max()) for placed in self.blocks) + self.damping

    def split(self, g: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        g = self._vector(g, "g")
        null = self._apply(g, lambda block, x: block.split(x, self.cut)[1])
        return self._own([t - n for t, n in zip(g, null, strict=True)]), self._own(null)

    def quadratic_by_block(self, v: Sequence[Tensor]) -> dict[str, float]:
        """Each block's share of ``vᵀF_λv``; the shares sum to `quadratic`."""
        v = self._vector(v)
        shares = {}
        for placed in self.blocks:
            own = [v[i] for i in placed.positions]
            damped = self.damping * dot(own, own)
            shares[placed.name] = (
                max(float(placed.block.quadratic(placed.coordinates.gather(own))), 0.0) + damped
            )
        return shares

    def diagnostics(self) -> dict[str, Any]:
        """``rank``, ``condition`` (σ_max over the least kept σ), ``trace`` of F; ``blocks``: name,
        type, shape, notes."""
        rank, least, largest = 0, math.inf, 0.0
        for placed in self.blocks:
            values = placed.block.eigenvalues
            kept = values[values > self.cut]
            rank += kept.numel()
            if kept.numel():
                least, largest = min(least, float(kept.min())), max(largest, float(kept.max()))
        return {
            "rank": rank,
            "condition": largest / least if rank else None,
            "trace": math.fsum(placed.block.trace for placed in self.blocks),
            **({} if rank else {"reason": "F = 0 on this batch"}),
            "blocks": [
                {
                    "name": placed.name,
                    "type": type(placed.block).__name__,
                    "shape": tuple(placed.block.eigenvalues.shape),
                    "notes": placed.block.notes,
                }
                for placed in self.blocks
            ],
        }

    def dense(self) -> Tensor:
        """F_λ as a (P, P) float64 matrix, assembled block by block; for P ≤ `DENSE_LIMIT`."""
        check_dense(self.size)
        full = torch.zeros(self.size, self.size, dtype=torch.float64, device=self.device)
        numbers = torch.arange(self.size, device=self.device).split(
            [math.prod(s) for s in self.shapes]
        )
        index = [t.reshape(s) for t, s in zip(numbers, self.shapes, strict=True)]
        for placed in self.blocks:
            at = placed.take(index).flatten()
            full[at[:, None], at] = placed.block.dense().double()
        return full + self.damping * torch.eye(self.size, dtype=torch.float64, device=self.device)


def kfac(model: nn.Module, batch: Any, **options: Any) -> KroneckerMetric:
    """K-FAC: one block ``A ⊗ G`` a layer (weight and bias joined), F's own block where A and G are
    independent.

    Options: those of `kronecker_metric`. Martens & Grosse 2015; Grosse & Martens 2016; Eschenhagen
    et al. 2023.
    """
    return kronecker_metric("kfac", model, batch, **options)


def ekfac(model: nn.Module, batch: Any, **options: Any) -> KroneckerMetric:
    """EKFAC: K-FAC's eigenbasis, with eigenvalues re-estimated from per-example gradients in a
    second pass.

    Options: those of `kronecker_metric`. Tied weights keep K-FAC's eigenvalues. George et al. 2018.
    """
    return kronecker_metric("ekfac", model, batch, **options)


def kronecker_metric(
    kind: Literal["kfac", "ekfac"],
    model: nn.Module,
    batch: Any,
    *,
    likelihood: str | Likelihood = "categorical",
    damping: float = 0.0,
    kfac_approx: str = "expand",
    fisher_type: FisherType = "type-2",
    samples: int = 1,
    seed: int = 0,
    rtol: float | None = None,
    atol: float = 0.0,
    max_side: int = 8192,
    **options: Any,
) -> KroneckerMetric:
    """The block-diagonal metric of a model on a batch.

    ``kfac_approx``: how positions that share a weight enter, "expand" or "reduce" (see
    `thermo_opt.fisher.kronecker.factors`). ``fisher_type``: whose Fisher: "type-2" (all classes, c
    backward passes), "mc" (``samples`` draws from the model) or "empirical" (the data's).
    ``seed``: of those draws, and of the signs that keep the loss terms of a sequence apart.
    ``max_side``: a wider side of a block keeps only the diagonal of its factor. Other options:
    those of `Predictor`.

    Embeddings: diagonal A (token frequencies); normalisation layers: one dense block of scale and
    shift (above 1024 parameters one small block a channel); tied weights: the nearest Kronecker
    product of the sum over their uses; parameters without a rule: a diagonal block, named once in a
    warning. Raises `InputError` for an unknown ``kfac_approx`` or ``fisher_type`` and for a batch
    that disagrees with the likelihood.
    """
    if kfac_approx not in KFAC_APPROXIMATIONS:
        raise InputError(
            f"kfac_approx {kfac_approx!r} is not one of {', '.join(KFAC_APPROXIMATIONS)}"
        )
    predictor = Predictor(model, batch, likelihood, copied=False, **options)
    result = estimate(
        predictor,
        Columns(predictor, fisher_type, samples, seed),
        kfac_approx,
        kind == "ekfac",
        max_side,
    )
    metric = KroneckerMetric(
        kind, predictor.names, predictor.values, result.blocks, damping, rtol, atol
    )
    metric.notes = [*predictor.notes, *result.notes]
    if result.diagonal:
        warnings.warn(result.diagonal, stacklevel=4)
    return metric
