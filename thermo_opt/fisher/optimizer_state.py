"""The metric an Adam-like optimizer carries in its own state, without data (theory §9).

Adam's bias-corrected averages are ``m̂ ≈ E[g_B]`` and ``v̂ ≈ E[g_B²]`` over minibatches of B
examples. The per-example variance is about ``B(v̂ − m̂²)``, so ``F ≈ diag(B(v̂ − m̂²) + m̂²)``.
With B unknown the metric is ``diag(v̂)``: a metric up to scale, so alignment, straightness and
steadiness mean the same and a, Q, ℒ, D are not in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.fisher.diagonal import DiagonalMetric

CHUNK = 65_536
"""Elements handled at a time: with its few work arrays a chunk stays in the processor's
second-level cache."""


class StepScalars(NamedTuple):
    """Sums over some parameters, in the metric F of the optimizer's state; add those of several
    tensors with `total`.

    ``a`` = Σ F δ², ``d`` = −Σ m̂ δ over all parameters, ``delta`` = Σ m̂²/F where F > 0, and
    ``null_decrease`` = the part of d where F = 0 (free motion, of which the bound d² ≤ aΔ does not
    speak).
    """

    a: float
    d: float
    delta: float
    null_decrease: float


def total(parts: Sequence[StepScalars]) -> StepScalars:
    """The scalars of all tensors together: plain sums."""
    return StepScalars(*(float(np.sum(column)) for column in zip(*parts, strict=True)))


def adam_alignment(m: Sequence[Tensor], v: Sequence[Tensor]) -> float | None:
    """Alignment of Adam's own direction m/√v with the natural gradient of diag(v): ``(Σ m²/√v)² /
    (Σ m² · Σ m²/v)``.

    ``m``, ``v``: lists of Adam's averages, raw or bias-corrected: the ratio is the same. In [0, 1];
    None for m = 0. Parameters with v = 0 have no direction and are left out of all but Σ m². theory
    §9.
    """
    cross = squares = dual = 0.0
    for mean, second in zip(m, v, strict=True):
        mean, second = mean.double(), second.double()
        root = torch.where(second > 0, mean / second.sqrt(), 0.0)
        cross += float((mean * root).sum())
        squares += float(mean.square().sum())
        dual += float(root.square().sum())
    return cross**2 / (squares * dual) if squares * dual > 0 else None


def diagonal_fisher(
    m: Tensor, v: Tensor, *, bias1: float, bias2: float, batch_size: int | None
) -> Tensor:
    """``B(v̂ − m̂²) + m̂²`` elementwise, or v̂ when ``batch_size`` is None, for raw averages m, v.

    ``bias1 = 1 − β₁ᵗ``, ``bias2 = 1 − β₂ᵗ`` (1 for averages already corrected). A negative variance
    estimate, possible because the two averages have different memories, counts as zero.
    """
    second = v / bias2
    if batch_size is None:
        return second
    square = (m / bias1).square()
    return (second - square).clamp(min=0) * batch_size + square


class Step(NamedTuple):
    """A step as `path_scalars` takes it: where it led and Adam's raw averages there, in pieces of
    `CHUNK` elements.

    ``pieces``: of (θ, m, v), flat and in order. ``bias1``, ``bias2``: as in `diagonal_fisher`.
    """

    pieces: Iterator[tuple[Tensor, Tensor, Tensor]]
    bias1: float
    bias2: float


def path_scalars(
    start: Iterator[Tensor],
    steps: Sequence[Step],
    *,
    batch_size: int | None = None,
    developed: Tensor | None = None,
) -> list[StepScalars]:
    """The scalars (a, d, Δ) of successive steps in the metric of Adam's averages, for one parameter
    tensor.

    ``start``: where the first step begins, in pieces as the steps'. ``developed``: a contiguous
    tensor of the step's precision that gains Σ √F∘δ in place; over a run its norm D is the straight
    line beside the length ℒ = Σ√a, and D ≤ ℒ. CPU tensors. Relative error about 1e-7 (of Σ|m̂δ| for
    d): chunks in the tensors' precision, their sums in float64. Each chunk is taken through all
    steps while it is in the processor's cache: one pass over the pieces, and one over ``developed``
    whatever the number of steps. No allocation of the tensor's size. Additive over slices and
    tensors, and safe to call from several threads.
    """
    for step in steps:
        _check_biases(step.bias1, step.bias2, batch_size)
    sums = [_Sums(step.bias1, step.bias2, batch_size) for step in steps]
    path = None if developed is None else developed.view(-1)
    buffers: Tensor | None = None
    done = 0
    for here in start:
        dtype, size = _precision(here), here.numel()
        if buffers is None:
            buffers = torch.empty(2, size, dtype=dtype)
        before = here.to(dtype)
        part = None if path is None else path[done : done + size]
        done += size
        for step, own in zip(steps, sums, strict=True):
            after, mean, second = (piece.to(dtype) for piece in next(step.pieces))
            own.add(before, after, mean, second, buffers[:, :size], part)
            before = after
    for step in steps:  # readers that verify what they hand out do so behind the last piece
        assert next(step.pieces, None) is None
    return [own.scalars() for own in sums]


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
    """`path_scalars` of the one step δ = θ₁ − θ₀, from whole tensors.

    ``m``, ``v``: raw averages, with bias corrections as in `diagonal_fisher`. ``developed`` gains
    √F∘δ in place.
    """
    _check_shapes(theta0, theta1, m, v, developed)
    start, *ends = (t.detach().reshape(-1).split(CHUNK) for t in (theta0, theta1, m, v))
    step = Step(zip(*ends, strict=True), bias1, bias2)
    return path_scalars(iter(start), [step], batch_size=batch_size, developed=developed)[0]


class _Sums:
    """One step's sums over chunks, in the fewest passes: what is the same for all elements is put
    in at the end."""

    def __init__(self, bias1: float, bias2: float, batch_size: int | None) -> None:
        # F = scale · (max(v − signal·m², 0) + floor·m²)
        self._known = batch_size is not None
        self._scale = (1.0 if batch_size is None else batch_size) / bias2
        self._signal, self._floor = bias2 / bias1**2, 1.0 / (self._scale * bias1**2)
        self._bias1 = bias1
        self._a = self._d = self._delta = self._null = 0.0

    def add(
        self, x0: Tensor, x1: Tensor, m: Tensor, v: Tensor, buffers: Tensor, path: Tensor | None
    ) -> None:
        """Count a chunk; ``path`` gains √F∘δ. ``buffers``: room for two chunks."""
        root, step = buffers
        tiny = torch.finfo(root.dtype).tiny
        if self._known:
            torch.addcmul(v, m, m, value=-self._signal, out=root)
            root.clamp_(min=tiny).addcmul_(m, m, value=self._floor)
        else:
            torch.clamp(v, min=tiny, out=root)
        root.sqrt_()
        torch.sub(x1, x0, out=step)
        self._d -= torch.dot(m, step).item()
        free = None
        if (
            not self._known and v.numel() and float(v.min()) == 0
        ):  # free motion; with B known F ≥ m̂², so there is none
            free = v == 0
            self._null -= torch.dot(m[free], step[free]).item()
        step.mul_(root)
        self._a += torch.dot(step, step).item()
        if path is not None:
            path.add_(step, alpha=self._scale**0.5)
        torch.div(m, root, out=root)
        if free is not None:
            root[free] = 0
        self._delta += torch.dot(root, root).item()

    def scalars(self) -> StepScalars:
        """The sums so far."""
        return StepScalars(
            self._a * self._scale,
            self._d / self._bias1,
            self._delta / (self._bias1**2 * self._scale),
            self._null / self._bias1,
        )


def _precision(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _check_shapes(
    theta0: Tensor, theta1: Tensor, m: Tensor, v: Tensor, developed: Tensor | None
) -> None:
    for name, t in (("theta1", theta1), ("m", m), ("v", v), ("developed", developed)):
        if t is not None and t.shape != theta0.shape:
            raise InputError(
                f"{name} has shape {tuple(t.shape)} but theta0 has {tuple(theta0.shape)}"
            )
    if developed is not None and not (
        developed.is_contiguous() and developed.dtype == _precision(theta0)
    ):
        raise InputError(
            "developed must be a contiguous tensor of the step's precision, for it is updated in "
            "place"
        )


def _check_biases(bias1: float, bias2: float, batch_size: int | None) -> None:
    for name, bias in (("bias1", bias1), ("bias2", bias2)):
        if not 0 < bias <= 1:
            raise InputError(
                f"{name} must be 1 − βᵗ in (0, 1], got {bias!r}; at step 0 there are no averages "
                "yet"
            )
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size!r}")


class OptimizerStateMetric(DiagonalMetric):
    """``diag(B(v̂ − m̂²) + m̂²)`` or, with B unknown, ``diag(v̂)``; ``in_nats`` says which."""

    kind = "optimizer-state"

    def __init__(
        self, names: Sequence[str], diagonal: Sequence[Tensor], damping: float, in_nats: bool
    ) -> None:
        super().__init__(names, diagonal, damping)
        self.in_nats = in_nats
        if not in_nats:
            self.notes.append(
                "batch size unknown: the metric is known up to a factor, so a and Q are not in nats"
            )

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
    """The metric in the state of an Adam-like ``optimizer`` of ``model`` (``exp_avg``,
    ``exp_avg_sq``, ``step``); no data.

    ``batch``, ``likelihood``: unused, part of every kind's signature. ``batch_size``: B, examples a
    step; None: up to scale. Raises `InputError` for an optimizer without these averages, and before
    its first step.
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
        raise InputError(
            "the model has no trainable parameters (requires_grad is False everywhere)"
        )
    return OptimizerStateMetric(names, diagonals, damping, batch_size is not None)
