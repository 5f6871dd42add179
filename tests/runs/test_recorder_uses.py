"""The Recorder as different people use it: nothing is lost, and no training is changed or ended."""

import os
import random
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import thermo_opt as to
from thermo_opt.errors import InputError

X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 3


def made(kind=nn.Linear):
    torch.manual_seed(0)
    model = kind(4, 3)
    return model, torch.optim.SGD(model.parameters(), 0.1)


def go(recorder, model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X.clone()), Y)
        loss.backward()
        optimizer.step()
        if recorder is not None:
            recorder.step(loss=loss)


def steps_of(path):
    run = to.load_run(path)
    for snapshot in run.snapshots:
        for name in snapshot.names():
            snapshot.load(name)
    return list(run.steps.index), [snapshot.step for snapshot in run.snapshots]


def test_a_training_that_changes_its_folder_is_recorded_where_it_began(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, optimizer = made()
    (tmp_path / "elsewhere").mkdir()
    with to.Recorder("run", model=model, optimizer=optimizer, probe=(X, Y)) as recorder:
        go(recorder, model, optimizer, 1)
        os.chdir("elsewhere")
        go(recorder, model, optimizer, 2)
    assert steps_of(tmp_path / "run") == ([1, 2, 3], [0, 1, 2, 3])


def test_a_home_a_store_and_what_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    model, optimizer = made()
    options = {"model": model, "optimizer": optimizer, "probe": (X, Y)}
    with to.Recorder("~/runs/a", **options) as recorder:
        go(recorder, model, optimizer, 1)
    assert len(to.load_run("~/runs/a").snapshots) == 2
    assert not (tmp_path / "~").exists()
    to.audit("~/runs/a").to_json("~/audit.json")
    assert (tmp_path / "home/audit.json").exists()
    with pytest.raises(InputError, match="on this machine alone"):
        to.Recorder("s3://bucket/run", **options)
    for path in ("x\0y", b"x"):
        with pytest.raises(InputError, match="give the path"):
            to.Recorder(path, **options)


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise KeyError", "del recorder; gc.collect()"])
def test_a_recorder_that_nobody_closed_writes_what_was_due(tmp_path, end):
    code = f"""
        import gc, sys, torch, thermo_opt as to
        x, y = torch.randn(12, 4), torch.arange(12) % 3
        model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        options = dict(model=model, optimizer=optimizer, probe=(x, y))
        recorder = to.Recorder("run", **options).__enter__()
        for _ in range(40):
            recorder.step(loss=1.0)
        {end}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True
    )
    assert "never closed" in done.stderr
    assert steps_of(tmp_path / "run") == (list(range(1, 41)), list(range(41)))


def test_several_threads_may_step(tmp_path):
    model, optimizer = made()
    with to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=(X, Y), every=10
    ) as recorder:
        threads = [
            threading.Thread(target=lambda: [recorder.step(loss=1.0) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert steps_of(tmp_path / "run") == (list(range(1, 201)), list(range(0, 201, 10)))


@pytest.mark.parametrize("what", ["log", "batch", "every", "replica"])
def test_what_goes_beside_the_record_may_fail(tmp_path, what):
    model, optimizer = made()

    def fails(*_, **__):
        raise ConnectionError("the server\nis down")

    options = {} if what == "batch" else {what: fails}
    recorder = to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=(X, Y), replica_every=2, **options
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with recorder:
            for _ in range(6):
                recorder.step(loss=1.0, batch=3 if what == "batch" else None)
    (only,) = [str(warning.message) for warning in said]
    assert f"goes on without {what} at step" in only
    rows, snapshots = steps_of(tmp_path / "run")
    assert rows == list(range(1, 7))
    assert snapshots == ([0, 6] if what == "every" else list(range(7)))


def test_warnings_as_errors_end_no_training(tmp_path, capsys):
    model, optimizer = made()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with to.Recorder(
            tmp_path / "run", model=model, optimizer=optimizer, probe=(X, Y), moments=True
        ) as recorder:
            recorder.step(loss=1.0, odd=[1, 2])
            recorder.step(loss=1.0, batch=4)
    said = capsys.readouterr().err
    assert "'odd' is [1, 2]" in said
    assert "moments=True" in said
    assert steps_of(tmp_path / "run") == ([1, 2], [0, 1, 2])


class InPlace(nn.Linear):
    def forward(self, x):
        return super().forward(x.div_(2).relu_())


def test_the_probe_stays_what_it_was(tmp_path):
    """Whether the model works in place, or the loop fills the tensors anew."""
    model, optimizer = made(InPlace)
    x = X.clone()
    with to.Recorder(tmp_path / "run", model=model, optimizer=optimizer, probe=(x, Y)) as recorder:
        assert torch.equal(x, X)
        recorder.step()
        x.zero_()
        recorder.step()
    run = to.load_run(tmp_path / "run")
    assert torch.equal(run.probe.inputs, X)
    first, *others = [snapshot.load("probe/logits") for snapshot in run.snapshots]
    assert all(torch.equal(first, other) for other in others)
    assert to.audit(run).summary["dissipation"] == 0


class Remembering(nn.Module):
    """Counts its calls, keeps what it saw, and draws from generators of its own."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.layer = nn.Linear(inputs, outputs)
        self.calls, self.last, self.seen, self.cache = 0, None, [], {"best": 0.0}
        self.torch_generator = torch.Generator().manual_seed(0)
        self.numpy_generator = np.random.default_rng(0)
        self.old_generator = np.random.RandomState(0)
        self.python_generator = random.Random(0)

    def forward(self, x):
        self.calls += 1
        z = self.layer(x) * (1 + 0.1 * self.calls)
        if self.last is not None:
            z = z + self.last.detach().mean()
        noise = torch.rand(1, generator=self.torch_generator).item() + self.numpy_generator.random()
        noise += self.old_generator.rand() + self.python_generator.random()
        self.last, self.found = z, True
        self.seen.append(len(x))
        self.cache["best"] = max(self.cache["best"], float(z.detach().max()))
        self.cache[self.calls] = noise
        return z + noise


def test_a_model_with_a_memory_of_its_own_trains_as_it_would(tmp_path):
    ends = []
    for recorded in (False, True):
        model, optimizer = made(Remembering)
        if recorded:
            with to.Recorder(
                tmp_path / "run", model=model, optimizer=optimizer, probe=(X[:5], Y[:5])
            ) as recorder:
                assert not hasattr(model, "found")
                go(recorder, model, optimizer, 4)
        else:
            go(None, model, optimizer, 4)
        ends.append((model.layer.weight, model.calls, model.seen, model.cache))
    (weight, *members), (weight_too, *members_too) = ends
    assert torch.equal(weight, weight_too)
    assert members == members_too


def test_models_without_shapes_or_values_are_refused(tmp_path):
    lazy = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d())
    with pytest.raises(InputError, match="lazy layer"):
        to.Recorder(
            tmp_path / "r", model=lazy, optimizer=torch.optim.SGD(lazy.parameters()), probe=(X, Y)
        )
    empty = nn.Linear(4, 3, device="meta")
    with pytest.raises(InputError, match="meta device"):
        to.Recorder(
            tmp_path / "r", model=empty, optimizer=torch.optim.SGD(empty.parameters()), probe=(X, Y)
        )
    assert not (tmp_path / "r").exists()


