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
TOLD = 0.005
"""Share of rounding in a dissipation from which on it changes the digits that are printed."""
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


def feigned(a: np.ndarray, floor: np.ndarray, tau: np.ndarray) -> float | None:
    """The share of a path's dissipation that rounding feigns, Σ a₀/2τ over Q; None where nothing
    moved or the floor is unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        spent, feigns = np.sum(a / tau), np.sum(floor / tau)
    if not (np.isfinite(spent + feigns) and spent > 0):
        return None
    return float(min(feigns / spent, 1.0))


def rounding_notes(a: np.ndarray, floor: np.ndarray, dtype: str, share: float | None) -> list[str]:
    """A sentence where intervals lie at the floor, or much of the dissipation is rounding."""
    below = int((a < ABOVE * floor).sum())
    much = share is not None and share >= TOLD
    if not (below or much) or not np.any(a > 0):
        return []
    said = (
        f"the outputs were computed in {dtype}: rounding feigns a squared length of "
        f"{float(np.median(floor)):.2g} nats per step"
    )
    if below:
        said += (
            f", and of {len(a)} intervals {below} {'lies' if below == 1 else 'lie'} within "
            f"{ABOVE:g} times that: alignment is not told there"
        )
    if much and share is not None:
        said += (
            f"; about {100 * share:.2g}\u00a0% of the dissipation is rounding, and with it of the "
            "detours"
        )
    return [said]
