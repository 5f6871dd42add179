"""A model at fixed parameter values on one batch: outputs, loss, gradient, and the checks every
metric needs.

The model is called functionally (its own parameters are never written to), with every module in
evaluation mode for the duration of the call, because Dropout and training-mode BatchNorm don't
define one predictive distribution per example.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from thermo_opt.errors import InputError
from thermo_opt.fisher.fused import FusedTangents
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.likelihoods import likelihood as named_likelihood
from thermo_opt.models import (
    STOCHASTIC,
    arguments_of,
    evaluated,
    example_count,
    is_batched,
    map_tensors,
    outputs_of,
    slice_inputs,
    tensors_in,
)


@dataclass(frozen=True)
class Batch:
    """Model inputs (a tensor, a tuple of tensors or a mapping of tensors, examples along dimension
    0) and targets, if known."""

    inputs: Any
    targets: Tensor | None = None

    @staticmethod
    def of(batch: Any) -> Batch:
        """A `Batch` from a `Batch`, a pair (inputs, targets), or bare inputs (tensor or
        mapping)."""
        if isinstance(batch, Batch):
            return batch
        if isinstance(batch, tuple | list) and len(batch) == 2:
            inputs, targets = batch
            if targets is not None and not isinstance(targets, Tensor):
                raise InputError(
                    f"the batch's targets must be a tensor, got {type(targets).__name__}"
                )
            return Batch(inputs, targets)
        if isinstance(batch, Tensor | Mapping):
            return Batch(batch)
        raise InputError(
            "batch must be (inputs, targets), a tensor, a mapping of tensors or "
            "thermo_opt.fisher.Batch"
        )


@dataclass(frozen=True)
class Part:
    """A microbatch: its inputs, its targets in the likelihood's form (or None) and which
    predictions count (None: all)."""

    inputs: Any
    targets: Tensor | None
    mask: Tensor | None


class Predictor:
    """f_θ on a batch under a likelihood.

    ``parameters``: None for the model's present values, or a mapping name → tensor that overrides
    some of its parameters and buffers (recorded weights; no model is copied). Values are copied, so
    later training doesn't move the metric. ``copied``: False leaves that out, for a predictor that
    is used up before anything else happens to the model. ``microbatch``: most examples processed at
    once (None: the whole batch). ``count`` is n, the number of counted predictions.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        likelihood: str | Likelihood = "categorical",
        *,
        parameters: Mapping[str, Tensor] | None = None,
        sigma2: float | None = None,
        microbatch: int | None = None,
        copied: bool = True,
    ) -> None:
        self.model = model
        self.likelihood = named_likelihood(likelihood, sigma2)
        self.notes: list[str] = []
        state, self.modules, self._tied = _state(model)
        trainable = {
            name: p for name, p in state.items() if p.requires_grad and isinstance(p, nn.Parameter)
        }
        if not trainable:
            raise InputError(
                "the model has no trainable parameters (requires_grad is False everywhere)"
            )
        given = dict(parameters or {})
        for name, value in given.items():
            if name not in state:
                raise InputError(f"parameters: the model has no parameter or buffer {name!r}")
            if value.shape != state[name].shape:
                raise InputError(
                    f"parameters: {name!r} has shape {tuple(value.shape)}; the model's is "
                    f"{tuple(state[name].shape)}"
                )
        self.names = tuple(trainable)
        # The model's own parameters and their versions, while these are the values asked for.
        self._own = None if given else [(p, p._version) for p in trainable.values()]
        self.values = [_value(given.pop(name, p), p, copied) for name, p in trainable.items()]
        self._fixed = {name: _value(value, state[name], copied) for name, value in given.items()}
        self.device, self.dtype = self.values[0].device, self.values[0].dtype

        self.batch = map_batch(Batch.of(batch), lambda t: t.to(self.device))
        self.examples = example_count(self.batch.inputs)
        if microbatch is not None and microbatch < 1:
            raise InputError(f"microbatch must be at least 1, got {microbatch}")
        self.microbatch = min(microbatch or self.examples, self.examples)
        frozen = sorted(
            {type(m).__name__ for _, m in self.modules if isinstance(m, STOCHASTIC) and m.training}
        )
        if frozen:
            self.note(
                f"{', '.join(frozen)} evaluated in evaluation mode; the model's own mode is left "
                "as it was"
            )
        self.vmappable = True  # until the model is found not to be
        self._parts: list[Part] | None = None
        self._count = 0

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes of the trainable parameters."""
        return [tuple(p.shape) for p in self.values]

    @property
    def parts(self) -> list[Part]:
        """The microbatches, checked against the likelihood on first use (one forward pass without
        gradients)."""
        if self._parts is None:
            self._parts = list(self._checked())
        return self._parts

    def graphs(self, once: bool = False) -> Iterator[tuple[Part, Tensor, list[Tensor]]]:
        """(part, f, leaves) of every microbatch in turn, as `graph` gives them; on first use that
        pass checks the batch too."""
        if self._parts is not None:
            for part in self._parts:
                yield part, *self.graph(part, once)
            return
        parts, count = [], 0
        for start in range(0, self.examples, self.microbatch):
            inputs = slice_inputs(self.batch.inputs, start, start + self.microbatch, self.examples)
            f, leaves = self.graph(Part(inputs, None, None), once)
            parts.append(self._check(start, inputs, f.detach()))
            count += _counted(parts[-1], f)
            yield parts[-1], f, leaves
        self._parts, self._count = parts, count

    def _checked(self) -> Iterator[Part]:
        count = 0
        for start in range(0, self.examples, self.microbatch):
            inputs = slice_inputs(self.batch.inputs, start, start + self.microbatch, self.examples)
            with torch.no_grad(), self.evaluation():
                f = self.call(self.values, inputs)
            part = self._check(start, inputs, f)
            count += _counted(part, f)
            yield part
        self._count = count

    def _check(self, start: int, inputs: Any, f: Tensor) -> Part:
        if f.shape[0] != min(self.microbatch, self.examples - start):
            raise InputError(
                f"the model's outputs have {f.shape[0]} rows for "
                f"{min(self.microbatch, self.examples - start)} examples; "
                "the first dimension of inputs and outputs must be the examples"
            )
        # A finite sum has finite terms; one that isn't may have overflowed.
        if not math.isfinite(float(f.sum())) and not bool(torch.isfinite(f).all()):
            raise InputError(self._blame(inputs))
        if start == 0:
            self.likelihood.refuse_probabilities(f)
        y, mask = self.batch.targets, None
        if y is not None:
            if y.shape[:1] != (self.examples,):
                raise InputError(
                    f"the batch has {self.examples} inputs but targets of shape {tuple(y.shape)}"
                )
            y = self.likelihood.targets(f, y[start : start + self.microbatch])
            mask = self.likelihood.mask(y)
        return Part(inputs, y, mask)

    @property
    def count(self) -> int:
        """n, the number of counted predictions (positions of sequences; not those with an ignored
        target)."""
        return self._count if self.parts else 0

    def note(self, text: str) -> None:
        """Remember, and warn of once, something approximated or fallen back on."""
        if text not in self.notes:
            self.notes.append(text)
            warnings.warn(text, stacklevel=3)

    def double(self) -> Predictor:
        """The same predictor with parameters, buffers, inputs and continuous targets in float64."""

        def widen(t: Tensor) -> Tensor:
            return t.double() if t.is_floating_point() else t

        parts = self.parts  # before the copy: finding them counts the predictions
        twin = copy.copy(self)
        state = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        rest = {
            name: t.detach() for name, t in state.items() if name not in self.names
        } | self._fixed
        twin._fixed = {name: widen(t) for name, t in rest.items()}
        twin.values, twin.dtype, twin._own = [v.double() for v in self.values], torch.float64, None
        twin.batch = map_batch(self.batch, widen)
        twin._parts = [
            Part(
                map_tensors(p.inputs, widen),
                None if p.targets is None else widen(p.targets),
                p.mask,
            )
            for p in parts
        ]
        return twin

    def subset(self, examples: Tensor) -> Predictor:
        """The same predictor on some of the batch's examples (their numbers, ascending), as many
        microbatches as they touch."""
        parts = self.parts
        twin = copy.copy(self)
        twin._parts, start = [], 0
        for part in parts:
            size = min(self.microbatch, self.examples - start)
            chosen = examples[(examples >= start) & (examples < start + size)] - start
            start += size
            if chosen.numel():

                def pick(t: Tensor, chosen: Tensor = chosen, size: int = size) -> Tensor:
                    return t[chosen] if is_batched(t, size) else t

                targets, mask = (
                    None if t is None else t[chosen] for t in (part.targets, part.mask)
                )
                twin._parts.append(Part(map_tensors(part.inputs, pick), targets, mask))
        twin.examples = int(examples.numel())
        return twin

    def evaluation(self, once: bool = False) -> AbstractContextManager[None]:
        """`models.evaluated` of all modules; ``once``: backwards, once, is all that follows."""
        return evaluated([module for _, module in self.modules], fused=once)

    def call(self, values: Sequence[Tensor], inputs: Any) -> Tensor:
        """f (…, c) at these parameter values; to be used inside `evaluation`."""
        args, kwargs = arguments_of(inputs)
        state = dict(zip(self.names, values, strict=True)) | self._fixed
        return self._read(functional_call(self.model, state, args, kwargs, tie_weights=self._tied))

    def _read(self, returned: Any) -> Tensor:
        return self.likelihood.outputs(outputs_of(returned), self.batch.targets)

    def jvp(self, part: Part, v: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """(f, Jv) by forward-mode differentiation, about 2–3 forward passes, no graph kept."""
        with torch.no_grad(), self.evaluation(), forward_ad.dual_level(), FusedTangents():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(self.values, v, strict=True)]
            f, tangent = forward_ad.unpack_dual(self.call(duals, part.inputs))
        return f, torch.zeros_like(f) if tangent is None else tangent

    def graph(self, part: Part, once: bool = False) -> tuple[Tensor, list[Tensor]]:
        """(f, leaves): outputs with the autograd graph back to fresh leaves at the parameter
        values.

        ``once``: for plain backward passes only, which lets attention use its fused kernels.
        """
        if (
            once
            and self._own is not None
            and all(p._version == version for p, version in self._own)
        ):
            # The model as it is: nothing to substitute, and nobody adds to the parameters' grad.
            leaves: list[Tensor] = [p for p, _ in self._own]
            args, kwargs = arguments_of(part.inputs)
            with torch.enable_grad(), self.evaluation(once):
                f = self._read(self.model(*args, **kwargs))
        else:
            leaves = [p.detach().requires_grad_() for p in self.values]
            with torch.enable_grad(), self.evaluation(once):
                f = self.call(leaves, part.inputs)
        if not f.requires_grad:
            raise InputError(
                "the model's outputs don't depend on its trainable parameters through autograd"
            )
        return f, leaves

    def pull_back(self, part: Part, u: Tensor) -> list[Tensor]:
        """Jᵀu by one forward and one backward pass."""
        f, leaves = self.graph(part)
        return materialise(torch.autograd.grad(f, leaves, u, allow_unused=True), self.values)

    def require_targets(self, why: str) -> None:
        """Raise `InputError` unless the batch has targets."""
        if self.batch.targets is None:
            raise InputError(f"{why} needs targets: give the batch as (inputs, targets)")

    def loss(self) -> float:
        """L(θ), mean negative log-likelihood per counted prediction (nats)."""
        self.require_targets("the loss")
        total = 0.0
        for part in self.parts:
            assert part.targets is not None
            with torch.no_grad(), self.evaluation():
                total += float(
                    self.likelihood.nll(self.call(self.values, part.inputs), part.targets)
                    .double()
                    .sum()
                )
        return total / self.count

    def loss_and_gradient(self) -> tuple[float, list[Tensor]]:
        """(L, g = ∇L) with respect to the trainable parameters, one forward and one backward pass
        per microbatch."""
        self.require_targets("the gradient")
        total, gradient = 0.0, [torch.zeros_like(p) for p in self.values]
        for part in self.parts:
            assert part.targets is not None
            f, leaves = self.graph(part)
            nll = self.likelihood.nll(f, part.targets)
            total += float(nll.detach().double().sum())
            for g, extra in zip(
                gradient, torch.autograd.grad(nll.sum(), leaves, allow_unused=True), strict=True
            ):
                if extra is not None:
                    g.add_(extra, alpha=1.0 / self.count)
        return total / self.count, gradient

    def outputs(self) -> Tensor:
        """f on the whole batch, without gradients."""
        chunks = []
        for part in self.parts:
            with torch.no_grad(), self.evaluation():
                chunks.append(self.call(self.values, part.inputs))
        return torch.cat(chunks)

    def mean(self, per_prediction: Sequence[Tensor]) -> float:
        """Mean over counted predictions of one tensor a microbatch (leading shapes), summed in
        float64."""
        total = 0.0
        for part, values in zip(self.parts, per_prediction, strict=True):
            kept = values.double() if part.mask is None else values.double()[part.mask]
            total += float(kept.sum())
        return total / self.count

    def _blame(self, inputs: Any) -> str:
        for name, value in zip(self.names, self.values, strict=True):
            if not bool(torch.isfinite(value).all()):
                return (
                    f"parameter {name!r} holds NaN or infinity; audit an earlier "
                    "snapshot or lower the learning rate"
                )
        if not all(
            bool(torch.isfinite(t).all()) for t in tensors_in(inputs) if t.is_floating_point()
        ):
            return "the batch's inputs hold NaN or infinity; remove those examples"
        found: list[str] = []

        def look(name: str) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                bad = any(
                    t.is_floating_point() and not bool(torch.isfinite(t).all())
                    for t in tensors_in(output)
                )
                if bad and not found:
                    found.append(f"{name or 'the model itself'!s} ({type(module).__name__})")

            return hook

        handles = [module.register_forward_hook(look(name)) for name, module in self.modules]
        try:
            with torch.no_grad(), self.evaluation():
                self.call(self.values, inputs)
        finally:
            for handle in handles:
                handle.remove()
        where = found[0] if found else "the outputs"
        return (
            f"non-finite activations first appear in module {where}; check the weights "
            "and the scale of the inputs"
        )


def _counted(part: Part, f: Tensor) -> int:
    return f.shape[:-1].numel() if part.mask is None else int(part.mask.sum())


def materialise(gradients: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with zeros where a parameter was not used."""
    return [torch.zeros_like(p) if g is None else g for g, p in zip(gradients, like, strict=True)]


