"""Which layers of a model a rule covers, and what passes through them in a forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from thermo_opt.errors import InputError
from thermo_opt.fisher.kronecker.factors import working
from thermo_opt.fisher.kronecker.rules import KroneckerRule, Rule, ScaleRule, rule_for
from thermo_opt.fisher.kronecker.uses import UsedRule, used_rules
from thermo_opt.models import tensors_in


@dataclass(frozen=True)
class Layer:
    """A module that a rule covers: ``own`` are (local name, position among the model's trainable
    parameters); ``caller``: the module that reads them in its stead."""

    name: str
    module: nn.Module
    rule: Rule
    own: tuple[tuple[str, int], ...]
    caller: nn.Module | None = None

    @property
    def watched(self) -> nn.Module:
        """The module whose calls use the parameters: itself, unless another one reads them."""
        return self.caller or self.module

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The covered parameters, in the order of ``own``."""
        return [self.module._parameters[local] for local, _ in self.own]  # type: ignore[misc]

    def covers(self, role: str) -> bool:
        """Whether the parameter in the role "weight" or "bias" is the layer's."""
        return any(local == self.rule.own(role) for local, _ in self.own)


@dataclass(frozen=True)
class KroneckerLayer(Layer):
    """A layer that is linear in a matrix."""

    rule: KroneckerRule

    @property
    def shape(self) -> tuple[int, int, int]:
        """(groups, out, in) of its matrix, a trainable bias column counted in."""
        return self.rule.shape(self.module)

    def inputs(self, x: Tensor) -> Tensor:
        """Input samples of one call (`KroneckerRule.inputs`)."""
        return self.rule.inputs(self.module, x)

    def gradients(self, x: Tensor, g: Tensor) -> Tensor:
        """Output-gradient samples of one call (`KroneckerRule.gradients`)."""
        return self.rule.gradients(self.module, x, g)


@dataclass(frozen=True)
class ScaleLayer(Layer):
    """A normalisation layer, with its scale and shift."""

    rule: ScaleRule

    @property
    def sizes(self) -> list[int]:
        """How many numbers each of the parameters holds."""
        return [p.numel() for p in self.parameters]

    @property
    def dense(self) -> bool:
        """Whether all of them share one dense block, rather than one small block per channel."""
        return sum(self.sizes) <= DENSE_SCALES


DENSE_SCALES = 1024
"""Most scale and shift parameters of one layer that share a dense block; above it, one small block
per channel."""


@dataclass(frozen=True)
class Cover:
    """How a model's trainable parameters fall to layers.

    ``layers``: in the order of ``named_modules``. ``tied``: positions of parameters that several
    layers share. ``rest``: positions no rule covers, and ``unruled``: the modules (name, type) that
    own them, or where a rule covers the others of a module the parameters themselves.
    """

    layers: tuple[KroneckerLayer | ScaleLayer, ...]
    tied: frozenset[int]
    rest: tuple[int, ...]
    unruled: tuple[tuple[str, str], ...]


