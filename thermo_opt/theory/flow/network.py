"""A network as a landscape: flows and energy identities on real models, with any of the `fisher`
metrics."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from thermo_opt.theory.flow.landscape import Landscape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from thermo_opt.fisher import Metric

Array = NDArray[np.float64]


class _Flat:
    """A `fisher` metric acting on flat NumPy vectors."""

    def __init__(self, metric: Metric, parameters: Sequence[Tensor]) -> None:
        self.metric, self.parameters = metric, parameters

    def quadratic(self, v: Array) -> float:
        return self.metric.quadratic(_unflatten(v, self.parameters))

    def solve(self, g: Array) -> Array:
        return _flatten(self.metric.solve(_unflatten(g, self.parameters)))


def network(
    model: torch.nn.Module,
    batch: tuple[torch.Tensor, torch.Tensor],
    *,
    likelihood: str = "categorical",
    metric: str = "low-rank",
    damping: float = 1e-3,
    sigma2: float = 1.0,
    **options: Any,
) -> tuple[Landscape, Array]:
    """A network as a landscape over its trainable parameters, flat in their order.

    Works on a float64 copy: the model is left as it is. Cost: one metric per right-hand side.

    Args:
        model: the module.
        batch: inputs and targets; their mean loss is L and they are the probe.
        likelihood: "categorical", "bernoulli" or "gaussian".
        metric: a kind of `thermo_opt.fisher.make` ("low-rank" is exact on a small batch).
        damping: λ of F + λI, in a and Δ alike: keeps the flow smooth where F's rank changes.
        sigma2: the Gaussian variance.
        **options: the metric's own.

    Returns:
        The landscape, and the present θ, (P,).
    """
    from thermo_opt import fisher
    from thermo_opt.fisher.predictor import Predictor

    twin = copy.deepcopy(model).double()
    names, parameters = zip(
        *((n, p.detach()) for n, p in twin.named_parameters() if p.requires_grad), strict=True
    )
    inputs, targets = (t.double() if t.is_floating_point() else t for t in batch)
    variance = sigma2 if likelihood == "gaussian" else None
    extra = {**options, "sigma2": sigma2} if variance else options

    def at(theta: Array) -> Predictor:
        values = dict(zip(names, _unflatten(theta, parameters), strict=True))
        return Predictor(twin, (inputs, targets), likelihood, parameters=values, sigma2=variance)

    def metric_at(theta: Array) -> _Flat:
        values = dict(zip(names, _unflatten(theta, parameters), strict=True))
        made = fisher.make(
            metric,
            twin,
            (inputs, targets),
            likelihood=likelihood,
            damping=damping,
            parameters=values,
            **extra,
        )
        return _Flat(made, parameters)

    landscape = Landscape(
        name=type(model).__name__,
        metric=metric_at,
        loss=lambda theta: at(theta).loss(),
        gradient=lambda theta: _flatten(at(theta).loss_and_gradient()[1]),
        predict=lambda theta: at(theta).outputs().numpy(),
        targets=targets.numpy(),
        likelihood=likelihood,
        sigma2=sigma2,
    )
    return landscape, _flatten(parameters)


def _flatten(tensors: Sequence[Tensor]) -> Array:
    return np.concatenate([t.detach().double().reshape(-1).numpy() for t in tensors])


def _unflatten(v: Array, like: Sequence[Tensor]) -> list[Tensor]:
    import torch

    parts = np.split(np.asarray(v, dtype=np.float64), np.cumsum([p.numel() for p in like])[:-1])
    return [
        torch.from_numpy(part.copy()).reshape(p.shape) for part, p in zip(parts, like, strict=True)
    ]
