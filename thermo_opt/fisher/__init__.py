"""The Fisher metric of a model on a batch, as an operator (theory §1, §3, §5, §7).

    metric = thermo_opt.fisher.make("exact", model, (x, y), likelihood="categorical", damping=1e-3)
    metric.matvec(v); metric.quadratic(v); metric.solve(g); metric.dual_norm(g); metric.split(g);
    metric.diagnostics()

v and g are lists of tensors aligned with the model's trainable parameters.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.metric import Bracket, Metric
from thermo_opt.fisher.predictor import Batch, Predictor, gradient, kl, loss

KINDS: dict[str, str] = {
    "exact": "thermo_opt.fisher.exact:exact",
    "empirical": "thermo_opt.fisher.empirical:empirical",
    "diagonal": "thermo_opt.fisher.diagonal:diagonal",
    "low-rank": "thermo_opt.fisher.low_rank:low_rank",
    "dense": "thermo_opt.fisher.dense:dense",
    "kfac": "thermo_opt.fisher.kronecker.metric:kfac",
    "ekfac": "thermo_opt.fisher.kronecker.metric:ekfac",
    "optimizer-state": "thermo_opt.fisher.optimizer_state:optimizer_state",
}
"""Every kind of metric and where its builder lives, called as builder(model, batch, likelihood=…,
damping=…, **options)."""

__all__ = [
    "KINDS",
    "Batch",
    "Bracket",
    "Likelihood",
    "Metric",
    "Predictor",
    "gradient",
    "kl",
    "loss",
    "make",
]


def make(
    kind: str,
    model: nn.Module,
    batch: Any,
    likelihood: str | Likelihood = "categorical",
    damping: float = 0.0,
    **options: Any,
) -> Metric:
    """A metric of this kind at the model's parameters on a batch (§1, §3, §5).

    Args:
        kind: a key of `KINDS`.
        model: the module; its own parameters are never written to.
        batch: ``(inputs, targets)``; inputs a tensor, a tuple or a mapping of tensors.
        likelihood: the family of output distributions, by name or as an object.
        damping: λ of F_λ = F + λI, used alike in every method.
        **options: the kind's own. Shared by those that differentiate the model: ``parameters``
            (name → tensor: evaluate at these recorded weights), ``sigma2`` (Gaussian variance),
            ``microbatch`` (most examples processed at once).

    Raises:
        InputError: for an unknown kind, and for a batch that disagrees with the likelihood.
    """
    if kind not in KINDS:
        raise InputError(f"metric kind {kind!r} is not one of {', '.join(KINDS)}")
    module, name = KINDS[kind].split(":")
    metric: Metric = getattr(import_module(module), name)(
        model, batch, likelihood=likelihood, damping=damping, **options
    )
    return metric
