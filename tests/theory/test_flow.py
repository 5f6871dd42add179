"""Flow, geodesics and schedules against the families' closed forms and SciPy's quadrature."""

import numpy as np
import pytest

from thermo_opt.errors import InputError
from thermo_opt.theory import families as fam
from thermo_opt.theory import flow


def landscape(family, target, chart=None):
    target = np.asarray(target, dtype=float)
    if chart is None:
        return flow.Landscape(
            family.name,
            lambda x: flow.DenseMetric(family.metric(x)),
            lambda x: family.divergence(target, x),
            lambda x: family.divergence_gradient(target, x),
        )
    c = family.chart(chart)
    return flow.Landscape(
        f"{family.name} in {chart}",
        lambda u: flow.DenseMetric(family.metric_in(chart, u)),
        lambda u: family.divergence(target, c.to_canonical(u)),
        lambda u: c.jacobian(u).T @ family.divergence_gradient(target, c.to_canonical(u)),
    )


CASES = [
    (fam.normal(), [-1.0, 0.5], [2.0, 1.7]),
    (fam.normal_mean([[2.0, 0.3], [0.3, 0.5]]), [0.0, 1.0], [2.0, -1.0]),
    (fam.normal_covariance(2), [1.0, 0.3, 2.0], [0.5, -0.4, 1.5]),
    (fam.categorical(4), [0.1, 0.2, 0.3], [0.5, 0.05, 0.25]),
]
IDS = [family.name for family, _, _ in CASES]


@pytest.mark.parametrize(("family", "p", "q"), CASES, ids=IDS)
def test_flow_follows_the_analytic_solution_in_every_chart(family, p, q):
    for chart in family.charts:
        c = family.chart(chart)
        path = flow.integrate(
            landscape(family, q, chart), c.from_canonical(np.array(p)), 3.0, samples=7
        )
        reached = np.stack([c.to_canonical(u) for u in path.theta])
        np.testing.assert_allclose(reached, family.natural_flow(p, q, path.times), atol=1e-8)
        np.testing.assert_allclose(path.a, path.delta, rtol=1e-9)
        np.testing.assert_allclose(path.d, path.delta, rtol=1e-9)
        assert abs(path.energy_defect) < 1e-9 * path.loss[0]


def test_energy_identity_and_action_on_other_paths():
    family, p, q = CASES[0]
    scape = landscape(family, q)
    steepest = flow.integrate(
        scape, p, 1.0, velocity=lambda x: -family.divergence_gradient(np.array(q), x)
    )
    assert abs(steepest.energy_defect) < 1e-9
    assert steepest.action[-1] > 1e-2
    drawn = flow.trace(scape, lambda t: np.array([-1 + 2 * t, 0.5 + t * t]), 1.0)
    assert abs(drawn.energy_defect) < 1e-9
    assert drawn.action[-1] > 1e-2
    natural = flow.integrate(scape, p, 1.0)
    again = flow.trace(scape, natural, 1.0)
    assert again.action[-1] < 1e-12
    assert again.length[-1] == pytest.approx(natural.length[-1], rel=1e-8)


def test_stops():
    family, p, q = CASES[0]
    scape = landscape(family, q)
    full = flow.integrate(scape, p, 5.0)
    by_loss = flow.integrate(scape, p, 5.0, stop_loss=0.1)
    assert (by_loss.status, full.status) == ("loss", "duration")
    assert by_loss.loss[-1] == pytest.approx(0.1, abs=1e-9)
    np.testing.assert_allclose(by_loss.theta[-1], full(by_loss.duration), atol=1e-8)
    by_delta = flow.integrate(scape, p, 5.0, stop_delta=0.05)
    assert by_delta.status == "delta"
    assert by_delta.delta[-1] == pytest.approx(0.05, rel=1e-8)


@pytest.mark.parametrize(("family", "p", "q"), CASES, ids=IDS)
def test_geodesics_reach_the_closed_form(family, p, q):
    path = flow.geodesic(landscape(family, q), p, q, 2.0, matrix=family.metric, samples=9)
    distance = family.distance(np.array(p), np.array(q))
    assert path.length[-1] == pytest.approx(distance, abs=1e-8)
    assert path.dissipation[-1] == pytest.approx(distance**2 / 4, rel=1e-8)
    np.testing.assert_allclose(
        path.theta, family.geodesic(np.array(p), np.array(q), path.times / 2), atol=1e-7
    )
    np.testing.assert_allclose(path.a, (distance / 2) ** 2, rtol=1e-8)


def test_far_geodesic_between_normals_and_its_dissipation():
    family = fam.normal()
    p, q = np.array([-4.0, 0.3]), np.array([4.0, 0.2])
    path = flow.geodesic(landscape(family, q), p, q, 3.0, matrix=family.metric, samples=41)
    assert path.dissipation[-1] == pytest.approx(family.distance(p, q) ** 2 / 6, abs=1e-6)


def test_reschedule_makes_the_speed_constant_and_attains_the_bound():
    family, _p, q = CASES[0]
    scape = landscape(family, q)

    def curve(t):
        return np.array([-1 + 2 * t**2, 0.5 + 0.8 * np.sin(t)]) + np.array([0.3 * t, 0.0])

    given = flow.trace(scape, curve, 1.0)
    best = flow.reschedule(scape, curve, 1.0, 2.0)
    assert best.length[-1] == pytest.approx(given.length[-1], rel=1e-8)
    assert best.dissipation[-1] == pytest.approx(given.length[-1] ** 2 / 4, rel=1e-8)
    np.testing.assert_allclose(best.a, best.a.mean(), rtol=1e-6)
    np.testing.assert_allclose(best.theta[[0, -1]], [curve(0.0), curve(1.0)], atol=1e-9)


