"""An audit in plain sentences, for readers who don't know the theory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from thermo_opt.describe import counterfactual, split
from thermo_opt.describe.quantities import cost_unit, number, percent, time_of
from thermo_opt.describe.ranking import named, ranking
from thermo_opt.describe.standing import rounded, standing, toward_of
from thermo_opt.lenses.results import ALIGNMENT_KEYS, Audited

Summary = Mapping[str, Any]

_NARROW = 0.1
"""Width up to which a bracket is said whole; of a wider one, the lower end."""
_LEAST = 0.001
"""Least share that is said: a smaller one would be rounded down to nothing."""
_WORTH_SAYING = 0.005
"""Share of the dissipation below which going uphill isn't mentioned."""

LENS_WORDS = {
    "outputs": "recorded predictions",
    "parameters": "weights and model",
    "optimizer-state": "weights and optimizer state",
    "counterfactual": "weights, model and minibatches",
}


def closest(audit: Audited) -> dict[str, Any]:
    """The summary that sentences are made from: the headline lens's, with the alignment of the
    lens that knows it best.

    ``alignment_intervals`` is the number of intervals that the parameter lens looked at, where its
    alignment is told and it did not look at all; else None. An alignment of some intervals is none
    of the run's, so it is told only where no other is.
    """
    summary = dict(audit.summary) | {"alignment_intervals": None}
    if (replayed := audit.lenses.get("counterfactual")) is not None:
        summary["counterfactual"] = replayed.summary["counterfactual"]
    closer = audit.lenses.get("parameters")
    if closer is None or summary["lens"] == "parameters":
        return summary
    some = len(closer.steps) < len(audit.steps)
    if some and summary["alignment_lower"] is not None:
        return summary
    known = {key: closer.summary[key] for key in (*ALIGNMENT_KEYS, "displacement_alignment")}
    return summary | known | {"alignment_intervals": len(closer.steps) if some else None}


def seen_every(summary: Summary) -> str:
    """How often a run was seen, in words."""
    stride, unit = summary["stride"], summary["step_unit"]
    span = summary["last_step"] - summary["first_step"]
    about = "" if span == stride * summary["steps"] else "about "
    return f"every {unit}" if stride == 1 else f"{about}every {number(stride)} {unit}s"


def seen(audits: Sequence[Audited]) -> str:
    """How often these runs were seen, in words for a title."""
    summaries = sorted((audit.summary for audit in audits), key=lambda s: float(s["stride"]))
    said = list(dict.fromkeys(seen_every(summary) for summary in summaries))
    if len(said) == 1:
        return f"seen {said[0]}"
    first, last = summaries[0], summaries[-1]
    return f"seen every {number(first['stride'])} to {number(last['stride'])} {last['step_unit']}s"


def headline(summary: Summary) -> str:
    """Where the dissipation went, in one sentence; says what is unknown rather than leave it out
    (theory §4)."""
    if summary["lens"] == "optimizer-state":
        return _adam(summary)
    if summary["lens"] == "counterfactual":
        return counterfactual.sentences(summary)[0]
    total = summary["dissipation"]
    if total is None:
        return "What this run dissipated, in nats, is not known through this lens."
    since = (
        f"From {summary['step_unit']} {summary['first_step']} on, this"
        if (summary["first_step"] > 0)
        else "This"
    )
    sketched = summary.get("sketch") is not None
    about = "about " if sketched or rounded(summary) else ""
    amount = f"{about}{number(total)} {cost_unit(time_of(summary))}"
    if total == 0:
        where = "never moved" if summary["every_step"] else "were the same in all snapshots"
        return f"{since} run dissipated nothing that is seen: its predictions {where}."
    if about and not summary["every_step"]:
        return (
            f"{since} run dissipated {amount}, seen {seen_every(summary)} in "
            f"{'sketches' if sketched else 'rounded values'} of its predictions; what was undone "
            "between two snapshots is not seen."
        )
    if not summary["every_step"]:
        least = f"{number(total, toward='down')} {cost_unit(time_of(summary))}"
        said = f"{since} run dissipated at least {least}, seen {seen_every(summary)}"
        if summary["efficiency"] is None:
            return f"{said}; how much of it was unavoidable is not known."
        return (
            f"{said}; at most {percent(summary['efficiency'], 'up')} of it was unavoidable, and at "
            f"least {number(summary['detour'], toward='down')} went into detours."
        )
    shares = _shares(summary)
    if shares is None:
        return (
            f"{since} run dissipated {amount}; how much of it was unavoidable is not known through "
            "this lens."
        )
    if rounded(summary):
        amount += ", rounding included,"
    went = f"{shares[1]} went into detours and {shares[2]} into uneven pacing."
    if summary["first_step"] > 0:
        said = f"{since} run dissipated {amount.removesuffix(',')}"
        return f"{said}: {shares[0]} of it was unavoidable; {went}"
    return f"Of the {amount} that this run dissipated, {shares[0]} was unavoidable; {went}"


