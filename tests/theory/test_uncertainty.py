"""Uncertainty relations against Ornstein–Uhlenbeck processes whose entropy production is known."""

import numpy as np
import pytest
from scipy.integrate import trapezoid

from thermo_opt.theory import uncertainty

K, D, RUNS = 1.3, 0.5, 20_000


def relaxed(start, spread, times, rng):
    """x' = −Kx + √(2D) ξ from a Gaussian, exactly sampled; (runs, times) displacements."""
    x0 = start + spread * rng.normal(size=RUNS)
    x, paths, before = x0, [], 0.0
    for t in times:
        decay = np.exp(-K * (t - before))
        x = x * decay + np.sqrt(D / K * (1 - decay**2)) * rng.normal(size=RUNS)
        paths.append(x - x0)
        before = t
    return np.array(paths).T


def produced(start, spread, duration):
    """∫ ⟨ν²⟩/D dt with ν = −Kx + D(x − m)/s the local mean velocity."""
    t = np.linspace(0, duration, 20_001)
    mean = start * np.exp(-K * t)
    var = D / K + (spread**2 - D / K) * np.exp(-2 * K * t)
    return trapezoid((K**2 * mean**2 + (D / var - K) ** 2 * var) / D, t)


@pytest.mark.parametrize(("start", "spread"), [(2.0, 0.3), (1.0, 0.62), (3.0, 1.5)])
def test_a_relaxation_produces_at_least_its_bound(start, spread):
    rng = np.random.default_rng(0)
    for duration in (0.1, 0.5, 2.0):
        times = [0.95 * duration, duration]
        found = uncertainty.relaxing_bound(relaxed(start, spread, times, rng), times)
        mean = start * (np.exp(-K * times[1]) - np.exp(-K * times[0])) / (0.05 * duration)
        decay = np.exp(-K * duration)
        variance = spread**2 * (1 - decay) ** 2 + D / K * (1 - decay**2)
        known = 2 * (duration * mean) ** 2 / variance
        assert found.value == pytest.approx(known, rel=0.1, abs=4 * found.error)
        assert found.value - 4 * found.error <= produced(start, spread, duration)


def test_a_dragged_particle_saturates_in_the_steady_state():
    """Carried along at constant force: Σ = f²t/D, and its displacement's bound is equal to it."""
    rng = np.random.default_rng(1)
    force, t = 0.8, 3.0
    moved = force * t + np.sqrt(2 * D * t) * rng.normal(size=RUNS)
    found = uncertainty.steady_bound(moved)
    assert found.value == pytest.approx(force**2 * t / D, abs=4 * found.error)
    assert found.error < 0.05 * found.value


def test_bounds_in_discrete_time_are_weaker_and_tend_to_the_others():
    moved = 1 + np.random.default_rng(2).normal(size=1000)
    steady = uncertainty.steady_bound(moved).value
    found = [uncertainty.discrete_bound(moved, n).value for n in (1, 10, 100_000)]
    assert found[0] < found[1] < found[2] < steady
    assert found[2] == pytest.approx(steady, rel=1e-4)
    assert found[0] == pytest.approx(np.log1p(steady))


def test_the_error_is_one_and_there_is_no_bias():
    found = [
        uncertainty.steady_bound(1 + np.random.default_rng(s).normal(size=30)) for s in range(400)
    ]
    values = np.array([f.value for f in found])
    assert values.mean() == pytest.approx(2, abs=4 * values.std() / 20)
    assert np.mean([f.error for f in found]) == pytest.approx(values.std(), rel=0.25)


def test_no_current_bounds_nothing():
    zero = uncertainty.steady_bound(np.random.default_rng(3).normal(size=4000))
    assert zero.value < 4 * zero.error + 1e-2
    with pytest.raises(ValueError, match="3 runs"):
        uncertainty.steady_bound([1.0, 2.0])
    with pytest.raises(ValueError, match="same in all runs"):
        uncertainty.steady_bound([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="increasing times"):
        uncertainty.relaxing_bound(np.ones((4, 2)), [1.0, 1.0])
    with pytest.raises(ValueError, match="at least 1"):
        uncertainty.discrete_bound([1.0, 2.0, 4.0], 0)
