"""Brackets of χ² − min(|ρ − Sv|² + λ|v|²) against exact truth; theory §5."""

import math

import mpmath
import numpy as np
import pytest
import torch
from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.fisher import certificate, make, ridge
from thermo_opt.fisher.certificate import gradient_norm
from thermo_opt.fisher.metric import flatten


def random_case(rng):
    """S (N, P), ρ and λ: ranks from 1 to full, SᵀS of condition up to 1e10, λ from 1e-10 of its
    norm to as large."""
    outputs, size = (int(k) for k in rng.integers(1, 13, 2))
    rank = int(rng.integers(1, min(outputs, size) + 1))
    left = np.linalg.qr(rng.normal(size=(outputs, outputs)))[0][:, :rank]
    right = np.linalg.qr(rng.normal(size=(size, size)))[0][:, :rank]
    values = 10 ** -rng.uniform(0, 5, rank)
    scale = 10 ** rng.uniform(-3, 3)
    S = (left * values * scale) @ right.T
    rho = rng.normal(size=outputs) * 10 ** rng.uniform(-2, 2, outputs)  # a few hold most of χ²
    return S, rho, float(np.linalg.norm(S, 2) ** 2 * 10 ** rng.uniform(-10, 0))


def exact_truth(S, rho, damping):
    """gᵀ(SᵀS+λI)⁻¹g, g = Sᵀρ, of the stored floats in 60 digits."""
    with mpmath.workdps(60):
        matrix, vector = mpmath.matrix(S.tolist()), mpmath.matrix(rho.tolist())
        g = matrix.T * vector
        shifted = matrix.T * matrix + mpmath.mpf(damping) * mpmath.eye(S.shape[1])
        return (g.T * mpmath.lu_solve(shifted, g))[0]


def solve(S, rho, damping, chosen, **options):
    """The brackets' sequence with the rows ``chosen`` known."""
    matrix, vector = torch.from_numpy(S), torch.from_numpy(rho)
    known = None
    if chosen.any():
        where = torch.from_numpy(chosen)
        known = ridge.KnownRows(matrix[where], where, damping)
    return ridge.brackets(
        lambda v: matrix @ v,
        lambda u: matrix.T @ u,
        vector,
        damping,
        known=known,
        max_iterations=40,
        **options,
    )


def test_brackets_contain_the_truth_and_shrink_whichever_rows_are_known():
    rng = np.random.default_rng(0)
    for case in range(600):
        S, rho, damping = random_case(rng)
        truth = exact_truth(S, rho, damping)
        chosen = rng.random(len(rho)) < [0.0, 0.3, 0.6, 1.0][case % 4]
        previous = ridge.Bracket(0.0, math.inf)
        for bracket in solve(S, rho, damping, chosen):
            assert (
                bracket.lower <= truth <= bracket.upper
            )  # no tolerance: the bracket must be certain
            assert bracket.lower >= previous.lower
            assert bracket.upper <= previous.upper
            previous = bracket
        # Rounding enters as the square root of the condition number, times χ² over Δ.
        assert previous.upper - previous.lower <= 1e-9 * float(rho @ rho)


def test_products_rounded_to_float32_still_give_certain_brackets():
    rng = np.random.default_rng(1)
    for case in range(200):
        S, rho, damping = random_case(rng)
        truth = exact_truth(S, rho, damping)
        matrix = torch.from_numpy(S)

        def push(v, matrix=matrix):
            return (matrix.float() @ v.float()).double()

        def pull(u, matrix=matrix):
            return (matrix.float().T @ u.float()).double()

        where = torch.from_numpy(rng.random(len(rho)) < 0.3 * (case % 2))
        known = (
            ridge.KnownRows(matrix.float().double()[where], where, damping)
            if bool(where.any())
            else None
        )
        for bracket in ridge.brackets(
            push,
            pull,
            torch.from_numpy(rho),
            damping,
            known=known,
            roundoff=torch.finfo(torch.float32).eps,
        ):
            assert bracket.lower <= truth <= bracket.upper


def test_all_rows_known_is_exact_at_once_and_some_save_products():
    rng = np.random.default_rng(2)
    basis = np.linalg.qr(rng.normal(size=(200, 200)))[0]
    S = (basis * 10 ** -rng.uniform(0, 3, 200)) @ np.linalg.qr(rng.normal(size=(300, 200)))[0].T
    rho = rng.normal(size=200)

    def count(chosen):
        return next(k for k, b in enumerate(solve(S, rho, 1e-4, chosen)) if b.relative_width <= 0.1)

    assert list(solve(S, rho, 1e-4, np.ones(200, bool)))[1].relative_width < 1e-9
    assert count(np.arange(200) < 150) < count(np.arange(200) < 75) < count(np.zeros(200, bool))


def test_zero_residual_zero_scores_and_products_that_are_not_finite():
    none = np.zeros(3, bool)
    assert list(solve(np.ones((3, 2)), np.zeros(3), 0.1, none)) == [(0.0, 0.0)]
    last = list(solve(np.zeros((3, 2)), np.ones(3), 0.1, none))[-1]
    assert last.lower <= 0.0 <= last.upper < 1e-12
    with pytest.raises(InputError, match="not finite"):
        list(solve(np.full((3, 2), math.inf), np.ones(3), 0.1, none))
    with pytest.raises(ValueError, match="positive definite"):
        ridge.KnownRows(
            torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.bool), 0.0
        )


class Tagger(nn.Module):
    """Every position's class from its own embedding and the previous one's."""

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        e = self.embedding(x)
        return self.head(torch.tanh(e + e.roll(1, 1)))


@pytest.mark.parametrize("curvature", ["exact", "empirical"])
@pytest.mark.parametrize("microbatch", [None, 5])
def test_known_examples_of_masked_sequences_give_the_dense_truth(curvature, microbatch):
    torch.manual_seed(0)
    model = Tagger().double()
    x, y = torch.randint(0, 7, (12, 4)), torch.randint(0, 3, (12, 4))
    y[torch.rand(12, 4) < 0.3] = -100
    metric = make(curvature, model, (x, y), damping=1e-4, microbatch=microbatch)
    g = flatten(metric.predictor.loss_and_gradient()[1])
    truth = float(g @ torch.linalg.solve(metric.dense(), g))
    for known in (0, 3, 6, 12):
        for bracket in certificate.gradient_brackets(metric, known=known):
            assert bracket.lower <= truth * (1 + 1e-9)
            assert bracket.upper >= truth * (1 - 1e-9)
        assert bracket.relative_width < 1e-6
    assert gradient_norm(metric, 1e-6, max_iterations=1, known=12).relative_width < 1e-6


def test_rows_are_formed_by_default_where_a_product_is_dear():
    torch.manual_seed(0)
    convolutions = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    )
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(256, 20), nn.Tanh(), nn.Linear(20, 10))
    batch = torch.randn(128, 1, 16, 16), torch.randint(0, 4, (128,))
    formed = {
        name: certificate._Outputs(make("exact", model, batch, damping=1e-3).precise()).affordable()
        for name, model in {"convolutions": convolutions, "perceptron": perceptron}.items()
    }
    assert formed["convolutions"] == 32
    assert formed["perceptron"] == 0
