"""Natural-gradient flow: its solution, the energy identity, and the action it alone makes zero
(theory §6)."""

from __future__ import annotations

import numpy as np

from thermo_opt.theory import flow
from thermo_opt.theory.verify import problems as pb
from thermo_opt.theory.verify.ingredients import Ingredients
from thermo_opt.theory.verify.networks import classifier
from thermo_opt.theory.verify.verdict import Check, at_least, equal

Array = np.ndarray


def flow_solution(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Natural-gradient flow on every family is the closed form m(t) = m* + (m₀ − m*)e^{−t} in
    expectations (§6, §10)."""
    checks = []
    for member, p, q in pb.FAMILIES:
        problem = pb.family(member, p, q)
        path = use.integrate(problem.landscape, p, 2.0, samples=9)
        error = np.abs(path.theta - member.natural_flow(p, q, path.times)).max()
        checks.append(equal(member.name, "largest error of θ(t)", 0.0, error, 1e-8))
    return checks


def energy_identity(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """L(0) − L(T) = ∫(½θ̇ᵀFθ̇ + ½Δ)dt − S on every path; −dL/dt = Δ = θ̇ᵀFθ̇ on natural-gradient
    flow (§6)."""
    checks = []
    for problem in (
        pb.ill_conditioned_quadratic(),
        pb.logistic_regression(),
        pb.overparameterised_regression(),
        pb.deep_linear(),
        pb.mixture(),
        pb.family(*pb.FAMILIES[4]),
    ):
        for name, velocity in (
            ("natural-gradient flow", None),
            ("gradient flow", lambda x, problem=problem: -problem.gradient(x)),
        ):
            path = use.integrate(
                problem.landscape, problem.start, 0.5, velocity=velocity, samples=5
            )
            checks.append(_identity(problem.name, name, path, 1e-8))
        rates = _rate_gap(use.integrate(problem.landscape, problem.start, 0.5, samples=5))
        checks.append(equal(problem.name, "θ̇ᵀFθ̇/Δ − 1 on the flow, worst", 0.0, rates, 1e-8))
    model, x, y = classifier(examples=20, hidden=4)
    scape, start = flow.network(model, (x, y), metric="low-rank", damping=0.05)
    path = use.integrate(scape, start, 0.5, samples=3, rtol=1e-7, atol=1e-9)
    checks.append(_identity("MLP on 4 × 4 images", "natural-gradient flow", path, 1e-6))
    return checks


def zero_action(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """The action S is zero on natural-gradient flow and positive on every other path (§6)."""
    checks = []
    for problem in (
        pb.ill_conditioned_quadratic(),
        pb.logistic_regression(),
        pb.family(*pb.FAMILIES[4]),
    ):
        path = use.integrate(problem.landscape, problem.start, 1.0, samples=21)
        own = flow.trace(problem.landscape, path, 1.0, samples=21)
        scale = path.loss[0] - path.loss[-1]
        checks.append(
            equal(
                problem.name,
                "S of the flow over its loss decrease",
                0.0,
                own.action[-1] / scale,
                1e-9,
            )
        )
        size = 0.05 * np.abs(problem.start - path.theta[-1]).max()
        actions = []
        for _ in range(8):
            direction = size * rng.standard_normal(len(problem.start))
            wave = float(rng.integers(1, 4)) * np.pi

            def bent(
                t: float, direction: Array = direction, wave: float = wave, path: flow.Path = path
            ) -> Array:
                return path(t) + direction * np.sin(wave * t)

            actions.append(flow.trace(problem.landscape, bent, 1.0, samples=21).action[-1])
        checks.append(
            at_least(
                problem.name,
                "least S of 8 perturbed paths over its loss decrease",
                1e-5,
                min(actions) / scale,
            )
        )
        gap, scaled = _recorded_gap(use, problem)
        checks.append(
            equal(
                problem.name,
                "action gap of recorded natural-gradient steps (nats)",
                0.0,
                gap,
                1e-12,
            )
        )
        checks.append(
            equal(
                problem.name,
                "action gap of the same steps 1.5 times too long, over ⅛Στ Δ",
                1.0,
                scaled,
                1e-9,
            )
        )
    return checks


def _rate_gap(path: flow.Path) -> float:
    """Largest relative difference of θ̇ᵀFθ̇ and Δ along a path."""
    return float(np.abs(path.a / path.delta - 1).max())


def _identity(problem: str, name: str, path: flow.Path, tolerance: float) -> Check:
    decrease = path.loss[0] - path.loss[-1]
    statement = f"{name}: ∫(½θ̇ᵀFθ̇ + ½Δ)dt − S over the loss decrease"
    return equal(problem, statement, 1.0, 1 - path.energy_defect / decrease, tolerance)


def _recorded_gap(use: Ingredients, problem: pb.Problem, steps: int = 50) -> tuple[float, float]:
    """Action gap of recorded steps δ = −ηF⁺g at τ = η; and of 1.5δ in the same time, whose gap is
    ½·(½)²·Σ τΔ."""
    theta, eta = problem.start, 1 / steps
    rows = []
    for _ in range(steps):
        matrix, g = problem.fisher(theta), problem.gradient(theta)
        step = -eta * use.solve(matrix, g)
        rows.append((step @ matrix @ step, -g @ step, g @ np.linalg.solve(matrix, g), eta))
        theta = theta + step
    a, d, delta, tau = np.array(rows).T
    return use.action_gap(a, d, delta, tau), use.action_gap(2.25 * a, 1.5 * d, delta, tau) / float(
        (tau * delta).sum() / 8
    )
