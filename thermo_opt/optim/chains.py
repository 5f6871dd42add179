"""Parts of a model that are called one after the other, as passes of one module.

A loop may call an encoder and then a head, or a model may return nothing but its loss: then no
module returned the predictions from the inputs by itself. Where each part was given exactly what
another one returned, or data, the calls can be repeated in their order all the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.models import map_leaves, tensors_in
from thermo_opt.optim.forward_pass import ForwardPass
from thermo_opt.optim.heads import beside, is_wide


@dataclass(frozen=True)
class Made:
    """Stands for tensor ``place`` of what call number ``call`` returns."""

    call: int
    place: int


class Chain(nn.Module):
    """Calls parts in their order, each with its arguments, and gives the predictions of those whose
    result no other part takes."""

    def __init__(self, calls: Sequence[ForwardPass], ends: Sequence[ForwardPass]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(seen.module for seen in calls)
        number = {id(seen): k for k, seen in enumerate(calls)}
        self.ends = [(number[id(end)], end.heads) for end in ends]

    def forward(self, *calls: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[Tensor, ...]:
        results: list[Any] = []

        def given(leaf: Any) -> Any:
            made = isinstance(leaf, Made)
            return tensors_in(results[leaf.call])[leaf.place] if made else leaf

        for part, (args, kwargs) in zip(self.parts, calls, strict=True):
            results.append(part(*map_leaves(args, given), **map_leaves(kwargs, given)))
        return tuple(heads.together(heads.each(results[k])) for k, heads in self.ends)


class Origins:
    """Remembers which call of a part made which tensor, as long as the tensor lives."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[weakref.ref[Tensor], int, ForwardPass, int]] = {}

    def add(self, seen: ForwardPass, result: Any) -> None:
        """A part has returned ``result``."""
        for place, t in enumerate(tensors_in(result)):
            self._made[id(t)] = weakref.ref(t), t._version, seen, place

    def of(self, given: Any) -> dict[int, tuple[ForwardPass, int]]:
        """Of the tensors that a part is about to be given, by their identity: the call that made
        them and their place in its result, if nothing has changed them since."""
        origins = {}
        for t in tensors_in(given):
            made = self._made.get(id(t))
            if made is not None and made[0]() is t and made[1] == t._version:
                origins[id(t)] = made[2], made[3]
        return origins


def chained(
    passes: Sequence[ForwardPass], names: dict[nn.Module, str], classes: bool
) -> list[ForwardPass]:
    """The passes of several parts, put together: one for each call of the last part; where several
    parts are last ones, one of all, with a head for each.

    Raises:
        InputError: where a part was given something that was made of another one's result outside
            all parts, so that its calls can't be repeated.
    """
    taken = {id(before) for seen in passes for before, _ in seen.origins.values()}
    ends = [seen for seen in passes if id(seen) not in taken]
    if len({seen.module for seen in ends}) == 1:
        return [_together([end], names, classes) for end in ends]
    return [_together(ends, names, classes)]


def _together(
    ends: Sequence[ForwardPass], names: dict[nn.Module, str], classes: bool
) -> ForwardPass:
    calls: dict[int, ForwardPass] = {}
    for end in ends:
        _collect(end, calls, names)
    number = {of: k for k, of in enumerate(calls)}

    def arguments(seen: ForwardPass) -> Any:
        def given(leaf: Any) -> Any:
            if id(leaf) not in seen.origins:
                return leaf
            before, place = seen.origins[id(leaf)]
            return Made(number[id(before)], place)

        return map_leaves((seen.args, seen.kwargs), given)

    order = list(calls.values())
    outputs = [end.outputs for end in ends]
    widest_first = sorted(range(len(ends)), key=lambda k: not is_wide(outputs[k], classes))
    heads = beside(outputs, widest_first, classes)
    kept = [outputs[k] for k in heads.places]
    args = tuple(map(arguments, order))
    one = ForwardPass(
        Chain(order, ends),
        args,
        {},
        heads.together(kept),
        ends[-1].autocast,
        order[0].restore,
        heads,
    )
    for source, k in enumerate(heads.places):
        if (g := ends[k].gradient) is not None:
            one.receive(source, g)
    return one


def _collect(end: ForwardPass, calls: dict[int, ForwardPass], names: dict[nn.Module, str]) -> None:
    """Add the calls that one depends on, and then itself."""
    for t in tensors_in((end.args, end.kwargs)):
        if id(t) in end.origins:
            _collect(end.origins[id(t)][0], calls, names)
        elif t.grad_fn is not None:
            raise InputError(
                f"backward came through several parts of the model, and {names[end.module]!r} was "
                "given something that was computed between them, so that NGDT can't repeat what "
                "led to the predictions: let the forward of one module do all of it and return the "
                "predictions (a tensor, or a dictionary with 'logits'), and call that module"
            )
    calls.setdefault(id(end), end)
