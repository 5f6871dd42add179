"""Forward-mode rules with fewer passes over memory than the framework's own, for the operations of
a transformer that need it.

The tangent of a linear layer, ẋWᵀ + xẆᵀ + ḃ, is accumulated in one array instead of three arrays
that are then added; that of attention, whose rows are never masked out entirely here, needs none of
the framework's guards for rows that are; that of a layer normalisation is one kernel instead of
twenty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from thermo_opt.fisher.slopes import layer_norm_tangent, plain


class FusedTangents(TorchFunctionMode):
    """Within `forward_ad.dual_level`, and without gradients recorded: `linear`, `layer_norm` and
    causal or unmasked attention by these rules."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if func is functional.linear:
            return _linear(*args, **options)
        if func is functional.layer_norm:
            return _layer_norm(*args, **options)
        if (
            func is functional.scaled_dot_product_attention
            and len(args) == 3
            and set(options) <= {"is_causal", "scale"}
        ):
            return _attention(*args, **options)
        return func(*args, **options)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    (x, x_dot), (w, w_dot) = forward_ad.unpack_dual(input), forward_ad.unpack_dual(weight)
    b, b_dot = (None, None) if bias is None else forward_ad.unpack_dual(bias)
    out = functional.linear(x, w, b)
    tangent = None if x_dot is None else functional.linear(x_dot, w, b_dot)
    if w_dot is not None:
        if tangent is None:
            tangent = functional.linear(x, w_dot, b_dot)
        else:
            tangent = (
                tangent.reshape(-1, len(w))
                .addmm_(x.reshape(-1, x.shape[-1]), w_dot.mT)
                .view(out.shape)
            )
    elif tangent is None and b_dot is not None:
        tangent = b_dot.expand_as(out)
    return out if tangent is None else forward_ad.make_dual(out, tangent)


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    if not plain(input, weight, bias):
        return functional.layer_norm(input, normalized_shape, weight, bias, eps)
    pairs = [
        (None, None) if t is None else forward_ad.unpack_dual(t) for t in (input, weight, bias)
    ]
    (x, x_dot), (w, w_dot), (b, b_dot) = pairs
    assert x is not None
    x = x.contiguous()
    out, mean, rstd = torch.native_layer_norm(x, list(normalized_shape), w, b, eps)
    if x_dot is None and w_dot is None and b_dot is None:
        return out
    tangent = layer_norm_tangent(x, normalized_shape, mean, rstd, w, x_dot, w_dot, b_dot)
    return forward_ad.make_dual(out, tangent)


def _attention(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False, scale: float | None = None
) -> Tensor:
    pairs = [forward_ad.unpack_dual(t) for t in (query, key, value)]
    if all(tangent is None for _, tangent in pairs):
        return functional.scaled_dot_product_attention(
            query, key, value, is_causal=is_causal, scale=scale
        )
    (q, q_dot), (k, k_dot), (v, v_dot) = (
        (t, torch.zeros_like(t) if dot is None else dot) for t, dot in pairs
    )
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    q, q_dot = q * factor, q_dot * factor
    scores = q @ k.mT
    if is_causal:
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill_(~seen, -math.inf)
    weights = scores.softmax(-1)
    # d softmax = s ∘ (ṫ − sᵀṫ); a masked score has weight 0, so its tangent doesn't matter.
    slope = (q_dot @ k.mT).add_(q @ k_dot.mT).mul_(weights)
    slope.addcmul_(weights, slope.sum(-1, keepdim=True), value=-1)
    return forward_ad.make_dual(weights @ v, (slope @ v).add_(weights @ v_dot))
