"""Certificates: χ² above Δ, Krylov brackets around Δ_λ, and a metric from optimizer state (theory
§5, §9)."""

from __future__ import annotations

import numpy as np

from thermo_opt.theory import flow
from thermo_opt.theory.verify import problems as pb
from thermo_opt.theory.verify.ingredients import Ingredients
from thermo_opt.theory.verify.networks import classifier
from thermo_opt.theory.verify.verdict import Check, at_least, at_most, equal

Array = np.ndarray


def chi_squared_bound(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Δ ≤ χ² = mean(1/p_y − 1), with equality when outputs move independently; so |ε| ≥ d²/(aχ²)
    (§5)."""
    table = pb.softmax_table()
    assert table.landscape.predict is not None
    assert table.landscape.targets is not None
    worst = 0.0
    for _ in range(20):
        theta = table.sample(rng)
        g = table.gradient(theta)
        delta = float(g @ use.solve(table.fisher(theta), g))
        worst = max(worst, abs(use.chi_squared(_target_probability(table, theta)) / delta - 1))
    checks = [equal(table.name, "χ²/Δ − 1, worst of 20 points", 0.0, worst, 1e-9)]
    model, x, y = classifier()
    scape, start = flow.network(model, (x, y), metric="dense", damping=0.0)
    assert scape.predict is not None
    least, gap = np.inf, np.inf
    for _ in range(6):
        theta = start + 0.5 * rng.standard_normal(len(start))
        g, metric = scape.gradient(theta), scape.metric(theta)
        delta = float(g @ metric.solve(g))
        z = scape.predict(theta)
        p = np.exp(z - z.max(axis=1, keepdims=True))
        chi2 = use.chi_squared((p / p.sum(axis=1, keepdims=True))[np.arange(len(z)), y.numpy()])
        least = min(least, chi2 / delta)
        step = rng.standard_normal(len(theta)) - metric.solve(g)
        a, d = metric.quadratic(step), -float(g @ step)
        gap = min(gap, d * d / (a * delta) - d * d / (a * chi2))
    checks.append(
        at_least("MLP on 4 × 4 images", "least χ²/Δ at 6 random weights", 1.0, least, 1e-9)
    )
    checks.append(
        at_least("MLP on 4 × 4 images", "least |ε| − d²/(aχ²) of random steps", 0.0, gap, 1e-9)
    )
    gaussian = pb.linear_regression()
    theta = gaussian.sample(rng)
    g = gaussian.gradient(theta)
    assert gaussian.landscape.predict is not None
    assert gaussian.landscape.targets is not None
    residual = gaussian.landscape.targets - gaussian.landscape.predict(theta)
    chi2 = float(np.mean(residual**2) / gaussian.landscape.sigma2)
    ratio = chi2 / float(g @ use.solve(gaussian.fisher(theta), g))
    checks.append(at_least(gaussian.name, "mean |y − f|²/σ² over Δ", 1.0, ratio, 1e-9))
    return checks


def krylov_bracket(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Gauss and Gauss–Radau rules on Lanczos bracket gᵀ(F+λI)⁻¹g at every step, tightening
    monotonically (§5)."""
    checks = []
    for size, spread in ((12, 3.0), (40, 6.0)):
        basis = np.linalg.qr(rng.standard_normal((size, size)))[0]
        matrix = (basis * np.logspace(-spread, 0, size)) @ basis.T
        g, damping = matrix @ rng.standard_normal(size), 1e-3
        exact = float(g @ np.linalg.solve(matrix + damping * np.eye(size), g))
        ends = np.array([(b.lower, b.upper) for b in use.krylov(matrix, g, damping)])
        finite = np.isfinite(ends[:, 1])
        where = f"spectrum over {spread:g} decades, P = {size}"
        checks.append(
            at_most(where, "largest lower end over Δ", 1.0, ends[:, 0].max() / exact, 1e-9)
        )
        checks.append(
            at_least(where, "least upper end over Δ", 1.0, ends[finite, 1].min() / exact, 1e-9)
        )
        back = max(-np.diff(ends[:, 0]).min(), np.diff(ends[finite, 1]).max()) / exact
        checks.append(at_most(where, "largest widening of an end, over Δ", 0.0, back, 1e-9))
        checks.append(at_most(where, "final relative width", 1e-4, 1 - ends[-1, 0] / ends[-1, 1]))
    return checks


def optimizer_state(use: Ingredients, rng: np.random.Generator) -> list[Check]:
    """Adam's moments give the diagonal Fisher B(v̂ − m̂²) + m̂², in expectation over minibatches of
    B (§9)."""
    size, batch_size, beta1, beta2 = 400, 32, 0.99, 0.9995
    scale = np.exp(rng.uniform(-2, 2, size))
    # a mean gradient as large as its minibatch noise, so that both terms of the formula count
    mean = scale / np.sqrt(batch_size) * rng.choice([-1.0, 1.0], size)
    m, v = np.zeros(size), np.zeros(size)
    steps = 8000
    for _ in range(steps):
        g = mean + scale / np.sqrt(batch_size) * rng.standard_normal(size)
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
    ratio = use.moments_fisher(m / (1 - beta1**steps), v / (1 - beta2**steps), batch_size) / (
        scale**2 + mean**2
    )
    return [
        equal(
            f"{size} weights, B = {batch_size}",
            "mean of F̂/E[g²] over weights",
            1.0,
            ratio.mean(),
            0.03,
        )
    ]


def _target_probability(problem: pb.Problem, theta: Array) -> Array:
    assert problem.landscape.predict is not None
    assert problem.landscape.targets is not None
    z = problem.landscape.predict(theta)
    p = np.exp(z - z.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True))[np.arange(len(z)), problem.landscape.targets]
