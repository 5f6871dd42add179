"""Probes: the fixed inputs and targets on which predictions are compared, from a file, a folder,
tensors or a DataLoader.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from thermo_opt import arguments
from thermo_opt.errors import InputError
from thermo_opt.runs import remote
from thermo_opt.runs.probe_files import PROBE_SUFFIXES, read_arrays

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]

IGNORED = -100
"""Targets with this value are not counted, as in `torch.nn.functional.cross_entropy`."""
_TARGETS = ("targets", "labels", "target", "label", "y", "Y")
"""Names of targets, the first preferred."""
_INPUTS = ("inputs", "input", "x", "X", "data", "features", "images", "image")
"""Names of the one array that a model is called with."""
_ARGUMENTS = frozenset(
    [
        "input_ids",
        "attention_mask",
        "token_type_ids",
        "position_ids",
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_attention_mask",
        "pixel_values",
        "pixel_mask",
        "pixel_values_videos",
        "bool_masked_pos",
        "input_values",
        "input_features",
        "bbox",
        "image_grid_thw",
        "mask_positions",
        "mask_labels",
        "decoder_inputs_embeds",
        "decoder_position_ids",
        "encoder_outputs",
        "global_attention_mask",
        "video_grid_thw",
        "mm_token_type_ids",
        "image_sizes",
        "pixel_attention_mask",
        "input_features_mask",
        "padding_mask",
        "langs",
        "lang_ids",
        "lengths",
        "perm_mask",
        "target_mapping",
        "input_mask",
        "mc_token_ids",
        "task_type_ids",
        "entity_ids",
        "entity_attention_mask",
        "entity_token_type_ids",
        "entity_position_ids",
        "visual_feats",
        "visual_pos",
        "visual_embeds",
        "visual_attention_mask",
        "visual_token_type_ids",
        "flattened_patches",
        "image_position_ids",
        "image_attention_mask",
        "past_values",
        "past_observed_mask",
        "past_time_features",
    ]
)
"""Arguments of Hugging Face's models, passed by name; columns beside them that aren't among these
are not used.
"""
_POSITIONS = ("start_positions", "end_positions")
"""Targets of extractive question answering, two for each example."""
_CAUSAL = ("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")
_DECODERS = (
    *("Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "CpmAnt", "MBart", "Marian"),
    *("Musicgen", "MusicgenMelody", "Mvp", "PLBart", "Pegasus", "TrOCR", "Whisper"),
)
_AS_THEY_ARE = frozenset(
    [
        *(f"{family}ForCausalLM" for family in _DECODERS),
        *("FlaubertWithLMHeadModel", "XLMWithLMHeadModel", "XLNetLMHeadModel"),
    ]
)
"""Hugging Face's language models whose loss takes ``labels`` position by position, unshifted."""
CONDITIONAL = ("ForConditionalGeneration", "EncoderDecoderModel")
"""Ends of the names of Hugging Face's models that write: with an encoder, they make the decoder's
inputs of the ``labels``; without one, they shift them as causal language models do."""
_MOST = 4096
"""Examples taken from a DataLoader."""


@dataclass(frozen=True)
class Probe:
    """The fixed examples on which a run's predictions are compared: model inputs and targets (-100:
    not counted).

    Attributes:
        inputs: a tensor for ``model(inputs)``, a tuple for ``model(*inputs)``, a dict for
            ``model(**inputs)``, or None when only predictions were recorded.
        targets: what the outputs should be, or None.
        fingerprint: SHA-256 of the contents.
        remarks: sentences about arrays that were not used, or examples that were not taken.
        as_labels: whether the targets came as ``labels``, the argument that Hugging Face's models
            shift themselves.
        weights: of examples or predictions (0: not counted), or None.
    """

    inputs: Inputs | None
    targets: Tensor | None
    fingerprint: str
    remarks: tuple[str, ...] = field(default=(), compare=False)
    as_labels: bool = field(default=False, compare=False)
    weights: Tensor | None = None


