"""What an optimizer keeps: the bytes of its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def state_size(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every distinct tensor reachable from the optimizer's own state, parameters and
    gradients excluded."""
    skip = {
        t.data_ptr()
        for group in optimizer.param_groups
        for p in group["params"]
        for t in (p, p.grad)
        if t is not None
    }
    seen: dict[int, Any] = {}  # keeps what was visited alive, so that no id is used twice
    found: dict[int, int] = {}

    def walk(node: Any, depth: int) -> None:
        if id(node) in seen or depth > 12:
            return
        seen[id(node)] = node
        if isinstance(node, Tensor):
            storage = node.untyped_storage()
            if storage.data_ptr() not in skip:
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, dict):
            for value in node.values():
                walk(value, depth + 1)
        elif isinstance(node, list | tuple | set):
            for value in node:
                walk(value, depth + 1)
        elif (
            hasattr(node, "__dict__")
            and not isinstance(node, nn.Module | type)
            and type(node).__module__.startswith("thermo_opt")
        ):
            walk(vars(node), depth + 1)

    walk(dict(optimizer.state), 0)
    if hasattr(optimizer, "metric"):
        walk(optimizer.metric, 0)
    return sum(found.values())
