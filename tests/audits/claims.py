"""What an audit prints of a thinned run, held against the same run recorded at every step: every
sentence, note and number must be one that is known here, and true."""

import re
from dataclasses import dataclass

import numpy as np

from thermo_opt.describe.quantities import QUANTITIES
from thermo_opt.describe.standing import standing

NUMBER = r"(?:under |over )?[\d.,\u202f]+(?:\u2009×\u200910[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)?|10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+"
SHARE = r"(?:under |over )?[\d.]+\u00a0%"
FACTS = ("stride", "rounding")
"""Of the record that was audited, not of the whole run."""
SLACK = 1e-9
"""Relative error of sums in another order."""


def value(text: str) -> float:
    """A number or percentage as printed."""
    text = re.sub(r"^[≥≤≈]\s*", "", text.strip())
    if text.startswith("under"):
        return 0.0
    text = text.removeprefix("over ").replace("\u202f", "")
    if text.endswith("%"):
        return float(text[:-1].strip()) / 100
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    mantissa, _, exponent = (
        text.rpartition("10") if re.search("10[⁻⁰-⁹¹²³]", text) else (text, "", "0")
    )
    mantissa = mantissa.strip("\u2009×") or "1"
    return float(mantissa) * 10.0 ** int(exponent.translate(digits))


def near(text: str, truth: float) -> bool:
    """Whether a printed number is the truth, to its printed digits."""
    if text.strip() == "under 0.1\u00a0%":
        return 0 < truth < 1e-3
    coarse = 5.1e-3 if text.endswith("%") and truth > 0.0994 else 5.1e-4 if "%" in text else 0.0
    return abs(value(text) - truth) <= max(coarse, 5.1e-3 * abs(truth))


@dataclass
class Whole:
    """A run at every step, from the thinned one's first snapshot on: a summary a lens."""

    lenses: dict

    def __getitem__(self, key: str) -> float:
        return self.lenses["outputs"][key]

    def of(self, lens: str) -> dict:
        """A lens's summary; what it shares with the outputs lens is the same."""
        return self.lenses.get(lens, self.lenses["outputs"])


def holds(side: str, text: str, truth: float | None) -> bool:
    """Whether a printed number of this standing is true of the whole run."""
    if truth is None:
        return False
    if side == "at least":
        return value(text) <= truth + SLACK * abs(truth)
    if side == "at most":
        top = 1e-3 if text.strip().startswith("under") else value(text)
        return top >= truth - SLACK * abs(truth)
    return near(text, truth) if side == "exact" else True


def dissipated(found, seen: dict, whole: Whole) -> None:
    assert holds("at least", found["least"], whole["dissipation"])
    assert value(found["every"]) == seen["stride"]
    assert (found["since"] or "0") == str(seen["first_step"])
    if found["share"]:
        assert holds("at most", found["share"], whole["efficiency"])
        assert holds("at least", found["detour"], whole["detour"])
    else:
        assert seen["steps"] == 1


def divided(found, seen: dict, whole: Whole) -> None:
    assert seen["every_step"]
    assert near(found["all"], whole["dissipation"])
    for key in ("irreducible", "detour", "pacing"):
        assert near(found[key], whole[key] / whole["dissipation"])


def rounded(found, seen: dict, whole: Whole) -> None:
    """Told as about so much, where rounding of the outputs is a part of it."""
    assert seen["rounding"] >= 0.005
    assert near(found["all"], seen["dissipation"])
    assert bool(found["every"]) == (not seen["every_step"])


def straight(found, seen: dict, whole: Whole) -> None:
    assert near(found["cost"], whole["irreducible"])


def brief(found, seen: dict, whole: Whole) -> None:
    straight(found, seen, whole)
    cost = whole["least_distance"] ** 2 / (2 * whole["duration"])
    assert holds("at least", found["least"], cost)


def least(found, seen: dict, whole: Whole) -> None:
    cost = whole["least_distance"] ** 2 / (2 * whole["duration"])
    assert holds("at least", found["cost"], cost)
    share = cost / whole["dissipation"]
    if found["side"] == "about ":
        assert seen["rounding"] >= 0.005
    elif found["side"]:
        assert not seen["every_step"]
        assert holds("at most", found["share"], share)
    else:
        assert seen["every_step"]
        assert near(found["share"], share)


def along(found, seen: dict, whole: Whole) -> None:
    """Shares downhill and uphill, of a run seen at every step only."""
    assert seen["every_step"]
    closest = whole.lenses.get("parameters", whole.lenses["outputs"])
    lower = closest if closest["downhill_lower"] is not None else whole.lenses["outputs"]
    assert value(found["down"]) <= lower["downhill_upper"] + 1e-3
    assert holds("at least", found["down"], lower["downhill_lower"])
    if found["up"]:
        assert holds("at least", found["up"], lower["uphill_lower"])


