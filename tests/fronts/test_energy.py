"""Joules beside nats: a meter's readings reach the record and the front, and without a meter the
record says so."""

import json
import sys
import types

import matplotlib
import numpy as np
import pytest
import torch

import thermo_opt as to
from thermo_opt.runs.energy import EnergyMeter

matplotlib.use("Agg")


class Counter:
    """Stands in for Zeus's monitor: two devices whose counters advance by 1 J and 0.25 J at each
    look."""

    gpu_indices, cpu_indices = (0,), (0,)

    def __init__(self):
        self.looks = 0
        self.open = {}

    def begin_window(self, key):
        assert key not in self.open
        self.looks += 1
        self.open[key] = self.looks

    def end_window(self, key):
        passed = self.looks - self.open.pop(key)
        return types.SimpleNamespace(gpu_energy={0: 1.0 * passed}, cpu_energy={0: 0.25 * passed})


class Nothing(Counter):
    gpu_indices, cpu_indices = (), ()


class Broken(Counter):
    def __init__(self):
        raise RuntimeError("driver not loaded")


def install(monkeypatch, monitor):
    monkeypatch.setitem(sys.modules, "zeus", types.ModuleType("zeus"))
    module = types.ModuleType("zeus.monitor")
    if monitor is not None:
        module.ZeusMonitor = monitor
    monkeypatch.setitem(sys.modules, "zeus.monitor", module)


def record(path, steps=12, **options):
    torch.manual_seed(0)
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    model = torch.nn.Linear(5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with to.Recorder(
        path, model=model, optimizer=optimizer, probe=(x, y), every=3, **options
    ) as recorder:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            recorder.step(loss=loss)
    return path


def test_a_meter_counts_every_joule_once(monkeypatch):
    install(monkeypatch, Counter)
    meter = EnergyMeter()
    assert meter.devices == ["GPU 0", "CPU 0"]
    assert [meter.read() for _ in range(3)] == [1.25] * 3
    meter._monitor.looks += 8  # something draws power between two readings
    assert meter.read() == 1.25 * 9
    meter._monitor.looks += 8
    meter.restart()
    assert meter.read() == 1.25


@pytest.mark.parametrize(
    ("monitor", "reason"),
    [(None, "pip install"), (Nothing, "no meter"), (Broken, "driver not loaded")],
)
def test_without_a_meter_the_record_says_why_and_training_goes_on(
    monkeypatch, tmp_path, monitor, reason
):
    install(monkeypatch, monitor)
    with pytest.warns(UserWarning, match=reason):
        record(tmp_path / "run", energy=True)
    assert reason in json.loads((tmp_path / "run" / "run.json").read_text())["energy"]["reason"]
    assert "energy" not in to.load_run(tmp_path / "run").steps
    audit = to.audit(tmp_path / "run")
    front = to.pareto([audit])
    assert front.table["energy"].isna().all()
    with pytest.raises(to.InputError, match="no run logged its energy"):
        front.plot(energy=True)


def test_logged_joules_reach_the_front(monkeypatch, tmp_path):
    install(monkeypatch, Counter)
    run = to.load_run(record(tmp_path / "run", energy=True))
    assert run.steps["energy"].tolist() == [1.25] * 12
    front = to.pareto([to.audit(run)])
    np.testing.assert_allclose(front.table["energy"], 1.25 * front.table["step"])
    ax = front.plot(energy=True)
    assert ax.get_ylabel() == "energy (J)"
    matplotlib.pyplot.close(ax.figure)
