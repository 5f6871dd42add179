"""A step's KL is measured on passes that are repeated exactly, or by a way that says it isn't."""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import thermo_opt as to
from thermo_opt.fisher.likelihoods import Categorical
from thermo_opt.optim.calibration import Calibration
from thermo_opt.optim.measurement import KLMeter
from thermo_opt.optim.pass_recorder import PassRecorder
from thermo_opt.optim.processes import Processes


class Lambda(nn.Module):
    """Two linear layers with a function of the hidden units between them."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.function = nn.Linear(6, 16), nn.Linear(16, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.function(self, torch.tanh(self.one(x))))


def python_branch(module: nn.Module, h: Tensor) -> Tensor:
    return h if random.random() < 0.5 else 2 * h


OWN = torch.Generator().manual_seed(0)

KINDS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], str]] = {
    "plain": (lambda m, h: h, "sample"),
    "functional dropout": (lambda m, h: functional.dropout(h, 0.5), "whole"),
    "noise on activations": (lambda m, h: h + torch.randn_like(h), "whole"),
    "path dropped by Python's random": (python_branch, "sample"),
    "NumPy noise": (
        lambda m, h: h * float(np.random.default_rng().random() * 0 + np.random.rand()),  # noqa: NPY002
        "sample",
    ),
    "batch statistics": (lambda m, h: h - h.mean(0), "whole"),
    "noise of an own generator, in training": (
        lambda m, h: h + torch.randn(h.shape, generator=OWN) if m.training else h,
        "evaluation",
    ),
    "noise of an own generator, always": (
        lambda m, h: h + torch.randn(h.shape, generator=OWN),
        "none",
    ),
}


def recorded(model: nn.Module, x: Tensor, y: Tensor) -> PassRecorder:
    recorder = PassRecorder(model)
    recorder.arm()
    functional.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
    return recorder


@pytest.mark.parametrize("kind", KINDS)
def test_the_way_of_measuring_is_found_by_trying(kind: str) -> None:
    function, way = KINDS[kind]
    model = Lambda(function)
    x, y = torch.randn(256, 6), torch.randint(4, (256,))
    seen = recorded(model, x, y).used()[0]
    meter = KLMeter(Categorical(), Processes(model))
    state = torch.get_rng_state()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        measurement = meter.begin(seen, 32, 0, expected=1e-2)
    assert meter.way == way
    assert bool(said) == (way in ("evaluation", "none"))
    assert torch.equal(state, torch.get_rng_state())
    if measurement is not None:  # nothing was moved, so there is nothing to be measured
        assert measurement.finish()[0] < 1e-10


def test_an_overspending_step_is_measured_on_all_after_a_sample() -> None:
    model = Lambda(KINDS["plain"][0])
    x, y = torch.randn(256, 6), torch.randint(4, (256,))
    seen = recorded(model, x, y).used()[0]
    measurement = KLMeter(Categorical(), Processes(model)).begin(seen, 32, 0, expected=1e-2)
    assert measurement is not None
    assert measurement.rows is not None
    with torch.no_grad():
        old = torch.log_softmax(model(x), -1)
        model.two.weight.add_(0.3)
        model.one.bias.mul_(-1)
        new = torch.log_softmax(model(x), -1)
    whole = float(functional.kl_div(new, old, log_target=True, reduction="batchmean"))
    assert measurement.of_all().finish()[0] == pytest.approx(whole, rel=1e-4)
    assert measurement.of_all().of_all().rows is None


@pytest.mark.parametrize(("factor", "way"), [(1.0, "sample"), (1e4, "whole")])
def test_certain_predictions_are_measured_whole(factor: float, way: str) -> None:
    """What one bad step changes of them, their scores do not tell."""
    model = Lambda(lambda m, h: h)
    x = torch.randn(256, 6)
    with torch.no_grad():
        model.two.weight.mul_(factor)
        sure = model(x).argmax(-1)
    seen = recorded(model, x, sure).used()[0]
    meter = KLMeter(Categorical(), Processes(model))
    meter.begin(seen, 32, 0, expected=1e-2)
    assert meter.way == way
    assert meter.certain == (way == "whole")
    calibration = Calibration(every=10)
    for step in range(40):
        calibration.observe(step, 1e-3, 1e-3, certain=meter.certain)
    assert calibration.due(40) == meter.certain


def test_steps_are_measured_while_the_last_ones_were_not_foreseen() -> None:
    def measured(ratios: list[float]) -> float:
        calibration, found = Calibration(every=10), 0
        for step, ratio in enumerate(ratios * 20):
            if calibration.due(step):
                found += 1
                calibration.observe(step, 1e-3, ratio * 1e-3)
        return found / (20 * len(ratios))

    assert measured([1.0, 1.3, 0.8]) < 0.55
    assert measured([1.0, 3.0, 0.3]) > 0.9
    assert measured([1.0] * 9 + [2.0]) < 0.45


def test_predictions_too_certain_to_have_a_gradient_are_measured() -> None:
    model = Lambda(lambda m, h: h)
    with torch.no_grad():
        model.two.weight.mul_(1e3)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        y = model(x).argmax(-1)
    y[:5] = (y[:5] + 1) % 4
    seen = recorded(model, x, y).used()[0]
    assert seen.gradient is not None
    assert int((seen.gradient != 0).any(-1).sum()) < 64
    meter, before = KLMeter(Categorical(), Processes(model)), model(x).detach()
    measurement = meter.begin(seen, None, 0, expected=1e-2)
    assert measurement is not None
    with torch.no_grad():
        model.two.weight.mul_(-1)
    kl = Categorical().kl(before.double(), model(x).detach().double())
    assert measurement.finish()[0] == pytest.approx(float(kl.mean()))


def test_a_small_part_of_the_budget_need_not_be_foreseen() -> None:
    def measured(limit: float) -> int:
        calibration, found = Calibration(every=10), 0
        for step in range(60):
            if calibration.due(step):
                found += 1
                calibration.observe(step, 1e-4, (1e-5, 4e-4)[step % 2], limit=limit)
        return found

    assert measured(1e-2) < 30
    assert measured(1e-3) > 50


def settled(step: int = 100) -> Calibration:
    """One that has foreseen its last measurements."""
    calibration = Calibration()
    for k in range(step):
        calibration.scale(1.0)
        if calibration.wanted(k):
            calibration.observe(k, 1e-3, 1e-3, limit=1e-3)
    return calibration


def test_a_jump_of_delta_is_measured_whole() -> None:
    calibration = settled()
    calibration.scale(1.5)
    assert not calibration.wanted(91)
    assert calibration.sample(91) == calibration.predictions
    calibration.scale(2.5)
    assert calibration.wanted(91)
    assert calibration.sample(91) is None
    assert calibration.sample(20) == calibration.predictions  # κ is still being found out


def test_wild_measurements_and_shocks_call_for_the_whole_minibatch() -> None:
    calibration = settled()
    assert calibration.sample(100, shocked=True) is None
    for step in range(100, 106):
        calibration.scale(1.0)
        calibration.observe(step, 1e-3, 1e-3 * 10 ** (-1) ** step, limit=1e-3)
    assert calibration.sample(106) is None


def test_a_step_priced_far_below_the_last_measured_one_is_measured() -> None:
    calibration = settled()
    calibration.scale(8.0)
    calibration.observe(100, 1e-3, 1e-3, limit=1e-3)
    calibration.scale(1.0)
    assert calibration.wanted(101)
    calibration.observe(101, 1e-3, 1e-3, limit=1e-3)
    calibration.scale(1.0)
    assert not calibration.wanted(102)


def test_the_step_after_one_that_overspent_is_measured() -> None:
    calibration = settled()
    assert calibration.wait > 1
    calibration.observe(100, 1e-3, 1.3e-3, limit=1e-3)  # foreseen, but shortened
    assert calibration.wait == 1


def test_idle_steps_lower_a_kappa_that_is_too_high() -> None:
    """Where η_max binds, it is κ that makes them idle: it would stay too high for ever."""
    calibration = settled()
    calibration.kappa *= 1e3
    for step in range(100, 140):
        calibration.observe(step, 1e-6 * calibration.kappa, 1e-6, limit=1.0)
    assert calibration.kappa == pytest.approx(1.0, rel=0.1)


def test_what_the_loss_has_left_does_not_lower_kappa() -> None:
    """Steps held back by it spend less than it: κ must not fall until one spends it all."""
    calibration = settled()
    kappa = calibration.kappa
    for step in range(100, 110):
        calibration.observe(step, 5e-4, 5e-6, limit=1e-3, held=True)
    assert calibration.kappa == kappa
    calibration.observe(110, 5e-4, 1e-3, limit=1e-3, held=True)
    assert calibration.kappa > kappa


def test_a_step_after_a_shock_is_measured_on_the_whole_minibatch() -> None:
    """As if the last step had cost a thousandth of what the loss then rose, or fell, along it."""
    outcomes = {}
    for sign in (1.0, -1.0):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        optimizer = to.NGDT(model, budget=1e-3)
        for step in range(51):
            x = torch.randn(256, 6)
            if step == 50:
                assert optimizer.calibration is not None
                assert optimizer.signal is not None
                optimizer.calibration.wait, optimizer.calibration.last = 30, step - 1
                optimizer.signal.sizes = tuple(sign * size for size in optimizer.signal.sizes)
                optimizer.signal.spent *= 1e-3
            optimizer.zero_grad()
            functional.cross_entropy(model(x), x[:, :4].argmax(1)).backward()
            optimizer.step()
        ratio, realised = (optimizer.last_step[key] for key in ("signal_ratio", "realised"))
        assert ratio is not None
        assert abs(ratio) > 5
        outcomes[ratio < 0] = (realised is not None, optimizer.meter.way)
    assert outcomes[True] == (True, "whole")
    assert not outcomes[False][0]


@pytest.mark.parametrize("predictions", [None, 48])
def test_what_the_loss_does_not_count_is_not_measured(predictions: int | None) -> None:
    """Half of the positions are padding, which hardly changes."""
    model = Lambda(lambda m, h: h)
    x = torch.randn(64, 10, 6, generator=torch.Generator().manual_seed(0))
    counted = torch.arange(10) < torch.arange(1, 65)[:, None] % 10 + 1
    x = x.where(counted[..., None], 0.0)
    y = torch.randint(4, (64, 10)).where(counted, -100)
    seen = recorded(model, x, y).used()[0]
    meter, before = KLMeter(Categorical(), Processes(model)), model(x).detach()
    begun = [meter.begin(seen, predictions, step, expected=1e-2) for step in range(40)]
    assert meter.way == ("whole" if predictions is None else "sample")
    with torch.no_grad():
        model.two.weight.add_(0.05 * torch.randn(4, 16))
    kl = Categorical().kl(before.double(), model(x).detach().double())
    assert float(kl.mean()) < 0.7 * float(kl[counted].mean())
    found = statistics.mean(m.finish()[0] for m in begun if m is not None)
    assert found == pytest.approx(float(kl[counted].mean()), rel=1e-9 if not predictions else 0.1)


def test_a_recurrent_net_over_time_first_sequences_is_measured_whole() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.LSTM(5, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.core(x)[0])

    torch.manual_seed(0)
    model = Net()
    seen = recorded(model, torch.randn(40, 3, 5), torch.randint(4, (40, 3))).used()[0]
    meter = KLMeter(Categorical(), Processes(model))
    meter.begin(seen, 16, 0, expected=1e-2)
    assert meter.way == "whole"


def test_inputs_that_cannot_be_cut_are_measured_whole() -> None:
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 4)

        def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
            return adjacency @ self.layer(x)

    torch.manual_seed(0)
    model, recorder = Graph(), None
    recorder = PassRecorder(model)
    recorder.arm()
    out = model(torch.rand(60, 60), torch.randn(60, 5))
    functional.cross_entropy(out, torch.randint(4, (60,))).backward()
    meter = KLMeter(Categorical(), Processes(model))
    meter.begin(recorder.used()[0], 8, 0, expected=1e-2)
    assert meter.way == "whole"


def test_the_mean_over_samples_is_the_mean_over_the_minibatch_when_few_examples_carry_it() -> None:
    model = Lambda(lambda m, h: 8 * h)
    x = torch.randn(400, 6)
    y = model(x).argmax(1)
    y[:5] = (y[:5] + 1) % 4  # five hard ones among certain ones
    seen = recorded(model, x, y).used()[0]
    meter, before = KLMeter(Categorical(), Processes(model)), model(x).detach()
    begun = [meter.begin(seen, 32, step, expected=1e-2) for step in range(40)]
    assert meter.way == "sample"
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(0.3 * p.grad.sign() * p.abs().mean())
    found = [m.finish()[0] for m in begun if m is not None]
    likelihood = Categorical()
    whole = float(likelihood.kl(before.double(), model(x).detach().double()).mean())
    assert statistics.mean(found) == pytest.approx(whole, rel=0.1)
    assert len({round(v, 12) for v in found}) > 30  # other examples every time


@pytest.mark.parametrize("buffers", ["spectral norm", "moving average"])
def test_measuring_leaves_every_buffer_and_random_state_as_it_was(buffers: str) -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(8))
            self.layer = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            self.mean.lerp_(h.detach().mean(0), 0.1)
            return h - self.mean

    torch.manual_seed(0)
    first = Average() if buffers == "moving average" else nn.utils.spectral_norm(nn.Linear(6, 8))
    model = nn.Sequential(first, nn.Dropout(0.2), nn.Linear(8, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what can't be repeated says so
        optimizer = to.NGDT(model)
        functional.cross_entropy(model(torch.randn(30, 6)), torch.randint(3, (30,))).backward()
        before = {name: b.clone() for name, b in model.named_buffers()}
        state = torch.get_rng_state()
        optimizer.step()
    for name, b in model.named_buffers():
        assert torch.equal(b, before[name])
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_floor_is_what_rounding_alone_realises(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 10)
    with torch.no_grad():
        model.weight.mul_(8)
    recorder = PassRecorder(model)
    recorder.arm()
    x = torch.randn(2000, 6)
    with torch.autocast("cpu", dtype=dtype):
        loss = functional.cross_entropy(model(x), torch.randint(10, (2000,)))
    loss.backward()
    seen = recorder.used()[0]
    measurement = KLMeter(Categorical(), Processes(model)).begin(seen, None, 0, expected=1.0)
    assert measurement is not None
    _, floor = measurement.finish()
    exact, rounded = model(x).detach().double(), seen.outputs.double()
    assert floor / 5 < 2 * float(Categorical().kl(exact, rounded).mean()) < 20 * floor
    seen.autocast, seen.outputs = None, model(x).detach()
    plain = KLMeter(Categorical(), Processes(model)).begin(seen, None, 0, expected=1.0)
    assert plain is not None
    assert plain.finish()[1] < 1e-8 * floor + 1e-12


def test_steps_below_the_floor_of_bfloat16_teach_the_calibration_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 5))
    optimizer = to.NGDT(model)
    generator = torch.Generator().manual_seed(0)
    kappas = []
    for step in range(160):
        x = torch.randn(64, 6, generator=generator)
        y = (x[:, :5] + torch.randn(64, 5, generator=generator)).argmax(1)
        optimizer.param_groups[0]["lr"] = 1.0 if step < 60 else 1e-3
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        kappas.append(optimizer.calibration.kappa)
        if step >= 60:
            assert optimizer.last_step["shortened"] == 1.0
    assert max(kappas[60:]) < 4 * kappas[59]
    assert min(kappas[60:]) > kappas[59] / 4
