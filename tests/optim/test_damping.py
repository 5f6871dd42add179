"""The default damping: ten predictions' worth of prior, from the trace of the running curvature."""

import math

import pytest
import torch
from torch import nn

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.optim import KFAC
from thermo_opt.optim.kronecker.matrix import MatrixBlock
from thermo_opt.optim.kronecker.refresh import LEAST, PRIOR, default_damping


def test_of_a_linear_softmax_it_is_ten_mean_variances_of_the_minibatch_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    x, y = 5 * torch.randn(40, 6), torch.randint(4, (40,))
    g = (torch.softmax(model(x), -1) - nn.functional.one_hot(y, 4)).detach()
    optimizer = to.NGDT(model, metric=KFAC(half_state=False))
    models.loss(model(x), y).backward()
    optimizer.step()
    trace = float((x.square().sum(1) + 1).mean() * g.square().sum(1).mean())
    assert optimizer.last_step["damping"] == pytest.approx(10 * trace / 28 / 40, rel=1e-5)
    assert trace / 28 / 4 > LEAST


def test_it_is_never_below_the_least() -> None:
    assert default_damping(1e-9, 10, 100) == LEAST
    assert default_damping(math.inf, 10, 100) == LEAST
    assert default_damping(1e3, 10, 100) == PRIOR


@pytest.mark.parametrize(("given", "used"), [(0.3, 0.3), (lambda step: 0.2 + step, 0.2)])
@pytest.mark.parametrize("metric", ["kfac", "exact"])
def test_what_is_asked_for_is_used(metric, given, used) -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, metric=metric, damping=given)
    x, y = models.minibatch(models.digits(), 0, 32)
    models.loss(model(x), y).backward()
    optimizer.step()
    assert optimizer.last_step["damping"] == used


class Mixed(nn.Module):
    """Every kind of unit: a table, stacked linear layers and normalisations, a grouped convolution,
    and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 12)
        self.norms = nn.ModuleList(nn.LayerNorm(12) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(2))
        self.conv = nn.Conv1d(12, 12, 3, padding=1, groups=3)
        self.bias = nn.Parameter(torch.zeros(5, 12))
        self.head = nn.Linear(12, 11)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.table(tokens) + self.bias
        for norm, layer in zip(self.norms, self.layers, strict=True):
            h = h + torch.tanh(layer(norm(h)))
        return self.head(h + self.conv(h.mT).mT).flatten(0, 1)


@pytest.mark.filterwarnings("ignore:no layer rule")
@pytest.mark.parametrize("metric", ["kfac", "ekfac"])
def test_traces_are_those_of_the_whole_matrices(metric: str) -> None:
    torch.manual_seed(3)
    model = Mixed()
    optimizer = to.NGDT(model, metric=metric)
    for _ in range(3):
        tokens, y = torch.randint(11, (8, 5)), torch.randint(11, (40,))
        optimizer.zero_grad()
        models.loss(model(tokens), y).backward()
        optimizer.step()
    blocks = optimizer.metric.blocks
    total = 0.0
    for block in blocks:
        if isinstance(block, MatrixBlock):
            whole = 0.0
            for side in block.sides:
                A, G = side.average.value
                if A.dim() == 1:
                    A = torch.diag(A)
                pairs = zip(A, G, strict=True) if A.dim() == 3 else [(A, G)]
                whole += sum(float(torch.kron(a, g).trace()) for a, g in pairs)
        else:
            values = [t for average in block.averages() for t in average.value]
            whole = sum(float(t.trace() if t.shape == (24, 24) else t.sum()) for t in values)
        trace = block.trace()
        assert trace is not None
        assert float(trace) == pytest.approx(whole, rel=1e-5)
        total += whole
    size = sum(p.numel() for p in model.parameters())
    assert optimizer.last_step["damping"] == pytest.approx(
        max(10 * total / size / 40, LEAST), rel=1e-5
    )
    assert len(blocks) == (6 if metric == "kfac" else 8)


class Elsewhere(nn.Module):
    """Uses its layers' weights without calling the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.layer.weight, self.layer.bias)


@pytest.mark.filterwarnings("ignore:.*never seen")
def test_it_follows_layers_that_fall_back_to_a_diagonal_from_the_first_step() -> None:
    torch.manual_seed(0)
    model = Elsewhere()
    optimizer = to.NGDT(model, budget=1e-6)
    used = []
    for _ in range(2):
        optimizer.zero_grad()
        torch.manual_seed(1)
        models.loss(model(5 * torch.randn(40, 6)), torch.randint(4, (40,))).backward()
        optimizer.step()
        used.append(optimizer.last_step["damping"])
    assert used[0] == pytest.approx(used[1], rel=0.05)
    assert used[0] > LEAST


def test_a_step_without_gradients_keeps_it() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model)
    x, y = models.minibatch(models.digits(), 0, 32)
    used = []
    for weight in (1.0, 0.0):
        optimizer.zero_grad()
        (weight * models.loss(model(x), y)).backward()
        optimizer.step()
        used.append(optimizer.last_step["damping"])
    assert used[0] == used[1] > LEAST
