"""What a checkpoint file holds: state dicts and optimizer states, wherever in its nested
dictionaries they lie.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.readers.optimizer_state import (
    OptimizerState,
    Shape,
    checked_state,
    claims_optimizer_state,
)
from thermo_opt.runs.torch_file import LazyTensor, Opaque, PlainArray, TorchFile

_DEPTH = 4
"""How deep a state dict may lie in a file: no tool nests them deeper."""
LIGHTNING_RAW = "current_model_state"
"""Where Lightning puts the weights that the optimizer moves while ``state_dict`` holds their
average."""
_USUAL = (
    LIGHTNING_RAW, "model", "state_dict", "model_state_dict", "model_state", "net",
    "network", "module", "weights", "network_weights", "params",
)  # fmt: skip
"""Keys under which a model's own state dict lies, the first preferred where a file holds several.
"""
_AVERAGES = re.compile("(?<![a-z])(ema|swa)|averag|shadow|teacher|momentum_encoder")
"""In the keys of averaged weights, their words apart (``model_ema``, not ``semantic``)."""


class StateDict:
    """One state dict of a file of `torch.save`, as `Weights`; names of one shared tensor count
    once, under the first.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, LazyTensor],
        key: str = "",
        beside: tuple[str, ...] = (),
    ) -> None:
        self.path, self.key, self.beside = path, key, beside
        self._tensors: dict[str, LazyTensor] = {}
        self.tied: dict[str, str] = {}
        first: dict[Any, str] = {}
        for name, tensor in tensors.items():
            kept = first.setdefault(tensor.identity if 0 not in tensor.shape else name, name)
            if kept == name:
                self._tensors[name] = tensor
            else:
                self.tied[name] = kept

    @property
    def tensors(self) -> Mapping[str, LazyTensor]:
        """The tensors by name."""
        return self._tensors

    @property
    def layouts(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each tensor."""
        return {name: (tensor.shape, tensor.dtype) for name, tensor in self._tensors.items()}

    def load(self, name: str) -> Tensor:
        """One of them, mapped."""
        return self._tensors[name].load()


def state_dict(file: TorchFile, key: str | None = None) -> StateDict:
    """The model's state dict in a file: the one under ``key``, or the only one, or the one under a
    usual name. Averaged weights (EMA, SWA) only where there are no others: see `is_average`.

    Raises `InputError` when there is none, or several and none has a usual name.
    """
    found = dict(_state_dicts(file.content))
    if key is not None:
        tensors = found.get(key) or _part(found, key)
        if tensors is None:
            raise InputError(
                f"{file.path} holds no state dict under {key!r}; it has "
                f"{', '.join(map(repr, found)) or 'none at all'}"
            )
        return StateDict(file.path, tensors, key)
    if not found:
        raise InputError(
            f"{file.path} holds no state dict (it is {_described(file.content)}); "
            f"{_remedy(file.content)}"
        )
    own = {name: tensors for name, tensors in found.items() if not is_average(name)} or found
    if len(own) > 1 and "averaging_state" not in _keys_of(file.content):
        own = {name: tensors for name, tensors in own.items() if name != LIGHTNING_RAW}
    usual = sorted(
        (_USUAL.index(last), name) for name in own if (last := name.split(".")[-1]) in _USUAL
    )
    if len(own) > 1 and not usual:
        raise InputError(
            f"{file.path} holds the weights of several models ({', '.join(sorted(own)[:5])}); "
            "choose one with --key"
        )
    chosen = usual[0][1] if usual else next(iter(own))
    beside = tuple(name for name in found if name != chosen)
    return StateDict(file.path, found[chosen], chosen, beside)


def _part(
    found: Mapping[str, Mapping[str, LazyTensor]], key: str
) -> Mapping[str, LazyTensor] | None:
    """The tensors whose names have ``key`` among their parts, as ``encoder_q`` of
    ``module.encoder_q.weight``, named by what follows: of the first such part; None where several
    are as near the front."""
    places = {
        (name, tensor[: f".{tensor}".index(f".{key}.") + len(key) + 1])
        for name, tensors in found.items()
        for tensor in tensors
        if f".{key}." in f".{tensor}"
    }
    nearest = min((prefix.count(".") for _, prefix in places), default=0)
    places = {place for place in places if place[1].count(".") == nearest}
    if len(places) != 1:
        return None
    name, prefix = places.pop()
    return {n.removeprefix(prefix): t for n, t in found[name].items() if n.startswith(prefix)}


def _remedy(content: Any) -> str:
    """What to do about a file that holds no state dict."""
    if isinstance(content, Opaque) and not _is_module(content):
        return "save predictions instead, with numpy.savez and the names probabilities and labels"
    inner = list(content.values()) if isinstance(content, Mapping) else []
    deeper = [part for value in inner if isinstance(value, Mapping) for part in value.values()]
    if any(isinstance(value, PlainArray) for value in (*inner, *deeper)):
        return (
            "weights in NumPy arrays are written as tensors, with torch.from_numpy and torch.save"
        )
    return "save model.state_dict(), alone or in a dictionary"


def optimizer_state(file: TorchFile) -> OptimizerState | str:
    """The optimizer's state in a file, or a sentence: there is none, or more than one."""
    found = dict(_optimizer_states(file.content))
    if not found:
        return "no optimizer state was saved with it"
    if len(found) > 1:
        names = ", ".join(sorted(found)[:4])
        return (
            f"it holds the states of {len(found)} optimizers ({names}), and which is meant isn't "
            "known"
        )
    name, raw = next(iter(found.items()))
    return checked_state(raw, f"{file.path}: {name}" if name else str(file.path))


def _state_dicts(
    tree: Any,
    path: str = "",
    depth: int = _DEPTH,
    seen: dict[int, Mapping[str, LazyTensor]] | None = None,
) -> Iterator[tuple[str, Mapping[str, LazyTensor]]]:
    """Dotted keys and tensors of each dictionary of tensors, the top one's key being empty;
    optimizers' are left out.
    """
    seen = {} if seen is None else seen
    if id(tree) in seen or depth == 0:  # a pickle may hold one object many times, or within itself
        if known := seen.get(id(tree)):
            yield path, known
        return
    seen[id(tree)] = {}
    if isinstance(tree, Opaque) and _is_module(tree):
        tensors = dict(_module_tensors(tree))
    elif isinstance(tree, Mapping) and not claims_optimizer_state(tree):
        tensors = {
            name: value
            for name, value in tree.items()
            if isinstance(name, str) and isinstance(value, LazyTensor)
        }
        if len(tensors) < len(tree) / 2 or not any(
            _is_weight(name, tensor) for name, tensor in tensors.items()
        ):
            for key, value in tree.items():
                if isinstance(key, str):
                    yield from _state_dicts(
                        value, f"{path}.{key}" if path else key, depth - 1, seen
                    )
            return
    else:
        return
    if tensors:
        seen[id(tree)] = tensors
        yield path, tensors


def _is_weight(name: str, tensor: LazyTensor) -> bool:
    return tensor.dtype.is_floating_point and (len(tensor.shape) > 0 or "." in name)


def _optimizer_states(
    tree: Any, path: str = "", depth: int = _DEPTH, seen: set[int] | None = None
) -> Iterator[tuple[str, Any]]:
    seen = set() if seen is None else seen
    if id(tree) in seen or depth == 0:
        return
    seen.add(id(tree))
    if claims_optimizer_state(tree):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _optimizer_states(
                value, f"{path}.{key}" if path else str(key), depth - 1, seen
            )
    elif isinstance(tree, list | tuple):
        for position, value in enumerate(tree):
            yield from _optimizer_states(value, f"{path}[{position}]", depth - 1, seen)


def _is_module(tree: Opaque) -> bool:
    """Whether an object that wasn't built is a pickled `torch.nn.Module`: its data say so."""
    return isinstance(tree.state, Mapping) and {"_parameters", "_buffers", "_modules"} <= set(
        tree.state
    )


def _module_tensors(
    module: Opaque, prefix: str = "", depth: int = 64
) -> Iterator[tuple[str, LazyTensor]]:
    for kind in ("_parameters", "_buffers"):
        for name, tensor in _items(module.state[kind]):
            if isinstance(tensor, LazyTensor):
                yield prefix + name, tensor
    for name, child in _items(module.state["_modules"]):
        if depth and isinstance(child, Opaque) and _is_module(child):
            yield from _module_tensors(child, f"{prefix}{name}.", depth - 1)


def _items(table: Any) -> Iterator[tuple[str, Any]]:
    return (
        ((name, value) for name, value in table.items() if isinstance(name, str))
        if isinstance(table, Mapping)
        else iter(())
    )


def _keys_of(content: Any) -> frozenset[str]:
    return (
        frozenset(key for key in content if isinstance(key, str))
        if isinstance(content, Mapping)
        else frozenset()
    )


def is_average(name: str) -> bool:
    """Whether the key of a state dict says that its weights are an average of the model's."""
    words = re.sub("(?<=[a-z])(?=[A-Z])", "_", name).lower()
    return _AVERAGES.search(words) is not None


def _described(content: Any) -> str:
    if isinstance(content, Mapping):
        keys = [str(key)[:40] for key in list(content)[:5]]
        return (
            f"a dictionary of {', '.join(keys)}{', …' if len(content) > 5 else ''}"
            if keys
            else "an empty dictionary"
        )
    if isinstance(content, LazyTensor | PlainArray):
        return f"a tensor of shape {content.shape}"
    return (
        f"an object of class {content.name}"
        if isinstance(content, Opaque)
        else f"a {type(content).__name__}"
    )
