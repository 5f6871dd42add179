"""An audit in plain sentences, for readers who don't know the theory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thermo_opt.describe.quantities import cost_unit, number, percent
from thermo_opt.lenses.results import Audited, LensAudit

Summary = Mapping[str, Any]

LENS_WORDS = {
    "outputs": "recorded predictions",
    "parameters": "weights and model",
    "optimizer-state": "weights and optimizer state",
}


def told(audit: Audited) -> dict[str, Any]:
    """The summary that sentences are made from: the headline lens's, with the parameter lens's
    alignment if it saw all."""
    summary = audit.summary
    closer = audit.lenses.get("parameters")
    if closer is None or len(closer.steps) < len(audit.steps):
        return summary
    return summary | {
        key: closer.summary[key] for key in ("alignment", "alignment_lower", "alignment_upper")
    }


def headline(summary: Summary) -> str:
    """Where the dissipation went, in one sentence; says what is unknown rather than leave it out
    (theory §4)."""
    total = summary["dissipation"]
    shares = _shares(summary)
    if total is not None and total > 0 and shares is not None:
        amount = f"{number(total)} {cost_unit(summary['clock'])}"
        return (
            f"Of the {amount} this run dissipated, {shares[0]} was unavoidable; "
            f"{shares[1]} went into detours and {shares[2]} into uneven pacing."
        )
    if total == 0:
        return "This run dissipated nothing: its predictions never moved."
    if total is not None:
        return (
            f"This run dissipated {number(total)} {cost_unit(summary['clock'])}; "
            "how much of it was unavoidable is not known through this lens."
        )
    if summary["efficiency"] is not None:
        return (
            f"Of this run’s dissipation, {percent(summary['efficiency'])} was unavoidable; "
            "its size in nats is not known through this lens."
        )
    return "What this run dissipated, in nats, is not known through this lens."


def explanation(summary: Summary) -> list[str]:
    """Up to three more sentences: the straight path's cost, the universal frontier's, and the
    alignment."""
    said = []
    unit = cost_unit(summary["clock"])
    total, irreducible = summary["dissipation"], summary["irreducible"]
    if irreducible is not None and total:
        said.append(
            "A straight path between the same first and last predictions, walked at constant speed "
            "in the same time, "
            f"would have cost {number(irreducible)} {unit}."
        )
    least_distance, duration = summary["least_distance"], summary["duration"]
    if least_distance is not None and duration and total:
        least = least_distance**2 / (2 * duration)
        said.append(
            "To reach the same loss in that time, no optimizer and no network can pay less than "
            f"{number(least)} "
            f"{unit}, {percent(least / total)} of what this run paid."
        )
    if (
        irreducible is None
        and summary["straightness"] is not None
        and summary["steadiness"] is not None
    ):
        said.append(
            f"Its path was {percent(summary['straightness'])} straight and "
            f"{percent(summary['steadiness'])} steady."
        )
    alignment = _alignment(summary)
    if alignment:
        said.append(alignment)
    return said


def brief(summary: Summary) -> list[str]:
    """The same in one or two short sentences, for a run among others."""
    said = []
    unit = cost_unit(summary["clock"])
    total, irreducible = summary["dissipation"], summary["irreducible"]
    least_distance, duration = summary["least_distance"], summary["duration"]
    if irreducible is not None and total:
        sentence = f"The straight path costs {number(irreducible)} {unit}"
        if least_distance is not None and duration:
            sentence += (
                "; no method reaches this loss in this time for less than "
                f"{number(least_distance**2 / (2 * duration))}"
            )
        said.append(sentence + ".")
    alignment = _alignment(summary)
    return [*said, alignment] if alignment else said


def comparison(lenses: Sequence[tuple[str, LensAudit]]) -> str | None:
    """One sentence on several runs of known efficiency: which wasted least, which most; None for
    fewer than two."""
    known = [
        (name, lens.summary["efficiency"])
        for name, lens in lenses
        if lens.summary["efficiency"] is not None
    ]
    if len(known) < 2:
        return None
    best = max(known, key=lambda item: item[1])
    worst = min(known, key=lambda item: item[1])
    return (
        f"The most efficient of these {len(known)} runs is {best[0]}: {percent(best[1])} of what "
        "it dissipated was "
        f"unavoidable. The least efficient is {worst[0]}, with {percent(worst[1])}."
    )


def blind_spots(audits: Sequence[Audited]) -> list[tuple[str, str, str]]:
    """What the lenses could not see, and which could not look at all: (lens, reason, runs), like
    reasons said once."""
    found: dict[tuple[str, str], list[str]] = {}
    for audit in audits:
        for name, lens in audit.lenses.items():
            for note in _notes(lens.summary["notes"]):
                found.setdefault((name, note), []).append(audit.run)
        for name, reason in audit.missing.items():
            found.setdefault((name, f"not used: {reason}"), []).append(audit.run)
    every = len(audits)
    return [
        (lens, reason, "" if every == 1 else "all runs" if len(runs) == every else ", ".join(runs))
        for (lens, reason), runs in found.items()
    ]


def _notes(notes: Any) -> list[str]:
    if not notes:
        return []
    if isinstance(notes, str):
        return [notes]
    if isinstance(notes, Mapping):
        return [f"{key}: {reason}" for key, reason in notes.items()]
    return [str(note) for note in notes]


def _shares(summary: Summary) -> tuple[str, str, str] | None:
    values = [summary[key] for key in ("irreducible", "detour", "pacing")]
    if any(value is None for value in values) or not summary["dissipation"]:
        return None
    first, second, third = (percent(value / summary["dissipation"]) for value in values)
    return first, second, third


def _alignment(summary: Summary) -> str | None:
    value, lower, upper = (
        summary["alignment"],
        summary["alignment_lower"],
        summary["alignment_upper"],
    )
    if upper is not None and upper < 0:
        return (
            "On the whole its steps went against the natural gradient: the loss was "
            "predicted to rise."
        )
    if value is None:  # the bracket is wide: its lower end is what is worth saying
        said = lower is not None and lower > 0
        return (
            f"At least {percent(lower)} of the dissipation lay along the natural gradient."
            if said
            else None
        )
    between = ""
    if lower is not None and upper is not None and upper - lower > 0.005:
        between = f" (certified between {percent(lower)} and {percent(upper)})"
    return (
        f"{percent(value)} of the dissipation lay along the natural gradient{between}; "
        "the rest bought no first-order decrease of the loss."
    )
