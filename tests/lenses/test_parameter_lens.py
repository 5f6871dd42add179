"""The parameter lens against a dense float64 Fisher built from explicit Jacobians, and against the
outputs lens (§2-5)."""

from pathlib import Path

import numpy as np
import pytest
import torch

import thermo_opt as to
from thermo_opt.errors import InputError
from thermo_opt.runs.probing import install

DATA = Path(__file__).parents[2] / "data"


def dense(model, x, y):
    """F, g and loss at the model's weights, from one explicit Jacobian an example, float64."""
    params = list(model.parameters())
    size = sum(p.numel() for p in params)
    fisher, gradient, loss = (
        torch.zeros(size, size, dtype=torch.float64),
        torch.zeros(size, dtype=torch.float64),
        0.0,
    )
    for xi, yi in zip(x, y, strict=True):
        f = model(xi[None])[0]
        rows = [
            torch.cat([g.reshape(-1) for g in torch.autograd.grad(fc, params, retain_graph=True)])
            for fc in f
        ]
        jacobian, p = torch.stack(rows), f.detach().softmax(0)
        fisher += jacobian.T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian / len(x)
        gradient += jacobian.T @ (p - torch.eye(len(p), dtype=p.dtype)[yi]) / len(x)
        loss -= float(p[yi].log()) / len(x)
    return fisher, gradient, loss


@pytest.mark.parametrize("quadrature", ["start", "trapezoid"])
def test_scalars_against_dense_fisher(adam_run, small_model, quadrature):
    run = to.load_run(adam_run)
    chosen = [0, 5, 36]
    got = to.audit(
        run,
        lens="parameters",
        model=small_model(),
        steps=chosen,
        quadrature=quadrature,
        damping=1e-4,
    ).headline
    model, x, y = small_model().double(), run.probe.inputs.double(), run.probe.targets
    for row, k in enumerate(chosen):
        ends = []
        for index in (k, k + 1):
            install(model, run.snapshots[index])
            theta = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
            ends.append((theta, *dense(model, x, y), model(x).detach()))
        step = ends[1][0] - ends[0][0]
        used = ends if quadrature == "trapezoid" else ends[:1]
        a = np.mean([float(step @ e[1] @ step) for e in used])
        d = -np.mean([float(e[2] @ step) for e in used])
        eye = torch.eye(len(step), dtype=torch.float64)
        delta = np.mean([float(e[2] @ torch.linalg.solve(e[1] + 1e-4 * eye, e[2])) for e in used])
        a_damped = a + 1e-4 * float(step @ step)
        epsilon = d * abs(d) / (a_damped * delta)
        seen = got.steps.iloc[row]
        assert seen["a"] == pytest.approx(a, rel=1e-9)
        assert seen["d"] == pytest.approx(d, rel=1e-9)
        assert seen["delta_lower"] <= delta * (1 + 1e-12)
        assert seen["delta_upper"] >= delta * (1 - 1e-12)
        assert seen["alignment_lower"] <= epsilon + 1e-12
        assert seen["alignment_upper"] >= epsilon - 1e-12
        assert seen["loss"] == pytest.approx(ends[0][3], rel=1e-9)
        assert seen["loss_end"] == pytest.approx(ends[1][3], rel=1e-9)
        log_p, log_q = (e[4].log_softmax(1) for e in ends)
        kl = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        assert seen["kl_realised"] == pytest.approx(kl, rel=1e-8)
        parts = got.attribution.iloc[row]
        offset = 0
        for name, p in model.named_parameters():
            block = slice(offset, offset := offset + p.numel())
            share = np.mean([float(step[block] @ (e[1] @ step)[block]) for e in used])
            assert parts[name] == pytest.approx(share / 2, rel=1e-8, abs=1e-12)
        assert parts.sum() == pytest.approx(seen["dissipation"], rel=1e-10)


def test_scattered_intervals_make_no_path_and_consecutive_ones_do(adam_run, small_model):
    scattered = to.audit(adam_run, lens="parameters", model=small_model(), steps=slice(0, 6, 2))
    assert len(scattered.steps) == scattered.summary["steps"] == 3
    for key in ("duration", "dissipation", "length", "distance", "efficiency"):
        assert scattered.summary[key] is None, key
    assert scattered.summary["alignment_lower"] is not None
    assert any("3 of 37 intervals" in note for note in scattered.summary["notes"])
    stretch = to.audit(adam_run, lens="parameters", model=small_model(), steps=slice(10, 20))
    assert stretch.summary["duration"] == 10
    assert stretch.summary["dissipation"] == pytest.approx(stretch.steps["dissipation"].sum())
    with pytest.raises(InputError, match="--steps"):
        to.audit(adam_run, lens="parameters", model=small_model(), steps=[99])


