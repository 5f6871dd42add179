"""Every output family's points, moves and frontiers against closed forms, derivatives and plain
optimisation."""

import numpy as np
import pytest
from scipy.optimize import minimize

import thermo_opt as to
from thermo_opt.errors import InputError
from thermo_opt.likelihoods import FAMILIES, class_axis, look_like_probabilities
from thermo_opt.manifold import embed, move, row_distances, squared_distance
from thermo_opt.manifold.initial import InitialPredictions
from thermo_opt.theory import families


def draw(family, n=7, c=4, seed=0):
    """Outputs and targets of a family."""
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, c))
    targets = {
        "categorical": lambda: rng.integers(c, size=n),
        "bernoulli": lambda: rng.integers(2, size=(n, c)).astype(float),
        "poisson": lambda: rng.integers(4, size=(n, c)).astype(float),
        "gaussian": lambda: rng.normal(size=(n, c)),
        "heteroscedastic": lambda: rng.normal(size=(n, c // 2)),
        "soft": lambda: rng.dirichlet(np.ones(c), size=n),
        "soft bernoulli": lambda: rng.uniform(size=(n, c)),
    }
    return z, targets[family](), family.split()[-1].replace("soft", "categorical")


ALL = (*FAMILIES, "soft", "soft bernoulli")


@pytest.mark.parametrize("family", ALL)
def test_a_small_move_has_the_losses_derivative_and_obeys_cauchy_schwarz(family):
    z, y, likelihood = draw(family)
    step = np.random.default_rng(1).normal(size=z.shape)
    here = embed(z, y, likelihood=likelihood)
    forth, back = (embed(z + s * 1e-4 * step, y, likelihood=likelihood) for s in (1, -1))
    d = 0.5 * (back.mean_loss - forth.mean_loss)
    assert move(here, forth, likelihood).d == pytest.approx(d, rel=2e-3)
    far = embed(z + step, y, likelihood=likelihood)
    found = move(here, far, likelihood)
    assert found.d**2 <= found.a * found.chi2 * (1 + 1e-12)
    assert found.a == pytest.approx(squared_distance(here, far, likelihood), rel=1e-12)


@pytest.mark.parametrize("family", ALL)
def test_distances_are_those_of_the_fisher_matrix_for_a_small_move(family):
    import torch

    from thermo_opt.fisher.likelihoods import likelihood as torch_family

    z, y, likelihood = draw(family)
    step = 1e-5 * np.random.default_rng(1).normal(size=z.shape)
    p, q = (embed(f, y, likelihood=likelihood) for f in (z, z + step))
    f, v = torch.from_numpy(z), torch.from_numpy(step)
    expected = float((v * torch_family(likelihood).product(f, v)).sum()) / len(z)
    assert squared_distance(p, q, likelihood) == pytest.approx(expected, rel=1e-3)
    checked = torch_family(likelihood)
    targets = checked.targets(f, torch.from_numpy(y))
    assert p.mean_loss == pytest.approx(float(checked.nll(f, targets).sum()) / len(z), rel=1e-12)
    chi2 = float(checked.chi_squared(f, targets).sum()) / len(z)
    assert move(p, q, likelihood).chi2 == pytest.approx(chi2, rel=1e-9)


def test_distances_of_learned_variances_and_of_counts_are_the_closed_forms():
    z, w = draw("heteroscedastic")[0], draw("heteroscedastic", seed=3)[0]
    p, q = (embed(f, likelihood="heteroscedastic") for f in (z, w))
    single = [
        [
            families.normal().distance(*(np.array([x[i], np.exp(x[i + 2] / 2)]) for x in (a, b)))
            for i in (0, 1)
        ]
        for a, b in zip(z, w, strict=True)
    ]
    np.testing.assert_allclose(
        row_distances(p, q, "heteroscedastic"), np.linalg.norm(single, axis=1), rtol=1e-12
    )
    p, q = (embed(f, likelihood="poisson") for f in (z, w))
    expected = np.linalg.norm(
        [[families.poisson().distance(np.exp([x]), np.exp([y])) for x, y in zip(a, b, strict=True)]
         for a, b in zip(z, w, strict=True)], axis=1
    )  # fmt: skip
    np.testing.assert_allclose(row_distances(p, q, "poisson"), expected, rtol=1e-12)


@pytest.mark.parametrize("family", ALL)
def test_equal_weights_change_nothing_zero_weights_leave_out_whole_ones_repeat(family):
    z, y, likelihood = draw(family)
    w = np.array([1, 3, 0, 2, 1, 1, 0])
    again = np.repeat(np.arange(len(z)), w)
    step = 0.5 * draw(family, seed=5)[0]

    def moved(rows, weights=None):
        p, q = (
            embed(f[rows], y[rows], weights=weights, likelihood=likelihood) for f in (z, z + step)
        )
        return p.mean_loss, *move(p, q, likelihood)

    everything = np.arange(len(z))
    np.testing.assert_allclose(moved(everything, w), moved(again), rtol=1e-10)
    assert moved(everything, np.full(len(z), 0.3)) == moved(everything)


@pytest.mark.parametrize("family", [f for f in ALL if f != "heteroscedastic"])
def test_no_predictions_of_that_loss_are_nearer_than_the_least_distance(family):
    """Against a general optimiser over all predictions, weights included."""
    z, y, likelihood = draw(family, n=3, c=2)
    w = np.array([1.0, 2.0, 0.5])
    start = embed(z, y, weights=w, likelihood=likelihood)
    begun = InitialPredictions.of(start, likelihood)
    assert begun.loss == pytest.approx(start.mean_loss, rel=1e-12)
    target = 0.4 * begun.least_loss + 0.6 * begun.loss

    def at(flat):
        return embed(flat.reshape(z.shape), y, weights=w, likelihood=likelihood)

    found = minimize(
        lambda f: squared_distance(start, at(f), likelihood),
        z.reshape(-1) + 0.1,
        constraints={"type": "ineq", "fun": lambda f: target - at(f).mean_loss},
        method="SLSQP",
        options={"maxiter": 400, "ftol": 1e-12},
    )
    assert found.success
    nearest = np.sqrt(found.fun)
    least = begun.least_distance(target)
    assert least <= nearest * (1 + 1e-6)
    if "soft" not in family:  # there it is a bound
        assert least == pytest.approx(nearest, rel=1e-3)
    assert begun.least_distance(begun.loss) == pytest.approx(0, abs=1e-5)
    with pytest.raises(InputError, match="least possible"):
        begun.least_distance(begun.least_loss - 0.1)


def test_probabilities_log_probabilities_and_logits_are_the_same_point():
    z, y, _ = draw("categorical")
    w = draw("categorical", seed=2)[0]
    log_p = z - np.log(np.exp(z).sum(1, keepdims=True))
    expected = move(embed(z, y), embed(w, y))
    for kind, f in (("log-probabilities", log_p), ("probabilities", np.exp(log_p))):
        found = move(embed(f, y, kind=kind), embed(w, y))
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    z, y, _ = draw("soft bernoulli")
    p = 1 / (1 + np.exp(-z))
    for kind, f in (("log-probabilities", np.log(p)), ("probabilities", p)):
        again = embed(f, y, kind=kind, likelihood="bernoulli")
        assert again.mean_loss == pytest.approx(embed(z, y, likelihood="bernoulli").mean_loss)


def test_images_have_their_classes_along_axis_one():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(2, 5, 3, 4)), rng.integers(5, size=(2, 3, 4))
    assert embed(z, y).mean_loss == embed(np.moveaxis(z, 1, -1), y).mean_loss
    assert class_axis((2, 5, 3, 4)) == 1
    assert class_axis((2, 5, 3), (2, 5)) == -1
    assert class_axis((2, 5, 3), (2, 3)) == 1
    with pytest.raises(InputError, match="must have shape"):
        embed(z, rng.integers(5, size=(2, 4, 3)))


def test_what_looks_like_probabilities():
    z = draw("categorical", n=20)[0]
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    assert look_like_probabilities("categorical", p)
    assert not look_like_probabilities("categorical", z)
    assert not look_like_probabilities("categorical", np.abs(z))
    assert look_like_probabilities("bernoulli", 1 / (1 + np.exp(-5 * z)))
    assert not look_like_probabilities("bernoulli", z)
    assert not look_like_probabilities("bernoulli", np.zeros_like(z))
    untrained = 0.4 + 0.1 * np.tanh(z)  # logits about the bias of a network's last layer
    assert not look_like_probabilities("bernoulli", untrained)
    assert not look_like_probabilities("gaussian", p)


@pytest.mark.parametrize(
    "weights", [np.ones(3), np.ones((7, 3)), -np.ones(7), np.zeros(7), np.full(7, np.nan)]
)
def test_weights_that_cannot_be(weights):
    z, y, _ = draw("categorical")
    with pytest.raises(InputError, match="weights"):
        embed(z, y, weights=weights)


def test_probabilities_of_any_shape_are_compared_along_the_last_axis():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(3), size=(2, 2, 4, 5))
    flat = to.fisher_rao(p.reshape(-1, 3), q.reshape(-1, 3))
    assert to.fisher_rao(p, q) == pytest.approx(flat)
