"""Which parameters share a block, and how blocks are cut, stacked and replaced."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from thermo_opt.fisher.kronecker.layers import Cover, KroneckerLayer, ScaleLayer, cover
from thermo_opt.fisher.kronecker.scratch import Scratch
from thermo_opt.optim.kronecker.blocks import LayerBlock, NormBlock, ParameterBlock, UnruledBlock
from thermo_opt.optim.kronecker.matrix import MatrixBlock, TiedBlock
from thermo_opt.optim.training_metric import Setup

if TYPE_CHECKING:
    from thermo_opt.optim.metrics import KFAC

SIDES = (1024, 512, 256, 128)
"""Sides to which wide factors may be cut (block-diagonal factors) where solving with whole ones
would slow training."""

STACK = 8
"""Most layers of one shape that are stacked to one block."""

Captured = list[tuple[ParameterBlock, list[Tensor]]]
"""Blocks with what they captured in one step."""


def make_blocks(model: nn.Module, plan: Cover, options: KFAC) -> list[ParameterBlock]:
    """One block per layer, one per weight that layers share, and a diagonal one for each parameter
    without a rule."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    blocks: list[ParameterBlock] = []
    rest = set(plan.rest)
    shared: dict[int, list[KroneckerLayer]] = {}
    for layer in plan.layers:
        params = [trainable[i][1] for _, i in layer.own]
        if plan.tied.isdisjoint(i for _, i in layer.own):
            if isinstance(layer, ScaleLayer):
                blocks.append(NormBlock([layer], params, options))
            else:
                blocks.append(MatrixBlock([layer], params, options))
            continue
        for local, i in layer.own:
            if i in plan.tied and local == "weight" and isinstance(layer, KroneckerLayer):
                shared.setdefault(i, []).append(layer)
            else:
                rest.add(i)
    for i, layers in shared.items():
        rest.discard(i)
        blocks.append(TiedBlock(layers, trainable[i][1], options))
    blocks += [UnruledBlock(trainable[i][0], [trainable[i][1]], options) for i in sorted(rest)]
    return blocks


