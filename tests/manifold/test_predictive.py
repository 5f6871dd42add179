"""Distances, certificates and the frontier against mpmath, SciPy and the closed forms of theory §4,
§5, §10."""

import mpmath as mp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

import thermo_opt as to
from thermo_opt.errors import InputError
from thermo_opt.manifold import chi_squared, embed, log_least_distance, move, trajectory_map

mp.mp.dps = 60
seeds = st.integers(0, 2**32 - 1)


def exact_distance(z, w):
    def softmax(v):
        e = [mp.e ** mp.mpf(float(x)) for x in v]
        return [x / sum(e) for x in e]

    return float(
        2 * mp.acos(sum(mp.sqrt(a * b) for a, b in zip(softmax(z), softmax(w), strict=True)))
    )


@pytest.mark.parametrize("shift", [3e-7, 1e-4, 0.3, 40.0])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_distance_to_one_part_in_a_million_however_close_or_extreme(shift, scale):
    z = np.array([1.0, -1.0, 0.9995, 0.0]) * scale
    w = z.copy()
    w[2] += shift
    exact = exact_distance(z, w)
    assert to.fisher_rao(z[None], w[None], kind="logits") == pytest.approx(exact, rel=1e-6)
    if scale == 1.0:
        p, q = (np.exp(v - np.logaddexp.reduce(v)) for v in (z, w))
        assert to.fisher_rao(p[None], q[None]) == pytest.approx(exact, rel=1e-6)


@pytest.mark.parametrize("classes", [3, 20, 100])
@pytest.mark.parametrize("order", [1, -1], ids=["far rows first", "near rows first"])
def test_each_row_of_a_batch_is_exact_whether_it_moved_far_or_hardly_at_all(classes, order):
    rng = np.random.default_rng(classes)
    steps = np.repeat(10.0 ** np.arange(1, -8, -1), 5)[::order, None]
    z = rng.normal(size=(len(steps), classes)) * 3
    z[::7] += 800  # the squared amplitudes overflow unless shifted
    z[3::7] *= 300
    w = z + steps * rng.normal(size=z.shape)
    exact = [exact_distance(a, b) for a, b in zip(z, w, strict=True)]
    each = to.fisher_rao(z, w, kind="logits", per_example=True)
    moved = np.array(exact) > 1e-7
    assert moved.sum() > 30
    assert np.allclose(each[moved], np.array(exact)[moved], rtol=1e-6, atol=0)
    step = move(embed(z, np.zeros(len(z), dtype=int)), embed(w, np.zeros(len(z), dtype=int)))
    assert step.a == pytest.approx(np.mean(each**2), rel=1e-12)


def test_a_point_holds_unit_amplitudes_and_identical_ones_are_no_move_apart():
    z = np.random.default_rng(0).normal(size=(40, 100)) * 5
    point = embed(z, np.arange(40))
    assert np.allclose(np.square(point.u).sum(axis=1), 1, rtol=1e-14)
    assert np.allclose(2 * np.log(point.u[np.arange(40), np.arange(40)]), -point.loss, rtol=1e-12)
    assert np.array_equal(point.first(3), point.u[:3])
    assert move(point, embed(z, np.arange(40)))[:2] == (0, 0)


def test_disjoint_predictions_are_pi_apart():
    z = np.array([[1000.0, -1000.0]])
    assert to.fisher_rao(z, -z, kind="logits") == pytest.approx(np.pi, rel=1e-12)


@given(st.floats(0, 1), st.floats(0, 1))
def test_bernoulli_closed_form(p, q):
    closed = 2 * abs(np.arcsin(np.sqrt(p)) - np.arcsin(np.sqrt(q)))
    assert to.fisher_rao([[p]], [[q]], likelihood="bernoulli") == pytest.approx(closed, abs=1e-7)


def test_bernoulli_logits_are_two_class_logits_and_outputs_add_up():
    rng = np.random.default_rng(0)
    z, w = rng.normal(size=(2, 6, 3))
    pair = [np.stack([np.zeros_like(v), v], axis=-1) for v in (z, w)]
    each = to.fisher_rao(*pair, kind="logits", per_example=True).reshape(6, 3)
    got = to.fisher_rao(z, w, likelihood="bernoulli", kind="logits", per_example=True)
    assert np.allclose(got, np.sqrt(np.sum(each**2, axis=1)), rtol=1e-12)


def test_gaussian_distance_is_mahalanobis():
    rng = np.random.default_rng(0)
    f, g = rng.normal(size=(2, 8, 3))
    expected = np.sqrt(np.mean(np.sum((f - g) ** 2, axis=1)) / 0.3)
    assert to.fisher_rao(f, g, likelihood="gaussian", sigma2=0.3) == pytest.approx(
        expected, rel=1e-12
    )


@given(seeds)
def test_triangle_inequality_and_symmetry(seed):
    z = np.random.default_rng(seed).normal(size=(3, 5, 4)) * 3
    ab, bc, ac = (to.fisher_rao(z[i], z[j], kind="logits") for i, j in ((0, 1), (1, 2), (0, 2)))
    assert ac <= ab + bc + 1e-12
    assert to.fisher_rao(z[1], z[0], kind="logits") == pytest.approx(ab, rel=1e-14)


@given(seeds, st.floats(-8, 2))
def test_move_obeys_the_certificate_and_predicts_the_loss_to_first_order(seed, log_size):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(6, 4)) * 2
    y = rng.integers(0, 4, size=6)
    w = z + 10.0**log_size * rng.normal(size=z.shape)
    p, q = embed(z, y), embed(w, y)
    step = move(p, q)
    assert step.a == pytest.approx(to.fisher_rao(z, w, kind="logits") ** 2, rel=1e-12)
    assert step.d**2 <= step.a * step.chi2 * (1 + 1e-9)
    prob = np.exp(z - np.logaddexp.reduce(z, axis=1, keepdims=True))
    assert step.chi2 == pytest.approx(chi_squared(prob[np.arange(6), y]), rel=1e-9)
    if log_size < -3:
        gradient = (prob - np.eye(4)[y]) / 6
        first_order = -np.sum(gradient * (w - z))
        assert step.d == pytest.approx(first_order, abs=20 * 10 ** (2 * log_size))


