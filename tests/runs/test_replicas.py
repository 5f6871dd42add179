"""Replica steps leave the training bit for bit as it is, and tell its noise from its drift."""

import copy
import random
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import thermo_opt as to
from thermo_opt.errors import InputError
from thermo_opt.runs.memento import Memento, used_by
from thermo_opt.runs.replicas import read_replicas


class Net(nn.Module):
    """BatchNorm, Dropout, a counter and a list that each forward changes."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3)
        )
        self.seen = []
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        self.seen.append(len(x))
        return self.layers(x)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 4, generator=generator), torch.randint(3, (64,), generator=generator)


OPTIMIZERS = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9),
    "Adam": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "NGDT": lambda m: to.NGDT(m, 0.01),
}


def trained(path, make, whole_step):
    """Weights, buffers, losses and random draws of a training, recorded with replicas or not."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    x, y = data()
    model = Net()
    optimizer = make(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    others = iter(torch.randperm(64, generator=torch.Generator().manual_seed(7)).split(8))

    def step(rows):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        return loss

    def replica():
        step(next(others))
        if whole_step:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()

    recorder = None
    if path is not None:
        recorder = to.Recorder(
            path, model=model, optimizer=optimizer, probe=(x[:16], y[:16]),
            replica=replica, replica_every=3,
        )  # fmt: skip
        recorder.__enter__()
    losses = []
    for _ in range(8):
        loss = step(torch.randint(64, (8,)))
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
        if recorder is not None:
            recorder.step(loss=loss)
    if recorder is not None:
        recorder.close()
    state = {name: t.clone() for name, t in model.state_dict().items()}
    draws = random.random(), np.random.rand(), torch.rand(2)  # noqa: NPY002
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return state, losses, draws, grads, (model.calls, model.seen, scheduler.last_epoch)


@pytest.mark.parametrize("whole_step", [False, True])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_with_replicas_is_bit_identical(tmp_path, name, whole_step):
    plain, recorded = (
        trained(path, OPTIMIZERS[name], whole_step) for path in (None, tmp_path / "run")
    )
    assert all(torch.equal(t, recorded[0][key]) for key, t in plain[0].items())
    assert plain[1] == recorded[1]
    assert plain[2][:2] == recorded[2][:2]
    assert torch.equal(plain[2][2], recorded[2][2])
    for a, b in zip(plain[3], recorded[3], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)
    assert recorded[4][2] == plain[4][2]
    replicas = read_replicas(tmp_path / "run")
    assert [r.step for r in replicas] == [0, 3, 6]
    run = to.load_run(tmp_path / "run")
    for replica in replicas:
        found = {part: held["probe/logits"] for part, held in replica.load().items()}
        assert torch.equal(found["before"], run.snapshots[replica.step].load("probe/logits"))
        assert torch.equal(found["step"], run.snapshots[replica.step + 1].load("probe/logits"))
        assert not torch.equal(found["replica"], found["step"])
        assert not torch.equal(found["replica"], found["before"])


def test_linear_gaussian_descent_has_the_noise_of_its_closed_form(tmp_path):
    """A learned mean under SGD: per step Q_noise = ½ η² s²/B per coordinate, from real replicas."""
    torch.manual_seed(0)
    width, eta, batch, steps = 400, 0.1, 4, 30
    model = nn.Linear(1, width, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=eta)
    one = torch.ones(1, 1)

    def replica():
        optimizer.zero_grad()
        loss = 0.5 * ((model(one) - torch.randn(batch, width)) ** 2).sum() / batch
        loss.backward()
        return loss

    with to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=(one, torch.zeros(1, width)),
        likelihood="gaussian", sigma2=1.0, replica=replica, replica_every=1,
    ) as recorder:  # fmt: skip
        for _ in range(steps):
            loss = replica()
            optimizer.step()
            recorder.step(loss=loss)
    split = to.audit(tmp_path / "run").summary["split"]
    assert split["replicas"] == steps
    expected = steps * 0.5 * eta**2 * width / batch
    assert split["noise"] == pytest.approx(expected, rel=0.05)
    assert abs(split["noise"] - expected) < 5 * split["noise_error"] + 0.03 * expected
    means = [2.0 * (1 - eta) ** k for k in range(steps)]
    drift = sum(0.5 * eta**2 * width * m**2 for m in means)
    assert split["drift"] == pytest.approx(drift, rel=0.15)
    q = to.audit(tmp_path / "run").summary["dissipation"]
    assert split["noise"] + split["drift"] == pytest.approx(q, rel=0.1)


