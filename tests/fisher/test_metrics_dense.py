"""Every non-Kronecker kind against a dense float64 Fisher made by plain loops; theory §1, §3, §5,
§7."""

import math

import pytest
import torch

from tests.oracles.dense_fisher import dense_fisher, small_cases
from thermo_opt.fisher import gradient, make
from thermo_opt.fisher.certificate import gradient_norm
from thermo_opt.fisher.metric import flatten, unflatten

CASES = small_cases()
TRUTH = {
    (name, empirical): dense_fisher(*case, empirical=empirical)
    for name, case in CASES.items()
    for empirical in (0, 1)
}
KINDS = [("exact", {}, 0), ("exact", {"microbatch": 2}, 0), ("exact", {"cache": False}, 0)]
KINDS += [
    ("low-rank", {}, 0),
    ("dense", {}, 0),
    ("dense", {"microbatch": 3}, 0),
    ("empirical", {}, 1),
]
KINDS += [
    ("empirical", {"microbatch": 2}, 1),
    ("low-rank", {"fisher_type": "empirical"}, 1),
    ("dense", {"fisher_type": "empirical"}, 1),
]


def vectors(metric, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, metric.size, generator=generator, dtype=torch.float64)
    return unflatten(x, metric.shapes), unflatten(y, metric.shapes)


def close(mine, truth, tolerance=1e-8):
    scale = max(1e-300, float(truth.abs().max()))
    torch.testing.assert_close(flatten(mine) / scale, truth / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("kind", "options", "empirical"), KINDS)
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_agrees_with_the_dense_fisher(name, kind, options, empirical, damping):
    model, x, y = CASES[name]
    F = TRUTH[name, empirical]
    metric = make(kind, model, (x, y), damping=damping, **options)
    full = F + damping * torch.eye(len(F), dtype=torch.float64)
    v, g = vectors(metric)
    x_v, x_g = flatten(v), flatten(g)
    close(metric.matvec(v), full @ x_v)
    for _ in range(4):  # the first by forward mode, later ones by the linearisation
        assert metric.quadratic(v) == pytest.approx(float(x_v @ full @ x_v), rel=1e-10)
    values, basis = torch.linalg.eigh(F)
    kept = values > 1e-12 * values[-1]
    basis_kept = basis[:, kept]
    if damping:
        inverse = torch.linalg.inv(full)
    else:
        inverse = basis_kept @ torch.diag(1 / values[kept]) @ basis_kept.T
    # A null space is as exact as the gap in the spectrum is wide; these models have a wide one.
    assert float(values[kept].min() / values[-1]) > 1e-6
    close(metric.solve(g), inverse @ x_g)
    low, high = metric.dual_norm(g)
    truth = float(x_g @ inverse @ x_g)
    assert low <= truth * (1 + 1e-8)
    assert high >= truth * (1 - 1e-8)
    assert high - low <= 0.1 * high
    inside, outside = metric.split(g)
    close(inside, basis_kept @ (basis_kept.T @ x_g))
    close([a + b for a, b in zip(inside, outside, strict=True)], x_g)
    assert float(flatten(outside) @ F @ flatten(outside)) < 1e-10 * float(values[-1])


@pytest.mark.parametrize("name", CASES)
def test_diagonal_is_the_diagonal(name):
    model, x, y = CASES[name]
    for fisher_type, empirical in (("type-2", 0), ("empirical", 1)):
        metric = make("diagonal", model, (x, y), damping=1e-3, fisher_type=fisher_type)
        diagonal = TRUTH[name, empirical].diagonal()
        torch.testing.assert_close(flatten(metric.diagonal), diagonal, rtol=1e-10, atol=1e-14)
        v, g = vectors(metric)
        close(metric.matvec(v), (diagonal + 1e-3) * flatten(v))
        close(metric.solve(g), flatten(g) / (diagonal + 1e-3))
        assert metric.dual_norm(g).lower == pytest.approx(
            float((flatten(g) ** 2 / (diagonal + 1e-3)).sum())
        )
        assert metric.diagnostics()["trace"] == pytest.approx(float(diagonal.sum()))


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "poisson"])
@pytest.mark.parametrize("kind", ["exact", "low-rank", "dense", "empirical"])
def test_other_likelihoods(likelihood, kind):
    model, x, _ = CASES["mlp"]
    y = torch.randint(2, (7, 3)).double()
    truth = dense_fisher(model, x, y, likelihood, 0.5, empirical=kind == "empirical")
    metric = make(kind, model, (x, y), likelihood, damping=1e-3, sigma2=0.5)
    torch.testing.assert_close(
        metric.dense(),
        truth + 1e-3 * torch.eye(len(truth), dtype=torch.float64),
        rtol=1e-9,
        atol=1e-12,
    )


