"""Lenses of one audit beside each other: what one says may not contradict another, and Adam's own
metric is held against what the others know."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from thermo_opt.lenses.results import ALIGNMENT_KEYS, LensAudit


def consistent(lenses: dict[str, LensAudit]) -> dict[str, LensAudit]:
    """The same lenses, the outputs lens without an alignment that the parameter lens contradicts,
    the optimizer-state lens with a note on how far it is off."""
    found = dict(lenses)
    outputs, parameters = found.get("outputs"), found.get("parameters")
    if outputs is not None and parameters is not None:
        found["outputs"] = _without_contradiction(outputs, parameters)
    if (adam := found.get("optimizer-state")) is not None:
        found["optimizer-state"] = _held_against(adam, found.get("outputs"), parameters)
    return found


def _without_contradiction(outputs: LensAudit, parameters: LensAudit) -> LensAudit:
    """First-order quantities along the predictions' arc and along the weights' step agree for
    small steps only. Where an interval's χ² end exceeds the bracket from the weights, or the means
    do, the outputs lens leaves alignment to the parameter lens."""
    columns = ["step", "alignment_lower", "alignment_upper"]
    both = outputs.steps[columns].merge(parameters.steps[columns], on="step")
    apart = (both["alignment_lower_x"] > both["alignment_upper_y"] + 1e-9) | (
        both["alignment_upper_x"] < both["alignment_lower_y"] - 1e-9
    )
    means = [lens.summary for lens in (outputs, parameters)]
    low, high = means[0]["alignment_lower"], means[1]["alignment_upper"]
    means_apart = low is not None and high is not None and low > high
    if not apart.any() and not means_apart:
        return outputs
    reason = (
        f"alignment is left to the parameter lens: in {int(apart.sum())} of {len(both)} intervals "
        "the steps are too long for the predictions' arc and the weights' step to agree at first "
        "order"
        if apart.any()
        else "alignment is left to the parameter lens, which looked at other intervals"
    )
    notes = [note for note in outputs.summary["notes"] if "certified only from below" not in note]
    summary = type(outputs.summary)(outputs.summary)
    summary |= dict.fromkeys(ALIGNMENT_KEYS) | {"notes": [*notes, reason]}
    steps = outputs.steps.assign(alignment_lower=np.nan, alignment_upper=np.nan)
    return replace(outputs, steps=steps, summary=summary)


def _held_against(
    adam: LensAudit, outputs: LensAudit | None, parameters: LensAudit | None
) -> LensAudit:
    """A note with Adam's numbers and the Fisher's side by side, where a probe gives the latter."""
    own, said = adam.summary, []
    for key in ("straightness", "steadiness"):
        other = None if outputs is None else outputs.summary[key]
        if own[f"adam_{key}_lower"] is not None and other is not None:
            said.append(f"{key} {_between(own, f'adam_{key}')}, where the probe says {other:.2g}")
    closer = parameters if parameters is not None else outputs
    if closer is not None and own["adam_alignment_lower"] is not None:
        low, high = (closer.summary[f"alignment_{end}"] for end in ("lower", "upper"))
        if low is not None and high is not None:
            certified = f"{low:.2g} to {high:.2g}"
            said.append(
                f"alignment {_between(own, 'adam_alignment')}, where the certified bracket on the "
                f"probe is {certified}"
            )
    if not said:
        return adam
    summary = type(own)(own)
    summary["notes"] = [*own["notes"], f"how far Adam's metric is off: {'; '.join(said)}"]
    return replace(adam, summary=summary)


def _between(summary: dict[str, float], key: str) -> str:
    low, high = summary[f"{key}_lower"], summary[f"{key}_upper"]
    return f"{low:.2g}" if high - low < 5e-3 else f"{low:.2g} to {high:.2g}"
