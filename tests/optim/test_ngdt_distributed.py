"""Two gloo processes with half of the batch each do what one process does with all of it."""

import os
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.optim import kronecker_unit

STEPS = 12


def run(rank: int, count: int, path: str, metric: str, port: int, settled: int) -> None:
    torch.set_num_threads(1)
    kronecker_unit.SETTLED = settled
    if count > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", rank=rank, world_size=count)
    model = models.mlp().double()
    called = DistributedDataParallel(model) if count > 1 else model
    optimizer = to.NGDT(
        called, budget=1e-2, metric=metric, rows=None, calibration_predictions=None, refresh_every=4, overhead=1e9
    )
    data = models.digits()
    for step in range(STEPS):
        x, y = models.minibatch(data, step, 64)
        x, y = x.double().chunk(count)[rank], y.chunk(count)[rank]
        optimizer.zero_grad()
        models.loss(called(x), y).backward()
        optimizer.step()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.save({"weights": flat, "kappa": optimizer.last_step["kappa"]}, f"{path}/{count}-{rank}.pt")
    if count > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize(("metric", "settled"), [("kfac", 30), ("ekfac", 30), ("ekfac", 2)])
def test_two_processes_equal_one(metric: str, settled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``settled``: from which observation on EKFAC's bases follow by warm starts."""
    monkeypatch.setattr(kronecker_unit, "SETTLED", settled)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run(0, 1, str(tmp_path), metric, port, settled)
    mp.spawn(run, args=(2, str(tmp_path), metric, port, settled), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    torch.testing.assert_close(first["weights"], second["weights"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-5, atol=1e-5)
    assert first["kappa"] == pytest.approx(one["kappa"], rel=1e-5)
