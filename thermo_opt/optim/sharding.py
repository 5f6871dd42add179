"""Parameters that ``torch.distributed.fsdp.fully_shard`` has spread over processes.

The metric's arithmetic is done with whole tensors, block by block, the same on every process;
gradients are gathered for it, and each process updates its own part of a parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate

from thermo_opt.errors import InputError


def is_sharded(model: nn.Module) -> bool:
    """Whether some parameter is spread over processes.

    Raises:
        InputError: where it was by something else than ``fully_shard`` on a mesh of one dimension.
    """
    modules = list(model.modules())
    if any(isinstance(m, FullyShardedDataParallel) for m in modules):
        raise InputError(
            "the model is in a FullyShardedDataParallel, which flattens its parameters: shard it "
            "with torch.distributed.fsdp.fully_shard instead"
        )
    spread = [p for p in model.parameters() if isinstance(p, DTensor)]
    if not spread:
        return False
    if not any(isinstance(m, FSDPModule) for m in modules):
        raise InputError(
            "the model's parameters are distributed tensors, but not by fully_shard: NGDT does not "
            "train tensor-parallel layers"
        )
    if any(p.device_mesh.ndim != 1 for p in spread):
        raise InputError(
            "the model is sharded over a mesh of several dimensions: NGDT trains fully_shard on a "
            "mesh of one"
        )
    return True


def whole(t: Tensor) -> Tensor:
    """The whole of a tensor; a collective where it is sharded."""
    return t.full_tensor() if isinstance(t, DTensor) else t


def own_part(p: Tensor) -> Tensor:
    """The part of a parameter that this process holds, itself."""
    return p.to_local() if isinstance(p, DTensor) else p


def part_like(t: Tensor, p: Tensor) -> Tensor:
    """Of a whole tensor, the part that `own_part` of ``p`` is."""
    if not isinstance(p, DTensor):
        return t
    replicated = DTensor.from_local(t, p.device_mesh, [Replicate()], run_check=False)
    return replicated.redistribute(placements=p.placements).to_local()


def zeros_like(p: Tensor) -> Tensor:
    """Zeros of the shape of the whole."""
    return torch.zeros(p.shape, dtype=p.dtype, device=p.device)


def reshard(model: nn.Module) -> None:
    """Free what a pass without a backward pass has left gathered: the next one gathers anew."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
