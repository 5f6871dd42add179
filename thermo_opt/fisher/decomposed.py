"""A Fisher known by its spectral decomposition: F = Σ_j σ_j v_j v_jᵀ, everything else the null
space (theory §7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thermo_opt.fisher.metric import Bracket, Metric, check_dense, flatten, unflatten
from thermo_opt.fisher.predictor import Predictor


class DecomposedMetric(Metric):
    """F from eigenvalues (r,) ≥ 0 and orthonormal eigenvectors as rows (r, P), both float64.

    Eigenvalues ≤ ``threshold`` belong to the null space in `split` and, when λ = 0, in `solve` and
    `dual_norm`. Every product costs O(rP) and is computed in float64 whatever the model's dtype;
    `dual_norm` is a single point.
    """

    def __init__(
        self,
        predictor: Predictor,
        eigenvalues: Tensor,
        vectors: Tensor,
        threshold: float,
        damping: float = 0.0,
    ) -> None:
        super().__init__(predictor.names, predictor.values, damping)
        self.predictor = predictor
        self.notes = predictor.notes
        self.eigenvalues, self.vectors, self.threshold = eigenvalues, vectors, threshold
        self._kept = eigenvalues > threshold

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        x = self._flat(v)
        return self._lists(
            self.vectors.T @ (self.eigenvalues * (self.vectors @ x)) + self.damping * x
        )

    def quadratic(self, v: Sequence[Tensor]) -> float:
        x = self._flat(v)
        return float(self.eigenvalues @ (self.vectors @ x) ** 2 + self.damping * (x @ x))

    def solve(self, g: Sequence[Tensor]) -> list[Tensor]:
        x = self._flat(g)
        along = self.vectors @ x
        if self.damping == 0:
            return self._lists(self.vectors.T @ torch.where(self._kept, along / self._safe, 0.0))
        outside = x - self.vectors.T @ along
        return self._lists(
            self.vectors.T @ (along / (self.eigenvalues + self.damping)) + outside / self.damping
        )

    def dual_norm(self, g: Sequence[Tensor]) -> Bracket:
        x = self._flat(g)
        along = self.vectors @ x
        if self.damping == 0:
            value = float(torch.where(self._kept, along**2 / self._safe, 0.0).sum())
        else:
            outside = x - self.vectors.T @ along
            value = float(
                (along**2 / (self.eigenvalues + self.damping)).sum()
                + (outside @ outside) / self.damping
            )
        return Bracket(value, value)

    def split(self, g: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        x = self._flat(g)
        basis = self.vectors[self._kept]
        inside = basis.T @ (basis @ x)
        return self._lists(inside), self._lists(x - inside)

    def dense(self) -> Tensor:
        check_dense(self.size)
        matrix = (self.vectors.T * self.eigenvalues) @ self.vectors
        matrix.diagonal().add_(self.damping)
        return matrix

    def diagnostics(self) -> dict[str, Any]:
        kept = self.eigenvalues[self._kept]
        return {
            "rank": int(kept.numel()),
            "condition": float(kept.max() / kept.min()) if kept.numel() else None,
            "trace": float(self.eigenvalues.sum()),
            "reason": None
            if kept.numel()
            else "F = 0 on this batch, so its condition number is undefined",
        }

    @property
    def _safe(self) -> Tensor:
        return torch.where(self._kept, self.eigenvalues, 1.0)

    def _flat(self, v: Sequence[Tensor]) -> Tensor:
        return flatten([t.double() for t in self.vector(v, cast=False)])

    def _lists(self, x: Tensor) -> list[Tensor]:
        return unflatten(x.to(self.dtype), self.shapes)
