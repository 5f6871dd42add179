"""The inequalities and identities of theory §2-4 and §6 on random step sequences, and refusals of
impossible input."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from thermo_opt import thermodynamics as td


def random_path(seed: int, steps: int = 12, size: int = 5):
    """A path in parameters with its metric, gradient and durations, dense float64."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(steps, size, size)) * 10.0 ** rng.uniform(-3, 2)
    metric = np.einsum("kij,klj->kil", root, root) + 1e-6 * np.eye(size)
    delta, gradient = rng.normal(size=(2, steps, size))
    a = np.einsum("ki,kij,kj->k", delta, metric, delta)
    d = -np.einsum("ki,ki->k", gradient, delta)
    dual = np.einsum("ki,ki->k", gradient, np.linalg.solve(metric, gradient[..., None])[..., 0])
    return a, d, dual, rng.uniform(0.1, 3.0, size=steps)


seeds = st.integers(0, 2**32 - 1)


@given(seeds)
def test_speed_cost_bound_and_alignment(seed):
    a, d, dual, tau = random_path(seed)
    assert np.all(d * d <= a * dual * (1 + 1e-9))
    epsilon = td.alignment(a, d, dual)
    assert np.all(np.abs(epsilon) <= 1)
    assert np.allclose(epsilon, d * np.abs(d) / (a * dual))
    q = td.dissipation(a, tau)
    assert np.all(td.least_dissipation(d, dual, tau) <= q * (1 + 1e-9))
    # 1 - |ε| of the dissipation bought no first-order decrease
    assert np.allclose(td.least_dissipation(d, dual, tau), np.abs(epsilon) * q)


def test_natural_gradient_saturates_the_bound_and_its_reverse_is_minus_one():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(4, 4))
    metric, gradient = root @ root.T, rng.normal(size=4)
    step = -0.3 * np.linalg.solve(metric, gradient)
    a, d, dual = (
        step @ metric @ step,
        -gradient @ step,
        gradient @ np.linalg.solve(metric, gradient),
    )
    assert td.alignment(a, d, dual) == pytest.approx(1.0, abs=1e-12)
    assert td.alignment(a, -d, dual) == pytest.approx(-1.0, abs=1e-12)
    assert td.least_dissipation(d, dual) == pytest.approx(td.dissipation(a), rel=1e-12)


@given(seeds, st.floats(0, 1))
def test_decomposition_adds_up_with_nonnegative_parts(seed, share):
    a, _, _, tau = random_path(seed)
    parts = td.decompose(a, tau, share * td.length(a))
    assert min(parts.irreducible, parts.detour, parts.pacing) >= 0
    assert parts.irreducible + parts.detour + parts.pacing == pytest.approx(
        parts.dissipation, rel=1e-14
    )
    assert parts.efficiency == pytest.approx(
        parts.straightness * parts.steadiness, rel=1e-12, abs=1e-300
    )
    assert parts.length <= np.sqrt(2 * parts.dissipation * parts.duration) * (1 + 1e-12)
    assert 0 <= parts.efficiency <= 1 + 1e-15


def test_constant_speed_straight_path_is_wholly_irreducible():
    parts = td.decompose(np.full(7, 0.25), 2.0, distance=3.5)
    assert parts.detour == pytest.approx(0, abs=1e-15)
    assert parts.pacing == pytest.approx(0, abs=1e-15)
    assert parts.efficiency == pytest.approx(1)


@given(seeds)
def test_alignment_bracket_contains_alignment(seed):
    a, d, dual, _ = random_path(seed)
    rng = np.random.default_rng(seed)
    low, high = td.alignment_bracket(
        a, d, dual * rng.uniform(0, 1, len(a)), dual * rng.uniform(1, 4, len(a))
    )
    epsilon = td.alignment(a, d, dual)
    assert np.all(low <= epsilon + 1e-12)
    assert np.all(epsilon <= high + 1e-12)
    assert np.all((low >= -1) & (high <= 1))


