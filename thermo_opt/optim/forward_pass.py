"""Hooks on the model: what went in and came out of it, and of the layers whose turn it is.

Hooks are attached only for the steps that need them. They act on training passes alone (autograd
on): a probe's forward pass under ``no_grad`` is not seen. They keep a weak reference to the
optimizer; copies and pickles of the model carry inert hooks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from thermo_opt.errors import InputError
from thermo_opt.models import map_tensors, mixes_examples, outputs_of, repeated


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


def on_gradient(output: Any, receive: Callable[[Tensor], None]) -> bool:
    """Call ``receive(g)`` when backward reaches this output; False when it takes no part in
    autograd."""
    if not (isinstance(output, Tensor) and output.requires_grad):
        return False

    def hook(g: Tensor) -> None:
        with torch.no_grad():
            receive(g)

    output.register_hook(hook)
    return True


@dataclass
class ForwardPass:
    """One training pass of the whole model: its arguments, its outputs (detached), and what
    backward showed of them.

    ``terms``: predictions with a gradient. ``total``: Σ|∂loss/∂outputs|, at most 2 for a mean
    cross-entropy. Both 0 if not counted.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: Tensor
    random_state: Tensor | None = None
    terms: int = 0
    total: float = 0.0
    used: bool = False

    @property
    def examples(self) -> int:
        """Length of the outputs' first dimension."""
        return self.outputs.shape[0] if self.outputs.dim() else 1

    def inputs(self) -> Any:
        """The arguments in the form `thermo_opt.fisher.Batch` takes."""
        if self.kwargs and self.args:
            return {**{str(i): a for i, a in enumerate(self.args)}, **self.kwargs}
        if self.kwargs:
            return dict(self.kwargs)
        return self.args[0] if len(self.args) == 1 else tuple(self.args)

    def again(self, model: nn.Module, predictions: int | None) -> tuple[Tensor, Tensor]:
        """(old outputs, outputs of ``model`` now) on about ``predictions`` predictions of evenly
        spaced examples (None: all).

        A model that mixes examples is always run on all of them, with the same random draws.
        """
        args: Any = self.args
        kwargs, old, count = self.kwargs, self.outputs, self.examples
        mixed = mixes_examples(model)
        if predictions is not None and not mixed and old.dim() > 1:
            each = max(old[0, ..., 0].numel(), 1)
            stride = max(count // max(-(-predictions // each), 4), 1)

            def rows(t: Tensor) -> Tensor:
                return t[::stride] if t.dim() and t.shape[0] == count else t

            args, kwargs, old = map_tensors(args, rows), map_tensors(kwargs, rows), old[::stride]
        with torch.no_grad(), repeated(model, self.random_state if mixed else None):
            return old, outputs_of(model(*args, **kwargs)).detach()


class PassRecorder:
    """Records whole training passes of a model: `passes` since the last `clear`. Its two hooks are
    there while it is armed.

    While ``counting``, the loss terms of each pass are counted too.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.passes: list[ForwardPass] = []
        self.counting = True
        self._handles: list[RemovableHandle] = []
        self._random_state: Tensor | None = None

    def arm(self, counting: bool = True) -> None:
        """Attach the hooks."""
        self.counting = counting
        if not self._handles:
            before = self.model.register_forward_pre_hook(WeakHook(self._before))
            self._handles = [before, after_forward(self.model, self._after)]

    def disarm(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """A training pass begins."""
        self._random_state = torch.random.get_rng_state() if mixes_examples(self.model) else None

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A training pass ends."""
        try:
            outputs = outputs_of(output)
        except InputError:
            return  # a pass that returns something else than predictions: nothing to calibrate on
        seen = ForwardPass(args, kwargs, outputs.detach(), self._random_state)

        def receive(g: Tensor) -> None:
            seen.used = True
            if not self.counting:
                return
            sizes = g.abs().sum(-1) if g.dim() > 1 else g.abs()
            seen.terms, seen.total = int((sizes != 0).sum()), float(sizes.sum(dtype=torch.float32))

        if on_gradient(outputs, receive):
            self.passes.append(seen)

    @property
    def used(self) -> list[ForwardPass]:
        """The passes that took part in a backward pass."""
        return [seen for seen in self.passes if seen.used]

    def clear(self) -> None:
        """Forget all passes."""
        self.passes = []
