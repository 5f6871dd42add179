"""Parameters that are frozen, unfrozen, added or left out of a loss; gradients that are dropped;
states that don't fit."""

import copy
import pickle

import pytest
import torch
from torch import nn

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.optim import KFAC

DATA = models.digits()


def step(model: nn.Module, optimizer: to.NGDT, number: int, size: int = 32) -> None:
    x, y = models.minibatch(DATA, number, size)
    optimizer.zero_grad()
    models.loss(model(x), y).backward()
    optimizer.step()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def moved(before: list[torch.Tensor], model: nn.Module) -> list[bool]:
    return [not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True)]


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal"])
def test_a_parameter_without_a_gradient_stays_where_it_is(metric: str) -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, metric=metric, weight_decay=0.1)
    for number in range(3):
        step(model, optimizer, number)
    x, y = models.minibatch(DATA, 3, 32)
    optimizer.zero_grad()
    models.loss(model(x), y).backward()
    model[2].weight.grad = model[2].bias.grad = model[4].bias.grad = None
    before = weights(model)
    optimizer.step()
    assert moved(before, model) == [True, True, False, False, True, False]


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("frozen", [(0, 1), (2,), (3,)])
def test_freezing_and_unfreezing_in_the_middle(metric: str, frozen: tuple[int, ...]) -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, metric=metric)
    params = list(model.parameters())
    for number in range(4):
        step(model, optimizer, number)
    for i in frozen:
        params[i].requires_grad_(False)
    before = weights(model)
    for number in range(4, 8):
        step(model, optimizer, number)
    assert moved(before, model) == [i not in frozen for i in range(6)]
    for i in frozen:
        params[i].requires_grad_(True)
    before = weights(model)
    for number in range(8, 11):
        step(model, optimizer, number)
    assert all(moved(before, model))


def test_parameters_frozen_at_first_or_added_later_are_trained() -> None:
    model = models.mlp()
    model[4].requires_grad_(False)
    optimizer = to.NGDT(model, params=[*model[0].parameters(), *model[4].parameters()])
    for number in range(2):
        step(model, optimizer, number)
    model[4].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.5})
    before = weights(model)
    for number in range(2, 5):
        step(model, optimizer, number)
    assert all(moved(before, model))
    with pytest.raises(to.InputError, match="no parameter of the model"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})


def test_a_frozen_layer_leaves_stacks_of_others_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), *(nn.Linear(12, 12) for _ in range(4)))
    model.append(nn.Linear(12, 10))
    optimizer = to.NGDT(model)
    step(model, optimizer, 0)
    before = list(optimizer.metric.blocks)
    assert len(before) == 3
    model[0].requires_grad_(False)
    step(model, optimizer, 1)
    assert optimizer.metric.blocks == before[1:]


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("how", ["optimizer", "model", "by hand", "autograd.grad", "penalty"])
def test_passes_whose_gradients_are_dropped_do_not_count(metric: str, how: str) -> None:
    trained = []
    for probing in (False, True):
        model = models.mlp()
        optimizer = to.NGDT(model, metric=metric, calibration=None)
        for number in range(3):
            x, y = models.minibatch(DATA, number + 50, 40)
            x.requires_grad_()
            if probing and how == "autograd.grad":
                torch.autograd.grad(models.loss(model(x), y), x)
            elif probing and how == "penalty":
                torch.autograd.grad(models.loss(model(x), y), x, create_graph=True)
            elif probing:
                models.loss(model(x), y).backward()
                if how == "optimizer":
                    optimizer.zero_grad()
                elif how == "model":
                    model.zero_grad()
                else:
                    for p in model.parameters():
                        p.grad = None
            step(model, optimizer, number)
        trained.append(weights(model))
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


def test_gradients_may_be_dropped_between_the_passes_of_a_step() -> None:
    """``zero_grad`` after the forward pass, as many loops have it."""
    trained = []
    for late in (False, True):
        model = models.mlp()
        optimizer = to.NGDT(model)
        for number in range(3):
            x, y = models.minibatch(DATA, number, 32)
            if not late:
                optimizer.zero_grad()
            loss = models.loss(model(x), y)
            if late:
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        trained.append(weights(model))
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))


def test_an_error_in_a_step_is_not_permanent() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, damping=lambda k: 1e-3 if k != 1 else -1.0)
    step(model, optimizer, 0)
    with pytest.raises(to.InputError, match="damping"):
        step(model, optimizer, 1)
    optimizer.damping = None
    step(model, optimizer, 1)
    assert optimizer.steps == 2


@pytest.mark.parametrize("metric", ["kfac", "exact"])
def test_a_skipped_step_reports_the_same_keys(metric: str) -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, metric=metric)
    x, y = models.minibatch(DATA, 0, 32)
    models.loss(model(x * torch.nan), y).backward()
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step()
    first = set(optimizer.last_step)
    step(model, optimizer, 1)
    assert set(optimizer.last_step) == first


def test_copies_are_refused_in_a_sentence() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model)
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(to.InputError, match="load this one's state_dict"):
            copied((model, optimizer))


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "exact"])
def test_states_that_do_not_fit_change_nothing(metric: str) -> None:
    def made(width: int) -> tuple[nn.Module, to.NGDT]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
        return model, to.NGDT(model, metric=metric)

    model, optimizer = made(8)
    twin, other = made(8)
    for number in range(3):
        step(model, optimizer, number)
        step(twin, other, number)
    wide, wider = made(9)
    step(wide, wider, 0)
    bad = [wider.state_dict()]
    for key in ("steps", "calibration", "curvature"):
        bad.append(optimizer.state_dict())
        del bad[-1]["ngdt"][key]
    bad.append(optimizer.state_dict())
    bad[-1]["param_groups"] = []
    for state in bad:
        with pytest.raises(to.InputError, match="saved"):
            optimizer.load_state_dict(state)
    for number in range(3, 6):
        step(model, optimizer, number)
        step(twin, other, number)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True)
    )


def test_a_state_loads_into_another_precision() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, metric=KFAC())
    for number in range(3):
        step(model, optimizer, number)
    double = copy.deepcopy(model).double()
    other = to.NGDT(double)
    other.load_state_dict(optimizer.state_dict())
    x, y = models.minibatch(DATA, 3, 32)
    models.loss(double(x.double()), y).backward()
    other.step()
    step(model, optimizer, 3)
    for p, q in zip(model.parameters(), double.parameters(), strict=True):
        torch.testing.assert_close(p.double(), q, rtol=1e-3, atol=1e-4)
