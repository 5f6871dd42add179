"""The exact Fisher as a matrix-free operator: F v = (1/n) Σ J_iᵀ Λ_i J_i v (theory §1).

Two ways to multiply by J, chosen by how often the same point is asked:

- *Forward mode*, no state kept: J v rides along one forward pass (2–4 forward passes in all), Jᵀu
  costs a forward and a backward pass. Used for the first quadratic forms and whenever the batch is
  split, so memory doesn't grow with n.
- *Linearised*: the graph of u ↦ Jᵀu is recorded once, and its own transpose gives J v (Jᵀu is
  linear in u, so its derivative in direction v is v ↦ J v). From then on neither product runs the
  model again: about two forward passes for J v, two for Jᵀu.

Forward mode needs no double-backward and vice versa, so each stands in for the other where a
model's operations lack one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError, first_line
from thermo_opt.fisher.decomposed import DecomposedMetric
from thermo_opt.fisher.krylov import Shifted, bracket, conjugate_gradient, preconditioned
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.low_rank import ENTRIES_LIMIT, decompose, row_count
from thermo_opt.fisher.metric import Bracket, Metric, axpy, dot, flatten, unflatten
from thermo_opt.fisher.predictor import Part, Predictor, materialise
from thermo_opt.fisher.scores import FisherType, score_rows
from thermo_opt.fisher.slopes import FixedSlopes

LINEARISE_AT = 3
"""The product, counted per metric, at which recording a linearisation (worth two products) starts
to pay."""

SPECTRUM_WORK = 2e10
"""Most operations that `diagnostics` spends on a decomposition (a few seconds)."""

Curvature = Literal["true", "empirical"]


class Preconditioner(Protocol):
    """What `JacobianMetric.dual_norm` asks of an approximate metric M = F̂+λI."""

    def inverse_root(self, v: Sequence[Tensor]) -> list[Tensor]:
        """M^{-1/2}v, symmetric in v."""

    def largest(self) -> float:
        """An upper bound of ‖M‖ (its largest eigenvalue, λ included)."""


class Linearization:
    """J and Jᵀ of one microbatch at fixed parameters, from one recorded graph. Memory: about that
    of two training steps."""

    def __init__(self, predictor: Predictor, part: Part) -> None:
        with FixedSlopes():
            outputs, self._leaves = predictor.graph(part)
        self._outputs = outputs
        self._u = torch.zeros_like(outputs, requires_grad=True)
        with torch.enable_grad(), predictor.evaluation():
            pulled = torch.autograd.grad(
                outputs, self._leaves, self._u, create_graph=True, allow_unused=True
            )
        self._used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self._pulled = [pulled[i] for i in self._used]
        self.outputs = outputs.detach()

    def jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v, shape of the outputs."""
        (out,) = torch.autograd.grad(
            self._pulled, self._u, [v[i] for i in self._used], retain_graph=True, allow_unused=True
        )
        return torch.zeros_like(self._u) if out is None else out.detach()

    def verified_jvp(self, v: Sequence[Tensor]) -> Tensor:
        """J v, having checked uᵀ(Jv) = (Jᵀu)ᵀv for a random u; `NotImplementedError` where that
        fails.

        A backward marked once-differentiable, or written outside autograd's sight, drops out of J v
        without an error.
        """
        out = self.jvp(v)
        u = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype).to(
            out.device
        )
        direct, adjoint = dot([u], [out]), dot(self.vjp(u), v)
        size = float(torch.linalg.vector_norm(u)) * float(torch.linalg.vector_norm(out))
        if abs(direct - adjoint) > torch.finfo(out.dtype).eps ** 0.5 * max(size, abs(adjoint)):
            raise NotImplementedError(
                "the backward pass of one of its operations can't be differentiated again"
            )
        return out

    def vjp(self, u: Tensor) -> list[Tensor]:
        """Jᵀu, one tensor a parameter."""
        gradients = torch.autograd.grad(
            self._outputs, self._leaves, u, retain_graph=True, allow_unused=True
        )
        return materialise(gradients, self._leaves)


