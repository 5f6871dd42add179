"""Inflation: how much more a step costs on its own minibatch than on the next, what follows from
it, and that looking back leaves no trace."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import thermo_opt as to
from thermo_opt.optim import Calibration
from thermo_opt.optim.inflation import MOST, SETTLED, SHARE, USUAL, WORTH, Inflation

Batch = tuple[Tensor, Tensor]


def batches(count: int, size: int, seed: int = 0) -> list[Batch]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(12, 4, generator=generator)
    found = []
    for _ in range(count):
        x = torch.randn(size, 12, generator=generator)
        noise = torch.randn(size, 4, generator=generator)
        found.append((x, (x @ truth + 2 * noise).argmax(1)))
    return found


def network(normalised: bool = False) -> nn.Module:
    torch.manual_seed(0)
    norm = [nn.BatchNorm1d(64)] if normalised else []
    return nn.Sequential(nn.Linear(12, 64), *norm, nn.Tanh(), nn.Linear(64, 4))


def take(model: nn.Module, optimizer: to.NGDT, batch: Batch) -> None:
    optimizer.zero_grad()
    functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()


def kl(before: Tensor, after: Tensor) -> float:
    p, q = (f.detach().double().log_softmax(1) for f in (before, after))
    return float((p.exp() * (p - q)).sum(1).mean())


def test_it_is_the_mean_logarithm_of_own_over_other_nats() -> None:
    """Against the two KLs computed by hand; a shortened step's is known to second order only."""
    model, data = network(), batches(9, 32)
    strict = Calibration(every=1, predictions=None)
    optimizer = to.NGDT(model, budget=0.003, calibration=strict)
    logs: list[float] = []
    for now, following in itertools.pairwise(data):
        with torch.no_grad():
            start, other = model(now[0]), model(following[0])
        take(model, optimizer, now)
        if logs:
            known = optimizer.last_step["inflation"]
            assert known == pytest.approx(math.exp(sum(logs) / len(logs)), rel=0.08)
        with torch.no_grad():
            logs.append(math.log(kl(start, model(now[0])) / kl(model(following[0]), other)))
    assert max(abs(one) for one in logs) > 0.03


@pytest.mark.parametrize("normalised", [False, True])
def test_looking_back_changes_nothing_but_what_is_known(normalised: bool) -> None:
    def trained(looks: bool) -> nn.Module:
        model = network(normalised)
        optimizer = to.NGDT(model, budget=0.003, damping=1e-2)
        if not looks:
            optimizer.inflation = None
        for batch in batches(40, 32):
            take(model, optimizer, batch)
        assert (optimizer.last_step["inflation"] is not None) == looks
        return model

    one, two = trained(True).state_dict(), trained(False).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_prior_is_worth_more_the_more_steps_fit_their_own_minibatch() -> None:
    found = {}
    for size in (16, 1024):
        model = network()
        optimizer = to.NGDT(model, budget=0.003)
        for batch in batches(30, size):
            take(model, optimizer, batch)
        inflation = optimizer.inflation
        assert inflation is not None
        assert inflation.ratio is not None
        low, high = WORTH
        worth = min(max((inflation.ratio - 1) / USUAL, low), high)
        assert optimizer.metric.prior == pytest.approx(worth)
        found[size] = inflation.ratio
    assert found[16] > 1.3 > 1.1 > found[1024]


def test_the_default_budget_is_decided_by_the_first_steps() -> None:
    inflation = Inflation()
    for step in range(SETTLED + 1):
        assert inflation.budget == 1.0
        inflation.took([1.0], 8e-3)
        inflation.observe(step, 1e-3)
    assert inflation.budget == pytest.approx(SHARE * 8)
    for step in range(SETTLED, 200):
        inflation.took([1.0], 1.0)
        inflation.observe(step, 1e-3)
    assert inflation.ratio == pytest.approx(100, rel=1e-2)
    assert inflation.budget == pytest.approx(SHARE * 8)
    assert inflation.budget < MOST


def test_batch_normalization_in_small_batches_raises_the_default_budget_and_no_other() -> None:
    """Whose examples share their minibatch's statistics."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for i, o in ((12, 64), (64, 64), (64, 64)):
        layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
    for budget in (None, 0.01):
        model = nn.Sequential(*layers, nn.Linear(64, 4))
        optimizer = to.NGDT(model, budget)
        for batch in batches(SETTLED + 5, 8):
            take(model, optimizer, batch)
        used = optimizer.last_step["budget"]
        assert optimizer.inflation is not None
        factor = SHARE * optimizer.inflation.settled
        assert used == (pytest.approx(0.01 * factor) if budget is None else 0.01)
        assert factor > 1


def test_a_step_that_was_skipped_or_not_measured_is_not_looked_back_at() -> None:
    inflation = Inflation()
    inflation.took([1.0], None)
    assert inflation.own == 0.0
    model, data = network(), batches(6, 32)
    optimizer = to.NGDT(model)
    for batch in data[:3]:
        take(model, optimizer, batch)
    assert optimizer.inflation is not None
    count = optimizer.inflation.count
    with pytest.warns(UserWarning, match="skipped"):
        take(model, optimizer, (data[3][0] * math.nan, data[3][1]))
    take(model, optimizer, data[4])
    assert optimizer.inflation.count == count
    take(model, optimizer, data[5])
    assert optimizer.inflation.count == count + 1


def test_it_needs_a_metric_that_is_calibrated_and_remembers_its_step() -> None:
    assert to.NGDT(network(), metric="exact").inflation is None
    assert to.NGDT(network(), calibration=None).inflation is None


def test_a_state_saved_after_a_measured_step_goes_on_as_if_nothing_had_been() -> None:
    """Also with a parameter that took no part in the last step."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.a, self.b = network(), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x)
            return h + (self.b if self.second else self.a)(h)

    def trained(resume: bool) -> nn.Module:
        model = Two()
        optimizer = to.NGDT(model)
        for step, batch in enumerate(batches(12, 32)):
            model.second = step % 2 == 1
            if resume and step == 8:
                assert optimizer.inflation is not None
                assert optimizer.inflation.own > 0
                saved = optimizer.state_dict()
                optimizer.close()
                optimizer = to.NGDT(model)
                optimizer.load_state_dict(saved)
            take(model, optimizer, batch)
        return model

    one, two = trained(False).state_dict(), trained(True).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_saved_entry_is_checked() -> None:
    model = network()
    optimizer = to.NGDT(model)
    for name, value in (("own", -1.0), ("log", 1e6), ("settled", 1e6), ("count", -1)):
        saved = optimizer.state_dict()
        saved["ngdt"]["inflation"][name] = value
        with pytest.raises(to.InputError, match="inflation"):
            to.NGDT(model).load_state_dict(saved)


def test_a_group_that_was_added_with_a_share_of_its_own_is_not_looked_back_at() -> None:
    model, data = network(), batches(5, 32)
    head = list(model[2].parameters())  # type: ignore[index]
    optimizer = to.NGDT(model, params=list(model[0].parameters()))  # type: ignore[index]
    for batch in data[:3]:
        take(model, optimizer, batch)
    assert optimizer.inflation is not None
    count = optimizer.inflation.count
    optimizer.add_param_group({"params": head, "share": 0.3})
    take(model, optimizer, data[3])
    assert optimizer.inflation.count == count
