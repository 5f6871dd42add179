"""K-FAC and EKFAC factor by factor against curvlinops, an independent implementation."""

import pytest
import torch
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from torch import nn

from thermo_opt.fisher import make
from thermo_opt.fisher.kronecker.blocks import KroneckerBlock
from thermo_opt.fisher.kronecker.rules import rule_for


class Tokens(nn.Module):
    """A network on every token alone; curvlinops wants the classes before the tokens."""

    def __init__(self, classes_last=True):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.classes_last = classes_last

    def forward(self, x):
        f = self.last(torch.tanh(self.first(x)))
        return f if self.classes_last else f.mT


class Pooled(nn.Module):
    """Weight shared over positions, one prediction an example."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (
            nn.Linear(4, 5),
            nn.Linear(5, 4, bias=False),
            nn.Linear(4, 3),
        )

    def forward(self, x):
        return self.last(self.middle(torch.relu(self.first(x))).mean(1))


def _mlp():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (7, 6)


def _cnn():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 3, (3, 2), dilation=(1, 2), padding=(1, 1), bias=False),
        nn.Flatten(),
        nn.Linear(48, 3),
    )
    # Full-rank reduced A (enough examples, no two kernel offsets seeing the same pixels): a null
    # space has no one basis.
    return model, (32, 2, 8, 8)


CASES = {
    "mlp": _mlp,
    "cnn": _cnn,
    "pooled": lambda: (Pooled(), (6, 5, 4)),
    "tokens": lambda: (Tokens(), (6, 5, 4)),
}


def _setup(case):
    torch.manual_seed(0)
    model, shape = CASES[case]()
    model = model.double()
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randint(0, 3, shape[:2] if case == "tokens" else shape[:1])
    other = model
    if case == "tokens":
        other = Tokens(classes_last=False).double()
        other.load_state_dict(model.state_dict())
    return model, other, x, y


def _judge(operator, model, x, y, **options):
    return operator(
        model,
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(x, y)],
        separate_weight_and_bias=False,
        check_deterministic=False,
        **options,
    )


def _permuted(module, A):
    """A reordered from our input features (kernel…, channel) to theirs (channel, kernel…)."""
    inputs = module.weight[0].numel()
    numbers = torch.arange(inputs).reshape(1, *module.weight.shape[1:]).expand_as(module.weight)
    ours = rule_for(module).weight_matrix(module, numbers)[0]
    order = ours.argsort()
    if len(A) > inputs:
        order = torch.cat([order, torch.tensor([inputs])])
    return A[order[:, None], order]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_kfac_factors(case, setting, fisher_type):
    if case == "tokens":
        # with one loss term per position, reducing mixes loss terms: their sum and ours then differ
        setting = "expand"
    model, other, x, y = _setup(case)
    judge = _judge(KFACLinearOperator, other, x, y, fisher_type=fisher_type, kfac_approx=setting)
    judge.compute_kronecker_factors()
    metric = make("kfac", model, (x, y), kfac_approx=setting, fisher_type=fisher_type)
    assert len(metric.blocks) == len(judge._input_covariances)
    for placed in metric.blocks:
        assert isinstance(placed.block, KroneckerBlock)
        A = _permuted(model.get_submodule(placed.name), placed.block.A.matrix)
        torch.testing.assert_close(A, judge._input_covariances[placed.name], rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(
            placed.block.G.matrix, judge._gradient_covariances[placed.name], rtol=1e-8, atol=1e-12
        )
    v = [torch.randn_like(p) for p in model.parameters()]
    for mine, theirs in zip(metric.matvec(v), judge @ v, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("case", ["mlp", "cnn", "pooled"])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
def test_ekfac_eigenvalues_and_products(case, setting):
    model, _, x, y = _setup(case)
    judge = _judge(EKFACLinearOperator, model, x, y, fisher_type="type-2", kfac_approx=setting)
    judge.compute_kronecker_factors()
    judge.compute_eigenvalue_correction()
    metric = make("ekfac", model, (x, y), kfac_approx=setting)
    for placed in metric.blocks:
        theirs = judge._corrected_eigenvalues[placed.name]
        if isinstance(theirs, dict):  # a layer without bias: one entry, by parameter
            (theirs,) = theirs.values()
        torch.testing.assert_close(placed.block.eigenvalues.sum(), theirs.sum(), rtol=1e-8, atol=0)
    v = [torch.randn_like(p) for p in model.parameters()]
    for mine, theirs in zip(metric.matvec(v), judge @ v, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


def test_bernoulli_factors():
    """curvlinops averages the binary loss over its c outputs as well: its G is ours divided by
    c."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(0, 2, (6, 3)).double()
    judge = KFACLinearOperator(
        model,
        nn.BCEWithLogitsLoss(),
        list(model.parameters()),
        [(x, y)],
        fisher_type="type-2",
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    judge.compute_kronecker_factors()
    for placed in make("kfac", model, (x, y), likelihood="bernoulli").blocks:
        torch.testing.assert_close(placed.block.A.matrix, judge._input_covariances[placed.name])
        torch.testing.assert_close(
            placed.block.G.matrix, 3 * judge._gradient_covariances[placed.name]
        )


def _spelt_out(model, module, x, setting):
    """K-FAC's block of one grouped convolution, by loops over examples, classes and groups, as a
    dense matrix a group.

    Order of a group's coordinates: for each output channel its weights, then its bias.
    """
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, args, out: seen.update(x=args[0].detach(), out=out)),
    ]
    n, groups = len(x), module.groups
    A, G = [0.0] * groups, [0.0] * groups
    for i in range(n):
        f = model(x[i : i + 1])[0]
        p = f.detach().softmax(-1)
        patches = nn.functional.unfold(
            seen["x"], module.kernel_size, module.dilation, module.padding, module.stride
        ).reshape(groups, -1, seen["out"][0, 0].numel())
        for c in range(len(f)):
            weight = p[c].sqrt() * ((torch.arange(len(f)) == c).double() - p)
            (g,) = torch.autograd.grad(f @ weight, seen["out"], retain_graph=True)
            g = g.reshape(groups, -1, g[0, 0].numel())
            for k in range(groups):
                rows = g[k].sum(1, keepdim=True) if setting == "reduce" else g[k]
                G[k] = G[k] + rows @ rows.T / n
        for k in range(groups):
            a = patches[k]
            if module.bias is not None:
                a = torch.cat([a, torch.ones(1, a.shape[1], dtype=a.dtype)])
            a = a.mean(1, keepdim=True) if setting == "reduce" else a
            A[k] = A[k] + a @ a.T / a.shape[1] / n
    for handle in handles:
        handle.remove()
    return [torch.kron(G[k], A[k]) for k in range(groups)]


