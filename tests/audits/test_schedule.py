"""An even schedule's prediction against the run it predicts (§12)."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

import thermo_opt as to


def descend(path, rates):
    """Full-batch descent on digits with these learning rates, recorded at every step."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x[:300] / 16, dtype=torch.float32), torch.tensor(y[:300])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    with to.Recorder(path, model=model, optimizer=optimizer, probe=(x, y), every=1) as rec:
        for rate in rates:
            optimizer.param_groups[0]["lr"] = float(rate)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            rec.step(loss=loss)
    return to.audit(path, lens="outputs")


def test_full_batch_descent_at_even_speed_costs_what_was_predicted(tmp_path):
    first = descend(tmp_path / "first", np.full(120, 0.5))
    schedule = to.even_schedule(first)
    assert schedule.learning_rates.sum() == pytest.approx(60.0)
    assert schedule.dissipation == pytest.approx(first.summary["dissipation"])
    steadiness = first.summary["steadiness"]
    assert schedule.predicted_dissipation == pytest.approx(steadiness * schedule.dissipation)
    second = descend(tmp_path / "second", schedule.learning_rates)
    realised = second.summary["dissipation"]
    assert realised == pytest.approx(schedule.predicted_dissipation, rel=0.02)
    assert realised < 0.8 * schedule.dissipation
    assert second.summary["loss_end"] == pytest.approx(first.summary["loss_end"], rel=0.02)
    factor = schedule.lr_lambda()
    assert factor(0) == 1
    assert factor(7) == pytest.approx(schedule.learning_rates[7] / schedule.learning_rates[0])


def test_runs_that_can_not_tell_are_refused(tmp_path):
    z = np.random.default_rng(0).normal(size=(5, 9, 3))
    with pytest.raises(to.InputError, match="every step"):
        to.even_schedule(to.audit_predictions(z, np.zeros(9, int), steps=[0, 2, 4, 6, 8]))
    with pytest.raises(to.InputError, match="learning rate of every step"):
        to.even_schedule(to.audit_predictions(z, np.zeros(9, int), steps=range(5)))


def test_a_minibatch_run_is_evened_after_averaging(tmp_path):
    """Noise that fades is told from single steps' scatter: the prediction isn't their spread."""
    rng = np.random.default_rng(0)
    scale = np.where(np.arange(120) < 40, 0.1, 0.03)
    moves = scale[:, None, None] * rng.normal(size=(120, 30, 3))
    z = np.cumsum(np.concatenate([np.zeros((1, 30, 3)), moves]), axis=0)
    audit = to.audit_predictions(z, np.zeros(30, int), steps=range(121))
    rates = pd.DataFrame({"lr": np.full(120, 0.1)}, index=np.arange(1, 121))
    audit = replace(audit, curve=rates)
    even = to.even_schedule(audit)
    assert even.smoothed
    assert even.learning_rates.sum() == pytest.approx(12.0)
    assert even.learning_rates[:30].mean() < 0.7 * even.learning_rates[-60:].mean()
    ideal = (40 * 0.1 + 80 * 0.03) ** 2 / (120 * (40 * 0.01 + 80 * 0.0009))
    assert 1 - even.saving == pytest.approx(ideal, abs=0.06)
    assert 0 < even.saving_error < 0.1
    half = even.stretched(60)
    assert half.learning_rates.sum() == pytest.approx(12.0)
    assert half.predicted_dissipation == pytest.approx(2 * even.predicted_dissipation)
    with pytest.raises(to.InputError, match="at least 1"):
        even.stretched(0)


def test_a_run_near_instability_predicts_nothing(tmp_path):
    """Housekeeping over noise is ηh/(2 − ηh) of a mode h (§11)."""
    for rate in (0.4, 1.6):
        torch.manual_seed(0)
        model = nn.Linear(1, 300, bias=False)
        nn.init.zeros_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), rate)
        one = torch.ones(1, 1)

        def closure(model=model, optimizer=optimizer, one=one):
            optimizer.zero_grad()
            loss = (0.5 * (model(one) - torch.randn(1, 300)) ** 2).sum()
            loss.backward()
            return loss

        with to.Recorder(
            tmp_path / f"{rate}", model=model, optimizer=optimizer, likelihood="gaussian",
            probe=(one, torch.zeros(1, 300)), sigma2=1.0, replica=closure, replica_every=2,
        ) as recorder:  # fmt: skip
            for _ in range(60):
                loss = closure()
                optimizer.step()
                recorder.step(loss=loss)
        schedule = to.even_schedule(to.audit(tmp_path / f"{rate}", lens="outputs"))
        assert schedule.overshoot == pytest.approx(rate, rel=0.15)
        assert schedule.near_instability == (rate > 1)
        assert not schedule.worthwhile
