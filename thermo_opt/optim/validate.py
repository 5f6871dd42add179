"""Validation of NGDT's arguments, parameter groups and steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.optim.forward_pass import ForwardPass

GROUP_OPTIONS = frozenset(
    ("params", "lr", "weight_decay", "momentum", "share", "name", "param_names", "initial_lr")
)
"""Of a parameter group; the last three are labels, torch's and its schedulers'."""


def number(name: str, value: Any, least: float = 0.0, above: bool = False) -> None:
    """Refuse what is no finite number ≥ (with ``above``: >) ``least``; a function of the step is
    checked when it is called."""
    if callable(value):
        return
    found = float(value)
    if not math.isfinite(found) or found < least or (above and found == least):
        raise InputError(
            f"{name} must be a finite number {'>' if above else '≥'} {least:g}, got {value!r}"
        )


def fraction(name: str, value: Any) -> None:
    """Refuse what is not in [0, 1)."""
    if not 0 <= float(value) < 1:
        raise InputError(f"{name} must be in [0, 1), got {value!r}")


def at_least_one(name: str, value: Any) -> None:
    """Refuse what is below 1."""
    if int(value) < 1:
        raise InputError(f"{name} must be at least 1, got {value!r}")


def above_zero(name: str, value: Any) -> None:
    """Refuse what is not > 0; infinity is allowed."""
    if not float(value) > 0:
        raise InputError(f"{name} must be > 0, got {value!r}")


def choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Refuse what is not one of ``known``."""
    if value not in known:
        raise InputError(f"{name} {value!r} is not one of {', '.join(known)}")


