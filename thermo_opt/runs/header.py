"""run.json: what the Recorder says of a training, once, at its start."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from thermo_opt import __version__, arguments
from thermo_opt.errors import InputError
from thermo_opt.runs.adam_moments import optimizer_settings
from thermo_opt.runs.format import SCHEMA_VERSION


def described(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    model_factory: str | None,
    **known: Any,
) -> dict[str, Any]:
    """The contents of run.json.

    Args:
        model: whose parameters are listed: name, shape, dtype, trainable; and other names of tied
            ones.
        optimizer: whose class and settings are named.
        model_factory: ``package.module:factory`` of the architecture.
        known: further entries, None where nothing is known.
    """
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    return {
        "schema_version": SCHEMA_VERSION,
        "thermo_opt": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "optimizer": type(optimizer).__name__,
        "settings": optimizer_settings(optimizer.param_groups),
        "model": model_factory,
        "parameters": [
            {
                "name": key,
                "shape": list(p.shape),
                "dtype": str(p.dtype).removeprefix("torch."),
                "trainable": p.requires_grad,
            }
            for key, p in model.named_parameters()
        ],
        "tied": {
            key: names[id(p)]
            for key, p in model.named_parameters(remove_duplicate=False)
            if key != names[id(p)]
        },
        **known,
    }


def encoded(content: Mapping[str, Any]) -> bytes:
    """As it is written; raises `InputError` where the user's notes aren't JSON."""
    try:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        return arguments.text(text).encode() + b"\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"notes can't be written as JSON ({error}); give plain finite values"
        ) from None
