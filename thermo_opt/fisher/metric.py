"""What every metric offers, and the arithmetic of lists of tensors (tangent vectors) they share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thermo_opt.errors import InputError

DENSE_LIMIT = 20_000
"""Most parameters for which a P × P matrix is formed (3.2 GB in float64)."""


class Bracket(NamedTuple):
    """An interval certain to hold a number, such as Δ_λ = gᵀ(F+λI)⁻¹g (§5).

    Attributes:
        lower: its lower end.
        upper: its upper end; may be infinite.
    """

    lower: float
    upper: float

    @property
    def relative_width(self) -> float:
        """(upper − lower)/upper: 0 for an exactly known number, 1 where lower is 0."""
        if self.upper == self.lower:
            return 0.0
        return 1.0 if math.isinf(self.upper) else (self.upper - self.lower) / self.upper


class Metric(ABC):
    """A Riemannian metric F_λ = F + λI on a model's trainable parameters, as an operator (§1, §3).

    Vectors v and g are lists of tensors aligned with the trainable parameters (``names``,
    ``shapes``), tied weights once. ``damping`` is λ and enters every method alike, so that
    alignments computed with one metric lie in [−1, 1]. ``notes`` says in sentences what was
    approximated or fell back.
    """

    kind: str = ""

    def __init__(self, names: Sequence[str], like: Sequence[Tensor], damping: float = 0.0) -> None:
        self.names = tuple(names)
        self.shapes = tuple(tuple(p.shape) for p in like)
        self.dtype = like[0].dtype
        self.device = like[0].device
        self.damping = check_damping(damping)
        self.notes: list[str] = []

    @property
    def size(self) -> int:
        """P, the number of trainable parameters."""
        return sum(math.prod(shape) for shape in self.shapes)

    @abstractmethod
    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """F_λ v."""

    def quadratic(self, v: Sequence[Tensor]) -> float:
        """vᵀF_λv, for a step δ its squared Fisher–Rao length a (nats); never negative."""
        v = self.vector(v)
        return max(dot(v, self.matvec(v)), 0.0)

    @abstractmethod
    def solve(self, g: Sequence[Tensor]) -> list[Tensor]:
        """F_λ⁻¹ g; with λ = 0 the spectral pseudo-inverse F⁺g (§7)."""

    def dual_norm(self, g: Sequence[Tensor]) -> Bracket:
        """A bracket of Δ_λ = gᵀF_λ⁻¹g, nats; one point where F is decomposed (§5)."""
        g = self.vector(g, "g")
        value = max(dot(g, self.solve(g)), 0.0)
        return Bracket(value, value)

    @abstractmethod
    def split(self, g: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """g as its range part and its null part P₀g, for F itself whatever the damping (§3, §7)."""

    @abstractmethod
    def diagnostics(self) -> dict[str, Any]:
        """``rank``, ``condition`` (σ_max over the least kept σ), ``trace`` of F; None where
        unknown, with ``reason``."""

    def dense(self) -> Tensor:
        """F_λ as a (P, P) float64 matrix, column by column; for P ≤ `DENSE_LIMIT`. Cost: P
        matvecs."""
        check_dense(self.size)
        columns = []
        for j in range(self.size):
            unit = torch.zeros(self.size, dtype=self.dtype, device=self.device)
            unit[j] = 1
            columns.append(flatten(self.matvec(unflatten(unit, self.shapes))).double())
        return torch.stack(columns, dim=1)

    def vector(self, v: Sequence[Tensor], name: str = "v", cast: bool = True) -> list[Tensor]:
        """``v`` checked against the parameters' shapes and brought to their device and, with
        ``cast``, their dtype."""
        v = list(v)
        if len(v) != len(self.shapes):
            raise InputError(
                f"{name} has {len(v)} tensors but the model has {len(self.shapes)} trainable "
                "parameters"
            )
        for tensor, shape, label in zip(v, self.shapes, self.names, strict=True):
            if tuple(tensor.shape) != shape:
                raise InputError(
                    f"{name} has shape {tuple(tensor.shape)} for parameter {label!r}; it must be "
                    f"{shape}"
                )
        return [t.detach().to(dtype=self.dtype if cast else t.dtype, device=self.device) for t in v]

    def zeros(self) -> list[Tensor]:
        """The zero vector."""
        return [torch.zeros(shape, dtype=self.dtype, device=self.device) for shape in self.shapes]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(kind={self.kind!r}, parameters={self.size}, "
            f"damping={self.damping:g})"
        )


def check_damping(damping: float) -> float:
    """λ as a float, refused when negative or not finite."""
    value = float(damping)
    if not (math.isfinite(value) and value >= 0):
        raise InputError(f"damping must be a finite number ≥ 0, got {damping!r}")
    return value


def check_dense(size: int) -> None:
    """Refuse to form a P × P matrix beyond `DENSE_LIMIT`."""
    if size > DENSE_LIMIT:
        raise InputError(
            f"a dense Fisher of {size} parameters needs {8e-9 * size**2:.0f} GB; use kind 'exact' "
            "or 'low-rank' instead"
        )


def dot(u: Sequence[Tensor], v: Sequence[Tensor]) -> float:
    """uᵀv over lists of tensors, accumulated in float64."""
    return math.fsum(
        float(torch.dot(a.reshape(-1).double(), b.reshape(-1).double()))
        for a, b in zip(u, v, strict=True)
    )


def norm(v: Sequence[Tensor]) -> float:
    """Euclidean norm of a list of tensors, accumulated in float64."""
    return math.sqrt(dot(v, v))


def axpy(alpha: float, x: Sequence[Tensor], y: Sequence[Tensor]) -> list[Tensor]:
    """αx + y as new tensors."""
    return [b + alpha * a for a, b in zip(x, y, strict=True)]


def flatten(v: Sequence[Tensor]) -> Tensor:
    """One vector (P,) from a list of tensors."""
    return torch.cat([t.reshape(-1) for t in v])


def unflatten(x: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """The list of tensors of these shapes that `flatten` would make into x (views of x)."""
    sizes = [math.prod(shape) for shape in shapes]
    return [part.view(tuple(shape)) for part, shape in zip(x.split(sizes), shapes, strict=True)]
