"""Collectives, kept out of the mathematics: averages over processes, and work shared out over
them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


class Processes:
    """The processes that train together: those of ``torch.distributed`` when it is initialised,
    otherwise this one."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self.count = dist.get_world_size() if together else 1
        self.rank = dist.get_rank() if together else 0

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their means over processes: one collective a dtype."""
        if self.count == 1 or not tensors:
            return
        for dtype in sorted({t.dtype for t in tensors}, key=str):
            same = [t for t in tensors if t.dtype == dtype]
            flat = torch.cat([t.reshape(-1) for t in same])
            dist.all_reduce(flat)
            flat /= self.count
            for t, part in zip(same, flat.split([t.numel() for t in same]), strict=True):
                t.copy_(part.view_as(t))

    def mean(self, value: float) -> float:
        """The mean of a number over processes."""
        if self.count == 1:
            return value
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return float(total) / self.count

    def mine(self, job: int) -> bool:
        """Whether job number ``job`` falls to this process."""
        return job % self.count == self.rank

    def hand_out(self, results: Sequence[Sequence[Tensor]]) -> None:
        """Send every job's result, computed by its owner, to all processes."""
        if self.count == 1:
            return
        for job, tensors in enumerate(results):
            for t in tensors:
                whole = t.contiguous()
                dist.broadcast(whole, src=job % self.count)
                if whole is not t:
                    t.copy_(whole)
