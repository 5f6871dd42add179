"""Calling models: what they take, what they return, how to run one without a trace, where its
factory is found.

Everything that runs somebody's model comes through here: metrics, replay, the Recorder's probes,
NGD-T.
"""

from __future__ import annotations

import importlib
import os
import random
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from thermo_opt import workers
from thermo_opt.errors import InputError

STOCHASTIC = (nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm)
"""Modules whose training mode makes an example's output depend on chance or on the other
examples."""


def mixes_examples(model: nn.Module) -> bool:
    """Whether an example's output depends on the others or on chance (Dropout, BatchNorm in
    training mode)."""
    return any(m.training and isinstance(m, STOCHASTIC) for m in model.modules())


# ---- what goes in and what comes out


def outputs_of(result: Any) -> Tensor:
    """The tensor of predictions in what a model returned.

    A tensor is taken as it is. Of a dictionary or an object (such as transformers' ModelOutput),
    ``logits``; else ``start_logits`` and ``end_logits`` (question answering), as two predictions
    per example (n, 2, t); else the only tensor there is. Of a tuple, the first tensor that isn't a
    scalar, which would be a loss.

    Raises:
        InputError: nothing of the kind is there, or several tensors that might be meant; names
            them.
    """
    if isinstance(result, Tensor):
        return result
    if isinstance(result, tuple | list):
        for part in result:
            if isinstance(part, Tensor) and part.dim() > 0:
                return part
        raise _no_outputs(f"a {type(result).__name__} without a tensor of predictions")
    get = result.get if isinstance(result, Mapping) else lambda name: getattr(result, name, None)
    if isinstance(logits := get("logits"), Tensor):
        return logits
    ends = get("start_logits"), get("end_logits")
    if isinstance(ends[0], Tensor) and isinstance(ends[1], Tensor):
        return torch.stack([ends[0], ends[1]], dim=1)
    if not isinstance(result, Mapping):
        raise _no_outputs(type(result).__name__)
    tensors = [value for value in result.values() if isinstance(value, Tensor) and value.dim() > 0]
    if len(tensors) == 1:
        return tensors[0]
    raise _no_outputs(f"a dictionary with {', '.join(map(repr, result)) or 'nothing'}")


def _no_outputs(what: str) -> InputError:
    return InputError(
        f"the model returned {what}; it must return a tensor, a tuple that starts with one, or a "
        "dictionary or object with 'logits'"
    )