def probe_tensors(
    inputs: Inputs | None, targets: Tensor | None, weights: Tensor | None = None
) -> dict[str, Tensor]:
    """A probe's tensors by the names they have in a file: ``inputs``, ``inputs/<position or key>``,
    ``targets``.
    """
    named: dict[str, Tensor] = {}
    if isinstance(inputs, Tensor):
        named["inputs"] = inputs
    elif isinstance(inputs, Mapping):
        named |= {f"inputs/{key}": value for key, value in inputs.items()}
    elif inputs is not None:
        named |= {f"inputs/{i}": value for i, value in enumerate(inputs)}
    if targets is not None:
        named["targets"] = targets
    if weights is not None:
        named["weights"] = weights
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in named.items()
    }


def make_probe(
    inputs: Inputs | None, targets: Tensor | None, weights: Tensor | None = None
) -> Probe:
    """A probe with its fingerprint: SHA-256 over names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(probe_tensors(inputs, targets, weights).items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return Probe(inputs, targets, digest.hexdigest(), weights=weights)


def load_probe(path: str | os.PathLike[str]) -> Probe:
    """Read a probe from safetensors, npz, parquet, a file of `torch.save`, or a folder of the
    `datasets` library.

    Arrays (tensors, columns) are named ``inputs`` (or ``x``) for ``model(inputs)``, ``inputs/0,
    inputs/1, …`` for ``model(*inputs)``, ``inputs/<key>`` for ``model(**inputs)``, or as the
    arguments of a Hugging Face model (``input_ids``, ``attention_mask``, ``pixel_values``, …); the
    targets ``targets``, ``labels`` or ``y``, or ``start_positions`` and ``end_positions`` of
    question answering: two targets for each example.

    Returns:
        The probe; its ``remarks`` name arrays that nothing uses.

    Raises:
        InputError: naming the file when it is missing, damaged, too large, has neither inputs nor
            targets, or no rows.
    """
    path = arguments.path("probe", path)
    if remote.is_remote(path):
        path = remote.local_copy(path)
    if not path.exists():
        raise InputError(
            f"{path}: no such probe file; give one of {', '.join(PROBE_SUFFIXES)} with inputs and "
            "targets"
        )
    return _assemble(read_arrays(path), str(path))


def as_probe(value: Any) -> Probe:
    """A probe of whatever a caller holds: a `Probe`, a path, ``(inputs, targets)``, a dictionary of
    arrays by their names, or a DataLoader, of which the first 4096 examples are taken in its order.
    Arrays may be tensors, NumPy's or lists.
    """
    if isinstance(value, Probe):
        return value
    if isinstance(value, str | os.PathLike):
        return load_probe(value)
    if isinstance(value, Mapping):
        return _assemble(_flat(value), "probe")
    if (
        isinstance(value, tuple | list)
        and len(value) == 2
        and not isinstance(value, torch.utils.data.Dataset)
    ):
        inputs, targets = value
        named = {"targets": targets} if targets is not None else {}
        return _assemble({**_flat({"inputs": inputs}), **named}, "probe")
    if isinstance(value, torch.utils.data.DataLoader):
        return _from_batches(value)
    shown = repr(value) if isinstance(value, int | float) else f"of type {type(value).__name__}"
    raise InputError(
        f"probe is {shown}; give the path of a file, (inputs, targets), a dictionary of arrays, or "
        "a DataLoader"
    )


def _flat(named: Mapping[Any, Any]) -> dict[str, Any]:
    """Arrays by name, those nested under ``inputs`` as ``inputs/<key>``."""
    flat: dict[str, Any] = {}
    for name, value in named.items():
        if isinstance(value, Mapping):
            flat |= {f"{name}/{key}": part for key, part in value.items()}
        elif isinstance(value, tuple):
            flat |= {f"{name}/{position}": part for position, part in enumerate(value)}
        else:
            flat[str(name)] = value
    return flat


def _from_batches(loader: Iterable[Any]) -> Probe:
    batches: list[dict[str, Any]] = []
    taken = 0
    for batch in loader:
        if isinstance(batch, Mapping):
            named = _flat(batch)
        elif isinstance(batch, tuple | list) and len(batch) == 2:
            named = _flat({"inputs": batch[0], "targets": batch[1]})
        elif isinstance(batch, Tensor):
            named = {"inputs": batch}
        else:
            raise InputError(
                f"probe: the DataLoader gives a {type(batch).__name__}; it must give (inputs, "
                "targets) or a dictionary"
            )
        batches.append({name: _tensor(value, "probe", name) for name, value in named.items()})
        taken += len(next(iter(batches[-1].values())))
        if taken >= _MOST:
            break
    if not batches:
        raise InputError("probe: the DataLoader is empty; give at least one example")
    try:
        joined = {
            name: torch.cat([batch[name] for batch in batches])[:_MOST] for name in batches[0]
        }
    except (RuntimeError, KeyError):
        raise InputError(
            "probe: the DataLoader's batches differ in names or shapes; pad them to one shape"
        ) from None
    probe = _assemble(joined, "probe")
    if taken >= _MOST:
        probe = replace(
            probe,
            remarks=(*probe.remarks, f"the probe is the first {_MOST} examples of the DataLoader"),
        )
    return probe


def _assemble(named: Mapping[str, Any], source: str) -> Probe:
    named, said = _with_positions(named, source)
    names = list(named)
    target = next((name for name in _TARGETS if name in named), None)
    inputs = _input_names(names, target)
    used = [*inputs, *([target] if target else []), *(["weights"] if "weights" in names else [])]
    if not inputs and target is None:
        raise InputError(
            f"{source} has neither 'inputs' nor 'targets' (it has "
            f"{', '.join(sorted(names)) or 'nothing'}); name them so, or "
            "inputs/<argument> for each argument of the model"
        )
    tensors = {name: _tensor(named[name], source, name) for name in used}
    rows = {name: len(tensor) for name, tensor in tensors.items()}
    if min(rows.values()) == 0:
        raise InputError(
            f"{source}: the probe has no rows ({min(rows, key=lambda name: rows[name])} is "
            "empty); give at least one example"
        )
    if len(set(rows.values())) > 1:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(rows.items()))
        raise InputError(
            f"{source}: the probe's tensors differ in their number of rows ({counts}); give one "
            "row per example"
        )
    unused = sorted(set(names) - set(used))
    remarks = said
    if unused:
        remarks += (f"arrays of the probe that nothing uses: {', '.join(unused[:6])}",)
    probe = make_probe(
        _gathered({name: tensors[name] for name in inputs}),
        tensors[target] if target else None,
        tensors.get("weights"),
    )
    return replace(probe, remarks=remarks, as_labels=target in ("labels", "label"))


def _with_positions(
    named: Mapping[str, Any], source: str
) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """The arrays with ``start_positions`` and ``end_positions`` as targets (n, 2), and what to say.

    Positions at and beyond the sequence's end, where an answer was cut off, aren't counted, as the
    models themselves leave them out of their loss.
    """
    if any(name in named for name in _TARGETS) or not all(name in named for name in _POSITIONS):
        return named, ()
    ends = [_tensor(named[name], source, name) for name in _POSITIONS]
    if any(end.numel() != len(end) or end.is_floating_point() for end in ends):
        raise InputError(
            f"{source}: start_positions and end_positions must be one whole number per example"
        )
    if len(ends[0]) != len(ends[1]):
        raise InputError(
            f"{source}: start_positions has {len(ends[0])} rows and end_positions {len(ends[1])}; "
            "give one of each per example"
        )
    targets = torch.stack([end.reshape(-1).long() for end in ends], dim=1)
    remarks: tuple[str, ...] = ()
    tokens = next((named[n] for n in ("input_ids", "inputs/input_ids") if n in named), None)
    if tokens is not None and (shape := _tensor(tokens, source, "input_ids").shape)[1:]:
        beyond = targets >= shape[1]
        if count := int(beyond.sum()):
            targets = targets.masked_fill(beyond, IGNORED)
            remarks = (
                f"{count} of {beyond.numel()} positions of answers lie beyond the sequence's end: "
                "not counted, as the model itself leaves them out",
            )
    kept = {name: value for name, value in named.items() if name not in _POSITIONS}
    return {**kept, _TARGETS[0]: targets}, remarks


def _input_names(names: Sequence[str], target: str | None) -> list[str]:
    """Which of the arrays are the model's inputs."""
    if "inputs" in names:
        return ["inputs"]
    keyed = [name for name in names if name.startswith("inputs/")]
    if keyed:
        return keyed
    known = [name for name in names if name in _ARGUMENTS]
    if known:
        return known
    return [name for name in _INPUTS if name in names and name != target][:1]


