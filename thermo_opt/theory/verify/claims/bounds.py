"""The speed–cost bound, its saturation, and the inequalities of finite paths (theory §3–5, §7)."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import torch
from scipy.optimize import brentq, minimize

from thermo_opt.theory.verify import problems as pb
from thermo_opt.theory.verify.ingredients import Ingredients
from thermo_opt.theory.verify.networks import classifier, flat
from thermo_opt.theory.verify.verdict import Check, at_least, at_most, equal

Array = np.ndarray


def speed_cost_bound(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """d² ≤ aΔ for every step, with equality along F⁺g; with damping λ in a and Δ alike (§3)."""
    checks = []
    for damping in (0.0, 0.1):
        worst, saturated = 0.0, []
        for problem in pb.all_problems():
            theta = problem.sample(rng)
            matrix = problem.fisher(theta) + damping * np.eye(len(theta))
            g = problem.gradient(theta)
            g = g - _null(matrix, g)  # the bound speaks of the range part only
            natural = use.solve(matrix, g)
            delta = float(g @ natural)
            steps = rng.standard_normal((400, len(theta)))
            d = -steps @ g
            a = np.einsum("ki,ij,kj->k", steps, matrix, steps)
            worst = max(worst, float((d[a > 0] ** 2 / (a[a > 0] * delta)).max()))
            saturated.append((g @ natural) ** 2 / (natural @ matrix @ natural * delta))
        where = f"{len(saturated)} problems, λ = {damping:g}"
        checks.append(
            at_most(where, "largest d²/(aΔ) over 400 random steps each", 1.0, worst, 1e-9)
        )
        gap = max(abs(s - 1) for s in saturated)
        checks.append(equal(where, "|d²/(aΔ) − 1| along −F⁺g, worst problem", 0.0, gap, 1e-9))
    return checks


def least_dissipation_direction(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Among velocities with −gᵀv = r, dissipation is least at v = −(r/Δ)F⁺g alone, and is r²/2Δ
    there (§3, uniqueness).
    """
    checks = []
    for problem in (
        pb.ill_conditioned_quadratic(),
        pb.logistic_regression(),
        pb.mixture(),
        pb.family(*pb.FAMILIES[4]),
        pb.family(*pb.FAMILIES[6]),
    ):
        theta = problem.sample(rng)
        matrix, g, rate = problem.fisher(theta), problem.gradient(theta), 0.7
        natural = use.solve(matrix, g)
        delta = float(g @ natural)
        best = -rate / delta * natural
        predicted = float(use.least_dissipation(rate, delta))
        checks.append(
            equal(
                problem.name,
                "½vᵀFv at v*, over r²/2Δ",
                1.0,
                best @ matrix @ best / 2 / predicted,
                1e-9,
            )
        )
        found = [_constrained_minimum(matrix, g, rate, rng) for _ in range(6)]
        worst = max(abs(v @ matrix @ v / 2 / predicted - 1) for v in found)
        checks.append(
            equal(
                problem.name,
                "SciPy's constrained minimum over r²/2Δ, − 1, worst of 6 starts",
                0.0,
                worst,
                1e-6,
            )
        )
        away = max(np.sqrt((v - best) @ matrix @ (v - best) / (2 * predicted)) for v in found)
        checks.append(equal(problem.name, "its distance from v*, relative", 0.0, away, 1e-3))
        rivals = rng.standard_normal((10_000, len(theta))) * np.exp(rng.uniform(-6, 2, (10_000, 1)))
        rivals = best + rivals - np.outer(rivals @ g, g) / (g @ g)
        excess = np.einsum("ki,ij,kj->k", rivals, matrix, rivals) / 2 - predicted
        checks.append(
            at_least(
                problem.name,
                "least excess of 10⁴ rivals with the same r",
                0.0,
                excess.min() / predicted,
                1e-9,
            )
        )
        apart = rivals - best
        lost = np.einsum("ki,ij,kj->k", apart, matrix, apart) / 2
        error = np.abs(excess - lost).max() / max(lost.max(), predicted)
        checks.append(
            equal(
                problem.name,
                "a rival's excess is ½|v − v*|²_F: largest departure",
                0.0,
                error,
                1e-9,
            )
        )
    return checks


