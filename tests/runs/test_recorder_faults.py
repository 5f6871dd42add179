"""Nothing that a user passes, forks, deletes or resumes makes a record unreadable or ends a
training."""

import copy
import json
import os
import pickle
import resource
import shutil
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import thermo_opt as to
from thermo_opt.errors import InputError
from thermo_opt.runs import Recorder, load_run


def made(lr=0.1, kind=torch.optim.SGD):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, kind(model.parameters(), lr=lr)


X, Y = torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3


def go(recorder, model, optimizer, steps, **row):
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        recorder.step(**{"loss": loss, **row})


@pytest.mark.parametrize(
    "row",
    [
        {"lr": "fast"},
        {"loss": "x"},
        {"loss": False},
        {"loss": 1 + 2j},
        {"loss": torch.ones(2)},
        {"wall": "noon"},
        {"tokens": -3},
        {"examples": None, "note": "\udfff half"},
        {"huge": 10**500},
        {"complex": 1j},
        {"nested": {"a": [1]}},
        {"array": np.ones(3)},
        {"thing": object()},
        {"\ud800": 1.0},
        {"inf": float("inf")},
        {"meta": torch.ones((), device="meta")},
    ],
    ids=lambda row: next(iter(row)).encode("ascii", "replace").decode(),
)
def test_whatever_is_logged_the_run_stays_readable(tmp_path, row):
    model, optimizer = made()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=(X, Y)) as recorder:
            go(recorder, model, optimizer, 1)
            go(recorder, model, optimizer, 2, **row)
            go(recorder, model, optimizer, 1)
    assert len([w for w in caught if "logged as null" in str(w.message)]) <= 1
    assert not [w for w in caught if "stopped" in str(w.message)]
    run = load_run(tmp_path / "r")
    assert list(run.steps.index) == [1, 2, 3, 4]
    assert len(run.clock_readings("wall", [1, 2, 3, 4])) == 4
    assert to.audit(run, lens="outputs").summary["dissipation"] > 0
    for line in (tmp_path / "r/steps.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_one_folder_has_one_recorder_until_it_is_closed(tmp_path):
    model, optimizer = made()
    options = {"model": model, "optimizer": optimizer, "probe": (X, Y)}
    with Recorder(tmp_path / "r", **options) as recorder:
        go(recorder, model, optimizer, 2)
        for resume in (True, False):
            with pytest.raises(InputError, match="by another Recorder"):
                Recorder(tmp_path / "r", resume=resume, **options).__enter__()
        go(recorder, model, optimizer, 1)
    with Recorder(tmp_path / "r", resume=True, **options) as recorder:
        go(recorder, model, optimizer, 1)
    assert [s.step for s in load_run(tmp_path / "r").snapshots] == [0, 1, 2, 3, 4]
    abandoned = Recorder(tmp_path / "other", **options)
    abandoned.__enter__()
    del abandoned  # as after a crash in a notebook
    with Recorder(tmp_path / "other", resume=True, **options):
        pass


def test_a_forked_child_neither_records_nor_hangs(tmp_path):
    model, optimizer = made()
    with Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=(X, Y)) as recorder:
        go(recorder, model, optimizer, 2)
        child = os.fork()
        if child == 0:
            try:
                recorder.step(loss=1.0)
                recorder.close()
                recorder.__exit__(None, None, None)
            finally:
                os._exit(0)
        ended = time.monotonic() + 20
        while not os.waitpid(child, os.WNOHANG)[0]:
            assert time.monotonic() < ended
            time.sleep(0.01)
        go(recorder, model, optimizer, 2)
        with pytest.raises(InputError, match="by another Recorder"):
            Recorder(
                tmp_path / "r", model=model, optimizer=optimizer, probe=(X, Y), resume=True
            ).__enter__()
    run = load_run(tmp_path / "r")
    assert list(run.steps.index) == [1, 2, 3, 4]
    assert [s.step for s in run.snapshots] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("cut", ["newline", "row"])
