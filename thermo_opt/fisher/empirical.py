"""The empirical Fisher, (1/n) Σ s_i s_iᵀ with s_i = ∇ log p_θ(y_i | x_i) at the data's targets
(theory §1).

It is JᵀΛJ with Λ_i = r_i r_iᵀ, r_i the residual of prediction i, so it shares the exact Fisher's
products: no per-example gradient is ever stored, and it is never the square of the batch-mean
gradient.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from thermo_opt.fisher.exact import JacobianMetric
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.predictor import Predictor


def empirical(
    model: nn.Module,
    batch: Any,
    *,
    likelihood: str | Likelihood = "categorical",
    damping: float = 0.0,
    cache: bool = True,
    **options: Any,
) -> JacobianMetric:
    """The empirical Fisher as a matrix-free operator; options and costs as for kind "exact". The
    batch needs targets."""
    return JacobianMetric(
        Predictor(model, batch, likelihood, **options), "empirical", damping, cache=cache
    )
