"""Two gloo processes that train one model: layers that some don't call, skips, refusals, groups."""

import os
import warnings
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import thermo_opt as to

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = X[:, :4].argmax(1)
HALVES = (slice(0, 16), slice(16, 32))


class Experts(nn.Module):
    """The first half of all examples goes to the first expert, the second half to the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(6, 8)
        self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(2))
        self.head = nn.Linear(8, 4)
        self.double()

    def forward(self, parts):
        x, found = {}, []
        for number, part in parts.items():
            h = self.body(part).tanh()
            x[number] = self.norms[number](self.experts[number](h)).tanh()
        found = [x[number] for number in sorted(x)]
        return self.head(torch.cat(found))


def options(metric):
    kind = {"kfac": to.optim.KFAC, "ekfac": to.optim.EKFAC}[metric]
    whole = kind(max_rows=None, max_solve_overhead=1e9, max_refresh_interval=4)
    return {"budget": 1e-2, "metric": whole, "calibration": to.optim.Calibration(predictions=None)}


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def experts(rank, metric):
    """Each process calls one expert only."""
    model = Experts()
    called = DistributedDataParallel(model, find_unused_parameters=True)
    optimizer = to.NGDT(called, **options(metric))
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(called({rank: X[HALVES[rank]]}), Y[HALVES[rank]]).backward()
        optimizer.step()
    return flat(model)


def alone(metric):
    """The same by one process with the whole batch."""
    model = Experts()
    optimizer = to.NGDT(model, **options(metric))
    for _ in range(6):
        optimizer.zero_grad()
        F.cross_entropy(model({0: X[HALVES[0]], 1: X[HALVES[1]]}), Y).backward()
        optimizer.step()
    return flat(model)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def train(called, optimizer, rank, steps=4, loss=F.cross_entropy):
    for _ in range(steps):
        optimizer.zero_grad()
        loss(called(X[HALVES[rank]]), Y[HALVES[rank]]).backward()
        optimizer.step()


def made_first(rank):
    """The optimizer exists before the model is made parallel."""
    model = net()
    optimizer = to.NGDT(model)
    train(DistributedDataParallel(model), optimizer, rank)
    return flat(model)


def skipped(rank):
    """One process's closure returns NaN once."""
    model = net()
    called = DistributedDataParallel(model)
    optimizer = to.NGDT(called)
    for number in range(4):

        def closure(number=number):
            optimizer.zero_grad()
            loss = F.cross_entropy(called(X[HALVES[rank]]), Y[HALVES[rank]])
            loss.backward()
            return loss * torch.nan if (rank, number) == (1, 2) else loss

        optimizer.step(closure)
    return torch.cat([flat(model), torch.tensor([float(optimizer.skipped)])])


def without_terms(rank):
    """One process's batch has no labels in one step."""
    model = net()
    called = DistributedDataParallel(model)
    optimizer = to.NGDT(called)
    for number in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(called(X[HALVES[rank]]), Y[HALVES[rank]])
        (loss * (0.0 if (rank, number) == (1, 1) else 1.0)).backward()
        optimizer.step()
    return flat(model)


def clipped(rank):
    """Gradients clipped at 1 after the processes' mean."""
    model = net()
    called = DistributedDataParallel(model)
    optimizer = to.NGDT(called, budget=0.01)
    spent = []
    for _ in range(6):
        optimizer.zero_grad()
        (20 * F.cross_entropy(called(X[HALVES[rank]]), Y[HALVES[rank]])).backward()
        nn.utils.clip_grad_norm_(called.parameters(), 1.0)
        optimizer.step()
        spent.append(optimizer.last_step["realised"])
    assert max(spent) < 1.3 * 0.01
    return flat(model)


def accumulated(rank):
    """Parts without communication, and one with."""
    model = net()
    called = DistributedDataParallel(model)
    optimizer = to.NGDT(called, **options("kfac"))
    parts = X[HALVES[rank]].split(4), Y[HALVES[rank]].split(4)
    for _ in range(4):
        optimizer.zero_grad()
        for k, (x, y) in enumerate(zip(*parts, strict=True)):
            with nullcontext() if k == 3 else called.no_sync():
                (F.cross_entropy(called(x), y) / 4).backward()
        optimizer.step()
    return flat(model)


def refused(rank):
    """One process's loss is a sum."""
    model = net()
    called = DistributedDataParallel(model)
    optimizer = to.NGDT(called)
    reduction = "sum" if rank == 1 else "mean"
    loss = F.cross_entropy(called(X[HALVES[rank]]), Y[HALVES[rank]], reduction=reduction)
    loss.backward()
    try:
        optimizer.step()
    except to.InputError as error:
        return str(error)
    return "trained"


def independent(rank):
    """Models of their own, as many steps as each likes; and a group that is given."""
    model = net()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, to.NGDT(model), rank, steps=1 + rank)
    silent = net()
    with warnings.catch_warnings(record=True) as none:
        warnings.simplefilter("always")
        train(silent, to.NGDT(silent, process_group=None), rank, steps=2)
    together = to.NGDT(net(), process_group=dist.group.WORLD).processes.count
    return [len([w for w in c if "alone" in str(w.message)]) for c in (caught, none)] + [together]


SCENES = (made_first, skipped, without_terms, clipped, accumulated, refused, independent)


def work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{path}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    found = {scene.__name__: scene(rank) for scene in SCENES}
    found |= {f"experts {metric}": experts(rank, metric) for metric in ("kfac", "ekfac")}
    torch.save(found, f"{path}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's own threads may otherwise wait for each other for ever


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    path: Path = tmp_path_factory.mktemp("processes")
    mp.spawn(work, args=(str(path),), nprocs=2)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("metric", ["kfac", "ekfac"])
def test_experts_on_different_processes_train_as_on_one(both, metric):
    first, second = (found[f"experts {metric}"] for found in both)
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(first, alone(metric), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "scene", ["made_first", "skipped", "without_terms", "clipped", "accumulated"]
)
def test_weights_stay_together(both, scene):
    first, second = (found[scene] for found in both)
    assert first.isfinite().all()
    torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-10)


def test_accumulated_parts_train_as_one_process_with_the_whole_batch(both):
    model = net()
    optimizer = to.NGDT(model, **options("kfac"))
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimizer.step()
    torch.testing.assert_close(both[0]["accumulated"], flat(model), rtol=0.05, atol=0.05)


def test_one_processs_nan_skips_the_step_of_all(both):
    assert [found["skipped"][-1] for found in both] == [1, 1]


def test_one_processs_refusal_is_everybodys(both):
    assert "another process" in both[0]["refused"]
    assert "summed" in both[1]["refused"]


def test_models_of_their_own_train_alone_with_a_warning_unless_told_so(both):
    assert [found["independent"] for found in both] == [[1, 0, 2], [1, 0, 2]]
