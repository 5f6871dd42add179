"""Noise, drift and transport against processes whose parts are known in closed form; theory §11."""

import numpy as np
import pytest

from thermo_opt import noise

ETA, H, S2, N = 0.1, 1.5, 0.7, 4000
"""Learning rate, curvature, gradient noise, independent coordinates of a linear-Gaussian SGD."""


def descended(steps, start, rng, batch=1):
    """θ ← θ − η(hθ + ξ), ξ of variance s²/B: an Ornstein–Uhlenbeck process in discrete time."""
    path = [np.full(N, start, dtype=float)]
    for _ in range(steps):
        xi = rng.normal(scale=np.sqrt(S2 / batch), size=N)
        path.append(path[-1] - ETA * (H * path[-1] + xi))
    return np.array(path)


@pytest.mark.parametrize("batch", [1, 16])
def test_replicas_tell_noise_from_drift_without_bias(batch):
    rng = np.random.default_rng(0)
    path = descended(40, 2.0, rng, batch)
    at = np.arange(0, 40, 2)
    pairs = []
    for k in at:
        other = path[k] - ETA * (H * path[k] + rng.normal(scale=np.sqrt(S2 / batch), size=N))
        pairs.append(
            noise.noise_and_drift((path[k + 1] - path[k])[:, None], (other - path[k])[:, None])
        )
    apart, drift = (noise.over_run(x, at, 40) for x in np.array(pairs).T)
    assert apart.value == pytest.approx(40 * 0.5 * ETA**2 * S2 / batch, abs=4 * apart.error)
    expected = sum(0.5 * ETA**2 * H**2 * np.mean(path[k] ** 2) for k in range(40))
    assert drift.value == pytest.approx(expected, rel=0.03)
    assert apart.value * batch == pytest.approx(20 * ETA**2 * S2, rel=0.03)  # Q_noise ∝ 1/B


def test_a_full_batch_has_no_noise():
    delta = np.random.default_rng(0).normal(size=(50, 3))
    assert noise.noise_and_drift(delta, delta) == (0.0, pytest.approx(0.5 * (delta**2).sum() / 50))


def chords_of(path, strides=(1, 2, 4, 8, 16, 32)):
    return {
        m: [
            (k, k + m, float(np.mean((path[k + m] - path[k]) ** 2)))
            for k in range(0, len(path) - m, m)
        ]
        for m in strides
    }


def test_transport_is_the_motion_that_lasts_whatever_the_noise():
    rng = np.random.default_rng(1)
    velocity, scatter = 0.02, 0.1
    path = np.cumsum(velocity + scatter * rng.normal(size=(257, N)), axis=0)
    found = noise.transport(chords_of(path))
    assert found.told
    assert found.value == pytest.approx(256 * 0.5 * velocity**2, abs=4 * found.error)
    assert found.error < 0.2 * found.value
    coarse = noise.transport(chords_of(path[::2]), stride_steps=2)
    assert coarse.value == pytest.approx(found.value, abs=3 * (coarse.error + found.error))


def test_a_stationary_process_transports_nothing_although_it_drifts():
    """Its expected steps undo earlier noise: all of the drift is housekeeping."""
    rng = np.random.default_rng(2)
    path = descended(300, 0.0, rng)[44:]
    variance = ETA * S2 / (H * (2 - ETA * H))
    assert np.var(path) == pytest.approx(variance, rel=0.05)
    assert 0.5 * ETA**2 * H**2 * variance > 0
    assert not noise.transport(chords_of(path)).told


def test_what_can_not_be_told():
    path = np.zeros((20, 3))
    assert noise.transport(chords_of(path, (1, 2))) is None
    assert noise.transport({}) is None
    assert noise.transport(chords_of(np.zeros((257, 3))), memory=20) is None
    assert np.isnan(noise.over_run([1.0], [3], 10).error)
    assert noise.over_run([1.0], [3], 10).value == 10
    with pytest.raises(ValueError, match="can't be compared"):
        noise.noise_and_drift(np.zeros((2, 3)), np.zeros((3, 3)))
