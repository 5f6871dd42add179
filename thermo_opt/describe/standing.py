"""What each number of a summary is: exact, a bound, an estimate, or unknown (§4, §9)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thermo_opt.describe.quantities import Toward, number, percent, time_of
from thermo_opt.lenses.rounding import TOLD

STANDING: dict[str, dict[str, tuple[str, str]]] = {
    "outputs": {
        "duration": ("exact", "exact"),
        "loss_start": ("exact", "exact"),
        "loss_end": ("exact", "exact"),
        "distance": ("exact", "exact"),
        "least_distance": ("exact", "exact"),
        "irreducible": ("exact", "exact"),
        "dissipation": ("exact", "at least"),
        "length": ("exact", "at least"),
        "detour": ("exact", "at least"),
        "pacing": ("exact", "estimate"),
        "straightness": ("exact", "at most"),
        "steadiness": ("exact", "estimate"),
        "efficiency": ("exact", "at most"),
        "alignment": ("estimate", "unknown"),
        "alignment_lower": ("at least", "unknown"),
        "alignment_upper": ("at most", "unknown"),
        "downhill_lower": ("at least", "unknown"),
        "downhill_upper": ("at most", "unknown"),
        "uphill_lower": ("at least", "unknown"),
        "uphill_upper": ("at most", "unknown"),
        "alignment_lower_rest": ("at least", "unknown"),
        "displacement_alignment": ("unknown", "estimate"),
    },
    "parameters": {
        "duration": ("exact", "exact"),
        "loss_start": ("exact", "exact"),
        "loss_end": ("exact", "exact"),
        "distance": ("exact", "exact"),
        "least_distance": ("exact", "exact"),
        "irreducible": ("exact", "exact"),
        "dissipation": ("estimate", "unknown"),
        "length": ("estimate", "unknown"),
        "detour": ("estimate", "unknown"),
        "pacing": ("estimate", "unknown"),
        "straightness": ("estimate", "unknown"),
        "steadiness": ("estimate", "unknown"),
        "efficiency": ("estimate", "unknown"),
        "alignment": ("estimate", "unknown"),
        "alignment_lower": ("at least", "unknown"),
        "alignment_upper": ("at most", "unknown"),
        "downhill_lower": ("at least", "unknown"),
        "downhill_upper": ("at most", "unknown"),
        "uphill_lower": ("at least", "unknown"),
        "uphill_upper": ("at most", "unknown"),
        "alignment_lower_rest": ("unknown", "unknown"),
        "displacement_alignment": ("unknown", "estimate"),
    },
    "counterfactual": {},
    "optimizer-state": {
        "duration": ("exact", "exact"),
        "loss_start": ("estimate", "estimate"),
        "loss_end": ("estimate", "estimate"),
        "adam_alignment_lower": ("estimate", "unknown"),
        "adam_alignment_upper": ("estimate", "unknown"),
        "adam_straightness_lower": ("estimate", "estimate"),
        "adam_straightness_upper": ("estimate", "estimate"),
        "adam_steadiness_lower": ("estimate", "estimate"),
        "adam_steadiness_upper": ("estimate", "estimate"),
    },
}
"""Lens → quantity → what its number is of the whole run: where every optimizer step was recorded,
and where snapshots are sparser.

``exact``: on the probe, in the precision of the predictions. ``at least``, ``at most``: a certified
bound. ``estimate``: neither. ``unknown``: null. Keys that aren't listed are facts of the record, or
unknown to the lens. A path of one interval has no detour, pacing, straightness, steadiness or
efficiency: unknown."""

EXACT_OF_SKETCHES = {"duration", "loss_start", "loss_end", "least_distance"}
"""What sketched predictions (§13) leave as it is; all else becomes an estimate."""

_ROUNDED = {
    "dissipation",
    "length",
    "detour",
    "pacing",
    "straightness",
    "steadiness",
    "efficiency",
}
"""What rounding of the outputs changes: sums over steps, however small each of them is (§4)."""

_SIGNS = {"at least": "≥ ", "at most": "≤ ", "estimate": "≈ "}


def standing(summary: Mapping[str, Any], key: str) -> str:
    """What the number of a summary's key is: ``exact``, ``at least``, ``at most``, ``estimate``, or
    ``unknown`` where there is none (`STANDING`)."""
    if summary.get(key) is None:
        return "unknown"
    full, sparse = STANDING[str(summary["lens"])].get(key, ("exact", "exact"))
    if summary.get("sketch") is not None and key not in EXACT_OF_SKETCHES:
        return "estimate"
    if key in _ROUNDED and rounded(summary):
        return "estimate"
    if full in ("at least", "at most") and summary["duration"] is None:
        return "estimate"  # the parameter lens looked at some intervals, spread over the run
    return full if summary["every_step"] else sparse


def rounded(summary: Mapping[str, Any]) -> bool:
    """Whether so much of a run's dissipation is rounding that printed digits change."""
    return (summary.get("rounding") or 0.0) >= TOLD


def share_with_standing(summary: Mapping[str, Any], key: str) -> str:
    """A share of a summary as a percentage, with ≥, ≤ or ≈ before a bound or an estimate."""
    if summary.get(key) is None:
        return "–"
    said = standing(summary, key)
    return _SIGNS.get(said, "") + percent(summary[key], toward_of(said))


def with_standing(summary: Mapping[str, Any], key: str) -> str:
    """A summary's number as a person reads it, with ≥, ≤ or ≈ before a bound or an estimate; the
    ends of a bracket are named as such already."""
    if key == "clock":
        return time_of(summary)
    named = key.endswith(("_lower", "_upper", "_rest"))
    said = standing(summary, key)
    toward = toward_of(said)
    if named and not key.startswith("adam_"):  # Adam's are ranges of estimates, no brackets (§9)
        toward = "up" if key.endswith("_upper") else "down"
    return ("" if named else _SIGNS.get(said, "")) + number(summary.get(key), toward=toward)


def toward_of(said: str) -> Toward | None:
    """The way in which a number of this standing may be rounded; None for the nearest."""
    ways: dict[str, Toward] = {"at least": "down", "at most": "up"}
    return ways.get(said)
