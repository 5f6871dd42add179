"""Every claim holds and every wrong twin is rejected; names, seeds and refusals of the runner."""

import math

import numpy as np
import pytest

from thermo_opt.errors import InputError
from thermo_opt.theory.flow import NotConverged
from thermo_opt.theory.verify import claim_names, claims, describe, run_claims, run_mutants, runner
from thermo_opt.theory.verify.mutants import MUTANTS
from thermo_opt.theory.verify.verdict import Check, Verdict, at_least, at_most, equal


@pytest.mark.parametrize("name", claim_names())
def test_claim_holds(name):
    verdicts = run_claims([name], seed=1)
    assert verdicts
    assert [v for v in verdicts if v.verdict != "holds"] == []
    assert all(v.claim == name and v.seed == 1 and v.seconds > 0 for v in verdicts)
    assert describe(name).endswith(").")


@pytest.mark.parametrize("name", claim_names())
def test_claim_rejects_its_wrong_twins(name):
    results = run_mutants([name])
    assert len(results) >= 1
    assert [r.mutant for r in results if not r.rejected] == []
    assert all(r.claim == name and r.by for r in results)


def test_mutant_names_are_unique_and_change_something():
    assert len({(m.claim, m.name) for m in MUTANTS}) == len(MUTANTS)
    default = runner.Ingredients()
    assert all(m.ingredients != default for m in MUTANTS)


def test_same_seed_same_numbers_whatever_else_runs():
    alone = run_claims(["constant-speed"], seed=3)
    among = run_claims(["decomposition", "constant-speed"], seed=3)
    assert [v.measured for v in alone] == [v.measured for v in among if v.claim == "constant-speed"]
    other = run_claims(["constant-speed"], seed=4)
    assert [v.measured for v in alone] != [v.measured for v in other]


def test_progress_is_reported():
    seen = []
    run_claims(["decomposition", "one-step"], progress=seen.append)
    assert seen == ["decomposition", "one-step"]


def test_unknown_claim_is_refused_with_the_nearest_names():
    with pytest.raises(InputError, match=r"did you mean .*energy-identity"):
        run_claims(["energy-identiy"])
    with pytest.raises(InputError, match="choose from speed-cost-bound"):
        run_mutants(["?"])


def test_a_solver_that_gives_up_establishes_nothing(monkeypatch):
    def gives_up(use, rng):
        raise NotConverged("no luck")

    monkeypatch.setitem(claims.CLAIMS, "one-step", gives_up)
    (verdict,) = run_claims(["one-step"])
    assert (verdict.verdict, verdict.measured, verdict.statement) == (
        "not established",
        None,
        "no luck",
    )
    rejections = run_mutants(["one-step"])
    assert not any(r.rejected for r in rejections)


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (equal("", "", 1.0, 1.1, 0.2), True),
        (equal("", "", 1.0, 1.3, 0.2), False),
        (at_most("", "", 1.0, 1.0), True),
        (at_most("", "", 1.0, 1.1, 0.05), False),
        (at_least("", "", 1.0, 0.9), False),
        (at_least("", "", 1.0, math.inf), True),
        (equal("", "", 0.0, math.nan, 1.0), False),
        (at_most("", "", 0.0, math.nan, 1.0), False),
    ],
)
def test_checks(check: Check, holds: bool):
    assert check.holds is holds


def test_verdicts_become_strict_json():
    verdict = Verdict("c", "p", "s", 1.0, "≥", float(np.inf), 0.0, "holds", 0, 0.1)
    assert verdict.to_dict()["measured"] is None
    assert verdict.to_dict()["predicted"] == 1.0
