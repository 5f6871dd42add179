"""An optimizer's saved state, checked entry by entry: whose moments it holds, and what can't be
read of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.runs.border import whole
from thermo_opt.runs.torch_file import LazyTensor

Shape = tuple[int, ...]
Key = int | str
Saved = Tensor | LazyTensor

MOMENTS = ("exp_avg", "exp_avg_sq")

_OTHER_MOMENTS = (
    (
        {"exp_avg_sq_row", "exp_avg_sq_col"},
        "factored second moments (Adafactor's rows and columns)",
    ),
    ({"state1", "state2"}, "quantised moments (8-bit state1 and state2)"),
    ({"square_avg"}, "RMSprop's square_avg alone"),
    ({"sum"}, "Adagrad's sum alone"),
    ({"momentum_buffer"}, "a momentum buffer alone"),
    ({"exp_avg"}, "exp_avg alone"),
)
"""What other optimizers keep instead of Adam's moments, by the names of their entries."""


@dataclass(frozen=True)
class Entry:
    """What the state holds for one parameter: Adam's moments where they are there, and the number
    of its updates.
    """

    step: int | None
    first: Saved | None = None
    second: Saved | None = None

    @property
    def shape(self) -> Shape | None:
        """Shape of the moments, if there are any."""
        return None if self.first is None else tuple(self.first.shape)


@dataclass(frozen=True)
class Group:
    """One of the optimizer's parameter groups: its parameters in order, their names if they were
    saved, its settings.
    """

    keys: tuple[Key, ...]
    names: tuple[str, ...] | None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerState:
    """A checked optimizer state: ``entries`` by the keys under which ``groups`` list the
    parameters.
    """

    groups: tuple[Group, ...]
    entries: Mapping[Key, Entry]
    kept: frozenset[str]

    @property
    def steps(self) -> int | None:
        """Updates of the most advanced parameter; None where the optimizer doesn't count them."""
        counts = [entry.step for entry in self.entries.values() if entry.step is not None]
        return max(counts, default=None)

    @property
    def betas(self) -> tuple[float, float] | None:
        """Adam's (β1, β2), the first group's."""
        betas = self.groups[0].settings.get("betas") if self.groups else None
        return None if betas is None else (float(betas[0]), float(betas[1]))

    @property
    def without_moments(self) -> str | None:
        """Why it holds no moments of Adam, if so."""
        if any(entry.first is not None for entry in self.entries.values()):
            return None
        if not self.entries:
            return (
                "its optimizer's state is empty (saved before the first step, or by an optimizer "
                "without memory)"
            )
        other = next(
            (text for keys, text in _OTHER_MOMENTS if keys <= self.kept),
            "no exp_avg and exp_avg_sq",
        )
        return f"its optimizer keeps {other}, not Adam's exp_avg and exp_avg_sq"

    @property
    def optimizer(self) -> str | None:
        """Name of the optimizer, as far as its state tells."""
        if set(MOMENTS) <= self.kept:
            settings = self.groups[0].settings if self.groups else {}
            return "AdamW" if settings.get("decoupled_weight_decay") else "Adam"
        return "SGD" if "momentum_buffer" in self.kept else None


def checked_state(raw: Any, source: str) -> OptimizerState:
    """The state in ``raw``, an optimizer's ``state_dict()``; raises `InputError` naming ``source``
    and the entry that isn't of the type it must have. Keys are indices, or names where FSDP
    gathered the state.
    """
    if not is_optimizer_state(raw):
        raise InputError(
            f"{source} isn't an optimizer's state (a dictionary with 'state' and 'param_groups')"
        )
    groups = tuple(_group(group, source) for group in raw["param_groups"])
    listed = [key for group in groups for key in group.keys]
    if len(set(listed)) < len(listed):
        raise InputError(f"{source}: a parameter is listed twice in param_groups")
    entries: dict[Key, Entry] = {}
    kept: set[str] = set()
    for key in listed:
        entry = raw["state"].get(key)
        if entry is None:
            continue
        if not isinstance(entry, Mapping):
            raise InputError(
                f"{source}: the state of parameter {key!r} is a {type(entry).__name__}, not a "
                "dictionary"
            )
        kept |= {name for name in entry if isinstance(name, str)}
        entries[key] = _entry(entry, key, source)
    if entries and not any(entry.step is not None for entry in entries.values()):
        shared = [_count(group.settings.get("step"), "param_groups", source) for group in groups]
        if shared and shared[0] is not None:  # apex and older optimizers count in the group
            entries = {
                key: Entry(shared[0], entry.first, entry.second) for key, entry in entries.items()
            }
    return OptimizerState(groups, entries, frozenset(kept))