def arguments_of(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the call: a mapping is passed by name, a tuple or list by position,
    anything else alone."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def call(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(**inputs)``, ``model(*inputs)`` or ``model(inputs)``, by the kind of ``inputs``."""
    args, kwargs = arguments_of(inputs)
    return model(*args, **kwargs)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter or buffer lies; the CPU for a model without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


# ---- trees of tensors


def map_leaves(tree: Any, function: Callable[[Any], Any]) -> Any:
    """A tree of the same structure (mappings, tuples, lists) with ``function`` of all else."""
    if isinstance(tree, Mapping):
        return {key: map_leaves(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [map_leaves(value, function) for value in tree]
        # A named tuple's own constructor may ask for more than its fields (PackedSequence).
        make = getattr(type(tree), "_make", type(tree))
        return make(parts)
    return function(tree)


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """A tree of the same structure (mappings, tuples, lists) with ``function`` of every tensor."""
    return map_leaves(tree, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    map_tensors(tree, found.append)
    return found


def example_count(inputs: Any) -> int:
    """n, the length of the first tensor that has a first dimension."""
    sized = [t for t in tensors_in(inputs) if t.dim() > 0]
    if not sized:
        raise InputError("the batch's inputs hold no tensor with a first dimension of examples")
    if sized[0].shape[0] == 0:
        raise InputError("the batch is empty")
    return int(sized[0].shape[0])


def is_batched(tensor: Tensor, examples: int) -> bool:
    """Whether the tensor's first dimension counts the examples; other tensors are passed whole to
    every part."""
    return tensor.dim() > 0 and tensor.shape[0] == examples


def slice_inputs(inputs: Any, start: int, stop: int, examples: int) -> Any:
    """Examples start … stop of the inputs."""
    return map_tensors(inputs, lambda t: t[start:stop] if is_batched(t, examples) else t)


# ---- passes that leave no trace: three purposes, of the same parts


@contextmanager
def evaluated(modules: Iterable[nn.Module], fused: bool = False) -> Iterator[None]:
    """Evaluation mode for differentiating: flags restored on leaving, random states and buffers not
    guarded.

    Attention runs on kernels that can be differentiated forwards, twice and in batches, unless
    ``fused``.
    """
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Fused attention kernels have neither forward-mode nor second derivatives, nor batched
        # backward passes.
        with _evaluation_flags(modules), nullcontext() if fused else sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, after which ``model`` and all random states are exactly as
    before.

    Restores each submodule's train/eval flag, buffers (the objects and their contents), the
    attributes of modules that aren't torch's own (counters, hidden states, lists, generators; not
    what a forward changes inside other objects), and the random states of Python, NumPy and torch
    (CPU and CUDA). Cost: one copy of the buffers.
    """
    with (
        _buffers_kept(model),
        _attributes_kept(model),
        random_states_kept(),
        _evaluation_flags(model.modules()),
        torch.no_grad(),
    ):
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Every buffer is the same object with the same content after as before. Cost: one copy."""
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, content in buffers:
                module._buffers[name] = buffer
                if not _identical(buffer, content):
                    buffer.copy_(content)


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """What a user's modules keep in plain attributes is the same after as before. Torch's own
    modules (wrappers that set themselves up at their first call) are left alone."""
    restore: list[Callable[[], Any]] = []
    for module in model.modules():
        if type(module).__module__.partition(".")[0] == "torch" or not hasattr(module, "__dict__"):
            continue
        members = {name: value for name, value in vars(module).items() if name not in _OWN}
        restore += [
            undo for value in members.values() if (undo := _content_kept(value)) is not None
        ]
        restore.append(partial(_put_back, vars(module), members, _OWN))
    try:
        yield
    finally:
        for undo in restore:
            undo()


_OWN = frozenset(vars(nn.Module()))
"""What every module has, and is put back elsewhere or never changed by a forward."""


def _content_kept(value: Any) -> Callable[[], Any] | None:
    """A function that gives a plain container or a generator of random numbers its content back."""
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if type(value) is list:
        return partial(value.__setitem__, slice(None), list(value))
    if type(value) is dict:
        return partial(_put_back, value, dict(value))
    return None


def _put_back(
    members: dict[Any, Any], before: Mapping[Any, Any], others: frozenset[str] = frozenset()
) -> None:
    for name in members.keys() - before.keys() - others:
        del members[name]
    for name, value in before.items():
        if name not in members or members[name] is not value:
            members[name] = value


@contextmanager
def repeated(model: nn.Module, restore: Callable[[], None] | None = None) -> Iterator[None]:
    """A training pass once more, in the model's own mode: buffers and random states stay.

    Args:
        model: the model to be run again inside.
        restore: from `random_states` before the pass to be repeated, so that Dropout, noise and
            whatever else is random draw the same.
    """
    with _buffers_kept(model), random_states_kept():
        if restore is not None:
            restore()
        yield


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """``torch.autocast`` off in this thread, on ``device`` and wherever the model's own forward
    switches it on.

    Accelerate and Lightning Fabric wrap a model's forward so; what it returns then looks like
    float32 and isn't.
    """
    thread, enter = threading.get_ident(), torch.autocast.__enter__

    def disabled(self: torch.autocast) -> Any:
        if threading.get_ident() != thread:
            return enter(self)
        enabled, self._enabled = self._enabled, False
        try:
            return enter(self)
        finally:
            self._enabled = enabled

    torch.autocast.__enter__ = disabled  # type: ignore[method-assign]
    try:
        available = torch.amp.is_autocast_available(device.type)
        with torch.autocast(device.type) if available else nullcontext():
            yield
    finally:
        torch.autocast.__enter__ = enter  # type: ignore[method-assign]


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The random states of Python, NumPy and torch (CPU and CUDA) are the same after as before."""
    restore = random_states()
    try:
        yield
    finally:
        restore()


def random_states() -> Callable[[], None]:
    """A function that sets the random states of Python, NumPy and torch (CPU and CUDA) back to what
    they are now."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002 (users' code draws from it)
    cuda = (
        torch.cuda.get_rng_state_all()
        if torch.cuda.is_available() and torch.cuda.is_initialized()
        else None
    )

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return restore


@contextmanager
def _evaluation_flags(modules: Iterable[nn.Module]) -> Iterator[None]:
    flags = [(module, module.training) for module in modules]
    try:
        for module, flag in flags:
            if flag:
                _set_training(module, False)
        yield
    finally:
        for module, flag in flags:
            if module.training is not flag:
                _set_training(module, flag)


def _set_training(module: nn.Module, mode: bool) -> None:
    """The module's own flag, not its children's; past ``nn.Module.__setattr__``, which takes ten
    times as long, and past ``train()``, which user modules override with side effects."""
    if "training" in vars(module):
        vars(module)["training"] = mode
    else:  # a scripted module keeps it elsewhere
        module.training = mode


def _identical(a: Tensor, b: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) and torch.equal(
        torch.isnan(a), torch.isnan(b)
    )


# ---- factories


def load_factory(spec: Any, what: str) -> Any:
    """What ``package.module:factory`` names, imported because the user asked for it by name.

    A module that is not installed is looked for in the current folder (`working_directory_last`),
    which is on ``sys.path`` no longer than the import lasts. Call what is returned in the same
    context, since it may import more.

    Args:
        spec: the text ``package.module:factory``.
        what: the option it was given for, named in refusals.

    Returns:
        The attribute, usually a callable.

    Raises:
        InputError: another form, no such module or name, or a module that fails while it is
            imported.
    """
    module, _, name = spec.partition(":") if isinstance(spec, str) else ("", "", "")
    if not module or not name:
        raise InputError(f"{what} {spec!r} isn't of the form package.module:factory")
    try:
        with working_directory_last():
            return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the user's module may fail in any way
        raise InputError(
            f"{what} {spec!r} can't be imported ({type(error).__name__}: {error})"
        ) from None


@contextmanager
def working_directory_last() -> Iterator[None]:
    """The current folder is the *last* place on ``sys.path`` inside, and as before afterwards.

    For code that the user named, and for nothing else: a file lying there can neither stand in for
    an installed module nor, later, for an optional one that isn't installed. What was imported
    from there is sent to other processes by value, since they don't look there.
    """
    here = os.getcwd()
    if here in sys.path:
        yield
        return
    before = set(sys.modules)
    sys.path.append(here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        with suppress(ValueError):  # the user's module may have changed the path itself
            sys.path.remove(here)
        for name in set(sys.modules) - before:
            place = os.path.join(here, name.partition(".")[0])
            file = getattr(sys.modules[name], "__file__", None) or ""
            if file == place + ".py" or file.startswith(place + os.sep):
                workers.send_by_value(sys.modules[name])
