"""Distances, geodesics, invariance, null spaces, and what the Fisher metric means (theory §1, §3,
§4, §7, §10)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from scipy.integrate import solve_ivp

from thermo_opt.theory import families as fam
from thermo_opt.theory import flow
from thermo_opt.theory.verify import problems as pb
from thermo_opt.theory.verify.ingredients import Ingredients
from thermo_opt.theory.verify.networks import classifier
from thermo_opt.theory.verify.verdict import Check, at_least, equal

Array = np.ndarray


def closed_forms(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Each closed-form Fisher–Rao distance is the length of the family's geodesic in its metric
    (§10)."""
    checks = []
    for member, p, q in pb.FAMILIES:
        problem = pb.family(member, p, q)
        path = flow.trace(problem.landscape, _closed_geodesic(member, p, q), 1.0, samples=5)
        measured = use.distance(member, p, q)
        checks.append(
            equal(
                member.name,
                "distance over length of the geodesic",
                1.0,
                measured / path.length[-1],
                1e-10,
            )
        )
        chain = member.geodesic(p, q, np.array([0.0, 0.3, 1.0]))
        pieces = sum(use.distance(member, x, y) for x, y in pairwise(chain))
        checks.append(
            equal(
                member.name,
                "distance is additive along the geodesic: ratio",
                1.0,
                pieces / measured,
                1e-10,
            )
        )
    return checks