def is_optimizer_state(raw: Any) -> bool:
    """Whether ``raw`` looks like an optimizer's ``state_dict()``."""
    return (
        isinstance(raw, Mapping)
        and isinstance(raw.get("state"), Mapping)
        and isinstance(raw.get("param_groups"), list)
        and len(raw["param_groups"]) > 0
    )


def claims_optimizer_state(raw: Any) -> bool:
    """Whether ``raw`` has the keys of an optimizer's ``state_dict()``, whatever they hold."""
    return isinstance(raw, Mapping) and {"state", "param_groups"} <= set(raw)


def _group(group: Any, source: str) -> Group:
    if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
        raise InputError(
            f"{source}: param_groups holds a {type(group).__name__} without a list of params"
        )
    keys = tuple(group["params"])
    if not all(isinstance(key, str) or type(key) is int for key in keys):
        raise InputError(f"{source}: params of a group aren't indices or names")
    names = group.get("param_names")
    if not (
        isinstance(names, list | tuple)
        and len(names) == len(keys)
        and all(isinstance(n, str) for n in names)
    ):
        names = keys if keys and all(isinstance(key, str) for key in keys) else None
    settings = {
        str(key): value for key, value in group.items() if key not in ("params", "param_names")
    }
    betas = settings.get("betas")
    if betas is not None and not (
        isinstance(betas, list | tuple)
        and len(betas) >= 2
        and all(isinstance(beta, int | float) and 0 <= beta < 1 for beta in betas[:2])
    ):
        raise InputError(f"{source}: betas aren't two numbers of at least 0 and below 1")
    return Group(keys, None if names is None else tuple(names), settings)


def _entry(entry: Mapping[Any, Any], key: Key, source: str) -> Entry:
    first, second = (entry.get(name) for name in MOMENTS)
    step = _count(entry.get("step"), f"parameter {key!r}", source)
    if not (isinstance(first, Saved) and isinstance(second, Saved)):
        return Entry(step)
    if first.shape != second.shape:
        raise InputError(f"{source}: exp_avg and exp_avg_sq of parameter {key!r} differ in shape")
    if not (first.dtype.is_floating_point and second.dtype.is_floating_point):
        raise InputError(
            f"{source}: the moments of parameter {key!r} aren't floating-point numbers"
        )
    return Entry(step, first, second)


def _count(value: Any, whose: str, source: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, Saved):
        if tuple(value.shape) not in ((), (1,)) or value.dtype.is_complex:
            raise InputError(
                f"{source}: step of {whose} is a tensor of shape {tuple(value.shape)}, not a number"
            )
        value = (value.load() if isinstance(value, LazyTensor) else value).item()
    found = whole(value)
    if found is None:
        raise InputError(f"{source}: step of {whose} is {str(value)[:40]!r}, not a whole number")
    return found


def named(
    state: OptimizerState, shapes: Mapping[str, Shape], orders: Iterable[Sequence[Sequence[str]]]
) -> dict[str, Key] | str:
    """Name of each parameter with moments → its key, or why they can't be told.

    By the names saved in the state; else by the first of ``orders`` (for each, one list of names
    per group) into which the moments' shapes fit in exactly one way. Parameters updated less often
    than the most advanced one are left out: their bias correction is another.
    """
    if (reason := state.without_moments) is not None:
        return reason
    found = [{key: _shape(state, key) for key in group.keys} for group in state.groups]
    if all(group.names is not None for group in state.groups if group.keys):
        keys = _by_saved_names(state, shapes)
        if keys is not None:
            return _in_step(keys, state)
    for order in orders:
        if len(order) == len(found):
            keys = _assign(
                found,
                [[(name, shapes[name]) for name in group if name in shapes] for group in order],
            )
            if keys is not None:
                return _in_step(keys, state)
    if (keys := _by_shape(found, shapes)) is not None:
        return _in_step(keys, state)
    return (
        "its optimizer state doesn't name the parameters, and the moments' shapes leave more than "
        "one possibility: safetensors files are sorted by name, files of torch.save are in the "
        "optimizer's order"
    )


