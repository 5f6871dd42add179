"""Layers that multiply or add parameters of their own: their uses are found, and their factors are
those of the dense Fisher where that is a Kronecker product."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import thermo_opt as to
from thermo_opt.fisher.kronecker.uses import UsedRule, used_rules
from thermo_opt.models import tensors_in
from thermo_opt.optim import KFAC
from thermo_opt.optim.hooks import on_node_gradient


class Attention(nn.Module):
    def __init__(self, cross=False):
        super().__init__()
        self.layer, self.cross = nn.MultiheadAttention(4, 2, batch_first=True), cross

    def forward(self, x):
        return self.layer(x, *(2 * [x.flip(1) if self.cross else x]))[0].sum(1)


class Cell(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(4, 4)

    def forward(self, x):
        x = x[:, 0]
        h = self.cell(x, (x.cos(), x.sin()) if isinstance(self.cell, nn.LSTMCell) else x.cos())
        return h[0] if isinstance(h, tuple) else h


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = kind(4, 4, batch_first=True)

    def forward(self, x):
        return self.layer(x)[0].sum(1)


class Experts(nn.Module):
    """As in Mixtral: one matrix of a stack at a time."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 4) / 2)

    def forward(self, x):
        rows = x.flatten(0, 1)
        out = torch.zeros_like(rows)
        for j in range(2):
            mine = torch.arange(j, len(rows), 2)
            out = out.index_add(0, mine, F.linear(rows[mine], self.stack[j]))
        return out.view_as(x).sum(1)


class Together(nn.Module):
    """All matrices of a stack in one product, stored as (in, out)."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 4) / 2)

    def forward(self, x):
        return torch.bmm(x.flatten(0, 1).expand(3, -1, -1), self.stack).sum(0).view_as(x).sum(1)


class Adapter(nn.Module):
    """A pair of low-rank matrices as bare parameters, used from the right."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(4, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x):
        return (x @ self.down @ self.up).sum(1)


class Positions(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, count, 4))

    def forward(self, x):
        return (x + self.table).tanh().sum(1)


class Product(nn.Module):
    """Neither multiplied as a matrix nor added."""

    def __init__(self, count):
        super().__init__()
        self.table = nn.Parameter(torch.randn(count, 4))

    def forward(self, x):
        return (x * self.table).sum(1)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.both = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        return self.both(x[:, 0], x[:, -1].cos())


class Bag(nn.Module):
    def __init__(self, mode):
        super().__init__()
        self.bag = nn.EmbeddingBag(7, 4, mode=mode)

    def forward(self, x):
        return self.bag((x[..., 0] * 100).long() % 7)


USED = {
    "attention": Attention,
    "attention of others": lambda: Attention(True),
    "LSTM cell": lambda: Cell(nn.LSTMCell),
    "GRU cell": lambda: Cell(nn.GRUCell),
    "RNN cell": lambda: Cell(nn.RNNCell),
    "GRU": lambda: Recurrent(nn.GRU),
    "experts": Experts,
    "experts together": Together,
    "low-rank pair": Adapter,
    "positions": lambda: Positions(3),
}


@pytest.mark.parametrize("name", USED)
def test_the_uses_of_a_parameter_add_up_to_its_gradient(name):
    torch.manual_seed(0)
    model = USED[name]()
    x = torch.randn(5, 3, 4, requires_grad=True)
    owners = [m for m in model.modules() if m._parameters and not isinstance(m, nn.Linear)]
    sums = {}

    def watch(module, args, output):
        for rule in used_rules(module, set()):
            total = torch.zeros(rule.shape(module)[0], *rule.size[1:])
            sums[rule.weight] = (module, total)
            uses = rule.uses(module, tensors_in(args), tensors_in(output))
            assert uses
            for use in uses:
                on_node_gradient(use.node, lambda g, use=use, total=total: add(use, g, total))

    def add(use, g, total):
        if use.kind == "sum":
            total[0].add_(g.sum(0))
            return
        a = use.operand()
        product = a.mT @ g if use.turned else g.mT @ a
        if product.dim() == 3:
            total.add_(product)
        else:
            where = total[use.place or 0]
            where[use.start : use.start + len(product)].add_(product)

    for owner in owners:
        owner.register_forward_hook(watch)
    F.cross_entropy(model(x), torch.arange(5) % 4).backward()
    assert sums
    for weight, (module, total) in sums.items():
        grad = module._parameters[weight].grad
        torch.testing.assert_close(total.reshape(grad.shape), grad, rtol=1e-4, atol=1e-6)


