"""Steps follow the signal: Kalman's gain on noisy quadratics, the whole budget where there is no
noise, rest where the loss is spent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thermo_opt as to
from thermo_opt.optim.signal import LEAST, MARGIN, WARMUP, Signal


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_in_a_noisy_quadratic_the_scale_becomes_signal_over_signal_and_noise(noise: float) -> None:
    """L(θ) = |θ|²/2, F = I, gradients θ + ξ. From a fixed distance the step along −(θ + ξ) that
    lowers E L most is |θ|²/(|θ|² + E|ξ|²) long."""
    generator = torch.Generator().manual_seed(0)
    size, signal, seen = 400, Signal(), []
    start = torch.ones(size, dtype=torch.float64) / size**0.5

    def gradient(at: Tensor) -> Tensor:
        draw = torch.randn(size, generator=generator, dtype=torch.float64)
        return at + noise**0.5 * draw / size**0.5

    for step in range(600):
        v = gradient(start)
        taken = signal.scale
        signal.took([taken], 0.5 * taken**2 * float(v @ v))
        signal.observe(step, [float(gradient(start - taken * v) @ v)])
        seen.append(signal.scale)
    wanted = 1 / (1 + noise) / (1 + MARGIN)
    assert sum(seen[200:]) / 400 == pytest.approx(wanted, rel=0.15)


def test_the_scale_waits_for_the_metric_and_never_leaves_its_bounds() -> None:
    signal = Signal()
    for step in range(200):
        signal.took([1.0], 0.5)
        signal.observe(step, [-5.0])
        assert signal.scale == 1.0 if step < WARMUP else LEAST <= signal.scale < 1.0
    for step in range(200, 400):
        signal.took([1.0], 0.5)
        signal.observe(step, [5.0])
    assert signal.scale == 1.0


def stream(noise: float, steps: int, seed: int = 0, **options: object) -> list[float]:
    """Excess loss per step of a linear regression on fresh data with noise of this deviation."""
    torch.manual_seed(seed)
    truth = torch.randn(12, 1)
    model = nn.Linear(12, 1, bias=False)
    optimizer = to.NGDT(model, likelihood="gaussian", **options)
    excess = []
    for _ in range(steps):
        x = torch.randn(32, 12)
        y = x @ truth + noise * torch.randn(32, 1)
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().mean()).backward()
        optimizer.step()
        excess.append(0.5 * float((model.weight.detach().T - truth).square().sum()))
    return excess


@pytest.mark.parametrize("metric", ["kfac", "exact"])
def test_regression_on_noisy_data_ends_nearer_to_the_truth_than_with_kl_clipping(
    metric: str,
) -> None:
    def late(**options: object) -> float:
        return sum(sum(stream(1.0, 150, seed, metric=metric, **options)[-30:]) for seed in range(4))

    assert late() < 0.75 * late(regulator="kl-clip")


def test_without_noise_the_budget_is_spent_until_eta_max_binds_and_then_nothing_is() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    y = x @ torch.randn(8, 2)
    model = nn.Linear(8, 2)
    optimizer = to.NGDT(model, budget=1e-3, metric="exact", likelihood="gaussian", momentum=0.0)
    spent, bound = [], []
    for _ in range(260):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
        spent.append(optimizer.last_step["predicted"])
        bound.append(optimizer.last_step["bound_by_eta_max"])
    assert spent[: bound.index(1.0)] == pytest.approx([1e-3] * bound.index(1.0), rel=1e-5)
    assert spent[-1] < 1e-9
    assert float((model(x) - y).square().mean()) < 1e-6


def test_the_average_of_natural_gradients_is_no_longer_than_the_longest_of_them() -> None:
    """So that η_max = 1 bounds Newton steps, whatever the momentum."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 5), torch.randn(64, 1)
    model = nn.Linear(5, 1)
    optimizer = to.NGDT(
        model, budget=1e6, metric="exact", likelihood="gaussian", momentum=0.9, regulator="kl-clip"
    )
    longest = 0.0
    for _ in range(60):
        optimizer.zero_grad()
        (0.5 * (model(x) - y).square().sum(1).mean()).backward()
        optimizer.step()
        longest = max(longest, optimizer.last_step["delta"])
        assert 2 * optimizer.last_step["predicted"] <= longest * (1 + 1e-5)


def test_the_signal_survives_a_checkpoint() -> None:
    def run(resume: bool) -> Tensor:
        torch.manual_seed(0)
        x, y = torch.randn(50, 20, 6), torch.randint(3, (50, 20))
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizer = to.NGDT(model)
        for step in range(50):
            if resume and step == 40:
                saved = optimizer.state_dict()
                optimizer.close()
                optimizer = to.NGDT(model)
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[step]), y[step]).backward()
            optimizer.step()
        assert optimizer.signal.scale < 1.0
        return model[0].weight.detach()

    assert torch.equal(run(False), run(True))