@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_convolutions_have_one_block_a_group(setting, groups, bias):
    torch.manual_seed(2)
    conv = nn.Conv2d(
        4, 8, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=groups, bias=bias
    )
    model = nn.Sequential(
        nn.Conv2d(2, 4, 1), nn.Tanh(), conv, nn.Tanh(), nn.Flatten(), nn.Linear(8 * 3 * 6, 3)
    ).double()
    x = torch.randn(4, 2, 5, 6, dtype=torch.float64)
    metric = make("kfac", model, (x, torch.zeros(4, dtype=torch.long)), kfac_approx=setting)
    full = metric.dense()
    sizes = [p.numel() for p in model.parameters()]
    numbers = torch.arange(sum(sizes)).split(sizes)
    weight, shift = numbers[2].reshape(8, -1), numbers[3] if bias else None
    everything = torch.cat([weight.flatten(), *([shift] if bias else [])])
    mass = 0.0
    for k, truth in enumerate(_spelt_out(model, conv, x, setting)):
        rows = range(k * 8 // groups, (k + 1) * 8 // groups)
        at = torch.cat(
            [torch.cat([weight[o], shift[o : o + 1]]) if bias else weight[o] for o in rows]
        )
        torch.testing.assert_close(full[at[:, None], at], truth, rtol=1e-8, atol=1e-12)
        mass += float(truth.square().sum())
    assert float(full[everything[:, None], everything].square().sum()) == pytest.approx(
        mass
    )  # nothing between groups
