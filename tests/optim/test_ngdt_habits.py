"""What users of torch optimizers expect to go on working."""

import copy
import io
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.optim import EKFAC, KFAC, Calibration

DATA = models.digits()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, size: int = 32) -> None:
    for step in steps:
        x, y = models.minibatch(DATA, step, size)
        optimizer.zero_grad()
        models.loss(model(x), y).backward()
        optimizer.step()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@pytest.mark.parametrize(
    "options",
    [
        {"metric": KFAC(max_refresh_interval=8)},
        {"metric": EKFAC(max_refresh_interval=8)},
        {"weight_decay": 0.05, "metric": KFAC(fisher_type="mc", max_refresh_interval=8)},
        {"metric": "diagonal"},
    ],
)
def test_resume_is_bit_exact(options: dict, tmp_path: Path) -> None:
    options = {"budget": 5e-3, **options}
    torch.manual_seed(7)
    whole = models.mlp()
    train(whole, to.NGDT(whole, **options), range(100))

    torch.manual_seed(7)
    first = models.mlp()
    optimizer = to.NGDT(first, **options)
    train(first, optimizer, range(50))
    path = tmp_path / "state.pt"
    torch.save(
        {
            "model": first.state_dict(),
            "optimizer": optimizer.state_dict(),
            "random": torch.get_rng_state(),
        },
        path,
    )

    saved = torch.load(path, weights_only=True)
    second = models.mlp(seed=99)
    resumed = to.NGDT(second, **options)
    second.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["random"])
    train(second, resumed, range(50, 100))
    assert torch.equal(weights(whole), weights(second))


def test_closures_and_schedulers() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, budget=1e-2)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    x, y = models.minibatch(DATA, 0, 64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = models.loss(model(x), y)
        value.backward()
        return value

    values = []
    for _ in range(20):
        values.append(optimizer.step(closure).item())
        scheduler.step()
    assert values[-1] < 0.6 * values[0]
    assert (
        optimizer.last_step["predicted"] < 1e-3
    )  # the schedule has annealed lr, and with it lr²·budget


def test_accumulated_parts_equal_one_whole_batch() -> None:
    x, y = models.minibatch(DATA, 0, 64)
    results = []
    for parts in (1, 4):
        model = models.mlp()
        metric = KFAC(max_rows=None, half_state=False)
        optimizer = to.NGDT(model, budget=1e-2, metric=metric, calibration=None)
        for _ in range(3):
            optimizer.zero_grad()
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (models.loss(model(xs), ys) / parts).backward()
            optimizer.step()
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_changes_nothing_but_the_scale(unscale: bool) -> None:
    results = []
    for scale in (None, 1024.0):
        model = models.mlp()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        optimizer = to.NGDT(model, budget=1e-2, grad_scaler=scaler if unscale and scale else None)
        for step in range(4):
            x, y = models.minibatch(DATA, step, 64)
            optimizer.zero_grad()
            scaler.scale(models.loss(model(x), y)).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


def test_grad_scaler_overflow_skips_the_step() -> None:
    model = models.mlp()
    optimizer, scaler = to.NGDT(model), torch.amp.GradScaler("cpu", init_scale=1024.0)
    train(model, optimizer, range(2))
    before = weights(model)
    x, y = models.minibatch(DATA, 5, 32)
    optimizer.zero_grad()
    scaler.scale(models.loss(model(x), y)).backward()
    model[0].weight.grad[0, 0] = torch.inf
    with pytest.warns(UserWarning, match="skipped"):
        scaler.step(optimizer)
    assert torch.equal(before, weights(model))


def test_autocast_keeps_factors_in_float32() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, budget=1e-2)
    for step in range(6):
        x, y = models.minibatch(DATA, step, 64)
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = models.loss(model(x), y)
        value.backward()
        optimizer.step()
    for block in optimizer.metric.blocks:
        assert {t.dtype for average in block.averages() for t in average.value} == {torch.float32}
    assert optimizer.last_step["skipped"] == 0


