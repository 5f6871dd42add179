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
from thermo_opt.fisher.kronecker.rules import Rule, ScaleRule, rule_for


@dataclass(frozen=True)
class Layer:
    """A module that a rule covers: ``own`` are (local name, position among the model's trainable
    parameters)."""

    name: str
    module: nn.Module
    rule: Rule
    own: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Cover:
    """How a model's trainable parameters fall to layers.

    ``layers``: in the order of ``named_modules``. ``tied``: positions of parameters that several
    layers share. ``rest``: positions no rule covers, and ``unruled``: the modules (name, type) that
    own them.
    """

    layers: tuple[Layer, ...]
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
    owners: dict[int, int] = {}
    layers, unruled = [], []
    for name, module in owning:
        rule = rule_for(module)
        ruled = {} if rule is None else dict(rule.parameters(module))
        own = tuple((local, position[id(p)]) for local, p in ruled.items())
        if rule is not None and own:
            layers.append(Layer(name, module, rule, own))
            for _, i in own:
                owners[i] = owners.get(i, 0) + 1
        others = [
            k
            for k, p in module._parameters.items()
            if p is not None and p.requires_grad and k not in ruled
        ]
        if others:
            unruled.append((name, type(module).__name__))
    tied = frozenset(i for i, count in owners.items() if count > 1)
    rest = tuple(i for i in position.values() if i not in owners)
    return Cover(tuple(layers), tied, rest, tuple(unruled))


@dataclass
class Use:
    """One call of a layer: its input (for scale rules, already normalised) and where its output
    sits in the autograd graph.

    The graph edge is taken when the module returns, so a later in-place activation doesn't change
    what it refers to.
    """

    layer: Layer
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
def recording(layers: Iterable[Layer]) -> Iterator[list[Use]]:
    """Record every call of these layers whose output takes part in autograd; the hooks are gone on
    leaving."""
    uses: list[Use] = []
    handles = [
        layer.module.register_forward_hook(
            _recorder(layer, uses), with_kwargs=True, always_call=False
        )
        for layer in layers
    ]
    try:
        yield uses
    finally:
        for handle in handles:
            handle.remove()


def _recorder(layer: Layer, uses: list[Use]) -> Any:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if not (isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled()):
            return
        x = (args[0] if args else next(iter(kwargs.values()))).detach()
        if isinstance(layer.rule, ScaleRule):
            x = layer.rule.normalised(module, x)
        if x.is_floating_point():
            x = working(x)
        uses.append(Use(layer, x, get_gradient_edge(output), output.numel(), x._version))

    return hook
