"""What processes captured in one step, made the same list on all of them.

Layers may have been called on some processes only (experts, branches, a batch without labels).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from thermo_opt.optim.kronecker.blocks import ParameterBlock
from thermo_opt.optim.kronecker.layout import Captured
from thermo_opt.optim.processes import Processes


def agreed(processes: Processes, blocks: Sequence[ParameterBlock], own: Captured) -> Captured:
    """The blocks that some process captured something of, with tensors whose plain mean over
    processes is right.

    A process that did not call a layer has zeros for it: its examples have no gradient there. Means
    over the rows that a layer was called with are of the processes that called it alone, and are
    scaled up for the zeros of the others. Cost: one sum of a number per layer; where processes
    differ, one exchange of shapes.
    """
    mine = {block: _by_layer(block, captured) for block, captured in own}
    places = [(block, j) for block in blocks for j in range(block.layer_count)]
    calls = processes.total([float(j in mine.get(block, {})) for block, j in places])
    counts = dict(zip(places, calls, strict=True))
    shapes = _shapes(processes, places, mine) if _differ(calls, processes.count) else {}
    found: Captured = []
    for block in blocks:
        layers = [j for j in range(block.layer_count) if counts[block, j] > 0]
        tensors: list[Tensor] = []
        for j in layers:
            part = mine.get(block, {}).get(j)
            if part is None:
                like = block.params[0]
                sizes = shapes[places.index((block, j))]
                part = [torch.zeros(n, dtype=dtype, device=like.device) for n, dtype in sizes]
            scale = processes.count / counts[block, j]
            if scale != 1.0:
                for t in part[: block.row_means(len(part))]:
                    t.mul_(scale)
            tensors += part
        if layers:
            block.captured_layers = layers
            found.append((block, tensors))
    return found


def _by_layer(block: ParameterBlock, captured: Sequence[Tensor]) -> dict[int, list[Tensor]]:
    layers = block.captured_layers
    each = len(captured) // len(layers)
    return {j: list(captured[each * i : each * (i + 1)]) for i, j in enumerate(layers)}


def _differ(calls: Sequence[float], count: int) -> bool:
    return any(0 < n < count for n in calls)


Shapes = list[tuple[torch.Size, torch.dtype]]


def _shapes(
    processes: Processes,
    places: Sequence[tuple[ParameterBlock, int]],
    mine: dict[ParameterBlock, dict[int, list[Tensor]]],
) -> dict[int, Shapes]:
    """Shapes and dtypes of what any process captured, by the number of its place."""
    own: dict[int, Shapes] = {}
    for number, (block, j) in enumerate(places):
        part = mine.get(block, {}).get(j)
        if part is not None:
            own[number] = [(t.shape, t.dtype) for t in part]
    merged: dict[int, Shapes] = {}
    for one in processes.collect(own):
        merged |= one
    return merged
