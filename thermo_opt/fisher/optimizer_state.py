"""The metric an Adam-like optimizer carries in its own state, without data (THEORY §9).

Adam's bias-corrected averages are ``m̂ ≈ E[g_B]`` and ``v̂ ≈ E[g_B²]`` over minibatches of B examples. The
per-example variance is about ``B(v̂ − m̂²)``, so ``F ≈ diag(B(v̂ − m̂²) + m̂²)``. With B unknown the metric is
``diag(v̂)``: a metric up to scale, so alignment, straightness and steadiness mean the same and a, Q, ℒ, D are not in
nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.fisher.diagonal import DiagonalMetric

CHUNK = 65_536
"""Elements handled at a time by `step_scalars`: its few work arrays stay in the processor's second-level cache."""


class StepScalars(NamedTuple):
    """Sums over some parameters, in the metric F of the optimizer's state; add those of several tensors with `total`.

    ``a`` = Σ F δ², ``d`` = −Σ m̂ δ over all parameters, ``delta`` = Σ m̂²/F where F > 0, and ``null_decrease`` = the
    part of d where F = 0 (free motion, of which the bound d² ≤ aΔ does not speak).
    """

    a: float
    d: float
    delta: float
    null_decrease: float


def total(parts: Sequence[StepScalars]) -> StepScalars:
    """The scalars of all tensors together: plain sums."""
    return StepScalars(*(float(np.sum(column)) for column in zip(*parts, strict=True)))


def adam_alignment(m: Sequence[Tensor], v: Sequence[Tensor]) -> float | None:
    """Alignment of Adam's own direction m/√v with the natural gradient of diag(v): ``(Σ m²/√v)² / (Σ m² · Σ m²/v)``.

    ``m``, ``v``: lists of Adam's averages, raw or bias-corrected: the ratio is the same. In [0, 1]; None for m = 0.
    Parameters with v = 0 have no direction and are left out of all but Σ m². THEORY §9.
    """
    cross = squares = dual = 0.0
    for mean, second in zip(m, v, strict=True):
        mean, second = mean.double(), second.double()
        root = torch.where(second > 0, mean / second.sqrt(), 0.0)
        cross += float((mean * root).sum())
        squares += float(mean.square().sum())
        dual += float(root.square().sum())
    return cross**2 / (squares * dual) if squares * dual > 0 else None


def diagonal_fisher(m: Tensor, v: Tensor, *, bias1: float, bias2: float, batch_size: int | None) -> Tensor:
    """``B(v̂ − m̂²) + m̂²`` elementwise, or v̂ when ``batch_size`` is None, for raw averages m, v.

    ``bias1 = 1 − β₁ᵗ``, ``bias2 = 1 − β₂ᵗ`` (1 for averages already corrected). A negative variance estimate,
    possible because the two averages have different memories, counts as zero.
    """
    second = v / bias2
    if batch_size is None:
        return second
    square = (m / bias1).square()
    return (second - square).clamp(min=0) * batch_size + square


def step_scalars(
    theta0: Tensor,
    theta1: Tensor,
    m: Tensor,
    v: Tensor,
    *,
    bias1: float,
    bias2: float,
    batch_size: int | None = None,
    developed: Tensor | None = None,
) -> StepScalars:
    """The scalars (a, d, Δ) of the step δ = θ₁ − θ₀ in the metric of Adam's averages, for one parameter tensor.

    ``m``, ``v``: raw averages, with bias corrections as in `diagonal_fisher`. ``developed``: a tensor like theta0 that
    gains √F∘δ in place; over a run its norm D is the straight line beside the length ℒ = Σ√a, and D ≤ ℒ. CPU tensors.
    Relative error about 1e-7 (of Σ|m̂δ| for d): chunks in the tensors' precision, their sums in float64. One pass over
    memory in cached chunks; no allocation of the tensors' size. Additive over slices and tensors, and safe to call from
    several threads.
    """
    _check(theta0, theta1, m, v, developed, bias1, bias2, batch_size)
    dtype = torch.float64 if theta0.dtype == torch.float64 else torch.float32
    before, after, mean, second = (_flat(t) for t in (theta0, theta1, m, v))
    path = None if developed is None else _flat(developed)
    buffers = torch.empty(7, min(CHUNK, theta0.numel()), dtype=dtype)
    tiny = torch.finfo(dtype).tiny
    # F = scale · (max(v − signal·m², 0) + floor·m²): the fewest passes; scale and the biases are put in at the end.
    scale = (1.0 if batch_size is None else batch_size) / bias2
    signal, floor = bias2 / bias1**2, 1.0 / (scale * bias1**2)
    a = d = delta = null = 0.0
    for start in range(0, theta0.numel(), CHUNK):
        part = slice(start, min(start + CHUNK, theta0.numel()))
        size = part.stop - start
        x0, x1, mk, vk = (_chunk(t, part, buffers[i, :size]) for i, t in enumerate((before, after, mean, second)))
        root, step, work = buffers[4:, :size]
        if batch_size is None:
            torch.clamp(vk, min=tiny, out=root)
        else:
            torch.addcmul(vk, mk, mk, value=-signal, out=root).clamp_(min=tiny).addcmul_(mk, mk, value=floor)
        root.sqrt_()
        torch.sub(x1, x0, out=step)
        d -= torch.dot(mk, step).item()
        torch.mul(root, step, out=work)
        a += torch.dot(work, work).item()
        if path is not None:
            path[part].add_(work, alpha=scale**0.5)
        torch.div(mk, root, out=work)
        if batch_size is None and float(vk.min()) == 0:  # free motion; with B known F ≥ m̂², so there is none
            free = vk == 0
            work[free] = 0
            null -= torch.dot(mk[free], step[free]).item()
        delta += torch.dot(work, work).item()
    return StepScalars(a * scale, d / bias1, delta / (bias1**2 * scale), null / bias1)


