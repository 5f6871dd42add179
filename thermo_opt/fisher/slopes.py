"""Activations whose slope is dear to compute, computed once: for a linearisation the slope φ'(x) is a constant.

Autograd evaluates φ' anew in every backward pass, which for the exact GELU costs several times its forward pass. Products with J and
Jᵀ at one point need φ'(x) only as a fixed factor, and never φ''.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _Slope(torch.autograd.Function):
    """y with the derivative u ↦ slope · u, itself differentiable in u."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, None]:
        return u * ctx.saved_tensors[0], None, None


class FixedSlopes(TorchFunctionMode):
    """While active, GELU, SiLU and Mish record their slope instead of their input. Only first derivatives are right."""

    functions: frozenset[Callable[..., Any]] = frozenset({functional.gelu, functional.silu, functional.mish})

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        in_place = options.get("inplace", False) or len(args) > 1
        if func not in self.functions or in_place or not args or not args[0].requires_grad:
            return func(*args, **options)
        x = args[0].detach().requires_grad_()
        y = func(x, **options)
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return _Slope.apply(args[0], y.detach(), slope)
