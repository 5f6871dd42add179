"""The names, symbols, units and plain meanings of a summary's quantities: one list for the page and
the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any, Literal

Toward = Literal["down", "up"]

CLOCK_UNITS = {
    "step": "step",
    "epoch": "epoch",
    "flow": "unit of learning rate",
    "wall": "s",
    "examples": "example seen",
    "tokens": "token seen",
}
DURATION_UNITS = {
    "step": "steps",
    "epoch": "epochs",
    "flow": "learning rate × steps",
    "wall": "s",
    "examples": "examples seen",
    "tokens": "tokens seen",
}


@dataclass(frozen=True)
class Quantity:
    """One summary key: symbol and formula (theory's letters), unit ("clock", "cost": the run's
    clock decides), meaning."""

    key: str
    symbol: str
    name: str
    unit: str
    meaning: str
    formula: str = ""


QUANTITIES = (
    Quantity(
        "lens",
        "",
        "Lens",
        "",
        "What the audit looked at: predictions, weights, or the optimizer's own state.",
    ),
    Quantity(
        "clock",
        "",
        "Clock",
        "",
        "What counts as time: steps, learning rate, seconds, or data seen.",
    ),
    Quantity(
        "stride", "", "Stride", "steps", "Optimizer steps between audited snapshots (their median)."
    ),
    Quantity(
        "first_step",
        "",
        "First snapshot",
        "",
        "Where the audit begins; what came before is not seen.",
    ),
    Quantity("last_step", "", "Last snapshot", "", "Where the audit ends."),
    Quantity("steps", "", "Intervals", "", "Audited intervals: pairs of successive snapshots."),
    Quantity("duration", "T", "Duration", "clock", "Time the run took, on its clock.", "T = Σ τ"),
    Quantity(
        "loss_start",
        "L(0)",
        "Loss at the start",
        "nats",
        "Mean negative log-likelihood of an example.",
    ),
    Quantity(
        "loss_end", "L(T)", "Loss at the end", "nats", "Mean negative log-likelihood of an example."
    ),
    Quantity(
        "dissipation",
        "Q",
        "Dissipation",
        "cost",
        "What the path cost. With the clock “step”, a step’s dissipation is, to second order, how "
        "far it moved the "
        "predictions, as a Kullback–Leibler divergence per example.",
        "Q = Σ a / 2τ",
    ),
    Quantity(
        "irreducible",
        "D²/2T",
        "Irreducible",
        "cost",
        "The part no path between the same two predictions could have saved in the same time.",
        "D² / 2T",
    ),
    Quantity(
        "detour",
        "",
        "Detour",
        "cost",
        "The part spent because the path was longer than the straight one.",
        "(ℒ² − D²) / 2T",
    ),
    Quantity(
        "pacing",
        "",
        "Pacing",
        "cost",
        "The part spent because the path was not walked at constant speed.",
        "Q − ℒ² / 2T",
    ),
    Quantity(
        "least_distance",
        "D*",
        "Least distance",
        "length",
        "The least distance from the first predictions to any predictions with the final loss: "
        "no optimizer and no network can go less far.",
        "D* ≤ D",
    ),
    Quantity(
        "distance",
        "D",
        "Distance",
        "length",
        "The Fisher–Rao distance between the first and the last predictions: the shortest way.",
        "D ≤ ℒ",
    ),
    Quantity(
        "length",
        "ℒ",
        "Length",
        "length",
        "How far the run went, from snapshot to snapshot.",
        "ℒ = Σ √a ≤ √(2QT)",
    ),
    Quantity(
        "straightness", "", "Straightness", "ratio", "1 for a path with no detour.", "D² / ℒ²"
    ),
    Quantity(
        "steadiness",
        "",
        "Steadiness",
        "ratio",
        "1 for a path walked at constant speed.",
        "ℒ² / 2QT",
    ),
    Quantity(
        "efficiency",
        "",
        "Efficiency",
        "ratio",
        "The irreducible share of the dissipation: straightness × steadiness.",
        "D² / 2QT",
    ),
    Quantity(
        "alignment",
        "ε",
        "Alignment",
        "ratio",
        "The signed squared cosine, in the Fisher metric, between an optimizer step and the "
        "natural gradient, as a mean over steps weighted by their dissipation. Steps uphill count "
        "negative, so it is no share.",
        "ε = d|d| / aΔ, from −1 to 1",
    ),
    Quantity(
        "alignment_lower", "ε ≥", "Alignment, at least", "ratio", "Certified lower end of the mean."
    ),
    Quantity(
        "alignment_upper", "ε ≤", "Alignment, at most", "ratio", "Certified upper end of the mean."
    ),
    Quantity(
        "downhill_lower",
        "",
        "Downhill, at least",
        "ratio",
        "Certified least share of the dissipation that lay along the natural gradient, downhill.",
    ),
    Quantity("downhill_upper", "", "Downhill, at most", "ratio", "Its upper end."),
    Quantity(
        "uphill_lower",
        "",
        "Uphill, at least",
        "ratio",
        "The same of steps that were predicted to raise the loss.",
    ),
    Quantity("uphill_upper", "", "Uphill, at most", "ratio", "Its upper end."),
    Quantity(
        "held_by",
        "",
        "Held down by",
        "examples",
        "Positions of the few probe examples (often mislabelled ones) whose surprise makes up most "
        "of χ², and so holds the alignment’s lower end down.",
    ),
    Quantity(
        "alignment_lower_rest",
        "ε ≥",
        "Without them, at least",
        "ratio",
        "Certified lower end of the alignment on the probe without those examples: a statement on "
        "the others, none on the whole probe.",
    ),
    Quantity(
        "displacement_alignment",
        "",
        "Displacement’s alignment",
        "ratio",
        "Squared cosine between the net displacement over several steps and the natural gradient "
        "at its start. Not certified, and no statement on the steps in between.",
        "d|d| / aΔ of a displacement",
    ),
    *(
        Quantity(f"adam_{key}_{end}", "", f"Adam’s {key}, at {word}", "ratio", meaning)
        for key, meaning in (
            (
                "alignment",
                "Squared cosine of a step and −m̂ in the metric of Adam’s own moments, which is "
                "not the Fisher metric.",
            ),
            ("straightness", "As straightness, in the metric of Adam’s moments."),
            ("steadiness", "As steadiness, in the metric of Adam’s moments."),
        )
        for end, word in (("lower", "least"), ("upper", "most"))
    ),
)

PER_STEP = (
    ("τ", "Step time", "clock", "Time a recorded interval took on the run’s clock."),
    ("a", "Squared step length", "nats", "Squared Fisher–Rao length of a step, a = δᵀFδ."),
    ("d", "Predicted decrease", "nats", "First-order decrease of the loss over a step, d = −gᵀδ."),
    (
        "Δ",
        "Squared natural-gradient norm",
        "nats",
        "The steepest descent the metric allows, Δ = gᵀF⁺g; it bounds d² ≤ aΔ.",
    ),
)

DEFINED = tuple(q for q in QUANTITIES if q.formula)
"""The quantities that a reader needs defined."""


def time_of(summary: Mapping[str, Any]) -> str:
    """What an audit's time is counted in: its clock, or epochs where its snapshots are numbered
    so, since an epoch is no optimizer step."""
    return counted_in(summary["clock"], summary["step_unit"])


def counted_in(clock: str, step_unit: str) -> str:
    """As `time_of`, of a clock and what a run's step numbers count."""
    return step_unit if clock == "step" else clock


