"""Toy problems: exact gradients, Fishers that are KL curvatures, minima and constants."""

import numpy as np
import pytest

from thermo_opt.errors import InputError
from thermo_opt.theory import families as fam
from thermo_opt.theory.verify import problems as pb

PROBLEMS = {p.name: p for p in [*pb.all_problems(), *pb.family_problems()]}
NOT_A_FISHER = ("quadratic", "null gradient", "trap stiffness", "trap position")


def slope(f, x, i, h=1e-4):
    e = np.zeros(len(x))
    e[i] = h * max(1.0, abs(x[i])) if abs(x[i]) > 0.05 else h * 0.05
    near, far = f(x + e) - f(x - e), f(x + 2 * e) - f(x - 2 * e)
    return (8 * near - far) / (12 * e[i])


@pytest.mark.parametrize("name", PROBLEMS)
def test_gradient_is_the_derivative_of_the_loss(name):
    problem = PROBLEMS[name]
    theta = problem.sample(np.random.default_rng(0))
    expected = [slope(problem.loss, theta, i) for i in range(len(theta))]
    np.testing.assert_allclose(problem.gradient(theta), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", PROBLEMS)
def test_minimum_and_constants(name):
    problem = PROBLEMS[name]
    rng = np.random.default_rng(1)
    if problem.minimum is not None:
        assert np.abs(problem.gradient(problem.minimum)).max() < 1e-10
        assert problem.loss(problem.minimum) == pytest.approx(problem.loss_min, abs=1e-12)
    for _ in range(5):
        theta = problem.sample(rng)
        assert np.linalg.eigvalsh(problem.fisher(theta))[0] > -1e-12
        if problem.loss_min is not None:
            assert problem.loss(theta) >= problem.loss_min
        if problem.strength is not None:
            g = problem.gradient(theta)
            delta = g @ np.linalg.pinv(problem.fisher(theta)) @ g
            assert delta >= 2 * problem.strength * (problem.loss(theta) - problem.loss_min) * (
                1 - 1e-9
            )
            step = rng.standard_normal(len(theta))
            bound = (
                problem.loss(theta)
                + g @ step
                + problem.smoothness / 2 * step @ problem.fisher(theta) @ step
            )
            assert problem.loss(theta + step) <= bound + 1e-9


@pytest.mark.parametrize(
    "name", ["linear regression", "logistic regression", "over-parameterised regression"]
)
def test_generalised_linear_models_have_the_fisher_as_hessian(name):
    problem = PROBLEMS[name]
    theta = problem.sample(np.random.default_rng(2))
    hessian = np.stack([slope(problem.gradient, theta, i) for i in range(len(theta))])
    np.testing.assert_allclose(problem.fisher(theta), hessian, rtol=1e-7, atol=1e-9)


def test_families_and_mixture_have_the_fisher_as_hessian_at_their_minimum():
    for problem in [*pb.family_problems(), pb.mixture()]:
        theta = problem.minimum
        hessian = np.stack([slope(problem.gradient, theta, i) for i in range(len(theta))])
        scale = np.abs(hessian).max()
        np.testing.assert_allclose(
            problem.fisher(theta), hessian, rtol=1e-5, atol=1e-6 * scale, err_msg=problem.name
        )


def test_ranks():
    assert (
        np.linalg.matrix_rank(
            PROBLEMS["deep linear network"].fisher(PROBLEMS["deep linear network"].start)
        )
        == 2
    )
    assert np.linalg.matrix_rank(PROBLEMS["over-parameterised regression"].fisher(np.zeros(7))) == 4
    assert (
        np.linalg.matrix_rank(PROBLEMS["softmax table"].fisher(PROBLEMS["softmax table"].start))
        == 18
    )
    degenerate = PROBLEMS["mixture"].fisher(np.array([0.5, 0.0]))
    np.testing.assert_allclose(degenerate, np.diag([0.0, 0.25]), atol=1e-12)


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="not a point of the family"):
        pb.family(fam.normal(), np.array([0.0, -1.0]), np.array([0.0, 1.0]))
    with pytest.raises(InputError, match="positive definite"):
        pb.quadratic(np.diag([1.0, 0.0]), np.eye(2))
