"""`Recorder`: what it writes, that it changes nothing in the training, and that nothing breaks
it."""

import json
import os
import random
import resource
import threading
import time
import warnings
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from thermo_opt.errors import InputError
from thermo_opt.runs import Recorder, load_run, log_spaced
from thermo_opt.runs import writer as writer_module


class Noisy(nn.Module):
    """Dropout, BatchNorm, a buffer that each forward changes, and draws from all three random
    number generators."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3)
        )
        self.register_buffer("calls", torch.zeros(1))
        self.layers[1].eval()  # a submodule in another mode than the rest
        self.layers[1].weight.requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        noise = random.random() + np.random.rand() + torch.rand(1).item()  # noqa: NPY002
        return self.layers(x) + 1e-3 * noise


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def data(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(20, 4, generator=generator), torch.randint(0, 3, (20,), generator=generator)


def train(
    model,
    optimizer,
    steps,
    recorder=None,
    loss_of=nn.functional.cross_entropy,
    after=lambda k: None,
):
    x, y = data()
    for k in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model(x.to(next(model.parameters()).dtype)), y)
        loss.backward()
        optimizer.step()
        if recorder is not None:
            recorder.step(loss=loss)
        after(k)


def record(path, steps=5, model=None, optimizer=None, **options):
    model = model or mlp()
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=0.01)
    options.setdefault("probe", data())
    with Recorder(path, model=model, optimizer=optimizer, **options) as recorder:
        train(model, optimizer, steps, recorder)
    return load_run(path)


def test_recorded_training_is_bit_identical_to_unrecorded(tmp_path):
    def trained(path=None):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        torch.manual_seed(0)
        model = Noisy()
        optimizer = torch.optim.SGD(
            (p for p in model.parameters() if p.requires_grad), lr=0.1, momentum=0.9
        )
        trace = []

        def note(k):
            flags = [module.training for module in model.modules()]
            gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            trace.append(
                (
                    flags,
                    gradients,
                    {key: value.clone() for key, value in model.state_dict().items()},
                )
            )

        if path is None:
            train(model, optimizer, 6, after=note)
        else:
            options = {"params": True, "grads": True, "probe": data(2), "probe_batch_size": 7}
            with Recorder(path, model=model, optimizer=optimizer, **options) as recorder:
                train(model, optimizer, 6, recorder, after=note)
        return trace, (random.random(), np.random.rand(), torch.rand(1).item())  # noqa: NPY002

    (plain, drawn), (recorded, drawn_too) = trained(), trained(tmp_path / "run")
    assert drawn == drawn_too
    for (flags, gradients, state), (flags_too, gradients_too, state_too) in zip(
        plain, recorded, strict=True
    ):
        assert flags == flags_too
        for a, b in zip(gradients, gradients_too, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)
        assert all(torch.equal(state[key], state_too[key]) for key in state)


def test_snapshots_hold_what_the_training_held(tmp_path):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.8, 0.95))
    x, y = data()
    kept = {}

    def note(k):
        kept[k + 1] = (
            {name: p.detach().clone() for name, p in model.named_parameters()},
            {name: p.grad.clone() for name, p in model.named_parameters()},
            {
                name: optimizer.state[p]["exp_avg_sq"].clone()
                for name, p in model.named_parameters()
            },
            model(x).detach().clone(),
        )

    with Recorder(
        tmp_path / "r",
        model=model,
        optimizer=optimizer,
        probe=(x, y),
        every=2,
        params=True,
        grads=True,
        moments=True,
    ) as recorder:
        train(model, optimizer, 7, recorder, after=note)
    run = load_run(tmp_path / "r")
    assert [snapshot.step for snapshot in run.snapshots] == [
        0,
        2,
        4,
        6,
        7,
    ]  # the last step too, though 7 is odd
    assert not run.snapshots[0].has_group("grad")
    assert not run.snapshots[0].has_group("exp_avg")
    for snapshot in run.snapshots[1:]:
        params, grads, second, logits = kept[snapshot.step]
        assert all(
            torch.equal(value, params[name])
            for name, value in snapshot.load_group("params").items()
        )
        assert all(
            torch.equal(value, grads[name]) for name, value in snapshot.load_group("grad").items()
        )
        assert all(
            torch.equal(value, second[name])
            for name, value in snapshot.load_group("exp_avg_sq").items()
        )
        torch.testing.assert_close(snapshot.load("probe/logits"), logits)
        assert snapshot.moments_meta() == {"step": snapshot.step, "betas": (0.8, 0.95)}
        assert snapshot.optimizer_step == snapshot.step
    assert list(run.steps.index) == list(range(1, 8))
    assert (run.steps["lr"] == 0.01).all()
    assert (np.diff(run.steps["wall"]) >= 0).all()
    assert run.info.optimizer == "Adam"
    assert run.info.betas == (0.8, 0.95)
    assert [p["name"] for p in run.info.parameters] == [
        name for name, _ in model.named_parameters()
    ]
    assert torch.equal(run.probe.inputs, x)
    assert torch.equal(run.probe.targets, y)
    assert run.probe.fingerprint == run.info.probe_fingerprint


def test_parameters_by_kind(tmp_path):
    """Tied, frozen, bf16 and float64 parameters, and groups of the optimizer, are recorded as they
    are."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 4)
            self.head = nn.Linear(4, 5, bias=False)
            self.head.weight = self.embed.weight
            self.scale = nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)
            self.register_buffer("count", torch.tensor(3))

        def forward(self, tokens):
            return self.head(self.embed(tokens) * self.scale)

    model = Tied()
    optimizer = torch.optim.AdamW(
        [{"params": [model.embed.weight], "weight_decay": 0.1}, {"params": [model.scale]}]
    )
    tokens = torch.tensor([[1, 2, 3], [0, 4, 2]])
    with Recorder(
        tmp_path / "r", model=model, optimizer=optimizer, probe=(tokens, tokens), params=True
    ):
        pass
    run = load_run(tmp_path / "r")
    (snapshot,) = run.snapshots
    assert set(snapshot.load_group("params")) == {"embed.weight", "scale"}
    assert snapshot.load("params/scale").dtype == torch.bfloat16
    assert snapshot.load("buffers/count").item() == 3
    assert snapshot.load("probe/logits").shape == (2, 3, 5)
    assert run.info.tied == {"head.weight": "embed.weight"}
    assert {p["name"]: p["trainable"] for p in run.info.parameters} == {
        "embed.weight": True,
        "scale": False,
    }
    assert run.info.settings["groups"] == [{"weight_decay": 0.1}, {"weight_decay": 0.01}]
    assert record(
        tmp_path / "d", model=mlp(dtype=torch.float64), probe=(data()[0].double(), data()[1])
    ).snapshots[0].load("probe/logits").dtype == (torch.float64)


