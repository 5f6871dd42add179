"""Lenses of one audit beside each other: what one says may not contradict another, and Adam's own
metric is held against what the others know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from thermo_opt.describe.quantities import number
from thermo_opt.describe.standing import standing
from thermo_opt.lenses.results import ALIGNMENT_KEYS, LensAudit

_SAID = {"exact": "", "at most": "at most ", "estimate": "about "}
"""Before a number of a standing."""


def consistent(lenses: dict[str, LensAudit]) -> dict[str, LensAudit]:
    """The same lenses, the run's alignment told by one of outputs and parameter lens where both
    would contradict each other, the optimizer-state lens with a note on how far it is off."""
    found = dict(lenses)
    outputs, parameters = found.get("outputs"), found.get("parameters")
    if outputs is not None and parameters is not None:
        found["outputs"], found["parameters"] = _one_alignment(outputs, parameters)
    if (adam := found.get("optimizer-state")) is not None:
        found["optimizer-state"] = _held_against(
            adam, found.get("outputs"), found.get("parameters")
        )
    return found


def _one_alignment(outputs: LensAudit, parameters: LensAudit) -> tuple[LensAudit, LensAudit]:
    """First-order quantities along the predictions' arc and along the weights' step agree for
    small steps only. Where an interval's χ² end exceeds the bracket from the weights, or the run's
    would, the outputs lens leaves alignment to the parameter lens. Else, where the latter looked at
    some intervals only, their mean is not the run's, which the outputs lens bounds. Where
    predictions move and weights don't, there is no optimizer step to align."""
    columns = ["step", "a", "alignment_lower", "alignment_upper"]
    both = outputs.steps[columns].merge(parameters.steps[columns], on="step")
    still = (both["a_x"] > 0) & (both["a_y"] == 0)
    if still.any() and outputs.summary["alignment_lower"] is not None:
        reason = (
            f"alignment is unknown: {_some(still.sum(), len(both), outputs)} the weights stood "
            "still while the predictions moved, which is no step of the optimizer"
        )
        steps = outputs.steps.assign(alignment_lower=np.nan, alignment_upper=np.nan)
        return replace(_left_to_another(outputs, reason), steps=steps), parameters
    apart = (both["alignment_lower_x"] > both["alignment_upper_y"] + 1e-9) | (
        both["alignment_upper_x"] < both["alignment_lower_y"] - 1e-9
    )
    looked, count = len(parameters.steps), len(outputs.steps)
    if apart.any():
        reason = (
            f"alignment is left to the parameter lens: {_some(apart.sum(), len(both), outputs)} "
            "the steps are too long for the predictions' arc and the weights' step to agree at "
            "first order"
        )
        steps = outputs.steps.assign(alignment_lower=np.nan, alignment_upper=np.nan)
        return replace(_left_to_another(outputs, reason), steps=steps), parameters
    low, high = outputs.summary["alignment_lower"], parameters.summary["alignment_upper"]
    if low is None or high is None:
        return outputs, parameters
    if looked < count:
        reason = (
            f"alignment was bracketed in {looked} of {count} intervals, one by one: their mean is "
            "not the run's, which is left to the outputs lens"
        )
        return outputs, _left_to_another(parameters, reason)
    if low > high:  # they weigh the same intervals by other lengths
        reason = "alignment is left to the parameter lens, whose bracket is the narrower one"
        return _left_to_another(outputs, reason), parameters
    return outputs, parameters


def _some(found: int, looked: int, outputs: LensAudit) -> str:
    """In how many of the intervals that both lenses looked at."""
    which = "intervals" if looked == len(outputs.steps) else "intervals that both lenses looked at,"
    return f"in {int(found)} of {looked} {which}"


def _left_to_another(lens: LensAudit, reason: str) -> LensAudit:
    """The lens without the run's alignment."""
    notes = [note for note in lens.summary["notes"] if "certified only from below" not in note]
    summary = type(lens.summary)(lens.summary)
    summary |= dict.fromkeys(ALIGNMENT_KEYS) | {"notes": [*notes, reason]}
    return replace(lens, summary=summary)


def _held_against(
    adam: LensAudit, outputs: LensAudit | None, parameters: LensAudit | None
) -> LensAudit:
    """A note with Adam's numbers and the Fisher's side by side, where a probe gives the latter."""
    own, said = adam.summary, []
    for key in ("straightness", "steadiness"):
        if outputs is None or own[f"adam_{key}_lower"] is None:
            continue
        if (other := outputs.summary[key]) is not None:
            side = standing(outputs.summary, key)
            said.append(
                f"{key} {_between(own, f'adam_{key}')}, where the probe says "
                f"{_SAID[side]}"
                f"{number(other, 2, 'up' if side == 'at most' else None)}"
            )
    for closer in (parameters, outputs):
        if closer is None or own["adam_alignment_lower"] is None:
            continue
        low, high = (closer.summary[f"alignment_{end}"] for end in ("lower", "upper"))
        if low is not None and high is not None:
            least = number(low, 2, "down")
            certified = f"at least {least}" if high >= 1 else f"{least} to {number(high, 2, 'up')}"
            some = (
                f" in {len(closer.steps)} of {len(adam.steps)} intervals"
                if len(closer.steps) < len(adam.steps)
                else ""
            )
            said.append(
                f"alignment {_between(own, 'adam_alignment')}, where the probe certifies "
                f"{certified}{some}"
            )
            break
    if not said:
        return adam
    summary = type(own)(own)
    summary["notes"] = [*own["notes"], f"how far Adam's metric is off: {'; '.join(said)}"]
    return replace(adam, summary=summary)


def _between(summary: dict[str, float], key: str) -> str:
    low, high = summary[f"{key}_lower"], summary[f"{key}_upper"]
    if high - low < 5e-3:
        return number(low, 2)
    return f"{number(low, 2, 'down')} to {number(high, 2, 'up')}"
