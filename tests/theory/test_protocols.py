"""Trap protocols: closed forms against quadrature, calculus of variations and Langevin
simulation."""

import numpy as np
import pytest
from scipy.optimize import minimize

from thermo_opt.errors import InputError
from thermo_opt.theory import protocols as pr


@pytest.mark.parametrize("t", [0.1, 1.0, 10.0])
def test_quadrature_gives_the_closed_forms(t):
    assert pr.mean_work(pr.drag_optimally(3.0, t)) == pytest.approx(
        pr.drag_work_optimal(3.0, t), rel=1e-8
    )
    assert pr.mean_work(pr.drag_linearly(3.0, t)) == pytest.approx(
        pr.drag_work_linear(3.0, t), rel=1e-8
    )
    assert pr.drag_work_optimal(3.0, t) < pr.drag_work_linear(3.0, t)


def test_limits_of_dragging():
    assert pr.drag_work_linear(1.0, 1e-6) == pytest.approx(0.5, rel=1e-5)  # instantaneous: ½λ²
    assert pr.drag_work_linear(1.0, 1e4) == pytest.approx(1e-4, rel=1e-3)  # slow: λ²/t
    assert pr.drag_work_optimal(1.0, 1e4) == pytest.approx(1e-4, rel=1e-3)


def test_no_protocol_found_by_optimisation_beats_the_optimum():
    # piecewise-constant centres, free at every one of 40 steps: the mean obeys u' = c − u exactly
    # on each
    t, n = 1.0, 40
    decay = np.exp(-t / n)

    def work(c):
        u, total, before = 0.0, 0.0, 0.0
        for centre in [*c, 1.0]:
            total += 0.5 * ((u - centre) ** 2 - (u - before) ** 2)
            u, before = centre + (u - centre) * decay, centre
        return total

    best = minimize(work, np.linspace(0, 1, n), method="BFGS", options={"gtol": 1e-9})
    optimum = pr.drag_work_optimal(1.0, t)
    assert optimum <= best.fun <= optimum * 1.001
    inside = pr.drag_optimally(1.0, t).centre
    np.testing.assert_allclose(
        best.x[2:-2], [inside((i + 0.5) * t / n) for i in range(2, n - 2)], atol=2e-3
    )


@pytest.mark.parametrize("t", [0.1, 1.0, 10.0])
def test_langevin_work_agrees_with_the_optimum(t):
    distance = 2 * np.sqrt(t + 2)
    work = pr.simulate_work(
        pr.drag_optimally(distance, t), 20_000, np.random.default_rng(7), steps=100
    )
    assert work.mean() == pytest.approx(4, abs=4 * work.std() / np.sqrt(len(work)))
    # linear system: the work is normal with variance 2⟨W⟩, as Jarzynski's equality demands when ΔF
    # = 0
    assert work.var() == pytest.approx(8, rel=0.05)


def test_stiffness_schedule():
    k0, k1 = 1.0, 9.0
    free = pr.stiffen_free_energy(k0, k1)
    slow = [pr.mean_work(pr.stiffen_slowly(k0, k1, t)) - free for t in (50.0, 500.0)]
    assert slow[1] == pytest.approx(pr.stiffen_excess_slow(k0, k1, 500.0), rel=1e-2)
    assert slow[0] == pytest.approx(pr.stiffen_excess_slow(k0, k1, 50.0), rel=1e-1)
    linear = pr.mean_work(pr.stiffen_linearly(k0, k1, 500.0)) - free
    # slow excess of the linear schedule: (Δk)²/T ∫ζ dk/Δk = Δk (k0⁻² − k1⁻²)/(8T)
    assert linear == pytest.approx((k1 - k0) * (k0**-2 - k1**-2) / 8 / 500, rel=1e-2)
    assert linear > 1.5 * slow[1]
    path = pr.stiffen_slowly(k0, k1, 1.0).stiffness
    rates = [
        pr.stiffness_friction(path(s)) * ((path(s + 1e-6) - path(s - 1e-6)) / 2e-6) ** 2
        for s in (0.1, 0.5, 0.9)
    ]
    np.testing.assert_allclose(rates, pr.stiffen_excess_slow(k0, k1, 1.0), rtol=1e-7)


def test_langevin_work_of_stiffening_and_jarzynski():
    protocol = pr.stiffen_slowly(1.0, 4.0, 3.0)
    work = pr.simulate_work(protocol, 50_000, np.random.default_rng(3), steps=150)
    assert work.mean() == pytest.approx(
        pr.mean_work(protocol), abs=4 * work.std() / np.sqrt(len(work))
    )
    assert np.exp(-work).mean() == pytest.approx(
        np.exp(-pr.stiffen_free_energy(1.0, 4.0)), rel=0.02
    )


def test_bad_arguments_are_refused():
    for make in (lambda: pr.drag_optimally(1.0, 0.0), lambda: pr.drag_linearly(1.0, float("nan"))):
        with pytest.raises(InputError, match="duration must be positive"):
            make()
    with pytest.raises(InputError, match="stiffness must be positive"):
        pr.stiffen_slowly(1.0, -1.0, 1.0)
