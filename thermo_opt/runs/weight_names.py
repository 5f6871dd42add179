"""Which stored weight belongs to which parameter of a model, where a wrapper has put another name
in front.

Lightning modules, trainers and compiled models store ``net.0.weight`` for ``0.weight``; losses and
metrics may keep weights of their own beside it. A prefix is peeled until all of the model's names
fit; what lies outside the model's own prefix isn't its.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

_AVERAGES = ("ema", "averag", "swa", "shadow", "teacher", "target", "momentum")
"""Parts of a prefix under which averaged copies of a model lie."""
_BESIDE = (
    "criterion",
    "loss",
    "loss_fn",
    "loss_func",
    "metric",
    "metrics",
    "train_metrics",
    "val_metrics",
    "n_averaged",
)
"""First parts of names that losses, metrics and wrappers give to tensors of their own."""


def fitted(stored: Iterable[str], needed: Set[str], known: Set[str]) -> Mapping[str, str] | None:
    """The model's name of each stored tensor that belongs to it; None where no prefix fits all that
    is needed.

    Args:
        stored: names in the checkpoint.
        needed: the model's names that must be found.
        known: all of the model's names, aliases and buffers included.

    Returns:
        Stored name → the model's name. Stored tensors under the model's own prefix that it doesn't
        know stay in under their own name, so that whoever copies them notices the wrong model.
    """
    names = list(stored)
    if needed <= set(names):
        beside = {name for name in names if name not in known and name.split(".")[0] in _BESIDE}
        return {name: name for name in names if name not in beside}
    if plain := prefixes(names, needed):
        if len(plain) > 1:
            return None
        return {name: name.removeprefix(plain[0]) for name in names if name.startswith(plain[0])}
    wrappers = {
        name.split(".")[0] for name in needed
    }  # the model is wrapped, the checkpoint is not
    if len(wrappers) == 1:
        prefix = next(iter(wrappers)) + "."
        if all(name.startswith(prefix) for name in needed) and {
            n.removeprefix(prefix) for n in needed
        } <= set(names):
            return {name: prefix + name for name in names}
    return None


def prefixes(stored: Iterable[str], needed: Set[str]) -> list[str]:
    """The prefixes under which all of the model's names are stored; those of averaged copies only
    where there are no others."""
    names = list(stored)
    first = min(needed) if needed else ""
    ends = {name[: -len(first)] for name in names if name.endswith("." + first)}
    fits = [
        prefix
        for prefix in sorted(ends)
        if needed <= {n.removeprefix(prefix) for n in names if n.startswith(prefix)}
    ]
    return [p for p in fits if not any(part in p.lower() for part in _AVERAGES)] or fits