def path_inequalities(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Q ≥ ℒ²/2T ≥ D²/2T ≥ D*²/2T on every path, all four equal on the frontier's own path (§4,
    §5)."""
    slack = np.full(3, np.inf)
    for _ in range(20):
        n, c = int(rng.integers(3, 12)), int(rng.integers(2, 6))
        y = rng.integers(c, size=n)
        logits = np.cumsum(rng.standard_normal((30, n, c)) * np.exp(rng.uniform(-3, 0)), axis=0)
        logits[:, np.arange(n), y] += np.linspace(0, 3, 30)[:, None]
        path = _softmax(logits)
        q, shortest = _summarise(use, path)
        end_loss = float(-np.log(path[-1][np.arange(n), y]).mean())
        frontier = use.least_distance(path[0][np.arange(n), y], end_loss) ** 2 / (2 * 29)
        slack = np.minimum(slack, np.diff([frontier, shortest, q[1], q[0]])[::-1] / q[0])
    names = ("Q − ℒ²/2T", "ℒ²/2T − D²/2T", "D²/2T − D*²/2T")
    checks = [
        at_least("20 random training paths", f"least {name}, relative to Q", 0.0, s, 1e-12)
        for name, s in zip(names, slack, strict=True)
    ]
    n, c = 8, 4
    start = rng.dirichlet(np.ones(c), size=n)
    y = rng.integers(c, size=n)
    angles = np.arccos(np.sqrt(start[np.arange(n), y]))
    goal = 0.3
    nearest = _frontier_angles(angles, goal)
    path = np.stack(
        [_turn(start, y, angles + s * (nearest - angles)) for s in np.linspace(0, 1, 31)]
    )
    q, shortest = _summarise(use, path)
    frontier = use.least_distance(start[np.arange(n), y], goal) ** 2 / (2 * 30)
    least = float(np.mean((2 * (nearest - angles)) ** 2)) / (2 * 30)
    for name, value in (("Q", q[0]), ("ℒ²/2T", q[1]), ("D²/2T", shortest), ("D*²/2T", frontier)):
        checks.append(
            equal("frontier path", f"{name} over ½∫ of its speed squared", 1.0, value / least, 1e-9)
        )
    program = minimize(
        lambda x: np.sum((x - angles) ** 2),
        angles,
        jac=lambda x: 2 * (x - angles),
        constraints={
            "type": "ineq",
            "fun": lambda x: goal + 2 * np.mean(np.log(np.cos(x))),
            "jac": lambda x: -2 * np.tan(x) / n,
        },
        bounds=[(0, 1.56)] * n,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    solved = 2 * np.sqrt(program.fun / n)
    checks.append(
        equal(
            "frontier program",
            "D* by SciPy's constrained optimiser over D*",
            1.0,
            solved / np.sqrt(60 * frontier),
            1e-5,
        )
    )
    return checks


def decomposition(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Q splits into irreducible, detour and pacing, each non-negative, with straightness ×
    steadiness = efficiency (§4).
    """
    worst, least, product = 0.0, np.inf, 0.0
    for _ in range(50):
        k = int(rng.integers(2, 40))
        tau = rng.uniform(0.1, 2.0, k)
        path = _softmax(np.cumsum(rng.standard_normal((k + 1, 5, 3)) * 0.3, axis=0))
        a = _squared_lengths(use, path)
        parts = use.decompose(a, tau, use.fisher_rao(path[0], path[-1]))
        total = float(use.dissipation(a, tau).sum())
        shares = np.array([parts.irreducible, parts.detour, parts.pacing], dtype=np.float64) / total
        worst, least = max(worst, abs(shares.sum() - 1)), min(least, shares.min())
        ratios = [float(r or 0.0) for r in (parts.straightness, parts.steadiness, parts.efficiency)]
        product = max(product, abs(ratios[0] * ratios[1] - ratios[2]))
    where = "50 random paths, random durations"
    return [
        equal(where, "(irreducible + detour + pacing)/Q − 1, worst", 0.0, worst, 1e-12),
        at_least(where, "least share", 0.0, least),
        equal(where, "straightness × steadiness − efficiency, worst", 0.0, product, 1e-12),
    ]


