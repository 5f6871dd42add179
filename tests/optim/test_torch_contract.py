"""What `torch.optim.Optimizer` promises of every optimizer, as torch's own generic tests check it:
hooks, closures, groups, state dictionaries, gradients of either kind."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import thermo_opt as to
from tests.optim import optim_models as models

DATA = models.digits()


def made(**options):
    torch.manual_seed(0)
    model = models.mlp()
    return model, to.NGDT(model, **options)


def backward(model, step=0):
    loss = models.loss(
        model(models.minibatch(DATA, step, 32)[0]), models.minibatch(DATA, step, 32)[1]
    )
    loss.backward()
    return loss


def train(model, optimizer, steps=3):
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def test_step_hooks_run_in_order_and_can_be_removed():
    model, optimizer = made()
    seen = []
    pre = optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    post = optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    everywhere = register_optimizer_step_post_hook(lambda *_: seen.append("all"))
    try:
        train(model, optimizer, 1)
    finally:
        everywhere.remove()
    pre.remove()
    post.remove()
    train(model, optimizer, 1)
    assert seen == ["before", "after", "all"]


def test_state_dictionary_hooks_see_and_replace_the_dictionary():
    model, optimizer = made()
    train(model, optimizer)
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "extra": 1})
    assert optimizer.state_dict()["extra"] == 1
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append("before"))
    optimizer.register_load_state_dict_post_hook(lambda _: seen.append("after"))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after"]


def test_a_closure_runs_once_with_gradients_on_and_its_loss_is_returned():
    model, optimizer = made()
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        return backward(model)

    with torch.no_grad():
        loss = optimizer.step(closure)
    assert calls == [True]
    assert float(loss) > 0
    model, other = made()
    expected = train(model, other, 1)
    torch.testing.assert_close(
        nn.utils.parameters_to_vector(optimizer.model.parameters()).detach(), expected
    )


def test_groups_of_equal_options_are_one_group():
    model, optimizer = made()
    together = train(model, optimizer)
    torch.manual_seed(0)
    model = models.mlp()
    params = list(model.parameters())
    apart = train(model, to.NGDT(model, params=[{"params": params[:2]}, {"params": params[2:]}]))
    torch.testing.assert_close(apart, together, rtol=1e-3, atol=1e-5)


def test_a_state_dictionary_survives_copying_pickling_and_lists_its_groups():
    model, optimizer = made()
    train(model, optimizer)
    state = optimizer.state_dict()
    (group,) = state["param_groups"]
    assert group["params"] == list(range(len(list(model.parameters()))))
    ends = []
    for one in (state, copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        other, resumed = made()
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(one)
        assert resumed.param_groups[0]["lr"] == group["lr"]
        ends.append(train(other, resumed))
    assert all(torch.equal(end, ends[0]) for end in ends)


def test_a_loaded_state_is_a_copy():
    model, optimizer = made()
    train(model, optimizer)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state["ngdt"]["curvature"])
    _, other = made()
    other.load_state_dict(state)
    train(other.model, other)
    for name, block in kept["blocks"].items():
        now = state["ngdt"]["curvature"]["blocks"][name]
        assert torch.equal(now["momentum"], block["momentum"])


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_set_to_zero_or_none_give_the_same_steps(set_to_none):
    model, optimizer = made()
    for step in range(3):
        optimizer.zero_grad(set_to_none)
        backward(model, step)
        optimizer.step()
    other, plain = made()
    expected = train(other, plain)
    found = nn.utils.parameters_to_vector(model.parameters()).detach()
    torch.testing.assert_close(found, expected)


def test_a_parameter_in_two_groups_is_refused():
    model, optimizer = made()
    with pytest.raises(ValueError, match="more than one"):
        optimizer.add_param_group({"params": [next(iter(model.parameters()))]})
    params = list(model.parameters())
    with pytest.raises(ValueError, match="more than one"):
        to.NGDT(model, params=[{"params": params}, {"params": params[:1]}])


def test_options_of_groups_are_used_or_refused():
    torch.manual_seed(0)
    model = models.mlp()
    params = list(model.parameters())
    with pytest.raises(to.InputError, match="'betas'"):
        to.NGDT(model, params=[{"params": params, "betas": (0.9, 0.99)}])
    with pytest.raises(to.InputError, match="one for all"):
        to.NGDT(model, params=[{"params": params[:2], "momentum": 0.1}, {"params": params[2:]}])
    optimizer = to.NGDT(model, params=[{"params": params, "momentum": 0.1}])
    assert optimizer._rule().momentum == 0.1
    optimizer.param_groups[0]["momentum"] = 1.5
    backward(model)
    with pytest.raises(to.InputError, match="momentum"):
        optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.5
    optimizer.step()
    with pytest.raises(to.InputError, match="foreach"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "foreach": True})


def test_a_learning_rate_of_zero_moves_nothing():
    model, optimizer = made(lr=0.0)
    before = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    assert torch.equal(train(model, optimizer), before)


def test_it_says_what_it_is():
    _, optimizer = made()
    assert "NGDT" in repr(optimizer)
    assert "weight_decay" in repr(optimizer)
    assert set(optimizer.defaults) == {"lr", "weight_decay", "momentum", "share"}
