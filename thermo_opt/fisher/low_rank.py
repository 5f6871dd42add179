"""The Fisher from the singular value decomposition of its score matrix, without ever forming F
(theory §7).

F = SᵀS/n with S (n·c × P), so F's eigenvalues are the squared singular values of S/√n. Working on S
rather than on F halves the digits lost to conditioning: eigenvalues down to (machine epsilon)² of
the largest are told from zero, not epsilon.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.fisher.decomposed import DecomposedMetric
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.predictor import Predictor
from thermo_opt.fisher.scores import FisherType, check_fisher_type, score_rows

ENTRIES_LIMIT = 2**28
"""Most numbers in a score matrix (2 GB in float64)."""


def low_rank(
    model: nn.Module,
    batch: Any,
    *,
    likelihood: str | Likelihood = "categorical",
    damping: float = 0.0,
    fisher_type: FisherType = "type-2",
    samples: int = 1,
    seed: int = 0,
    rtol: float | None = None,
    **options: Any,
) -> DecomposedMetric:
    """F on the batch by the SVD of S/√n, in float64. Meant for n·c < P; right, but no cheaper than
    'dense', beyond.

    ``fisher_type``: "type-2" (true Fisher, all classes), "mc" (``samples`` draws a prediction,
    ``seed``) or "empirical". ``rtol``: singular values of S at most rtol·s_max count as zero
    (default max(shape)·machine epsilon of the model's dtype). Cost O(r²P) time with r = min(n·c,
    P), 8·r·P bytes; raises `InputError` beyond `ENTRIES_LIMIT` numbers.
    """
    predictor = Predictor(model, batch, likelihood, **options)
    check_fisher_type(predictor, fisher_type)
    return decompose(predictor, damping, fisher_type, samples, seed, rtol)


def decompose(
    predictor: Predictor,
    damping: float,
    fisher_type: FisherType = "type-2",
    samples: int = 1,
    seed: int = 0,
    rtol: float | None = None,
) -> DecomposedMetric:
    """`low_rank` from a predictor at hand."""
    rows, size = (
        row_count(predictor, fisher_type, samples),
        sum(p.numel() for p in predictor.values),
    )
    if rows * size > ENTRIES_LIMIT:
        raise InputError(
            f"the score matrix would be {rows} × {size}, {8e-9 * rows * size:.1f} GB; use a "
            "smaller batch, fisher_type='mc' "
            "or kind 'exact' with damping > 0"
        )
    scores = torch.cat(
        [block.double() for block in score_rows(predictor, fisher_type, samples, seed)]
    )
    singular, vectors = _svd(scores / predictor.count**0.5)
    relative = max(scores.shape) * torch.finfo(predictor.dtype).eps if rtol is None else float(rtol)
    largest = float(singular.max()) if singular.numel() else 0.0
    metric = DecomposedMetric(
        predictor, singular**2, vectors, max((relative * largest) ** 2, 1e-300), damping
    )
    metric.kind = "low-rank"
    return metric


def row_count(predictor: Predictor, fisher_type: FisherType, samples: int = 1) -> int:
    """How many rows S has: outputs (or draws) times predictions, counted or not."""
    part = predictor.parts[0]
    with torch.no_grad(), predictor.evaluation():
        f = predictor.call(predictor.values, part.inputs)
    each = {"type-2": f.shape[-1], "empirical": 1, "mc": samples}[fisher_type]
    return f[0].numel() // f.shape[-1] * predictor.examples * each


def _svd(scores: Tensor) -> tuple[Tensor, Tensor]:
    try:
        _, singular, vectors = torch.linalg.svd(scores, full_matrices=False)
    except (
        RuntimeError
    ):  # divide and conquer failed to converge: QR first, whose small factor is better behaved
        q, r = torch.linalg.qr(scores.T)
        left, singular, _ = torch.linalg.svd(r, full_matrices=False)
        vectors = (q @ left).T
    return singular, vectors
