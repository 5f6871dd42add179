"""Layer rules: how a module's parameters see its input and the gradient at its output.

A Kronecker rule turns a module's input x and output gradient g into factor samples, per example and
shared position: for a weight matrix W (out × in, bias as a last input column) the gradient of one
example is ``Σ_r g_r a_rᵀ`` over the r positions that share W (time steps, pixels). A scale rule
gives the per-example gradients of a normalisation layer's scale and shift. The table `RULES` maps
module types to rules; `register` extends it.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KfacApprox = str
"""Weight sharing: "expand" (every position counts as an example) or "reduce" (positions are summed
first)."""
KFAC_APPROXIMATIONS = ("expand", "reduce")

Module = Any
"""A ``torch.nn.Module`` whose own attributes (``weight``, ``stride``, …) the rule reads by name."""


class Rule:
    """What every rule knows: which of a module's own parameters it covers, in the order weight,
    bias."""

    names: tuple[str, ...] = ("weight", "bias")

    def parameters(self, module: Module) -> list[tuple[str, nn.Parameter]]:
        """The covered parameters that require grad, as (local name, parameter)."""
        own = module._parameters
        return [(k, p) for k in self.names if (p := own.get(k)) is not None and p.requires_grad]

    def own(self, role: str) -> str:
        """The module's name of the parameter in the role "weight" or "bias"."""
        return role

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any], module: Module) -> Tensor | None:
        """The input x of a call; None for a call that the rule can't follow."""
        found = args[0] if args else next(iter(kwargs.values()), None)
        return found if isinstance(found, Tensor) else None

    def covers(self, module: Module, role: str) -> bool:
        """Whether the module's "weight" or "bias" is present, trainable, and the rule's."""
        name = self.own(role)
        p = module._parameters.get(name)
        return name in self.names and p is not None and p.requires_grad


