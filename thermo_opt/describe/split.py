"""Noise apart from progress in words: a split's names, meanings and sentences (theory §11)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thermo_opt.describe.quantities import Quantity, number, percent

SPLIT = (
    Quantity(
        "noise",
        "",
        "Noise",
        "nats",
        "What minibatches scatter: the part of each step that another minibatch would have made "
        "otherwise. Step clock.",
        "½ tr Cov(δ)",
    ),
    Quantity(
        "drift",
        "",
        "Drift",
        "nats",
        "What the expected steps dissipate: transport and housekeeping.",
        "½ |E δ|²",
    ),
    Quantity(
        "transport",
        "",
        "Transport",
        "nats",
        "The part of the drift that goes somewhere: what of the motion lasts.",
        "½ ⟨δ, δ′⟩ of steps far apart",
    ),
    Quantity(
        "transport_lag",
        "",
        "Transport’s lag",
        "steps",
        "How far apart the steps are whose common motion is the transport; 1 for neighbours.",
    ),
    Quantity(
        "housekeeping",
        "",
        "Housekeeping",
        "nats",
        "The rest of the drift: it undoes earlier noise, or (at a lag above 1) turned elsewhere.",
        "drift − transport",
    ),
    Quantity(
        "critical_batch",
        "B*",
        "Critical batch size",
        "loss terms",
        "Where noise costs as much as drift: below it a larger batch saves about as many steps, "
        "above it examples are wasted. Of optimizers without momentum.",
        "B · noise / drift",
    ),
)
"""Quantities of ``summary["split"]``, each beside its ``_error``, one standard error."""


def with_error(split: Mapping[Any, Any] | None, key: str) -> str:
    """A part with its standard error, where it has one, as a person reads it; "–" where it isn't
    told."""
    value = (split or {}).get(key)
    if value is None:
        return "–"
    error = (split or {}).get(f"{key}_error") or 0.0
    return f"{number(value)} ± {number(error, 2)}" if error > 0 else number(value)


def sentences(summary: Mapping[str, Any]) -> list[str]:
    """The split in two or three sentences; none where no replicas were recorded."""
    split, total = summary["split"], summary["dissipation"]
    if split is None or not split["replicas"] or not total:
        return []
    share = _share(split)
    said = (
        f"Step by step, {with_error(split, 'noise')} nats ({share}) are noise, the scatter of "
        f"minibatches, and {with_error(split, 'drift')} are drift, what the expected steps "
        "dissipate"
    )
    lag = split["transport_lag"]
    if split["transport"] is None:
        said += "; how much of the drift went somewhere can’t be told"
    elif lag > 1:  # what turned or slowed down within the lag is in neither (§11)
        said += (
            f": {with_error(split, 'transport')} of it went the same way over {number(lag)} steps "
            f"and more, {with_error(split, 'housekeeping')} undid earlier noise or turned elsewhere"
        )
    else:
        said += (
            f": {with_error(split, 'transport')} of it went somewhere, "
            f"{with_error(split, 'housekeeping')} undid earlier noise"
        )
    found = [said + "."]
    if split["critical_batch"]:
        found.append(
            f"The critical batch size, where noise costs as much as drift, is about "
            f"{with_error(split, 'critical_batch')} over the run."
        )
    return found


def brief(summary: Mapping[str, Any]) -> list[str]:
    """The share of noise in one short sentence; none where no replicas were recorded."""
    split, total = summary["split"], summary["dissipation"]
    if split is None or not split["replicas"] or not total:
        return []
    said = f"Step by step, {_share(split)} of it is noise, the scatter of minibatches"
    if split["transport"] is not None:
        lag = split["transport_lag"]
        over = f" over {number(lag)} steps" if lag > 1 else ""
        said += f", and {with_error(split, 'transport')} nats went somewhere{over}"
    return [said + "."]


def _share(split: Mapping[str, Any]) -> str:
    whole = split["noise"] + split["drift"]
    return percent(max(split["noise"] / whole, 0.0)) if whole > 0 else "none"
