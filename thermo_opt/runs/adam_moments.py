"""What an optimizer's state says: its settings and Adam's moments, by parameter name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

_LONGEST = 200
"""Letters of a text, or numbers of a list, among an optimizer's settings."""
_LARGEST = 2**63


def adam_moments(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Adam's raw moments ``exp_avg/<name>`` and ``exp_avg_sq/<name>`` with their step and betas;
    nothing if there are none.

    ``names``: id of a parameter → its name. Parameters whose own step count differs from the most
    advanced are left out: their bias correction would be another. Moments that aren't of the
    parameter's shape (factored, quantised) are left out too.
    """
    found: list[tuple[int, str, Tensor, Tensor, tuple[float, float]]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            first, second = state.get("exp_avg"), state.get("exp_avg_sq")
            if (
                not isinstance(first, Tensor)
                or not isinstance(second, Tensor)
                or id(parameter) not in names
            ):
                continue
            if (
                first.shape != parameter.shape
                or second.shape != parameter.shape
                or "betas" not in group
            ):
                continue
            betas = float(group["betas"][0]), float(group["betas"][1])
            found.append(
                (
                    int(state.get("step", group.get("step", 0))),
                    names[id(parameter)],
                    first,
                    second,
                    betas,
                )
            )
    if not found:
        return {}, None
    step = max(entry[0] for entry in found)
    tensors = {}
    for own, name, first, second, _ in found:
        if own == step:
            tensors[f"exp_avg/{name}"], tensors[f"exp_avg_sq/{name}"] = first, second
    return tensors, {"step": step, "betas": found[0][4]}


def optimizer_settings(param_groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """JSON-able settings of an optimizer's ``param_groups``: those all groups share, and ``groups``
    with the others where there are several groups.
    """
    groups = [
        {
            key: plain
            for key, value in group.items()
            if key != "params" and (plain := _setting(value)) is not None
        }
        for group in param_groups
    ]
    shared = {
        key: value
        for key, value in groups[0].items()
        if all(group.get(key) == value for group in groups)
    }
    if len(groups) > 1:
        shared["groups"] = [
            {key: value for key, value in group.items() if key not in shared} for group in groups
        ]
    return shared


def _setting(value: Any) -> Any:
    """A setting as JSON has it, None where it isn't a number, text, or a short list of them."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, tuple | list):
        parts = [_setting(part) for part in value[:_LONGEST] if not isinstance(part, tuple | list)]
        return None if len(parts) < len(value) or any(part is None for part in parts) else parts
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) <= _LARGEST else None
    if isinstance(value, str):
        return value[:_LONGEST]
    return value if isinstance(value, float) and math.isfinite(value) else None
