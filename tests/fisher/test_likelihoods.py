"""Output families against torch.distributions and their own definitions; theory §1, §5."""

import pytest
import torch

from tests.oracles.dense_fisher import DISTRIBUTIONS, log_prob, output_fisher
from thermo_opt.errors import InputError
from thermo_opt.fisher.likelihoods import NAMES, likelihood

SIGMA2 = 0.3


def draw(name, seed=0, n=6, c=4):
    generator = torch.Generator().manual_seed(seed)
    f = 1.5 * torch.randn(n, c, generator=generator, dtype=torch.float64)
    if name == "categorical":
        return f, torch.randint(c, (n,), generator=generator)
    if name == "bernoulli":
        return f, torch.randint(2, (n, c), generator=generator).double()
    if name == "poisson":
        return f, torch.randint(5, (n, c), generator=generator).double()
    outputs = c // 2 if name == "heteroscedastic" else c
    return f, torch.randn(n, outputs, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", NAMES)
def test_nll_residual_and_fisher_are_derivatives_of_the_distribution(name):
    family = likelihood(name, SIGMA2)
    f, y = draw(name)
    u = torch.randn_like(f)
    for i in range(len(f)):
        assert family.nll(f, y)[i] == pytest.approx(-float(log_prob(f[i], y[i], name, SIGMA2)))
        score = torch.autograd.functional.jacobian(
            lambda t, i=i: -log_prob(t, y[i], name, SIGMA2), f[i]
        )
        torch.testing.assert_close(family.residual(f, y)[i], score)
        Lambda = output_fisher(f[i], name, SIGMA2)
        torch.testing.assert_close(family.product(f, u)[i], Lambda @ u[i])
        B = family.factor(f)[i]
        torch.testing.assert_close(B @ B.T, Lambda)
        torch.testing.assert_close(family.root(f, u)[i], B @ u[i])
        torch.testing.assert_close(family.root_transposed(f, u)[i], B.T @ u[i])
        z = torch.linalg.pinv(B, rtol=1e-10) @ score
        torch.testing.assert_close(family.whitened(f, y)[i], z, rtol=1e-8, atol=1e-9)
        chi = float(score @ torch.linalg.pinv(Lambda, rtol=1e-10) @ score)
        assert float(family.chi_squared(f, y)[i]) == pytest.approx(chi, rel=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_kl_is_that_of_the_distribution_and_half_the_fisher_form_for_a_small_change(name):
    family = likelihood(name, SIGMA2)
    f, _ = draw(name)
    other = f + 0.3 * torch.randn_like(f)
    truth = torch.distributions.kl_divergence(
        DISTRIBUTIONS[name](f, torch.tensor(SIGMA2)),
        DISTRIBUTIONS[name](other, torch.tensor(SIGMA2)),
    )
    torch.testing.assert_close(family.kl(f, other), truth)
    small = 1e-4 * torch.randn_like(f)
    half = 0.5 * (small * family.product(f, small)).sum(-1)
    torch.testing.assert_close(family.kl(f, f + small), half, rtol=1e-3, atol=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_fisher_as_their_score_covariance(name):
    family = likelihood(name, SIGMA2)
    f, _ = draw(name, n=1, c=4)
    many = f.expand(200_000, 4)
    generator = torch.Generator().manual_seed(0)
    scores = family.residual(many, family.sample(many, generator))
    Lambda = output_fisher(f[0], name, SIGMA2)
    assert float((scores.mean(0)).abs().max()) < 0.02 * float(Lambda.diagonal().max()) ** 0.5
    torch.testing.assert_close(
        scores.T @ scores / len(many), Lambda, rtol=0.03, atol=0.02 * float(Lambda.abs().max())
    )


def test_ignored_targets_contribute_nothing():
    family = likelihood("categorical")
    f, y = draw("categorical")
    y[2] = -100
    for values in (
        family.nll(f, y),
        family.residual(f, y),
        family.whitened(f, y),
        family.chi_squared(f, y),
    ):
        assert float(values[2].abs().sum()) == 0
        assert float(values[3].abs().sum()) > 0
    mask = family.mask(y)
    assert mask is not None
    assert mask.tolist() == [True, True, False, True, True, True]


@pytest.mark.parametrize(
    ("name", "f", "y", "message"),
    [
        (
            "categorical",
            torch.zeros(4, 3),
            torch.zeros(4, 3, dtype=torch.long),
            "sum to 1",
        ),
        ("categorical", torch.zeros(4, 3), torch.full((4,), 0.5), "whole numbers"),
        (
            "categorical",
            torch.zeros(4, 3),
            torch.tensor([0, 1, 2, 3]),
            "target 3 is outside the classes 0 … 2",
        ),
        ("categorical", torch.zeros(2, 3), torch.tensor([-100, -100]), "every target is -100"),
        ("categorical", torch.zeros(4), torch.zeros(4, dtype=torch.long), "aren't class logits"),
        (
            "categorical",
            torch.zeros(4, 1),
            torch.zeros(4, dtype=torch.long),
            "for one logit 'bernoulli'",
        ),
        (
            "categorical",
            torch.zeros(4, 3, dtype=torch.long),
            torch.zeros(4, dtype=torch.long),
            "int64 of shape",
        ),
        ("bernoulli", torch.zeros(4, 2), torch.zeros(4, 3), "they must have shape"),
        ("bernoulli", torch.zeros(4, 2), torch.full((4, 2), 2.0), r"must lie in \[0, 1\]"),
        ("gaussian", torch.zeros(4, 2), torch.full((4, 2), torch.nan), "NaN or infinity"),
        ("poisson", torch.zeros(4, 2), torch.full((4, 2), -1.0), "counts ≥ 0"),
    ],
)
def test_disagreements_are_refused(name, f, y, message):
    family = likelihood(name)
    with pytest.raises(InputError, match=message):
        family.targets(family.outputs(f), y)


def test_unknown_names_and_variances_are_refused():
    with pytest.raises(InputError, match="use one of categorical"):
        likelihood("softmax")
    with pytest.raises(InputError, match="sigma2"):
        likelihood("gaussian", 0.0)


@pytest.mark.parametrize("shape", [(9, 2), (4, 15), (4, 16), (2, 3, 5), (2, 3, 40)])
def test_probabilities_of_few_and_of_many_classes(shape):
    family = likelihood("categorical")
    f = 5 * torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.arange(f[..., 0].numel()).view(shape[:-1]) % shape[-1]
    y.flatten()[1] = -100
    expected = f.softmax(-1) - torch.nn.functional.one_hot(y.clamp_min(0), shape[-1])
    torch.testing.assert_close(
        family.residual(f, y), torch.where((y == -100).unsqueeze(-1), 0.0, expected)
    )
    p = f.softmax(-1)
    torch.testing.assert_close(family.product(f, f), p * (f - (p * f).sum(-1, keepdim=True)))


def test_class_targets_out_of_range_beside_ignored_ones():
    family, f = likelihood("categorical"), torch.zeros(3, 2)
    assert family.targets(f, torch.tensor([-100, 1, 0])).tolist() == [-100, 1, 0]
    for bad in ([-100, 2, 0], [-101, 1, 0], [-100, -1, 0], [-100, -100, -100]):
        with pytest.raises(InputError, match=r"target|every"):
            family.targets(f, torch.tensor(bad))
    with pytest.raises(InputError, match="every"):
        family.targets(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))


def test_soft_targets_are_the_mean_over_their_classes():
    family = likelihood("categorical")
    f, _ = draw("categorical")
    t = torch.rand(6, 4, dtype=torch.float64).softmax(-1)
    t[1] = torch.tensor([0.0, 1.0, 0.0, 0.0])
    classes = [torch.full((6,), k) for k in range(4)]
    assert family.targets(f, t) is t
    for method in (family.nll, family.residual, family.whitened):
        each = torch.stack([method(f, y) for y in classes], -1)
        weight = t if each.dim() == 2 else t[:, None, :]
        torch.testing.assert_close(method(f, t), (weight * each).sum(-1))
    assert family.mask(t) is None
    t[2] = -100
    assert family.mask(family.targets(f, t)).tolist() == [True, True, False, True, True, True]
    assert family.nll(f, t)[2] == 0
    assert not family.residual(f, t)[2].any()
    assert not family.whitened(f, t)[2].any()


@pytest.mark.parametrize("bad", [[0.7, 0.7], [-0.5, 1.5], [0.0, 0.0]])
def test_rows_that_are_no_probabilities_are_no_soft_targets(bad):
    with pytest.raises(InputError, match="sum to 1"):
        likelihood("categorical").targets(torch.zeros(3, 2), torch.tensor([bad] * 3))


def test_the_classes_lie_where_the_targets_say_else_by_torchs_convention():
    family = likelihood("categorical")
    image, text = torch.randn(2, 5, 3, 4), torch.randn(2, 7, 5)
    assert family.outputs(image).shape == (2, 3, 4, 5)
    assert family.outputs(image, torch.zeros(2, 3, 4)).shape == (2, 3, 4, 5)
    assert family.outputs(image, torch.zeros(2, 5, 3)).shape == (2, 5, 3, 4)
    assert family.outputs(text).shape == (2, 7, 5)
    assert family.outputs(text, torch.zeros(2, 7)).shape == (2, 7, 5)
    assert family.outputs(text, torch.zeros(2, 5)).shape == (2, 5, 7)
    y = torch.randint(5, (2, 3, 4))
    expected = torch.nn.functional.cross_entropy(image, y)
    assert family.nll(family.outputs(image, y), y).mean() == pytest.approx(float(expected))
