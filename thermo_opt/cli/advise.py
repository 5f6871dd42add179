"""``thermo-opt advise``: what would lower a run's cost at equal loss, with a predicted saving."""

from __future__ import annotations

import json as encoder
from typing import Any

from thermo_opt.cli.options import Format, Json, Model, Probe, RunPath
from thermo_opt.errors import InputError


def advise(
    run: RunPath,
    json: Json = False,
    model: Model = None,
    probe: Probe = None,
    format: Format = None,
) -> None:
    """Say what would lower a run's dissipation at equal loss, and by how much; "nothing to gain"
    where that is so."""
    from thermo_opt.audits import audit
    from thermo_opt.cli import terminal
    from thermo_opt.cli.terminal import Bars
    from thermo_opt.runs import load_run

    with Bars() as bars:
        found = audit(
            load_run(run, format=format), lens="outputs", model=model, probe=probe, progress=bars
        )
    advice = _advice(found)
    if json:
        terminal.print_json(
            encoder.dumps({"run": found.run, "advice": advice}, indent=2, allow_nan=False)
        )
        return
    for entry in advice:
        terminal.say(entry["words"])


def _advice(found: Any) -> list[dict[str, Any]]:
    from thermo_opt.audits import even_schedule
    from thermo_opt.describe.quantities import number, percent

    summary, advice = found.summary, []
    if not summary["every_step"]:
        advice.append(
            _entry(
                "recording",
                "Record at every step: what this run was recorded at bounds its dissipation from "
                "below only, and no saving can be predicted.",
            )
        )
    try:
        schedule = even_schedule(found)
    except InputError as error:
        advice.append(_entry("schedule", f"No schedule can be read from this run: {error}."))
        return advice
    noise = _noise_share(summary)
    if not schedule.worthwhile:
        words = "Nothing to gain from the schedule: the run already moved at an even speed."
        advice.append(_entry("schedule", words, schedule.saving))
    elif noise is not None and noise <= _QUIET:
        advice.append(
            _entry(
                "schedule",
                "The same steps and sum of learning rates at an even speed (to.even_schedule) "
                f"would dissipate {number(schedule.predicted_dissipation)} instead of "
                f"{number(schedule.dissipation)} nats, {percent(schedule.saving)} less.",
                schedule.saving,
            )
        )
    else:
        words = (
            "An even speed (to.even_schedule) would save up to "
            f"{percent(schedule.saving)} of the dissipation if the run's path were free of "
            "minibatch noise"
        )
        known = (
            "how much of it is noise is not known: record replicas of some steps"
            if noise is None
            else f"{percent(min(noise, 1.0))} of it is noise, which no schedule evens out"
        )
        advice.append(_entry("schedule", f"{words}; {known}.", None))
    return advice


_QUIET = 0.05
"""Share of noise in the dissipation up to which the full-batch prediction holds."""


def _noise_share(summary: Any) -> float | None:
    """Noise as a share of the dissipation, where replicas were recorded."""
    split = summary.get("split") or {}
    noise = split.get("noise")
    noise = noise.get("value") if isinstance(noise, dict) else noise
    if not isinstance(noise, int | float) or not summary["dissipation"]:
        return None
    return float(noise) / summary["dissipation"]


def _entry(about: str, words: str, saving: float | None = None) -> dict[str, Any]:
    return {"about": about, "words": words, "predicted_saving": saving}