def test_a_batch_of_a_loader_is_a_probe(tmp_path):
    model, optimizer = made()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), 6)
    with to.Recorder(
        tmp_path / "run", model=model, optimizer=optimizer, probe=next(iter(loader))
    ) as recorder:
        go(recorder, model, optimizer, 1)
    assert torch.equal(to.load_run(tmp_path / "run").probe.inputs, X[:6])
    with pytest.raises(InputError, match="of type DataLoader; give a pair"):
        to.Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=loader)


def test_outputs_are_written_whole_and_devices_stay_devices(tmp_path):
    model, optimizer = made()
    with to.Recorder(tmp_path / "run", model=model, optimizer=optimizer, probe=(X, Y)) as recorder:
        go(recorder, model, optimizer, 2)
    audit = to.audit(tmp_path / "run")
    kept = tmp_path / "kept.json"
    (tmp_path / "link.json").symlink_to(kept)
    audit.to_json(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink()
    assert kept.read_text() == audit.to_json() + "\n"
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    audit.to_json(tmp_path / "pipe")
    reader.join()
    assert read == [kept.read_text()]
    assert (tmp_path / "pipe").is_fifo()
    audit.to_json("/dev/null")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(InputError, match="can't be written"):
        audit.to_json(tmp_path / "absent/a.json")
    with pytest.raises(InputError, match="is a directory"):
        audit.to_json(tmp_path)


class Settled(torch.optim.Optimizer):
    """Without a learning rate; its diagnostics are of any kind."""

    def __init__(self, params):
        super().__init__(params, {})
        self.last_step = {"alignment": torch.ones(3), "kappa": "x", 3: 4.0, "norm": 2.0}


def test_settings_and_diagnostics_of_other_kinds(tmp_path):
    model, _ = made()
    shown = []
    torch.set_default_device("meta")  # stands for any that isn't the CPU
    try:
        recorder = to.Recorder(
            tmp_path / "run",
            model=model,
            optimizer=Settled(model.parameters()),
            probe=(X, Y),
            sketch=4,
            every=np.int64(2),
            log=lambda scalars, step: shown.append(step),
        )
        with pytest.warns(UserWarning, match="goes on without log"), recorder:
            recorder.step(loss=1.0)
    finally:
        torch.set_default_device(None)
    assert steps_of(tmp_path / "run") == ([1], [0, 1])
    assert to.load_run(tmp_path / "run").steps["norm"].tolist() == [2.0]
    assert shown == [1]
