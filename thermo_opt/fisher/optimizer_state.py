"""The metric an Adam-like optimizer carries in its own state, without data (THEORY §9).

Adam's bias-corrected averages are ``m̂ ≈ E[g_B]`` and ``v̂ ≈ E[g_B²]`` over minibatches of B examples. The
per-example variance is about ``B(v̂ − m̂²)``, so ``F ≈ diag(B(v̂ − m̂²) + m̂²)``. With B unknown the metric is
``diag(v̂)``: a metric up to scale, so alignment, straightness and steadiness mean the same and a, Q, ℒ, D are not in
nats.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.fisher.diagonal import DiagonalMetric

CHUNK = 32_768
"""Elements handled at a time by `step_scalars`: its few work arrays stay in the processor's second-level cache."""


class StepScalars(NamedTuple):
    """Sums over some parameters, in the metric F of the optimizer's state; add those of several tensors with `total`.

    ``a`` = Σ F δ², ``d`` = −Σ m̂ δ over all parameters, ``delta`` = Σ m̂²/F where F > 0, and ``null_decrease`` = the
    part of d where F = 0 (free motion, of which the bound d² ≤ aΔ does not speak). ``cross`` = Σ m̂²/√v̂,
    ``gradient`` = Σ m̂² and ``dual`` = Σ m̂²/v̂ give `adam_alignment`.
    """

    a: float
    d: float
    delta: float
    null_decrease: float
    cross: float
    gradient: float
    dual: float

    @property
    def adam_alignment(self) -> float | None:
        """Alignment of Adam's own direction m̂/√v̂ with the natural gradient of diag(v̂), ``(Σ m²/√v)² / (Σ m² · Σ
        m²/v)``.

        In [0, 1]; None for m = 0, and where the sums were not asked for.
        """
        scale = self.gradient * self.dual
        return self.cross**2 / scale if scale > 0 else None


def total(parts: Sequence[StepScalars]) -> StepScalars:
    """The scalars of all tensors together: plain sums."""
    return StepScalars(*(float(np.sum(column)) for column in zip(*parts, strict=True)))


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
    damping: float = 0.0,
    developed: Tensor | None = None,
    own: bool = True,
) -> StepScalars:
    """The scalars (a, d, Δ) of the step δ = θ₁ − θ₀ in F_λ = F + λI, for one parameter tensor, in one pass over its
    memory.

    ``m``, ``v``: Adam's raw averages at θ₀, with bias corrections as in `diagonal_fisher`. ``developed``: a tensor
    like theta0 that gains √F_λ∘δ in place; over a run its norm D is the straight line beside the length ℒ = Σ√a, and
    D ≤ ℒ. CPU tensors. Relative error about 1e-7 (of Σ|m̂δ| for d): chunks in the tensors' precision, their sums in
    float64. Cost: a few passes over cached chunks, about the time of streaming the five arrays from memory; no
    allocation of their size. Additive over slices and tensors, and safe to call from several threads.
    """
    _check(theta0, theta1, m, v, developed, bias1, bias2, batch_size)
    kind = np.float64 if theta0.dtype == torch.float64 else np.float32
    arrays = [_flat(t) for t in (theta0, theta1, m, v)]
    plain = batch_size is None and not damping
    path = None if developed is None else _flat(developed).numpy()
    buffers = np.empty((8, min(CHUNK, theta0.numel())), dtype=kind)
    scale = kind(1.0 / bias2 if batch_size is None else batch_size / bias2)
    mean_square = kind(0.0 if batch_size is None else (batch_size - 1) / bias1**2)
    square = kind(1.0 / bias1**2)
    a = d = null = over_f = over_v = over_root = squares = 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, theta0.numel(), CHUNK):
            stop = min(start + CHUNK, theta0.numel())
            size = stop - start
            before, after, mean, second = (_load(t, start, stop, buffers[i, :size]) for i, t in enumerate(arrays))
            root, step, work, extra = buffers[4:, :size]
            np.subtract(after, before, out=step)
            np.multiply(second, scale, out=root)
            if batch_size is not None:
                np.multiply(mean, mean, out=work)
                np.multiply(work, mean_square, out=extra)
                np.subtract(root, extra, out=root)
                np.multiply(work, square, out=work)
                np.maximum(root, work, out=root)
            if damping:
                root += kind(damping)
            np.sqrt(root, out=root)
            np.multiply(root, step, out=work)
            a += float(np.dot(work, work))
            if path is not None:
                path[start:stop] += work
            d -= float(np.dot(mean, step))
            norm, lost = _divide(mean, root, step, work)
            over_f += norm
            null -= lost
            squares += float(np.dot(mean, mean))
            if own and not plain:
                np.sqrt(second, out=root)
                norm, _ = _divide(mean, root, step, work)
            over_v += norm
            over_root += float(np.dot(mean, work))
    # Without B and λ the metric is v̂ itself; otherwise the second division was by the raw average v.
    corrected = 1.0 if plain else bias2
    return StepScalars(
        a=a,
        d=d / bias1,
        delta=over_f / bias1**2,
        null_decrease=null / bias1,
        cross=over_root * corrected**0.5 / bias1**2 if own or plain else math.nan,
        gradient=squares / bias1**2,
        dual=over_v * corrected / bias1**2 if own or plain else math.nan,
    )


def _divide(mean: np.ndarray, root: np.ndarray, step: np.ndarray, out: np.ndarray) -> tuple[float, float]:
    """``out`` = mean/root, 0 where root = 0; its squared norm, and Σ mean·step over those places."""
    np.divide(mean, root, out=out)
    norm = float(np.dot(out, out))
    if math.isfinite(norm):
        return norm, 0.0
    null = root == 0
    out[null] = 0
    return float(np.dot(out, out)), float(np.dot(mean[null], step[null]))


def _flat(t: Tensor) -> Tensor:
    flat = t.detach()
    if not flat.is_contiguous():
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(-1)


def _load(t: Tensor, start: int, stop: int, buffer: np.ndarray) -> np.ndarray:
    """A chunk as an array of the buffer's precision: a view where it has it already."""
    piece = t[start:stop]
    if piece.dtype in (torch.float32, torch.float64):
        array: np.ndarray = piece.numpy()
        if array.dtype == buffer.dtype:
            return array
    torch.from_numpy(buffer).copy_(piece)
    return buffer


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
    if developed is not None and not (developed.is_contiguous() and developed.dtype in (torch.float32, torch.float64)):
        raise InputError("developed must be a contiguous float32 or float64 tensor, for it is updated in place")
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
