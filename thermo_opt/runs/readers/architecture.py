"""Hugging Face architectures: built by the installed `transformers` from a ``config.json``, and
weights by its names.

Only classes of the library itself are built, from settings whose size fits the weights at hand;
nothing that a checkpoint ships is imported. transformers renames and merges some architectures'
weights on saving (ViT, GPT-NeoX, mixtures of experts …); what its own ``from_pretrained`` makes of
them again is what a replay needs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError, first_line
from thermo_opt.runs.border import JSON_LIMIT, parse_json, read_bytes, read_json
from thermo_opt.runs.readers import folders
from thermo_opt.runs.readers.common import Order, Shape, Weights

_REMEDY = "give --model package.module:factory"
_LARGEST = 1 << 20
"""Sizes in a config up to this are believed whatever the weights say: vocabularies, positions."""
_SMALL = 1 << 24
"""Parameters up to which a model may be built, however small the files beside its config."""


def architectures(config: Mapping[str, Any]) -> list[str]:
    """Names of the architectures in a config."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def model_from_config(config_path: Path) -> nn.Module:
    """The architecture that a ``config.json`` names, with fresh weights, built by the installed
    `transformers` alone.

    Raises `InputError` when transformers is missing or doesn't have it, or when the config asks for
    a model that is out of proportion to the checkpoint beside it; code shipped with a checkpoint is
    never run.
    """
    kind, config = _architecture(config_path, read_json(config_path))
    _refuse_huge(config_path, _parameters_of(_built(config_path, kind, config, "meta")))
    return _built(config_path, kind, config, "cpu")


def _built(config_path: Path, kind: Any, config: Any, device: str) -> nn.Module:
    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            model: nn.Module = kind(config)
    except Exception as error:  # each architecture checks its settings in its own way
        raise InputError(
            f"{config_path}: {kind.__name__} can't be built from it ({first_line(error)}); "
            f"restore the file, or {_REMEDY}"
        ) from None
    return model


def _parameters_of(model: nn.Module) -> int:
    return sum(tensor.numel() for tensor in model.parameters())


def _refuse_huge(config_path: Path, parameters: int) -> None:
    if parameters <= _SMALL:
        return
    stored = sum(file.stat().st_size for file in config_path.parent.iterdir() if file.is_file())
    if parameters > 8 * stored:
        raise InputError(
            f"{config_path}: its model would have {parameters:,} parameters, though the files "
            f"beside it have {stored:,} bytes; restore the config, or {_REMEDY}"
        )


