"""Hooks on the model and on its autograd graph.

Hooks act on training passes alone (autograd on): a probe's forward pass under ``no_grad`` is not
seen. They keep a weak reference to the optimizer; copies and pickles of the model carry inert
hooks.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.utils.hooks import RemovableHandle


class WeakHook:
    """A forward hook or pre-hook that calls a bound method while its owner lives, in passes that
    autograd records; a copy of it does nothing."""

    def __init__(self, method: Callable[..., None] | None = None) -> None:
        self._method = None if method is None else weakref.WeakMethod(method)

    def __call__(self, *seen: Any) -> None:
        method = None if self._method is None else self._method()
        if method is not None and torch.is_grad_enabled():
            method(*seen)

    def __deepcopy__(self, memo: Any) -> WeakHook:
        return WeakHook()

    def __reduce__(self) -> tuple[type[WeakHook], tuple[()]]:
        return WeakHook, ()


def after_forward(module: nn.Module, method: Callable[..., None]) -> RemovableHandle:
    """Call ``method(module, args, kwargs, output)`` after every recorded call of a module."""
    return module.register_forward_hook(WeakHook(method), with_kwargs=True)


class StepByStep:
    """Runs a recurrent layer's training passes time step by time step: the fused kernels of a whole
    sequence show no gradients at the gates."""

    def __init__(self) -> None:
        self._open = ExitStack()

    def attach(self, module: nn.Module) -> list[RemovableHandle]:
        """Hooks before and after each call, the latter also where the call fails."""
        return [
            module.register_forward_pre_hook(WeakHook(self._enter)),
            module.register_forward_hook(WeakHook(self._leave), always_call=True),
        ]

    def _enter(self, *_: Any) -> None:
        self._open.close()
        with warnings.catch_warnings():  # that TF32 is for Intel's GPUs, which nobody asked
            warnings.filterwarnings("ignore", message="TF32 acceleration")
            self._open.enter_context(torch.backends.mkldnn.flags(enabled=False))
        self._open.enter_context(torch.backends.cudnn.flags(enabled=False))

    def _leave(self, *_: Any) -> None:
        self._open.close()


def on_gradient(output: Any, receive: Callable[[Tensor], None]) -> bool:
    """Call ``receive(g)`` when backward reaches this output; False when it takes no part in
    autograd.

    Not for derivatives that are differentiated again (gradient penalties, the residuals of a
    differential equation): they are part of a loss, not its gradient.
    """
    if not (isinstance(output, Tensor) and output.requires_grad):
        return False

    def hook(g: Tensor) -> None:
        if torch.is_grad_enabled():
            return
        with torch.no_grad():
            receive(g)

    output.register_hook(hook)
    return True


def on_source_gradients(output: Tensor, receive: Callable[[int, Tensor], None]) -> bool:
    """Call ``receive(k, g)`` when backward reaches source k of this output, whether through the
    output or past it; False when it takes no part in autograd.

    A trainer may hand back a copy of the predictions that the model computed its loss from
    (Accelerate's mixed precision: a float32 copy), and a stack of them may be ours alone. The
    sources are what was copied and stacked.
    """
    itself = (output.grad_fn, output.output_nr)
    sources = _sources(*itself)
    if sources in ([], [itself]):
        return on_gradient(output, lambda g: receive(0, g))
    for k, (node, place) in enumerate(sources):
        node.register_prehook(_SourceHook(k, place, receive))
    return True


def on_node_gradient(node: Any, receive: Callable[[Tensor], None]) -> None:
    """Call ``receive(g)`` when backward reaches the first output of an autograd node."""
    node.register_prehook(_SourceHook(0, 0, lambda _, g: receive(g)))


class _SourceHook:
    """Hands on the gradient at one output of an autograd node."""

    def __init__(self, number: int, place: int, receive: Callable[[int, Tensor], None]) -> None:
        self.number, self.place, self.receive = number, place, receive

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> None:
        g = gradients[self.place]
        if g is not None and not torch.is_grad_enabled():
            with torch.no_grad():
                self.receive(self.number, g)


def _sources(node: Node | None, place: int = 0) -> list[tuple[Any, int]]:
    """The nodes, and which of their outputs, that a tensor is a copy or a stack of."""
    if node is None:
        return []
    if node.name() in ("ToCopyBackward0", "StackBackward0"):
        return [s for before, nr in node.next_functions for s in _sources(before, nr)]
    return [(node, place)]
