"""The runs in data/: whole, small, reproducible, and finely enough sampled that two ways to their
dissipation agree."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.func import functional_call, jvp

from thermo_opt.demo_models import digits_mlp
from thermo_opt.runs import install, load_run, predict
from thermo_opt.runs.readers.architecture import model_from_config

DATA = Path(__file__).parents[2] / "data"
DIGITS = ("digits-sgd", "digits-sgd-momentum", "digits-adam", "digits-adam-minibatch")


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("make_runs", DATA / "make_runs.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_files_are_those_of_the_data_card():
    expected = dict(
        reversed(line.split("  ")) for line in (DATA / "SHA256SUMS").read_text().splitlines()
    )
    files = [
        file
        for run in DATA.iterdir()
        if run.is_dir()
        for file in run.rglob("*")
        if file.is_file() and file.suffix != ".pyc"
    ]
    found = {
        file.relative_to(DATA).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
    }
    assert found == expected
    assert sum(file.stat().st_size for file in files) < 15e6


@pytest.mark.parametrize("name", DIGITS)
def test_the_script_makes_the_recorded_run(script, tmp_path, name):
    script.record_digits(tmp_path / name, name, steps=5)
    recorded, again = load_run(DATA / name), load_run(tmp_path / name)
    assert again.info.probe_fingerprint == recorded.info.probe_fingerprint
    for a, b in zip(again.snapshots, recorded.snapshots[:6], strict=True):
        assert a.names() == b.names()
        for tensor in a.names():  # another kind of CPU may round differently
            torch.testing.assert_close(a.load(tensor), b.load(tensor), rtol=1e-4, atol=1e-6)


def test_all_start_from_the_same_weights_and_share_the_probe():
    runs = [load_run(DATA / name) for name in DIGITS]
    starts = [run.snapshots[0].load_group("params") for run in runs]
    assert all(torch.equal(start[name], starts[0][name]) for start in starts for name in start)
    assert len({run.probe.fingerprint for run in runs}) == 1
    assert all(run.info.model == "thermo_opt.demo_models:digits_mlp" for run in runs)


@pytest.mark.parametrize("name", DIGITS)
def test_outputs_and_parameters_agree_on_the_dissipation(name):
    """Σa and Σ√a (theory §4) from arcs between predictions, and from δᵀFδ at each step's start,
    within 5 %."""
    run, model = load_run(DATA / name), digits_mlp().double()
    inputs = run.probe.inputs.double()
    outputs, parameters = [], []
    for before, after in zip(run.snapshots[:-1], run.snapshots[1:], strict=True):
        weights = {key: value.double() for key, value in before.load_group("params").items()}
        step = {
            key: value.double() - weights[key] for key, value in after.load_group("params").items()
        }
        logits, change = jvp(lambda w: functional_call(model, w, (inputs,)), (weights,), (step,))
        p = logits.softmax(-1)
        parameters.append(float(((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).mean()))
        q = after.load("probe/logits").double().softmax(-1)
        chord = (p.sqrt() - q.sqrt()).norm(dim=-1)
        outputs.append(float((4 * torch.asin(chord / 2)).square().mean()))
    assert np.sum(outputs) == pytest.approx(np.sum(parameters), rel=0.05)
    assert np.sum(np.sqrt(outputs)) == pytest.approx(np.sum(np.sqrt(parameters)), rel=0.05)


def test_the_text_run_replays_without_options(script):
    run = load_run(DATA / "text-gpt2-trainer")
    assert run.format == "huggingface"
    assert run.info.likelihood == "categorical"
    model, losses = model_from_config(run.info.hf_config_path), []
    for snapshot in (run.snapshots[0], run.snapshots[-1]):
        install(model, snapshot, run.info.tied)
        logits = predict(model, run.probe.inputs)
        losses.append(
            float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), run.probe.targets.flatten().long()
                )
            )
        )
        assert snapshot.has_group("exp_avg")
    assert losses[1] < losses[0] < np.log(128)
    assert list(run.clock_readings("tokens", [20, 200])) == [20 * 16 * 64, 200 * 16 * 64]
    assert np.isfinite(run.clock_readings("flow", [20, 200])).all()
