"""Predictions of a model on a probe, leaving no trace in it; and a snapshot's weights put into a
model.

Used while recording (the training must be bit-identical to an unrecorded one) and in replay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt import arguments, likelihoods
from thermo_opt.errors import InputError, first_line
from thermo_opt.manifold.precision import computed_dtype, rounding_floor
from thermo_opt.manifold.sketch import signs
from thermo_opt.models import (
    call,
    device_of,
    full_precision,
    map_tensors,
    outputs_of,
    tensors_in,
    untouched,
)
from thermo_opt.runs import adapters
from thermo_opt.runs.probe import Inputs, make_probe
from thermo_opt.runs.run import Snapshot
from thermo_opt.runs.weight_names import fitted, prefixes

SKETCH_SEED = 0
"""Of every run's sketches, so that runs can be compared."""
WIDEST_SKETCH = 4096
"""Sums per prediction: a standard error of 2 % for one prediction alone, and less for many."""
_SKETCH_BYTES = {True: 1 << 23, False: 1 << 27}
"""Double-precision predictions sketched at a time: on a CPU what its cache holds, else more."""
_FLOOR_ROWS, _FLOOR_NUMBERS = 256, 1 << 20
"""Predictions whose rounding is recorded with a sketch: no more than these hold numbers, and 16."""


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
            batch = map_tensors(inputs, partial(_rows, start=start, stop=stop, device=device))
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


def _rows(tensor: Tensor, start: int, stop: int, device: torch.device) -> Tensor:
    # a copy: the model's forward may work in place
    return tensor[start:stop].to(device, copy=True)


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


