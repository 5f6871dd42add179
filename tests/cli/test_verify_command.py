"""The verify command: JSON, tables, page, exit status, scorecard, refusals."""

import json
from unittest import mock

import pytest
import torch
import typer
from typer.testing import CliRunner

from thermo_opt.cli.verify import verify
from thermo_opt.errors import InputError
from thermo_opt.optim import NGDT
from thermo_opt.theory.verify import claims, scorecard
from thermo_opt.theory.verify.verdict import equal

app = typer.Typer()
app.command()(verify)


class Clumsy(torch.optim.Optimizer):
    def step(self, closure=None):
        raise RuntimeError("two left hands")


def call(*arguments):
    return CliRunner().invoke(app, list(arguments))


def test_json_is_one_object_and_nothing_else():
    result = call("one-step", "--json", "--seed", "5")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["seed"] == 5
    assert {v["claim"] for v in found["verdicts"]} == {"one-step"}
    assert set(found["verdicts"][0]) == {
        "claim", "problem", "statement", "predicted", "relation", "measured", "tolerance",
        "verdict",
        "seed", "seconds",
    }  # fmt: skip


def test_table_and_page(tmp_path):
    page = tmp_path / "verify.html"
    result = call("one-step", "decomposition", "--html", str(page))
    assert result.exit_code == 0
    assert "6 of 6 checks of 2 claims hold, seed 0." in result.stdout
    text = page.read_text(encoding="utf-8")
    assert "<h2>decomposition" in text
    assert text.count('class=" good"') == 6
    assert "src=" not in text


def test_overview_has_a_row_a_claim_and_details_what_fails():
    only = {name: claims.CLAIMS[name] for name in ("one-step", "decomposition")}
    only["false"] = lambda use, rng: [equal("p", "two is three", 3.0, 2.0, 0.1)]
    only["false"].__doc__ = "Two is three."
    with mock.patch.dict(
        claims.CLAIMS, only, clear=True
    ):  # puts them back in their order, unlike monkeypatch
        result = call()
    assert result.exit_code == 1
    assert "two is three" in result.stdout
    assert "(L − L_min) after one step" not in result.stdout
    assert "6 of 7 checks of 3 claims hold, seed 0." in result.stdout


def test_a_failing_claim_exits_with_one(monkeypatch):
    monkeypatch.setitem(
        claims.CLAIMS, "one-step", lambda use, rng: [equal("p", "two is three", 3.0, 2.0, 0.1)]
    )
    result = call("one-step")
    assert result.exit_code == 1
    assert "fails" in result.stdout


def test_mutants():
    result = call("one-step", "--mutants", "--json")
    assert result.exit_code == 0
    assert all(m["rejected"] for m in json.loads(result.stdout)["mutants"])


def test_a_surviving_mutant_exits_with_one(monkeypatch):
    monkeypatch.setitem(
        claims.CLAIMS, "one-step", lambda use, rng: [equal("p", "one is one", 1.0, 1.0, 0.1)]
    )
    result = call("one-step", "--mutants")
    assert result.exit_code == 1
    assert "survives" in result.stdout


def test_scorecard_tells_natural_gradient_from_the_rest():
    ours, sgd, adam, ngdt = scorecard(
        lambda model: NGDT(model, 1e-3, metric="exact", momentum=0.0), seed=2, steps=25
    )
    for score in (ours, sgd, adam, ngdt):
        assert score.bound <= 1 + 1e-9  # Cauchy–Schwarz, whatever the optimizer
    for score in (ours, ngdt):
        assert score.alignment == pytest.approx(1, abs=1e-6)
        assert score.invariance < 0.15  # damping and finite steps leave a little
        assert score.descent == 1
    assert ours.budget_mean == pytest.approx(1e-3, rel=1e-6)
    assert ours.budget_spread < 1e-6
    for score in (sgd, adam):
        assert score.alignment < 0.9
        assert score.invariance > 0.2
        assert score.budget_spread > 0.1
    assert ngdt.steps_to_target < min(sgd.steps_to_target or 99, adam.steps_to_target or 99)


def test_scorecard_by_name():
    result = call("--optimizer", "torch.optim:Adagrad", "--json")
    assert result.exit_code == 0
    assert [s["optimizer"] for s in json.loads(result.stdout)["scorecard"]] == [
        "Adagrad",
        "SGD",
        "Adam",
        "NGD-T",
    ]


def test_a_diverging_optimizer_gets_blanks_not_numbers():
    wild = scorecard(lambda model: torch.optim.SGD(model.parameters(), lr=1e200), steps=5)[0]
    assert (wild.bound, wild.alignment, wild.budget_mean) == (None, None, None)


def test_optimizers_that_need_a_closure_are_run():
    lbfgs = scorecard(torch.optim.LBFGS, steps=3)[0]
    assert lbfgs.optimizer == "LBFGS"
    assert lbfgs.loss < 1.4


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("torch.optim", "package.module:factory"),
        ("no.such.module:make", "can't be imported"),
        ("torch.optim:Nothing", "has no attribute 'Nothing'"),
        ("math:pi", "callable"),
        ("torch.nn:Linear", "no torch Optimizer"),
        ("builtins:id", "returned int"),
        ("builtins:range", "no torch Optimizer"),
        (
            lambda model: torch.optim.SGD(model.parameters(), lr=-1.0),
            "factory failed .*learning rate",
        ),
        (lambda model: Clumsy(model.parameters(), {}), "step failed .*left hands"),
    ],
)
def test_bad_factories_are_refused(factory, words):
    with pytest.raises(InputError, match=words):
        scorecard(factory)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer", "torch.optim:SGD", "one-step"], "leave out claims"),
        (["--seed", "-1"], "seed"),
        (["one-step", "--html", "no/such/folder/page.html"], "doesn't exist"),
        (["one-stop"], "did you mean one-step"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    result = call(*arguments)
    assert isinstance(result.exception, InputError)
    assert words in str(result.exception)