def test_uncertified_delta_leaves_only_the_sign_known():
    low, high = td.alignment_bracket([1.0, 1.0], [0.1, -0.1], [0.0, 0.0], [np.inf, np.inf])
    assert low.tolist() == [0.0, -1.0]
    assert high.tolist() == [1.0, 0.0]


def test_undefined_alignment_is_nan_not_a_number_made_up():
    epsilon = td.alignment([0.0, 1.0, 1.0], [0.0, 0.0, np.nan], [1.0, 0.0, 1.0])
    assert np.isnan(epsilon).all()
    assert td.mean_alignment(epsilon, [1.0, 1.0, 1.0]) is None


def test_mixed_metrics_are_refused():
    with pytest.raises(ValueError, match="same metric"):
        td.alignment(1.0, 2.0, 1.0)


@given(seeds)
def test_action_gap_is_the_squared_distance_from_the_flow(seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(6, 4, 4))
    metric = root @ root.transpose(0, 2, 1) + 0.1 * np.eye(4)
    gradient, step = rng.normal(size=(2, 6, 4))
    tau = rng.uniform(0.1, 1, size=6)
    natural = np.linalg.solve(metric, gradient[..., None])[..., 0]
    a = np.einsum("ki,kij,kj->k", step, metric, step)
    d = -np.einsum("ki,ki->k", gradient, step)
    dual = np.einsum("ki,ki->k", gradient, natural)
    off = step / tau[:, None] + natural
    expected = 0.5 * np.sum(tau * np.einsum("ki,kij,kj->k", off, metric, off))
    assert td.action_gap(a, d, dual, tau) == pytest.approx(expected, rel=1e-9)
    flow = -tau[:, None] * natural
    a_flow = np.einsum("ki,kij,kj->k", flow, metric, flow)
    d_flow = -np.einsum("ki,ki->k", gradient, flow)
    assert td.action_gap(a_flow, d_flow, dual, tau) == pytest.approx(0, abs=1e-9)


@given(seeds)
def test_coarse_graining_never_raises_length_or_dissipation(seed):
    rng = np.random.default_rng(seed)
    points = np.cumsum(rng.normal(size=(int(rng.integers(3, 40)), 3)), axis=0)
    time = np.cumsum(rng.uniform(0.1, 1, size=len(points)))
    seen = {}
    for m in (1, 2, 3, 4, 6, 8, 12, 24):
        index = np.unique([*range(0, len(points), m), len(points) - 1])
        chord = np.sum(np.diff(points[index], axis=0) ** 2, axis=1)
        seen[m] = td.coarse_point(m, chord, np.diff(time[index]), whole=np.diff(index) == m)
    for m, fine in seen.items():
        for n, coarse in seen.items():
            if n % m == 0:
                assert coarse.length <= fine.length * (1 + 1e-12)
                assert coarse.dissipation <= fine.dissipation * (1 + 1e-12)


def test_hurst_exponent_tells_signal_from_noise():
    m = np.array([1, 2, 4, 8, 16])
    ballistic = [td.CoarsePoint(int(k), 0, 0, 3.0 * k**2) for k in m]
    diffusive = [td.CoarsePoint(int(k), 0, 0, 3.0 * k) for k in m]
    assert td.hurst_exponent(ballistic) == pytest.approx(1.0)
    assert td.hurst_exponent(diffusive) == pytest.approx(0.5)
    assert td.hurst_exponent(ballistic[:2]) is None


def test_clocks_and_impossible_input():
    assert td.durations([0, 1, 3]).tolist() == [1, 2]
    with pytest.raises(ValueError, match="backwards"):
        td.durations([0, 2, 1])
    with pytest.raises(ValueError, match="no duration"):
        td.dissipation([1.0], [0.0])
    assert td.dissipation([0.0], [0.0]).tolist() == [0.0]
    with pytest.raises(ValueError, match="non-negative"):
        td.length([-1.0])
    with pytest.raises(ValueError, match="non-negative"):
        td.dissipation([np.nan])
    with pytest.raises(ValueError, match="exceeds the path"):
        td.decompose([1.0], 1.0, distance=1.5)
    still = td.decompose([0.0, 0.0], 1.0, distance=0.0)
    assert still.dissipation == 0
    assert still.efficiency is None