def test_optimal_durations():
    a = np.array([1.0, 4.0, 0.0, 9.0])
    tau = flow.optimal_durations(a, 3.0)
    np.testing.assert_allclose(tau, [0.5, 1.0, 0.0, 1.5])
    with pytest.raises(InputError, match="not all zero"):
        flow.optimal_durations(np.zeros(3), 1.0)


def test_bad_input_is_refused():
    family, p, q = CASES[0]
    scape = landscape(family, q)
    for arguments, words in [
        ({"duration": -1.0}, "duration"),
        ({"duration": 1.0, "stop_loss": 1e9}, "already reached"),
        ({"duration": 1.0, "stop_delta": 1e9}, "already reached"),
    ]:
        with pytest.raises(InputError, match=words):
            flow.integrate(scape, p, **arguments)
    with np.errstate(all="ignore"), pytest.raises(InputError, match="not finite at the start"):
        flow.integrate(scape, [0.0, 0.0], 1.0)
    with pytest.raises(flow.NotConverged, match="evaluations were not enough"):
        flow.integrate(scape, p, 1.0, max_evaluations=5)
    with pytest.raises(InputError, match="singular"):
        flow.geodesic(scape, p, q, matrix=lambda x: np.diag([1.0, 0.0]))
    with pytest.raises(InputError, match="stands still"):
        flow.reschedule(scape, lambda t: np.array([0.0, 1.0]), 1.0, 1.0)
    with pytest.raises(InputError, match="no predictions"):
        flow.integrate(scape, p, 1.0).to_run("unused")
    cliff = flow.Landscape(
        "cliff",
        lambda x: flow.DenseMetric(np.eye(1)),
        lambda x: float(np.log(x[0])),
        lambda x: 1 / x,
    )
    with np.errstate(all="ignore"), pytest.raises(flow.NotConverged, match="cliff"):
        flow.integrate(cliff, [1.0], 1.0)


def test_paths_are_recorded_runs_that_audit_takes(tmp_path):
    import thermo_opt
    from thermo_opt.theory.verify import problems as pb

    for problem in (pb.softmax_table(), pb.logistic_regression(), pb.linear_regression()):
        path = flow.integrate(problem.landscape, problem.start, 1.0, samples=41)
        run = thermo_opt.load_run(path.to_run(tmp_path / problem.name))
        assert len(run.snapshots) == 41
        np.testing.assert_allclose(
            run.clock_readings("flow", np.arange(41)), path.times, atol=1e-12
        )
        np.testing.assert_array_equal(
            run.snapshots[-1].load("params/theta").numpy(), path.theta[-1]
        )
        summary = thermo_opt.audit(run, clock="flow", lens="outputs").summary
        # a table's or a generalised linear model's outputs carry the same metric as its weights
        assert summary["length"] == pytest.approx(path.length[-1], rel=1e-3)
        assert summary["dissipation"] == pytest.approx(path.dissipation[-1], rel=1e-2)
        assert summary["dissipation"] <= path.dissipation[-1] * (1 + 1e-9)
        assert summary["duration"] == pytest.approx(1.0)
        assert summary["loss_end"] == pytest.approx(path.loss[-1], rel=1e-6)
        assert summary["least_distance"] <= summary["distance"] <= summary["length"]
        with pytest.raises(InputError, match="already holds files"):
            path.to_run(tmp_path / problem.name)


def test_energy_identity_on_the_digits_mlp():
    import torch
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:30] / 16), torch.tensor(labels[:30])
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 6), torch.nn.Tanh(), torch.nn.Linear(6, 10))
    before = [p.clone() for p in model.parameters()]
    scape, start = flow.network(model, (x, y), damping=0.02)
    path = flow.integrate(scape, start, 0.5, samples=3, rtol=1e-7, atol=1e-9)
    decrease = path.loss[0] - path.loss[-1]
    assert decrease > 0.5
    assert abs(path.energy_defect) < 1e-6 * decrease
    np.testing.assert_allclose(path.a, path.delta, rtol=1e-9)
    # the loss and its gradient are torch's own
    direct = torch.nn.functional.cross_entropy(model.double()(x.double()), y)
    assert path.loss[0] == pytest.approx(direct.item(), rel=1e-12)
    assert all(torch.equal(p.float(), q) for p, q in zip(model.parameters(), before, strict=True))
    steepest = flow.integrate(
        scape, start, 0.1, velocity=lambda t: -scape.gradient(t), samples=3, rtol=1e-7, atol=1e-9
    )
    assert abs(steepest.energy_defect) < 1e-6 * (steepest.loss[0] - steepest.loss[-1])
    assert steepest.action[-1] > 0


@pytest.mark.parametrize("metric", ["exact", "dense", "diagonal", "empirical", "kfac"])
def test_flow_of_a_network_in_any_metric_obeys_the_energy_identity(metric):
    from thermo_opt.theory.verify.networks import classifier

    model, x, y = classifier(examples=12, hidden=3)
    scape, start = flow.network(model, (x, y), metric=metric, damping=0.1)
    path = flow.integrate(scape, start, 0.3, samples=3, rtol=1e-6, atol=1e-8)
    decrease = path.loss[0] - path.loss[-1]
    assert decrease > 0.05
    assert abs(path.energy_defect) < 1e-5 * decrease
    np.testing.assert_allclose(path.a, path.delta, rtol=1e-6)
