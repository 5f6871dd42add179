"""What would lower a run's cost at equal loss: schedule, batch size, momentum, recording, each with
a predicted saving and its uncertainty (§11, §12)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from thermo_opt.audits.batch_size import critical_batch
from thermo_opt.audits.results import Audit
from thermo_opt.audits.schedule import even_schedule
from thermo_opt.describe.quantities import number, percent
from thermo_opt.errors import InputError

_NOTHING = 0.02
"""Share of a cost below which a saving is not worth a change."""
_MOMENTUM = 0.9
"""Momentum that is proposed to runs without."""
_NEAR = 2.0
"""Factor from the critical batch size within which a batch size is left alone."""
_SEEN = 0.95
"""Share of the dissipation that a sparser record must still see."""


@dataclass(frozen=True)
class Advice:
    """One piece of advice.

    Attributes:
        about: schedule, batch size, momentum or recording.
        words: what to do, or why there is nothing to gain or nothing known.
        predicted_saving: share of ``of`` that it saves; None where none can be predicted.
        error: its standard error, None where unknown.
        of: what is saved: dissipation, steps, examples or snapshots.
    """

    about: str
    words: str
    predicted_saving: float | None = None
    error: float | None = None
    of: str = "dissipation"

    def to_dict(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


def advise(audit: Audit) -> list[Advice]:
    """What would lower an audited run's cost at equal loss.

    Args:
        audit: Through the outputs lens; replicas, learning rates and the batch size tell more.

    Returns:
        Advice on the schedule, the batch size over time, momentum and recording, each with a
        predicted saving where one can be predicted, "nothing to gain" where that is so.
    """
    return [_schedule(audit), _batch_size(audit), _momentum(audit), _recording(audit)]


def _schedule(audit: Audit) -> Advice:
    try:
        schedule = even_schedule(audit)
    except InputError as reason:
        return Advice("schedule", f"No schedule can be read from this run: {reason}.")
    if schedule.near_instability:
        return Advice(
            "schedule",
            "Nothing is predicted of an even schedule: this run’s steps undo almost all that its "
            f"noise did (ηh ≈ {number(schedule.overshoot, 2)}), so near to the largest stable "
            "learning rate that longer steps would not go the same way.",
        )
    if not schedule.worthwhile:
        words = "Nothing to gain from the schedule: the run already moved at an even speed."
        return Advice("schedule", words, schedule.saving, schedule.saving_error)
    known = (
        "; steps of a minibatch run are mostly noise, so that this is an estimate"
        if schedule.smoothed
        else ""
    )
    error = f" ± {percent(schedule.saving_error)}" if schedule.saving_error else ""
    return Advice(
        "schedule",
        "The same steps and sum of learning rates at an even speed (to.even_schedule) would "
        f"dissipate {number(schedule.predicted_dissipation)} instead of "
        f"{number(schedule.dissipation)} nats, {percent(schedule.saving)}{error} less{known}.",
        schedule.saving,
        schedule.saving_error,
    )


def _batch_size(audit: Audit) -> Advice:
    try:
        found = critical_batch(audit)
    except InputError as reason:
        return Advice("batch size", f"Nothing is known of the best batch size: {reason}.")
    b, star = found.batch_size, found.overall
    sentence = f"the critical batch size is about {number(star.value)} ± {number(star.error, 2)}"
    ends = [value for value in (found.value[0], found.value[-1]) if np.isfinite(value)]
    if len(ends) == 2 and max(ends) > _NEAR * min(ends):
        sentence += (
            f", {number(found.value[0], 2)} at first and {number(found.value[-1], 2)} at the end"
        )
    if star.value > _NEAR * b:
        saved, dearer = found.steps_saved(2 * b), -found.examples_saved(2 * b)
        return Advice(
            "batch size",
            f"At batch size {2 * b} instead of {b}, with a learning rate tuned to it, the same "
            f"loss takes {percent(saved)} fewer steps and {percent(dearer)} more examples: "
            f"{sentence}.",
            saved,
            abs(1 / (2 * b) - 1 / b) / (1 + star.value / b) ** 2 * star.error,
            "steps",
        )
    if star.value * _NEAR < b:
        half = max(b // 2, 1)
        saved, slower = found.examples_saved(half), -found.steps_saved(half)
        return Advice(
            "batch size",
            f"At batch size {half} instead of {b}, with a learning rate tuned to it, the same loss "
            f"takes {percent(saved)} fewer examples and {percent(slower)} more steps: {sentence}.",
            saved,
            (b - half) / (b + star.value) ** 2 * star.error,
            "examples",
        )
    return Advice("batch size", f"Nothing to gain from the batch size: {sentence}, near {b}.", 0.0)


def _momentum(audit: Audit) -> Advice:
    """With momentum μ at the rate η(1−μ) SGD goes the same way, and of every mode's fluctuations,
    noise and housekeeping, at most (1−μ)/(1+μ) are left (§11)."""
    lens = audit.lenses.get("outputs")
    split = None if lens is None else lens.split
    total = audit.summary["dissipation"]
    if split is None or split.noise is None or not total:
        return Advice(
            "momentum",
            "Nothing is known of what momentum would save: record replicas, which tell noise.",
        )
    if split.memory > 1 or audit.optimizer != "SGD":
        return Advice(
            "momentum",
            "Nothing is predicted of momentum: a saving is known for SGD without, and this is "
            f"{audit.optimizer or 'an unknown optimizer'}.",
        )
    still = split.housekeeping
    if not audit.summary["every_step"]:  # Q is too small there, and housekeeping too large
        total, still = split.noise + (split.drift or 0.0), None
    scatter = min(split.noise + (still or 0.0), total)
    factor = 2 * _MOMENTUM / (1 + _MOMENTUM)
    share = factor * scatter / total
    lasting = 0.0 if still is None else split.transport_error or 0.0
    error = factor * float(np.hypot(split.noise_error or 0.0, lasting)) / total
    if share <= max(_NOTHING, error):
        return Advice("momentum", "Nothing to gain from momentum: hardly any noise.", share, error)
    whole = "noise and what undoes it" if still is not None else "noise"
    return Advice(
        "momentum",
        f"Momentum {_MOMENTUM} at a tenth of the learning rate goes the same way and averages "
        f"{whole} over ten steps: at least {percent(share)} ± {percent(error)} less dissipation.",
        share,
        error,
    )


def _recording(audit: Audit) -> Advice:
    lens = audit.headline
    if not audit.summary["every_step"]:
        return Advice(
            "recording",
            "Record at every step: what this run was recorded at bounds its dissipation from "
            "below only, and no saving can be predicted.",
            of="snapshots",
        )
    coarse = lens.coarse
    whole = audit.summary["dissipation"]
    enough = coarse[coarse["dissipation"] >= _SEEN * whole] if whole else coarse.iloc[:0]
    stride = int(enough["stride"].max()) if len(enough) else 1
    if stride < 2:
        return Advice(
            "recording",
            "Nothing to gain from recording less often: already every second step would miss more "
            f"than {percent(1 - _SEEN)} of the dissipation.",
            0.0,
            of="snapshots",
        )
    return Advice(
        "recording",
        f"Recorded every {stride} steps, a run like this would still show {percent(_SEEN)} of its "
        f"dissipation, with {percent(1 - 1 / stride)} fewer snapshots.",
        1 - 1 / stride,
        0.0,
        "snapshots",
    )
