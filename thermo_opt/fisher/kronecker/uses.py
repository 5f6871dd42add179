"""Parameters that a module multiplies or adds by itself, found in the autograd graph of its output.

Attention keeps its projections packed, recurrent cells their gates, mixtures their experts in one
stacked tensor, and learned positions are added: no layer with a rule is called there. But autograd
keeps what a backward pass needs: for a matrix product its other operand, whose rows are the layer's
inputs; and the gradient at its output can be hooked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node

from thermo_opt.fisher.kronecker.rules import LinearRule, Module

_THROUGH = ("ToCopyBackward0", "UnsqueezeBackward0", "SqueezeBackward1", "ExpandBackward0")
_TURNED = ("TBackward0", "TransposeBackward0")
_PARTS = ("SelectBackward0", "SplitBackward0", "SplitWithSizesBackward0")
_VIEWS = (*_THROUGH, *_TURNED, *_PARTS)
WIDEST_STACK = 2048
"""Stacked matrices with a longer side keep their diagonal: their factors can't be cut."""


@dataclass(frozen=True)
class ParameterUse:
    """One place where a parameter enters.

    Attributes:
        node: the operation; its first output's gradient is the use's.
        kind: "product" (y = x Wᵀ of the matrix W as it is stored), "turned" (y = x W), "stack"
            (as "product" or "turned", all matrices of a stack at once) or "sum" (y = x + W).
        place: which matrix of a stack, or None.
        start: the first row of W that takes part.
    """

    node: Any
    kind: str
    place: int | None = None
    start: int = 0
    turned: bool = False

    def operand(self) -> Tensor:
        """The input rows (…, rows, in): of a "sum" none."""
        saved = "_saved_mat1" if self.node.name() == "AddmmBackward0" else "_saved_self"
        x: Tensor = getattr(self.node, saved)
        return x.detach()


@dataclass(frozen=True)
class UsedRule(LinearRule):
    """A bare parameter as a matrix (rows, columns) or a stack of them, found by its `uses`.

    Args:
        weight: the parameter's name in its module.
        shift: the name of the bias that joins it, or "".
        size: (stacked matrices, rows, columns).
    """

    weight: str = "weight"
    shift: str = ""
    size: tuple[int, int, int] = (1, 1, 1)

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The parameter and its bias."""
        return (self.weight, self.shift) if self.shift else (self.weight,)

    def own(self, role: str) -> str:
        return {"weight": self.weight, "bias": self.shift}.get(role, role)

    def weight_matrix(self, module: Module, weight: Tensor) -> Tensor:
        stack, rows, columns = self.size
        return weight.reshape(stack, rows, columns) if stack > 1 else weight.reshape(rows, columns)

    def weight_tensor(self, module: Module, matrix: Tensor) -> Tensor:
        return matrix.reshape(module._parameters[self.weight].shape)

    def shape(self, module: Module) -> tuple[int, int, int]:
        stack, rows, columns = self.size
        return stack, rows, columns + self.covers(module, "bias")

    def uses(
        self, module: Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]
    ) -> list[ParameterUse]:
        """Where the parameter enters the outputs, as far as it can be told."""
        p = module._parameters[self.weight]
        found = []
        for node, number, link in _links(inputs, outputs):
            entry = _entry(link, p)
            if entry is None:
                continue
            use = _use(node, number, *entry, stacked=self.size[0] > 1)
            if use is None or (self.shift and use.kind != "product"):
                return []  # another use than these: no factors are better than wrong ones
            found.append(use)
        return found


def used_rules(module: nn.Module, ruled: set[str]) -> list[UsedRule]:
    """Rules for the module's matrices and stacks of matrices that no other rule covers."""
    own = {k: p for k, p in module._parameters.items() if p is not None and p.requires_grad}
    rules = []
    for name, p in own.items():
        shape = [n for n in p.shape if n > 1] if p.dim() > 2 else list(p.shape)
        if name in ruled or len(shape) not in (2, 3) or not p.is_floating_point():
            continue
        if len(shape) == 3 and max(shape[1:]) > WIDEST_STACK:
            continue
        stack, rows, columns = (1, *shape) if len(shape) == 2 else shape
        shift = name.replace("weight", "bias")
        bias = own.get(shift)
        joins = shift != name and shift not in ruled and bias is not None
        joins = joins and stack == 1 and bias is not None and tuple(bias.shape) == (rows,)
        rules.append(UsedRule(name, shift if joins else "", (stack, rows, columns)))
    return rules


def _links(
    inputs: Sequence[Tensor], outputs: Sequence[Tensor]
) -> Iterator[tuple[Any, int, tuple[Any, int]]]:
    """(node, number of its input, where that comes from) of the graph between a module's inputs and
    outputs."""
    seen: set[Node | None] = {t.grad_fn for t in inputs}
    waiting = [t.grad_fn for t in outputs if t.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        for number, link in enumerate(node.next_functions):
            if link[0] is not None:
                waiting.append(link[0])
                if node.name() not in _VIEWS:
                    yield node, number, link


def _entry(link: tuple[Any, int], p: Tensor) -> tuple[bool, int | None, int] | None:
    """(turned, matrix of a stack, first row) if the link leads to the parameter by views alone."""
    node, number = link
    turned, place, start = False, None, 0
    while node is not None:
        name = node.name()
        if name.endswith("AccumulateGrad"):
            return (turned, place, start) if node.variable is p else None
        if name in _TURNED:
            turned = not turned
        elif name == "SelectBackward0" and node._saved_dim == 0:
            place = int(node._saved_index)
        elif name == "SplitBackward0" and node._saved_dim == 0:
            start = number * int(node._saved_split_size)
        elif name == "SplitWithSizesBackward0" and node._saved_dim == 0:
            start = sum(node._saved_split_sizes[:number])
        elif name not in _THROUGH:
            return None
        node, number = node.next_functions[0]
    return None


def _use(
    node: Any, number: int, turned: bool, place: int | None, start: int, stacked: bool
) -> ParameterUse | None:
    name = node.name()
    kind = "product" if turned else "turned"
    if (name, number) in (("AddmmBackward0", 2), ("MmBackward0", 1)) and stacked == (
        place is not None
    ):
        return ParameterUse(node, kind, place, start, not turned)
    if (name, number) == ("BmmBackward0", 1) and stacked and place is None:
        return ParameterUse(node, "stack", None, 0, not turned)
    if name == "AddBackward0" and not (turned or stacked or start):
        return ParameterUse(node, "sum")
    return None
