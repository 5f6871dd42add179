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


LAGS = (1, 2, 4, 8, 16)


def products_of(path, lags=LAGS):
    def product(k, m):
        return float(np.mean((path[k + m] - path[k]) * (path[k + 3 * m] - path[k + 2 * m])))

    return {m: [(k, product(k, m)) for k in range(0, len(path) - 3 * m, m)] for m in lags}


def test_transport_is_the_motion_that_lasts_whatever_the_noise():
    velocity, scatter, steps = 0.02, 0.1, np.arange(257)
    found = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        path = np.cumsum(velocity + scatter * rng.normal(size=(257, 200)), axis=0)
        found.append(noise.lasting_transport(products_of(path), steps))
    truth = 256 * 0.5 * velocity**2
    off = [(f.total.value - truth) / f.total.error for f in found]
    assert abs(np.mean(off)) < 0.5
    assert 0.5 < np.std(off) < 1.5  # the standard error is one
    assert np.mean([f.total.significant for f in found]) > 0.9
    coarse = noise.lasting_transport(products_of(path[::2]), steps[::2])
    gap = coarse.total.value - found[-1].total.value
    assert abs(gap) < 3 * (coarse.total.error + found[-1].total.error)


def test_a_motion_that_slows_down_is_read_at_the_right_time():
    """Without noise, along a line, product of velocities = the squared one in the middle."""
    k = np.arange(257)
    path = np.repeat(np.exp(-k / 20.0)[:, None], 3, axis=1)
    exact = 0.5 * np.sum(np.diff(path[:, 0]) ** 2)
    found = noise.lasting_transport(products_of(path, (1,)), k)
    assert found.total.value == pytest.approx(exact, rel=0.12)
    per_step = 0.5 * (np.exp(-(found.step - 0.5) / 20) - np.exp(-(found.step + 0.5) / 20)) ** 2
    assert found.rate == pytest.approx(per_step, rel=0.01)


def test_a_stationary_process_transports_nothing_although_it_drifts():
    """Its expected steps undo earlier noise: all of the drift is housekeeping."""
    rng = np.random.default_rng(2)
    path = descended(300, 0.0, rng)[44:]
    variance = ETA * S2 / (H * (2 - ETA * H))
    assert np.var(path) == pytest.approx(variance, rel=0.05)
    drift = [0.5 * ETA**2 * H**2 * np.mean(x**2) for x in path[:-1:4]]
    moves = np.diff(path, axis=0)
    adjacent = [(k, float(np.mean(moves[k] * moves[k + 1]))) for k in range(len(moves) - 1)]
    at = np.arange(0, len(moves), 4)
    found = noise.balanced_transport(adjacent, drift, at, len(moves))
    housekeeping = len(moves) * 0.5 * ETA**2 * H**2 * variance
    assert abs(found.total.value) < 3 * found.total.error < 0.2 * housekeeping
    assert not noise.lasting_transport(products_of(path), np.arange(len(path))).total.significant


def test_a_motion_to_and_fro_is_no_transport():
    """ηh = 1.7: each step overshoots, and the second next goes the same way again."""
    rng = np.random.default_rng(3)
    path = [rng.normal(size=N)]
    for _ in range(200):
        path.append(path[-1] - 1.7 * path[-1] + 0.1 * rng.normal(size=N))
    path = np.array(path[40:])
    moves, steps = np.diff(path, axis=0), np.arange(len(path))
    products = products_of(path)
    fooled = noise.lasting_transport(products, steps)
    assert fooled.total.significant  # two steps later the motion is the same again
    neighbours = [(k, float(np.mean(moves[k] * moves[k + 1]))) for k in range(len(moves) - 1)]
    known = products | {0: neighbours}
    assert noise.oscillates(known, steps)
    found = noise.lasting_transport(known, steps)
    assert found.lag > 1
    assert found.total.value < 0.05 * fooled.total.value
    calm = descended(200, 0.0, rng)[44:]
    moves = np.diff(calm, axis=0)
    neighbours = [(k, float(np.mean(moves[k] * moves[k + 1]))) for k in range(len(moves) - 1)]
    assert not noise.oscillates(products_of(calm) | {0: neighbours}, np.arange(len(calm)))


def test_lags_have_the_structure_of_the_process():
    """½⟨δ_k, δ_{k+ℓ}⟩ of a stationary process is −(1−ηh)^{ℓ−1} of the housekeeping."""
    rng = np.random.default_rng(5)
    moves = np.diff(descended(500, 0.0, rng)[60:], axis=0)
    housekeeping = 0.5 * ETA**2 * H**2 * ETA * S2 / (H * (2 - ETA * H))
    for lag in (1, 2, 5):
        found = 0.5 * np.mean(moves[:-lag] * moves[lag:])
        assert found == pytest.approx(-housekeeping * (1 - ETA * H) ** (lag - 1), rel=0.1)


def test_a_lower_bound_is_called_one():
    """Where a longer lag gives significantly more, the longest is taken and said to be short."""
    grown = {m: [(k, m**2 * v) for k in range(0, 60, m)] for m, v in ((1, 0.1), (2, 0.5), (4, 1.0))}
    found = noise.lasting_transport(grown, np.arange(80))
    assert found.lag == 4
    short = noise.lasting_transport({m: grown[m] for m in (1, 2)}, np.arange(80))
    assert short.lag == 2
    assert noise.lasting_transport(grown, np.arange(80), memory=5.0).lag == 4


def test_what_can_not_be_told():
    path = np.zeros((20, 3))
    assert noise.lasting_transport(products_of(path, (8,)), np.arange(20)) is None
    assert noise.lasting_transport({}, np.arange(20)) is None
    assert noise.lasting_transport(products_of(path, (1,)), np.arange(20), memory=20) is None
    assert noise.balanced_transport([(0, 1.0)] * 9, [1.0], [0], 10) is None
    assert np.isnan(noise.over_run([1.0], [3], 10).error)
    assert noise.over_run([1.0], [3], 10).value == 10
    assert noise.over_run([1.0, 3.0], [0, 10], 11).value == pytest.approx(22)
    assert noise.over_run([1.0, 3.0], [0, 10], 11, start=10).value == 3
    with pytest.raises(ValueError, match="can't be compared"):
        noise.noise_and_drift(np.zeros((2, 3)), np.zeros((3, 3)))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum_leaves_at_most_its_share_of_every_fluctuation(momentum):
    """Var δ of heavy-ball descent at the rate η(1−μ), §11: (1−μ)/(1+μ) of plain SGD's or less."""
    rng = np.random.default_rng(7)
    h = np.array([0.1, 1.0, 5.0, 15.0])  # ηh up to 1.5
    rate = ETA * (1 - momentum)
    x, moved = np.zeros((N, 4)), np.zeros((N, 4))
    squares = []
    for k in range(600):
        xi = rng.normal(scale=np.sqrt(S2), size=x.shape)
        moved = momentum * moved - rate * (h * x + xi)
        x = x + moved
        if k >= 300:
            squares.append((moved**2).mean(axis=0))
    damped = 1 - rate * h / (2 * (1 + momentum))
    known = rate**2 * S2 / ((1 - momentum**2) * damped)
    assert np.mean(squares, axis=0) == pytest.approx(known, rel=0.03)
    plain = ETA**2 * S2 / (1 - ETA * h / 2)
    assert (known <= (1 - momentum) / (1 + momentum) * plain * (1 + 1e-12)).all()
