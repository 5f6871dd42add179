"""The Fisher as an explicit P × P matrix, for small models and as a reference (theory §1)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.fisher.decomposed import DecomposedMetric
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.metric import check_dense
from thermo_opt.fisher.predictor import Predictor
from thermo_opt.fisher.scores import FisherType, check_fisher_type, score_rows
from thermo_opt.fisher.spectral import default_rtol, eigh, threshold


def dense(
    model: nn.Module,
    batch: Any,
    *,
    likelihood: str | Likelihood = "categorical",
    damping: float = 0.0,
    fisher_type: FisherType = "type-2",
    samples: int = 1,
    seed: int = 0,
    rtol: float | None = None,
    atol: float = 0.0,
    **options: Any,
) -> DecomposedMetric:
    """F = SᵀS/n summed over the batch in float64, then its eigendecomposition. ``metric.matrix`` is
    F, (P, P).

    ``fisher_type`` as for kind "low-rank". Eigenvalues ≤ max(rtol·σ_max, atol) count as zero;
    ``rtol`` defaults to P·machine epsilon of the model's dtype. Cost O(n·c·P² + P³) time,
    16·P² bytes; raises `InputError` beyond `DENSE_LIMIT`.
    """
    predictor = Predictor(model, batch, likelihood, **options)
    check_fisher_type(predictor, fisher_type)
    size = sum(p.numel() for p in predictor.values)
    check_dense(size)
    matrix = torch.zeros((size, size), dtype=torch.float64, device=predictor.device)
    for block in score_rows(predictor, fisher_type, samples, seed):
        rows = block.double()
        matrix.addmm_(rows.T, rows)
    return DenseMetric(predictor, matrix / predictor.count, damping, rtol, atol)


class DenseMetric(DecomposedMetric):
    """An explicit F; see `dense`."""

    kind = "dense"

    def __init__(
        self,
        predictor: Predictor,
        matrix: Tensor,
        damping: float,
        rtol: float | None = None,
        atol: float = 0.0,
    ) -> None:
        spectrum = eigh(matrix)
        relative = default_rtol(matrix.shape[0], predictor.dtype) if rtol is None else float(rtol)
        cut = threshold(float(spectrum.eigenvalues[-1]), relative, atol)
        super().__init__(predictor, spectrum.eigenvalues, spectrum.basis.T, cut, damping)
        self.matrix = matrix
        if spectrum.note:
            predictor.note(spectrum.note)

    def dense(self) -> Tensor:
        return self.matrix + self.damping * torch.eye(
            self.size, dtype=torch.float64, device=self.device
        )
