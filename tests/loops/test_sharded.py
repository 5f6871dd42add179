"""``fully_shard`` over two gloo processes trains as one process does; other kinds of sharding are
refused by name."""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import multiprocessing as mp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import thermo_opt as to

TOKENS = (torch.arange(16)[:, None] * 5 + torch.arange(9)) % 11
STEPS = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).tanh())


class Net(nn.Module):
    """A small language model with odd widths, two blocks of one shape, a positional parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.position = nn.Parameter(0.1 * torch.randn(8, 6))
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 11)
        self.double()

    def forward(self, x):
        h = self.embed(x) + self.position
        for block in self.blocks:
            h = block(h)
        return self.head(h)


def options(metric):
    kind = {"kfac": to.optim.KFAC, "ekfac": to.optim.EKFAC}[metric]
    whole = kind(max_rows=None, max_solve_overhead=1e9, max_refresh_interval=4)
    calibration = to.optim.Calibration(predictions=None)
    return {"metric": whole, "calibration": calibration, "weight_decay": 0.01}


def train(model, optimizer, tokens, steps=STEPS):
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()


def sharded():
    model = Net()
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def weights(model):
    parts = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().flatten() for p in parts])


def work(rank: int, path: str) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{path}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=2)
    own = TOKENS.chunk(2)[rank]
    found = {}
    for metric in ("kfac", "ekfac"):
        model = sharded()
        optimizer = to.NGDT(model, **options(metric))
        train(model, optimizer, own)
        found[metric] = weights(model)
        if metric == "kfac":
            held = sum(p.to_local().numel() for p in model.parameters())
            found["held"] = held / sum(p.numel() for p in model.parameters())
            resumed = to.NGDT(model, **options(metric))
            state = get_optimizer_state_dict(model, optimizer)
            set_optimizer_state_dict(model, resumed, state)
            train(model, resumed, own, steps=2)
            found["resumed"] = weights(model)
    torch.save(found, f"{path}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's own threads may otherwise wait for each other for ever


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    path: Path = tmp_path_factory.mktemp("sharded")
    mp.spawn(work, args=(str(path),), nprocs=2)
    return [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize(("metric", "steps"), [("kfac", STEPS), ("ekfac", STEPS)])
def test_two_processes_with_half_of_the_parameters_train_as_one_with_all(both, metric, steps):
    model = Net()
    train(model, to.NGDT(model, **options(metric)), TOKENS, steps)
    assert torch.equal(both[0][metric], both[1][metric])
    torch.testing.assert_close(both[0][metric], weights(model), rtol=1e-5, atol=1e-6)
    assert both[0]["held"] < 0.65


def test_training_goes_on_from_a_state_of_torch_distributed_checkpoint(both):
    model = Net()
    train(model, to.NGDT(model, **options("kfac")), TOKENS, STEPS + 2)
    torch.testing.assert_close(both[0]["resumed"], weights(model), rtol=1e-5, atol=1e-6)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_the_older_fully_sharded_data_parallel_is_refused_by_name(mesh):
    model = FullyShardedDataParallel(Net(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(to.InputError, match="fully_shard instead"):
        to.NGDT(model)


def test_tensor_parallel_layers_are_refused_by_name(mesh):
    model = Net()
    model.head.weight = nn.Parameter(distribute_tensor(model.head.weight.data, mesh, [Shard(0)]))
    with pytest.raises(to.InputError, match="tensor-parallel"):
        to.NGDT(model)


def test_a_metric_of_a_minibatch_is_refused(mesh):
    with pytest.raises(to.InputError, match="metric='kfac'"):
        to.NGDT(sharded(), metric="exact")
