"""Bad input is refused with a sentence; what goes wrong in training is skipped, counted and
reported."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.fisher.kronecker import Factor
from thermo_opt.optim import EKFAC, KFAC, Calibration, Minibatch
from thermo_opt.optim.kronecker import matrix
from thermo_opt.optim.kronecker.blocks import UnruledBlock
from thermo_opt.optim.kronecker.cholesky import positive_inverse
from thermo_opt.optim.kronecker.inverses import KroneckerInverse, invert

DATA = models.digits()


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int = 0) -> None:
    x, y = models.minibatch(DATA, number, 32)
    optimizer.zero_grad()
    models.loss(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"budget": 0.0}, "budget must be a finite number > 0"),
        ({"budget": -1.0}, "budget"),
        ({"budget": math.nan}, "budget"),
        ({"eta_max": 0.0}, "eta_max"),
        ({"eta_max": math.nan}, "eta_max"),
        ({"damping": -1e-3}, "damping"),
        ({"damping": math.nan}, "damping"),
        ({"damping": 0.0}, "damping=0 needs a metric with inverse="),
        ({"momentum": 1.0}, "momentum"),
        ({"lr": -1.0}, "lr"),
        ({"metric": "newton"}, "metric 'newton' is not one of"),
        ({"regulator": "greedy"}, "regulator 'greedy' is not one of"),
        ({"likelihood": "cauchy"}, "likelihood"),
    ],
)
def test_impossible_settings(options: dict, words: str) -> None:
    with pytest.raises(to.InputError, match=words):
        to.NGDT(models.mlp(), **options)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: KFAC(factor_decay=1.0), "factor_decay"),
        (lambda: KFAC(max_rows=0), "max_rows must be at least 1"),
        (lambda: KFAC(max_refresh_interval=0), "max_refresh_interval"),
        (lambda: KFAC(max_solve_overhead=0.0), "max_solve_overhead must be > 0"),
        (lambda: EKFAC(inverse="all"), "inverse 'all' is not one of damped, pseudo, pseudo"),
        (lambda: EKFAC(fisher_type="true"), "fisher_type 'true' is not one of empirical, mc"),
        (lambda: KFAC(kfac_approx="sum"), "kfac_approx"),
        (lambda: Minibatch("kfac"), "metric 'kfac' is not one of exact"),
        (lambda: Calibration(every=0), "every"),
    ],
)
def test_impossible_options_of_a_metric(make: Callable[[], object], words: str) -> None:
    with pytest.raises(to.InputError, match=words):
        make()


def test_models_that_cannot_be_trained() -> None:
    frozen = models.mlp().requires_grad_(False)
    with pytest.raises(to.InputError, match="no parameters that require grad"):
        to.NGDT(frozen)
    with pytest.raises(to.InputError, match="must be the model"):
        to.NGDT(models.mlp().parameters())
    with pytest.raises(to.InputError, match="no parameter of the model"):
        to.NGDT(models.mlp(), params=[nn.Parameter(torch.zeros(3))])
    complex_model = nn.Module()
    complex_model.w = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(to.InputError, match="view_as_real"):
        to.NGDT(complex_model)
    with pytest.raises(to.InputError, match=r"'0\.weight' has no shape yet"):
        to.NGDT(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3)))
    with torch.device("meta"), pytest.raises(to.InputError, match="meta device"):
        to.NGDT(nn.Linear(4, 3))
    part = models.mlp()
    with pytest.raises(to.InputError, match="only some of them"):
        to.NGDT(part, params=part[0].parameters(), metric="exact")
    with pytest.raises(to.InputError, match="must not exceed 1"):
        to.NGDT(
            part,
            params=[
                {"params": part[0].parameters(), "share": 0.7},
                {"params": part[2].parameters(), "share": 0.7},
            ],
        )


def test_a_step_without_gradients_does_nothing() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))
    assert optimizer.steps == 0


def test_summed_loss_is_recognised_by_its_scale() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model)
    x, y = models.minibatch(DATA, 0, 32)
    nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    with pytest.raises(to.InputError, match="reduction='mean'"):
        optimizer.step()


def test_sparse_gradients() -> None:
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 3))
    optimizer = to.NGDT(model)
    models.loss(model(torch.arange(6)), torch.zeros(6, dtype=torch.long)).backward()
    with pytest.raises(to.InputError, match="sparse"):
        optimizer.step()


def test_models_changed_after_construction() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model)
    model[2] = nn.Linear(32, 16)
    with pytest.raises(to.InputError, match="was replaced"):
        step(model, optimizer)
    other = models.mlp()
    optimizer = to.NGDT(other)
    other.double()
    x, y = models.minibatch(DATA, 0, 32)
    models.loss(other(x.double()), y).backward()
    with pytest.raises(to.InputError, match="moved from"):
        optimizer.step()
    third = models.mlp()
    optimizer = to.NGDT(third)
    third[0].weight = nn.Parameter(torch.zeros(32, 64))
    with pytest.raises(to.InputError, match="was replaced after"):
        step(third, optimizer)


def test_state_of_another_optimizer_or_model() -> None:
    model = models.mlp()
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(to.InputError, match="saved by another optimizer"):
        to.NGDT(model).load_state_dict(adam.state_dict())
    with pytest.raises(to.InputError, match="metric='kfac'"):
        to.NGDT(model, metric="ekfac").load_state_dict(to.NGDT(model).state_dict())


def test_a_state_saved_before_an_entry_was_known_is_loaded() -> None:
    saved = to.NGDT(models.mlp()).state_dict()
    del saved["ngdt"]["inflation"], saved["ngdt"]["curvature"]["still"]
    with pytest.raises(to.InputError, match="still"):
        to.NGDT(models.mlp()).load_state_dict(saved)
    saved["ngdt"]["version"] -= 1
    to.NGDT(models.mlp()).load_state_dict(saved)


@pytest.mark.parametrize("metric", ["kfac", "ekfac", "exact", "diagonal"])
@pytest.mark.parametrize("where", ["gradient", "loss"])
@pytest.mark.parametrize("before", [0, 3])
def test_non_finite_steps_are_skipped_and_poison_nothing(
    metric: str, where: str, before: int
) -> None:
    model = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    optimizer = to.NGDT(model, metric=metric)
    for number in range(before):
        step(model, optimizer, number)
    weights = [p.detach().clone() for p in model.parameters()]
    x, y = models.minibatch(DATA, 3, 32)
    optimizer.zero_grad()
    value = models.loss(model(x), y)
    (value * (torch.nan if where == "loss" else 1.0)).backward()
    if where == "gradient":
        model[0].weight.grad[0, 0] = torch.nan
    with pytest.warns(UserWarning, match="non-finite loss or gradient"):
        optimizer.step()
    assert optimizer.last_step["skipped"] == 1
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), weights, strict=True))
    if metric in ("kfac", "ekfac"):
        assert not any(isinstance(block, UnruledBlock) for block in optimizer.metric.blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for number in range(4, 12):
            step(model, optimizer, number)
    assert optimizer.last_step["skipped"] == 1
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert models.loss(model(DATA[0]), DATA[1]).isfinite()


def test_non_finite_loss_from_a_closure() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        x, y = models.minibatch(DATA, 0, 32)
        models.loss(model(x), y).backward()
        return torch.tensor(torch.inf)

    before = model[0].weight.detach().clone()
    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step(closure)
    assert torch.equal(before, model[0].weight)


def test_inverse_ladder() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 6)
    good = x @ x.T + torch.eye(6)
    inverse, note = positive_inverse(good)
    torch.testing.assert_close(inverse @ good, torch.eye(6), rtol=0, atol=1e-4)
    assert note == ""
    basis = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
    hard = (basis * torch.tensor([1.0, 1, 1, 1, 1, 1e-9], dtype=torch.float64)) @ basis.T
    inverse, note = positive_inverse(hard.float() - 1e-8 * torch.eye(6))
    assert inverse is not None
    assert "float64" in note
    assert positive_inverse(-torch.eye(3)) == (None, "factor is not positive definite")
    assert positive_inverse(torch.full((2, 2), torch.nan))[0] is None


def test_an_inverse_that_fails_keeps_the_last_one() -> None:
    good = KroneckerInverse(Factor(torch.eye(3)), Factor(2 * torch.eye(2)), 1e-3, None)
    invert(good.damped)
    bad = KroneckerInverse(Factor(-5 * torch.eye(3)), Factor(2 * torch.eye(2)), 1e-3, good)
    invert(bad.damped)
    v = torch.randn(2, 3)
    torch.testing.assert_close(bad.A.inverses[0], good.A.inverses[0])
    assert any("kept the last inverse" in note for note in bad.notes)
    torch.testing.assert_close(bad.solve(bad.matvec(v)), v, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("metric", ["kfac", "ekfac"])
def test_a_broken_eigensolver_does_not_stop_training(
    metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, metric=metric, budget=1e-2)
    for number in range(3):
        step(model, optimizer, number)

    def broken(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    def indefinite(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return matrix, torch.ones(matrix.shape[:-2], dtype=torch.int32)

    monkeypatch.setattr(torch.linalg, "eigh", broken)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", indefinite)
    for number in range(3, 8):
        step(model, optimizer, number)
    assert optimizer.last_step["solver_failures"] > 0
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


def test_a_broken_warm_start_keeps_the_basis_and_is_decomposed_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matrix, "SETTLED", 2)
    model = models.mlp()
    optimizer = to.NGDT(model, metric="ekfac", budget=1e-2)
    for number in range(5):
        step(model, optimizer, number)
    block = next(b for b in optimizer.metric.blocks if isinstance(b, matrix.MatrixBlock))
    assert block._basis is not None
    assert block._basis.A.spectrum.note == ""
    before = block._basis.A.spectrum.basis.clone()

    def broken(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "qr", broken)
        step(model, optimizer, 5)
    assert "kept the last basis" in block._basis.A.spectrum.note
    torch.testing.assert_close(block._basis.A.spectrum.basis, before)
    assert optimizer.last_step["solver_failures"] > 0
    step(model, optimizer, 6)
    assert block._basis.A.spectrum.note == ""
