"""The exact Fisher as a matrix-free operator: F v = (1/n) Σ J_iᵀ Λ_i J_i v (THEORY §1).

Two ways to multiply by J, chosen by how often the same point is asked:

- *Forward mode*, no state kept: J v rides along one forward pass (2–4 forward passes in all), Jᵀu costs a forward and a
  backward pass. Used for the first quadratic forms and whenever the batch is split, so memory doesn't grow with n.
- *Linearised*: the graph of u ↦ Jᵀu is recorded once, and its own transpose gives J v (Jᵀu is linear in u, so its derivative
  in direction v is v ↦ J v). From then on neither product runs the model again: about two forward passes for J v, two for Jᵀu.

Forward mode needs no double-backward and vice versa, so each stands in for the other where a model's operations lack one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.fisher.metric import Metric, dot
from thermo_opt.fisher.predictor import Part, Predictor, materialise

Curvature = Literal["true", "empirical"]


class Linearization:
    """J and Jᵀ of one microbatch at fixed parameters, from one recorded graph. Memory: about that of two training steps."""

    def __init__(self, predictor: Predictor, part: Part) -> None:
        outputs, self._leaves = predictor.graph(part)
        self._outputs = outputs
        self._u = torch.zeros_like(outputs, requires_grad=True)
        with torch.enable_grad(), predictor.evaluation():
            pulled = torch.autograd.grad(outputs, self._leaves, self._u, create_graph=True, allow_unused=True)
        self._used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self._pulled = [pulled[i] for i in self._used]
        self.outputs = outputs.detach()

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v, shape of the outputs."""
        (out,) = torch.autograd.grad(
            self._pulled, self._u, [v[i] for i in self._used], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self._u) if out is None else out.detach()

    def vjp(self, u: Tensor) -> list[Tensor]:
        """Jᵀu, one tensor a parameter."""
        gradients = torch.autograd.grad(self._outputs, self._leaves, u, retain_graph=True, allow_unused=True)
        return materialise(gradients, self._leaves)


class JacobianMetric(Metric):
    """Products with F = (1/n) Σ JᵀΛJ for the true Λ, or Λ = r rᵀ with the data's residual r (empirical Fisher)."""

    def __init__(
        self, predictor: Predictor, curvature: Curvature = "true", damping: float = 0.0, cache: bool = True
    ) -> None:
        super().__init__(predictor.names, predictor.values, damping)
        if curvature == "empirical":
            predictor.require_targets("the empirical Fisher")
        self.predictor, self.curvature = predictor, curvature
        self.notes = predictor.notes
        self._cache = cache and len(predictor.parts) == 1
        self._linear: Linearization | None = None
        self._forward = True  # until an operation without forward-mode derivative is met
        self._asked = 0

    def output_product(self, part: Part, f: Tensor, u: Tensor) -> Tensor:
        """Λu per prediction, zero where not counted (not divided by n)."""
        if self.curvature == "empirical":
            assert part.targets is not None
            r = self.predictor.likelihood.residual(f, part.targets)
            return r * (r * u).sum(-1, keepdim=True)
        out = self.predictor.likelihood.product(f, u)
        return out if part.mask is None else out * part.mask.unsqueeze(-1)

    def matvec(self, v: Sequence[Tensor]) -> list[Tensor]:
        """F_λ v. Cost: forward + backward + J v per microbatch; once linearised, about four forward passes in all."""
        v = self.vector(v)
        total = [self.damping * t for t in v]
        for part in self.predictor.parts:
            linear = self._linearization(part, reuse=True)
            if linear is not None:
                f, tangent = linear.outputs, linear.jvp(v)
            else:
                f, tangent = self._jvp(part, v)
            u = self.output_product(part, f, tangent) / self.predictor.count
            pulled = linear.vjp(u) if linear is not None else self.predictor.pull_back(part, u)
            for t, p in zip(total, pulled, strict=True):
                t.add_(p)
        return total

    def quadratic(self, v: Sequence[Tensor]) -> float:
        """vᵀF_λv = mean (Jv)ᵀΛ(Jv) + λ|v|²: half the work of a matvec, never negative, summed in float64."""
        v = self.vector(v)
        self._asked += 1
        total = 0.0
        for part in self.predictor.parts:
            linear = self._linearization(part, reuse=self._asked > 2)
            f, tangent = (linear.outputs, linear.jvp(v)) if linear is not None else self._jvp(part, v)
            total += float((self.output_product(part, f, tangent).double() * tangent.double()).sum())
        return max(total / self.predictor.count, 0.0) + self.damping * dot(v, v)

    def _linearization(self, part: Part, reuse: bool) -> Linearization | None:
        if self._linear is None and self._cache and reuse:
            try:
                self._linear = Linearization(self.predictor, part)
            except (NotImplementedError, RuntimeError) as error:
                if not _unsupported(error):
                    raise
                self._cache = False
                self._note(f"no second derivative for this model ({_first_line(error)}): forward mode used throughout")
        return self._linear

    def _jvp(self, part: Part, v: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if self._forward:
            try:
                return self.predictor.jvp(part, v)
            except (NotImplementedError, RuntimeError) as error:
                if not _unsupported(error):
                    raise
                self._forward = False
                self._note(f"no forward-mode derivative for this model ({_first_line(error)}): double-backward used")
        try:
            linear = Linearization(self.predictor, part)
            return linear.outputs, linear.jvp(v)
        except (NotImplementedError, RuntimeError) as error:
            if not _unsupported(error):
                raise
            raise InputError(
                f"the model can be differentiated neither in forward mode nor twice ({_first_line(error)}); "
                "use kind 'low-rank' or 'kfac', which need one backward pass only"
            ) from error

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, stacklevel=4)

    def solve(self, g: Sequence[Tensor]) -> list[Tensor]:
        raise InputError("")

    def split(self, g: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        raise InputError("")

    def diagnostics(self) -> dict[str, Any]:
        raise InputError("")


def _unsupported(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(
        phrase in text
        for phrase in (
            "not implemented",
            "forward ad",
            "forward-mode",
            "does not support",
            "once_differentiable",
            "not supported",
        )
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]


def exact(model: Any, batch: Any, *, likelihood: Any = "categorical", damping: float = 0.0, **options: Any) -> Any:
    return JacobianMetric(Predictor(model, batch, likelihood, **options), "true", damping)