def _flat(t: Tensor) -> Tensor:
    flat = t.detach()
    if not flat.is_contiguous():
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(-1)


def _chunk(t: Tensor, part: slice, buffer: Tensor) -> Tensor:
    """A chunk in the buffer's precision: a view where it has it already."""
    return t[part] if t.dtype == buffer.dtype else buffer.copy_(t[part])


def _check(
    theta0: Tensor,
    theta1: Tensor,
    m: Tensor,
    v: Tensor,
    developed: Tensor | None,
    bias1: float,
    bias2: float,
    batch_size: int | None,
) -> None:
    for name, t in (("theta1", theta1), ("m", m), ("v", v), ("developed", developed)):
        if t is not None and t.shape != theta0.shape:
            raise InputError(f"{name} has shape {tuple(t.shape)} but theta0 has {tuple(theta0.shape)}")
    if developed is not None and not (
        developed.is_contiguous()
        and developed.dtype == (torch.float64 if theta0.dtype == torch.float64 else torch.float32)
    ):
        raise InputError("developed must be a contiguous tensor of the step's precision, for it is updated in place")
    for name, bias in (("bias1", bias1), ("bias2", bias2)):
        if not 0 < bias <= 1:
            raise InputError(f"{name} must be 1 − βᵗ in (0, 1], got {bias!r}; at step 0 there are no averages yet")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size!r}")


class OptimizerStateMetric(DiagonalMetric):
    """``diag(B(v̂ − m̂²) + m̂²)`` or, with B unknown, ``diag(v̂)``; ``in_nats`` says which."""

    kind = "optimizer-state"

    def __init__(self, names: Sequence[str], diagonal: Sequence[Tensor], damping: float, in_nats: bool) -> None:
        super().__init__(names, diagonal, damping)
        self.in_nats = in_nats
        if not in_nats:
            self.notes.append("batch size unknown: the metric is known up to a factor, so a and Q are not in nats")

    def diagnostics(self) -> dict[str, Any]:
        return {**super().diagnostics(), "in_nats": self.in_nats}


def optimizer_state(
    model: nn.Module,
    batch: Any = None,
    *,
    optimizer: torch.optim.Optimizer,
    batch_size: int | None = None,
    damping: float = 0.0,
    likelihood: Any = None,
) -> OptimizerStateMetric:
    """The metric in the state of an Adam-like ``optimizer`` of ``model`` (``exp_avg``, ``exp_avg_sq``, ``step``); no
    data.

    ``batch``, ``likelihood``: unused, part of every kind's signature. ``batch_size``: B, examples a step; None: up
    to scale. Raises `InputError` for an optimizer without these averages, and before its first step.
    """
    names, diagonals = [], []
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        state = optimizer.state.get(p, {})
        if "exp_avg" not in state or "exp_avg_sq" not in state:
            raise InputError(
                f"the optimizer keeps no Adam averages for parameter {name!r}; "
                "give an Adam-like optimizer after its first step"
            )
        betas = groups[id(p)]["betas"]
        step = float(state["step"])
        names.append(name)
        diagonals.append(
            diagonal_fisher(
                state["exp_avg"].double(),
                state["exp_avg_sq"].double(),
                bias1=1 - betas[0] ** step,
                bias2=1 - betas[1] ** step,
                batch_size=batch_size,
            ).to(p.dtype)
        )
    if not names:
        raise InputError("the model has no trainable parameters (requires_grad is False everywhere)")
    return OptimizerStateMetric(names, diagonals, damping, batch_size is not None)
