"""K-FAC in training: what it computes, what it spends, and that it keeps to its budget in true
nats."""

import copy
import statistics
import warnings

import pytest
import torch
from torch import nn

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.optim import EKFAC, KFAC

TASKS = {
    "digits MLP": (models.mlp, models.digits, 128),
    "CNN": (models.cnn, models.images, 64),
    "transformer": (models.transformer, models.text, 16),
}


def realised(before: torch.Tensor, after: torch.Tensor) -> float:
    """Mean KL between softmax predictions, in float64."""
    p, q = (t.double().flatten(0, -2).log_softmax(-1) for t in (before, after))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", TASKS)
def test_calibrated_budgets_are_realised_nats(name: str) -> None:
    """Median over the steps after warm-up, measured on the whole minibatch apart from the
    optimizer's own measurements."""
    make, data, size = TASKS[name]
    model, pairs, budget, ratios = make(), data(), 1e-2, []
    pairs = pairs if name == "transformer" else models.noisy(pairs)
    optimizer = to.NGDT(model, budget=budget)
    for step in range(200):
        x, y = models.minibatch(pairs, step, size)
        before = model(x)
        optimizer.zero_grad()
        models.loss(before, y).backward()
        optimizer.step()
        if step >= 30:
            with torch.no_grad():
                allowed = budget * optimizer.last_step["signal"] ** 2
                ratios.append(realised(before.detach(), model(x)) / allowed)
    assert 0.8 <= statistics.median(ratios) <= 1.25
    assert optimizer.last_step["skipped"] == 0


def test_first_step_is_the_natural_gradient_of_the_empirical_kfac_metric() -> None:
    """What NGD-T spends and what the audit measures are one thing: the same factors, hence the same
    direction and Δ."""
    model = models.mlp()
    x, y = models.minibatch(models.digits(), 0, 64)
    metric = to.fisher.make(
        "kfac", copy.deepcopy(model), (x, y), damping=1e-3, fisher_type="empirical"
    )
    optimizer = to.NGDT(
        model,
        metric=KFAC(inverse="pseudo", max_rows=None, max_solve_overhead=1e9),
        damping=1e-3,
        calibration=None,
        momentum=0.0,
        weight_decay=0.0,
    )
    before = [p.detach().clone() for p in model.parameters()]
    models.loss(model(x), y).backward()
    g = [p.grad for p in model.parameters()]
    optimizer.step()
    direction = metric.solve(g)
    scale = optimizer.last_step["eta"]
    for p, old, u in zip(model.parameters(), before, direction, strict=True):
        torch.testing.assert_close(
            p.detach() - old, -scale * u, rtol=2e-3, atol=2e-5 * scale * float(u.abs().max())
        )
    assert optimizer.last_step["delta"] == pytest.approx(metric.dual_norm(g).upper, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"metric": KFAC(max_refresh_interval=4)},
        {"metric": KFAC(max_refresh_interval=4), "weight_decay": 0.1},
        {"metric": EKFAC(max_refresh_interval=4)},
        {"metric": KFAC(max_refresh_interval=4, inverse="pseudo+null", eta_null=0.0)},
    ],
)
def test_the_update_spends_what_it_predicts_in_its_own_metric(options: dict) -> None:
    """δᵀF_λδ recomputed from scratch, block by block, against the lengths carried along by inner
    products."""
    model, data = models.transformer(), models.text()
    optimizer = to.NGDT(
        model, budget=1e-3, regulator="kl-clip", calibration=None, momentum=0.7, **options
    )
    for step in range(45):
        x, y = models.minibatch(data, step, 8)
        optimizer.zero_grad()
        models.loss(model(x), y).backward()
        before = {id(p): p.detach().clone() for p in model.parameters()}
        optimizer.step()
        spent = 0.0
        for block in optimizer.metric.blocks:
            moved = [p.detach() - before[id(p)] for p in block.params]
            delta = block.coordinates.gather(moved)
            spent += 0.5 * float((delta * block.inverse.matvec(delta)).sum())
        assert spent == pytest.approx(optimizer.last_step["predicted"], rel=0.02)
        assert optimizer.last_step["predicted"] == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"metric": "ekfac"},
        {"metric": KFAC(inverse="pseudo"), "damping": 1e-3},
        {"metric": KFAC(inverse="pseudo+null")},
        {"metric": KFAC(fisher_type="mc")},
        {"metric": KFAC(kfac_approx="reduce")},
        {"metric": "diagonal"},
        {"regulator": "heat", "budget": 0.3},
    ],
)
def test_every_variant_trains(options: dict) -> None:
    model, data = models.cnn(), models.images()
    optimizer = to.NGDT(model, **{"budget": 1e-2, **options})
    losses = []
    for step in range(40):
        x, y = models.minibatch(data, step, 64)
        optimizer.zero_grad()
        value = models.loss(model(x), y)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.75 * losses[0]


def test_wide_factors_are_cut_where_they_would_slow_training_and_only_there() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(600, 20), nn.Tanh(), nn.Linear(20, 3))
    x, y = torch.randn(8, 600), torch.randint(3, (8,))
    for overhead, parts in ((0.05, 5), (1e9, 1)):
        net = copy.deepcopy(model)
        optimizer = to.NGDT(net, metric=KFAC(max_solve_overhead=overhead, max_rows=None))
        models.loss(net(x), y).backward()
        optimizer.step()
        first = optimizer.metric.blocks[0]
        assert len(first.inverse.A.inverses) == parts
        assert sum(len(b) for b in first.inverse.A.inverses) == 601


@pytest.mark.parametrize("metric", ["kfac", "ekfac"])
@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_one_frozen_parameter_of_a_layer(metric: str, frozen: str) -> None:
    model, data = models.mlp(), models.digits()
    layers = [m for m in model if isinstance(m, nn.Linear)]
    for layer in layers[:-1]:
        getattr(layer, frozen).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = to.NGDT(model, budget=1e-2, metric=metric)
    for step in range(5):
        x, y = models.minibatch(data, step, 64)
        optimizer.zero_grad()
        models.loss(model(x), y).backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}


def test_tied_and_unruled_parameters_are_covered() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(12, 8), nn.Linear(8, 12)
            self.head.weight = self.tokens.weight
            self.shift = nn.Parameter(torch.zeros(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.tanh(self.tokens(x) + self.shift))

    torch.manual_seed(0)
    model, x = Tied(), torch.randint(12, (30, 5))
    with pytest.warns(UserWarning, match="no layer rule for the model itself"):
        optimizer = to.NGDT(model)
    first = None
    for _ in range(15):
        optimizer.zero_grad()
        value = models.loss(model(x), x)
        first = first or value.item()
        value.backward()
        optimizer.step()
    assert {block.name for block in optimizer.metric.blocks} == {
        "tokens = head",
        "head.bias",
        "shift",
    }
    assert value.item() < 0.7 * first


def test_attention_whose_projections_bypass_their_modules_trains() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(6, 4, 8)
    optimizer = to.NGDT(model, likelihood="gaussian")

    def train() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            (0.5 * (model(x) - 1.0).square().sum(-1).mean()).backward()
            optimizer.step()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train()
    assert all(block.inverse is not None for block in optimizer.metric.blocks)
    assert optimizer.last_step["skipped"] == 0
