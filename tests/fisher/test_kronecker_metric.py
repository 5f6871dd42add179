"""K-FAC and EKFAC against a dense float64 Fisher made by plain autograd, where theory says they
agree with it."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.oracles import dense_fisher as oracle
from thermo_opt.errors import InputError
from thermo_opt.fisher import make
from thermo_opt.fisher.kronecker import register, rule_for
from thermo_opt.fisher.kronecker.blocks import DenseBlock, DiagonalBlock, KroneckerBlock

EPS = 1e-8


def dense_fisher(model, x, likelihood="categorical", sigma2=1.0):
    """F = (1/n) Σ JᵀΛJ, one backward pass per output of each example; n counts predictions
    (tokens)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    total, count = torch.zeros(size, size, dtype=torch.float64), 0
    for i in range(len(x)):
        f = model(x[i : i + 1])
        f = f.reshape(-1, f.shape[-1])
        for row in f:
            grads = [
                torch.autograd.grad(
                    o, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for o in row
            ]
            J = torch.stack([torch.cat([g.flatten() for g in gs]) for gs in grads]).double()
            p = row.detach().double().softmax(-1)
            L = (
                torch.diag(p) - torch.outer(p, p)
                if likelihood == "categorical"
                else torch.eye(len(row), dtype=torch.float64) / sigma2
            )
            total += J.T @ L.double() @ J
            count += 1
    return total / count


def block_indices(model):
    """Positions in the flat parameter vector, one tensor a parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in parameters]
    return list(torch.arange(sum(sizes)).split(sizes))


def assert_blocks_exact(metric, model, truth, names=None):
    mine, where = (
        metric.dense() - metric.damping * torch.eye(metric.size, dtype=torch.float64),
        block_indices(model),
    )
    checked = 0
    for placed in metric.blocks:
        if names is not None and placed.name not in names:
            continue
        at = torch.cat([where[i] for i in placed.positions])
        torch.testing.assert_close(
            mine[at[:, None], at], truth[at[:, None], at], rtol=EPS, atol=EPS
        )
        checked += 1
    assert checked > 0


def assert_consistent_with_its_dense_matrix(metric):
    """matvec, quadratic, solve, dual_norm, split, diagnostics against one dense float64 matrix of
    the same metric."""
    torch.manual_seed(11)
    F = metric.dense()

    def flat(v):
        return torch.cat([t.flatten() for t in v])

    v, g = ([torch.randn(s, dtype=torch.float64) for s in metric.shapes] for _ in range(2))
    x, y = flat(v), flat(g)
    torch.testing.assert_close(flat(metric.matvec(v)), F @ x, rtol=EPS, atol=EPS)
    assert metric.quadratic(v) == pytest.approx(float(x @ F @ x), rel=EPS)
    bare = F - metric.damping * torch.eye(metric.size, dtype=torch.float64)
    values, basis = torch.linalg.eigh(bare)
    kept = values > metric.cut
    inverse = (
        1 / (values + metric.damping) if metric.damping else torch.where(kept, 1 / values, 0.0)
    )
    truth = basis @ (inverse * (basis.T @ y))
    torch.testing.assert_close(
        flat(metric.solve(g)), truth, rtol=EPS, atol=EPS * float(truth.abs().max())
    )
    bracket = metric.dual_norm(g)
    assert bracket.lower == pytest.approx(float(y @ truth), rel=EPS)
    assert bracket.upper == pytest.approx(float(y @ truth), rel=EPS)
    inside, outside = metric.split(g)
    torch.testing.assert_close(
        flat(outside), basis @ torch.where(kept, 0.0, basis.T @ y), rtol=EPS, atol=EPS
    )
    torch.testing.assert_close(flat(inside) + flat(outside), y)
    report = metric.diagnostics()
    assert report["rank"] == int(kept.sum())
    assert report["trace"] == pytest.approx(float(bare.trace()), rel=EPS)
    assert report["condition"] == pytest.approx(
        float(values[kept].max() / values[kept].min()), rel=1e-4
    )
    shares = metric.quadratic_by_block(v)
    assert math.fsum(shares.values()) == pytest.approx(metric.quadratic(v), rel=1e-10)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)).double(), (
        6,
        4,
    )


def cnn():
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, groups=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()
    model[3].running_mean.normal_()
    model[3].running_var.uniform_(0.5, 2)
    return model.eval(), (5, 2, 4, 4)


class Transformer(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.places = nn.Embedding(3, 4)
        self.before, self.after = nn.LayerNorm(4), nn.RMSNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, x):
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]))
        q, k, v = self.qkv(self.before(h)).chunk(3, -1)
        h = h + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return self.head(self.after(h))


def transformer():
    return Transformer().double(), "tokens"


def data(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    if shape == "tokens":
        return torch.randint(0, 7, (4, 3), generator=g), torch.randint(0, 7, (4, 3), generator=g)
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randint(
        0, 3, shape[:1], generator=g
    )


@pytest.mark.parametrize("build", [mlp, cnn, transformer])
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("setting", ["expand", "reduce"])
@pytest.mark.parametrize("damping", [0.0, 1e-3])
def test_every_operation_agrees_with_the_metrics_own_dense_matrix(build, kind, setting, damping):
    torch.manual_seed(0)
    model, shape = build()
    assert_consistent_with_its_dense_matrix(
        make(kind, model, data(shape), damping=damping, kfac_approx=setting, rtol=1e-6)
    )


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_one_example_without_weight_sharing_is_exact_blockwise(kind):
    """On one example A and G are not averaged apart: every block is F's own."""
    torch.manual_seed(1)
    model, shape = mlp()
    x, y = data(shape)
    assert_blocks_exact(make(kind, model, (x[:1], y[:1])), model, dense_fisher(model, x[:1]))


@pytest.mark.parametrize("shape", [(9, 4), (5, 3, 4)])
def test_deep_linear_gaussian_network_is_exact_blockwise_on_any_batch(shape):
    """The output gradient doesn't depend on the example, so A and G are independent; shared
    positions alike (expand)."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3, bias=False), nn.Linear(3, 2)).double()
    x = torch.randn(shape, dtype=torch.float64)
    metric = make("kfac", model, (x, None), likelihood="gaussian", sigma2=0.3, kfac_approx="expand")
    assert_blocks_exact(metric, model, dense_fisher(model, x, "gaussian", 0.3))


@pytest.mark.parametrize("likelihood", oracle.DISTRIBUTIONS)
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_every_likelihood_is_exact_blockwise_on_one_example(kind, likelihood):
    torch.manual_seed(1)
    model, shape = mlp()
    x = torch.randn(1, *shape[1:], dtype=torch.float64)
    y = (
        torch.tensor([2])
        if likelihood == "categorical"
        else torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    )
    if likelihood == "heteroscedastic":  # two means and two log-variances
        model[-1], y = nn.Linear(model[-1].in_features, 4).double(), y[:, :2]
    options = {"sigma2": 0.7} if likelihood == "gaussian" else {}
    metric = make(kind, model, (x, y), likelihood=likelihood, **options)
    assert_blocks_exact(metric, model, oracle.dense_fisher(model, x, y, likelihood, **options))
    empirical = make(kind, model, (x, y), likelihood=likelihood, fisher_type="empirical", **options)
    assert_blocks_exact(
        empirical, model, oracle.dense_fisher(model, x, y, likelihood, empirical=True, **options)
    )


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.last(self.first(x).mean(1))


def test_reduce_is_exact_for_a_linear_network_that_averages_its_positions():
    """The case in which the reduce setting is exact (Eschenhagen et al. 2023), and expand is
    not."""
    torch.manual_seed(3)
    model = Pooled().double()
    x = torch.randn(6, 3, 4, dtype=torch.float64)
    truth = dense_fisher(model, x, "gaussian")
    reduce, expand = (
        make("kfac", model, (x, None), likelihood="gaussian", kfac_approx=s)
        for s in ("reduce", "expand")
    )
    assert_blocks_exact(reduce, model, truth)
    assert float((expand.dense()[:25, :25] - truth[:25, :25]).abs().max()) > 1e-3


def test_ekfac_eigenvalues_are_the_diagonal_of_f_in_its_basis_and_are_the_better_fit():
    """George et al. 2018: σ = diag(Uᵀ F U), hence the same trace as F and the least Frobenius error
    among diagonals."""
    torch.manual_seed(4)
    for build in (mlp, cnn):
        model, shape = build()
        x, y = data(shape)
        truth, where = dense_fisher(model, x), block_indices(model)
        kfac, ekfac = make("kfac", model, (x, y)), make("ekfac", model, (x, y))
        for plain, corrected in zip(kfac.blocks, ekfac.blocks, strict=True):
            if not isinstance(plain.block, KroneckerBlock):
                continue
            at = torch.cat([where[i] for i in plain.positions])
            F = truth[at[:, None], at]
            order = corrected.coordinates.gather(
                [
                    torch.arange(len(at))
                    .split([len(where[i]) for i in plain.positions])[k]
                    .reshape(ekfac.shapes[i])
                    for k, i in enumerate(plain.positions)
                ]
            ).flatten()
            F = F[order[:, None], order]
            errors = [float((b.dense() - F).norm()) for b in (plain.block, corrected.block)]
            assert errors[1] <= errors[0] * (1 + 1e-12)
            assert corrected.block.trace == pytest.approx(float(F.trace()), rel=EPS)


def test_scale_blocks_are_exact_on_any_batch():
    """LayerNorm, BatchNorm (evaluation mode): the dense block is F's own, whatever the batch."""
    torch.manual_seed(5)
    for build, name in ((mlp, "2"), (cnn, "3")):
        model, shape = build()
        x, y = data(shape)
        assert_blocks_exact(make("kfac", model, (x, y)), model, dense_fisher(model, x), {name})


def test_wide_scale_layers_get_a_small_block_per_channel(monkeypatch):
    monkeypatch.setattr("thermo_opt.fisher.kronecker.layers.DENSE_SCALES", 4)
    torch.manual_seed(5)
    model, shape = mlp()
    x, y = data(shape)
    metric, truth, where = make("kfac", model, (x, y)), dense_fisher(model, x), block_indices(model)
    placed = next(p for p in metric.blocks if p.name == "2")
    assert placed.block.eigenvalues.shape == (5, 2)
    for channel in range(5):
        at = torch.stack([where[2][channel], where[3][channel]])
        torch.testing.assert_close(
            metric.dense()[at[:, None], at], truth[at[:, None], at], rtol=EPS, atol=EPS
        )
    assert_consistent_with_its_dense_matrix(metric)


def test_a_bag_of_tokens_has_an_exact_embedding_block():
    """One token an example, linear after the table, Gaussian output: G is constant, so
    diag(frequencies) ⊗ G is exact."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(3, 2)).double()
    x = torch.randint(0, 4, (8, 1))
    for kind in ("kfac", "ekfac"):
        metric = make(kind, model, (x, None), likelihood="gaussian")
        assert_blocks_exact(metric, model, dense_fisher(model, x, "gaussian"))
    null = metric.split([torch.ones(s, dtype=torch.float64) for s in metric.shapes])[1]
    assert float(null[0][4].sum()) == pytest.approx(3)  # the token that never occurs is free


def test_microbatches_change_nothing():
    torch.manual_seed(7)
    for build in (mlp, cnn):
        model, shape = build()
        for kind in ("kfac", "ekfac"):
            whole, parts = (make(kind, model, data(shape), microbatch=m) for m in (None, 2))
            torch.testing.assert_close(whole.dense(), parts.dense(), rtol=1e-10, atol=1e-12)


def test_ignored_positions_do_not_count():
    torch.manual_seed(8)
    model = nn.Sequential(nn.Linear(4, 3)).double()
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    y = torch.tensor([[0, 1, 2], [1, -100, -100]])
    kept = (
        make("kfac", model, (x.reshape(6, 4)[:4], y.flatten()[:4]), fisher_type="empirical")
        .blocks[0]
        .block
    )
    masked = make("kfac", model, (x, y), fisher_type="empirical").blocks[0].block
    torch.testing.assert_close(masked.G.matrix, kept.G.matrix)


def test_sampled_targets_converge_to_the_exact_factors():
    torch.manual_seed(9)
    model, shape = mlp()
    batch = data(shape)
    exact, sampled = (
        make("kfac", model, batch),
        make("kfac", model, batch, fisher_type="mc", samples=4000),
    )
    for a, b in zip(exact.blocks, sampled.blocks, strict=True):
        torch.testing.assert_close(a.block.trace, b.block.trace, rtol=0.05, atol=0)
    again = make("kfac", model, batch, fisher_type="mc", samples=2, seed=3)
    torch.testing.assert_close(
        again.dense(), make("kfac", model, batch, fisher_type="mc", samples=2, seed=3).dense()
    )


def test_sequence_terms_do_not_leak_into_each_other_on_average():
    """Attention mixes positions: the random signs make the expected scale block F's own (within
    sampling error)."""
    torch.manual_seed(10)
    model, _ = transformer()
    x, y = data("tokens")
    truth, where = dense_fisher(model, x), block_indices(model)
    names = [n for n, _ in model.named_parameters()]
    at = torch.cat([where[names.index("before.weight")], where[names.index("before.bias")]])
    mean = torch.stack(
        [make("kfac", model, (x, y), seed=s).dense()[at[:, None], at] for s in range(400)]
    ).mean(0)
    torch.testing.assert_close(
        mean, truth[at[:, None], at], rtol=0.1, atol=0.1 * float(truth[at, at].max())
    )


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared, self.last = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.last(self.shared(x[:, 0]) + self.shared(x[:, 1]))


def test_two_calls_of_a_module_are_two_shared_positions():
    torch.manual_seed(11)
    model = Twice().double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)

    class Once(Twice):
        def forward(self, x):
            return self.last(self.shared(x).sum(1))

    other = Once().double()
    other.load_state_dict(model.state_dict())
    y = torch.zeros(5, dtype=torch.long)
    for kind in ("kfac", "ekfac"):
        for setting in ("expand", "reduce"):
            one, two = (make(kind, m, (x, y), kfac_approx=setting).dense() for m in (other, model))
            torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)


def test_tied_weights_have_one_block_with_the_trace_of_the_sum():
    torch.manual_seed(12)
    tied, free = Transformer(tied=True).double(), Transformer().double()
    free.load_state_dict(tied.state_dict())
    x, y = data("tokens")
    metric, apart = make("kfac", tied, (x, y), rtol=1e-6), make("kfac", free, (x, y))
    (block,) = [p for p in metric.blocks if "=" in p.name]
    traces = {p.name: p.block.trace for p in apart.blocks}
    assert block.block.trace == pytest.approx(traces["tokens"] + traces["head"], rel=1e-10)
    assert any("tied weights" in note for note in metric.notes)
    assert_consistent_with_its_dense_matrix(metric)
    assert_consistent_with_its_dense_matrix(make("ekfac", tied, (x, y), rtol=1e-6))
    assert_consistent_with_its_dense_matrix(make("kfac", tied, (x, y), max_side=5, rtol=1e-6))


class Keyword(nn.Linear):
    """Called with its input by keyword."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


