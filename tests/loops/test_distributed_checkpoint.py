"""``torch.distributed.checkpoint``'s state dictionaries carry NGDT's state."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

import thermo_opt as to

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()


def test_asking_for_the_state_takes_no_step():
    model = net()
    optimizer = to.NGDT(model)
    before = [p.detach().clone() for p in model.parameters()]
    get_optimizer_state_dict(model, optimizer)
    assert optimizer.steps == 0
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "exact"])
@pytest.mark.parametrize("full", [False, True])
def test_training_goes_on_bit_for_bit_from_such_a_state(metric, full):
    options = StateDictOptions(full_state_dict=full)
    model = net()
    optimizer = to.NGDT(model, metric=metric)
    train(model, optimizer, 4)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other = net()
    other.load_state_dict(model.state_dict())
    resumed = to.NGDT(other, metric=metric)
    set_optimizer_state_dict(other, resumed, state, options=options)
    assert resumed.steps == 4
    train(model, optimizer, 4)
    train(other, resumed, 4)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_on_disk_is_read_into_a_new_optimizer(tmp_path):
    model = net()
    optimizer = to.NGDT(model)
    train(model, optimizer, 4)
    saved = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=tmp_path)
    other = net()
    resumed = to.NGDT(other)
    found = {"optimizer": get_optimizer_state_dict(other, resumed)}
    dcp.load(found, checkpoint_id=tmp_path)
    set_optimizer_state_dict(other, resumed, found["optimizer"])
    other.load_state_dict(model.state_dict())
    train(model, optimizer, 3)
    train(other, resumed, 3)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_torchs_own_dictionary_is_saved_once(tmp_path):
    model = net()
    optimizer = to.NGDT(model)
    train(model, optimizer, 2)
    state = optimizer.state_dict()
    torch.save(state, tmp_path / "both.pt")
    torch.save({**state, "state": {}}, tmp_path / "top.pt")
    again = torch.load(tmp_path / "both.pt", weights_only=True)
    assert again["state"][0]["ngdt"]["steps"] == 2
    sizes = [(tmp_path / name).stat().st_size for name in ("both.pt", "top.pt")]
    assert sizes[0] < sizes[1] + 4000
