"""NGD-T on many losses: a few steps lower them, or the refusal says what to change."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thermo_opt as to

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :4].argmax(1)
ONES = (X[:, :4] > 0).float()
REAL = X[:, :4] + 0.1 * X[:, 2:6]
COUNTS = ONES * 3
TEACHER = (3 * X[:, :4]).softmax(1)


def _pair(m):
    """Embeddings of two views."""
    return F.normalize(m(X), dim=1), F.normalize(m(X + 0.1), dim=1)


class Similarities(nn.Module):
    """Of two views of each example with those of all others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return self.one(x[:, :3]) @ self.other(x[:, 3:]).mT


def _both_directions(m):
    """CLIP's loss of similarities that the model returns."""
    f = m(X)
    return (F.cross_entropy(f, ORDER) + F.cross_entropy(f.mT, ORDER)) / 2


ORDER = torch.arange(32)


def _equation(m):
    """Residual with an inner derivative, and boundary values: two passes of unequal size."""
    x = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    return slope.square().mean() + (m(X[:8]) - REAL[:8]).square().sum(1).mean()


OF_MODELS = {
    "InfoNCE": lambda m: F.cross_entropy(_pair(m)[0] @ _pair(m)[1].mT / 0.2, torch.arange(32)),
    "contrastive in both directions (CLIP)": _both_directions,
    "CTC": lambda m: F.ctc_loss(
        m(X).view(8, 4, 4).log_softmax(-1), Y[:8].view(4, 2) % 3 + 1, (8,) * 4, (2,) * 4
    ),
    "triplet": lambda m: F.triplet_margin_loss(m(X), m(X + 0.1), m(X.flip(0))),
    "a differential equation, inner gradients": _equation,
}
"""Losses of the model itself, called once or more."""

LOSSES = {
    "cross-entropy": lambda f: F.cross_entropy(f, Y),
    "cross-entropy, class weights": lambda f: F.cross_entropy(f, Y, torch.tensor([1, 2, 1, 2.0])),
    "cross-entropy, label smoothing": lambda f: F.cross_entropy(f, Y, label_smoothing=0.1),
    "cross-entropy, soft targets": lambda f: F.cross_entropy(f, TEACHER),
    "cross-entropy, some labels ignored": lambda f: F.cross_entropy(f, Y.where(Y > 0, -100)),
    "cross-entropy × ½": lambda f: 0.5 * F.cross_entropy(f, Y),
    "nll_loss of log_softmax": lambda f: F.nll_loss(f.log_softmax(1), Y),
    "distillation, KL": lambda f: F.kl_div(f.log_softmax(1), TEACHER, reduction="batchmean"),
    "focal": lambda f: ((1 - _right(f)) ** 2 * F.cross_entropy(f, Y, reduction="none")).mean(),
    "with a penalty on the outputs": lambda f: F.cross_entropy(f, Y) + 1e-2 * f.square().mean(),
    "entropy bonus": lambda f: F.cross_entropy(f, Y) - 1e-2 * _entropy(f),
    "policy gradient, advantages": lambda f: (
        F.cross_entropy(f, Y, reduction="none") * (1 + 0.5 * X[:, 0].sign())
    ).mean(),
    "weights per example": lambda f: (
        F.cross_entropy(f, Y, reduction="none") * torch.linspace(0.5, 1.5, 32)
    ).mean(),
    "binary cross-entropy": (
        lambda f: F.binary_cross_entropy_with_logits(f, ONES, reduction="none").sum(1).mean(),
        {"likelihood": "bernoulli"},
    ),
    "squared error": (
        lambda f: 0.5 * (f - REAL).square().sum(1).mean(),
        {"likelihood": "gaussian"},
    ),
    "Poisson": (
        lambda f: F.poisson_nll_loss(f, COUNTS, reduction="none").sum(1).mean(),
        {"likelihood": "poisson"},
    ),
}


LOSSES |= {
    "cross-entropy × 3": lambda f: 3 * F.cross_entropy(f, Y),
    "policy gradient, returns of 100": lambda f: (
        F.cross_entropy(f, Y, reduction="none") * 100 * (1 + 0.1 * X[:, 0].sign())
    ).mean(),
    "hinge": lambda f: F.multi_margin_loss(f, Y),
    "squared error, targets of 1,000": (
        lambda f: 0.5 * (f - 1000 * REAL).square().sum(1).mean(),
        {"likelihood": "gaussian", "sigma2": 1e6},
    ),
    "InfoNCE": (OF_MODELS["InfoNCE"], {"likelihood": "gaussian"}),
    "contrastive in both directions (CLIP)": (
        OF_MODELS["contrastive in both directions (CLIP)"],
        {},
    ),
    "CTC": (OF_MODELS["CTC"], {}),
    "triplet": (OF_MODELS["triplet"], {"likelihood": "gaussian"}),
    "a differential equation, inner gradients": (
        OF_MODELS["a differential equation, inner gradients"],
        {"likelihood": "gaussian"},
    ),
}

SAID = {
    "cross-entropy × 3": "times the mean negative log-likelihood",
    "policy gradient, returns of 100": "times the mean negative log-likelihood",
}
"""Losses that a warning says something of."""


def _right(f):
    return f.softmax(1).gather(1, Y[:, None])[:, 0]


def _entropy(f):
    return -(f.softmax(1) * f.log_softmax(1)).sum(1).mean()


def made():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))


@pytest.mark.parametrize("name", LOSSES)
def test_a_few_steps_lower(name):
    found = LOSSES[name]
    loss, options = found if isinstance(found, tuple) else (found, {})
    model = Similarities() if "CLIP" in name else made()

    def value():
        return loss(model) if name in OF_MODELS else loss(model(X))

    before = value().item()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        optimizer = to.NGDT(model, **options)
        spent = []
        for _ in range(6):
            optimizer.zero_grad()
            value().backward()
            optimizer.step()
            spent.append(optimizer.last_step["realised"])
    assert value().item() < before
    assert max(spent) > 0
    assert max(spent) < 2 * 0.03
    texts = [str(one.message) for one in said]
    assert [text for text in texts if SAID.get(name, "nothing") not in text] == []
    assert bool(texts) == (name in SAID)


REFUSED = {
    "a sum over the batch": (lambda f: F.cross_entropy(f, Y, reduction="sum"), "reduction='mean'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_a_weight_moves(name):
    loss, says = REFUSED[name]
    model = made()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = to.NGDT(model)
    loss(model(X)).backward()
    with pytest.raises(to.InputError, match=says):
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
