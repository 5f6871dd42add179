"""Saved optimizer states: which version they are of, and older ones in today's form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thermo_opt.errors import InputError
from thermo_opt.optim import validate
from thermo_opt.optim.kronecker.refresh import LEAST

VERSION = 6
"""From 3 on every entry of its time is there. 2: blocks by name under "blocks", and whether the
layout is decided; some entries may be missing. 1 (without a number): "units", and a limit of −1
where it is not."""

_LARGEST = 1e30
"""No count or measurement of NGD-T's comes near, and its square is still a number."""


class Leaf(bytes):
    """A dictionary that tools which walk through nested state take for one value: they would drop
    its empty lists, and refuse to fill what a new optimizer doesn't have yet. Pickled (or copied)
    it is the dictionary, so that nothing is stored twice."""

    entry: dict[str, Any]

    @classmethod
    def of(cls, entry: dict[str, Any]) -> Leaf:
        """The leaf that stands for a dictionary."""
        leaf = cls()
        leaf.entry = entry
        return leaf

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (tuple(self.entry.items()),)


def whole(torch_state: dict[str, Any], own: dict[str, Any], params: int) -> dict[str, Any]:
    """torch's dictionary with NGDT's own entry, at the top and, for tools that keep only what
    belongs to parameters (``torch.distributed.checkpoint``), with the first of ``params``."""
    step = float(own["steps"])  # of one element: those tools look for a tensor with a dimension
    state: dict[int, dict[str, Any]] = {i: {"step": torch.tensor([step])} for i in range(params)}
    state[0]["ngdt"] = Leaf.of(own)
    return {**torch_state, "state": state, "ngdt": own}


def groups(saved: Mapping[str, Any], mine: Mapping[str, Any]) -> dict[str, Any]:
    """torch's part of a saved state with the numbers of one's own parameters.

    Raises:
        InputError: when it has another number of parameter groups.
    """
    theirs, own = saved["param_groups"], mine["param_groups"]
    if len(theirs) != len(own):
        raise InputError(
            f"the saved optimizer state has {len(theirs)} parameter groups, this optimizer has "
            f"{len(own)}"
        )
    for group, like in zip(theirs, own, strict=True):
        missing = sorted(set(like) - {"params"} - set(group))
        if missing:
            raise InputError(f"a parameter group of the saved optimizer state lacks {missing[0]}")
        for name in ("lr", "weight_decay"):
            validate.number(name, group[name])
            if not abs(float(group[name])) < _LARGEST:
                raise _misread(f"a group's {name}")
        validate.fraction("momentum", group["momentum"])
    pairs = zip(theirs, own, strict=True)
    found = [{**a, "params": b["params"]} for a, b in pairs]
    validate.pools(found)
    return {"state": {}, "param_groups": found}


def read_as_written(saved: Any, now: Any, every: bool, where: str = "") -> None:
    """Hold the entry "ngdt" of a state that was loaded against what the optimizer then says.

    A value of another type or shape that was converted on the way, an entry that nobody read, a
    number out of all proportion: each would otherwise be training gone on from another state.

    Args:
        saved: a part of the entry, in today's form (`current`).
        now: the same part of the optimizer's own state.
        every: whether all entries of ``now`` must be in ``saved``; earlier versions lack some.
        where: the part's name, for refusals.

    Raises:
        InputError: naming the first part that differs.
    """
    if isinstance(now, Mapping):
        if not isinstance(saved, Mapping) or set(saved) - set(now):
            raise _misread(where)
        if every and (missing := set(now) - set(saved)):
            raise _misread(f"{where}.{min(missing)}".lstrip("."))
        for key, value in saved.items():
            read_as_written(value, now[key], every, f"{where}.{key}" if where else str(key))
    elif isinstance(now, list):
        if not isinstance(saved, list) or len(saved) != len(now):
            raise _misread(where)
        for k, (value, own) in enumerate(zip(saved, now, strict=True)):
            read_as_written(value, own, every, f"{where}[{k}]")
    elif isinstance(now, Tensor):
        fits = isinstance(saved, Tensor) and saved.shape == now.shape
        fits = fits and saved.layout == torch.strided
        if not fits or not saved.is_floating_point() or not bool(torch.isfinite(now).all()):
            raise _misread(where)
    elif isinstance(now, bool) or isinstance(saved, bool) or not isinstance(now, int | float):
        if saved is not now and (type(saved) is not type(now) or saved != now):
            raise _misread(where)
    elif not isinstance(saved, int | float) or saved != now or not abs(now) < _LARGEST:
        raise _misread(where)


def _misread(where: str) -> InputError:
    return InputError(f"the saved optimizer state is damaged: {where} can't be what was saved")


def current(state: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """The entry "ngdt" of a state in today's form.

    Raises:
        InputError: when it is not NGDT's, or of another metric or a later version.
    """
    entries = [state, *state.get("state", {}).values()]
    own = next((e["ngdt"] for e in entries if isinstance(e, dict) and "ngdt" in e), None)
    if isinstance(own, Leaf):
        own = own.entry
    if not isinstance(own, dict) or "curvature" not in own:
        raise InputError(
            "this optimizer state has no entry 'ngdt': it was saved by another optimizer"
        )
    missing = {"metric", "steps", "skipped", "calibration"} - set(own)
    if missing:
        raise InputError(f"the saved optimizer state lacks {', '.join(sorted(missing))}")
    if own["metric"] != metric:
        raise InputError(
            f"the saved state is of metric={own['metric']!r}, this optimizer has {metric!r}"
        )
    version = own.get("version", 1)
    if type(version) is not int or version < 1:
        raise InputError(f"the saved optimizer state is damaged: its version is {version!r:.40}")
    if version > VERSION:
        raise InputError(
            f"the saved optimizer state has version {version}, this release knows up to {VERSION}: "
            "update thermo-opt"
        )
    curvature = dict(own["curvature"])
    if version == 1 and "units" in curvature:
        curvature["blocks"] = curvature.pop("units")
        curvature["decided"] = curvature["limit"] != -1
        curvature["limit"] = curvature["limit"] if curvature["decided"] else None
        curvature.setdefault("damping", LEAST)
    found = {**own, "version": version, "curvature": curvature}
    for part in ("calibration", "signal", "inflation"):
        if not isinstance(own.get(part), dict | None) or own.get(part) == {}:
            raise _misread(part)
    if (calibration := own["calibration"]) is not None and "usual" in calibration:
        renamed = {"level" if k == "usual" else k: v for k, v in calibration.items()}
        found["calibration"] = renamed
    return found