def is_model(value: Any) -> None:
    """Refuse parameters, or anything else, in the place of the model."""
    if not isinstance(value, nn.Module):
        raise InputError(
            "NGDT's first argument must be the model (a torch.nn.Module), got "
            f"{type(value).__name__}; pass parameters as params=…"
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The module under ``torch.compile`` and DistributedDataParallel."""
    inner: Any = model
    while True:
        if hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        elif isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        else:
            module: nn.Module = inner
            return module


def model(module: nn.Module) -> None:
    """Refuse a model without trainable parameters, or with complex or uninitialised ones, or in
    TorchScript."""
    if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
        raise InputError(
            "the model, or a part of it, is in TorchScript, whose layers can't be watched: train "
            "the original module, and script it afterwards"
        )
    for name, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise InputError(
                f"parameter {name!r} has no shape yet (a lazy layer): call the model once on a "
                "batch before making NGDT"
            )
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not trainable:
        raise InputError("the model has no parameters that require grad: there is nothing to train")
    for name, p in trainable:
        if p.is_complex():
            raise InputError(
                f"parameter {name!r} is complex, and NGDT trains real parameters: keep it as "
                "torch.view_as_real(…) and let forward take torch.view_as_complex of that"
            )
        if p.is_meta:
            raise InputError(
                f"parameter {name!r} is on the meta device, without values: put the model on its "
                "device (to_empty, then initialise or load it) before making NGDT"
            )


def groups(
    module: nn.Module, params: Iterable[Any] | None, trained: bool = True
) -> list[dict[str, Any]]:
    """Parameter groups from what the user gave; frozen parameters stay in them, and move once they
    are unfrozen. With ``trained``, some must train now."""
    owned = {id(p): name for name, p in module.named_parameters()}
    given = list(module.parameters() if params is None else params)
    found = (
        [dict(g) for g in given] if given and isinstance(given[0], dict) else [{"params": given}]
    )
    kept = []
    for group in found:
        unknown = sorted(set(group) - GROUP_OPTIONS)
        if unknown:
            raise InputError(
                f"a parameter group has {', '.join(map(repr, unknown))}, which NGDT doesn't know: "
                "a group may have lr, weight_decay and share"
            )
        members = group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        members = [p[1] if isinstance(p, tuple) else p for p in members]
        for p in members:
            if id(p) not in owned:
                raise InputError(
                    f"params holds a tensor of shape {tuple(p.shape)} that is no parameter of the "
                    "model; "
                    "give the module that owns it as (part of) the model"
                )
        group["params"] = members
        if members:
            kept.append(group)
    if trained and not any(p.requires_grad for group in kept for p in group["params"]):
        raise InputError("none of the given params requires grad: there is nothing to train")
    return kept


def pools(param_groups: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    """(pool of each parameter, fraction of the budget of each pool): pool 0 is for groups without a
    share of their own."""
    shares, numbers = [1.0], []
    for group in param_groups:
        share = group.get("share")
        pool = 0
        if share is not None:
            number("share", share, above=True)
            pool = len(shares)
            shares.append(float(share))
        numbers += [pool] * len(group["params"])
    shares[0] = 1.0 - sum(shares[1:])
    if shares[0] < -1e-9:
        raise InputError(
            f"the groups' shares of the budget sum to {sum(shares[1:]):g}; they must not exceed 1"
        )
    shares[0] = max(shares[0], 0.0)
    if shares[0] == 0.0 and 0 in numbers:
        raise InputError(
            "the groups' shares sum to 1, which leaves nothing for the groups without a share; "
            "give all a share"
        )
    return numbers, shares


def common_momentum(param_groups: Sequence[Mapping[str, Any]]) -> float:
    """The momentum of all groups: a block of the metric may hold parameters of several, and has
    one."""
    found = {float(group["momentum"]) for group in param_groups}
    if len(found) > 1:
        raise InputError(
            f"parameter groups have the momenta {', '.join(f'{m:g}' for m in sorted(found))}: NGDT "
            "has one for all; give momentum=… to the optimizer"
        )
    (momentum,) = found
    fraction("momentum", momentum)
    return momentum


class ModelFingerprint:
    """Notices a model whose layers, dtypes or devices changed after the optimizer was made."""

    def __init__(self, module: nn.Module, params: Sequence[nn.Parameter]) -> None:
        wanted = {id(p) for p in params}
        self._slots = [
            (owner, local, p, f"{name}.{local}" if name else local)
            for name, owner in module.named_modules()
            for local, p in owner._parameters.items()
            if p is not None and id(p) in wanted
        ]
        self._children = [
            (owner, local, child)
            for owner in module.modules()
            for local, child in owner._modules.items()
            if child is not None
        ]
        self._kinds = [(p.dtype, p.device) for _, _, p, _ in self._slots]

    def check(self) -> None:
        """Raise `InputError` if something changed."""
        for owner, local, child in self._children:
            if owner._modules.get(local) is not child:
                raise InputError(
                    f"module {local!r} was replaced after NGDT was made; make the optimizer after "
                    "changing the model"
                )
        for (owner, local, p, name), (dtype, device) in zip(self._slots, self._kinds, strict=True):
            now = owner._parameters.get(local)
            if now is not p:
                raise InputError(
                    f"parameter {name!r} was replaced after NGDT was made; make the optimizer "
                    "after changing the model"
                )
            if now.dtype != dtype or now.device != device:
                raise InputError(
                    f"parameter {name!r} moved from {dtype} on {device} to {now.dtype} on "
                    f"{now.device}; "
                    "move the model before making NGDT"
                )


def gradients(given: Sequence[Tensor | None]) -> None:
    """Refuse sparse gradients."""
    if any(g is not None and g.layout != torch.strided for g in given):
        raise InputError(
            "a parameter has a sparse gradient; NGDT needs dense ones (nn.Embedding(..., "
            "sparse=False))"
        )


def predictions_seen(seen: Sequence[ForwardPass], terms: float) -> None:
    """Refuse a loss whose predictions were never seen: neither the number of its terms nor what a
    step does to the predictions would be known."""
    if terms:
        return
    raise InputError(
        "the parameters have gradients, but none came through predictions that the model returned: "
        "call the model that was given to NGDT, let its forward return the predictions (a tensor, "
        "or a dictionary with 'logits'), not the loss alone, and call loss.backward() (gradients "
        "of torch.func, or set by hand, show no predictions)"
        if not seen
        else "no prediction of the model took part in the loss"
    )
