"""Closed forms of the families against SciPy's quadrature, geomstats and the definition of the
metric."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, linalg

from thermo_opt.errors import InputError
from thermo_opt.manifold import fisher_rao
from thermo_opt.theory import families as fam

COVARIANCE = np.array([[2.0, 0.3], [0.3, 0.5]])
FAMILIES = {
    "bernoulli": (fam.bernoulli(), [0.2], [0.9]),
    "categorical": (fam.categorical(4), [0.1, 0.2, 0.3], [0.5, 0.05, 0.25]),
    "poisson": (fam.poisson(), [3.0], [0.7]),
    "exponential": (fam.exponential(), [0.4], [2.5]),
    "normal": (fam.normal(), [-1.0, 0.5], [2.0, 1.7]),
    "normal, same mean": (fam.normal(), [1.0, 0.5], [1.0, 1.7]),
    "normal, far and thin": (fam.normal(), [0.0, 1e-3], [50.0, 2e-3]),
    "normal-mean": (fam.normal_mean(COVARIANCE), [0.0, 1.0], [2.0, -1.0]),
    "normal-covariance": (fam.normal_covariance(2), [1.0, 0.3, 2.0], [0.5, -0.4, 1.5]),
}
CASES = [pytest.param(f, np.array(p), np.array(q), id=name) for name, (f, p, q) in FAMILIES.items()]
CHARTS = [
    pytest.param(f, c, np.array(p), id=f"{n}/{c}")
    for n, (f, p, _) in FAMILIES.items()
    for c in f.charts
]


def jacobian(function, at, h=1e-3):
    """Eighth-order central differences: an oracle for derivatives good to about 1e-11."""
    columns = []
    for i in range(len(at)):
        e = np.zeros(len(at))
        e[i] = h * (abs(at[i]) or 1e-3)
        weights = {1: 4 / 5, 2: -1 / 5, 3: 4 / 105, 4: -1 / 280}
        columns.append(
            sum(w * (function(at + k * e) - function(at - k * e)) for k, w in weights.items())
            / e[i]
        )
    return np.stack(columns, axis=-1)


@pytest.mark.parametrize(("family", "p", "q"), CASES)
def test_distance_is_the_length_of_the_geodesic_and_its_speed_is_constant(family, p, q):
    def speed(s):
        velocity = jacobian(lambda u: family.geodesic(p, q, u)[0], np.array([s]), h=2e-3)[:, 0]
        theta = family.geodesic(p, q, np.array([s]))[0]
        return np.sqrt(velocity @ family.metric(theta) @ velocity)

    distance = family.distance(p, q)
    nodes, weights = np.polynomial.legendre.leggauss(8)
    speeds = np.array([speed(0.5 + 0.45 * x) for x in nodes])
    assert weights @ speeds / 2 == pytest.approx(distance, rel=1e-9)
    np.testing.assert_allclose(speeds, distance, rtol=1e-8)
    np.testing.assert_allclose(
        family.geodesic(p, q, np.array([0.0, 1.0])), [p, q], rtol=1e-10, atol=1e-12
    )
    assert family.distance(q, p) == pytest.approx(distance, rel=1e-12)


@pytest.mark.parametrize(("family", "p", "q"), CASES)
def test_one_parameter_distances_are_integrals_of_the_root_metric(family, p, q):
    along = family.geodesic(p, q, np.linspace(0, 1, 9))
    pieces = [family.distance(x, y) for x, y in itertools.pairwise(along)]
    assert sum(pieces) == pytest.approx(family.distance(p, q), rel=1e-10)
    if family.dimension == 1:
        root = integrate.quad(
            lambda x: np.sqrt(family.metric(np.array([x]))[0, 0]),
            *sorted([p[0], q[0]]),
            epsabs=1e-13,
        )
        assert family.distance(p, q) == pytest.approx(root[0], abs=1e-10)


@pytest.mark.parametrize(("family", "p", "q"), CASES)
def test_metric_and_gradient_are_the_derivatives_of_the_divergence(family, p, q):
    gradient = jacobian(lambda x: np.array([family.divergence(p, x)]), q)[0]
    np.testing.assert_allclose(family.divergence_gradient(p, q), gradient, rtol=1e-8, atol=1e-9)
    hessian = jacobian(lambda x: family.divergence_gradient(p, x), p)
    np.testing.assert_allclose(
        family.metric(p), hessian, rtol=1e-8, atol=1e-8 * np.abs(hessian).max()
    )
    assert family.divergence(p, p) == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize(("family", "chart", "p"), CHARTS)
def test_charts_invert_and_their_jacobians_are_derivatives(family, chart, p):
    c = family.chart(chart)
    phi = c.from_canonical(p)
    np.testing.assert_allclose(c.to_canonical(phi), p, rtol=1e-12)
    expected = jacobian(c.to_canonical, phi)
    np.testing.assert_allclose(
        c.jacobian(phi), expected, rtol=1e-8, atol=1e-8 * np.abs(expected).max()
    )
    np.testing.assert_allclose(family.from_expectation(family.expectation(p)), p, rtol=1e-12)


def test_natural_coordinates_have_the_covariance_of_the_statistics_as_metric():
    x = np.random.default_rng(0).normal(1.5, 0.7, 400_000)
    normal = fam.normal()
    phi = normal.chart("natural").from_canonical(np.array([1.5, 0.7]))
    np.testing.assert_allclose(normal.metric_in("natural", phi), np.cov([x, x**2]), rtol=0.02)


@pytest.mark.parametrize(("family", "p", "q"), CASES)
def test_natural_flow_solves_its_equation(family, p, q):
    def velocity(t):
        return jacobian(lambda u: family.natural_flow(p, q, u)[0], np.array([t]))[:, 0]

    for t in (0.1, 1.0, 3.0):
        theta = family.natural_flow(p, q, t)[0]
        expected = -np.linalg.solve(family.metric(theta), family.divergence_gradient(q, theta))
        np.testing.assert_allclose(
            velocity(t), expected, rtol=1e-7, atol=1e-9 * np.abs(expected).max() + 1e-10
        )


def test_known_values():
    assert fam.bernoulli().distance(np.array([0.25]), np.array([0.75])) == pytest.approx(
        np.pi / 3, abs=1e-14
    )
    assert fam.poisson().distance(np.array([1.0]), np.array([4.0])) == 2
    assert fam.exponential().distance(np.array([1.0]), np.array([np.e])) == pytest.approx(
        1, abs=1e-15
    )
    # along σ alone the normal's metric is 2(dσ/σ)²
    assert fam.normal().distance(np.array([0.0, 1]), np.array([0.0, np.e])) == pytest.approx(
        np.sqrt(2), abs=1e-14
    )
    whitened = linalg.solve(COVARIANCE, [2.0, -2.0])
    assert fam.normal_mean(COVARIANCE).distance(
        np.array([0.0, 1]), np.array([2.0, -1])
    ) == pytest.approx(np.sqrt(whitened @ [2.0, -2.0]), abs=1e-13)


def test_small_distances_keep_their_digits():
    # D² = 2 KL to leading order, so D/|δ|_F → 1; a naive arccos or arccosh would return 0 here
    for family, p, q in FAMILIES.values():
        p, q = np.array(p), np.array(q)
        step = 1e-9 * (q - p)
        norm = np.sqrt(step @ family.metric(p) @ step)
        assert family.distance(p, p + step) == pytest.approx(norm, rel=1e-5)


def test_normal_distance_survives_extreme_scales():
    # far apart at tiny σ the half-plane distance grows like 2√2 ln(Δμ/(√2 σ))
    d = fam.normal().distance(np.array([0.0, 1e-150]), np.array([1.0, 1e-150]))
    assert d == pytest.approx(2 * np.sqrt(2) * np.log(1 / (np.sqrt(2) * 1e-150)), rel=1e-12)


def test_categorical_agrees_with_the_batch_distance():
    rng = np.random.default_rng(1)
    p, q = rng.dirichlet(np.ones(5), size=2)
    d = fam.categorical(5).distance(p[:-1], q[:-1])
    assert d == pytest.approx(fisher_rao(p[None], q[None]), rel=1e-12)
    assert d == pytest.approx(2 * np.arccos(np.sqrt(p * q).sum()), rel=1e-10)


def test_against_geomstats(monkeypatch):
    monkeypatch.setenv("GEOMSTATS_BACKEND", "numpy")
    if not hasattr(np, "trapz"):  # geomstats 2.8 knows NumPy 2.4's function by its older name
        monkeypatch.setattr(np, "trapz", np.trapezoid, raising=False)
    from geomstats.information_geometry.binomial import BinomialDistributions
    from geomstats.information_geometry.categorical import CategoricalDistributions
    from geomstats.information_geometry.exponential import ExponentialDistributions
    from geomstats.information_geometry.normal import (
        CenteredNormalDistributions,
        UnivariateNormalDistributions,
    )
    from geomstats.information_geometry.poisson import PoissonDistributions

    def matrix(x):
        return np.array([[x[0], x[1]], [x[1], x[2]]])

    def full(x):
        return np.append(x, 1 - np.sum(x))

    judges = {
        "bernoulli": (BinomialDistributions(1), lambda x: x),
        "categorical": (CategoricalDistributions(3), full),
        "poisson": (PoissonDistributions(), lambda x: x),
        "exponential": (ExponentialDistributions(), lambda x: x),
        "normal": (UnivariateNormalDistributions(), lambda x: x),
        "normal-covariance": (CenteredNormalDistributions(2), matrix),
    }
    for name, (space, convert) in judges.items():
        family, p, q = FAMILIES[name]
        p, q = np.array(p), np.array(q)
        theirs = np.asarray(space.metric.dist(convert(p), convert(q))).item()
        assert family.distance(p, q) == pytest.approx(theirs, abs=1e-10), name
    metric = UnivariateNormalDistributions().metric.metric_matrix(np.array([-1.0, 0.5]))
    np.testing.assert_allclose(fam.normal().metric(np.array([-1.0, 0.5])), metric, atol=1e-10)


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0.05, 5)), min_size=3, max_size=3))
def test_triangle_inequality_between_normals(points):
    a, b, c = (np.array(p) for p in points)
    d = fam.normal().distance
    assert d(a, c) <= d(a, b) + d(b, c) + 1e-12


@pytest.mark.parametrize(
    ("family", "theta"),
    [
        (fam.bernoulli(), [1.0]),
        (fam.categorical(3), [0.5, 0.5]),
        (fam.poisson(), [-1.0]),
        (fam.normal(), [0.0, 0.0]),
        (fam.normal(), [0.0]),
        (fam.normal(), [np.nan, 1.0]),
        (fam.normal_covariance(2), [1.0, 2.0, 1.0]),
    ],
)
def test_points_outside_the_domain_are_refused(family, theta):
    with pytest.raises(InputError, match="not a point of the family"):
        family.natural_flow(theta, theta, 1.0)


def test_bad_arguments_are_refused():
    with pytest.raises(InputError, match="choose one of mean-scale"):
        fam.normal().metric_in("polar", np.array([0.0, 1.0]))
    with pytest.raises(InputError, match="positive definite"):
        fam.normal_mean([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(InputError, match="at least 2 classes"):
        fam.categorical(1)