def cosine(found, seen: dict, whole: Whole) -> None:
    assert not seen["every_step"]
    assert value(found["every"]) == seen["stride"]
    assert -1 <= float(found["cosine"]) <= 1


SENTENCES = [
    (
        rf"(?:From step (?P<since>\d+) on, this|This) run dissipated at least (?P<least>{NUMBER}) "
        rf"nats, seen (?:about )?every (?P<every>{NUMBER}) steps; (?:at most (?P<share>{SHARE}) of "
        rf"it was unavoidable, and at least (?P<detour>{NUMBER}) went into detours|how much of it "
        r"was unavoidable is not known)\.",
        dissipated,
    ),
    (
        rf"(?:Of the (?P<all>{NUMBER}) nats that this run dissipated, (?P<irreducible>{SHARE}) was "
        rf"unavoidable); (?P<detour>{SHARE}) went into detours and (?P<pacing>{SHARE}) into uneven "
        r"pacing\.",
        divided,
    ),
    (
        rf"From step \d+ on, this run dissipated (?P<all>{NUMBER}) nats: (?P<irreducible>{SHARE}) "
        rf"of it was unavoidable; (?P<detour>{SHARE}) went into detours and (?P<pacing>{SHARE}) "
        r"into uneven pacing\.",
        divided,
    ),
    (
        rf"Of the about (?P<all>{NUMBER}) nats, rounding included, that this run dissipated, "
        rf"{SHARE} was unavoidable; {SHARE} went into detours and {SHARE} into uneven pacing\."
        "(?P<every>)",
        rounded,
    ),
    (
        rf"(?:From step \d+ on, this|This) run dissipated about (?P<all>{NUMBER}) nats, seen "
        rf"(?:about )?every (?P<every>{NUMBER}) steps in rounded values of its predictions; what "
        r"was undone between two snapshots is not seen\.",
        rounded,
    ),
    (
        r"A straight path between the same first and last predictions, walked at constant speed in "
        rf"the same time, costs (?P<cost>{NUMBER}) nats\.",
        straight,
    ),
    (
        rf"The straight path costs (?P<cost>{NUMBER}) nats; no method reaches this loss in this "
        rf"time for less than (?P<least>{NUMBER})\.",
        brief,
    ),
    (
        r"To reach the same loss in that time, no optimizer and no network can pay less than "
        rf"(?P<cost>{NUMBER}) nats, (?P<side>at most |about )?(?P<share>{SHARE}) of what this run "
        r"paid\.",
        least,
    ),
    (
        rf"At least (?P<down>{SHARE}) of the dissipation lay along the natural gradient, downhill"
        rf"(?:, and at least (?P<up>{SHARE}) uphill)?\.",
        along,
    ),
    (
        rf"Over the (?P<every>{NUMBER}) steps between two snapshots, the squared cosine of the net "
        r"displacement with the natural gradient at its start is about (?P<cosine>-?[\d.]+): no "
        r"statement on the steps in between\.",
        cosine,
    ),
]
"""Every sentence that an audit of these runs may say, and what makes it true."""


def check_sentences(text: str, seen: dict, whole: Whole) -> None:
    """Each sentence is known and true."""
    while text := text.strip():
        for pattern, true in SENTENCES:
            if found := re.match(pattern, text):
                true(found, seen, whole)
                text = text[found.end() :]
                break
        else:
            raise AssertionError(f"what makes this true? {text[:200]}")


def unseen(found, seen, whole):
    assert int(found[1]) == seen["first_step"] > 0


def sparse(found, seen, whole):
    assert not seen["every_step"]
    assert not any(
        v is not None for k, v in seen.items() if k.startswith(("alignment", "downhill"))
    )


def single(found, seen, whole):
    assert seen["steps"] == 1
    assert seen["efficiency"] is None


def every(found, seen, whole):
    assert seen["every_step"]


def floor(found, seen, whole):
    """What is told apart of rounding can only be a part of the intervals, or of Q."""
    assert bool(found["count"]) or bool(found["share"])
    if found["count"]:
        assert 0 < int(found["below"]) <= int(found["count"]) == seen["steps"]
    if found["share"]:
        assert near(found["share"], seen["rounding"])