def gradient(
    model: nn.Module, batch: Any, likelihood: str | Likelihood = "categorical", **options: Any
) -> list[Tensor]:
    """g = ∇L on the batch, aligned with the trainable parameters (§2).

    Args:
        model: the module.
        batch: ``(inputs, targets)``.
        likelihood: the family of output distributions, by name or as an object.
        **options: those of `Predictor`.
    """
    return Predictor(model, batch, likelihood, **options).loss_and_gradient()[1]


def loss(
    model: nn.Module, batch: Any, likelihood: str | Likelihood = "categorical", **options: Any
) -> float:
    """L on the batch, nats per prediction (§1).

    Args:
        model: the module.
        batch: ``(inputs, targets)``.
        likelihood: the family of output distributions, by name or as an object.
        **options: those of `Predictor`.
    """
    return Predictor(model, batch, likelihood, **options).loss()


def kl(
    model: nn.Module,
    batch: Any,
    parameters: Mapping[str, Tensor] | None,
    other: Mapping[str, Tensor] | None,
    likelihood: str | Likelihood = "categorical",
    **options: Any,
) -> float:
    """Mean over the batch of KL(p_θ ‖ p_θ'), nats; to second order ½(θ'−θ)ᵀF(θ)(θ'−θ) (§1).

    Args:
        model: the module.
        batch: ``(inputs, targets)`` or inputs alone. Cost: two forward passes.
        parameters: θ by name; None: the model's own.
        other: θ' by name; None: the model's own.
        likelihood: the family of output distributions, by name or as an object.
        **options: those of `Predictor`.
    """
    first = Predictor(model, batch, likelihood, parameters=parameters, **options)
    second = Predictor(model, batch, first.likelihood, parameters=other, **options)
    divergences = []
    for part in first.parts:
        with torch.no_grad(), first.evaluation():
            f = first.call(first.values, part.inputs)
            divergences.append(first.likelihood.kl(f, second.call(second.values, part.inputs)))
    return max(first.mean(divergences), 0.0)


def _state(model: nn.Module) -> tuple[dict[str, Tensor], list[tuple[str, nn.Module]], bool]:
    """Parameters and buffers by name, each once; the modules; whether some tensors stand in several
    places. One walk."""
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    modules = []
    tied = False
    for prefix, module in model.named_modules():
        modules.append((prefix, module))
        for kept in (module._parameters, module._buffers):
            for name, t in kept.items():
                if t is None:
                    continue
                if id(t) in seen:
                    tied = True
                    continue
                seen.add(id(t))
                state[f"{prefix}.{name}" if prefix else name] = t
    return state, modules, tied


def _value(value: Tensor, like: Tensor, copied: bool) -> Tensor:
    same = value is like and not copied
    return (
        value.detach()
        if same
        else value.detach().to(dtype=like.dtype, device=like.device, copy=copied)
    )


def map_batch(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with every tensor replaced."""
    targets = None if batch.targets is None else function(batch.targets)
    return Batch(map_tensors(batch.inputs, function), targets)