@pytest.mark.parametrize("kind", ["object", "tuple", "dict"])
def test_inputs_and_outputs_of_any_kind(tmp_path, kind):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a, b):
            logits = self.layer(a + b)
            return {
                "object": SimpleNamespace(logits=logits),
                "tuple": (logits, None),
                "dict": {"logits": logits},
            }[kind]

    model, (x, y) = Model(), data()
    inputs = {"a": x, "b": 2 * x} if kind == "dict" else (x, 2 * x)
    with Recorder(
        tmp_path / "r",
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        probe=(inputs, y),
        probe_batch_size=6,
    ):
        pass
    run = load_run(tmp_path / "r")
    torch.testing.assert_close(run.snapshots[0].load("probe/logits"), model.layer(3 * x).detach())
    assert type(run.probe.inputs) is type(inputs)


def test_log_rows(tmp_path):
    """Not-a-number is valid JSON; counts, extra scalars and the optimizer's own diagnostics are
    logged by name."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer.last_step = {
        "dissipation": 0.25,
        "delta": torch.tensor(2.0),
        "basis": [1, 2],
        "step": 77,
    }
    with Recorder(
        tmp_path / "r", model=model, optimizer=optimizer, probe=data(), batch_size=20
    ) as recorder:
        recorder.step(loss=torch.tensor(float("nan")), examples=20, tokens=7)
        recorder.step(loss=float("inf"), lr=0.1, examples=20, tokens=9, accuracy=0.5)
    lines = [
        json.loads(line, parse_constant=pytest.fail)
        for line in (tmp_path / "r/steps.jsonl").read_text().splitlines()
    ]
    assert lines[0]["loss"] is None
    run = load_run(tmp_path / "r")
    assert run.steps["loss"].isna().all()
    assert list(run.steps["lr"]) == [0.5, 0.1]
    assert list(run.steps["dissipation"]) == [0.25, 0.25]
    assert list(run.steps["delta"]) == [2.0, 2.0]
    assert run.steps["accuracy"].iloc[1] == 0.5
    assert list(run.clock_readings("tokens", [0, 1, 2])) == [0, 7, 16]
    assert list(run.clock_readings("examples", [0, 1, 2])) == [0, 20, 40]
    np.testing.assert_allclose(run.clock_readings("flow", [0, 1, 2]), [0, 0.5, 0.6])
    assert list(run.clock_readings("wall", [0, 2])) == [0, run.steps["wall"][2]]


def test_exceptions_of_the_training_pass_untouched(tmp_path):
    class Own(Exception):
        pass

    error = Own("mine")
    model = mlp()
    recorder = Recorder(
        tmp_path / "r", model=model, optimizer=torch.optim.SGD(model.parameters()), probe=data()
    )
    with pytest.raises(Own) as caught, recorder:  # noqa: PT012
        recorder.step(loss=1.0)
        raise error
    assert caught.value is error
    assert caught.value.__context__ is None
    assert [snapshot.step for snapshot in load_run(tmp_path / "r").snapshots] == [0, 1]


@contextmanager
def largest_file(size):
    """Writes beyond ``size`` bytes of a file fail, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_recording_but_not_the_training(tmp_path):
    model, reference = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=data()) as recorder:
            train(model, optimizer, 2, recorder)
            while not (tmp_path / "r/snapshots/00000002.safetensors").exists():
                time.sleep(0.001)
            with largest_file(300):
                train(model, optimizer, 30, recorder)
                recorder.close()  # the queue is emptied while the disk is still full
    train(reference, torch.optim.SGD(reference.parameters(), lr=0.1), 32)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters(), strict=True)
    )
    (warning,) = [w for w in caught if "recording" in str(w.message)]
    assert "stopped" in str(warning.message)
    run = load_run(tmp_path / "r")
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2]
    assert all(torch.isfinite(snapshot.load("probe/logits")).all() for snapshot in run.snapshots)