def test_gaussian_move():
    rng = np.random.default_rng(1)
    f, g, y = rng.normal(size=(3, 5, 2))
    step = move(
        embed(f, y, likelihood="gaussian", sigma2=0.5),
        embed(g, y, likelihood="gaussian", sigma2=0.5),
        "gaussian",
    )
    assert step.a == pytest.approx(np.mean(np.sum((f - g) ** 2, axis=1)) / 0.5)
    assert step.d == pytest.approx(np.mean(np.sum((y - f) * (g - f), axis=1)) / 0.5)
    assert step.chi2 == pytest.approx(np.mean(np.sum((y - f) ** 2, axis=1)) / 0.5)


def test_loss_is_the_cross_entropy_even_where_p_underflows():
    z = np.array([[0.0, 2000.0], [1.0, 1.0]])
    point = embed(z, np.array([0, 1]))
    assert point.mean_loss == pytest.approx((2000 + np.log(2)) / 2)


@given(seeds, st.floats(0.02, 0.95))
def test_frontier_against_constrained_optimisation(seed, share):
    phi = np.random.default_rng(seed).uniform(0.05, 1.5, size=5)
    loss = -2 * np.mean(np.log(np.cos(phi)))
    target = share * loss
    best = minimize(
        lambda x: np.mean((x - phi) ** 2),
        phi * np.sqrt(share),
        jac=lambda x: 2 * (x - phi) / len(phi),
        constraints=[
            {
                "type": "ineq",
                "fun": lambda x: target + 2 * np.mean(np.log(np.cos(x))),
                "jac": lambda x: -2 * np.tan(x) / len(phi),
            }
        ],
        bounds=[(0, v) for v in phi],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert to.least_distance(np.cos(phi) ** 2, target) == pytest.approx(
        2 * np.sqrt(best.fun), rel=1e-6
    )


@given(seeds)
def test_no_predictions_reach_the_loss_nearer_than_the_frontier(seed):
    rng = np.random.default_rng(seed)
    z, w = rng.normal(size=(2, 9, 4)) * 2
    y = rng.integers(0, 4, size=9)
    start, end = embed(z, y), embed(w, y)
    least = log_least_distance(2 * start.log_amplitude_y, end.mean_loss)
    assert least <= to.fisher_rao(z, w, kind="logits") * (1 + 1e-9)


def test_frontier_ends():
    p = np.array([0.2, 0.5, 0.9])
    assert to.least_distance(p, 5.0) == 0.0
    whole = 2 * np.sqrt(np.mean(np.arccos(np.sqrt(p)) ** 2))
    assert to.least_distance(p, 0.0) == pytest.approx(whole)
    assert to.least_distance(p, 1e-12) == pytest.approx(whole, rel=1e-5)
    distances = [to.least_distance(p, loss) for loss in np.geomspace(1e-6, 0.7, 30)]
    assert np.all(np.diff(distances) < 0)
    # from certainty of the wrong class: one angle each, known in closed form
    assert to.least_distance(np.zeros(3), np.log(2)) == pytest.approx(2 * (np.pi / 2 - np.pi / 4))


def test_map_keeps_every_distance_of_a_flat_picture():
    rng = np.random.default_rng(0)
    angle = np.linspace(0, 0.3, 7)
    path = np.stack([np.cos(angle), np.sin(angle)], axis=-1)[:, None, :] * np.ones((1, 4, 1))
    other = path[::-1]
    (first, second), explained = trajectory_map([path, other])
    assert explained > 0.999
    assert np.allclose(first, second[::-1], atol=1e-7)
    steps = np.linalg.norm(np.diff(first, axis=0), axis=1)
    assert np.allclose(steps, steps.mean(), rtol=0.05)
    with pytest.raises(InputError, match="share one probe"):
        trajectory_map([path, rng.normal(size=(3, 5, 2))])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: to.fisher_rao([[0.5, 0.6]], [[0.5, 0.5]]), "sum to one"),
        (lambda: to.fisher_rao([[0.5, 0.5]], [[1.0]]), "must agree"),
        (lambda: to.fisher_rao([[np.nan, 0.5]], [[0.5, 0.5]], kind="logits"), "NaN"),
        (lambda: embed(np.zeros((2, 3)), np.array([0, 3])), "outside the classes 0 … 2"),
        (lambda: embed(np.zeros((2, 3)), np.array([0, 1, 2])), "must have shape"),
        (lambda: embed(np.zeros((2, 3)), np.array([0.5, 1.0])), "whole numbers"),
        (lambda: embed(np.zeros((0, 3))), "no predictions"),
        (lambda: embed(np.zeros((2, 3)), np.array([-100, -100])), "every target is -100"),
        (lambda: embed(np.zeros((2, 3)), likelihood="cauchy"), "unknown"),
        (
            lambda: embed(np.zeros((2, 1)), np.array([[1.5], [1]]), likelihood="bernoulli"),
            r"\[0, 1\]",
        ),
        (lambda: embed(np.zeros((2, 1)), likelihood="gaussian", sigma2=0.0), "sigma2"),
        (lambda: to.least_distance([0.5], -1.0), "target loss"),
        (lambda: to.least_distance([1.5], 0.1), "p_y"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, said):
    with pytest.raises(InputError, match=said):
        call()
