"""Compiled models: hooks can't run inside compiled code, so the few passes that need them run
eagerly."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Compiled:
    """The compiled parts of a model, and the switch between compiled and eager execution of its
    coming training passes.

    Nothing outside the model is touched: each compiled part calls either its compiled code or, in
    passes that autograd records while eager passes are wanted, its original. Once the optimizer
    that holds the switch is gone, compiled code runs again.
    """

    def __init__(self, model: nn.Module) -> None:
        self.wanted = False
        parts = [module for module in model.modules() if _is_compiled(module)]
        self.present = bool(parts)
        for module in parts:
            _install(module, self)

    def eager(self, wanted: bool) -> None:
        """Run the coming training passes eagerly, or no longer."""
        self.wanted = wanted

    def __bool__(self) -> bool:
        return self.present


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _install(module: nn.Module, switch: Compiled) -> None:
    """Replace the compiled code of ``torch.compile(module)`` or ``module.compile()`` by the choice
    between that and the original."""
    if hasattr(module, "_orig_mod"):
        original: Any = module._orig_mod
        vars(module)["forward"] = _choice(vars(module)["forward"], original, switch)
    else:
        compiled: Any = module._compiled_call_impl
        vars(module)["_compiled_call_impl"] = _choice(compiled, module._call_impl, switch)


def _choice(
    compiled: Callable[..., Any], original: Callable[..., Any], switch: Compiled
) -> Callable[..., Any]:
    held = weakref.ref(switch)

    @torch.compiler.disable(recursive=False)
    def call(*args: Any, **kwargs: Any) -> Any:
        now = held()
        eager = now is not None and now.wanted and torch.is_grad_enabled()
        return (original if eager else compiled)(*args, **kwargs)

    return call
