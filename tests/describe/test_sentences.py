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
from thermo_opt.describe.ranking import ranking
from thermo_opt.describe.sentences import (
    alignment,
    blind_spots,
    brief,
    closest,
    comparison,
    explanation,
    headline,
)
from thermo_opt.describe.standing import STANDING, standing, with_standing
from thermo_opt.lenses import LENSES, SUMMARY_KEYS
from thermo_opt.manifold.initial import InitialPredictions


def _summary(**known: Any) -> dict[str, Any]:
    facts = {
        "lens": "outputs",
        "clock": "step",
        "step_unit": "step",
        "first_step": 0,
        "last_step": 10,
        "stride": 1.0,
        "every_step": True,
        "steps": 10,
        "notes": [],
    }
    return dict.fromkeys(SUMMARY_KEYS) | facts | known


KNOWN = _summary(
    dissipation=3.1,
    irreducible=0.372,
    detour=1.86,
    pacing=0.868,
    least_distance=2.0,
    duration=10.0,
    efficiency=0.12,
)
SPARSE = KNOWN | {"every_step": False, "stride": 5.0, "steps": 2}


def spoken(said: list[str] | str) -> str:
    return (said if isinstance(said, str) else " ".join(said)).replace("\u00a0", " ")


def test_headline_says_where_it_went() -> None:
    assert spoken(headline(KNOWN)) == (
        "Of the 3.10 nats that this run dissipated, 12 % was unavoidable; 60 % went into detours "
        "and 28 % into uneven pacing."
    )


def test_seen_sparsely_every_number_is_said_as_the_bound_it_is() -> None:
    said = spoken(headline(SPARSE))
    assert "at least 3.10 nats, seen every 5 steps" in said
    assert "at most 12 % of it was unavoidable" in said
    assert "at least 1.86 went into detours" in said
    assert "pacing" not in said  # it has no side
    assert "at most 6.5 % of what this run paid" in spoken(explanation(SPARSE))


def test_epochs_are_called_epochs() -> None:
    assert "every 2 epochs" in headline(SPARSE | {"step_unit": "epoch", "stride": 2.0, "steps": 5})


def test_what_came_before_the_first_snapshot_is_not_claimed() -> None:
    assert "From step 500 on" in headline(SPARSE | {"first_step": 500, "last_step": 510})
    assert "From step 500 on" in headline(KNOWN | {"first_step": 500, "last_step": 510})


def test_explanation_gives_both_floors() -> None:
    said = spoken(explanation(KNOWN))
    assert "costs 0.372 nats" in said
    assert "can pay less than 0.200 nats, 6.5 % of what this run paid" in said  # D*²/2T = 4/20
    assert "0.372 nats; no method reaches this loss in this time for less than 0.200" in spoken(
        brief(KNOWN)
    )


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({}, "not known through this lens"),
        ({"dissipation": 0.0}, "its predictions never moved"),
        ({"dissipation": 0.0, "every_step": False}, "were the same in all snapshots"),
        ({"dissipation": 2.0}, "how much of it was unavoidable is not known"),
        ({"dissipation": 2.0, "every_step": False}, "at least 2 nats"),
    ],
)
def test_unknowns_are_said(known: dict[str, Any], words: str) -> None:
    assert words in headline(_summary(**known))


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        (
            (0.31, 0.39, 0.0, 0.0),
            "31 % to 39 % of the dissipation lay along the natural gradient; the rest bought no "
            "first-order decrease",
        ),
        ((0.31, 0.39, 0.04, 0.05), "downhill, and 4.0 % to 5.0 % uphill; the rest"),
        (
            (0.5, 0.5, 0.5, 0.5),
            "50 % of the dissipation lay along the natural gradient downhill, and 50 % uphill",
        ),
        ((0.12, 1.0, 0.0, 0.0), "At least 12 % of the dissipation lay along the natural gradient"),
        ((0.12, 0.7, 0.06, 0.3), "downhill, and at least 6.0 % uphill."),
    ],
)
def test_shares_are_said_with_what_went_uphill_apart(
    shares: tuple[float, float, float, float], words: str
) -> None:
    keys = ("downhill_lower", "downhill_upper", "uphill_lower", "uphill_upper")
    known = dict(zip(keys, shares, strict=True))
    assert words in spoken(alignment(_summary(**known)))


def test_a_lower_bound_of_zero_says_nothing() -> None:
    assert alignment(_summary(downhill_lower=0.0, downhill_upper=1.0)) == []


def test_examples_that_hold_the_bound_are_named_and_the_rest_is_said_as_what_it_is() -> None:
    known = _summary(downhill_lower=4e-4, downhill_upper=1.0, uphill_lower=0.0, uphill_upper=0.0)
    said = spoken(alignment(known | {"held_by": [17], "alignment_lower_rest": 0.98}))
    assert "One example of the probe (number 17" in said
    assert "on the probe without it, the mean alignment is at least 98 %" in said