def test_nan_weights_stop_every_lens_at_the_same_step(tmp_path, make_run, small_model):
    path = make_run(tmp_path / "run", steps=8, blow_up_at=6)
    audit = to.audit(path, model=small_model())
    assert set(audit.lenses) == {"outputs", "parameters", "optimizer-state"}
    for seen in audit.lenses.values():
        assert seen.summary["steps"] == 5
        assert any("from step 6" in note for note in seen.summary["notes"])


def test_two_processes_see_what_one_sees(adam_run, small_model):
    one, two = (
        to.audit(adam_run, lens="parameters", model=small_model(), steps=slice(0, 4), jobs=jobs)
        for jobs in (1, 2)
    )
    assert one.summary == two.summary


@pytest.mark.parametrize(
    "name", ["digits-sgd", "digits-sgd-momentum", "digits-adam", "digits-adam-minibatch"]
)
def test_agrees_with_the_outputs_lens_on_runs_recorded_step_by_step(name):
    audit = to.audit(DATA / name, lens=["outputs", "parameters"], damping=1e-3)
    outputs, parameters = (audit.lenses[lens].summary for lens in ("outputs", "parameters"))
    for key in ("dissipation", "length"):
        assert parameters[key] == pytest.approx(outputs[key], rel=0.05), key
    seen = audit.lenses["parameters"].steps
    assert np.all(seen["alignment_lower"] >= -1)
    assert np.all(seen["alignment_upper"] <= 1)
    whole = audit.lenses["parameters"].attribution.sum(axis=1)
    assert np.allclose(whole, seen["dissipation"], rtol=1e-10)
    # dissipation is the realised KL to second order
    assert np.median(seen["kl_realised"] / seen["dissipation"]) == pytest.approx(1, abs=0.05)


def test_certificates_of_the_two_lenses_are_consistent(adam_run, small_model):
    """What χ² certifies from outputs alone lies below what Lanczos certifies with the model."""
    audit = to.audit(adam_run, lens=["outputs", "parameters"], model=small_model(), damping=1e-9)
    chi2 = audit.lenses["outputs"].steps["delta_upper"]
    assert np.all(audit.lenses["parameters"].steps["delta_lower"] <= chi2 * (1 + 1e-9))


def test_without_being_asked_it_glances_at_evenly_spread_intervals(adam_run, small_model):
    glance = to.audit(adam_run, model=small_model()).lenses["parameters"]
    assert len(glance.steps) == 32
    assert glance.steps["step"].iloc[[0, -1]].tolist() == [0, 36]
    assert glance.summary["dissipation"] is None


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli"])
def test_declared_probabilities_have_the_metric_of_their_logits(tmp_path, likelihood):
    """A softmax or a sigmoid after the logits changes what the model puts out, not p(y|x)."""
    classes = likelihood == "categorical"
    torch.manual_seed(0)
    x = torch.randn(30, 6)
    y = torch.randint(4, (30,)) if classes else torch.randint(2, (30, 4)).float()
    inner = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    model = torch.nn.Sequential(inner, torch.nn.Softmax(-1) if classes else torch.nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    path = tmp_path / "run"
    with to.Recorder(
        path,
        model=model,
        optimizer=optimizer,
        probe=(x, y),
        every=1,
        params=True,
        likelihood=likelihood,
        kind="probabilities",
    ) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            p = model(x)
            nll = -(p.log()[range(30), y]) if classes else (y * p + (1 - y) * (1 - p)).log().neg()
            nll.mean().backward()
            optimizer.step()
            recorder.step(batch=(x, y))
    logits = torch.nn.Sequential(inner)  # the same weights, named alike
    for lens in ("parameters", "counterfactual"):
        options = {"lens": lens, "damping": 1e-3}
        seen = to.audit(path, model=model, **options)
        same = to.audit(path, model=logits, kind="logits", **options)
        chosen = [c for c in seen.steps if c not in ("step", "step_end") and c in same.steps]
        for column in chosen:  # log p of float32 probabilities: rounding of kernels that differ
            np.testing.assert_allclose(seen.steps[column], same.steps[column], rtol=2e-5)
        assert len(chosen) > 4


def test_lenses_agree_on_a_weighted_probe(tmp_path, small_model):
    torch.manual_seed(0)
    x, y = torch.randn(12, 6), torch.randint(4, (12,))
    model = small_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    weights = torch.rand(12) + 0.5
    with to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=(x, y, weights), params=True
    ) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            recorder.step()
    seen = to.audit(tmp_path / "run", model=model).lenses
    outputs, parameters = seen["outputs"], seen["parameters"]
    for name in ("loss", "loss_end"):
        np.testing.assert_allclose(outputs.steps[name], parameters.steps[name], rtol=1e-5)
    assert outputs.summary["distance"] == pytest.approx(parameters.summary["distance"], rel=1e-5)
    alike = to.audit(tmp_path / "run", model=model, probe=(x, y)).lenses["parameters"]
    assert abs(alike.steps["loss"] - parameters.steps["loss"]).min() > 1e-4
