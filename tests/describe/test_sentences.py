"""An audit's sentences and numbers: true to the summary, and plain about what is unknown."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.synthetic_audits import make_audit
from thermo_opt.describe.quantities import QUANTITIES, cost_unit, number, percent
from thermo_opt.describe.sentences import (
    blind_spots,
    brief,
    comparison,
    explanation,
    headline,
    told,
)
from thermo_opt.lenses import SUMMARY_KEYS


def _summary(**known: Any) -> dict[str, Any]:
    return dict.fromkeys(SUMMARY_KEYS) | {"clock": "step", "notes": []} | known


KNOWN = _summary(
    dissipation=3.1,
    irreducible=0.372,
    detour=1.86,
    pacing=0.868,
    least_distance=2.0,
    duration=10.0,
    efficiency=0.12,
)


def test_headline_says_where_it_went() -> None:
    said = headline(KNOWN).replace("\u00a0", " ")
    assert said == (
        "Of the 3.10 nats this run dissipated, 12 % was unavoidable; 60 % went into detours and 28 "
        "% into uneven pacing."
    )


def test_explanation_gives_both_floors() -> None:
    said = " ".join(explanation(KNOWN)).replace("\u00a0", " ")
    assert "would have cost 0.372 nats" in said
    assert "can pay less than 0.200 nats, 6.5 % of what this run paid" in said  # D*²/2T = 4/20
    assert "0.372 nats; no method reaches this loss in this time for less than 0.200" in " ".join(
        brief(KNOWN)
    )


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "not known through this lens"),
        ({"dissipation": 0.0}, "dissipated nothing"),
        ({"dissipation": 2.0}, "how much of it was unavoidable is not known"),
        ({"efficiency": 0.25}, "its size in nats is not known"),
    ],
)
def test_unknowns_are_said(known: dict[str, Any], words: str) -> None:
    assert words in headline(_summary(**known))


@pytest.mark.parametrize(
    ("value", "lower", "upper", "words"),
    [
        (
            0.35,
            0.31,
            0.39,
            "35 % of the dissipation lay along the natural gradient (certified between 31 % and 39 "
            "%)",
        ),
        (0.5, 0.5, 0.5, "50 % of the dissipation lay along the natural gradient;"),
        (None, 0.12, None, "At least 12 %"),
        (None, 0.12, 1.0, "At least 12 %"),
        (-0.3, -0.4, -0.2, "against the natural gradient"),
    ],
)
def test_alignment_in_words(
    value: float | None, lower: float, upper: float | None, words: str
) -> None:
    summary = _summary(alignment=value, alignment_lower=lower, alignment_upper=upper)
    assert words in " ".join(explanation(summary)).replace("\u00a0", " ")


def test_a_lower_bound_below_zero_says_nothing() -> None:
    assert explanation(_summary(alignment_lower=-0.1, alignment_upper=1.0)) == []


def test_the_closest_look_at_alignment_is_told() -> None:
    audit = make_audit("adam", parameters=True)
    assert told(audit)["alignment"] == audit.lenses["parameters"].summary["alignment"]
    assert told(audit)["dissipation"] == audit.summary["dissipation"]
    glimpse = replace(audit.lenses["parameters"], steps=audit.lenses["parameters"].steps.iloc[::10])
    audit.lenses["parameters"] = glimpse
    assert told(audit) == audit.summary


def test_comparison_names_best_and_worst() -> None:
    audits = [make_audit("smooth", noise=0.1), make_audit("rough", noise=2)]
    said = comparison([(audit.run, audit.headline) for audit in audits])
    assert said is not None
    assert re.search(r"most efficient of these 2 runs is smooth: .* least efficient is rough", said)
    assert comparison([(audits[0].run, audits[0].headline)]) is None


def test_blind_spots_are_said_once() -> None:
    spots = blind_spots([make_audit("one"), make_audit("two")])
    assert ("optimizer-state", "not used: the run has no optimizer-state", "all runs") in spots
    assert len(spots) == len({(lens, reason) for lens, reason, _ in spots})


def test_every_numeric_summary_key_is_described() -> None:
    assert {q.key for q in QUANTITIES} | {"run", "notes"} == set(SUMMARY_KEYS)
    assert cost_unit("step") == "nats"
    assert cost_unit("examples") == "nats per example seen"


@given(st.floats(1e-12, 1e12))
def test_numbers_are_read_back_to_three_digits(value: float) -> None:
    digits = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    text = number(value).replace("\u202f", "").replace("\u2009", "")
    mantissa, _, exponent = text.partition("×10")
    assert float(mantissa) * 10.0 ** int(exponent.translate(digits) or 0) == pytest.approx(
        value, rel=5.001e-3
    )


@given(st.floats(0, 1))
def test_percentages_never_claim_none_or_all(share: float) -> None:
    said = percent(share).replace("\u00a0", " ")
    assert (said == "0 %") == (share == 0)
    assert (said == "100 %") == (share == 1)
    value = float(re.findall(r"[\d.]+", said)[0])
    assert value == pytest.approx(100 * share, abs=0.51)


def test_null_and_text() -> None:
    assert number(None) == number(float("nan")) == "–"
    assert number("step") == "step"
    assert number(0.0) == "0"