def _gathered(tensors: Mapping[str, Tensor]) -> Inputs | None:
    """Inputs in the form in which a model is called with them."""
    if not tensors:
        return None
    keyed = {name.removeprefix("inputs/"): tensor for name, tensor in tensors.items()}
    if len(tensors) == 1 and next(iter(tensors)) in _INPUTS:
        return next(iter(tensors.values()))
    if all(key.isdigit() for key in keyed):
        return tuple(keyed[key] for key in sorted(keyed, key=int))
    return keyed


def _tensor(array: Any, source: str, name: str) -> Tensor:
    if isinstance(array, Tensor):
        return array.detach() if array.ndim else array.detach().reshape(1)
    try:
        found = np.asarray(array)
        plain = np.ascontiguousarray(found, dtype=found.dtype.newbyteorder("="))
        return torch.from_numpy(plain if plain.flags.writeable else plain.copy())
    except (TypeError, ValueError, RuntimeError):
        raise InputError(
            f"{source}: {name!r} isn't a rectangular numeric array; make all rows the same shape"
        ) from None


def attention_mask(probe: Probe) -> Tensor | None:
    """The mask among the inputs that says which predictions are padding (0): the decoder's where
    there is one."""
    inputs = probe.inputs
    if not isinstance(inputs, Mapping):
        return None
    decodes = not {"decoder_input_ids", "decoder_inputs_embeds"}.isdisjoint(inputs)
    mask = inputs.get("decoder_attention_mask" if decodes else "attention_mask")
    return mask if isinstance(mask, Tensor) else None