def explanation(summary: Summary) -> list[str]:
    """Up to six more sentences: the straight path's cost, the least possible one, noise apart from
    progress, and the alignment."""
    said = []
    unit = cost_unit(time_of(summary))
    total, irreducible = summary["dissipation"], summary["irreducible"]
    if irreducible is not None and total:
        said.append(
            "A straight path between the same first and last predictions, walked at constant speed "
            f"in the same time, costs {number(irreducible)} {unit}."
        )
    least_distance, duration = summary["least_distance"], summary["duration"]
    if least_distance == 0 and total:
        said.append("The loss ended no lower than it began: to reach it, nothing need be paid.")
    elif least_distance is not None and duration and total:
        least = least_distance**2 / (2 * duration)
        share = least / total
        paid = percent(share) if summary["every_step"] else f"at most {percent(share, 'up')}"
        if summary.get("sketch") is not None or rounded(summary):
            paid = f"about {percent(share)}"
        said.append(
            "To reach the same loss in that time, no optimizer and no network can pay less than "
            f"{number(least, toward='down')} {unit}, {paid} of what this run paid."
        )
    replayed = counterfactual.sentences(summary)
    if summary["lens"] == "counterfactual":
        replayed = replayed[1:]  # the first is its headline
    return said + split.sentences(summary) + alignment(summary) + replayed


def brief(summary: Summary) -> list[str]:
    """The same in one or two short sentences, for a run among others."""
    said = []
    unit = cost_unit(time_of(summary))
    total, irreducible = summary["dissipation"], summary["irreducible"]
    least_distance, duration = summary["least_distance"], summary["duration"]
    if irreducible is not None and total:
        sentence = f"The straight path costs {number(irreducible)} {unit}"
        if least_distance == 0:
            sentence += "; its loss ended no lower than it began"
        elif least_distance is not None and duration:
            sentence += (
                "; no method reaches this loss in this time for less than "
                f"{number(least_distance**2 / (2 * duration), toward='down')}"
            )
        said.append(sentence + ".")
    return said + split.brief(summary) + alignment(summary)


def alignment(summary: Summary) -> list[str]:
    """What is known of the alignment, in sentences: shares of |ε|, uphill apart (§3)."""
    said = []
    low, high = summary["downhill_lower"], summary["downhill_upper"]
    up_low, up_high = summary["uphill_lower"], summary["uphill_upper"]
    some = summary.get("alignment_intervals")
    where = f"in the {some} intervals looked at, " if some else ""
    of_what = f"{where}{{}} of the dissipation lay along the natural gradient"
    if summary["alignment_upper"] is not None and summary["alignment_upper"] < 0:
        said.append(
            f"{where}on the whole its steps went against the natural gradient: the loss was "
            "predicted to rise."
        )
    elif low is not None and high is not None and high - low <= _NARROW:
        sentence = of_what.format(_range(low, high))
        if up_high is not None and up_high >= _WORTH_SAYING:
            sentence += f" downhill, and {_range(up_low, up_high)} uphill"
        said.append(f"{sentence}; the rest bought no first-order decrease of the loss.")
    elif low is not None and low >= _LEAST:
        sentence = of_what.format(_or_more(summary, low)) + ", downhill"
        if up_low is not None and up_low >= _WORTH_SAYING:
            sentence += f", and {_or_more(summary, up_low)} uphill"
        said.append(sentence + ".")
    if summary["held_by"] and summary["alignment_lower_rest"] is not None:
        held = summary["held_by"]
        names = ", ".join(map(str, held[:5])) + (f" and {len(held) - 5} more" * (len(held) > 5))
        count = "one example" if len(held) == 1 else f"{len(held)} examples"
        said.append(
            f"{count} of the probe (number {names}, counted from 0; a wrong label?) "
            f"{'holds' if len(held) == 1 else 'hold'} this lower end down: on the probe without "
            f"{'it' if len(held) == 1 else 'them'}, the mean alignment is "
            f"{_or_more(summary, max(summary['alignment_lower_rest'], 0.0))}."
        )
    if summary["displacement_alignment"] is not None:
        said.append(
            f"Over the {number(summary['stride'])} {summary['step_unit']}s between two snapshots, "
            "the squared cosine of the net displacement with the natural gradient at its start is "
            f"about {number(summary['displacement_alignment'], 2)}: no statement on the steps in "
            "between."
        )
    return [sentence[0].upper() + sentence[1:] for sentence in said]