def test_resuming_keeps_the_rows_that_readers_show(tmp_path, cut):
    model, optimizer = made()
    options = {"model": model, "optimizer": optimizer, "probe": (X, Y), "every": 1}
    with Recorder(tmp_path / "r", **options) as recorder:
        go(recorder, model, optimizer, 3)
    file = tmp_path / "r/steps.jsonl"
    text = file.read_bytes()
    file.write_bytes(text[:-1] if cut == "newline" else text + b'{"step": 4, "lo')
    shown = list(load_run(tmp_path / "r").steps.index)
    with Recorder(tmp_path / "r", resume=True, **options) as recorder:
        assert recorder.steps_done == 3
        go(recorder, model, optimizer, 1)
    assert list(load_run(tmp_path / "r").steps.index) == [*shown, 4] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, "batch_size"),
        ({"clock": "flow"}, "clock"),
        ({"factory": "a:b"}, "factory"),
        ({"kind": "log-probabilities"}, "kind"),
        ({"sigma2": 2.0}, "sigma2"),
        ({"sketch": 4}, "sketch"),
        ({"likelihood": "bernoulli", "probe": (X, Y[:, None] == torch.arange(3))}, "probe"),
    ],
)
def test_a_run_goes_on_only_as_what_it_was(tmp_path, change, named):
    model, optimizer = made()
    options = {"model": model, "optimizer": optimizer, "probe": (X, Y)}
    with Recorder(tmp_path / "r", **options) as recorder:
        go(recorder, model, optimizer, 1)
    before = (tmp_path / "r/run.json").read_bytes()
    with pytest.raises(InputError, match=named):
        Recorder(tmp_path / "r", resume=True, **(options | change)).__enter__()
    assert (tmp_path / "r/run.json").read_bytes() == before


@pytest.mark.parametrize("width", [0, 10**9, 1.5, True])
def test_a_sketch_of_another_size_than_helps_is_refused(tmp_path, width):
    model, optimizer = made()
    with pytest.raises(InputError, match="sketch is"):
        Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=(X, Y), sketch=width)


def test_other_settings_are_noted_and_another_optimizer_is_refused(tmp_path):
    model, optimizer = made()
    with Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=(X, Y)) as recorder:
        go(recorder, model, optimizer, 2)
    adam = torch.optim.Adam(model.parameters())
    with pytest.raises(InputError, match="optimizer 'SGD', not 'Adam'"):
        Recorder(tmp_path / "r", model=model, optimizer=adam, probe=(X, Y), resume=True).__enter__()
    optimizer.param_groups[0]["lr"] = 0.01  # as a scheduler would
    with Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=(X, Y), resume=True):
        pass
    optimizer.param_groups[0]["momentum"] = 0.5
    resumed = Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=(X, Y), resume=True)
    with pytest.warns(UserWarning, match="momentum"):
        resumed.__enter__()
    resumed.close()
    sessions = json.loads((tmp_path / "r/run.json").read_text())["sessions"]
    assert [s["step"] for s in sessions] == [2, 2]
    assert sessions[0]["settings"]["lr"] == 0.01
    assert sessions[1]["settings"]["momentum"] == 0.5


def test_a_folder_deleted_underneath_ends_the_recording_alone(tmp_path):
    model, optimizer = made()
    reference, other = made()
    recorder = Recorder(tmp_path / "r", model=model, optimizer=optimizer, probe=(X, Y), every=2)
    recorder.__enter__()
    go(recorder, model, optimizer, 1)
    shutil.rmtree(tmp_path / "r")
    with pytest.warns(UserWarning, match="the folder is gone"):
        go(recorder, model, optimizer, 4)
    recorder.close()
    for _ in range(5):
        other.zero_grad()
        functional.cross_entropy(reference(X), Y).backward()
        other.step()
    assert torch.equal(model.weight, reference.weight)