def is_causal(architecture: str) -> bool:
    """Whether a Hugging Face model of that name shifts its ``labels`` by one position."""
    return architecture.endswith(_CAUSAL) and architecture not in _AS_THEY_ARE


def with_decoder_inputs(probe: Probe, model: Any) -> Probe:
    """The probe with the decoder's inputs that a Hugging Face model makes of its ``labels``, where
    there are none."""
    prepare = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    inputs = probe.inputs
    if prepare is None or probe.targets is None or not isinstance(inputs, Mapping):
        return probe
    if {"decoder_input_ids", "decoder_inputs_embeds"} & set(inputs) or not probe.as_labels:
        return probe
    made = {**inputs, "decoder_input_ids": prepare(labels=probe.targets)}
    said = "the decoder's inputs are the labels one position earlier, as the model itself has them"
    completed = make_probe(made, probe.targets, probe.weights)
    return replace(completed, remarks=(*probe.remarks, said))


def shifted_labels(probe: Probe) -> Probe:
    """The probe with the targets of a causal language model where its outputs predict them: those
    of position t are the labels of position t + 1, and the last has none. Padding (attention
    mask 0) is nothing to predict.
    """
    labels = probe.targets
    assert labels is not None
    mask = attention_mask(probe)
    if mask is not None and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORED)
    targets = torch.full_like(labels, IGNORED)
    targets[..., :-1] = labels[..., 1:]
    said = "targets are the labels one position later, as the model itself shifts them"
    shifted = make_probe(probe.inputs, targets, probe.weights)
    return replace(shifted, remarks=(*probe.remarks, said))


def wants_shift(probe: Probe) -> bool:
    """Whether a causal language model's targets are its own inputs, position by position, as its
    ``labels`` are.
    """
    tokens = probe.inputs.get("input_ids") if isinstance(probe.inputs, Mapping) else probe.inputs
    if (
        not isinstance(tokens, Tensor)
        or probe.targets is None
        or probe.targets.shape != tokens.shape
        or tokens.ndim < 2
    ):
        return False
    counted = probe.targets != IGNORED
    return probe.as_labels or bool((probe.targets == tokens)[counted].all())