def test_a_schedule_does_not_pass_for_noise(tmp_path):
    """Full batches have none, whether the scheduler is called before or after the recorder."""
    x, y = data()
    for order in ("before", "after"):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)

        def step(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        with to.Recorder(
            tmp_path / order, model=model, optimizer=optimizer, probe=(x, y),
            replica=step, replica_every=1, batch_size=64,
        ) as recorder:  # fmt: skip
            for _ in range(10):
                loss = step()
                optimizer.step()
                if order == "before":
                    scheduler.step()
                recorder.step(loss=loss)
                if order == "after":
                    scheduler.step()
        assert not optimizer._optimizer_step_pre_hooks
        run = to.load_run(tmp_path / order)
        assert run.steps["lr"].tolist() == pytest.approx([0.5 * 0.8**k for k in range(10)])
        split = to.audit(run, lens="outputs").summary["split"]
        assert split["replicas"] == 10
        assert split["noise"] < 1e-4 * split["drift"]  # without its ratio, 0.02 of it


def test_replicas_at_rates_that_no_one_number_relates_are_not_kept(tmp_path):
    x, y = data()
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(
        [{"params": [model.weight], "lr": 0.0}, {"params": [model.bias], "lr": 0.1}]
    )

    def step():
        optimizer.zero_grad()
        functional.cross_entropy(model(x), y).backward()

    with to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=(x, y),
        replica=step, replica_every=1,
    ) as recorder:  # fmt: skip
        for k in range(4):
            step()
            optimizer.step()
            recorder.step()
            optimizer.param_groups[0]["lr"] = 0.1 * (k + 1)  # from nothing; then alone; then alone
    assert [replica.step for replica in read_replicas(tmp_path / "run")] == [0]


def test_a_replica_that_fails_ends_the_recording_alone(tmp_path):
    x, y = data()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def replica():
        with torch.no_grad():
            model.layers[0].weight.zero_()
        raise RuntimeError("no more data")

    before = copy.deepcopy(model.state_dict())
    recorder = to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=(x, y), replica=replica
    )
    with pytest.warns(UserWarning, match="no more data"):
        recorder.__enter__()
    recorder.close()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(InputError, match="replica needs a probe"):
        to.Recorder(
            tmp_path / "x", model=model, optimizer=optimizer, probe=None, params=True,
            replica=replica,
        )  # fmt: skip
    with pytest.raises(InputError, match="replica is of type int"):
        to.Recorder(tmp_path / "x", model=model, optimizer=optimizer, probe=(x, y), replica=3)


def test_everything_reachable_is_put_back():
    class Slotted:
        __slots__ = ("value",)

    slotted = Slotted()
    slotted.value = [1, 2]
    tensor = nn.Parameter(torch.tensor([1.0, -0.0]))
    tensor.grad = torch.ones(2)
    held = {
        "list": [tensor, {"deep": slotted}],
        "array": np.arange(3.0),
        "generator": torch.Generator().manual_seed(3),
        "numpy": np.random.default_rng(4),
        "set": {1, 2},
    }
    held["self"] = held  # a circle
    memento = Memento(held)
    tensor.data = torch.zeros(3)
    tensor.grad = None
    slotted.value.append(3)
    slotted.value = None
    held["array"] += 1
    drawn = torch.rand(1, generator=held["generator"]), held["numpy"].random()
    held["set"].clear()
    held["list"].clear()
    del held["set"]
    memento.restore()
    assert list(held) == ["list", "array", "generator", "numpy", "set", "self"]
    assert held["list"][0] is tensor
    assert torch.signbit(tensor.detach()).tolist() == [False, True]
    assert tensor.grad.tolist() == [1, 1]
    assert slotted.value == [1, 2]
    assert held["array"].tolist() == [0, 1, 2]
    assert held["set"] == {1, 2}
    assert torch.equal(torch.rand(1, generator=held["generator"]), drawn[0])
    assert held["numpy"].random() == drawn[1]


def test_what_a_closure_trains_is_found():
    model, other = Net(), Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Trainer:
        def __init__(self):
            self.model, self.text = model, "x"

        def closure(self):
            return self.model

    def closure():
        return optimizer, other

    assert set(map(id, used_by(closure))) == {id(optimizer), id(other)}
    assert used_by(Trainer().closure) == [model]
    assert used_by(partial(print, model)) == [model]
