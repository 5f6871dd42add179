"""The comparison in which all are tuned alike: equal trials over their own knobs, other seeds and
other data for what is reported, in pieces, and dissipation of every step."""

import math

import pytest

import thermo_opt as to
from analysis import evidence
from analysis.__main__ import main
from analysis.evidence import DEFAULTS, SPACES, Comparison, Range, compare

METHODS = ("AdamW", "NGD-T")


@pytest.fixture(name="done", scope="module")
def _done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evidence")
    plan = Comparison("digits", METHODS, 2, 2, 12, "tiny", runs=folder)
    pieces = 0
    while (rows := compare(plan, seconds=-1.0 if pieces == 0 else math.inf)) is None:
        pieces += 1
        assert not list(plan.folder.glob("*/sweep.json"))  # no time, no run
    return plan, rows


def test_knobs_are_searched_within_their_ranges_and_the_same_number_of_times():
    for method, space in SPACES.items():
        plan = Comparison("digits", trials=7)
        draws = plan.draws(method)
        assert len({str(draw) for draw in draws}) == 7
        assert draws == plan.draws(method)
        assert method in DEFAULTS
        for name, values in space.items():
            assert values.at(0.0) == pytest.approx(values.low, rel=1e-3)
            assert values.at(1.0) == pytest.approx(values.high, rel=1e-3)
            if name in draws[0]:
                assert all(values.low <= draw[name] <= values.high for draw in draws)
    assert Range(0.9, 0.999, near_one=True).at(0.5) == pytest.approx(0.99)


def test_tuning_seeds_are_not_reported_and_the_reference_has_ratio_one(done):
    plan, rows = done
    runs = [path.name for path in plan.folder.iterdir() if path.name[0] != "."]
    assert len(runs) == len(METHODS) * (plan.trials + 2 * plan.seeds)
    assert [(row["method"], row["choice"]) for row in rows] == [
        ("AdamW", "tuned"),
        ("NGD-T", "tuned"),
        ("AdamW", "untuned"),
        ("NGD-T", "untuned"),
    ]
    reference = rows[0]
    assert reference["reached_end"] == reference["reached_near"] == plan.seeds
    assert reference["steps_end_ratio"] == 1
    assert reference["target_near"] == pytest.approx(1.02 * reference["target_end"])
    assert reference["steps_near"] <= reference["steps_end"]


def test_dissipation_is_that_of_every_step_and_no_smaller_than_a_strided_one(done):
    plan, rows = done
    trial = plan.trial("NGD-T", DEFAULTS["NGD-T"], 1)
    audit = to.audit(plan.folder / trial.name, lens="outputs")
    assert len(audit.steps) == trial.training.steps
    for stride in (1, 5):
        strided = to.audit(plan.folder / trial.name, lens="outputs", stride=stride).summary
        found = evidence.at_stride(plan.folder / trial.name, stride)
        assert found == pytest.approx(strided["dissipation"], rel=1e-9)
    assert all(row["dissipation_stride_10"] <= row["dissipation"] * (1 + 1e-9) for row in rows)


def test_a_learning_rate_ends_at_zero(done):
    plan, _ = done
    run = to.load_run(plan.folder / plan.trial("AdamW", DEFAULTS["AdamW"], 1).name)
    assert run.steps["lr"].iloc[-1] == pytest.approx(0, abs=1e-12)


def test_what_it_cannot_mean_is_refused(capsys):
    assert main(["evidence", "digits", "--methods", "Adam"]) == 2
    assert "method 'Adam' is unknown" in capsys.readouterr().err
    assert main(["evidence", "digits", "--seeds", "0"]) == 2
    assert "at least one seed" in capsys.readouterr().err
