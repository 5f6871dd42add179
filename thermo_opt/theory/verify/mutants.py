"""Deliberately wrong twins of the toolkit's parts: each claim must reject its own, or it would
notice nothing.

They are the mistakes people make: a factor 2, a square root, coordinates taken for geometry, the
square of the batch gradient taken for the Fisher metric, a metric in one place and another
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from thermo_opt import noise, thermodynamics
from thermo_opt.fisher.metric import Bracket
from thermo_opt.manifold import fisher_rao, least_distance
from thermo_opt.theory import flow
from thermo_opt.theory import protocols as pr
from thermo_opt.theory.families import Family
from thermo_opt.theory.verify import ingredients as true
from thermo_opt.theory.verify.ingredients import Ingredients

Array = np.ndarray


@dataclass(frozen=True)
class Mutant:
    """A claim's name, what is wrong, and the toolkit with that one part replaced."""

    claim: str
    name: str
    ingredients: Ingredients


def _identity(matrix: Array, g: Array) -> Array:
    return g.copy()


def _doubled(matrix: Array, g: Array) -> Array:
    return true.solve(2 * matrix, g)


def _halved(matrix: Array, g: Array) -> Array:
    return true.solve(matrix / 2, g)


def _damped(matrix: Array, g: Array) -> Array:
    return true.solve(matrix + 0.1 * np.eye(len(g)), g)


def _step_root_two(delta: float, budget: float, eta_max: float) -> float:
    return min(eta_max, float(np.sqrt(2)) * true.step_size(delta, budget, np.inf))


def _step_heat(delta: float, budget: float, eta_max: float) -> float:
    return min(eta_max, budget / delta)


def _step_secretly_clipped(delta: float, budget: float, eta_max: float) -> float:
    return true.step_size(delta, budget, min(eta_max, 1.0))


def _uneven_decomposition(a: Any, tau: Any, geodesic: float) -> thermodynamics.Decomposition:
    parts = thermodynamics.decompose(a, tau, geodesic)
    return replace(parts, pacing=parts.pacing + (parts.detour or 0.0))


def _distance_off(family: Family, p: Array, q: Array) -> float:
    """Each family's classic slip: a factor 2 or √2 forgotten."""
    return family.distance(p, q) / (np.sqrt(2) if family.name.startswith("normal") else 2)


def _half_log_ratio(family: Family, p: Array, q: Array) -> float:
    """The dual (Kullback–Leibler) pseudo-distance √(2 KL), right only for near points and flat
    families."""
    return float(np.sqrt(2 * family.divergence(p, q)))


def _straight(
    landscape: flow.Landscape,
    start: Array,
    end: Array,
    duration: float = 1.0,
    *,
    samples: int = 101,
    **_: Any,
) -> flow.Path:
    """The straight line in coordinates, taken for a geodesic."""
    return flow.trace(
        landscape, lambda t: start + t / duration * (end - start), duration, samples=samples
    )


def _uneven(
    landscape: flow.Landscape,
    start: Array,
    end: Array,
    duration: float = 1.0,
    *,
    samples: int = 101,
    **options: Any,
) -> flow.Path:
    """The geodesic's points at the wrong times."""
    path = flow.geodesic(landscape, start, end, duration, samples=samples, **options)
    return flow.trace(
        landscape,
        lambda t: path(t + 0.1 * np.sin(np.pi * t / duration) ** 2),
        duration,
        samples=samples,
    )


def _gradient_flow(
    landscape: flow.Landscape, *arguments: Any, velocity: Any = None, **options: Any
) -> flow.Path:
    return flow.integrate(
        landscape, *arguments, velocity=velocity or (lambda x: -landscape.gradient(x)), **options
    )


def _optimizer(**wrong: Any) -> Any:
    return lambda model, budget: true.optimizer(
        model, wrong.get("scale", 1.0) * budget, **wrong.get("options", {})
    )


class _Mismatched:
    """Δ by one metric, a by another half as large."""

    def __init__(self, metric: flow.LocalMetric) -> None:
        self.metric = metric

    def quadratic(self, v: Array) -> float:
        return self.metric.quadratic(v) / 2

    def solve(self, g: Array) -> Array:
        return self.metric.solve(g)


def _mismatched_flow(landscape: flow.Landscape, *arguments: Any, **options: Any) -> flow.Path:
    return flow.integrate(
        replace(landscape, metric=lambda x: _Mismatched(landscape.metric(x))), *arguments, **options
    )


def _unhalved_conjugate(*arguments: Any, **options: Any) -> flow.Path:
    path = flow.integrate(*arguments, **options)
    return replace(path, conjugate=2 * path.conjugate)


