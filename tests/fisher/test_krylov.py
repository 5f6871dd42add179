"""Krylov brackets against exact truth from factors; theory §5."""

import math

import mpmath
import numpy as np
import pytest
import torch

from thermo_opt.errors import InputError
from thermo_opt.fisher import krylov

CASES = 1000


def random_case(rng):
    """F (stored float64 matrix), g and λ: condition numbers up to 1e10, ranks from 1 to full, λ
    down to 1e-13."""
    size = int(rng.integers(1, 13))
    rank = int(rng.integers(1, size + 1))
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0][:, :rank]
    spread = rng.uniform(0, 10)
    values = 10 ** (
        -spread * np.concatenate([[0.0, 1.0][: min(rank, 2)], rng.uniform(0, 1, max(rank - 2, 0))])
    )
    F = (basis * values * 10 ** rng.uniform(-3, 3)) @ basis.T
    F = (F + F.T) / 2
    g = rng.normal(size=size)
    if rng.random() < 0.5:
        g = F @ g  # in the range, as a gradient on the metric's own batch is
    return F, g, 10 ** rng.uniform(-13, 0)


def exact_truth(F, g, damping):
    """gᵀ(F+λI)⁻¹g of the stored floats in 40 digits."""
    with mpmath.workdps(40):
        shifted = mpmath.matrix(F.tolist()) + mpmath.mpf(damping) * mpmath.eye(len(F))
        vector = mpmath.matrix(g.tolist())
        return (vector.T * mpmath.lu_solve(shifted, vector))[0]


def test_brackets_contain_the_truth_and_shrink_in_a_thousand_random_cases():
    rng = np.random.default_rng(0)
    for _ in range(CASES):
        F, g, damping = random_case(rng)
        matrix, vector = torch.from_numpy(F), torch.from_numpy(g)
        truth = exact_truth(F, g, damping)
        previous = krylov.Bracket(0.0, math.inf)
        for bracket in krylov.brackets(lambda v, m=matrix: m @ v, vector, damping):
            assert (
                bracket.lower <= truth <= bracket.upper
            )  # no tolerance: the bracket must be certain
            assert bracket.lower >= previous.lower
            assert bracket.upper <= previous.upper
            previous = bracket
        # Below ‖F‖ times the rounding of a product, λ can't be seen and no tight upper bound is to
        # be had.
        if damping > 1e-8 * np.linalg.norm(F, 2):
            assert previous.relative_width < 1e-4
        # Any step obeys the bound with the bracket's lower end replaced by its upper one (|ε| ≤ 1).
        step = rng.normal(size=len(g))
        a = step @ F @ step + damping * step @ step
        assert (g @ step) ** 2 <= a * previous.upper * (1 + 1e-9)


def test_preconditioned_brackets_contain_the_truth_whatever_the_preconditioner():
    rng = np.random.default_rng(1)
    for _ in range(200):
        F, g, damping = random_case(rng)
        damping = max(damping, 1e-6 * np.linalg.norm(F, 2))
        matrix, vector = torch.from_numpy(F), torch.from_numpy(g)
        # M = F̂ + λI with F̂ near F (a good preconditioner) or unrelated to it (a poor one).
        other = rng.normal(size=F.shape)
        noise = other @ other.T * np.linalg.norm(F, 2) * rng.choice([1e-6, 1e-2, 1.0])
        values, basis = np.linalg.eigh(F + noise + damping * np.eye(len(F)))
        root = torch.from_numpy((basis / np.sqrt(values)) @ basis.T)
        problem = krylov.preconditioned(
            lambda v, m=matrix: m @ v,
            damping,
            lambda v, r=root: r @ v,
            float(values[-1]) * (1 + 1e-12),
        )
        truth = exact_truth(F, g, damping)
        # M^{-1/2} itself is rounded, by up to machine epsilon times √cond(M): the truth belongs to
        # the exact root.
        slack = mpmath.mpf(1e-13 * math.sqrt(values[-1] / values[0]) + 1e-12)
        previous = krylov.Bracket(0.0, math.inf)
        for bracket in krylov.brackets(
            problem.operator, root @ vector, problem.damping, amplification=problem.amplification
        ):
            assert bracket.lower <= truth * (1 + slack)
            assert bracket.upper >= truth * (1 - slack)
            assert bracket.lower >= previous.lower
            assert bracket.upper <= previous.upper
            previous = bracket


def test_a_good_preconditioner_saves_products():
    rng = np.random.default_rng(2)
    size = 200
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = 10 ** rng.uniform(-5, 0, size)
    F = torch.from_numpy((basis * values) @ basis.T)
    near = (
        torch.from_numpy((basis * values * rng.uniform(0.7, 1.4, size)) @ basis.T)
        + 1e-4 * torch.eye(size).double()
    )
    eigenvalues, vectors = torch.linalg.eigh(near)
    root = (vectors / eigenvalues.sqrt()) @ vectors.T
    g = torch.from_numpy(rng.normal(size=size))
    problem = krylov.preconditioned(
        lambda v: F @ v, 1e-4, lambda v: root @ v, float(eigenvalues[-1])
    )

    def count(sequence):
        return next(k for k, b in enumerate(sequence) if b.relative_width <= 0.1)

    plain = count(krylov.brackets(lambda v: F @ v, g, 1e-4))
    assisted = count(krylov.brackets(problem.operator, root @ g, problem.damping))
    assert assisted < 0.5 * plain


def test_zero_gradient_zero_fisher_and_bad_arguments():
    F = torch.zeros(3, 3, dtype=torch.float64)
    assert list(krylov.brackets(lambda v: F @ v, torch.zeros(3), 0.1)) == [(0.0, 0.0)]
    last = list(krylov.brackets(lambda v: F @ v, torch.ones(3), 0.5))[-1]
    assert last.lower == pytest.approx(6.0)
    assert last.upper == pytest.approx(6.0)
    with pytest.raises(InputError, match="damping > 0"):
        next(krylov.brackets(lambda v: F @ v, torch.ones(3), 0.0))
    with pytest.raises(InputError, match="NaN"):
        next(krylov.brackets(lambda v: F @ v, torch.tensor([math.nan, 0, 0]), 1.0))
    with pytest.raises(InputError, match="not finite"):
        list(krylov.brackets(lambda v: v * math.inf, torch.ones(3), 1.0))


def test_stops_at_the_requested_width():
    rng = np.random.default_rng(3)
    S = torch.from_numpy(rng.normal(size=(40, 60)))
    F, g = S.T @ S / 40, torch.from_numpy(rng.normal(size=60))
    used = []

    def product(v):
        used.append(1)
        return F @ v

    wide = krylov.bracket(product, g, 1e-2, rtol=0.5)
    early = len(used)
    assert wide.relative_width <= 0.5
    used.clear()
    assert krylov.bracket(product, g, 1e-2, rtol=1e-8).relative_width <= 1e-8
    assert early < len(used)


def test_conjugate_gradient_certifies_its_error():
    rng = np.random.default_rng(4)
    for rank in (3, 20, 60):
        S = torch.from_numpy(rng.normal(size=(rank, 60)))
        F, g = S.T @ S / rank, torch.from_numpy(rng.normal(size=60))
        truth = torch.linalg.solve(F + 1e-3 * torch.eye(60, dtype=torch.float64), g)
        x, bound = krylov.conjugate_gradient(lambda v, f=F: f @ v, g, 1e-3)
        assert float((x - truth).norm() / truth.norm()) <= bound + 1e-11
        assert bound <= 1e-9
