"""Predictions of a model on a probe, leaving no trace in it; and a snapshot's weights put into a
model.

Used while recording (the training must be bit-identical to an unrecorded one) and in replay.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.runs.probe import Inputs
from thermo_opt.runs.run import Snapshot

IGNORED = -100
"""Targets with this value are not counted, as in `torch.nn.functional.cross_entropy`."""


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluate ``model`` inside, and find it afterwards exactly as before.

    Restores train/eval flags of each submodule, buffers (the objects and their contents), and the
    random states of Python, NumPy and torch (CPU and CUDA). Gradients are off inside. Cost: one
    copy of the buffers.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (the user's code may draw from it)
    cuda = (
        torch.cuda.get_rng_state_all()
        if torch.cuda.is_available() and torch.cuda.is_initialized()
        else None
    )
    try:
        for module, _ in flags:
            module.training = (
                False  # not module.eval(): user modules override train() with side effects
            )
        with torch.no_grad():
            yield
    finally:
        for module, flag in flags:
            module.training = flag
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer
                if not _identical(buffer, content):
                    buffer.copy_(content)
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


def predict(model: nn.Module, inputs: Inputs, batch_size: int = 256) -> Tensor:
    """The model's raw outputs (logits, means) on all inputs, on the CPU; float32, or float64 if the
    model computes in float64.

    ``inputs`` (n, …): a tensor for ``model(inputs)``, a tuple for ``model(*inputs)``, a dict for
    ``model(**inputs)``; floating-point inputs are used in their own dtype. The model may return a
    tensor, a tuple whose first element is the outputs, or an object or dict with ``logits``. It is
    evaluated in eval mode without gradients and left `untouched`. Cost: one forward pass. Raises
    `InputError` when there are no inputs or the model returns nothing of n rows.
    """
    n = row_count(inputs)
    if n == 0:
        raise InputError("probe: there are no inputs; give at least one example")
    device = _device(model)
    parts = []
    plain = (
        torch.autocast(device.type, enabled=False)
        if torch.amp.is_autocast_available(device.type)
        else nullcontext()
    )
    with untouched(model), plain:
        for start in range(0, n, batch_size):
            batch = _rows(inputs, slice(start, start + batch_size), device)
            try:
                outputs = outputs_of(_call(model, batch))
            except InputError:
                raise
            except Exception as error:  # whatever a model raises on inputs it wasn't made for
                raise InputError(
                    f"probe: the model can't be evaluated on its inputs ({_first_line(error)}); "
                    "check their shapes, "
                    "types and names"
                ) from error
            if outputs.ndim == 0 or len(outputs) != row_count(batch):
                raise InputError(
                    f"probe: the model gives outputs of shape {tuple(outputs.shape)} for "
                    f"{row_count(batch)} inputs; "
                    "it must give one row of outputs an example"
                )
            parts.append(
                outputs.detach().to(
                    "cpu",
                    outputs.dtype if outputs.dtype == torch.float64 else torch.float32,
                    copy=True,
                )
            )
    return torch.cat(parts)


def outputs_of(result: Any) -> Tensor:
    """The tensor of outputs in what a model returned: itself, its ``logits``, or the first element
    of a tuple."""
    if isinstance(result, Mapping):
        result = result.get("logits")
    elif not isinstance(result, Tensor) and hasattr(result, "logits"):
        result = result.logits
    elif isinstance(result, tuple | list) and result:
        result = result[0]
    if not isinstance(result, Tensor):
        raise InputError(
            f"the model returned {type(result).__name__}; it must return a tensor, a tuple "
            "starting with one, or "
            "'logits'"
        )
    return result


def row_count(inputs: Inputs) -> int:
    """Number of examples n of probe inputs."""
    tensors = (
        [inputs]
        if isinstance(inputs, Tensor)
        else list(inputs.values() if isinstance(inputs, dict) else inputs)
    )
    counts = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(counts) != 1:
        raise InputError(
            f"probe: the inputs have {sorted(counts)} rows; give one row an example in each"
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
    """Copy a snapshot's weights (and buffers) into ``model``, in the model's dtype and device.

    ``tied``: other names of shared parameters → their stored names. Raises `InputError` naming the
    first weight that is missing in either, or differs in shape.
    """
    stored = snapshot.load_group("params")
    if snapshot.has_group("buffers"):
        stored |= snapshot.load_group("buffers")
    for alias, name in (tied or {}).items():
        if name in stored:
            stored.setdefault(alias, stored[name])
    own = dict(model.named_parameters())
    prefix = (
        next(iter(stored), "").split(".")[0] + "."
    )  # wrappers (Lightning, DDP, compile) put the model under one name
    if not own.keys() & stored.keys() and all(name.startswith(prefix) for name in stored):
        stored = {name.removeprefix(prefix): tensor for name, tensor in stored.items()}
    aliases = dict(model.named_parameters(remove_duplicate=False))
    persistent = model.state_dict(keep_vars=True)
    for (
        alias,
        parameter,
    ) in aliases.items():  # a shared parameter may have been stored under another of its names
        if alias in stored and not any(name in stored for name, p in own.items() if p is parameter):
            stored[next(name for name, p in own.items() if p is parameter)] = stored[alias]
    missing = [name for name in own if name not in stored]
    if missing:
        raise InputError(
            f"{snapshot.path} has no weight {missing[0]!r}, which the model has ({len(missing)} "
            "missing); name the "
            "right model"
        )
    known = {**aliases, **persistent, **dict(model.named_buffers())}
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


def _call(model: nn.Module, batch: Inputs) -> Any:
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def map_inputs(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Inputs of the same form, ``function`` of each tensor."""
    if isinstance(inputs, dict):
        return {key: function(value) for key, value in inputs.items()}
    return tuple(map(function, inputs)) if isinstance(inputs, tuple) else function(inputs)


def _rows(inputs: Inputs, rows: slice, device: torch.device) -> Inputs:
    return map_inputs(inputs, lambda tensor: tensor[rows].to(device))


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _identical(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(
        torch.isnan(a), torch.isnan(b)
    )
