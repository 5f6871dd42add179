"""Operations whose derivative is dear to take twice, recorded as what it is at one point: a fixed
linear map.

Autograd evaluates the slope φ'(x) of an activation anew in every backward pass, which for the exact
GELU costs several times its forward pass, and writes the second derivative of a layer normalisation
as thirty operations. Products with J and Jᵀ at one point need φ'(x) and the normalisation's mean
and deviation only as constants, and no second derivative.
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


def layer_norm_tangent(
    x: Tensor,
    shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    x_dot: Tensor | None,
    weight_dot: Tensor | None,
    bias_dot: Tensor | None,
) -> Tensor:
    """Tangent γ ∘ dx̂ + γ̇ ∘ x̂ + β̇ of a layer normalisation γ ∘ x̂ + β at x, with x̂ = (x −
    mean)/σ; a missing velocity is zero.

    dx̂ = (ẋ − mean ẋ − x̂ mean(x̂ẋ))/σ is a symmetric map of ẋ, so autograd's backward kernel
    computes it.
    """
    if x_dot is None:
        out = torch.zeros_like(x)
    else:
        wanted = [True, False, False]
        out = torch.ops.aten.native_layer_norm_backward(
            x_dot.contiguous(), x, list(shape), mean, rstd, None, None, wanted
        )[0]
        if weight is not None:
            out.mul_(weight)
    if weight_dot is not None:
        out.addcmul_((x - mean).mul_(rstd), weight_dot)
    return out if bias_dot is None else out.add_(bias_dot)


class _Norm(torch.autograd.Function):
    """Layer normalisation whose derivative is the linear map `_Pull`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shape: Sequence[int],
        eps: float,
    ) -> Tensor:
        x = x.contiguous()
        y, mean, rstd = torch.native_layer_norm(x, list(shape), weight, bias, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.shape = shape
        return y

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        constants = [None if t is None else t.detach() for t in ctx.saved_tensors]
        return (*_Pull.apply(u, ctx.shape, *constants), None, None)


class _Pull(torch.autograd.Function):
    """u ↦ (Jᵀu) of a layer normalisation at a fixed point, and as its own derivative v ↦ J v."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        shape: Sequence[int],
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        wanted = [True, weight is not None, bias is not None]
        found = torch.ops.aten.native_layer_norm_backward(
            u.contiguous(), x, list(shape), mean, rstd, weight, bias, wanted
        )
        return tuple(t if asked else None for t, asked in zip(found, wanted, strict=True))

    @staticmethod
    def backward(
        ctx: Any, x_dot: Tensor | None, weight_dot: Tensor | None, bias_dot: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        out = layer_norm_tangent(x, ctx.shape, mean, rstd, weight, x_dot, weight_dot, bias_dot)
        return (out, *[None] * 6)


class FixedSlopes(TorchFunctionMode):
    """While active, GELU, SiLU, Mish and layer normalisation record fixed derivatives. Only first
    derivatives are right.

    Checkpointed layers are left to the framework: they run anew outside of this mode and must save
    what they saved the first time.
    """

    functions: frozenset[Callable[..., Any]] = frozenset(
        {functional.gelu, functional.silu, functional.mish}
    )

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
            return func(*args, **options)
        if func is functional.layer_norm:
            return _layer_norm(*args, **options)
        in_place = options.get("inplace", False) or len(args) > 1
        if (
            func not in self.functions
            or in_place
            or not args
            or not args[0].requires_grad
            or not plain(args[0])
        ):
            return func(*args, **options)
        x = args[0].detach().requires_grad_()
        y = func(x, **options)
        (slope,) = torch.autograd.grad(y, x, torch.ones_like(y))
        return _Slope.apply(args[0], y.detach(), slope)


def plain(*tensors: Tensor | None) -> bool:
    """Whether these rules cover tensors: all in one dtype, not half precision (whose statistics are
    kept in float32), and not inside the model's own `vmap`."""
    given = [t for t in tensors if t is not None]
    if any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in given):
        return False
    return {t.dtype for t in given} in ({torch.float32}, {torch.float64})


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not plain(input, weight, bias):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    return _Norm.apply(input, weight, bias, normalized_shape, eps)
