"""Every step keeps its budget, measured on its own whole minibatch apart from the optimizer."""

from __future__ import annotations

import statistics

import pytest
import torch
from sklearn.datasets import load_digits, make_classification
from torch import Tensor, nn
from torch.nn import functional

import thermo_opt as to


class Paths(nn.Module):
    """A residual net whose branches are dropped, with functional dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(20, 32), nn.Linear(32, 4)
        self.branches = nn.ModuleList([nn.Linear(32, 32) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for branch in self.branches:
            keep = (torch.rand(len(h), 1) < 0.8) / 0.8 if self.training else 1.0
            h = h + keep * torch.relu(branch(functional.dropout(h, 0.1, self.training)))
        return self.last(h)


def gelu() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 12, 3, 2, 1), nn.GELU(), nn.Conv2d(12, 16, 3, 2, 1), nn.GELU()),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, torch.tensor(
        found.target
    )


def table() -> tuple[Tensor, Tensor]:
    x, y = make_classification(2000, 20, n_informative=8, n_classes=4, flip_y=0.1, random_state=0)
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y)


def ratios(model: nn.Module, data: tuple[Tensor, Tensor], budget: float, steps: int) -> list[float]:
    """Realised KL over what the step was allowed: the budget, or less where the signal is weak."""
    optimizer = to.NGDT(model, budget=budget)
    x, y = data
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        k = torch.randint(len(y), (96,), generator=generator)
        state = torch.get_rng_state()
        before = model(x[k])
        optimizer.zero_grad()
        functional.cross_entropy(before, y[k]).backward()
        optimizer.step()
        now = torch.get_rng_state()
        torch.set_rng_state(state)
        with torch.no_grad():
            p, q = before.double().log_softmax(1), model(x[k]).double().log_softmax(1)
        torch.set_rng_state(now)
        allowed = budget * optimizer.last_step["signal"] ** 2
        if not optimizer.last_step["bound_by_eta_max"]:
            found.append(float((p.exp() * (p - q)).sum(1).mean()) / allowed)
        assert float((p.exp() * (p - q)).sum(1).mean()) < 5 * budget
    return found


@pytest.mark.parametrize("budget", [1e-3, 3e-2])
@pytest.mark.parametrize("name", ["convolutions on digits", "dropped paths on a table"])
def test_steps_realise_their_budget(name: str, budget: float) -> None:
    if name == "convolutions on digits":
        found = ratios(gelu(), digits(), budget, 70)
    else:
        found = ratios(Paths(), table(), budget, 70)
    assert 0.8 <= statistics.median(found) <= 1.25
    assert sorted(found)[int(0.9 * len(found))] < 2


def test_kl_clipping_is_the_dissipation_regulator_without_the_signal() -> None:
    """η = min(lr, √(kl_clip/a)) of Ba, Grosse & Martens 2017, kl_clip = 2·budget."""
    model = gelu()
    options = {"calibration": None, "momentum": 0.0, "weight_decay": 0.0}
    optimizer = to.NGDT(model, budget=2e-3, regulator="kl-clip", **options)
    x, y = (t[:64] for t in digits())
    for _ in range(40):
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        delta = optimizer.last_step["delta"]
        assert optimizer.last_step["eta"] == pytest.approx(min(1.0, (2 * 2e-3 / delta) ** 0.5))
        assert optimizer.last_step["signal"] is None


@pytest.mark.parametrize("lost", [1e-7, 1e-12])
def test_a_step_far_beyond_its_budget_is_cut_until_it_keeps_it(lost: float) -> None:
    """Where the KL is no square of the step's length any more, one cut would not do; nor may it
    leave the rounding of a step that was many times the weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 6))
    x, y = torch.randn(64, 8), torch.randint(6, (64,))
    calibration = to.optim.Calibration(predictions=None)
    optimizer = to.NGDT(model, 0.01, eta_max=1e9, weight_decay=0.0, calibration=calibration)
    for step in range(12):
        if step == 11:
            optimizer.calibration.kappa *= lost
            optimizer.calibration.wait = 1
        before = model(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(before, y).backward()
        optimizer.step()
    old, new = (f.detach().double().log_softmax(1) for f in (before, model(x)))
    spent = float((old.exp() * (old - new)).sum(1).mean())
    assert optimizer.last_step["shortened"] < 1e-2
    assert 0.05 * 0.01 < spent < 1.3 * 0.01
    assert spent == pytest.approx(optimizer.last_step["realised"], rel=0.5)


@pytest.mark.parametrize("outputs", ["logits", "log-probabilities", "logits of labels"])
def test_no_step_spends_more_than_the_loss_has_left(outputs: str) -> None:
    likelihood = "bernoulli" if outputs == "logits of labels" else "categorical"
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    labels = (x @ torch.randn(6, 3)).argmax(1)
    y = labels if likelihood == "categorical" else functional.one_hot(labels, 3).float()
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 3))
    if outputs == "log-probabilities":
        model.append(nn.LogSoftmax(-1))
    optimizer = to.NGDT(model, 0.03, likelihood=likelihood, weight_decay=0.0)
    loss = torch.tensor(1.0)
    while float(loss.detach()) > 1e-5:
        f = model(x)
        if likelihood == "categorical":
            loss = functional.cross_entropy(f, y)
        else:
            loss = functional.binary_cross_entropy_with_logits(f, y, reduction="none").sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        left = optimizer.last_step["loss_left"]
        assert left is not None
        assert left <= float(loss.detach()) * 1.01
        assert optimizer.last_step["predicted"] <= left * (1 + 1e-6)


def test_what_momentum_carries_of_a_surprise_is_judged_as_the_surprise_was() -> None:
    """The metric of certain predictions is nearly nothing. One wrong label among them makes a step
    in it that is known to be long (κ surges); its share in the next step is as long."""
    torch.manual_seed(0)
    x = torch.randn(64, 6)
    y = (x @ torch.randn(6, 3)).argmax(1)
    model = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 3))
    optimizer = to.NGDT(model, budget=0.01, weight_decay=0.0)

    def kappa(targets: Tensor) -> float:
        optimizer.zero_grad()
        functional.cross_entropy(model(x), targets).backward()
        optimizer.step()
        return optimizer.last_step["kappa"] or 0.0

    quiet = [kappa(y) for _ in range(60)][-1]
    wrong = y.clone()
    wrong[0] = (wrong[0] + 1) % 3
    surprised, after = kappa(wrong), kappa(y)
    assert surprised > 100 * quiet
    assert after > 0.02 * surprised