def test_sequence_bernoulli_and_single_outputs():
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(3, 1)).double()
    x, y = torch.randn(4, 2, 3, dtype=torch.float64), torch.randint(2, (4, 2)).double()
    truth = dense_fisher(model, x, y.unsqueeze(-1), "bernoulli")
    torch.testing.assert_close(make("exact", model, (x, y), "bernoulli").dense(), truth)


@pytest.mark.parametrize("name", CASES)
def test_sampled_targets_are_unbiased(name):
    model, x, y = CASES[name]
    metric = make("diagonal", model, (x, y), fisher_type="mc", samples=4000, seed=0)
    exact = TRUTH[name, 0].diagonal()
    # Each entry's standard error is at most √(E s⁴/N); the trace averages many entries.
    assert float(flatten(metric.diagonal).sum()) == pytest.approx(float(exact.sum()), rel=0.05)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("empirical", [False, True])
def test_gradient_norm_brackets_the_dense_truth_and_chi_squared_bounds_it(name, empirical):
    model, x, y = CASES[name]
    F = TRUTH[name, int(empirical)]
    g = flatten(gradient(model, (x, y)))
    values, basis = torch.linalg.eigh(F)
    along = (basis.T @ g) ** 2
    kept = values > 1e-12 * values[-1]
    undamped = float((along[kept] / values[kept]).sum())
    for damping in (1e-1, 1e-3, 1e-6):
        truth = float((along / (values.clamp(min=0) + damping)).sum())
        metric = make("empirical" if empirical else "exact", model, (x, y), damping=damping)
        for rtol in (0.5, 0.1, 1e-6):
            bracket = gradient_norm(metric, rtol)
            assert bracket.lower <= truth * (1 + 1e-9)
            assert truth * (1 - 1e-9) <= bracket.upper
            assert bracket.relative_width <= rtol
    likelihood = metric.predictor.likelihood
    f = model(x).detach()
    chi = 1.0 if empirical else metric.predictor.mean([likelihood.chi_squared(f, y)])
    assert undamped <= chi * (1 + 1e-9)
    if not empirical:
        p = f.softmax(-1).gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)[y != -100]
        assert chi == pytest.approx(float((1 / p - 1).mean()))


def test_alignment_lies_within_one_for_every_kind():
    for model, x, y in CASES.values():
        g = gradient(model, (x, y))
        for kind in ("exact", "empirical", "dense", "low-rank", "diagonal"):
            metric = make(kind, model, (x, y), damping=1e-3)
            for step in (vectors(metric)[0], metric.solve(g), [-t for t in g]):
                d = -float(flatten(g) @ flatten(step))
                lower, upper = metric.dual_norm(g)
                a = metric.quadratic(step)
                assert d**2 <= a * upper * (1 + 1e-9)
                assert lower > 0
                assert math.isfinite(upper)
            natural = metric.solve(g)
            assert metric.quadratic(natural) == pytest.approx(metric.dual_norm(g).upper, rel=0.12)


def test_float32_models_get_float64_certificates():
    model, x, y = CASES["mlp"]
    single = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    single.load_state_dict(model.state_dict())
    exact_weights = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)
    ).double()
    exact_weights.load_state_dict(single.state_dict())
    x32 = x.float()
    F = dense_fisher(exact_weights, x32.double(), y)
    metric = make("exact", single, (x32, y), damping=1e-9)
    g = gradient(exact_weights, (x32.double(), y))
    values, basis = torch.linalg.eigh(F)
    truth = float(((basis.T @ flatten(g)) ** 2 / (values.clamp(min=0) + 1e-9)).sum())
    lower, upper = gradient_norm(metric, 1e-6)
    assert lower * (1 - 1e-6) <= truth <= upper * (1 + 1e-6)
    assert metric.matvec(g)[0].dtype == torch.float32
