"""The step-size rules against theory §7's formulas and worked example."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import thermo_opt as to
from thermo_opt.errors import InputError
from thermo_opt.optim import Dissipation, Fixed, Heat, Minibatch

positive = st.floats(1e-8, 1e8)


@given(a=positive, budget=st.floats(1e-6, 10), eta_max=st.floats(1e-3, 10))
def test_dissipation_spends_the_budget_until_eta_max_binds(
    a: float, budget: float, eta_max: float
) -> None:
    eta = Dissipation(budget, eta_max).step_size(a, 0)
    spent = 0.5 * eta**2 * a
    assert spent <= budget * (1 + 1e-12)
    assert eta == eta_max or math.isclose(spent, budget, rel_tol=1e-12)


@given(delta=positive, budget=st.floats(1e-6, 10))
def test_heat_fixes_the_predicted_decrease(delta: float, budget: float) -> None:
    rule = Heat(budget, eta_0=0.7, eta_max=1e9, epsilon=1e-12)
    assert math.isclose(rule.step_size(delta, 0), 0.7 * budget / (delta + 1e-12), rel_tol=1e-12)
    assert Heat(budget, eta_min=0.3, eta_max=0.4).step_size(delta, 0) == min(
        max(budget / (delta + 1e-12), 0.3), 0.4
    )


def test_heat_dissipates_what_the_theory_page_says() -> None:
    eta = Heat(0.1).step_size(3e3, 0)
    assert math.isclose(0.5 * eta**2 * 3e3, 1.6667e-6, rel_tol=1e-4)


def test_schedules_are_functions_of_the_step() -> None:
    rule = Dissipation(budget=lambda k: 0.1 / (k + 1), eta_max=100.0)
    assert math.isclose(rule.step_size(2.0, 9), math.sqrt(0.01), rel_tol=1e-12)
    assert Fixed(lambda k: float(k + 1)).step_size(5.0, 2) == 3.0
    with pytest.raises(InputError, match=r"budget must be a finite number > 0, got .* at step 3"):
        Dissipation(budget=lambda k: 0.0 if k == 3 else 1.0).step_size(1.0, 3)


def worked_example(
    eta_null: float, **options: object
) -> tuple[torch.Tensor, dict[str, float | None]]:
    """F = diag(2, 1, 0, 0), g = (1, 2, 3, 4), as the Fisher of a linear-Gaussian model with a
    gradient put in by hand."""
    model = nn.Linear(4, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    x = torch.tensor([[2.0, 0, 0, 0], [0, math.sqrt(2.0), 0, 0]], dtype=torch.float64)
    optimizer = to.NGDT(
        model,
        budget=0.1,
        metric=Minibatch("dense", inverse="pseudo+null", eta_null=eta_null),
        likelihood="gaussian",
        momentum=0.0,
        **options,
    )
    model(x).sum().backward()
    model.weight.grad = torch.tensor([[1.0, 2, 3, 4]], dtype=torch.float64)
    optimizer.step()
    return model.weight.detach()[0], optimizer.last_step


def test_worked_example_of_the_theory_page_to_seven_digits() -> None:
    step, report = worked_example(0.25)
    assert report["delta"] == pytest.approx(4.5, rel=1e-12)
    assert report["eta"] == pytest.approx(0.2108185, abs=5e-8)
    assert report["predicted"] == pytest.approx(0.1, rel=1e-12)
    eta = math.sqrt(0.2 / 4.5)
    expected = torch.tensor([-0.5 * eta, -2 * eta, -0.25 * 3, -0.25 * 4], dtype=torch.float64)
    torch.testing.assert_close(step, expected, rtol=1e-12, atol=1e-14)


def test_published_heat_mapping_on_the_worked_example() -> None:
    step, report = worked_example(0.0, regulator="heat")
    assert report["eta"] == pytest.approx(0.0222222, abs=5e-8)
    assert report["predicted"] == pytest.approx(0.00111111, abs=5e-9)
    torch.testing.assert_close(step[2:], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-14)