class KroneckerRule(Rule):
    """Rule of a module that is linear in a matrix: factor samples, and parameters ↔ matrix.

    Matrices are ``(out, in)``, or ``(groups, out, in)`` for grouped convolutions; a trainable bias
    is the last input column.
    """

    one_hot: bool = False
    """True when the inputs are indices, so that A is the diagonal of token frequencies."""

    @abstractmethod
    def inputs(self, module: Module, x: Tensor) -> Tensor:
        """Input samples (…, n, r, in) without the bias column; for a one-hot rule the indices (n,
        r)."""

    def mean_inputs(self, module: Module, x: Tensor) -> Tensor:
        """Mean over the shared positions, (…, n, 1, in): the reduce setting's samples, without
        making all of `inputs`."""
        return self.inputs(module, x).mean(-2, keepdim=True)

    @abstractmethod
    def gradients(self, module: Module, x: Tensor, g: Tensor) -> Tensor:
        """Output-gradient samples (…, n, r, out), in the order of `inputs`."""

    @abstractmethod
    def weight_matrix(self, module: Module, weight: Tensor) -> Tensor:
        """The weight as a matrix (…, out, in)."""

    @abstractmethod
    def weight_tensor(self, module: Module, matrix: Tensor) -> Tensor:
        """The inverse of `weight_matrix`."""

    @abstractmethod
    def shape(self, module: Module) -> tuple[int, int, int]:
        """(groups, out, in), a trainable bias column counted in; with groups = 1 matrices have no
        group axis."""

    def to_matrix(self, module: Module, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors aligned with `parameters(module)` as one matrix (…, out, in[+1]): a view where
        there is no bias."""
        parts = []
        rest = list(tensors)
        if self.covers(module, "weight"):
            parts.append(self.weight_matrix(module, rest.pop(0)))
        if self.covers(module, "bias"):
            bias = rest.pop(0)
            if parts:
                lead: tuple[int, ...] = parts[0].shape[:-1]
            else:
                groups, out, _ = self.shape(module)
                lead = (groups, out) if groups > 1 else (out,)
            parts.append(bias.reshape(*lead, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def from_matrix(self, module: Module, matrix: Tensor) -> list[Tensor]:
        """The inverse of `to_matrix` (views of ``matrix`` where the layout allows)."""
        out = []
        bias = self.covers(module, "bias")
        if self.covers(module, "weight"):
            out.append(self.weight_tensor(module, matrix[..., :-1] if bias else matrix))
        if bias:
            out.append(matrix[..., -1].reshape(-1))
        return out


class LinearRule(KroneckerRule):
    """``torch.nn.Linear``: any leading dimensions; the first is the example, the others share the
    weight."""

    def inputs(self, module: Module, x: Tensor) -> Tensor:
        return _positions(x, x.shape[-1])

    def gradients(self, module: Module, x: Tensor, g: Tensor) -> Tensor:
        return _positions(g, g.shape[-1])

    def weight_matrix(self, module: Module, weight: Tensor) -> Tensor:
        return weight

    def weight_tensor(self, module: Module, matrix: Tensor) -> Tensor:
        return matrix

    def shape(self, module: Module) -> tuple[int, int, int]:
        out, inputs = self.weight_matrix(module, module.weight).shape
        return 1, out, inputs * self.covers(module, "weight") + self.covers(module, "bias")


class TransposedLinearRule(LinearRule):
    """A linear layer that stores its weight as (in, out), such as the ``Conv1D`` of GPT-2 in
    transformers."""

    def weight_matrix(self, module: Module, weight: Tensor) -> Tensor:
        return weight.mT

    def weight_tensor(self, module: Module, matrix: Tensor) -> Tensor:
        return matrix.mT


class ConvRule(KroneckerRule):
    """``Conv1d``/``Conv2d``/``Conv3d`` with groups, stride, dilation, any padding and padding mode.

    Positions are the output pixels. Input features are ordered (kernel…, channel), so that a patch
    is copied in runs of channels; `weight_matrix` follows the same order. One matrix a group.
    """

    def inputs(self, module: Module, x: Tensor) -> Tensor:
        return patches(module, x)

    def mean_inputs(self, module: Module, x: Tensor) -> Tensor:
        return patches(module, x, mean=True)

    def gradients(self, module: Module, x: Tensor, g: Tensor) -> Tensor:
        groups = module.groups
        if groups == 1:
            return g.flatten(2).mT
        return g.unflatten(1, (groups, -1)).flatten(3).permute(1, 0, 3, 2)

    def weight_matrix(self, module: Module, weight: Tensor) -> Tensor:
        rows = weight.movedim(1, -1).flatten(1)
        groups = module.groups
        return rows if groups == 1 else rows.unflatten(0, (groups, -1))

    def weight_tensor(self, module: Module, matrix: Tensor) -> Tensor:
        out, channels, *kernel = module.weight.shape
        return matrix.reshape(out, *kernel, channels).movedim(-1, 1)

    def shape(self, module: Module) -> tuple[int, int, int]:
        groups = module.groups
        inputs = module.weight[0].numel() * self.covers(module, "weight") + self.covers(
            module, "bias"
        )
        return groups, module.weight.shape[0] // groups, inputs


class EmbeddingRule(KroneckerRule):
    """``torch.nn.Embedding``: a linear layer on one-hot rows, so A is diagonal (token frequencies)
    and never formed.

    The matrix is the transposed table, (dim, vocabulary). ``padding_idx`` gets no gradient. Always
    in the expand setting: reduced one-hot rows would no longer have a diagonal second moment.
    """

    names = ("weight",)
    one_hot = True

    def inputs(self, module: Module, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0] if x.dim() else 1, -1)

    def gradients(self, module: Module, x: Tensor, g: Tensor) -> Tensor:
        padding = module.padding_idx
        if padding is not None:
            g = g.masked_fill((x == padding).unsqueeze(-1), 0)
        return g.reshape(x.shape[0] if x.dim() else 1, -1, g.shape[-1])

    def weight_matrix(self, module: Module, weight: Tensor) -> Tensor:
        return weight.mT

    def weight_tensor(self, module: Module, matrix: Tensor) -> Tensor:
        return matrix.mT

    def shape(self, module: Module) -> tuple[int, int, int]:
        vocabulary, dim = module.weight.shape
        return 1, dim, vocabulary


class EmbeddingBagRule(EmbeddingRule):
    """``torch.nn.EmbeddingBag``, mode "sum" or "mean": an embedding whose bag's entries share the
    gradient.

    Bags of equal sizes without weights of their own; other calls are not followed.
    """

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any], module: Module) -> Tensor | None:
        given: dict[str, Any] = dict(
            zip(("input", "offsets", "per_sample_weights"), args, strict=False)
        )
        given |= kwargs
        x, offsets = given.get("input"), given.get("offsets")
        if not isinstance(x, Tensor) or given.get("per_sample_weights") is not None:
            return None
        if x.dim() == 2:
            return x
        count = 0 if offsets is None else len(offsets) - module.include_last_offset
        if offsets is None or count == 0 or len(x) % count:
            return None
        size = len(x) // count
        equal = torch.equal(offsets[:count], torch.arange(0, len(x), size, device=offsets.device))
        return x.view(count, size) if equal else None

    def gradients(self, module: Module, x: Tensor, g: Tensor) -> Tensor:
        counts = torch.ones_like(x, dtype=g.dtype)
        if module.padding_idx is not None:
            counts = (x != module.padding_idx).to(g.dtype)
        if module.mode == "mean":
            counts = counts / counts.sum(-1, keepdim=True).clamp_min(1)
        return g.unsqueeze(1) * counts.unsqueeze(-1)


class BilinearRule(LinearRule):
    """``torch.nn.Bilinear``: linear in the products of its two inputs' entries."""

    def read(self, args: Sequence[Any], kwargs: Mapping[str, Any], module: Module) -> Tensor | None:
        given: dict[str, Any] = dict(zip(("input1", "input2"), args, strict=False))
        given |= kwargs
        a, b = given["input1"], given["input2"]
        return (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2)

    def weight_matrix(self, module: Module, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def weight_tensor(self, module: Module, matrix: Tensor) -> Tensor:
        return matrix.unflatten(-1, module.weight.shape[1:])


class ConvTransposeRule(KroneckerRule):
    """``ConvTranspose1d``/``2d``/``3d`` without groups: the transpose of a convolution.

    Positions are the *input* pixels; the output-gradient samples are the patches of g that each of
    them reaches. The matrix is (kernel… × out channels, in channels). The bias, which is added per
    output pixel, is not in it and keeps its diagonal.
    """

    names = ("weight",)

    def inputs(self, module: Module, x: Tensor) -> Tensor:
        return x.flatten(2).mT

    def gradients(self, module: Module, x: Tensor, g: Tensor) -> Tensor:
        return patches(module, g)

    def weight_matrix(self, module: Module, weight: Tensor) -> Tensor:
        return weight.movedim(1, -1).flatten(1).mT

    def weight_tensor(self, module: Module, matrix: Tensor) -> Tensor:
        channels, out, *kernel = module.weight.shape
        return matrix.mT.reshape(channels, *kernel, out).movedim(-1, 1)

    def shape(self, module: Module) -> tuple[int, int, int]:
        channels = module.weight.shape[0]
        return 1, module.weight[0].numel(), channels


@dataclass(frozen=True)
class ScaleRule(Rule):
    """Scale and shift of a normalisation layer, or any elementwise affine map ``y = γ x̂ + β``.

    ``axes``: "last" when the parameters span the trailing dimensions (LayerNorm, RMSNorm),
    "channel" when they index dimension 1 (BatchNorm, GroupNorm, InstanceNorm).
    """

    axes: str
    batched_statistics: bool = False

    def normalised(self, module: Module, x: Tensor) -> Tensor:
        """x̂, the module's output without its scale and shift (BatchNorm: with the statistics of
        its current mode)."""
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        if isinstance(module, nn.GroupNorm):
            return F.group_norm(x, module.num_groups, None, None, module.eps)
        if isinstance(module, nn.modules.batchnorm._NormBase):
            instance = not self.batched_statistics
            use_batch = module.training or module.running_mean is None
            if instance:
                return F.instance_norm(
                    x,
                    module.running_mean,
                    module.running_var,
                    None,
                    None,
                    use_batch,
                    0.0,
                    module.eps,
                )
            mean, var = (None, None) if use_batch else (module.running_mean, module.running_var)
            return F.batch_norm(x, mean, var, None, None, use_batch, 0.0, module.eps)
        return F.rms_norm(x, list(module.normalized_shape), None, module.eps)

    def rows(
        self, module: Module, normalised: Tensor, g: Tensor, kfac_approx: KfacApprox = "reduce"
    ) -> Tensor:
        """Gradients of (scale, shift), flattened to (rows, k): a row an example ("reduce") or a
        position ("expand")."""
        parts = []
        for name, _ in self.parameters(module):
            sample = g if name == "bias" else g * normalised
            if self.axes == "channel":
                sample = sample.flatten(2) if sample.dim() > 2 else sample.unsqueeze(-1)
                sample = sample.sum(-1) if kfac_approx == "reduce" else sample.mT.flatten(0, 1)
            else:
                width = self.parameters(module)[0][1].numel()
                sample = sample.reshape(sample.shape[0], -1, width)
                sample = sample.sum(1) if kfac_approx == "reduce" else sample.flatten(0, 1)
            parts.append(sample)
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class LastAxisScale(ScaleRule):
    """A scale over the last axis and nothing else: ``y = (c + γ) x̂`` with x̂ = x/rms(x) (RMSNorm
    by any name), or x̂ = x (layer scale).

    ``scale``: the parameter's name. ``eps``: of the root mean square; None: x is not normalised.
    """

    axes: str = "last"
    scale: str = "weight"
    eps: float | None = None

    @property
    def names(self) -> tuple[str, ...]:  # type: ignore[override]
        """The one parameter."""
        return (self.scale,)

    def normalised(self, module: Module, x: Tensor) -> Tensor:
        if self.eps is None:
            return x
        return F.rms_norm(x, [x.shape[-1]], None, self.eps)


def last_axis_scale(module: Module) -> LastAxisScale | None:
    """The rule of a module that does what `LastAxisScale` says, found out by calling its forward on
    one small tensor; None for every other module."""
    own = [(name, p) for name, p in module._parameters.items() if p is not None]
    if len(own) != 1 or module._modules or own[0][1].dim() != 1 or own[0][1].is_meta:
        return None
    ((name, p),) = own
    if len(p) < 2 or not p.is_floating_point():
        return None
    places = torch.arange(3 * len(p), device=p.device).view(3, -1)
    x = (places.sin() + 0.5).to(p.dtype)  # with a mean, unlike what LayerNorm leaves
    try:
        with torch.no_grad():
            y = type(module).forward(module, x)
    except Exception:  # another kind of module
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or not bool(y.any()):
        return None
    found = [getattr(module, k, None) for k in ("variance_epsilon", "eps", "epsilon", "norm_eps")]
    known = [e for e in found if isinstance(e, float)]
    close = 1e-2 if p.dtype.itemsize < 4 else 1e-4
    for eps in (*known, 1e-6, 1e-5, None):
        rule = LastAxisScale(scale=name, eps=eps)
        x_hat = rule.normalised(module, x)
        for offset in (0.0, 1.0):
            wanted = (offset + p.detach()) * x_hat
            if float((y - wanted).norm()) <= close * float(wanted.norm()):
                return rule
    return None


class _Shared:
    linear = LinearRule()
    transposed = TransposedLinearRule()
    conv = ConvRule()
    transposed_conv = ConvTransposeRule()
    embedding = EmbeddingRule()
    bag = EmbeddingBagRule()
    bilinear = BilinearRule()
    last = ScaleRule("last")
    channel = ScaleRule("channel")
    batch = ScaleRule("channel", batched_statistics=True)


RULES: dict[type[nn.Module], Rule] = {
    nn.Linear: _Shared.linear,
    nn.Conv1d: _Shared.conv,
    nn.Conv2d: _Shared.conv,
    nn.Conv3d: _Shared.conv,
    nn.ConvTranspose1d: _Shared.transposed_conv,
    nn.ConvTranspose2d: _Shared.transposed_conv,
    nn.ConvTranspose3d: _Shared.transposed_conv,
    nn.Embedding: _Shared.embedding,
    nn.EmbeddingBag: _Shared.bag,
    nn.Bilinear: _Shared.bilinear,
    nn.LayerNorm: _Shared.last,
    nn.RMSNorm: _Shared.last,
    nn.GroupNorm: _Shared.channel,
    nn.BatchNorm1d: _Shared.batch,
    nn.BatchNorm2d: _Shared.batch,
    nn.BatchNorm3d: _Shared.batch,
    nn.InstanceNorm1d: _Shared.channel,
    nn.InstanceNorm2d: _Shared.channel,
    nn.InstanceNorm3d: _Shared.channel,
}
"""Module type → rule. A subclass inherits the rule only while it keeps the parent's ``forward``."""


def register(module_type: type[nn.Module], rule: Rule) -> None:
    """Give ``module_type`` a layer rule (for your own layers)."""
    RULES[module_type] = rule


def rule_for(module: Module) -> Rule | None:
    """The rule of a module, or None: its parameters then get a diagonal block."""
    kind: Any = type(module)
    for parent in kind.__mro__:
        rule = RULES.get(parent)
        if rule is not None:
            if kind.forward is not parent.forward:
                break
            grouped = rule is _Shared.transposed_conv and module.groups > 1
            largest = rule is _Shared.bag and module.mode == "max"
            return None if grouped or largest else rule
    # GPT-2's Conv1D, recognised without importing transformers.
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return _Shared.transposed
    return last_axis_scale(module)


def patches(module: Module, x: Tensor, mean: bool = False) -> Tensor:
    """Input patches of a convolution, (n, positions, kernel·channels); with groups (groups, n,
    positions, …/groups).

    One padded channels-last copy of x and one copy into patches; cost O(n · positions · kernel ·
    channels). With ``mean`` over the positions, (…, n, 1, …), the second copy is spared.
    """
    kernel, stride, dilation, groups = (
        module.kernel_size,
        module.stride,
        module.dilation,
        module.groups,
    )
    padding = module._reversed_padding_repeated_twice
    if any(padding):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = F.pad(x, padding, mode=mode)
    x = x.movedim(1, -1).contiguous()
    n, *size, channels = x.shape
    step = x.stride()
    places = [
        (s - d * (k - 1) - 1) // t + 1
        for s, k, t, d in zip(size, kernel, stride, dilation, strict=True)
    ]
    windows = x.as_strided(
        (n, *places, *kernel, channels),
        (
            step[0],
            *(s * t for s, t in zip(step[1:-1], stride, strict=True)),
            *(s * d for s, d in zip(step[1:-1], dilation, strict=True)),
            1,
        ),
    )
    if mean:
        windows = windows.mean(tuple(range(1, 1 + len(places))))
    count = 1 if mean else math.prod(places)
    if groups == 1:
        return windows.reshape(n, count, -1)
    split = windows.unflatten(-1, (groups, channels // groups)).movedim(-2, 0)
    return split.reshape(groups, n, count, -1)


def _positions(x: Tensor, width: int) -> Tensor:
    """(n, …, width) as (n, r, width); a single unbatched vector counts as one example."""
    return x.reshape(x.shape[0] if x.dim() > 1 else 1, -1, width)
