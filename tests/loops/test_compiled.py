"""Compiled models: the passes that hooks need run eagerly, and nothing else does."""

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thermo_opt as to

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


class Counting:
    """A compiler backend that counts the calls of compiled code."""

    def __init__(self):
        self.calls = 0

    def __call__(self, graph, inputs):
        def run(*args):
            self.calls += 1
            return graph.forward(*args)

        return run


class Layer(nn.Module):
    """A layer of one's own: torch does not compile a bare nn.Linear in place."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x):
        return torch.tanh(self.linear(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = Layer(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.last(self.first(x))


def net():
    return Net()


def whole(backend):
    return torch.compile(net(), backend=backend)


def in_place(backend):
    model = net()
    model.compile(backend=backend)
    return model


def part(backend):
    model = net()
    model.first = torch.compile(model.first, backend=backend)
    return model


def inner_in_place(backend):
    model = net()
    model.first.compile(backend=backend)
    return model


KINDS = [whole, in_place, part, inner_in_place]


def train(model, steps=5, **options):
    optimizer = to.NGDT(model, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    return optimizer


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_model_trains_as_an_eager_one(kind):
    eager, compiled = net(), kind(Counting())
    train(eager, metric="kfac", calibration=None)
    train(compiled, metric="kfac", calibration=None)
    torch.testing.assert_close(compiled(X), eager(X), rtol=0.2, atol=0.2)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_between_steps_runs_compiled_code(kind):
    backend = Counting()
    model = kind(backend)
    optimizer = train(model, steps=1)
    assert optimizer.metric.hooked  # the coming training pass runs eagerly
    before = backend.calls
    with torch.no_grad():
        model(X)
    compiled = backend.calls
    model(X)
    assert compiled > before
    assert backend.calls == compiled


@pytest.mark.parametrize("kind", KINDS)
def test_another_compiled_model_is_not_touched(kind):
    train(kind(Counting()), steps=1)
    backend = Counting()
    other = kind(backend)
    other(X).sum().backward()
    assert backend.calls > 0


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_code_runs_again_when_the_optimizer_is_gone(kind):
    backend = Counting()
    model = kind(backend)
    optimizer = train(model, steps=1)
    before = backend.calls
    del optimizer
    gc.collect()
    model(X)
    assert backend.calls > before


@pytest.mark.parametrize("kind", [in_place, inner_in_place])
def test_a_copy_of_a_compiled_model_still_runs(kind):
    model = kind(Counting())
    train(model, steps=1)
    assert torch.allclose(copy.deepcopy(model)(X), model(X))