def test_clipping_leaves_the_budget_alone() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, budget=1e-3, eta_max=1e6, calibration=None)
    for step in range(4):
        x, y = models.minibatch(DATA, step, 64)
        optimizer.zero_grad()
        models.loss(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        optimizer.step()
        assert optimizer.last_step["predicted"] == pytest.approx(1e-3, rel=1e-6)


@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_models(in_place: bool) -> None:
    results = []
    for compiled in (False, True):
        model = models.mlp()
        called = model
        if compiled and in_place:
            model.compile(backend="eager")
        elif compiled:
            called = torch.compile(model, backend="eager")
        with to.NGDT(called, budget=1e-2, metric=KFAC(max_refresh_interval=4)) as optimizer:
            for step in range(30):
                x, y = models.minibatch(DATA, step, 32)
                optimizer.zero_grad()
                models.loss(called(x), y).backward()
                optimizer.step()
            assert all(block.inverse is not None for block in optimizer.metric.blocks)
        results.append(models.loss(model(DATA[0]), DATA[1]).item())
    assert results[1] == pytest.approx(results[0], rel=0.5)
    assert results[1] < 1.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module, use: bool) -> None:
            super().__init__()
            self.inner, self.use = inner, use

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.inner[:4]:
                x = checkpoint(layer, x, use_reentrant=reentrant) if self.use else layer(x)
            return self.inner[4](x)

    results = []
    for use in (False, True):
        model = Checkpointed(models.mlp(), use)
        optimizer = to.NGDT(model, budget=1e-2)
        for step in range(4):
            x, y = models.minibatch(DATA, step, 32)
            optimizer.zero_grad()
            models.loss(model(x.requires_grad_()), y).backward()
            optimizer.step()
        results.append(weights(model))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-7)


def test_modules_used_twice_and_unused_parameters() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shared = nn.Linear(64, 24), nn.Linear(24, 24)
            self.last, self.never = nn.Linear(24, 10), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(
                torch.tanh(self.shared(torch.tanh(self.shared(torch.tanh(self.first(x))))))
            )

    torch.manual_seed(0)
    model = Twice()
    optimizer = to.NGDT(model, budget=1e-2, metric=KFAC(max_rows=None))
    untouched = model.never.weight.detach().clone()
    train(model, optimizer, range(1), size=40)
    shared = next(b for b in optimizer.metric.blocks if b.name == "shared")
    assert shared.sides[0].seen == 2 * 40
    train(model, optimizer, range(1, 20), size=40)
    assert torch.equal(model.never.weight, untouched)
    assert models.loss(model(DATA[0]), DATA[1]).item() < 1.5


def test_the_model_can_be_copied_and_pickled_and_hooks_go_away() -> None:
    model = models.mlp()
    optimizer = to.NGDT(model)
    train(model, optimizer, range(2))
    assert sum(len(m._forward_hooks) for m in model.modules()) > 0
    twin = copy.deepcopy(model)
    thawed = pickle.loads(pickle.dumps(model))
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    x = DATA[0][:5]
    before = optimizer.state_dict()["ngdt"]["steps"]
    for other in (twin, thawed):
        torch.testing.assert_close(other(x), model(x))
        models.loss(other(x), DATA[1][:5]).backward()  # hooks of a copy feed nobody
    assert optimizer.state_dict()["ngdt"]["steps"] == before
    optimizer.close()
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    with pytest.raises(to.InputError, match="closed"):
        optimizer.step()
    with to.NGDT(model) as again:
        train(model, again, range(1))
    assert all(not m._forward_hooks for m in model.modules())


def test_evaluation_between_steps_leaves_training_as_it_is() -> None:
    results = []
    for probing in (False, True):
        model = models.mlp()
        optimizer = to.NGDT(model, budget=1e-2)
        for step in range(6):
            x, y = models.minibatch(DATA, step, 32)
            optimizer.zero_grad()
            models.loss(model(x), y).backward()
            if probing:
                with torch.no_grad():
                    model(DATA[0])
            optimizer.step()
            if probing:
                model.eval()
                with torch.no_grad():
                    model(DATA[0])
                model.train()
        results.append(weights(model))
    assert torch.equal(*results)


