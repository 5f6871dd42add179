"""Everything reachable from some objects, remembered and put back bit for bit.

A replica step (theory §11) runs the user's own training code on the real model and optimizer and
must leave no trace in them, whatever kind of optimizer it is: so not state dictionaries are kept
but the objects themselves, which stay the same objects. Tensors get their storage's contents back,
containers and instances their members.
"""

from __future__ import annotations

import copy
import inspect
import logging
import random
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_LEAVES = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, type, range, slice),
    *(torch.dtype, torch.device, torch.Size, types.ModuleType, types.FunctionType),
    *(types.BuiltinFunctionType, types.GeneratorType, logging.Logger, threading.Thread),
)
"""Kinds that hold nothing that a training step changes, or that can't be put back."""


class Memento:
    """What the objects reachable from ``roots`` hold now; `restore` gives it back to them.

    Followed are mappings, lists, tuples, sets, instances' attributes, bound methods and partial
    functions; not what plain functions close over, files, iterators and weak references. Cost: a
    copy of every tensor reached.
    """

    def __init__(self, *roots: Any) -> None:
        self._undo: list[Callable[[], Any]] = []
        seen: dict[int, Any] = {}  # keeps what was visited alive, so that no id is used twice
        waiting = list(roots)
        while waiting:
            thing = waiting.pop()
            if isinstance(thing, _LEAVES) or id(thing) in seen:
                continue
            seen[id(thing)] = thing
            waiting.extend(self._keep(thing))

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _keep(self, thing: Any) -> Iterator[Any]:
        """Remember one object; yields what it refers to."""
        if isinstance(thing, Tensor):
            yield from self._keep_tensor(thing)
        elif isinstance(thing, torch.Generator):
            self._undo.append(partial(thing.set_state, thing.get_state()))
        elif isinstance(thing, np.random.Generator):
            self._undo.append(
                partial(
                    setattr, thing.bit_generator, "state", copy.deepcopy(thing.bit_generator.state)
                )
            )
        elif isinstance(thing, random.Random):
            self._undo.append(partial(thing.setstate, thing.getstate()))
        elif isinstance(thing, np.ndarray):
            if thing.flags.writeable and thing.dtype != object:
                self._undo.append(partial(np.copyto, thing, thing.copy()))
        elif isinstance(thing, dict):
            self._undo.append(partial(_refill, thing, dict(thing)))
            yield from thing.keys()
            yield from thing.values()
        elif isinstance(thing, list):
            self._undo.append(partial(thing.__setitem__, slice(None), list(thing)))
            yield from thing
        elif isinstance(thing, set | deque):
            self._undo.append(partial(_replace, thing, list(thing)))
            yield from thing
        elif isinstance(thing, tuple | frozenset):
            yield from thing
        elif isinstance(thing, types.MethodType):
            yield thing.__self__
        elif isinstance(thing, partial):
            yield from (thing.func, *thing.args, *thing.keywords.values())
        else:
            yield from self._keep_instance(thing)

    def _keep_tensor(self, tensor: Tensor) -> Iterator[Any]:
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        # ``.data`` is not watched by autograd: a graph that is still to be differentiated stays
        # valid.
        storage, content = tensor.data, tensor.detach().clone()
        gradient = tensor.grad if tensor.is_leaf else None
        requires = tensor.requires_grad if tensor.is_leaf else None

        def undo() -> None:
            if tensor.data_ptr() != storage.data_ptr() or tensor.shape != storage.shape:
                tensor.data = storage
            storage.copy_(content)
            if requires is not None:
                tensor.grad = gradient
                tensor.requires_grad_(requires)

        self._undo.append(undo)
        yield gradient
        yield from vars(tensor).values()

    def _keep_instance(self, thing: Any) -> Iterator[Any]:
        members = getattr(thing, "__dict__", None)
        if isinstance(members, dict):
            self._undo.append(partial(_refill, members, dict(members)))
            yield from members.values()
        for kind in type(thing).__mro__:
            slots = vars(kind).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and hasattr(thing, name):
                    value = getattr(thing, name)
                    self._undo.append(partial(_set_slot, thing, name, value))
                    yield value


def used_by(function: Callable[..., Any]) -> list[Any]:
    """What of a training's state a function refers to: modules, optimizers, schedulers, gradient
    scalers, generators.

    Looked for in its closure, the globals it names, its bound object's attributes and the arguments
    of a partial.
    """
    wanted = (
        nn.Module,
        torch.optim.Optimizer,
        torch.optim.lr_scheduler.LRScheduler,
        torch.amp.GradScaler,
    )
    found: list[Any] = []
    while isinstance(function, partial):
        found += [*function.args, *function.keywords.values()]
        function = function.func
    if isinstance(function, types.MethodType):
        found += list(getattr(function.__self__, "__dict__", {}).values())
        function = function.__func__
    elif not isinstance(function, types.FunctionType):
        found += list(getattr(function, "__dict__", {}).values())
        function = type(function).__call__
    if isinstance(function, types.FunctionType):
        names = inspect.getclosurevars(function)
        found += [*names.nonlocals.values(), *names.globals.values()]
    return [thing for thing in found if isinstance(thing, wanted)]


def _refill(mapping: dict[Any, Any], content: dict[Any, Any]) -> None:
    same = len(mapping) == len(content) and all(
        a is b and mapping[a] is content[b] for a, b in zip(mapping, content, strict=True)
    )
    if not same:
        mapping.clear()
        mapping.update(content)


def _replace(collection: set[Any] | deque[Any], content: list[Any]) -> None:
    collection.clear()
    (collection.update if isinstance(collection, set) else collection.extend)(content)


def _set_slot(thing: Any, name: str, value: Any) -> None:
    if getattr(thing, name, None) is not value:
        object.__setattr__(thing, name, value)