def _half_speed(landscape: flow.Landscape, *arguments: Any, **options: Any) -> flow.Path:
    return flow.integrate(
        landscape,
        *arguments,
        velocity=lambda x: -landscape.metric(x).solve(landscape.gradient(x)) / 2,
        **options,
    )


def _unhalved_gap(a: Any, d: Any, delta: Any, tau: Any) -> float:
    return thermodynamics.action_gap(2 * np.asarray(a), d, delta, tau)


def _batch_gradient_squared(
    model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]
) -> Array:
    loss = torch.nn.functional.cross_entropy(model(batch[0]), batch[1])
    g = torch.cat(
        [t.reshape(-1) for t in torch.autograd.grad(loss, list(model.parameters()))]
    ).numpy()
    return np.outer(g, g)


def _empirical(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Array:
    from thermo_opt import fisher

    return np.asarray(fisher.make("empirical", model, batch).dense())


def _doubled_krylov(matrix: Array, g: Array, damping: float) -> Iterator[Bracket]:
    return true.krylov(2 * matrix, g, damping)


def _damping_twice(matrix: Array, g: Array, damping: float) -> Iterator[Bracket]:
    return true.krylov(matrix, g, 2 * damping)


def _gauss_twice(matrix: Array, g: Array, damping: float) -> Iterator[Bracket]:
    return (Bracket(b.lower, b.lower * (1 + 1e-6)) for b in true.krylov(matrix, g, damping))


def _uniform_frontier(p_y: Array, target_loss: float) -> float:
    """Every example turned by the same angle until the loss is met."""
    angles = np.arccos(np.sqrt(p_y))
    low, high = 0.0, float(angles.max())
    for _ in range(100):
        middle = (low + high) / 2
        loss = -2 * np.log(np.cos(np.maximum(angles - middle, 0))).mean()
        low, high = (middle, high) if loss > target_loss else (low, middle)
    return float(2 * np.sqrt(np.mean(np.minimum(angles, low) ** 2)))


def _one_step_alone(delta: Array, other: Array) -> tuple[float, float]:
    """The whole step taken for drift, the gap to its replica for noise."""
    return noise.noise_and_drift(delta, other)[0], 0.5 * float((delta**2).sum()) / len(delta)


def _gap_unhalved(delta: Array, other: Array) -> tuple[float, float]:
    apart, drift = noise.noise_and_drift(delta, other)
    return 2 * apart, drift


def _all_drift_arrives(adjacent: Any, drift: Array, at: Any, total: int) -> Any:
    moved = noise.balanced_transport(adjacent, drift, at, total)
    return replace(moved, total=noise.over_run(drift, at, total)) if moved else None


def _mutant(claim: str, name: str, **parts: Any) -> Mutant:
    return Mutant(claim, name, Ingredients(**parts))


MUTANTS: tuple[Mutant, ...] = (
    _mutant("speed-cost-bound", "Δ of a metric off by 2", solve=_doubled),
    _mutant("speed-cost-bound", "damping in Δ but not in a", solve=_damped),
    _mutant("speed-cost-bound", "identity instead of F⁺", solve=_identity),
    _mutant("least-dissipation-direction", "identity instead of F⁺", solve=_identity),
    _mutant("least-dissipation-direction", "Δ of a metric off by 2", solve=_doubled),
    _mutant("least-dissipation-direction", "damped direction", solve=_damped),
    _mutant(
        "least-dissipation-direction",
        "least dissipation without the ½",
        least_dissipation=lambda d, delta, tau=1.0: (
            2 * thermodynamics.least_dissipation(d, delta, tau)
        ),
    ),
    _mutant(
        "path-inequalities",
        "unit sphere instead of radius 2",
        fisher_rao=lambda p, q: fisher_rao(p, q) / 2,
    ),
    _mutant(
        "path-inequalities",
        "total-variation distance",
        fisher_rao=lambda p, q: float(np.sqrt(np.mean(np.abs(p - q).sum(-1) ** 2))),
    ),
    _mutant(
        "path-inequalities",
        "dissipation without the ½",
        dissipation=lambda a, tau: 2 * thermodynamics.dissipation(a, tau),
    ),
    _mutant(
        "path-inequalities",
        "frontier twice as far",
        least_distance=lambda p, loss: 2 * least_distance(p, loss),
    ),
    _mutant("path-inequalities", "every example turned alike", least_distance=_uniform_frontier),
    _mutant("decomposition", "pacing measured from the geodesic", decompose=_uneven_decomposition),
    _mutant(
        "constant-speed",
        "equal durations",
        optimal_durations=lambda a, t: np.full(len(a), t / len(a)),
    ),
    _mutant(
        "constant-speed",
        "durations in proportion to a",
        optimal_durations=lambda a, t: t * a / a.sum(),
    ),
    _mutant("constant-speed", "length by squares", length=lambda a: float(np.sqrt(np.sum(a)))),
    _mutant("budget-saturation", "η_T off by √2", step_size=_step_root_two),
    _mutant("budget-saturation", "heat regulator", step_size=_step_heat),
    _mutant("budget-saturation", "identity instead of F⁺", solve=_identity),
    _mutant("budget-saturation", "NGD-T with twice the budget", optimizer=_optimizer(scale=2.0)),
    _mutant(
        "budget-saturation",
        "NGD-T with the heat regulator",
        optimizer=_optimizer(options={"regulator": "heat"}),
    ),
    _mutant(
        "budget-saturation",
        "NGD-T with a diagonal metric",
        optimizer=_optimizer(options={"metric": "diagonal"}),
    ),
    _mutant("closed-forms", "a factor 2 or √2 forgotten", distance=_distance_off),
    _mutant("closed-forms", "√(2 KL) as distance", distance=_half_log_ratio),
    _mutant("geodesics", "straight line in coordinates", geodesic=_straight),
    _mutant("least-dissipation-protocol", "straight line in coordinates", geodesic=_straight),
    _mutant("least-dissipation-protocol", "geodesic at uneven speed", geodesic=_uneven),
    _mutant("reparametrization", "identity instead of F⁺", solve=_identity),
    _mutant("reparametrization", "damping in coordinates", solve=_damped),
    _mutant("null-space", "null part as g − F⁺g", null_part=lambda f, g: g - true.solve(f, g)),
    _mutant("null-space", "Tikhonov instead of pseudo-inverse", solve=_damped),
    _mutant(
        "fisher-is-kl-curvature",
        "square of the batch gradient",
        network_fisher=_batch_gradient_squared,
    ),
    _mutant("fisher-is-kl-curvature", "empirical Fisher", network_fisher=_empirical),
    _mutant(
        "fisher-is-kl-curvature",
        "metric off by 2",
        network_fisher=lambda m, b: 2 * true.network_fisher(m, b),
    ),
    _mutant("flow-solution", "gradient flow", integrate=_gradient_flow),
    _mutant("flow-solution", "flow of a metric off by 2", integrate=_half_speed),
    _mutant("energy-identity", "∫Δ instead of ∫½Δ", integrate=_unhalved_conjugate),
    _mutant("energy-identity", "a and Δ of different metrics", integrate=_mismatched_flow),
    _mutant("zero-action", "gradient flow", integrate=_gradient_flow),
    _mutant("zero-action", "action gap without the ½", action_gap=_unhalved_gap),
    _mutant("one-step", "identity instead of F⁺", solve=_identity),
    _mutant("one-step", "metric off by 2", solve=_doubled),
    _mutant("fixed-step-descent", "metric off by ½", solve=_halved),
    _mutant("fixed-step-descent", "identity instead of F⁺", solve=_identity),
    _mutant("budget-descent", "η_T off by √2", step_size=_step_root_two),
    _mutant("budget-descent", "heat regulator", step_size=_step_heat),
    _mutant("broken-hypotheses", "a clip where none is meant", step_size=_step_secretly_clipped),
    _mutant("stochastic-budget", "constant budget", decaying_budget=lambda initial, k: initial),
    _mutant(
        "stochastic-budget",
        "budgets that sum too soon (α = 2)",
        decaying_budget=lambda initial, k: initial / k**4,
    ),
    _mutant(
        "chi-squared", "plain squared residual", chi_squared=lambda p: float(np.mean((1 - p) ** 2))
    ),
    _mutant(
        "chi-squared",
        "odds by the mean probability",
        chi_squared=lambda p: float(1 / np.mean(p) - 1),
    ),
    _mutant("krylov-bracket", "metric off by 2", krylov=_doubled_krylov),
    _mutant("krylov-bracket", "damping counted twice", krylov=_damping_twice),
    _mutant("krylov-bracket", "Gauss rule for both ends", krylov=_gauss_twice),
    _mutant("optimizer-state", "v̂ taken for the Fisher diagonal", moments_fisher=lambda m, v, b: v),
    _mutant(
        "optimizer-state", "B·v̂ without removing the mean", moments_fisher=lambda m, v, b: b * v
    ),
    _mutant(
        "noise-and-drift", "drift of the step taken, no replica", noise_and_drift=_one_step_alone
    ),
    _mutant("noise-and-drift", "two steps' noise for one's", noise_and_drift=_gap_unhalved),
    _mutant(
        "noise-and-drift", "all drift taken for transport", balanced_transport=_all_drift_arrives
    ),
    _mutant("trap-dragging", "optimum without its jumps", drag_optimally=pr.drag_linearly),
    _mutant("trap-dragging", "jumps in the linear protocol", drag_linearly=pr.drag_optimally),
    _mutant("trap-stiffness", "stiffness linear in time", stiffen_slowly=pr.stiffen_linearly),
)