def unit(quantity_unit: str, clock: str) -> str:
    """The unit as printed: cost in nats on the step clock, nats per clock unit on any other;
    lengths in √nats. ``clock``: as `time_of`."""
    if quantity_unit == "steps" and clock == "epoch":
        return "epochs"
    if quantity_unit == "clock":
        return DURATION_UNITS.get(clock, clock)
    if quantity_unit == "cost":
        return cost_unit(clock)
    return {"length": "√nats", "ratio": "", "examples": ""}.get(quantity_unit, quantity_unit)


def cost_unit(clock: str) -> str:
    """Unit of Q on this clock (`time_of`)."""
    return "nats" if clock == "step" else f"nats per {CLOCK_UNITS.get(clock, clock)}"


def number(value: Any, digits: int = 3, toward: Toward | None = None) -> str:
    """A number as a person reads it (significant digits; powers of ten spelled out), "–" for null;
    text as it is. A bound stays one in its rounding: ``toward`` is the way that it may give."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple):
        return ", ".join(number(member) for member in value) or "–"
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        return "–"
    if value == 0:
        return "0"
    if toward is not None:
        exact = _decimal(value)
        value = _rounded(exact, exact.adjusted() - digits + 1, toward)
    if value.is_integer() and abs(value) < 1e7:
        return f"{int(value):,}".replace(",", "\u202f")
    if 1e-3 <= abs(value) < 1e6:
        rounded = float(f"{value:.{digits}g}")
        if rounded.is_integer() and abs(rounded) >= 10 ** (digits - 1):
            return f"{int(rounded):,}".replace(",", "\u202f")
        whole = len(str(int(abs(rounded)))) if abs(rounded) >= 1 else 0
        decimals = digits - whole if whole else digits - 1 - int(f"{rounded:e}".split("e")[1])
        return f"{rounded:.{max(decimals, 0)}f}"
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    superscript = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"10{superscript}" if mantissa == "1" else f"{mantissa}\u2009×\u200910{superscript}"


def percent(share: float, toward: Toward | None = None) -> str:
    """A share as a percentage: whole percents, one digit below 10 %; never "0 %" or "100 %" for
    what isn't. A bound stays one in its rounding: ``toward`` is the way that it may give."""
    value = 100 * share
    if toward is not None:
        fine = abs(value) < 9.95 or 99 < value < 100
        value = _rounded(100 * _decimal(share), -1 if fine else 0, toward)
    if value == 0:
        return "0\u00a0%"
    if 0 < abs(value) < 0.1:
        return "under 0.1\u00a0%"
    if 99.95 <= value < 100:
        return "over 99.9\u00a0%"
    if abs(value) < 9.95 or 99 < value < 100:
        return f"{value:.1f}\u00a0%"
    return f"{value:.0f}\u00a0%"


def _decimal(value: float) -> Decimal:
    """A number without the last digits of floating point, which say nothing."""
    return Decimal(f"{value:.12g}")


def _rounded(value: Decimal, place: int, toward: Toward) -> float:
    """To a multiple of 10**place."""
    rounding = ROUND_FLOOR if toward == "down" else ROUND_CEILING
    return float(value.quantize(Decimal(1).scaleb(place), rounding))
