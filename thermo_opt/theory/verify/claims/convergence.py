"""Convergence statements of theory §8, with measured M and μ, and what happens where their
hypotheses fail."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy import stats
from scipy.optimize import minimize

from thermo_opt.theory.verify import problems as pb
from thermo_opt.theory.verify.ingredients import Ingredients
from thermo_opt.theory.verify.verdict import Check, at_least, at_most, equal

Array = np.ndarray


def one_step(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Where Hessian = F is constant, one natural-gradient step of η = 1 ends at the minimum
    (§8)."""
    checks = []
    for problem in (
        pb.linear_regression(),
        pb.overparameterised_regression(),
        pb.family(*pb.FAMILIES[5]),
    ):
        theta = problem.sample(rng)
        after = theta - use.solve(problem.fisher(theta), problem.gradient(theta))
        excess = problem.loss(after) - _least(problem)
        before = problem.loss(theta) - _least(problem)
        checks.append(
            equal(
                problem.name, "(L − L_min) after one step over before", 0.0, excess / before, 1e-10
            )
        )
    return checks


def fixed_step_descent(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Fixed η ≤ 1/M: L falls by at least η(1 − Mη/2)Δ a step, and linearly at rate 1 − 2μη(1 −
    Mη/2) (§8)."""
    checks = []
    for problem in (
        pb.ill_conditioned_quadratic(),
        pb.linear_regression(),
        pb.logistic_regression(),
    ):
        smooth, strong = _constants(problem, rng)
        if problem.smoothness is not None and problem.strength is not None:
            checks.append(
                equal(problem.name, "measured M", problem.smoothness, smooth, 1e-6 * smooth)
            )
            checks.append(
                equal(problem.name, "measured μ", problem.strength, strong, 1e-6 * strong)
            )
        for eta in (1 / smooth, 0.5 / smooth):
            slack, rate = -np.inf, 0.0
            theta = problem.start
            for _ in range(12):
                step, delta = _natural(use, problem, theta)
                after = theta - eta * step
                gap, scale = (
                    problem.loss(after) - problem.loss(theta),
                    problem.loss(theta) - _least(problem),
                )
                if scale < 1e-11:
                    break
                slack = max(slack, (gap + eta * (1 - smooth * eta / 2) * delta) / scale)
                rate = max(rate, 1 + gap / scale)
                theta = after
            promised = 1 - 2 * strong * eta * (1 - smooth * eta / 2)
            where = f"{problem.name}, η = {eta * smooth:g}/M"
            checks.append(
                at_most(where, "largest L⁺ − [L − η(1 − Mη/2)Δ], over L − L_min", 0.0, slack, 1e-4)
            )
            checks.append(at_most(where, "slowest rate of L − L_min a step", promised, rate, 1e-4))
    return checks


def budget_descent(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Budgeted steps: L⁺ ≤ L − √(2QΔ) + MQ, monotone while Δ ≥ M²Q/2 and, with η_max ≤ 1/M,
    throughout (§8)."""
    checks = []
    budget = 0.02
    for problem in (
        pb.ill_conditioned_quadratic(),
        pb.linear_regression(),
        pb.family(*pb.FAMILIES[5]),
    ):
        smooth = problem.smoothness or 1.0
        strong = problem.strength or 1.0
        slack, rises, clipped_rises = -np.inf, 0, 0
        theta = problem.start
        for _ in range(200):
            step, delta = _natural(use, problem, theta)
            if delta < 1e-18:
                break
            after = theta - use.step_size(delta, budget, np.inf) * step
            gap = problem.loss(after) - problem.loss(theta)
            slack = max(slack, (gap + np.sqrt(2 * budget * delta) - smooth * budget) / budget)
            rises += int(gap > 1e-13 and delta >= smooth**2 * budget / 2)
            theta = after
        where = f"{problem.name}, Q = {budget:g}"
        checks.append(at_most(where, "largest L⁺ − [L − √(2QΔ) + MQ], over Q", 0.0, slack, 1e-9))
        checks.append(equal(where, "rises while Δ ≥ M²Q/2", 0, rises, 0))
        theta, spent = problem.start, 0.0
        roots: list[float] = [float(np.sqrt(problem.loss(theta) - _least(problem)))]
        while problem.loss(theta) - _least(problem) > 1e-12 and len(roots) < 5000:
            step, delta = _natural(use, problem, theta)
            eta = use.step_size(delta, budget, 1 / smooth)
            after = theta - eta * step
            clipped_rises += int(problem.loss(after) > problem.loss(theta) + 1e-13)
            if eta < 1 / smooth:
                roots.append(float(np.sqrt(problem.loss(after) - _least(problem))))
                spent += float(use.dissipation(eta**2 * delta, 1.0))
            theta = after
        checks.append(equal(where, "rises with η_max = 1/M", 0, clipped_rises, 0))
        falls = -np.diff(roots)
        # before the clip MQ ≤ ½√(2QΔ), so E⁺ ≤ E − √(μQE) and √E falls by at least ½√(μQ)
        promised = np.sqrt(strong * budget) / 2
        bound = roots[0] / promised + 1
        checks.append(
            at_least(
                where,
                "least fall of √(L − L_min) before the clip over √(μQ)/2",
                1.0,
                falls.min(initial=np.inf) / promised,
                1e-9,
            )
        )
        checks.append(at_most(where, "budgeted steps to the clip", bound, len(roots) - 1))
        checks.append(at_most(where, "their dissipation (nats)", bound * budget, spent, 1e-12))
        if smooth == strong:
            checks.append(
                equal(
                    where,
                    "fall of √(L − L_min) over √Q where M = μ = 1, worst",
                    0.0,
                    np.abs(falls / np.sqrt(budget) - 1).max(initial=0.0),
                    1e-6,
                )
            )
    return checks


def broken_hypotheses(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Outside their hypotheses the guarantees do fail: unclipped budgets stall, η > 2/M diverges,
    no F-PL no linear rate (§8).
    """
    checks = []
    problem, budget = pb.linear_regression(), 0.02
    theta, rises, floor = problem.start, 0, []
    for _ in range(150):
        step, delta = _natural(use, problem, theta)
        after = theta - use.step_size(delta, budget, np.inf) * step
        if problem.loss(after) > problem.loss(theta) + 1e-13:
            rises += 1
            floor.append(delta / (budget / 2))
        theta = after
    checks.append(at_least(f"{problem.name}, no clip", "rises of the loss in 150 steps", 1, rises))
    checks.append(
        at_most(
            f"{problem.name}, no clip",
            "largest Δ/(M²Q/2) at a rise",
            1.0,
            max(floor, default=0.0),
            1e-9,
        )
    )
    checks.append(
        at_least(
            f"{problem.name}, no clip",
            "final L − L_min over Q: it never settles",
            1e-3,
            (problem.loss(theta) - _least(problem)) / budget,
        )
    )
    steep = pb.ill_conditioned_quadratic()
    assert steep.smoothness is not None
    theta = steep.start
    for _ in range(60):
        theta = theta - 2.1 / steep.smoothness * _natural(use, steep, theta)[0]
    checks.append(
        at_least(
            f"{steep.name}, η = 2.1/M",
            "growth of the loss in 60 steps",
            10.0,
            steep.loss(theta) / steep.loss(steep.start),
        )
    )
    place, ratios = 1.0, []
    for _ in range(400):  # L = x⁴/4 with F = 1: Δ = x⁶ falls below any 2μL
        moved = place - 0.2 * float(use.solve(np.eye(1), np.array([place**3]))[0])
        ratios.append((moved / place) ** 4)
        place = moved
    checks.append(
        at_least("quartic, no F-PL constant", "final rate a step: tends to 1", 0.98, ratios[-1])
    )
    return checks


def stochastic_budget(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Noisy gradients: Q_k = Q₀/k^{2α}, ½ < α ≤ 1, converges; a constant budget stalls at its noise
    floor (§8)."""
    problem = pb.linear_regression()
    matrix = problem.fisher(problem.start)
    root = np.linalg.cholesky(matrix)
    seeds, steps, initial = 60, 3000, 0.05

    def run(budget: float | None) -> tuple[Array, Array]:
        error = np.tile(problem.start - problem.minimum, (seeds, 1))
        history = []
        for k in range(1, steps + 1):
            noisy = (
                error @ matrix + rng.standard_normal(error.shape) @ root.T
            )  # noise covariance F: one example a step
            natural = noisy @ inverse
            delta = np.einsum("ki,ki->k", noisy, natural)
            allowed = use.decaying_budget(initial, k) if budget is None else budget
            eta = np.minimum(1.0, np.sqrt(2 * allowed / delta))
            error = error - eta[:, None] * natural
            if k in (steps // 10, steps):
                history.append(np.einsum("ki,ij,kj->k", error, matrix, error) / 2)
        return history[0], history[1]

    inverse = np.linalg.inv(matrix)
    early, late = run(None)
    constant = run(initial)[1]
    interval = stats.t.interval(0.95, seeds - 1, np.log(late).mean(), stats.sem(np.log(late)))
    where = f"{problem.name}, unit gradient noise, {seeds} seeds"
    drop = np.log(late / early)
    drop_high = drop.mean() + stats.t.ppf(0.975, seeds - 1) * stats.sem(drop)
    return [
        at_most(
            where,
            f"log L-excess ratio, step {steps} to {steps // 10}, upper 95 % limit",
            np.log(0.5),
            drop_high,
        ),
        at_most(
            where,
            "upper 95 % limit of the final excess (geometric mean, nats)",
            0.01,
            np.exp(interval[1]),
        ),
        at_least(
            where,
            "final excess under a constant budget over that limit",
            5.0,
            np.exp(np.log(constant).mean() - interval[1]),
        ),
    ]


def _natural(use: Ingredients, problem: pb.Problem, theta: Array) -> tuple[Array, float]:
    g = problem.gradient(theta)
    step = use.solve(problem.fisher(theta), g)
    return step, float(g @ step)


def _least(problem: pb.Problem) -> float:
    assert problem.loss_min is not None
    return problem.loss_min


def _constants(problem: pb.Problem, rng: np.random.Generator) -> tuple[float, float]:
    """M and μ measured over the sublevel set of the start: Taylor remainders and Δ/2(L − L_min) of
    random points and pairs.

    Extremes of random samples; where F and H are constant, polished by an optimiser, so that they
    can be compared with M and μ.
    """
    assert problem.minimum is not None
    centre, highest, size = problem.minimum, problem.loss(problem.start), len(problem.start)
    reach = 3 * np.linalg.norm(problem.start - centre)

    def inside() -> Array:
        while True:
            point = centre + reach * rng.uniform() * rng.standard_normal(size) / np.sqrt(size)
            if problem.loss(point) <= highest:
                return point

    def curvature(theta: Array, step: Array) -> float:
        rest = problem.loss(theta + step) - problem.loss(theta) - problem.gradient(theta) @ step
        return float(rest / (step @ problem.fisher(theta) @ step / 2))

    def strength(theta: Array) -> float:
        g = problem.gradient(theta)
        return float(
            g
            @ np.linalg.solve(problem.fisher(theta), g)
            / (2 * (problem.loss(theta) - _least(problem)))
        )

    points = [inside() for _ in range(2000)]
    pairs = [(x, y - x) for x, y in pairwise(points)]
    smooth, strong = max(curvature(*pair) for pair in pairs), min(strength(x) for x in points)
    if problem.smoothness is not None:
        x, step = max(pairs, key=lambda pair: curvature(*pair))
        smooth = -minimize(
            lambda v: -curvature(x, v), step, method="BFGS", options={"gtol": 1e-9}
        ).fun
        weakest = min(points, key=strength)
        strong = minimize(strength, weakest, method="BFGS", options={"gtol": 1e-9}).fun
    return float(smooth), float(strong)
