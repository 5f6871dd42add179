"""The parts of the toolkit that claims are about, in one replaceable bundle.

Claims take every such part from an `Ingredients` object. The default bundle is the toolkit itself;
a mutant replaces one part by a wrong twin, and the claim must then fail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from thermo_opt import noise, thermodynamics
from thermo_opt.fisher.krylov import brackets
from thermo_opt.fisher.metric import Bracket
from thermo_opt.manifold import chi_squared, fisher_rao, least_distance
from thermo_opt.optim import NGDT, Dissipation
from thermo_opt.theory import flow, protocols
from thermo_opt.theory.families import Family

Array = np.ndarray


def solve(matrix: Array, g: Array) -> Array:
    """F⁺g by the spectral pseudo-inverse."""
    return flow.DenseMetric(matrix).solve(g)


def null_part(matrix: Array, g: Array) -> Array:
    """P₀g, the component of g in the null space of F."""
    values, vectors = np.linalg.eigh(matrix)
    null = vectors[:, values <= 1e-12 * values[-1]]
    return null @ (null.T @ g)


def distance(family: Family, p: Array, q: Array) -> float:
    """Closed-form Fisher–Rao distance of §10."""
    return family.distance(p, q)


def krylov(matrix: Array, g: Array, damping: float) -> Iterator[Bracket]:
    """Brackets of gᵀ(F+λI)⁻¹g, one a Lanczos step."""
    f = torch.as_tensor(matrix)
    return brackets(lambda v: f @ v, torch.as_tensor(g), damping, max_iterations=len(g))


def moments_fisher(mean: Array, square: Array, batch_size: int) -> Array:
    """Diagonal Fisher from Adam's bias-corrected moments: B(v̂ − m̂²) + m̂² (§9)."""
    return batch_size * (square - mean**2) + mean**2


def network_fisher(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Array:
    """The true Fisher of a classifier on a batch, (P, P)."""
    from thermo_opt import fisher

    return np.asarray(fisher.make("dense", model, batch).dense())


def step_size(delta: float, budget: float, eta_max: float) -> float:
    """η_T of the dissipation regulator for a step along F⁺g (§7); ``eta_max`` may be infinite."""
    eta_max = min(eta_max, 1e100)
    return Dissipation(budget, eta_max).step_size(delta, 0)


def optimizer(model: torch.nn.Module, budget: float, **options: Any) -> torch.optim.Optimizer:
    """NGD-T with the exact metric of each batch, without momentum: the optimizer the theory speaks
    of."""
    settings: dict[str, Any] = {
        "metric": "exact",
        "momentum": 0.0,
        "damping": 1e-2,
        "eta_max": 1e6,
    } | options
    return NGDT(model, budget, **settings)


def decaying_budget(initial: float, step: int) -> float:
    """Q_k = Q₀/k^{2α} with α = ¾: the budgets of §8 for stochastic gradients."""
    return initial / step**1.5


@dataclass(frozen=True)
class Ingredients:
    """One field a part; each has the signature of the toolkit's own."""

    solve: Callable[[Array, Array], Array] = solve
    null_part: Callable[[Array, Array], Array] = null_part
    dissipation: Callable[..., Array] = thermodynamics.dissipation
    length: Callable[..., float] = thermodynamics.length
    decompose: Callable[..., thermodynamics.Decomposition] = thermodynamics.decompose
    action_gap: Callable[..., float] = thermodynamics.action_gap
    least_dissipation: Callable[..., Array] = thermodynamics.least_dissipation
    optimal_durations: Callable[[Array, float], Array] = flow.optimal_durations
    fisher_rao: Callable[..., Any] = fisher_rao
    least_distance: Callable[[Array, float], float] = least_distance
    chi_squared: Callable[[Array], float] = chi_squared
    distance: Callable[[Family, Array, Array], float] = distance
    integrate: Callable[..., flow.Path] = flow.integrate
    geodesic: Callable[..., flow.Path] = flow.geodesic
    krylov: Callable[[Array, Array, float], Iterator[Bracket]] = krylov
    moments_fisher: Callable[[Array, Array, int], Array] = moments_fisher
    network_fisher: Callable[..., Array] = network_fisher
    step_size: Callable[[float, float, float], float] = step_size
    optimizer: Callable[[torch.nn.Module, float], torch.optim.Optimizer] = optimizer
    decaying_budget: Callable[[float, int], float] = decaying_budget
    noise_and_drift: Callable[..., tuple[float, float]] = noise.noise_and_drift
    balanced_transport: Callable[..., Any] = noise.balanced_transport
    drag_optimally: Callable[[float, float], protocols.TrapProtocol] = protocols.drag_optimally
    drag_linearly: Callable[[float, float], protocols.TrapProtocol] = protocols.drag_linearly
    stiffen_slowly: Callable[[float, float, float], protocols.TrapProtocol] = (
        protocols.stiffen_slowly
    )
