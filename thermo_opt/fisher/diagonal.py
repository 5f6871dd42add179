"""The diagonal of the Fisher as a metric: F ≈ diag(mean_i Σ_m s_im²), s the score rows (theory
§1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.metric import Bracket, Metric, check_dense, flatten, unflatten
from thermo_opt.fisher.predictor import Predictor
from thermo_opt.fisher.scores import FisherType, check_fisher_type, score_rows


class DiagonalMetric(Metric):
    """diag(f) for one non-negative tensor a parameter; entries ≤ ``threshold`` are its null
    space."""

    kind = "diagonal"

    def __init__(
        self,
        names: Sequence[str],
        diagonal: Sequence[Tensor],
        damping: float = 0.0,
        *,
        threshold: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(names, diagonal, damping)
        self.dtype = dtype or self.dtype
        self.diagonal = [d.double() for d in diagonal]
        self.threshold = threshold

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        return [((d + self.damping) * t).to(self.dtype) for d, t in self._pairs(v)]

    def quadratic(self, v: Sequence[Tensor]) -> float:
        return sum(float(((d + self.damping) * t**2).sum()) for d, t in self._pairs(v))

    def solve(self, g: Sequence[Tensor]) -> list[Tensor]:
        return [(t * self._inverse(d)).to(self.dtype) for d, t in self._pairs(g)]

    def dual_norm(self, g: Sequence[Tensor]) -> Bracket:
        value = sum(float((t**2 * self._inverse(d)).sum()) for d, t in self._pairs(g))
        return Bracket(value, value)

    def split(self, g: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        pairs = self._pairs(g)
        inside = [torch.where(d > self.threshold, t, 0.0).to(self.dtype) for d, t in pairs]
        outside = [torch.where(d > self.threshold, 0.0, t).to(self.dtype) for d, t in pairs]
        return inside, outside

    def dense(self) -> Tensor:
        check_dense(self.size)
        return torch.diag(flatten(self.diagonal) + self.damping)

    def diagnostics(self) -> dict[str, Any]:
        entries = flatten(self.diagonal)
        kept = entries[entries > self.threshold]
        return {
            "rank": int(kept.numel()),
            "condition": float(kept.max() / kept.min()) if kept.numel() else None,
            "trace": float(entries.sum()),
            "reason": None
            if kept.numel()
            else "F = 0 on this batch, so its condition number is undefined",
        }

    def _inverse(self, d: Tensor) -> Tensor:
        if self.damping > 0:
            return 1.0 / (d + self.damping)
        kept = d > self.threshold
        return torch.where(kept, 1.0 / torch.where(kept, d, 1.0), 0.0)

    def _pairs(self, v: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [
            (d, t.double()) for d, t in zip(self.diagonal, self.vector(v, cast=False), strict=True)
        ]


def diagonal(
    model: nn.Module,
    batch: Any,
    *,
    likelihood: str | Likelihood = "categorical",
    damping: float = 0.0,
    fisher_type: FisherType = "type-2",
    samples: int = 1,
    seed: int = 0,
    **options: Any,
) -> DiagonalMetric:
    """The exact diagonal of the Fisher on the batch, from per-example score rows summed in float64.

    ``fisher_type``: "type-2" (true Fisher, all classes: c backward passes per prediction), "mc"
    (``samples`` draws from the model, unbiased, cheaper) or "empirical" (the data's fisher_type).
    Memory O(P) beside one block of rows.
    """
    predictor = Predictor(model, batch, likelihood, **options)
    check_fisher_type(predictor, fisher_type)
    total = torch.zeros(
        sum(p.numel() for p in predictor.values), dtype=torch.float64, device=predictor.device
    )
    for block in score_rows(predictor, fisher_type, samples, seed):
        total += block.double().square().sum(0)
    parts = unflatten(total / predictor.count, predictor.shapes)
    metric = DiagonalMetric(predictor.names, parts, damping, dtype=predictor.dtype)
    metric.notes = predictor.notes
    return metric
