"""Saved optimizer states: which version they are of, and older ones in today's form."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from thermo_opt.errors import InputError
from thermo_opt.optim.kronecker.refresh import LEAST

VERSION = 2
"""2: blocks by name under "blocks", and whether the layout is decided. 1 (without a number):
"units", and a limit of −1 where it is not."""


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
    pairs = zip(theirs, own, strict=True)
    return {"state": {}, "param_groups": [{**a, "params": b["params"]} for a, b in pairs]}


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
    return {**own, "curvature": curvature}
