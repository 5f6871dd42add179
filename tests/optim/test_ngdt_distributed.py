"""Two gloo processes with half of the batch each do what one process does with all of it."""

import os
from pathlib import Path

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

import thermo_opt as to
from tests.optim import optim_models as models
from thermo_opt.optim import EKFAC, KFAC, Calibration
from thermo_opt.optim.kronecker import matrix
from thermo_opt.optim.kronecker.refresh import LEAST

STEPS = 12


KINDS = {"kfac": KFAC, "ekfac": EKFAC}


def join(rank: int, count: int, path: str) -> None:
    """Meet the other processes at a file: a port found free may be taken by the time they do."""
    dist.init_process_group(
        "gloo", init_method=f"file://{path}/meeting", rank=rank, world_size=count
    )


def leave() -> None:
    """Part only once all have come this far: who is still talking aborts when the other is gone."""
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's own threads may otherwise wait for each other for ever


def uneven(rank: int, path: str, metric: str) -> None:
    """One of two processes that see 16 and 5 examples a step."""
    torch.set_num_threads(1)
    join(rank, 2, path)
    model = models.mlp().double()
    called = DistributedDataParallel(model)
    optimizer = to.NGDT(called, metric=KINDS[metric](max_refresh_interval=4))
    for step in range(6):
        x, y = models.minibatch(models.digits(), step, 21)
        part = slice(0, 16) if rank == 0 else slice(16, 21)
        optimizer.zero_grad()
        models.loss(called(x[part].double()), y[part]).backward()
        optimizer.step()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.save({"weights": flat, "damping": optimizer.last_step["damping"]}, f"{path}/{rank}.pt")
    leave()


@pytest.mark.parametrize("metric", ["kfac", "ekfac"])
def test_processes_with_unequal_batches_stay_together(metric: str, tmp_path: Path) -> None:
    mp.spawn(uneven, args=(str(tmp_path), metric), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert first["damping"] == second["damping"] > LEAST
    torch.testing.assert_close(first["weights"], second["weights"], rtol=1e-9, atol=1e-10)


def run(rank: int, count: int, path: str, metric: str, settled: int) -> None:
    torch.set_num_threads(1)
    matrix.SETTLED = settled
    if count > 1:
        join(rank, count, path)
    model = models.mlp().double()
    called = DistributedDataParallel(model) if count > 1 else model
    optimizer = to.NGDT(
        called,
        budget=1e-2,
        metric=KINDS[metric](max_rows=None, max_refresh_interval=4, max_solve_overhead=1e9),
        calibration=Calibration(predictions=None),
    )
    data = models.digits()
    for step in range(STEPS):
        x, y = models.minibatch(data, step, 64)
        x, y = x.double().chunk(count)[rank], y.chunk(count)[rank]
        optimizer.zero_grad()
        models.loss(called(x), y).backward()
        optimizer.step()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    torch.save(
        {"weights": flat, "kappa": optimizer.last_step["kappa"]}, f"{path}/{count}-{rank}.pt"
    )
    if count > 1:
        leave()


@pytest.mark.parametrize(("metric", "settled"), [("kfac", 30), ("ekfac", 30), ("ekfac", 2)])
def test_two_processes_equal_one(
    metric: str, settled: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``settled``: from which observation on EKFAC's bases follow by warm starts."""
    monkeypatch.setattr(matrix, "SETTLED", settled)
    run(0, 1, str(tmp_path), metric, settled)
    mp.spawn(run, args=(2, str(tmp_path), metric, settled), nprocs=2)
    one, first, second = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1")
    )
    torch.testing.assert_close(first["weights"], second["weights"], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(first["weights"], one["weights"], rtol=1e-5, atol=1e-5)
    assert first["kappa"] == pytest.approx(one["kappa"], rel=1e-5)