class BlockLayout:
    """The blocks of a model's parameters, in the order in which they take turns.

    The first step that sees the layers decides, once, how far wide factors are cut (`cut`) and
    which layers are stacked (`stack`); a layer that turns out never to be called gets diagonal
    blocks (`replace`).

    Attributes:
        blocks: those that hold parameters of the optimizer.
        decided: whether `cut` and `stack` were called.
        limit: largest side of a factor's diagonal block; None: factors are whole.
    """

    def __init__(self, setup: Setup, options: KFAC) -> None:
        self.setup, self.options = setup, options
        self._place = {id(p): i for i, p in enumerate(setup.params)}
        self.scratch = Scratch()
        self.blocks: list[ParameterBlock] = []
        self.unruled: tuple[tuple[str, str], ...] = ()
        self.build()

    def build(self) -> None:
        """Start from one block per layer."""
        plan = cover(self.setup.model)
        self.decided = False
        self.limit: int | None = None
        self._replaced: list[str] = []
        self._stacks: list[list[str]] = []
        self.unruled = plan.unruled
        self._put(make_blocks(self.setup.model, plan, self.options))

    def _put(self, blocks: Sequence[ParameterBlock]) -> None:
        """Keep the blocks that hold parameters of the optimizer, told where those stand."""
        for block in blocks:
            block.scratch = self.scratch
            block.places = [self._place.get(id(p)) for p in block.params]
        self.blocks = [block for block in blocks if any(i is not None for i in block.places)]

    def adopt(self, old: BlockLayout) -> None:
        """Take over the old layout's blocks whose parameters still share a block, stacks too."""
        self.decided, self.limit, self._stacks = old.decided, old.limit, []
        if old.decided:
            self._cut(old.limit)
        blocks = list(self.blocks)
        for block in old.blocks:
            own = {id(p) for p in block.params}
            parts = [
                b
                for b in blocks
                if type(b) is type(block) and own.issuperset(id(p) for p in b.params)
            ]
            if parts and {id(p) for b in parts for p in b.params} == own:
                blocks = [block if b is parts[0] else b for b in blocks if b not in parts[1:]]
                names = next((n for n in old._stacks if ", ".join(n) == block.name), None)
                self._stacks += [names] if names else []
        self._put(blocks)

    def warn_of_unruled(self, stacklevel: int) -> None:
        """Name, once, the modules without a layer rule."""
        if self.unruled:
            kinds: dict[str, list[str]] = {}
            for name, kind in self.unruled:
                kinds.setdefault(kind, []).append(name or "the model itself")
            named = ", ".join(
                f"{names[0]} ({kind})"
                if len(names) == 1
                else f"{len(names)} modules {kind} ({names[0]}, …)"
                for kind, names in kinds.items()
            )
            warnings.warn(
                f"no layer rule for {named}: a diagonal metric is used for their own parameters "
                "(thermo_opt.fisher.kronecker.register adds a rule)",
                stacklevel=stacklevel + 1,
            )

    def decide(self, found: Captured) -> Captured:
        """Cut and stack, once, from the first step's captures; returns them cut and stacked."""
        self.decided = True
        return self._stack(self._cut_to_fit(found))

    # ---- wide factors

    def _cut_to_fit(self, found: Captured) -> Captured:
        """Choose the largest side of a diagonal block such that solving stays within
        ``max_solve_overhead`` of the passes' work."""
        wide = [block for block in self.blocks if isinstance(block, MatrixBlock)]
        limit: int | None = None
        for limit in (None, *SIDES):
            work = [block.work(limit) for block in wide]
            passes, solves = (sum(x[i] for x in work) for i in (0, 1))
            passes, solves = self.setup.processes.total([passes, solves])
            if solves <= self.options.max_solve_overhead * passes:
                break
        parts = [
            (block, block.cut(limit, captured) if isinstance(block, MatrixBlock) else captured)
            for block, captured in found
        ]
        self._cut(limit)
        return parts

    def _cut(self, limit: int | None) -> None:
        self.limit = limit
        for block in self.blocks:
            if isinstance(block, MatrixBlock):
                block.cut(limit)

    # ---- stacks

    def _stack(self, found: Captured) -> Captured:
        """Stack the blocks of one shape and parameter group that were seen, at most `STACK` at a
        time."""
        by_shape: dict[tuple[object, ...], Captured] = {}
        for block, captured in found:
            shape = block.shape_key() if isinstance(block, LayerBlock) else None
            groups = tuple(None if i is None else self.setup.groups[i] for i in block.places)
            like = block.params[0]
            key = (id(block),) if shape is None else (*shape, groups, like.dtype, like.device)
            by_shape.setdefault(key, []).append((block, captured))
        stacked: Captured = []
        for members in by_shape.values():
            size = math.ceil(len(members) / math.ceil(len(members) / STACK))
            for part in (members[i : i + size] for i in range(0, len(members), size)):
                block = part[0][0] if len(part) == 1 else self._merge([b.name for b, _ in part])
                stacked.append((block, [t for _, captured in part for t in captured]))
        return stacked

    def _merge(self, names: list[str]) -> ParameterBlock:
        """Put a stack of the blocks of these names in the place of the first."""
        parts = [b for b in self.blocks if isinstance(b, LayerBlock) and b.name in names]
        whole = parts[0].merge(parts)
        self._put([whole if b is parts[0] else b for b in self.blocks if b not in parts[1:]])
        self._stacks.append(names)
        return whole

    # ---- layers that are never called

    def replace(self, names: Sequence[str]) -> list[UnruledBlock]:
        """Give the layers of these names a diagonal metric; returns the new blocks."""
        blocks: list[ParameterBlock] = []
        fresh: list[UnruledBlock] = []
        for block in self.blocks:
            if block.name in names and not isinstance(block, UnruledBlock):
                own = [
                    UnruledBlock(f"{block.name}[{j}]", [p], self.options)
                    for j, p in enumerate(block.params)
                ]
                blocks += own
                fresh += own
                self._replaced.append(block.name)
            else:
                blocks.append(block)
        self._put(blocks)
        return [block for block in fresh if block in self.blocks]

    # ---- saving

    def state_dict(self) -> dict[str, Any]:
        """Names only: what was cut, stacked and replaced."""
        return {
            "decided": self.decided,
            "limit": self.limit,
            "stacks": [list(names) for names in self._stacks],
            "fallback": list(self._replaced),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Build the layout that `state_dict` describes."""
        self.build()
        self.replace(state["fallback"])
        self.decided = bool(state["decided"])
        if self.decided:
            self._cut(state["limit"])
        known = {block.name for block in self.blocks}
        for names in state["stacks"]:
            if known.issuperset(names):
                self._merge(list(names))