def constant_speed(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """On a given path in a given time, constant Fisher–Rao speed dissipates least: Q = ℒ²/2T
    (§4)."""
    a, duration = np.exp(rng.uniform(-6, 1, 12)), 3.0
    least = use.length(a) ** 2 / (2 * duration)
    ours = float(use.dissipation(a, use.optimal_durations(a, duration)).sum())

    def cost(z: Array) -> float:
        return float(
            use.dissipation(a, duration * np.exp(z - z.max()) / np.exp(z - z.max()).sum()).sum()
        )

    optimised = min(
        minimize(cost, rng.standard_normal(12), method="BFGS", options={"gtol": 1e-10}).fun
        for _ in range(3)
    )
    random = min(cost(rng.standard_normal(12) * np.exp(rng.uniform(-2, 1))) for _ in range(2000))
    where = "12 random steps"
    return [
        equal(where, "Q of the optimal durations over ℒ²/2T", 1.0, ours / least, 1e-12),
        equal(where, "least Q that SciPy finds over ℒ²/2T", 1.0, optimised / least, 1e-6),
        at_least(where, "least Q of 2000 random schedules over ℒ²/2T", 1.0, random / least, 1e-12),
    ]


def budget_saturation(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Each step of the dissipation regulator costs ½δᵀFδ = Q_budget, and no step within the budget
    predicts more (§7).
    """
    checks = []
    for problem in (
        pb.ill_conditioned_quadratic(),
        pb.logistic_regression(),
        pb.deep_linear(),
        pb.family(*pb.FAMILIES[4]),
    ):
        theta = problem.sample(rng)
        matrix, g = problem.fisher(theta), problem.gradient(theta)
        natural = use.solve(matrix, g)
        delta = float(g @ natural)
        worst, decrease = 0.0, []
        for budget in (1e-4, 1e-2, 1.0):
            step = -use.step_size(delta, budget, np.inf) * natural
            worst = max(worst, abs(float(step @ matrix @ step) / 2 / budget - 1))
            rivals = rng.standard_normal((2000, len(g)))
            norms = np.einsum("ki,ij,kj->k", rivals, matrix, rivals)
            gains = -rivals @ (g - _null(matrix, g)) * np.sqrt(2 * budget / norms)
            decrease.append(float(gains.max() / -(g @ step)))
        checks.append(
            equal(problem.name, "½δᵀFδ/Q_budget − 1, worst of 3 budgets", 0.0, worst, 1e-9)
        )
        checks.append(
            at_most(
                problem.name,
                "best predicted decrease of 6000 rivals over the step's",
                1.0,
                max(decrease),
                1e-9,
            )
        )
        clipped = use.step_size(delta, 1e6, 0.5)
        checks.append(
            equal(
                problem.name, "η_T under a budget too large to bind, η_max = ½", 0.5, clipped, 1e-12
            )
        )
    for budget in (1e-4, 1e-2):
        spent, cosines = _train(use, budget)
        where = f"NGD-T on an MLP, Q_budget = {budget:g}"
        checks.append(
            equal(
                where,
                "½δᵀF_λδ/Q_budget − 1, worst of 10 steps",
                0.0,
                np.abs(spent / budget - 1).max(),
                1e-6,
            )
        )
        checks.append(
            equal(where, "ε in the exact metric, least of 10 steps", 1.0, cosines.min(), 1e-6)
        )
    return checks


def _train(use: Ingredients, budget: float, steps: int = 10) -> tuple[Array, Array]:
    """½δᵀF_λδ and ε of NGD-T's steps, from the weights before and after and a Fisher it did not
    compute."""
    model, x, y = classifier()
    witness = copy.deepcopy(
        model
    )  # measured on a copy, which the optimizer has attached no hooks to
    optimizer = use.optimizer(model, budget)
    rows = []
    for _ in range(steps):
        witness.load_state_dict(model.state_dict())
        matrix = use.network_fisher(witness, (x, y))
        matrix = matrix + 1e-2 * np.eye(len(matrix))
        before = flat(model.parameters())
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        g = flat(p.grad for p in model.parameters() if p.grad is not None)
        optimizer.step()
        step = flat(model.parameters()) - before
        a, d, delta = step @ matrix @ step, -g @ step, g @ np.linalg.solve(matrix, g)
        rows.append((a / 2, d * abs(d) / (a * delta)))
    spent, cosines = np.array(rows).T
    return spent, cosines


def _null(matrix: Array, g: Array) -> Array:
    values, vectors = np.linalg.eigh(matrix)
    null = vectors[:, values <= 1e-12 * values[-1]]
    return null @ (null.T @ g)


def _constrained_minimum(matrix: Array, g: Array, rate: float, rng: np.random.Generator) -> Array:
    # whitened by the diagonal only, so that SciPy works on a conditioned problem without being told
    # the answer
    scale = 1 / np.sqrt(np.diag(matrix))
    inner, slope = matrix * np.outer(scale, scale), g * scale
    slope_norm = np.linalg.norm(slope)
    size = rate / slope_norm
    found = minimize(
        lambda v: v @ inner @ v / 2,
        rng.standard_normal(len(g)),
        jac=lambda v: inner @ v,
        constraints={
            "type": "eq",
            "fun": lambda v: -slope @ v / slope_norm - 1,
            "jac": lambda v: -slope / slope_norm,
        },
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 1000},
    )
    return found.x * size * scale


def _softmax(z: Array) -> Array:
    w = np.exp(z - z.max(axis=-1, keepdims=True))
    return w / w.sum(axis=-1, keepdims=True)


def _squared_lengths(use: Ingredients, path: Array) -> Array:
    return np.array([use.fisher_rao(p, q) ** 2 for p, q in itertools.pairwise(path)])


def _summarise(use: Ingredients, path: Array) -> tuple[tuple[float, float], float]:
    """((Q, ℒ²/2T), D²/2T) of a path of predictions at unit steps."""
    a, duration = _squared_lengths(use, path), len(path) - 1
    q = (float(use.dissipation(a, 1.0).sum()), use.length(a) ** 2 / (2 * duration))
    return q, use.fisher_rao(path[0], path[-1]) ** 2 / (2 * duration)


def _frontier_angles(angles: Array, goal: float) -> Array:
    """φ' of §5's program by nested bracketing roots: slower than the toolkit's Newton, and
    independent of it."""

    def inner(mu: float) -> Array:
        return np.array(
            [
                brentq(lambda x, phi=phi: x + mu * np.tan(x) - phi, 0.0, min(phi, 1.57), xtol=1e-15)
                for phi in angles
            ]
        )

    mu = brentq(
        lambda m: -2 * np.log(np.cos(inner(m))).mean() - goal, 0.0, 100.0, xtol=1e-15, rtol=1e-14
    )
    return inner(mu)


def _turn(p: Array, y: Array, angles: Array) -> Array:
    """Predictions whose target probability is cos²φ, the other classes kept in proportion: the
    geodesic towards the target.
    """
    rows = np.arange(len(y))
    others = p.copy()
    others[rows, y] = 0
    turned = others / others.sum(axis=1, keepdims=True) * np.sin(angles)[:, None] ** 2
    turned[rows, y] = np.cos(angles) ** 2
    return turned