def test_probes_with_weights_soft_targets_and_other_families(tmp_path):
    model, optimizer = made()
    soft = torch.rand(12, 3).softmax(-1)
    probes = {
        "weighted": ((X, Y, torch.arange(12.0)), {}),
        "soft": ((X, soft), {}),
        "counts": ((X, torch.randint(4, (12, 3)).float()), {"likelihood": "poisson"}),
        "bernoulli": ((X, torch.rand(12, 3)), {"likelihood": "bernoulli"}),
    }
    for name, (probe, options) in probes.items():
        with Recorder(
            tmp_path / name, model=model, optimizer=optimizer, probe=probe, **options
        ) as recorder:
            go(recorder, model, optimizer, 3)
        seen = to.audit(tmp_path / name, lens="outputs").summary
        assert 0 < seen["least_distance"] <= seen["distance"] <= seen["length"] or (
            seen["loss_end"] > seen["loss_start"]
        )
    run = load_run(tmp_path / "weighted")
    assert torch.equal(run.probe.weights, torch.arange(12.0))
    z = run.snapshots[-1].load("probe/logits").double()
    nll = functional.cross_entropy(z, Y, reduction="none")
    expected = float((nll * torch.arange(12.0)).sum() / torch.arange(12.0).sum())
    assert to.audit(run, lens="outputs").summary["loss_end"] == pytest.approx(expected, rel=1e-6)
    sure = nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1))
    with pytest.raises(InputError, match="look like probabilities"):
        Recorder(
            tmp_path / "p", model=sure, optimizer=torch.optim.SGD(sure.parameters()), probe=(X, Y)
        ).__enter__()
    assert not (tmp_path / "p").exists()


def test_a_recording_that_cannot_begin_leaves_nothing(tmp_path):
    """A probe that no file can hold, or that finds no room, is no obstacle to the next try."""
    model, optimizer = made()
    path = tmp_path / "run"
    odd = {"a": X, "b": torch.zeros(12, dtype=torch.complex128)}
    forward = model.forward
    model.forward = lambda a, b=None: forward(a)
    with (
        pytest.raises(InputError, match="complex128"),
        Recorder(path, model=model, optimizer=optimizer, probe=(odd, Y)),
    ):
        pass
    assert not path.exists()
    large = torch.randn(1000, 4)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
    try:
        path.mkdir()
        with (
            pytest.raises(InputError, match="can't be written to"),
            Recorder(path, model=model, optimizer=optimizer, probe=(large, None)),
        ):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(path.iterdir()) == []
    with Recorder(path, model=model, optimizer=optimizer, probe=(X, Y)) as recorder:
        go(recorder, model, optimizer, 2)
    files = sorted(path.rglob("*"))
    with (
        pytest.raises(InputError, match="another probe"),
        Recorder(path, model=model, optimizer=optimizer, probe=(X + 1, Y), resume=True),
    ):
        pass
    assert sorted(path.rglob("*")) == files


PROBE = (torch.randn(6, 4), torch.arange(6) % 3)


class Silent:
    """What can't even be shown."""

    def __repr__(self):
        raise RuntimeError("no words")


def test_values_and_names_that_have_no_words_never_end_the_record(tmp_path):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    options = {"model": model, "optimizer": optimizer, "probe": PROBE, "name": "\ud800\x1b"}
    with (
        to.Recorder(tmp_path / "run", notes={"\udfff": "\ud800"}, **options) as recorder,
        pytest.warns(UserWarning, match="an object of type Silent, which can't be logged"),
    ):
        recorder.step(loss=1.0, extra=Silent())
    run = to.load_run(tmp_path / "run")
    assert len(run.snapshots) == 2
    assert run.steps["loss"].tolist() == [1.0]


@pytest.mark.parametrize("batch", [PROBE[0], (*PROBE, torch.ones(len(PROBE[0]))), ("x", "y")])
def test_a_minibatch_of_another_form_is_named_as_that(tmp_path, batch):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with (
        to.Recorder(tmp_path / "run", model=model, optimizer=optimizer, probe=PROBE) as recorder,
        pytest.warns(UserWarning, match=r"recorded as batch=\(inputs, targets\)"),
    ):
        recorder.step(batch=batch)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, pickle.dumps])
def test_a_copy_takes_nothing_from_the_recorder(tmp_path, duplicate):
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with to.Recorder(tmp_path / "run", model=model, optimizer=optimizer, probe=PROBE) as recorder:
        with pytest.raises(InputError, match="can't be copied"):
            duplicate(recorder)
        recorder.step(loss=1.0)
    assert len(to.load_run(tmp_path / "run").snapshots) == 2