def _by_shape(
    found: Sequence[Mapping[Key, Shape | None]], shapes: Mapping[str, Shape]
) -> dict[str, Key] | None:
    """Names for the keys whatever their order, where no two weights have one shape."""
    names = {shape: name for name, shape in shapes.items()}
    keys = [(key, shape) for group in found for key, shape in group.items() if shape is not None]
    chosen = {names[shape]: key for key, shape in keys if shape in names}
    fits = len(names) == len(shapes) and len(chosen) == len(keys)
    return chosen if fits and chosen else None


def _shape(state: OptimizerState, key: Key) -> Shape | None:
    entry = state.entries.get(key)
    return None if entry is None else entry.shape


def _by_saved_names(state: OptimizerState, shapes: Mapping[str, Shape]) -> dict[str, Key] | None:
    """The parameters by the names in the state, if those are the weights' names and shapes (a
    wrapper's aside).
    """
    pairs = [
        (name, key)
        for group in state.groups
        for name, key in zip(group.names or (), group.keys, strict=True)
    ]
    for strip in (lambda name: name, plain_name):
        result = {strip(name): key for name, key in pairs if _shape(state, key) is not None}
        if result and all(shapes.get(name) == _shape(state, key) for name, key in result.items()):
            return result
    return None


def plain_name(name: str) -> str:
    """A parameter's name without the parts that PyTorch's wrappers add (DDP, FSDP, compile,
    checkpointing).
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


_WRAPPERS = frozenset(
    {
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_flat_param_wrapper",
    }
)


def _in_step(keys: dict[str, Key], state: OptimizerState) -> dict[str, Key]:
    most = max((state.entries[key].step or 0 for key in keys.values()), default=0)
    return {name: key for name, key in keys.items() if (state.entries[key].step or 0) == most}


def _assign(
    found: Sequence[Mapping[Key, Shape | None]], order: Sequence[Sequence[tuple[str, Shape]]]
) -> dict[str, Key] | None:
    """Names for the keys of each group, if exactly one order-preserving choice has the right
    shapes.
    """
    result: dict[str, Key] = {}
    for group, names in zip(found, order, strict=True):
        if len(group) == len(names):
            pairs = [
                (name, shape, key, own)
                for (name, shape), (key, own) in zip(names, group.items(), strict=True)
            ]
            if any(own is not None and own != shape for _, shape, _, own in pairs):
                return None
            chosen = {name: key for name, _, key, own in pairs if own is not None}
        else:
            present = [(key, shape) for key, shape in group.items() if shape is not None]
            positions = _only_embedding(
                [shape for _, shape in present], [shape for _, shape in names]
            )
            if positions is None:
                return None
            chosen = {
                names[position][0]: key
                for position, (key, _) in zip(positions, present, strict=True)
            }
        if result.keys() & chosen.keys():
            return None
        result |= chosen
    return result


def _only_embedding(part: Sequence[Shape], whole: Sequence[Shape]) -> list[int] | None:
    """Positions of ``part`` as a subsequence of ``whole``, if there is exactly one way: its
    leftmost and rightmost fits agree.
    """

    def leftmost(part: Sequence[Shape], whole: Sequence[Shape]) -> list[int] | None:
        positions: list[int] = []
        for shape in part:
            start = positions[-1] + 1 if positions else 0
            position = next((i for i in range(start, len(whole)) if whole[i] == shape), None)
            if position is None:
                return None
            positions.append(position)
        return positions

    first = leftmost(part, whole)
    last = leftmost(part[::-1], whole[::-1])
    if first is None or last is None:
        return None
    return first if first == [len(whole) - 1 - position for position in reversed(last)] else None