def _or_more(summary: Summary, share: float) -> str:
    """A lower end as what it is: certified, or estimated from sketches."""
    if summary.get("sketch") is not None:
        return f"about {percent(share)} or more"
    return f"at least {percent(share, 'down')}"


def comparison(audits: Sequence[Audited]) -> str | None:
    """The most and the least efficient of several runs, with their losses; None where they can't
    be ranked (`ranking`)."""
    ranked = ranking(audits)
    if ranked.obstacle is not None or not ranked.order:
        return None
    best, worst = (audits[ranked.order[k]] for k in (0, -1))
    whole = best.summary["every_step"]
    words = {"exact": "", "at most": "at most ", "estimate": "about "}
    shares = []
    for audit in (best, worst):
        side = standing(audit.summary, "efficiency")
        shares.append(words[side] + percent(audit.summary["efficiency"], toward_of(side)))
    runs = f"Of the {len(ranked.order)} runs, seen {seen_every(best.summary)},"
    losses = [number(audit.summary["loss_end"]) for audit in (best, worst)]
    if shares[0] == shares[1]:
        said = (
            f"{runs} none {'is' if whole else 'looks'} more efficient than another: {shares[0]} of "
            "what each dissipated was unavoidable."
        )
    else:
        seems = "is" if whole else "seems to be"
        said = (
            f"{runs} the most efficient {seems} {best.run}: {shares[0]} of what it dissipated was "
            f"unavoidable, and it ended at loss {losses[0]}. The least efficient {seems} "
            f"{worst.run}: {shares[1]}, at loss {losses[1]}. A path can be efficient and lead to a "
            "worse loss."
        )
    if not whole:  # two strided dissipations bound no quotient (§4)
        may = "tell them apart" if shares[0] == shares[1] else "reverse the order"
        said += f" What was undone between two snapshots is not seen: it may {may}."
    if ranked.hardly:
        names = named([audits[i].run for i in ranked.hardly])
        said += f" Not ranked, since their loss hardly fell: {names}."
    if ranked.elsewhere:
        names = named([audits[i].run for i in ranked.elsewhere])
        said += f" Not ranked, since recorded on another probe: {names}."
    return said


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


def _adam(summary: Summary) -> str:
    """What the optimizer-state lens says, in its own words (§9)."""
    parts = [
        f"{words} {_range(summary[f'adam_{key}_lower'], summary[f'adam_{key}_upper'])}"
        for key, words in (
            ("straightness", "the path was straight to"),
            ("steadiness", "steady to"),
            ("alignment", "and its steps’ alignment was"),
        )
        if summary[f"adam_{key}_lower"] is not None
    ]
    if not parts:
        return "What this run dissipated is not known through this lens."
    return (
        f"In Adam’s own metric, which is not the Fisher metric, {', '.join(parts)}; what the run "
        "dissipated, in nats, is not known through this lens."
    )


def _range(low: float, high: float) -> str:
    """A bracket in words; one number where both ends are one or read alike."""
    if low == high:
        return percent(low)
    first, last = percent(low, "down"), percent(high, "up")
    return first if first == last else f"{first} to {last}"


def _shares(summary: Summary) -> tuple[str, str, str] | None:
    values = [summary[key] for key in ("irreducible", "detour", "pacing")]
    if any(value is None for value in values) or not summary["dissipation"]:
        return None
    first, second, third = (percent(value / summary["dissipation"]) for value in values)
    return first, second, third