def test_adams_metric_is_called_by_its_name_and_claims_nothing_in_nats() -> None:
    audit = make_audit("adam", outputs=False, state=True)
    said = spoken(headline(audit.summary))
    assert "Adam’s own metric, which is not the Fisher metric" in said
    assert "straight to 30 % to 60 %" in said
    assert "unavoidable" not in said
    assert "lay along" not in spoken(explanation(closest(audit)))


def test_the_closest_look_at_alignment_is_told_with_how_much_it_saw() -> None:
    audit = make_audit("adam", parameters=True)
    assert closest(audit)["alignment"] == audit.lenses["parameters"].summary["alignment"]
    assert closest(audit)["dissipation"] == audit.summary["dissipation"]
    glimpse = replace(audit.lenses["parameters"], steps=audit.lenses["parameters"].steps.iloc[::10])
    audit.lenses["parameters"] = glimpse
    assert closest(audit)["alignment_lower"] == audit.summary["alignment_lower"]
    audit.lenses["outputs"].summary["alignment_lower"] = None
    said = spoken(explanation(closest(audit)))
    assert f"In the {len(glimpse.steps)} intervals looked at, 31 % to 39 %" in said


def test_a_ranking_of_sparse_records_is_what_seems() -> None:
    audits = [make_audit(name, noise=noise, every=5) for name, noise in (("a", 0.1), ("b", 2))]
    said = str(comparison(audits))
    assert "most efficient seems to be a: at most" in said
    assert said.endswith("it may reverse the order.")


def test_a_ranking_shows_the_losses() -> None:
    audits = [make_audit("smooth", noise=0.1), make_audit("rough", noise=2)]
    said = comparison(audits)
    assert said is not None
    assert re.search(r"most efficient is smooth: .* ended at loss .* efficient is rough: .*", said)
    assert comparison(audits[:1]) is None


def test_a_run_that_went_nowhere_is_never_crowned() -> None:
    audits = [make_audit(name, noise=noise) for name, noise in (("a", 0.1), ("b", 1), ("c", 2))]
    still = audits[0].lenses["outputs"].summary
    still |= {"loss_end": still["loss_start"] - 1e-3, "efficiency": 0.999}
    ranked = ranking(audits)
    assert (ranked.order, ranked.hardly) == ([1, 2], [0])
    assert "Not ranked, since their loss hardly fell: a." in str(comparison(audits))


def test_a_run_that_never_moved_keeps_no_others_from_being_ranked() -> None:
    audits = [make_audit(name, noise=noise) for name, noise in (("a", 0.1), ("b", 1), ("c", 2))]
    still = audits[0].lenses["outputs"].summary
    still |= {"loss_end": still["loss_start"], "efficiency": None, "dissipation": 0.0}
    ranked = ranking(audits)
    assert (ranked.order, ranked.hardly, ranked.obstacle) == ([1, 2], [0], None)
    audits[1].lenses["outputs"].summary["efficiency"] = None
    assert "the efficiency of b is unknown" in str(ranking(audits).obstacle)


def test_runs_that_each_estimated_a_variance_are_not_ranked() -> None:
    audits = [make_audit(name, noise=noise) for name, noise in (("a", 0.1), ("b", 1))]
    for variance, ranked in ((0.1, True), (0.2, False)):
        for audit, sigma2 in zip(audits, (0.1, variance), strict=True):
            start = InitialPredictions("gaussian", 30, residual=1.0, sigma2=sigma2)
            audit.lenses["outputs"] = replace(audit.lenses["outputs"], start=start)
        assert (comparison(audits) is not None) == ranked
    assert "--sigma2" in str(ranking(audits).obstacle)


@pytest.mark.parametrize(
    "other",
    [
        {"every": 5},
        {"clock": "wall"},
        {"snapshots": 21},
    ],
)
def test_runs_that_were_not_seen_alike_are_not_ranked(other: dict[str, Any]) -> None:
    audits = [make_audit("one"), make_audit("two", **other)]
    assert comparison(audits) is None
    assert "not ranked" in str(ranking(audits).obstacle)


def test_every_quantity_has_a_standing_in_the_lenses_that_know_it() -> None:
    facts = {"clock", "stride", "first_step", "last_step", "steps", "held_by", "lens"}
    keys = {q.key for q in QUANTITIES} - facts
    assert keys == set().union(*(STANDING[lens] for lens in LENSES))
    assert standing(KNOWN, "efficiency") == "exact"
    assert standing(SPARSE, "efficiency") == "at most"
    assert standing(SPARSE, "alignment") == "unknown"
    assert with_standing(SPARSE, "dissipation") == "≥ 3.10"


def test_blind_spots_are_said_once() -> None:
    spots = blind_spots([make_audit("one"), make_audit("two")])
    assert ("optimizer-state", "not used: the run has no optimizer-state", "all runs") in spots
    assert len(spots) == len({(lens, reason) for lens, reason, _ in spots})


def test_every_numeric_summary_key_is_described() -> None:
    assert {q.key for q in QUANTITIES} | {
        "run",
        "notes",
        "step_unit",
        "every_step",
        "sketch",
        "rounding",
        "split",
        "counterfactual",
    } == set(SUMMARY_KEYS)
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
