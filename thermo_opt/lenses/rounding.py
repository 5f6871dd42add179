"""The rounding floor of a run's outputs, below which a move has neither direction nor exponent
(theory §4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from thermo_opt import likelihoods
from thermo_opt.lenses.predictions import Predictions, array_of
from thermo_opt.manifold.precision import ABOVE, computed_dtype, rounding_floor

_ELEMENTS = 1 << 21
"""Outputs of classes whose rounding is looked at, in whole rows: it hardly differs among rows."""
_LOOKED_AT = 9
"""Snapshots whose floor is computed; between them it is interpolated."""


def floors(source: Predictions, indices: Sequence[int]) -> tuple[np.ndarray, str]:
    """a₀ at the start of each interval (nats), and the dtype in which the outputs were computed."""
    known = source.known_floor(indices[0])
    chosen = np.unique(np.linspace(0, len(indices) - 1, _LOOKED_AT).round().astype(int))
    if known is not None:
        values = [source.known_floor(indices[k]) or 0.0 for k in chosen]
        return np.interp(np.arange(len(indices) - 1), chosen, values), "their dtype"
    dtype, values = "", []
    for k in chosen:
        outputs = source.outputs(indices[k])
        array = likelihoods.parameters_last(source.likelihood, array_of(outputs), source.targets)
        if source.likelihood == "categorical":
            array = array.reshape(-1, array.shape[-1])[: max(1, _ELEMENTS // array.shape[-1])]
        if not dtype:
            dtype = computed_dtype(array, str(outputs.dtype).removeprefix("torch."))
        if not np.isfinite(array).all():
            values.append(np.nan)
            continue
        values.append(rounding_floor(array, dtype, source.likelihood, source.sigma2, source.kind))
    return np.interp(np.arange(len(indices) - 1), chosen, values), dtype


def rounding_notes(a: np.ndarray, floor: np.ndarray, dtype: str) -> list[str]:
    """A sentence where intervals lie at the floor."""
    below = int((a < ABOVE * floor).sum())
    if not below or not np.any(a > 0):
        return []
    return [
        f"the outputs were computed in {dtype}: rounding feigns a squared length of "
        f"{float(np.median(floor)):.2g} nats per step, and of {len(a)} intervals {below} "
        f"{'lies' if below == 1 else 'lie'} within {ABOVE:g} times that: alignment is not told "
        "there, and lengths are partly rounding"
    ]
