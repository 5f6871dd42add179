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
_SIGMAS = 2.0
"""Standard errors by which a saving must stand out from none."""
_LONGER = 1.5
"""Times the run's largest learning rate from which a schedule's is worth a word."""
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
    start, end = (audit.summary[key] for key in ("loss_start", "loss_end"))
    if start is not None and end is not None and not end < start:
        why = (
            f"the loss on the probe went from {number(start)} to {number(end)}, and costs are "
            "compared at equal loss. Make it fall first, as with a smaller learning rate."
        )
        none = [
            Advice(about, f"Nothing is predicted of {named}: {why}")
            for about, named in (
                ("schedule", "an even schedule"),
                ("batch size", "another batch size"),
                ("momentum", "momentum"),
            )
        ]
        return [*none, _recording(audit)]
    return [_schedule(audit), _batch_size(audit), _momentum(audit), _recording(audit)]


def _because(audit: Audit, reason: InputError) -> str:
    """A refusal's reason without the run's name, as the end of a sentence."""
    said = str(reason).removeprefix(f"{audit.run}: ")
    return said if said.endswith((".", "…")) else f"{said}."


def _schedule(audit: Audit) -> Advice:
    try:
        schedule = even_schedule(audit)
    except InputError as reason:
        return Advice(
            "schedule", f"No schedule can be read from this run: {_because(audit, reason)}"
        )
    if schedule.near_instability:
        return Advice(
            "schedule",
            "Nothing is predicted of an even schedule: this run’s steps undo almost all that "
            f"earlier ones did (ηh ≈ {number(schedule.overshoot, 2)}), so near to the largest "
            "stable learning rate that longer steps would not go the same way.",
        )
    saving, error = schedule.saving, schedule.saving_error
    if not schedule.worthwhile:
        words = "Nothing to gain from the schedule: "
        if saving <= _NOTHING:
            words += "the run already moved at an even speed."
        else:
            words += f"{_share(saving, error)} less dissipation can’t be told from none."
        return Advice("schedule", words, saving, error)
    largest, was = schedule.learning_rates.max(), float(audit.curve["lr"].max())
    first = "The"
    if largest > _LONGER * was:
        first = (
            f"If training is stable at a learning rate of {number(largest)} (the largest here was "
            f"{number(was)}), which an audit can’t know, the"
        )
    known = "; single steps of a minibatch run scatter, so that this is an estimate"
    return Advice(
        "schedule",
        f"{first} same steps and sum of learning rates at an even speed (to.even_schedule) would "
        f"dissipate {number(schedule.predicted_dissipation)} instead of "
        f"{number(schedule.dissipation)} nats, {_share(saving, error)} less"
        f"{known if schedule.smoothed else ''}.",
        saving,
        error,
    )


def _share(saving: float, error: float) -> str:
    """A saving with its standard error, where it has one."""
    return percent(saving) + (f" ± {percent(error)}" if error else "")


def _batch_size(audit: Audit) -> Advice:
    try:
        found = critical_batch(audit)
    except InputError as reason:
        why = _because(audit, reason)
        return Advice("batch size", f"Nothing is known of the best batch size: {why}")
    b, star = found.batch_size, found.overall
    sentence = f"the critical batch size is about {number(star.value)} ± {number(star.error, 2)}"
    ends = [value for value in (found.value[0], found.value[-1]) if np.isfinite(value)]
    if len(ends) == 2 and max(ends) > _NEAR * min(ends):
        sentence += (
            f", {number(found.value[0], 2)} at first and {number(found.value[-1], 2)} at the end"
        )
    if star.value > _NEAR * b:
        saved, dearer = found.steps_saved(2 * b), -found.examples_saved(2 * b)
        error = abs(1 / (2 * b) - 1 / b) / (1 + star.value / b) ** 2 * star.error
        return Advice(
            "batch size",
            f"At batch size {2 * b} instead of {b}, with a learning rate tuned to it, the same "
            f"loss takes {_share(saved, error)} fewer steps and {percent(dearer)} more examples: "
            f"{sentence}.",
            saved,
            error,
            "steps",
        )
    if star.value * _NEAR < b:
        half = max(b // 2, 1)
        saved, slower = found.examples_saved(half), -found.steps_saved(half)
        error = (b - half) / (b + star.value) ** 2 * star.error
        return Advice(
            "batch size",
            f"At batch size {half} instead of {b}, with a learning rate tuned to it, the same loss "
            f"takes {_share(saved, error)} fewer examples and {percent(slower)} more steps: "
            f"{sentence}.",
            saved,
            error,
            "examples",
        )
    return Advice("batch size", f"Nothing to gain from the batch size: {sentence}, near {b}.", 0.0)


def _momentum(audit: Audit) -> Advice:
    """With momentum μ at the rate η(1−μ) SGD goes the same way, and of every mode's fluctuations,
    noise and housekeeping, at most (1−μ)/(1+μ) are left (§11)."""
    lens = audit.lenses.get("outputs")
    split = None if lens is None else lens.split
    unknown = Advice(
        "momentum",
        "Nothing is known of what momentum would save: record replicas, which tell noise.",
    )
    if split is None or split.noise is None or split.drift is None:
        return unknown
    total = split.noise + split.drift  # of every step, at whatever stride the path was recorded
    if not total > 0:
        return unknown
    if split.memory > 1 or audit.optimizer != "SGD":
        return Advice(
            "momentum",
            "Nothing is predicted of momentum: a saving is known for SGD without, and this is "
            f"{_described(audit)}.",
        )
    still = split.housekeeping
    if not audit.summary["every_step"]:  # housekeeping is too large there
        still = None
    scatter = min(split.noise + (still or 0.0), total)
    factor = 2 * _MOMENTUM / (1 + _MOMENTUM)
    share = factor * scatter / total
    lasting = 0.0 if still is None else split.transport_error or 0.0
    error = factor * float(np.hypot(split.noise_error or 0.0, lasting)) / total
    if share <= _NOTHING:
        return Advice("momentum", "Nothing to gain from momentum: hardly any noise.", share, error)
    if share <= _SIGMAS * error:
        return Advice(
            "momentum",
            f"Nothing to gain from momentum: {_share(share, error)} less dissipation can’t be told "
            "from none.",
            share,
            error,
        )
    whole = "noise and what undoes it" if still is not None else "noise"
    return Advice(
        "momentum",
        f"Momentum {_MOMENTUM} at a tenth of the learning rate goes the same way and averages "
        f"{whole} over ten steps: at least {_share(share, error)} less dissipation.",
        share,
        error,
    )


def _described(audit: Audit) -> str:
    """The optimizer in words."""
    if audit.optimizer == "SGD":
        return "SGD with it"
    return audit.optimizer or "an unknown optimizer"


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