def _architecture(config_path: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """The class that a config names and its own config object, of sizes that a model may have."""
    try:
        import transformers
    except ImportError:
        raise InputError(
            f"{config_path}: building the model needs transformers; pip install "
            "'thermo-opt[transformers]'"
        ) from None
    kind, names = str(config.get("model_type")), architectures(config)
    try:
        architecture = getattr(transformers, names[0], None) if names else None
    except Exception as error:  # one of the libraries that this architecture needs is broken
        raise InputError(
            f"{config_path}: transformers can't import {names[0]} here ({first_line(error)}); "
            f"{_REMEDY}"
        ) from None
    if kind not in transformers.CONFIG_MAPPING or not (
        isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    ):
        raise InputError(
            f"{config_path} names an architecture ({names[0] if names else kind}) that the "
            "installed transformers lacks; "
            f"{_REMEDY}"
        )
    for key, size in _sizes(config):
        limit = (
            4096
            if any(word in key for word in ("layer", "depth", "expert", "block", "head"))
            else _LARGEST
        )
        if abs(size) > limit:
            raise InputError(
                f"{config_path}: {key} is {size:.6g}, which no model has; restore the file, or "
                f"{_REMEDY}"
            )
    try:
        return architecture, transformers.CONFIG_MAPPING[kind].from_dict(config)
    except Exception as error:  # as above
        raise InputError(
            f"{config_path} can't be read as a config ({first_line(error)}); {_REMEDY}"
        ) from None


def _sizes(config: Any, key: str = "", depth: int = 8) -> Iterator[tuple[str, int]]:
    """The whole numbers of a config with their keys."""
    if isinstance(config, bool) or depth == 0:
        return
    if isinstance(config, int) and not key.endswith(
        ("_id", "_ids", "_token", "seed", "max_length", "_theta")
    ):
        yield key, config
    elif isinstance(config, dict):
        for name, value in config.items():
            yield from _sizes(value, str(name), depth - 1)
    elif isinstance(config, list):
        for value in config:
            yield from _sizes(value, key, depth - 1)


@dataclass(frozen=True)
class _Own:
    """An architecture's names: of its parameters, of all its state, and patterns of what it ignores
    in files; the orders in which the Trainer may give its parameters to an optimizer; its size.
    """

    parameters: tuple[str, ...]
    state: frozenset[str]
    ignored: tuple[str, ...]
    orders: list[Order]
    size: int


@lru_cache(maxsize=4)
def _own_of(content: bytes) -> _Own | None:
    """The names of the architecture in a config of this content: all checkpoints of a run share it.

    None where it can't be built.
    """
    try:
        path = Path("config.json")
        config = parse_json(content)
        if not isinstance(config, dict):
            return None
        model = _built(path, *_architecture(path, config), "meta")
    except (InputError, ValueError, RecursionError):
        return None
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return _Own(
        tuple(name for name, _ in model.named_parameters()),
        frozenset(model.state_dict()),
        tuple(ignored),
        _orders(model),
        _parameters_of(model),
    )


def _own(config_path: Path) -> _Own | None:
    """The names of the architecture in a config; None where it can't be built."""
    try:
        own = _own_of(read_bytes(config_path, JSON_LIMIT))
        if own is not None:
            _refuse_huge(config_path, own.size)
    except InputError:
        return None
    return own


def in_memory(folder: Path, config_path: Path, key: str | None = None) -> Weights:
    """A checkpoint's weights under the names and in the shapes that its architecture has in memory.

    They are the file's own where those fit; else what `transformers` converts them to. Where the
    architecture can't be built, or lacks weights even so, the file's own are given.
    """
    stored = folders.weights_of(folder, key)()
    own = _own(config_path)
    if own is None:
        return stored
    names = stored.layouts.keys()
    if set(own.parameters) <= names:
        extra = {
            n for n in names - own.state if any(re.search(pattern, n) for pattern in own.ignored)
        }
        return _Selected(stored, extra) if extra else stored
    modified = max(file.stat().st_mtime_ns for file in folder.iterdir())
    return _converted(folder, config_path, key, modified) or stored


class _Selected:
    """Weights but for those that the architecture ignores, as `Weights`."""

    def __init__(self, stored: Weights, without: set[str]) -> None:
        self._stored, self._without = stored, without

    @property
    def layouts(self) -> Mapping[str, tuple[Shape, torch.dtype]]:
        """Shape and dtype of each tensor."""
        return {
            name: layout
            for name, layout in self._stored.layouts.items()
            if name not in self._without
        }

    def load(self, name: str) -> Tensor:
        """One of them, mapped."""
        return self._stored.load(name)


class _Converted:
    """Weights as `transformers` loaded them, as `Weights`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self.layouts = {
            name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()
        }

    def load(self, name: str) -> Tensor:
        """One of them."""
        return self._tensors[name]


@lru_cache(maxsize=2)
def _converted(
    folder: Path, config_path: Path, key: str | None, modified: int
) -> _Converted | None:
    """What the library's own loading makes of a checkpoint's weights; None where it finds some
    missing.
    """
    kind, config = _architecture(config_path, read_json(config_path))
    stored = folders.weights_of(folder, key)()
    tensors = {name: stored.load(name) for name in stored.layouts}
    try:
        with torch.random.fork_rng(devices=[]), _quiet():
            model, report = kind.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True
            )
    except Exception:  # as in model_from_config: then the file's own names are all there is
        return None
    if report["missing_keys"] or report["mismatched_keys"]:
        return None
    return _Converted(
        {
            name: tensor.detach()
            for name, tensor in {**dict(model.named_parameters()), **_buffers(model)}.items()
        }
    )


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    persistent = model.state_dict().keys()
    return {name: tensor for name, tensor in model.named_buffers() if name in persistent}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the library's progress bars and reports, and without a look at the network."""
    import transformers

    level, bars = (
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _orders(model: nn.Module) -> list[Order]:
    names = [name for name, _ in model.named_parameters()]
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim >= 2}

    def split(first: set[str]) -> Order:
        return [
            [name for name in names if name in first],
            [name for name in names if name not in first],
        ]

    found = [split(matrices), [names]]
    try:
        from transformers import Trainer

        decayed = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
    except ImportError:
        return found
    return [split(decayed), *found]


def trainer_orders(config_path: Path) -> list[Order] | None:
    """Orders in which the Trainer may have given the architecture's parameters to its optimizer
    (decayed, then not); None: it can't be built.
    """
    own = _own(config_path)
    return None if own is None else own.orders
