"""A run's line in the speed-cost plane: the loss is convex along geodesics, so crossings lie on or
above the frontier."""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

import thermo_opt as to
from thermo_opt.fronts.trajectory import read_trajectory, trajectory_of
from thermo_opt.runs import load_run


def along(p, q, s):
    """Point at fraction s of the great circle between rows of amplitudes √p and √q, as
    probabilities."""
    u, v = np.sqrt(p), np.sqrt(q)
    angle = np.arccos(np.clip((u * v).sum(-1, keepdims=True), -1, 1))
    return ((np.sin((1 - s) * angle) * u + np.sin(s * angle) * v) / np.sin(angle)) ** 2


@given(st.integers(0, 10_000), st.floats(0, 1))
@settings(max_examples=60)
def test_the_loss_is_convex_along_a_geodesic(seed, s):
    rng = np.random.default_rng(seed)
    p, q = softmax(3 * rng.normal(size=(2, 9, 4)), axis=-1)
    y = rng.integers(0, 4, 9)
    loss = [float(-np.log(r[np.arange(9), y]).mean()) for r in (p, along(p, q, s), q)]
    assert loss[1] <= (1 - s) * loss[0] + s * loss[2] + 1e-12


@given(seed=st.integers(0, 10_000), depth=st.floats(0.02, 0.98))
@settings(max_examples=40)
def test_crossings_lie_on_or_above_the_frontier_and_not_before_the_geodesic_meets_the_target(
    write_run, descent, seed, depth
):
    z, y = descent(seed, snapshots=7, n=5, noise=0.6, speed=0.5)
    with tempfile.TemporaryDirectory() as folder:
        track = read_trajectory(load_run(write_run(Path(folder) / "run", z, y)))
    p = softmax(z, axis=-1)
    rows = np.arange(len(y))
    loss = -np.log(p[:, rows, y]).mean(axis=1)
    assert track.loss == pytest.approx(loss, rel=1e-12)
    if loss.min() >= loss[0]:
        return
    target = loss[0] - depth * (loss[0] - loss.min())
    found = track.crossing(target)
    least = to.least_distance(p[0, rows, y], target)
    assert found.least_distance == pytest.approx(least, rel=1e-9)
    assert found.dissipation * found.time >= 0.5 * least**2 * (1 - 1e-9)
    end = int(np.flatnonzero(loss <= target)[0])
    meets = brentq(
        lambda s: -np.log(along(p[end - 1], p[end], s)[rows, y]).mean() - target, 0, 1, xtol=1e-14
    )
    assert end - 1 + meets <= found.time + 1e-9


def test_the_straight_path_at_constant_speed_lies_on_the_frontier(tmp_path, write_run):
    phi = np.linspace(1.2, 0.3, 10)  # one example's angle to its target, arccos √p(y)
    p = np.stack([np.cos(phi) ** 2, np.sin(phi) ** 2], axis=-1)[:, None, :]
    track = read_trajectory(load_run(write_run(tmp_path / "run", np.log(p), np.array([0]))))
    found = track.crossing(float(-2 * np.log(np.cos(phi[-1]))) * (1 + 1e-15))
    assert found.time == pytest.approx(9)
    assert found.least_distance == pytest.approx(2 * 0.9)
    assert found.least_distance**2 / (2 * found.time * found.dissipation) == pytest.approx(
        1, rel=1e-9
    )


def test_a_run_that_never_gets_there_has_no_crossing(runs):
    track = read_trajectory(load_run(runs[-1]))
    found = track.crossing(track.best * 0.9)
    assert not found.reached
    assert np.isnan(found.time)
    assert np.isnan(found.dissipation)
    assert found.least_distance > 0


def test_the_first_crossing_counts_not_the_last(tmp_path, write_run):
    z = np.zeros((5, 1, 2))
    z[:, 0, 0] = [0.0, 2.0, -1.0, 3.0, 4.0]
    track = read_trajectory(load_run(write_run(tmp_path / "run", z, np.array([0]), every=10)))
    target = float(-log_softmax(z[1, 0])[0])
    assert track.crossing(target).step == pytest.approx(10)


OUTPUTS = {
    "categorical": lambda rng: (rng.normal(size=(6, 9, 4)), rng.integers(0, 4, 9)),
    "sequences": lambda rng: (
        rng.normal(size=(6, 4, 5, 3)),
        np.where(np.eye(4, 5) > 0, -100, rng.integers(0, 3, (4, 5))),
    ),
    "bernoulli": lambda rng: (rng.normal(size=(6, 7, 3)), rng.integers(0, 2, (7, 3))),
    "gaussian": lambda rng: (rng.normal(size=(6, 7, 3)), rng.normal(size=(7, 3))),
    "masked": lambda rng: (
        np.where(np.arange(4) == 3, -np.inf, rng.normal(size=(6, 9, 4))),
        rng.integers(0, 3, 9),
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("clock", ["step", "wall"])
def test_the_quick_reading_agrees_with_the_audit(tmp_path, write_run, kind, clock):
    z, y = OUTPUTS[kind](np.random.default_rng(3))
    likelihood = kind if kind in ("bernoulli", "gaussian") else "categorical"
    path = write_run(tmp_path / "run", z, y, every=3, likelihood=likelihood, sigma2=0.5)
    slow, quick = (
        trajectory_of(to.audit(path, lens="outputs"), clock),
        read_trajectory(load_run(path), clock),
    )
    assert slow.clock == quick.clock == clock
    for column in ("steps", "loss", "time", "dissipation"):
        np.testing.assert_allclose(getattr(quick, column), getattr(slow, column), rtol=1e-12)
    below = quick.loss[0] - 0.1
    assert quick.start.least_distance(below) == pytest.approx(
        slow.start.least_distance(below), rel=1e-12
    )
    assert quick.start.loss == pytest.approx(quick.loss[0], rel=1e-12)


def test_predictions_that_stop_being_numbers_end_the_line(
    tmp_path, write_run, descent, monkeypatch
):
    z, y = descent(0)
    z[9, 3, 1] = np.nan
    path = write_run(tmp_path / "run", z, y)
    whole = read_trajectory(load_run(path))
    assert whole.steps.tolist() == list(range(9))
    monkeypatch.setattr("thermo_opt.lenses.path._BLOCK_BYTES", 1)  # two snapshots at a time
    np.testing.assert_allclose(
        read_trajectory(load_run(path)).dissipation, whole.dissipation, rtol=1e-12
    )


def test_a_run_that_is_never_a_number_twice_is_refused(tmp_path, write_run, descent):
    z, y = descent(0)
    z[1:] = np.nan
    with pytest.raises(to.InputError, match="no path to follow"):
        read_trajectory(load_run(write_run(tmp_path / "run", z, y)))