class JacobianMetric(Metric):
    """Products with F = (1/n) Σ JᵀΛJ for the true Λ, or Λ = r rᵀ with the data's residual r
    (empirical Fisher)."""

    def __init__(
        self,
        predictor: Predictor,
        curvature: Curvature = "true",
        damping: float = 0.0,
        *,
        cache: bool = True,
    ) -> None:
        super().__init__(predictor.names, predictor.values, damping)
        if curvature == "empirical":
            predictor.require_targets("the empirical Fisher")
        self.kind = "exact" if curvature == "true" else "empirical"
        self.predictor, self.curvature = predictor, curvature
        self.notes = predictor.notes
        self._cacheable = cache
        self._cache = cache and len(predictor.parts) == 1
        self._dual: DecomposedMetric | None = None
        self._double: JacobianMetric | None = None
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
        """F_λ v. Cost: forward + backward + J v per microbatch; once linearised, about four forward
        passes in all."""
        v = self.vector(v)
        return axpy(self.damping, v, self._undamped(v)) if self.damping else self._undamped(v)

    def _undamped(self, v: Sequence[Tensor]) -> list[Tensor]:
        total = self.zeros()
        for part in self.predictor.parts:
            f, tangent = self.push(part, v)
            pulled = self.pull(part, self.output_product(part, f, tangent) / self.predictor.count)
            for t, p in zip(total, pulled, strict=True):
                t.add_(p)
        return total

    def push(self, part: Part, v: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(f, Jv) of one microbatch, linearised from the third product on where the batch is
        processed whole."""
        self._asked += 1
        if self._linear is None and self._cache and self._asked >= LINEARISE_AT:
            self._linearise(part, v)
        return (
            self._jvp(part, v)
            if self._linear is None
            else (self._linear.outputs, self._linear.jvp(v))
        )

    def pull(self, part: Part, u: Tensor) -> list[Tensor]:
        """Jᵀu of one microbatch."""
        return self.predictor.pull_back(part, u) if self._linear is None else self._linear.vjp(u)

    def quadratic(self, v: Sequence[Tensor]) -> float:
        """vᵀF_λv = mean (Jv)ᵀΛ(Jv) + λ|v|²: half the work of a matvec, never negative, summed in
        float64."""
        v = self.vector(v)
        total = 0.0
        for part in self.predictor.parts:
            f, tangent = self.push(part, v)
            total += dot([self.output_product(part, f, tangent)], [tangent])
        damped = self.damping * dot(v, v) if self.damping else 0.0
        return max(total / self.predictor.count, 0.0) + damped

    def _linearise(self, part: Part, v: Sequence[Tensor]) -> None:
        try:
            linear = Linearization(self.predictor, part)
            linear.verified_jvp(v)
            self._linear = linear
        except (NotImplementedError, RuntimeError) as error:
            if not _unsupported(error):
                raise
            self._cache = False
            self.predictor.note(
                f"no second derivative for this model ({first_line(error)}): forward mode used "
                "throughout"
            )

    def _jvp(self, part: Part, v: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if self._forward:
            try:
                return self.predictor.jvp(part, v)
            except (NotImplementedError, RuntimeError) as error:
                if not _unsupported(error):
                    raise
                self._forward = False
                self.predictor.note(
                    f"no forward-mode derivative for this model ({first_line(error)}): "
                    "double-backward used"
                )
        try:
            linear = Linearization(self.predictor, part)
            return linear.outputs, linear.verified_jvp(v)
        except (NotImplementedError, RuntimeError) as error:
            if not _unsupported(error):
                raise
            raise InputError(
                "the model can be differentiated neither in forward mode nor twice "
                f"({first_line(error)}); "
                "use kind 'low-rank' or 'kfac', which need one backward pass only"
            ) from error

    def solve(
        self, g: Sequence[Tensor], rtol: float = 1e-10, max_iterations: int = 10_000
    ) -> list[Tensor]:
        """F_λ⁻¹g by conjugate gradients in float64 to a certified relative error ``rtol`` (or what
        rounding allows: see ``notes``); with λ = 0, F⁺g through the score matrix, which raises
        `InputError` where that is too large."""
        if self.damping == 0:
            return self._decomposed("the pseudo-inverse").solve(g)
        precise = self.precise()
        x, error = conjugate_gradient(
            precise._flat_product,
            self._flat(g),
            self.damping,
            rtol=rtol,
            max_iterations=max_iterations,
        )
        if error > rtol:
            self.predictor.note(
                f"solve stopped at relative error ≤ {error:.1e} (asked for {rtol:.1e}); use more "
                "damping"
            )
        return unflatten(x.to(self.dtype), self.shapes)

    def dual_norm(
        self,
        g: Sequence[Tensor],
        rtol: float = 0.1,
        max_iterations: int = 100,
        preconditioner: Preconditioner | None = None,
    ) -> Bracket:
        """A certified bracket of gᵀF_λ⁻¹g of relative width ≤ ``rtol``, or the tightest in
        ``max_iterations`` products.

        Lanczos in float64 (theory §5, `thermo_opt.fisher.krylov`), whatever the model's dtype,
        because λ is often below float32's resolution of F. ``preconditioner``: a K-FAC or other
        metric M of the same damping, offering ``inverse_root`` and ``largest``; the bracket stays
        certified. With λ = 0: the point gᵀF⁺g through the score matrix.
        """
        if self.damping == 0:
            return self._decomposed("the undamped dual norm").dual_norm(g)
        precise, b = self.precise(), self._flat(g)
        problem = Shifted(precise._flat_product, self.damping, 1.0)
        if preconditioner is not None:
            approximate = preconditioner

            def root(x: Tensor) -> Tensor:
                return flatten(
                    [t.double() for t in approximate.inverse_root(unflatten(x, self.shapes))]
                )

            problem = preconditioned(
                precise._flat_product, self.damping, root, approximate.largest()
            )
            b = root(b)
        return bracket(
            problem.operator,
            b,
            problem.damping,
            rtol=rtol,
            max_iterations=max_iterations,
            roundoff=precise.roundoff,
            amplification=problem.amplification,
        )

    def split(self, g: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Range and null components through the score matrix; `InputError` where that is too
        large."""
        return self._decomposed("the null space").split(g)

    def diagnostics(self) -> dict[str, Any]:
        """``trace`` of F exactly, from the score rows; ``rank`` and ``condition`` where the score
        matrix is small enough."""
        rows = row_count(self.predictor, self._fisher_type)
        if self._dual is not None or rows * self.size * min(rows, self.size) <= SPECTRUM_WORK:
            return self._decomposed("the spectrum").diagnostics()
        blocks = score_rows(self.predictor, self._fisher_type)
        trace = sum(float(block.double().square().sum()) for block in blocks) / self.predictor.count
        return {
            "rank": None,
            "condition": None,
            "trace": trace,
            "reason": (
                "rank and condition need a decomposition; the score matrix is large "
                "for this batch (kind 'low-rank' does it)"
            ),
        }

    @property
    def _fisher_type(self) -> FisherType:
        return "type-2" if self.curvature == "true" else "empirical"

    def _small(self) -> bool:
        return row_count(self.predictor, self._fisher_type) * self.size <= ENTRIES_LIMIT

    def _decomposed(self, what: str) -> DecomposedMetric:
        if self._dual is None:
            if not self._small():
                raise InputError(
                    f"{what} of a matrix-free Fisher needs its score matrix, too large here "
                    f"({row_count(self.predictor, self._fisher_type)} × {self.size}); give "
                    f"damping > 0 "
                    "or a smaller batch"
                )
            self._dual = decompose(self.predictor, self.damping, self._fisher_type)
        return self._dual

    def precise(self) -> JacobianMetric:
        """This metric in float64 for many products, or itself where it already is or the model
        can't run in float64."""
        if self._double is None:
            self._double = self
            if self.dtype != torch.float64:
                double = JacobianMetric(
                    self.predictor.double(), self.curvature, self.damping, cache=self._cacheable
                )
                try:
                    double.matvec(self.zeros())
                    self._double = double
                except RuntimeError as error:
                    self.predictor.note(
                        f"the model doesn't run in float64 ({first_line(error)}): {self.dtype} "
                        "products used"
                    )
        self._double._asked = LINEARISE_AT  # a Krylov method is about to ask for many
        return self._double

    def _flat_product(self, x: Tensor) -> Tensor:
        """F x (without λ) on flat float64 vectors."""
        return flatten(self._undamped(unflatten(x.to(self.dtype), self.shapes))).double()

    def _flat(self, g: Sequence[Tensor]) -> Tensor:
        return flatten([t.double() for t in self.vector(g, "g", cast=False)])

    @property
    def roundoff(self) -> float:
        """Relative rounding of a product: the machine epsilon of its dtype."""
        return torch.finfo(self.dtype).eps


def _unsupported(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, NotImplementedError) or any(
        phrase in text
        for phrase in (
            "not implemented",
            "forward ad",
            "forward-mode",
            "does not support",
            "not supported",
            "differentiate twice",
        )
    )


def exact(
    model: nn.Module,
    batch: Any,
    *,
    likelihood: str | Likelihood = "categorical",
    damping: float = 0.0,
    cache: bool = True,
    **options: Any,
) -> JacobianMetric:
    """The exact true Fisher as a matrix-free operator, for any number of parameters.

    ``cache``: keep the linearisation of a batch that is processed whole (about the memory of two
    training steps), so that further products don't run the model. With ``microbatch`` < n nothing
    is kept and memory doesn't depend on n.
    """
    return JacobianMetric(
        Predictor(model, batch, likelihood, **options), "true", damping, cache=cache
    )