def off(found, seen, whole):
    """Adam's numbers beside the probe's, which bound those of the whole run."""
    for key in ("straightness", "steadiness"):
        told = re.search(
            rf"{key} [\d. to]+, where the probe says (at most |about )?([\d.]+)", found[0]
        )
        if told is None:
            assert seen["steps"] == 1
        elif told[1] is None:
            assert near(told[2], whole[key])
        elif told[1] == "at most ":
            assert float(told[2]) >= whole[key] * (1 - 1e-2)


def always(found, seen, whole):
    pass


NOTES = [
    (
        r"the first snapshot is step (\d+): what came before it is not seen, and in no number",
        unseen,
    ),
    (r"alignment is a property of one optimizer step, and this run was not recorded at", sparse),
    (r"alignment in Adam's metric is a property of one optimizer step, and this run was", sparse),
    (r"there is one interval only: how straight and how steady the path between was", single),
    (r"alignment is certified only from below", every),
    (r"the quadratic form of a displacement over several steps is no length of the path", sparse),
    (
        r"the outputs were computed in \w+: rounding feigns a squared length of \S+ nats per step"
        r"(?:, and of (?P<count>\d+) intervals (?P<below>\d+) lies? within 10 times that: "
        rf"alignment is not told there)?(?:; about (?P<share>{SHARE}) of the dissipation is "
        r"rounding, and with it of the detours)?$",
        floor,
    ),
    (r"alignment is undefined in \d+ of \d+ intervals", always),
    (r"sigma2 wasn't given: [\d.]+, the mean squared residual at the last snapshot", always),
    (r"outputs taken for class logits \(the record doesn't say\)$", always),
    (r"replayed$", always),
    (r"targets are the labels one position later", always),
    (r"no log of the training was found beside the checkpoints", always),
    (r"alignment in F \+ λI with λ = ", always),
    (r"null-space decrease is zero", always),
    (r"the metric takes \d+ loss terms per optimizer step", always),
    (r"batch size unknown: each range spans the values at batch sizes of", always),
    (r"this is Adam's own metric, not the Fisher's", always),
    (r"how far Adam's metric is off: .*", off),
    (r"not used: ", always),
]
"""Every note that an audit of these runs may give, and what makes it true."""


def check_note(note: str, seen: dict, whole: Whole) -> None:
    """The note is known and true."""
    for pattern, true in NOTES:
        if found := re.match(pattern, note):
            true(found, seen, whole)
            return
    raise AssertionError(f"what makes this true? {note}")


def check_number(summary: dict, key: str, text: str, whole: Whole) -> None:
    """A printed cell has the sign of its standing, and is true of the whole run."""
    truth = whole.of(summary["lens"]).get(key)
    said = standing(summary, key)
    if text in ("–", "") or summary[key] is None:
        assert summary[key] is None
        return
    sign = {"≥": "at least", "≤": "at most", "≈": "estimate"}.get(text[0])
    named = key.endswith(("_lower", "_upper", "_rest"))
    assert named or sign == (said if said != "exact" else None), (key, text, said)
    if isinstance(summary[key], float) and said != "estimate" and key != "stride":
        assert holds(said, text, truth), (key, text, said, truth)


def check_summary(seen: dict, whole: Whole) -> None:
    """The numbers of one lens, unrounded, on the side of the whole run's that they claim."""
    truth = whole.of(seen["lens"])
    for key, number in seen.items():
        side = standing(seen, key)
        if not isinstance(number, float) or key in FACTS or truth.get(key) is None:
            continue
        if side == "exact":  # the parameter lens replays in float64
            rtol = 1e-9 if seen["lens"] == "outputs" else 1e-6
            assert np.isclose(number, truth[key], rtol=rtol), (key, number, truth[key])
        elif side == "at least":
            assert number <= truth[key] + SLACK * abs(truth[key]) + 1e-15, (key, number, truth[key])
        elif side == "at most":
            assert number >= truth[key] - SLACK * abs(truth[key]), (key, number, truth[key])


def printed(text: str) -> tuple[str, list[list[str]], list[str]]:
    """(sentences, rows of the table, notes) of what the terminal showed, unwrapped."""
    lines = [line.rstrip() for line in text.splitlines()]
    sentences = lines[1]
    ruled = next(k for k, line in enumerate(lines) if line.startswith("──"))
    ends = next(k for k, line in enumerate(lines) if k > ruled and not line)
    rows = [
        re.split(r"\s{2,}", line.strip()) for line in [lines[ruled - 1], *lines[ruled + 1 : ends]]
    ]
    notes = [line.strip() for line in lines[ends:] if line.startswith("  ")]
    return sentences, rows, notes


KEYS = {q.name: q.key for q in QUANTITIES}
"""Name of a row → key."""