register(Keyword, rule_for(nn.Linear(1, 1)))


class Loose(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset = nn.Parameter(torch.randn(4))
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.act = nn.PReLU()
        self.last = Keyword(4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        return self.gain * self.last(x=self.act(x + self.offset))


def test_parameters_without_a_rule_get_fs_diagonal_and_are_named_once():
    torch.manual_seed(13)
    model = Loose().double()
    x, y = data((6, 4))
    with pytest.warns(
        UserWarning, match="offset, gain, act.weight, unused.weight, unused.bias"
    ) as caught:
        metric = make("kfac", model, (x, y))
    assert len(caught) == 1
    truth, where = dense_fisher(model, x), block_indices(model)
    for placed in metric.blocks:
        if isinstance(placed.block, DiagonalBlock):
            at = where[placed.positions[0]]
            torch.testing.assert_close(metric.dense()[at, at], truth[at, at], rtol=EPS, atol=EPS)
    assert_consistent_with_its_dense_matrix(metric)


def test_frozen_parameters_are_left_out():
    torch.manual_seed(14)
    model, shape = mlp()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    x, y = data(shape)
    for kind in ("kfac", "ekfac"):
        metric = make(kind, model, (x[:1], y[:1]))
        assert_blocks_exact(metric, model, dense_fisher(model, x[:1]))
        assert_consistent_with_its_dense_matrix(metric)


def test_a_side_beyond_the_limit_keeps_its_diagonal():
    torch.manual_seed(15)
    model, shape = cnn()
    batch = data(shape)
    full = {p.name: p.block for p in make("kfac", model, batch).blocks}
    for kind in ("kfac", "ekfac"):
        metric = make(kind, model, batch, max_side=20, rtol=1e-6)
        (block,) = [p.block for p in metric.blocks if p.name == "6"]
        assert block.A.diagonal
        torch.testing.assert_close(block.A.matrix, full["6"].A.matrix.diagonal())
        assert_consistent_with_its_dense_matrix(metric)


def test_float32_metric_is_near_its_float64_self():
    torch.manual_seed(16)
    model, shape = cnn()
    x, y = data(shape)
    exact = make("kfac", model, (x, y), damping=1e-2)
    single = make("kfac", model.float(), (x.float(), y), damping=1e-2)
    g = [torch.randn(s) for s in exact.shapes]
    for a, b in zip(single.solve(g), exact.solve(g), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("build", [mlp, transformer])
def test_half_precision_models_have_float32_factors(kind, build):
    torch.manual_seed(17)
    model, shape = build()
    batch = data(shape)
    single = make(
        kind,
        model.float(),
        tuple(t.float() if t.is_floating_point() else t for t in batch),
        damping=0.1,
    )
    model = model.bfloat16()
    half = make(
        kind, model, tuple(t.bfloat16() if t.is_floating_point() else t for t in batch), damping=0.1
    )
    g = [torch.randn(s) for s in half.shapes]
    assert half.dual_norm(g).lower == pytest.approx(single.dual_norm(g).lower, rel=0.1)
    assert {t.dtype for t in half.solve(g)} == {torch.bfloat16}
    assert {p.block.eigenvalues.dtype for p in half.blocks} == {torch.float32}


def test_torchs_own_transformer_layer_has_factors_where_no_module_is_called():
    """MultiheadAttention uses its weights without calling a module; of one token the blocks are
    exact."""
    torch.manual_seed(18)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.layer(x).mean(1))

    model = Model().double().eval()
    x, y = torch.randn(4, 3, 4, dtype=torch.float64), torch.randint(0, 3, (4,))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = make("kfac", model, (x, y), rtol=1e-6)
        one = make("kfac", model, (x[:1, :1], y[:1]), rtol=1e-6)
    attention = {p.name: p for p in metric.blocks if "self_attn" in p.name}
    assert sorted(attention) == [
        "layer.self_attn.in_proj_weight",
        "layer.self_attn.out_proj.weight",
    ]
    assert {type(p.block) for p in attention.values()} == {KroneckerBlock}
    truth, where = dense_fisher(model, x[:1, :1]), block_indices(model)
    for placed in attention.values():
        for i in placed.positions:
            at = where[i]
            torch.testing.assert_close(one.dense()[at, at], truth[at, at], rtol=EPS, atol=EPS)
    assert_consistent_with_its_dense_matrix(metric)


class Checkpointed(nn.Module):
    def __init__(self, on):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.on = on

    def part(self, h):
        return torch.tanh(self.middle(h))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(checkpoint(self.part, h, use_reentrant=False) if self.on else self.part(h))


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_activation_checkpointing_changes_nothing(kind):
    torch.manual_seed(19)
    plain, saving = Checkpointed(False).double(), Checkpointed(True).double()
    saving.load_state_dict(plain.state_dict())
    one, two = (make(kind, m, data((6, 4)), microbatch=2).dense() for m in (plain, saving))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


def test_hooks_are_gone_and_scale_rows_use_the_dense_block():
    model, shape = mlp()
    metric = make("kfac", model, data(shape))
    assert not any(m._forward_hooks for m in model.modules())
    assert isinstance(next(p for p in metric.blocks if p.name == "2").block, DenseBlock)


class Overwriting(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x):
        x = x + 0
        out = self.first(x)
        x.add_(1)
        return self.last(out)


def test_an_input_overwritten_after_use_is_refused_not_misread():
    with pytest.raises(InputError, match="'first' was changed in place"):
        make("kfac", Overwriting().double(), data((6, 4)))


def test_bad_input_is_refused():
    model, shape = mlp()
    batch = data(shape)
    with pytest.raises(InputError, match="kfac_approx"):
        make("kfac", model, batch, kfac_approx="exact")
    with pytest.raises(InputError, match="fisher_type"):
        make("ekfac", model, batch, fisher_type="all")
    with pytest.raises(InputError, match="samples"):
        make("kfac", model, batch, fisher_type="mc", samples=0)
    with pytest.raises(InputError, match="needs targets"):
        make("kfac", model, batch[0], fisher_type="empirical")


def test_training_on_and_overridden_weights_leave_the_metric_as_it_was():
    model, shape = mlp()
    x, y = data(shape)
    given = {name: p.detach() + 1 for name, p in model.named_parameters()}
    for options in ({}, {"parameters": given}):
        metric = make("kfac", model, (x, y), fisher_type="empirical", **options)
        before = metric.dense().clone()
        with torch.no_grad():
            for p in [*model.parameters(), *given.values()]:
                p.mul_(3)
        torch.testing.assert_close(metric.dense(), before, rtol=0, atol=0)