def geodesics(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Geodesics found from the metric alone have the closed-form length, and no other curve is
    shorter (§4, §10)."""
    checks = []
    for index in (1, 4, 6):
        member, p, q = pb.FAMILIES[index]
        problem = pb.family(member, p, q)
        path = use.geodesic(problem.landscape, p, q, matrix=member.metric, samples=21)
        distance = member.distance(p, q)
        checks.append(equal(member.name, "length over D", 1.0, path.length[-1] / distance, 1e-8))
        checks.append(
            equal(
                member.name,
                "largest over least speed",
                1.0,
                np.sqrt(path.a.max() / path.a.min()),
                1e-6,
            )
        )
        bent = _perturbed(path, rng, 5)
        shortest = min(flow.trace(problem.landscape, c, 1.0, samples=21).length[-1] for c in bent)
        checks.append(
            at_least(
                member.name, "shortest of 5 bent curves over D", 1.0, shortest / distance, 1e-9
            )
        )
    return checks


def least_dissipation_protocol(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Between two normals in time T, dissipation is at least D²/2T; the geodesic at constant speed
    attains it (§4)."""
    member, duration = fam.normal(), 2.5
    checks = []
    for p, q in (
        (np.array([-1.0, 0.5]), np.array([1.0, 1.3])),
        (np.array([-3.0, 0.4]), np.array([3.0, 0.3])),
        (np.array([0.0, 0.2]), np.array([0.0, 3.0])),
    ):
        problem = pb.family(member, p, q)
        bound = member.distance(p, q) ** 2 / (2 * duration)
        path = use.geodesic(problem.landscape, p, q, duration, matrix=member.metric, samples=21)
        where = f"N({p[0]:g}, {p[1]:g}²) to N({q[0]:g}, {q[1]:g}²)"
        checks.append(
            equal(
                where,
                "dissipation − D²/2T (nats per unit time)",
                0.0,
                path.dissipation[-1] - bound,
                1e-6,
            )
        )
        rivals = [
            flow.trace(problem.landscape, c, duration, samples=21).dissipation[-1]
            for c in _perturbed(path, rng, 5)
        ]
        checks.append(
            at_least(
                where,
                "least dissipation of 5 bent protocols over D²/2T",
                1.0,
                min(rivals) / bound,
                1e-9,
            )
        )
    return checks


def reparametrization(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Natural-gradient flow visits the same distributions in every chart; gradient descent and Adam
    do not (§6)."""
    checks = []
    for index in (1, 4, 6):
        member, p, q = pb.FAMILIES[index]
        ends: dict[str, list[Array]] = {"natural gradient": [], "SGD": [], "Adam": []}
        deltas = []
        for name in member.charts:
            problem = pb.family(member, p, q, name)
            chart = member.chart(name)
            g = problem.gradient(problem.start)
            deltas.append(float(g @ use.solve(problem.fisher(problem.start), g)))
            ends["natural gradient"].append(
                chart.to_canonical(_follow(_natural(use, problem), problem.start, 0.7))
            )
            ends["SGD"].append(chart.to_canonical(_follow(_steepest(problem), problem.start, 0.2)))
            ends["Adam"].append(chart.to_canonical(_adam(problem)))
        spread = {k: max(member.distance(v[0], other) for other in v[1:]) for k, v in ends.items()}
        where = f"{member.name}, {len(member.charts)} charts"
        checks.append(
            equal(
                where,
                "distance between natural-gradient flows",
                0.0,
                spread["natural gradient"],
                1e-7,
            )
        )
        checks.append(equal(where, "largest over least Δ", 1.0, max(deltas) / min(deltas), 1e-9))
        checks.append(at_least(where, "distance between gradient flows", 0.01, spread["SGD"]))
        checks.append(at_least(where, "distance between Adam's end points", 0.01, spread["Adam"]))
    return checks


def null_space(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Motion in null(F) is free; the bound speaks of the range part and the null decrease stands
    alone (§3, §7)."""
    problem = pb.null_gradient()
    matrix, g = problem.fisher(problem.start), problem.gradient(problem.start)
    natural, null = use.solve(matrix, g), use.null_part(matrix, g)
    where = "F = diag(2, 1, 0, 0), g = (1, 2, 3, 4)"
    checks = [
        equal(where, "|F⁺g − (0.5, 2, 0, 0)|", 0.0, np.abs(natural - [0.5, 2, 0, 0]).max(), 1e-12),
        equal(where, "Δ", 4.5, g @ natural, 1e-12),
        equal(where, "|P₀g − (0, 0, 3, 4)|", 0.0, np.abs(null - [0, 0, 3, 4]).max(), 1e-12),
    ]
    step = -0.1 * natural - 0.2 * null
    decrease = problem.loss(problem.start) - problem.loss(problem.start + step)
    cost = step @ matrix @ step / 2
    checks.append(equal(where, "½δᵀFδ of δ = −0.1F⁺g − 0.2P₀g: ½·0.1²Δ", 0.0225, cost, 1e-12))
    checks.append(
        equal(where, "its decrease: 0.1Δ, and 0.2|P₀g|² for nothing", 5.45, decrease, 1e-12)
    )
    for other in (pb.overparameterised_regression(), pb.deep_linear(), pb.softmax_table()):
        theta = other.sample(rng)
        f = other.fisher(theta)
        direction = use.null_part(f, rng.standard_normal(len(theta)))
        size = np.linalg.norm(direction)
        checks.append(
            equal(
                other.name,
                "vᵀFv of a null direction",
                0.0,
                direction @ f @ direction / size**2,
                1e-12,
            )
        )
        checks.append(
            equal(
                other.name,
                "null part of ∇L: this loss sees only predictions",
                0.0,
                np.abs(use.null_part(f, other.gradient(theta))).max(),
                1e-10,
            )
        )
        gap = float(np.abs(f @ use.solve(f, other.gradient(theta)) - other.gradient(theta)).max())
        checks.append(equal(other.name, "|FF⁺g − g|, g being in the range", 0.0, gap, 1e-9))
    mixture = pb.mixture()
    moves = []
    for reach in (1e-2, 1e-3):
        at = np.array([0.5, 0.0])
        free = use.null_part(mixture.fisher(at), np.array([1.0, 0.0]))
        moved = pb.mixture(*at).loss(at + reach * free)
        moves.append(moved)
    checks.append(
        equal(
            "mixture at m = 0",
            "KL after moving the weight, which F does not see",
            0.0,
            max(moves),
            1e-12,
        )
    )
    return checks


def fisher_is_kl_curvature(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """KL(p_θ ‖ p_{θ+δ}) = ½δᵀFδ + O(|δ|³): on families, and on a network with the toolkit's own
    Fisher (§1)."""
    checks = []
    for member, p, q in pb.FAMILIES:
        step = 1e-4 * (q - p)
        both = member.divergence(p, p + step) + member.divergence(p, p - step)
        checks.append(
            equal(
                member.name,
                "(KL(δ) + KL(−δ))/δᵀFδ",
                1.0,
                both / (step @ member.metric(p) @ step),
                1e-4,
            )
        )
    model, x, y = classifier()
    matrix = use.network_fisher(model, (x, y))
    parameters = list(model.parameters())
    theta = torch.nn.utils.parameters_to_vector(parameters).detach()
    ratios = []
    with torch.no_grad():
        before = torch.log_softmax(model(x), dim=-1)
        for _ in range(5):
            step = 1e-3 * torch.as_tensor(rng.standard_normal(len(theta)))
            total = 0.0
            for sign in (1, -1):
                torch.nn.utils.vector_to_parameters(theta + sign * step, parameters)
                after = torch.log_softmax(model(x), dim=-1)
                total += float((before.exp() * (before - after)).sum(-1).mean())
            ratios.append(total / float(step.numpy() @ matrix @ step.numpy()))
        torch.nn.utils.vector_to_parameters(theta, parameters)
    checks.append(
        equal(
            "softmax network",
            "(KL(δ) + KL(−δ))/δᵀFδ − 1, worst of 5",
            0.0,
            max(abs(r - 1) for r in ratios),
            1e-3,
        )
    )
    return checks


def _closed_geodesic(member: fam.Family, p: Array, q: Array) -> flow.path.Curve:
    return lambda s: member.geodesic(p, q, np.array([s]))[0]


def _perturbed(path: flow.Path, rng: np.random.Generator, count: int) -> list[flow.path.Curve]:
    """Curves with the same ends, bent by a smooth bump of a tenth of the way."""
    scale = np.abs(path.theta[-1] - path.theta[0]).max() * 0.1
    bumps = [
        scale * rng.uniform(0.3, 1, len(path.theta[0])) * rng.choice([-1, 1], len(path.theta[0]))
        for _ in range(count)
    ]
    low = np.abs(path.theta).min(axis=0)

    def bent(bump: Array) -> flow.path.Curve:
        inside = np.clip(bump, -0.5 * low - 1e-3, 0.5 * low + 1e-3)
        return lambda t: path(t) + inside * np.sin(np.pi * t / path.duration) ** 2

    return [bent(b) for b in bumps]


def _follow(velocity: Callable[[Array], Array], start: Array, duration: float) -> Array:
    solution = solve_ivp(
        lambda t, x: velocity(x), (0, duration), start, "LSODA", rtol=1e-10, atol=1e-12
    )
    if not solution.success:
        raise flow.NotConverged(f"a flow stopped early: {solution.message}")
    return solution.y[:, -1]


def _natural(use: Ingredients, problem: pb.Problem) -> Callable[[Array], Array]:
    return lambda x: -use.solve(problem.fisher(x), problem.gradient(x))


def _steepest(problem: pb.Problem) -> Callable[[Array], Array]:
    return lambda x: -problem.gradient(x)


def _adam(problem: pb.Problem, rate: float = 1e-3, steps: int = 100) -> Array:
    theta = torch.tensor(problem.start, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=rate)
    for _ in range(steps):
        theta.grad = torch.as_tensor(problem.gradient(theta.detach().numpy()))
        optimizer.step()
    return theta.detach().numpy()
