"""What the studies measure beside the runs: alignment of steps with the natural gradient, and peak
memory."""

import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn

import thermo_opt as to
from analysis import study_alignment, study_memory
from analysis.study_alignment import DAMPING, align, freeze
from analysis.study_table import notes
from analysis.trials import MOMENTS, WEIGHTS, around, batches, record, trial_of
from thermo_opt.sweep import build_task, read_result

STEPS, ALIGNED = 20, 16
TRIAL = trial_of(
    "digits", {"batch_size": 16}, "SGD", {"lr": 0.1}, 0, STEPS, every=10, aligned=ALIGNED
)


@pytest.fixture(name="aligned", scope="module")
def _aligned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    align(record(TRIAL, folder, ALIGNED), folder / TRIAL.name, ALIGNED)
    return folder / TRIAL.name


def test_alignment_is_that_of_dense_algebra_on_the_steps_own_minibatch(aligned):
    found = read_result(aligned)["alignment"]
    assert found["steps"] == [around(m, STEPS)[0] for m in MOMENTS]
    run = to.load_run(aligned / WEIGHTS)
    recorded = [snapshot.step for snapshot in run.snapshots]
    seen = list(itertools.islice(batches(TRIAL), STEPS))
    for step, lower, upper in zip(found["steps"], found["lower"], found["upper"], strict=True):
        first, second = (
            run.snapshots[recorded.index(k)].load_group("params") for k in (step, step + 1)
        )
        model = build_task(TRIAL.task, 0).model.double()
        model.load_state_dict(first)
        x, y = seen[step][0].double(), seen[step][1]
        delta = torch.cat(
            [
                (second[name].double() - first[name].double()).flatten()
                for name, _ in model.named_parameters()
            ]
        )
        rows, gradient = [], torch.zeros_like(delta)
        for inputs, label in zip(x, y, strict=True):
            logp = torch.log_softmax(model(inputs), -1)
            for k in range(10):
                score = torch.cat(
                    [
                        g.flatten()
                        for g in torch.autograd.grad(
                            logp[k], list(model.parameters()), retain_graph=True
                        )
                    ]
                )
                rows.append(logp[k].exp().detach().sqrt() * score / len(x) ** 0.5)
                if k == int(label):
                    gradient -= score / len(x)
        scores = torch.stack(rows)
        d = -gradient @ delta
        a = (scores @ delta).square().sum() + DAMPING * delta @ delta
        inner = torch.linalg.solve(
            scores @ scores.T + DAMPING * torch.eye(len(scores)).double(), scores @ gradient
        )
        natural = (gradient @ gradient - (scores @ gradient) @ inner) / DAMPING
        exact = float(d * d.abs() / (a * natural))
        assert lower - 1e-6 <= exact <= upper + 1e-6
        assert upper - lower <= 0.12 * abs(exact)


def test_alignment_is_kept_and_one_of_another_damping_is_replaced(aligned, monkeypatch):
    path = aligned / "result.json"
    before = path.stat().st_mtime_ns
    align(TRIAL, aligned, ALIGNED)
    assert path.stat().st_mtime_ns == before
    kept = path.read_text()
    monkeypatch.setattr(study_alignment, "DAMPING", 1.0)
    align(TRIAL, aligned, ALIGNED)
    assert read_result(aligned)["alignment"]["damping"] == 1.0
    path.write_text(kept)


def test_a_run_that_diverged_says_why_it_has_no_alignment(tmp_path):
    wild = trial_of("digits", {"batch_size": 16}, "SGD", {"lr": 1e30}, 0, STEPS, aligned=ALIGNED)
    run = tmp_path / wild.name
    align(record(wild, tmp_path, ALIGNED), run, ALIGNED)
    found = read_result(run)
    assert math.isnan(found["alignment_lower"])
    assert "alignment unknown: " in "; ".join(notes(found))
    json.loads((run / "result.json").read_text(), parse_constant=pytest.fail)


def test_frozen_batch_normalisation_is_the_function_that_was_trained():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.BatchNorm1d(5)),
    )
    names, x = set(model.state_dict()), torch.randn(8, 3, 6, 6)
    trained = model.train()(x).detach()
    frozen = freeze(model, x).eval()
    assert set(frozen.state_dict()) == names
    torch.testing.assert_close(frozen(x), trained)
    torch.testing.assert_close(
        frozen(x[:2]), trained[:2]
    )  # examples no longer depend on one another
    torch.testing.assert_close(frozen.double()(x.double()), trained.double(), atol=1e-5, rtol=1e-5)


def large(method, seed=0, data=None):
    options = {"layers": 1, "width": 384, "context": 32, "batch_size": 8, "probe": 4}
    return trial_of("transformer", options, method, {"lr": 0.1}, seed, 20, data=data)


@pytest.mark.skipif(
    sys.platform != "linux", reason="the peak of resident memory is reset through /proc"
)
def test_peak_memory_holds_weights_gradients_and_optimizer_state(tmp_path):
    floats = (
        4
        * sum(
            p.numel()
            for p in build_task(large("SGD").task, 0, large("SGD").options).model.parameters()
        )
        / 2**20
    )
    found = {}
    for method in ("SGD", "AdamW"):
        trials = [large(method, seed) for seed in (0, 1)]
        folders = [tmp_path / trial.name for trial in trials]
        for folder in folders:
            folder.mkdir()
            (folder / "result.json").write_text("{}")
        study_memory.add_peak_memory(trials, folders)
        if "doesn't reset" in str(read_result(folders[0]).get("peak_memory_reason")):
            pytest.skip("a kernel without /proc/self/clear_refs")
        assert "peak_memory_reason" not in read_result(folders[0])
        found[method] = [read_result(folder)["peak_memory"] for folder in folders]
        assert found[method][1] == pytest.approx(found[method][0], rel=0.1, abs=0.5)
        before = folders[0].joinpath("result.json").stat().st_mtime_ns
        study_memory.add_peak_memory(trials, folders)
        assert folders[0].joinpath("result.json").stat().st_mtime_ns == before
    assert np.mean(found["SGD"]) > 3 * floats  # weights, gradients, momentum
    assert np.mean(found["AdamW"]) - np.mean(found["SGD"]) == pytest.approx(
        floats, rel=0.5
    )  # a second moment


def test_where_peak_memory_cannot_be_known_it_is_null_with_the_reason(tmp_path, monkeypatch):
    def refused():
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(study_memory, "reset_peak", refused)
    (found,) = study_memory.measure([large("SGD")])
    assert found["peak_memory"] is None
    assert "Permission denied" in notes(found)[0]
    (tmp_path / "result.json").write_text("{}")
    study_memory.add_peak_memory([large("SGD", data=str(tmp_path / "nowhere"))], [tmp_path])
    assert "nowhere" in notes(read_result(tmp_path))[0]