def test_no_room_at_the_start_is_said_at_once(tmp_path):
    with largest_file(100), pytest.raises(InputError, match="can't be written"):
        record(tmp_path / "r")


def test_training_waits_when_the_disk_is_slow(tmp_path, monkeypatch):
    """The queue is bounded: with the disk stuck, training stops after a few snapshots instead of
    filling the memory."""
    gate, write = threading.Event(), writer_module.write_tensors

    def slow(path, *rest):
        if path.stem.isdecimal() and int(path.stem) > 0:
            gate.wait()
        write(path, *rest)

    monkeypatch.setattr(writer_module, "write_tensors", slow)
    model = mlp()
    recorder = Recorder(
        tmp_path / "r", model=model, optimizer=torch.optim.SGD(model.parameters()), probe=data()
    )

    def work():
        with recorder:
            train(model, recorder._optimizer, 40, recorder)

    thread = threading.Thread(target=work)
    thread.start()
    time.sleep(0.5)
    stuck = recorder.steps_done
    gate.set()
    thread.join()
    assert stuck <= writer_module.QUEUE + 2
    assert len(load_run(tmp_path / "r").snapshots) == 41


def test_taken_folders_are_refused_and_left_alone(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/thesis.txt").write_text("mine")
    (tmp_path / "r/film.partial").write_text("mine too")
    with pytest.raises(InputError, match="already holds"):
        record(tmp_path / "r")
    with pytest.raises(InputError, match="no run to resume"):
        record(tmp_path / "r", resume=True)
    assert sorted(file.name for file in (tmp_path / "r").iterdir()) == [
        "film.partial",
        "thesis.txt",
    ]
    with pytest.raises(InputError, match="is a file"):
        record(tmp_path / "r/thesis.txt")
    assert (tmp_path / "r/thesis.txt").read_text() == "mine"


def test_a_read_only_place_is_refused(tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o555)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)  # the superuser may write anywhere
    try:
        with pytest.raises(InputError, match=r"can't be written"):
            record(tmp_path / "locked" / "r")
    finally:
        if root:
            os.seteuid(0)


def test_paths_with_spaces_and_other_letters(tmp_path):
    run = record(str(tmp_path / "mein Lauf" / "θ ångström 訓練"))
    assert run.name == "θ ångström 訓練"
    assert len(run.snapshots) == 6