def test_dropout_and_batchnorm_keep_their_random_draws_and_statistics() -> None:
    """Measuring the realised KL repeats the pass with the same masks and leaves running statistics
    alone."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 10)
    )
    twin = copy.deepcopy(model)
    for measured, net in ((True, model), (False, twin)):
        optimizer = to.NGDT(net, budget=1e-12, calibration=Calibration(1) if measured else None)
        torch.manual_seed(5)
        train(net, optimizer, range(3))
        if measured:
            assert optimizer.last_step["realised"] < 1e-9
    torch.testing.assert_close(model[1].running_mean, twin[1].running_mean, rtol=1e-5, atol=1e-6)
    assert int(model[1].num_batches_tracked) == 3


def test_parameter_groups_share_the_budget() -> None:
    model = models.mlp()
    groups = [
        {"params": model[0].parameters(), "share": 0.25, "weight_decay": 0.1},
        {"params": model[2].parameters()},
        {"params": model[4].parameters(), "lr": 0.0},
    ]
    optimizer = to.NGDT(model, budget=4e-3, params=groups, calibration=None)
    frozen = model[4].weight.detach().clone()
    for step in range(5):
        before = {id(p): p.detach().clone() for p in model.parameters()}
        x, y = models.minibatch(DATA, step, 64)
        optimizer.zero_grad()
        models.loss(model(x), y).backward()
        optimizer.step()
        spent = []
        for block in optimizer.metric.blocks:
            moved = [p.detach() - before[id(p)] for p in block.params]
            delta = block.coordinates.gather(moved)
            spent.append(0.5 * float((delta * block.inverse.matvec(delta)).sum()))
        assert spent[0] == pytest.approx(1e-3, rel=1e-3)
        assert spent[1] == pytest.approx(3e-3, rel=1e-3)
    assert torch.equal(frozen, model[4].weight)


def test_the_recorder_logs_the_diagnostics(tmp_path: Path) -> None:
    model = models.mlp()
    optimizer = to.NGDT(model, budget=1e-2)
    with to.Recorder(
        tmp_path / "run",
        model=model,
        optimizer=optimizer,
        probe=(DATA[0][:50], DATA[1][:50]),
        every=2,
    ) as recorder:
        for step in range(4):
            x, y = models.minibatch(DATA, step, 32)
            optimizer.zero_grad()
            value = models.loss(model(x), y)
            value.backward()
            optimizer.step()
            recorder.step(loss=value)
    logged = to.load_run(tmp_path / "run").steps
    assert {"eta", "delta", "predicted", "realised", "alignment", "kappa"} <= set(logged.columns)
    assert logged["realised"].notna().all()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rows": 16, "decay": 0.9, "overhead": 1.0}, KFAC(0.9, 16, max_solve_overhead=1.0)),
        ({"metric": "ekfac", "targets": "sampled", "setting": "reduce"}, None),
        ({"null_space": "hybrid", "eta_null": 0.1}, KFAC(inverse="pseudo+null", eta_null=0.1)),
    ],
)
def test_old_keywords_still_mean_what_they_did_and_say_where_they_went(
    old: dict, new: KFAC | None
) -> None:
    new = new or EKFAC(fisher_type="mc", kfac_approx="reduce")
    with pytest.warns(DeprecationWarning, match="goes with the next release"):
        optimizer = to.NGDT(models.mlp(), **old)
    assert optimizer.metric.options == new
    with pytest.warns(DeprecationWarning, match="calibration=Calibration"):
        optimizer = to.NGDT(models.mlp(), calibrate=3, calibration_predictions=8)
    assert optimizer.calibration == Calibration(3, 8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'budgets'"):
        to.NGDT(models.mlp(), budgets=1)