class ProbeObserver:
    """Observes a model's predictions on a fixed probe, as a run records them.

    Args:
        model: the model being trained; left `untouched`.
        probe: ``(inputs, targets)`` or ``(inputs, targets, weights)``.
        likelihood: of the outputs, see `thermo_opt.likelihoods`.
        kind: likewise; None: logits, unless they look otherwise.
        sketch: number of random sums that stand for the outputs (§13); None: the outputs
            themselves.
        batch_size: probe examples per forward pass.
        autocast: leave the model's own autocast on.

    Raises:
        InputError: a probe that isn't of this form.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        *,
        likelihood: str,
        kind: str | None = None,
        sketch: int | None = None,
        batch_size: int = 256,
        autocast: bool = False,
    ) -> None:
        if not isinstance(probe, tuple | list) or len(probe) not in (2, 3) or probe[0] is None:
            raise InputError(
                f"probe is of type {type(probe).__name__}; give a pair of tensors (inputs, "
                "targets), such as one batch of a DataLoader, or (inputs, targets, weights)"
            )
        inputs, targets, weights = (*probe, None)[:3]
        parts = (
            list(inputs.values())
            if isinstance(inputs, dict)
            else inputs
            if isinstance(inputs, tuple)
            else [inputs]
        )
        if not parts or not all(isinstance(part, Tensor) for part in parts):
            raise InputError(
                f"probe: inputs are of type {type(inputs).__name__}; give a tensor, or a tuple or "
                f"dictionary of tensors"
            )
        if any(part.layout != torch.strided for part in parts):
            raise InputError("probe: inputs are sparse; give dense tensors (to_dense())")
        for what, tensor in (("targets", targets), ("weights", weights)):
            if tensor is not None and not isinstance(tensor, Tensor):
                raise InputError(
                    f"probe: {what} are of type {type(tensor).__name__}; give a tensor"
                )
        # a copy: loops fill their own tensors anew
        kept_inputs, kept_targets, kept_weights = map_tensors(
            (inputs, targets, weights), lambda tensor: tensor.detach().clone()
        )
        self.probe = make_probe(kept_inputs, kept_targets, kept_weights)
        self._inputs: Inputs = kept_inputs
        self._model, self._likelihood = model, likelihood
        self._kind = None if kind is None else likelihoods.known_kind(kind)
        self._batch_size, self._autocast = arguments.whole("probe_batch_size", batch_size), autocast
        self._checked = False
        self.sketch_record: dict[str, int] | None = None
        if sketch is not None:
            if likelihood != "categorical" or (targets is not None and targets.is_floating_point()):
                raise InputError(
                    "sketch is for class targets of a categorical likelihood; record the outputs "
                    "instead"
                )
            width = arguments.whole("sketch", sketch, most=WIDEST_SKETCH)
            self.sketch_record = {"width": width, "seed": SKETCH_SEED}
        self._signs: Tensor | None = None

    def observe(self) -> dict[str, Tensor]:
        """The predictions by their names in a snapshot: ``probe/logits``, or the sketch's three
        (`_sketched`).

        Raises:
            InputError: at the first call, outputs that targets or weights don't fit.
        """
        parts: list[dict[str, Tensor]] = []
        start = 0
        for outputs in predictions(self._model, self._inputs, self._batch_size, self._autocast):
            if not self._checked:
                self._check(outputs)
                self._checked = True
            parts.append(
                self._sketched(outputs, start)
                if self.sketch_record
                else {"probe/logits": kept(outputs)}
            )
            start += len(outputs)
        found = {
            name: torch.cat([part[name] for part in parts])
            for name in parts[0]
            if name != "probe/floor"
        }
        return found | {name: tensor for name, tensor in parts[0].items() if name == "probe/floor"}

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `observe` gave, out of a snapshot's tensors."""
        return {name: tensor for name, tensor in tensors.items() if name.startswith("probe/")}

    def _check(self, outputs: Tensor) -> None:
        """Hold targets and weights against the shape that all outputs will have."""
        targets, weights = self.probe.targets, self.probe.weights
        whole = outputs[:1].expand(row_count(self._inputs), *outputs.shape[1:])
        try:
            likelihoods.checked_outputs(self._likelihood, outputs)
            if self._kind is None:
                likelihoods.refuse_probabilities(
                    self._likelihood,
                    likelihoods.parameters_last(self._likelihood, outputs, targets),
                )
            whole = likelihoods.parameters_last(self._likelihood, whole, targets)
            if targets is not None:
                likelihoods.checked_targets(self._likelihood, whole, targets)
            if weights is not None:
                likelihoods.checked_weights(weights, whole.shape[:-1])
        except InputError as error:
            raise InputError(f"probe: {error}") from None

    def _sketched(self, outputs: Tensor, start: int) -> dict[str, Tensor]:
        """Of outputs (m, …, c): ``probe/sketch`` (m, …, width) float32; with targets
        ``probe/log_p_y`` (m, …) float64, 0 where not counted; of the probe's start
        ``probe/floor``, the rounding floor a₀ (§4) of its first rows."""
        assert self.sketch_record is not None
        targets = self.probe.targets
        outputs = likelihoods.parameters_last("categorical", outputs, targets)
        leading, classes = outputs.shape[:-1], outputs.shape[-1]
        if self._signs is None:
            self._signs = torch.from_numpy(signs(classes, **self.sketch_record)).to(outputs.device)
        rows = outputs.reshape(-1, classes)
        y = None
        if targets is not None:
            y = targets[start : start + len(outputs)].to(outputs.device).reshape(-1).long()
        sums, log_p_y = [], []
        block = max(1, _SKETCH_BYTES[rows.is_cpu] // (8 * classes))
        for first in range(0, len(rows), block):
            # h = √(p · Z) by one exponential, whose length is √Z
            h = self._log(rows[first : first + block].to(torch.float64, copy=True))
            most = h.amax(-1, keepdim=True)
            if y is not None:
                here = y[first : first + block]
                at_target = h.gather(-1, here.clamp_min(0).unsqueeze(-1)).squeeze(-1)
            h.sub_(most).mul_(0.5).exp_()
            length = torch.linalg.vector_norm(h, dim=-1)
            sums.append(h @ self._signs / length.unsqueeze(-1))
            if y is not None:
                at_target = at_target - most.squeeze(-1) - 2 * length.log()
                log_p_y.append(at_target.masked_fill(here == likelihoods.IGNORED, 0.0))
        found = {"probe/sketch": torch.cat(sums).float().cpu().reshape(*leading, -1)}
        if log_p_y:
            found["probe/log_p_y"] = torch.cat(log_p_y).cpu().reshape(leading)
        if start == 0:
            count = min(_FLOOR_ROWS, max(16, _FLOOR_NUMBERS // classes))
            few = rows[:count].detach().double().cpu().numpy()
            stored = str(outputs.dtype).removeprefix("torch.")
            found["probe/floor"] = torch.tensor(
                rounding_floor(few, computed_dtype(few, stored)), dtype=torch.float64, device="cpu"
            )
        return found

    def _log(self, rows: Tensor) -> Tensor:
        """A tensor of its own: log p up to what is common to a row."""
        return rows.clamp_min(0).log() if self._kind == "probabilities" else rows


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
    if adapters.is_adapted(model) and not own.keys() <= stored.keys():
        _install_adapter(model, snapshot, stored)
        return
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
    wanted = own.keys() - _shared(own, aliases)
    twice = [
        prefix
        for prefix in (prefixes(stored, wanted) if missing else ())
        if all(stored[prefix + name].shape == own[name].shape for name in wanted)
    ]
    if len(twice) > 1:
        raise InputError(
            f"{snapshot.path} holds weights of the model's names {len(twice)} times, under "
            f"{', '.join(repr(p) for p in twice[:4])}: choose with --key {twice[0][:-1]}"
        )
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
            _copy(target, tensor, name, snapshot)


def _install_adapter(model: nn.Module, snapshot: Snapshot, stored: Mapping[str, Tensor]) -> None:
    """Copy an adapter's weights into PEFT's model, whose base keeps its own."""
    names, wanted = adapters.own_names(model, stored)
    if missing := sorted(wanted - stored.keys()):
        raise InputError(
            f"{snapshot.path} has no weight {missing[0]!r}, which the adapter has ({len(missing)} "
            "missing); name the right base model"
        )
    known = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, tensor in stored.items():
            target = known.get(names.get(name, ""))
            if target is None or target.shape != tensor.shape:
                raise InputError(
                    f"{snapshot.path}: {name!r} of shape {tuple(tensor.shape)} doesn't fit the "
                    "model; name the right base model"
                )
            _copy(target, tensor, name, snapshot)


def _copy(target: Tensor, tensor: Tensor, name: str, snapshot: Snapshot) -> None:
    """Copy a stored tensor, none of which may be lost on the way."""
    if tensor.is_complex() and not target.is_complex():
        raise InputError(
            f"{snapshot.path}: {name!r} holds complex numbers, in the model real ones; name the "
            "right model"
        )
    target.copy_(tensor)


def _shared(own: Mapping[str, Tensor], aliases: Mapping[str, Tensor]) -> set[str]:
    """Parameters that have another name, under which they may be stored instead."""
    counts = Counter(id(parameter) for parameter in aliases.values())
    return {name for name, parameter in own.items() if counts[id(parameter)] > 1}