def test_resuming_continues_the_same_run(tmp_path):
    whole = record(tmp_path / "whole", steps=8, params=True)
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"model": model, "optimizer": optimizer, "probe": data(), "params": True}
    with Recorder(tmp_path / "r", **options) as recorder:
        train(model, optimizer, 5, recorder)
    with open(tmp_path / "r/steps.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # a kill in the middle of a line
    (tmp_path / "r/snapshots/00000006.safetensors.partial").write_bytes(b"half")
    with Recorder(tmp_path / "r", resume=True, **options) as recorder:
        assert recorder.steps_done == 5
        train(model, optimizer, 3, recorder)
    run = load_run(tmp_path / "r")
    assert [s.step for s in run.snapshots] == [s.step for s in whole.snapshots]
    assert list(run.steps["loss"]) == list(whole.steps["loss"])
    assert (np.diff(run.steps["wall"]) >= 0).all()
    assert not list((tmp_path / "r").rglob("*.partial"))
    for a, b in zip(run.snapshots, whole.snapshots, strict=True):
        assert all(torch.equal(a.load(name), b.load(name)) for name in a.names())


def test_resuming_refuses_what_is_not_the_same_run(tmp_path):
    model = mlp()
    record(tmp_path / "r", model=model)
    before = {file: file.read_bytes() for file in (tmp_path / "r").rglob("*") if file.is_file()}
    with pytest.raises(InputError, match="other parameters"):
        record(tmp_path / "r", model=nn.Linear(4, 3), resume=True)
    with pytest.raises(InputError, match="another probe"):
        record(tmp_path / "r", model=model, probe=data(9), resume=True)
    with pytest.raises(InputError, match="isn't the present model's"):
        record(tmp_path / "r", model=mlp(seed=5), resume=True)
    with pytest.raises(InputError, match="isn't the present model's"):
        record(tmp_path / "r", model=model, resume=2)
    with pytest.raises(InputError, match="5 recorded steps"):
        record(tmp_path / "r", model=model, resume=6)
    assert before == {
        file: file.read_bytes() for file in (tmp_path / "r").rglob("*") if file.is_file()
    }


def test_resuming_at_an_earlier_step_removes_what_came_later(tmp_path):
    model = mlp()
    run = record(tmp_path / "r", steps=6, params=True, model=model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(run.snapshots[3].load(f"params/{name}"))
    again = record(tmp_path / "r", steps=1, params=True, model=model, resume=3)
    assert [snapshot.step for snapshot in again.snapshots] == [0, 1, 2, 3, 4]
    assert list(again.steps.index) == [1, 2, 3, 4]


def test_resume_of_nothing_starts_a_run(tmp_path):
    assert len(record(tmp_path / "r", resume=True).snapshots) == 6


def test_a_folder_left_by_a_kill_before_the_first_file_can_be_used(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/run.json.partial").write_text('{"schema')
    assert len(record(tmp_path / "r").snapshots) == 6


def test_moments_that_an_optimizer_lacks(tmp_path):
    model = mlp()
    with pytest.warns(UserWarning, match="keeps no exp_avg"):
        run = record(
            tmp_path / "r",
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
            moments=True,
        )
    assert not any(snapshot.has_group("exp_avg") for snapshot in run.snapshots)
    with pytest.raises(InputError, match="no optimizer moments"):
        run.snapshots[-1].moments_meta()


def test_a_parameter_trained_later_has_no_moments_until_it_has_caught_up(tmp_path):
    """Its bias correction would be another step's, so its moments are left out rather than
    misread."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    model[2].bias.requires_grad_(False)
    with Recorder(
        tmp_path / "r", model=model, optimizer=optimizer, probe=None, moments=True
    ) as recorder:
        train(model, optimizer, 2, recorder)
        model[2].bias.requires_grad_(True)
        train(model, optimizer, 2, recorder)
    last = load_run(tmp_path / "r").snapshots[-1]
    assert set(last.load_group("exp_avg")) == {"0.weight", "0.bias", "2.weight"}
    assert last.moments_meta()["step"] == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"every": 0}, "every is 0"),
        ({"every": 1.5}, "every is 1.5"),
        ({"every": "2"}, "every is '2'"),
        (
            {"model": len, "optimizer": torch.optim.SGD([torch.zeros(1)])},
            "model is of type builtin",
        ),
        ({"optimizer": "adam"}, "optimizer is of type str"),
        ({"batch_size": "20"}, "batch_size is '20'; give a whole number"),
        ({"probe_batch_size": 2.0}, "probe_batch_size is 2.0; give a whole number"),
        ({"sigma2": "1"}, "sigma2 is '1'; give a positive number"),
        ({"resume": "yes"}, "resume is 'yes'; give a whole number"),
        ({"name": 3}, "name is 3; give text"),
        ({"notes": ["x"]}, "notes is of type list"),
        (
            {"probe": (data()[0].numpy(), data()[1])},
            "probe: inputs are of type ndarray; give a tensor",
        ),
        ({"probe": (data()[0], [0] * 20)}, "probe: targets are of type list; give a tensor"),
        ({"likelihood": "cauchy"}, "likelihood"),
        ({"clock": "moon"}, "clock"),
        ({"sigma2": -1.0}, "sigma2"),
        ({"batch_size": 0}, "batch_size"),
        ({"probe_batch_size": 0}, "probe_batch_size"),
        ({"probe": None}, "nothing to record"),
        ({"probe": data()[0]}, "pair"),
        ({"probe": (data()[0][:0], data()[1][:0])}, "at least one"),
        ({"probe": (data()[0], data()[1][:7])}, "shape"),
        ({"probe": (data()[0], data()[1] + 0.5)}, "whole numbers"),
        ({"probe": (data()[0], data()[1] + 1)}, "target 3 is outside"),
        ({"probe": (data()[0], torch.full((20,), -100))}, "every target is -100"),
        ({"probe": ((data()[0], data()[0][:3]), data()[1])}, "rows"),
        ({"probe": (data()[0][:, :3], data()[1])}, "can't be evaluated"),
        ({"probe": ({"x": data()[0]}, data()[1])}, "can't be evaluated"),
        ({"probe": (None, data()[1])}, "inputs"),
        ({"notes": {"x": object()}}, "notes"),
        ({"likelihood": "gaussian"}, "gaussian targets"),
        ({"likelihood": "bernoulli", "probe": (data()[0], torch.full((20, 3), 1.5))}, r"\[0, 1\]"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        record(tmp_path / "r", **change)
    assert not (tmp_path / "r").exists()


def test_gaussian_and_bernoulli_probes(tmp_path):
    x, _ = data()
    gaussian = record(
        tmp_path / "g", steps=0, likelihood="gaussian", sigma2=0.5, probe=(x, torch.zeros(20, 3))
    )
    assert (gaussian.info.likelihood, gaussian.info.sigma2) == ("gaussian", 0.5)
    bernoulli = record(
        tmp_path / "b", steps=0, likelihood="bernoulli", probe=(x, torch.ones(20, 3))
    )
    assert bernoulli.info.likelihood == "bernoulli"
    assert len(bernoulli.snapshots) == 1


def test_log_spaced_schedule(tmp_path):
    due = [step for step in range(1, 1001) if log_spaced(3)(step)]
    assert due == sorted({round(10 ** (j / 3)) for j in range(10)})
    run = record(tmp_path / "r", steps=12, every=log_spaced(3))
    assert [snapshot.step for snapshot in run.snapshots] == [0, 1, 2, 5, 10, 12]
    with pytest.raises(InputError, match="per_decade"):
        log_spaced(0)


def test_a_failing_probe_midway_stops_the_recording_alone(tmp_path):
    class Fragile(nn.Linear):
        broken = False

        def forward(self, x):
            if self.broken and not self.training:
                raise RuntimeError("out of memory")
            return super().forward(x)

    model = Fragile(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=data()) as recorder:
        train(model, optimizer, 2, recorder)
        model.broken = True
        with pytest.warns(UserWarning, match="out of memory"):
            train(model, optimizer, 2, recorder)
        assert model.training
    assert [snapshot.step for snapshot in load_run(tmp_path / "r").snapshots] == [0, 1, 2]


def test_step_needs_the_with_block(tmp_path):
    model = mlp()
    recorder = Recorder(
        tmp_path / "r", model=model, optimizer=torch.optim.SGD(model.parameters()), probe=data()
    )
    with pytest.raises(InputError, match="with"):
        recorder.step(loss=1.0)
    with recorder:
        recorder.step(loss=1.0)
    with pytest.raises(InputError, match="once"):
        recorder.__enter__()
