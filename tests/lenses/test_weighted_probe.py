"""Weights of a probe's examples: a weight of 2 is the example twice, in every number of the
parameter lens, and the metric is the weighted mean of dense per-example ones (theory §1)."""

import numpy as np
import pytest
import torch
from torch import nn

import thermo_opt as to
from tests.oracles.dense_fisher import jacobians, output_fisher
from thermo_opt import fisher
from thermo_opt.fisher.certificate import gradient_norm
from thermo_opt.fisher.weighted import WeightedLikelihood, WeightedModel, mean_one
from thermo_opt.runs.probe import make_probe

COUNTS = torch.tensor([1, 3, 0, 2, 1, 2, 1, 4])
WIDTH = {"categorical": 3, "bernoulli": 3, "gaussian": 2, "poisson": 2, "heteroscedastic": 4}


def model_of(width, positions=1):
    torch.manual_seed(0)
    shape = (positions, width) if positions > 1 else (width,)
    return nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, positions * width), nn.Unflatten(1, shape)
    )


def examples(family, positions=1):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, generator=generator)
    if family == "categorical":
        y = torch.randint(0, 3, (8, positions) if positions > 1 else (8,), generator=generator)
        if positions > 1:
            y[0, 1] = y[3, 0] = -100
        return x, y
    size = WIDTH[family] // 2 if family == "heteroscedastic" else WIDTH[family]
    y = torch.rand(8, size, generator=generator)
    return x, {"bernoulli": y.round(), "poisson": (3 * y).floor()}.get(family, y)


@pytest.fixture(scope="module", params=[*WIDTH, "sequences"])
def recorded(request, tmp_path_factory):
    """A run of a few steps, its probes: weighted, and with examples as often as they count."""
    positions = 2 if request.param == "sequences" else 1
    family = "categorical" if positions > 1 else request.param
    model, (x, y) = model_of(WIDTH[family], positions), examples(family, positions)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    made = fisher.likelihoods.likelihood(family, 0.5 if family == "gaussian" else None)
    folder = tmp_path_factory.mktemp(request.param) / "run"
    options = {"sigma2": 0.5} if family == "gaussian" else {}
    with to.Recorder(
        folder,
        model=model,
        optimizer=optimizer,
        probe=(x, y, COUNTS.float()),
        params=True,
        likelihood=family,
        **options,
    ) as recorder:
        for _ in range(3):
            optimizer.zero_grad()
            f = model(x)
            counted = made.mask(y)
            nll = made.nll(f, y)
            (nll.mean() if counted is None else nll[counted].mean()).backward()
            optimizer.step()
            recorder.step()
    twice = make_probe(x.repeat_interleave(COUNTS, 0), y.repeat_interleave(COUNTS, 0))
    return folder, family, lambda: model_of(WIDTH[family], positions), twice, options


def test_a_weight_of_two_is_the_example_twice(recorded):
    folder, family, build, twice, options = recorded
    kept = {"lens": "parameters", "damping": 1e-4, "likelihood": family, **options}
    one = to.audit(folder, model=build(), **kept).headline
    other = to.audit(folder, model=build(), probe=twice, **kept).headline
    for name in ("a", "d", "loss", "loss_end", "kl_realised"):
        np.testing.assert_allclose(one.steps[name], other.steps[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(one.attribution, other.attribution, rtol=1e-6)
    assert (one.steps["delta_lower"] <= other.steps["delta_upper"] * (1 + 1e-9)).all()
    assert (other.steps["delta_lower"] <= one.steps["delta_upper"] * (1 + 1e-9)).all()
    for name in ("distance", "least_distance"):
        mine, theirs = one.summary[name], other.summary[name]
        assert (mine is None) == (theirs is None), name
        if family != "heteroscedastic" or name == "distance":
            assert mine == pytest.approx(theirs, rel=1e-6), name


@pytest.mark.parametrize("family", list(WIDTH))
def test_the_metric_is_the_weighted_mean_of_dense_ones(family):
    model = model_of(WIDTH[family]).double()
    x, y = examples(family)
    x, y = x.double(), y.double() if y.is_floating_point() else y
    weights = torch.tensor([0.3, 1.7, 0.0, 2.5, 0.01, 1.0, 4.0, 0.6], dtype=torch.float64)
    base = fisher.likelihoods.likelihood(family, 0.5 if family == "gaussian" else None)
    rows = jacobians(model, x, y)
    dense = sum(
        w * j.T @ output_fisher(f, family, 0.5) @ j
        for w, (f, j, _) in zip(weights, rows, strict=True)
    )
    dense = dense / weights.sum()
    metric = fisher.make(
        "exact",
        WeightedModel(model, base, y),
        ({"inputs": x, "weights": mean_one(weights, None, (8,))}, y),
        likelihood=WeightedLikelihood(base),
        damping=1e-3,
        microbatch=3,
    )
    size, shapes = len(dense), [p.shape for p in model.parameters()]
    v = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    cut = [t.view(s) for t, s in zip(v.split([s.numel() for s in shapes]), shapes, strict=True)]
    product = torch.cat([t.reshape(-1) for t in metric.matvec(cut)])
    torch.testing.assert_close(product, dense @ v + 1e-3 * v, rtol=1e-9, atol=1e-12)
    loss, gradient = metric.predictor.loss_and_gradient()
    nll = base.nll(model(x), y)
    mean = (weights * nll).sum() / weights.sum()
    assert loss == pytest.approx(mean.item(), rel=1e-12)
    g = torch.cat([t.reshape(-1) for t in torch.autograd.grad(mean, model.parameters())])
    torch.testing.assert_close(torch.cat([t.reshape(-1) for t in gradient]), g)
    delta = float(g @ torch.linalg.solve(dense + 1e-3 * torch.eye(size, dtype=g.dtype), g))
    bracket = gradient_norm(metric, rtol=1e-6)
    assert bracket.lower * (1 - 1e-9) <= delta <= bracket.upper * (1 + 1e-9)
    assert bracket.relative_width < 1e-4


def test_weights_that_leave_nothing_are_refused():
    ignored = torch.tensor([True, False])
    with pytest.raises(to.InputError, match="no prediction has both"):
        mean_one(torch.tensor([0.0, 1.0]), ignored, (2,))


def test_what_is_held_out_counts_by_its_weights(tmp_path):
    model, (x, y) = model_of(3), examples("categorical")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with to.Recorder(
        tmp_path / "run",
        model=model,
        optimizer=optimizer,
        probe=(x, y, COUNTS.float()),
        params=True,
    ) as recorder:
        for _ in range(2):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss, batch=(x, y))
    twice = make_probe(x.repeat_interleave(COUNTS, 0), y.repeat_interleave(COUNTS, 0))
    kept = {"lens": "counterfactual", "model": model_of(3)}
    one = to.audit(tmp_path / "run", **kept).steps
    other = to.audit(tmp_path / "run", probe=twice, **kept).steps
    numbers = one.select_dtypes("number").columns
    assert len(numbers) > 5
    assert list(one.columns) == list(other.columns)
    np.testing.assert_allclose(one[numbers], other[numbers], rtol=1e-4, atol=1e-12)
