"""Collectives, kept out of the mathematics: averages over processes, and work shared out over
them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from thermo_opt.errors import InputError


class Processes:
    """The processes that train one model together.

    With ``group="auto"`` they are those that DistributedDataParallel or ``fully_shard`` has joined,
    which may come after the optimizer: `meet` looks again before each step. A model in neither
    is trained by this process alone.

    Attributes:
        count: how many they are.
        rank: this one's number among them.
    """

    def __init__(self, model: nn.Module, group: dist.ProcessGroup | str | None = "auto") -> None:
        if isinstance(group, str) and group != "auto":
            raise InputError(
                f"process_group is {group!r}; give 'auto', a torch.distributed ProcessGroup, or "
                "None for this process alone"
            )
        self._auto = group == "auto"
        self._warned = False
        self.count, self.rank = 1, 0
        self._group: dist.ProcessGroup | None = None
        if self._auto:
            self._join(_group_of(model))
        elif isinstance(group, dist.ProcessGroup):
            self._join(group)

    def _join(self, group: dist.ProcessGroup | None) -> None:
        if group is not None:
            self._group, self._auto = group, False
            self.count, self.rank = dist.get_world_size(group), dist.get_rank(group)

    def meet(self, parallel: DistributedDataParallel | None) -> None:
        """Join the group of the DistributedDataParallel in which the model's last pass ran."""
        if not self._auto or not dist.is_available() or not dist.is_initialized():
            return
        if parallel is not None:
            self._join(parallel.process_group)
        elif not self._warned and dist.get_world_size() > 1:
            self._warned = True
            warnings.warn(
                "torch.distributed is initialised, but the model's passes run in no "
                "DistributedDataParallel: this process's NGDT steps alone; where gradients are "
                "averaged in another way, give process_group=torch.distributed.group.WORLD",
                stacklevel=5,
            )

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over processes: one collective per dtype."""
        if self.count == 1 or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat, group=self._group)
            flat /= self.count
            for t, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                t.copy_(part.view_as(t))

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums of numbers over processes."""
        if self.count == 1 or not values:
            return list(values)
        device = "cuda" if dist.get_backend(self._group) == "nccl" else "cpu"
        sums = torch.tensor(list(values), dtype=torch.float64, device=device)
        dist.all_reduce(sums, group=self._group)
        return [float(x) for x in sums.tolist()]

    def mean(self, value: float) -> float:
        """The mean of a number over processes."""
        return self.total([value])[0] / self.count

    def collect(self, value: Any) -> list[Any]:
        """Every process's value, a small Python object."""
        if self.count == 1:
            return [value]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value, group=self._group)
        return found

    def mine(self, job: int) -> bool:
        """Whether job number ``job`` falls to this process."""
        return job % self.count == self.rank

    def hand_out(self, results: Sequence[Sequence[Tensor]]) -> None:
        """Send every job's result, computed by its owner, to all processes."""
        if self.count == 1:
            return
        assert self._group is not None
        for job, tensors in enumerate(results):
            owner = dist.get_global_rank(self._group, job % self.count)
            for t in tensors:
                whole = t.contiguous()
                dist.broadcast(whole, src=owner, group=self._group)
                if whole is not t:
                    t.copy_(whole)


def _group_of(model: nn.Module) -> dist.ProcessGroup | None:
    """The processes that DistributedDataParallel or ``fully_shard`` has joined for this model."""
    inner: Any = model
    while hasattr(inner, "_orig_mod"):
        inner = inner._orig_mod
    if isinstance(inner, DistributedDataParallel):
        return inner.process_group
    for p in model.parameters():
        if isinstance(p, DTensor):
            return p.device_mesh.get_group()
    return None