def cover(model: nn.Module, modules: Iterable[tuple[str, nn.Module]] | None = None) -> Cover:
    """Assign every trainable parameter of ``model`` to the layers whose rule covers it. No forward
    pass.

    ``modules``: the model's named modules, where they are known already.
    """
    owning = [
        (name, module) for name, module in modules or model.named_modules() if module._parameters
    ]
    position: dict[int, int] = {}
    for _, module in owning:
        for p in module._parameters.values():
            if p is not None and p.requires_grad:
                position.setdefault(id(p), len(position))
    # Attention never calls its last projection: it reads that layer's parameters.
    readers = {
        id(module.out_proj): module
        for _, module in owning
        if isinstance(module, nn.MultiheadAttention)
    }
    owners: dict[int, int] = {}
    layers: list[KroneckerLayer | ScaleLayer] = []
    unruled = []
    for name, module in owning:
        caller = readers.get(id(module))
        found = rule_for(module) if caller is None else None
        rules: list[Rule] = [] if found is None else [found]
        covered = {local for rule in rules for local, _ in rule.parameters(module)}
        bare = used_rules(module, covered)
        ruled: dict[str, int] = {}
        for rule in (*rules, *bare):
            own = tuple((local, position[id(p)]) for local, p in rule.parameters(module))
            if not own:
                continue
            ruled |= dict(own)
            label = f"{name}.{rule.weight}" if isinstance(rule, UsedRule) else name
            layers.append(_layer(label.lstrip("."), module, rule, own, caller))
            for _, i in own:
                owners[i] = owners.get(i, 0) + 1
        others = [
            k
            for k, p in module._parameters.items()
            if p is not None and p.requires_grad and k not in ruled
        ]
        if others:
            named = [f"{name}.{k}".lstrip(".") for k in others] if ruled else [name]
            unruled += [(one, type(module).__name__) for one in named]
    tied = frozenset(i for i, count in owners.items() if count > 1)
    rest = tuple(i for i in position.values() if i not in owners)
    return Cover(tuple(layers), tied, rest, tuple(unruled))


def _layer(
    name: str,
    module: nn.Module,
    rule: Rule,
    own: tuple[tuple[str, int], ...],
    caller: nn.Module | None,
) -> KroneckerLayer | ScaleLayer:
    if isinstance(rule, ScaleRule):
        return ScaleLayer(name, module, rule, own)
    if isinstance(rule, KroneckerRule):
        return KroneckerLayer(name, module, rule, own, caller)
    raise InputError(
        f"the rule of module {name!r} is a {type(rule).__name__}; derive it from KroneckerRule or "
        "ScaleRule"
    )


@dataclass
class Call:
    """One call of a layer: its input (for scale rules, already normalised) and where its output
    sits in the autograd graph.

    The graph edge is taken when the module returns, so a later in-place activation doesn't change
    what it refers to.
    """

    layer: KroneckerLayer | ScaleLayer
    x: Tensor
    output: GradientEdge
    size: int
    version: int = field(default=0)

    def input(self) -> Tensor:
        """The recorded input; `InputError` if it has been overwritten since."""
        if self.x._version != self.version:
            raise InputError(
                f"the input of module {self.layer.name!r} was changed in place after the module "
                "had used it; "
                "use the out-of-place operation there"
            )
        return self.x


@contextmanager
def recording(layers: Iterable[KroneckerLayer | ScaleLayer]) -> Iterator[list[Call]]:
    """Record every call of these layers whose output takes part in autograd; the hooks are gone on
    leaving."""
    calls: list[Call] = []
    handles = [
        layer.watched.register_forward_hook(
            _recorder(layer, calls), with_kwargs=True, always_call=False
        )
        for layer in layers
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _recorder(layer: KroneckerLayer | ScaleLayer, calls: list[Call]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if isinstance(layer.rule, UsedRule):
            if torch.is_grad_enabled():
                _record_uses(layer, layer.rule, (args, kwargs), output, calls)
            return
        if not (isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled()):
            return
        found = layer.rule.read(args, kwargs, module)
        if found is None:
            return
        x = found.detach()
        if isinstance(layer, ScaleLayer):
            x = layer.rule.normalised(module, x)
        if x.is_floating_point():
            x = working(x)
        calls.append(Call(layer, x, get_gradient_edge(output), output.numel(), x._version))

    return hook


def _record_uses(
    layer: KroneckerLayer | ScaleLayer, rule: UsedRule, given: Any, output: Any, calls: list[Call]
) -> None:
    """Record the products of a bare parameter as calls, if it enters by whole products alone."""
    uses = rule.uses(layer.module, tensors_in(given), tensors_in(output))
    if any(use.kind != "product" or use.place is not None or use.start for use in uses):
        return
    for use in uses:
        x = working(use.operand())
        size = len(x) * rule.size[1]
        calls.append(Call(layer, x, GradientEdge(use.node, 0), size, x._version))
