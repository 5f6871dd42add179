"""Predictions of a model on a probe, leaving no trace in it; and a snapshot's weights put into a
model.

Used while recording (the training must be bit-identical to an unrecorded one) and in replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError, first_line
from thermo_opt.models import (
    call,
    device_of,
    full_precision,
    map_tensors,
    outputs_of,
    tensors_in,
    untouched,
)
from thermo_opt.runs.probe import Inputs
from thermo_opt.runs.run import Snapshot
from thermo_opt.runs.weight_names import fitted

IGNORED = -100
"""Targets with this value are not counted, as in `torch.nn.functional.cross_entropy`."""


def predictions(
    model: nn.Module, inputs: Inputs, batch_size: int = 256, autocast: bool = False
) -> Iterator[Tensor]:
    """The model's raw outputs, ``batch_size`` examples at a time, in the dtype it computes in.

    Evaluated in eval mode without gradients and left `untouched` once the iterator is exhausted.
    Cost: one forward pass.

    Args:
        model: returns anything `outputs_of` reads.
        inputs: (n, …), a tensor for ``model(inputs)``, a tuple for ``model(*inputs)``, a dict for
            ``model(**inputs)``; floating-point inputs are used in their own dtype.
        batch_size: examples per forward pass.
        autocast: leave the model's own ``torch.autocast`` on; off, it computes in the dtype of its
            weights.

    Raises:
        InputError: there are no inputs, or the model returns nothing of n rows.
    """
    n = row_count(inputs)
    if n == 0:
        raise InputError("probe: there are no inputs; give at least one example")
    device = device_of(model)
    with untouched(model), nullcontext() if autocast else full_precision(device):
        for start in range(0, n, batch_size):
            stop = min(start + batch_size, n)
            batch = map_tensors(inputs, lambda t, a=start, b=stop: t[a:b].to(device))
            try:
                outputs = outputs_of(call(model, batch))
            except InputError:
                raise
            except Exception as error:  # whatever a model raises on inputs it wasn't made for
                raise InputError(
                    f"probe: the model can't be evaluated on its inputs ({first_line(error)}); "
                    "check their shapes, types and names"
                ) from error
            if outputs.ndim == 0 or len(outputs) != stop - start:
                raise InputError(
                    f"probe: the model gives outputs of shape {tuple(outputs.shape)} for "
                    f"{stop - start} inputs; it must give one row of outputs per example"
                )
            yield outputs.detach()


def predict(
    model: nn.Module, inputs: Inputs, batch_size: int = 256, autocast: bool = False
) -> Tensor:
    """All of `predictions` in one tensor on the CPU."""
    return torch.cat([kept(part) for part in predictions(model, inputs, batch_size, autocast)])


def kept(outputs: Tensor) -> Tensor:
    """A copy on the CPU, in the dtype in which the outputs were computed."""
    return outputs.detach().to("cpu", copy=True).contiguous()


def row_count(inputs: Inputs) -> int:
    """Number of examples n of probe inputs, the same in each tensor."""
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors_in(inputs)}
    if len(counts) != 1:
        raise InputError(
            f"probe: the inputs have {sorted(counts)} rows; give one row per example in each"
        )
    return counts.pop()


def check_predictions(outputs: Tensor, targets: Tensor | None, likelihood: str) -> None:
    """Refuse predictions and targets that don't fit: `InputError` naming the shapes, or the first
    target outside the classes.

    categorical: outputs (n, c) or (n, t, c), integer targets (n,) or (n, t) in 0…c−1 or -100;
    bernoulli: logits and targets of one size, targets in [0, 1]; gaussian: means and targets of one
    shape.
    """
    if targets is None:
        return
    if likelihood == "categorical":
        if targets.is_floating_point() or targets.shape != outputs.shape[:-1]:
            raise InputError(
                "probe: categorical targets must be whole numbers of shape "
                f"{tuple(outputs.shape[:-1])} for outputs "
                "of shape "
                f"{tuple(outputs.shape)}, not {targets.dtype} of shape {tuple(targets.shape)}"
            )
        counted = targets[targets != IGNORED]
        if counted.numel() == 0:
            raise InputError(
                f"probe: every target is {IGNORED}, so no prediction counts; give at least one "
                "class"
            )
        if int(counted.min()) < 0 or int(counted.max()) >= outputs.shape[-1]:
            wrong = counted[(counted < 0) | (counted >= outputs.shape[-1])][0]
            raise InputError(
                f"probe: target {int(wrong)} is outside the model's classes "
                f"0…{outputs.shape[-1] - 1}; correct the "
                "targets"
            )
    elif targets.shape != outputs.shape and targets.numel() != outputs.numel():
        raise InputError(
            f"probe: {likelihood} targets of shape {tuple(targets.shape)} don't fit outputs of "
            "shape "
            f"{tuple(outputs.shape)}"
        )
    elif likelihood == "bernoulli" and not bool(((targets >= 0) & (targets <= 1)).all()):
        raise InputError("probe: bernoulli targets must lie in [0, 1]")


def install(model: nn.Module, snapshot: Snapshot, tied: Mapping[str, str] | None = None) -> None:
    """Copy a snapshot's weights (and buffers) into a model, in the model's dtype and device.

    Args:
        model: the module.
        snapshot: one with weights.
        tied: other names of shared parameters → the name under which they are stored.

    Raises:
        InputError: naming the first weight that is missing in either, or differs in shape.
    """
    stored = snapshot.load_group("params")
    if snapshot.has_group("buffers"):
        stored |= snapshot.load_group("buffers")
    for alias, name in (tied or {}).items():
        if name in stored:
            stored.setdefault(alias, stored[name])
    own = dict(model.named_parameters())
    aliases = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict(keep_vars=True)
    known = {**aliases, **persistent, **dict(model.named_buffers())}
    names = fitted(stored, own.keys() - _shared(own, aliases), known.keys())
    if names is not None:
        stored = {own_name: stored[name] for name, own_name in names.items()}
    for alias, parameter in aliases.items():  # a shared parameter may be stored under another name
        if alias in stored and not any(name in stored for name, p in own.items() if p is parameter):
            stored[next(name for name, p in own.items() if p is parameter)] = stored[alias]
    missing = [name for name in own if name not in stored]
    if missing:
        raise InputError(
            f"{snapshot.path} has no weight {missing[0]!r}, which the model has ({len(missing)} "
            "missing); name the "
            "right model"
        )
    with torch.no_grad():
        for name, tensor in stored.items():
            target = known.get(name)
            if target is None:
                raise InputError(
                    f"{snapshot.path} has a weight {name!r} that the model lacks; name the right "
                    "model"
                )
            if target.shape != tensor.shape:
                raise InputError(
                    f"{snapshot.path}: {name!r} has shape {tuple(tensor.shape)}, in the model "
                    f"{tuple(target.shape)}; "
                    "name the right model"
                )
            target.copy_(tensor)


def _shared(own: Mapping[str, Tensor], aliases: Mapping[str, Tensor]) -> set[str]:
    """Parameters that have another name, under which they may be stored instead."""
    counts = Counter(id(parameter) for parameter in aliases.values())
    return {name for name, parameter in own.items() if counts[id(parameter)] > 1}
