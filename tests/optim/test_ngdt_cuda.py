"""NGD-T, recording and audits on a GPU: the numbers of the CPU, whatever the metric and precision.

Nothing here runs without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

import thermo_opt as to
from tests.optim.optim_models import Transformer, cnn, mlp

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
METRICS = ("kfac", "ekfac", "diagonal", "exact", "dense", "low-rank")


def data(model: nn.Module | nn.Sequential, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A minibatch with something to learn."""
    generator = torch.Generator().manual_seed(step)
    if isinstance(model, Transformer):
        start = torch.randint(32, (16, 1), generator=generator)
        tokens = (start + 5 * torch.arange(17)) % 32
        return tokens[:, :-1], tokens[:, 1:]
    x = torch.randn(48, 64, generator=generator)
    y = (x[:, :10] + x[:, 10:20]).argmax(1)
    return x.unflatten(1, (8, 8)) if isinstance(model[0], nn.Unflatten) else x, y


def trained(
    device: str, make: type[nn.Module] | object, metric: str, steps: int, dtype: torch.dtype
) -> tuple[list[float], to.NGDT, nn.Module]:
    """(losses, optimizer, model) of a training."""
    model = make().to(device, dtype)  # type: ignore[operator]
    optimizer = to.NGDT(model, budget=0.01, metric=metric)
    losses = []
    for step in range(steps):
        x, y = (part.to(device) for part in data(model, step))
        x = x.to(dtype) if x.is_floating_point() else x
        loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, optimizer, model


@pytest.mark.parametrize("metric", METRICS)
def test_steps_are_the_cpus(metric: str) -> None:
    here, _, _ = trained("cpu", mlp, metric, 12, torch.float64)
    there, _, _ = trained("cuda", mlp, metric, 12, torch.float64)
    assert there == pytest.approx(here, rel=1e-6)


@pytest.mark.parametrize("make", [cnn, Transformer])
def test_layers_on_the_device_are_the_cpus(make: object) -> None:
    torch.manual_seed(0)
    here, _, _ = trained("cpu", make, "kfac", 8, torch.float64)
    torch.manual_seed(0)
    there, _, _ = trained("cuda", make, "kfac", 8, torch.float64)
    assert there == pytest.approx(here, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_the_budget(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Transformer().cuda()
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    optimizer = to.NGDT(model, budget=0.01, grad_scaler=scaler if scaler.is_enabled() else None)
    shares, losses = [], []
    for step in range(60):
        x, y = (part.cuda() for part in data(model, step))
        with torch.autocast("cuda", dtype=dtype):
            loss = functional.cross_entropy(model(x).flatten(0, -2), y.flatten())
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if optimizer.last_step["realised"] is not None:
            shares.append(optimizer.last_step["realised"] / optimizer.last_step["predicted"])
    assert losses[-1] < 0.8 * losses[0]
    assert 0.5 < torch.tensor(shares).median() < 2.0


def test_a_state_moves_between_devices(tmp_path: Path) -> None:
    _, optimizer, model = trained("cuda", mlp, "kfac", 10, torch.float32)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "s")
    saved = torch.load(tmp_path / "s", map_location="cpu", weights_only=True)
    after = {}
    for device in ("cpu", "cuda"):
        again = mlp().to(device)
        resumed = to.NGDT(again, budget=0.01)
        again.load_state_dict(saved["model"])
        resumed.load_state_dict(saved["optimizer"])
        x, y = (part.to(device) for part in data(again, 99))
        functional.cross_entropy(again(x), y).backward()
        resumed.step()
        after[device] = torch.cat([p.detach().cpu().flatten() for p in again.parameters()])
    before = torch.cat([p.detach().cpu().flatten() for p in model.parameters()])
    moved = (after["cpu"] - before).norm()
    assert moved > 0
    assert (after["cuda"] - after["cpu"]).norm() < 1e-2 * moved


def test_a_training_on_the_device_is_recorded_and_audited(tmp_path: Path) -> None:
    model = mlp().cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, y = (part.cuda() for part in data(model, 1000))
    with to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=(x, y), every=1, params=True
    ) as recorder:
        for step in range(20):
            inputs, labels = (part.cuda() for part in data(model, step))
            loss = functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    for lens in ("outputs", "parameters"):
        found = [
            to.audit(tmp_path / "run", lens=lens, model=mlp(), device=device).summary
            for device in ("cpu", "cuda")
        ]
        assert found[1]["dissipation"] == pytest.approx(found[0]["dissipation"], rel=1e-4)
        assert found[1]["length"] == pytest.approx(found[0]["length"], rel=1e-4)