EXACT = {
    **{name: (make, 1) for name, make in USED.items() if name not in ("positions", "experts")},
    "LSTM": (lambda: Recurrent(nn.LSTM), 1),
    "bilinear": (Pair, 2),
    "bag, mean": (lambda: Bag("mean"), 1),
    "bag, sum": (lambda: Bag("sum"), 1),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_factors_are_the_dense_fishers_where_that_is_a_product(name):
    """One input with many labels: F = a aᵀ ⊗ Σ g gᵀ exactly, if it is used at one position."""
    torch.manual_seed(0)
    make, length = EXACT[name]
    model = make().double()
    x = torch.rand(1, length, 4, dtype=torch.float64).expand(8, -1, -1)
    y = torch.arange(8) % 4
    metric = KFAC(max_rows=None, max_solve_overhead=float("inf"))
    optimizer = to.NGDT(model, metric=metric, calibration=None)
    each = []
    for k in range(8):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        each.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    params = [id(p) for p in model.parameters()]
    checked = 0
    for block in optimizer.metric.blocks:
        if not hasattr(block, "sides") or not all(side.average.value for side in block.sides):
            continue
        where = [params.index(id(p)) for p in block.params]
        rows = [block.coordinates.gather([g[i] for i in where]) for g in each]
        v = torch.stack(rows).flatten(-2)
        v = v.unsqueeze(1) if v.dim() == 2 else v
        dense = torch.einsum("nsi,nsj->sij", v, v) / 8
        A, G = block.factors()
        A, G = (
            t.view(-1, *t.shape[-2:])
            for t in (torch.diag_embed(f.matrix) if f.diagonal else f.matrix for f in (A, G))
        )
        for a, g, wanted in zip(A, G, dense, strict=True):
            torch.testing.assert_close(torch.kron(g, a), wanted, rtol=1e-6, atol=1e-12)
            checked += 1
    assert checked


def test_recurrent_layers_run_step_by_step_only_while_they_are_read():
    torch.manual_seed(0)
    model = Recurrent(nn.LSTM)
    optimizer = to.NGDT(model)
    mine, now = torch.backends.mkldnn, []
    fused = mine.is_available() and torch._C._get_mkldnn_enabled()
    model.layer.register_forward_hook(
        lambda *_: now.append(torch._C._get_mkldnn_enabled()), prepend=True
    )
    x = torch.randn(6, 5, 4)
    with torch.no_grad():
        model(x)
    F.cross_entropy(model(x), torch.arange(6) % 4).backward()
    with pytest.raises(RuntimeError):
        model(torch.randn(6, 5, 3))
    assert torch._C._get_mkldnn_enabled() == fused
    optimizer.step()
    assert now[:2] == [fused, False]
    assert all(type(b).__name__ == "MatrixBlock" for b in optimizer.metric.blocks)


def test_added_positions_have_the_mean_of_the_dense_fishers_blocks():
    torch.manual_seed(0)
    model = Positions(3).double()
    x, y = torch.randn(8, 3, 4, dtype=torch.float64), torch.arange(8) % 4
    optimizer = to.NGDT(model, metric=KFAC(max_rows=None), calibration=None)
    each = []
    for k in range(8):
        loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
        each.append(torch.autograd.grad(loss, model.table)[0][0])
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    (block,) = optimizer.metric.blocks
    A, G = block.factors()
    v = torch.stack(each)
    blocks = torch.einsum("nti,ntj->tij", v, v) / 8
    scale = float(G.matrix[0, 0])
    torch.testing.assert_close(G.matrix, scale * torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(scale * A.matrix, blocks.mean(0))


def test_an_expert_without_tokens_keeps_its_inputs_and_trains_when_it_has_some():
    torch.manual_seed(0)
    model = Experts()
    optimizer = to.NGDT(model, calibration=None)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(6, 4, 4)), torch.arange(6) % 4).backward()
        optimizer.step()
    (block,) = optimizer.metric.blocks
    A, G = block.factors()
    assert [bool(t.any()) for t in G.matrix] == [True, True, False]
    assert bool(A.matrix[:2].diagonal(dim1=-2, dim2=-1).min() > 0)


def test_what_is_neither_keeps_its_diagonal_and_is_named():
    model = Product(3)
    optimizer = to.NGDT(model)
    F.cross_entropy(model(torch.randn(6, 3, 4)), torch.arange(6) % 4).backward()
    with pytest.warns(UserWarning, match="table"):
        optimizer.step()
    assert type(optimizer.metric.blocks[0]).__name__ == "UnruledBlock"


def test_rules_are_of_matrices_and_narrow_stacks_only():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.vector, self.matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, 2))
            self.stack = nn.Parameter(torch.ones(2, 3, 4))
            self.wide = nn.Parameter(torch.ones(2, 1, 3000))
            self.wide_stack = nn.Parameter(torch.ones(2, 2, 3000))

    found = {rule.weight: rule.size for rule in used_rules(Held(), set())}
    assert found == {"matrix": (1, 3, 2), "stack": (2, 3, 4), "wide": (1, 2, 3000)}
    assert all(isinstance(rule, UsedRule) for rule in used_rules(Held(), set()))
