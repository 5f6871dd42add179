"""Sweeps run, are killed, resume without repeating anything, and end with the table of one that
never was."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import thermo_opt as to
from thermo_opt.cli import main
from thermo_opt.sweep import build_optimizer, read_config, run_sweep
from thermo_opt.sweep.records import UNFINISHED
from thermo_opt.sweep.tasks import minibatches
from thermo_opt.sweep.training import loss_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
output = "{output}"
[task]
name = "blobs"
[training]
steps = {steps}
batch_size = 64
seeds = [0, 1]
every = 4
schedule = "cosine"
[pareto]
target_loss = [0.9, 0.6]
[[method]]
optimizer = "Adam"
grid = {{ lr = [0.01, 0.03] }}
[[method]]
name = "momentum"
optimizer = "SGD"
settings = {{ momentum = 0.9 }}
grid = {{ lr = [0.05] }}
[[method]]
name = "NGD-T"
optimizer = "NGDT"
grid = {{ budget = [0.01] }}
"""


def write(folder, name="sweep", steps=40, text=CONFIG):
    file = folder / f"{name}.toml"
    file.write_text(text.format(output=folder / name, steps=steps))
    return file


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory):
    """A sweep that nobody interrupts."""
    sweep = read_config(write(tmp_path_factory.mktemp("whole"), steps=120))
    return sweep, run_sweep(sweep)


def test_a_sweep_records_every_run_and_draws_the_front(whole):
    sweep, outcome = whole
    assert outcome.trained == 8
    assert outcome.left_out == {}
    folders = sorted(path.name for path in sweep.output.iterdir() if path.is_dir())
    assert folders == sorted(trial.name for trial in sweep.trials())
    table = pd.read_csv(sweep.output / "table.csv")
    assert table["group"].unique().tolist() == ["Adam", "momentum", "NGD-T"]
    reached = table.dropna(subset="time")
    assert len(reached) >= 8
    assert (reached["efficiency"] <= 1).all()
    for name in ("pareto.html", "pareto.png"):
        assert (sweep.output / name).stat().st_size > 10_000
    run = to.load_run(sweep.output / "momentum-lr=0.05-seed=1")
    assert [snapshot.step for snapshot in run.snapshots] == list(range(0, 121, 4))
    assert run.steps["lr"].iloc[-1] == pytest.approx(0, abs=1e-12)


def test_a_killed_sweep_resumes_without_repeating_and_ends_with_the_same_table(whole, tmp_path):
    sweep, _ = whole
    config = write(tmp_path, steps=120)
    command = [sys.executable, "-m", "thermo_opt.cli", "sweep", str(config)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    output = tmp_path / "sweep"
    deadline = time.monotonic() + 120
    while (
        len(list(output.glob("*-seed=*"))) < 3
        and time.monotonic() < deadline
        and process.poll() is None
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = {path.name: path.stat().st_ino for path in output.glob("*-seed=*")}
    assert 3 <= len(done) < 8
    outcome = run_sweep(read_config(config), jobs=2)
    assert outcome.trained == 8 - len(done)
    assert {name: (output / name).stat().st_ino for name in done} == done
    assert (output / "table.csv").read_bytes() == (sweep.output / "table.csv").read_bytes()
    assert not (output / UNFINISHED).exists()


def test_a_finished_sweep_trains_nothing(whole):
    sweep, outcome = whole
    again = run_sweep(sweep)
    assert again.trained == 0
    pd.testing.assert_frame_equal(again.front.table, outcome.front.table)


def test_a_changed_configuration_is_refused_and_a_longer_list_is_not(tmp_path):
    config = write(
        tmp_path, steps=30, text=CONFIG.replace("[0.9, 0.6]", "1.1").replace("[0, 1]", "[0]")
    )
    assert run_sweep(read_config(config)).trained == 4
    text = config.read_text()
    config.write_text(text.replace("seeds = [0]", "seeds = [0, 1]"))
    assert run_sweep(read_config(config)).trained == 4
    config.write_text(text.replace("steps = 30", "steps = 31"))
    with pytest.raises(to.InputError, match="another steps"):
        run_sweep(read_config(config))


def test_a_folder_that_is_no_run_is_not_overwritten(tmp_path):
    config = write(tmp_path)
    (tmp_path / "sweep" / "NGD-T-budget=0.01-seed=0").mkdir(parents=True)
    with pytest.raises(to.InputError, match="holds no run of this sweep"):
        run_sweep(read_config(config))


IMPOSSIBLE = [
    ("lr = [0.01, 0.03]", "lr = [0.01, -0.03]", "Adam.*Invalid learning rate"),
    ("lr = [0.01, 0.03]", "learning_rate = [0.01]", "unexpected keyword"),
    ("budget = [0.01]", "budget = [-1.0]", "NGD-T.*budget"),
    ('optimizer = "Adam"', 'optimizer = "Adma"', "did you mean 'Adam'"),
    ('optimizer = "Adam"', 'optimizer = "ngdt"', "did you mean 'NGDT'"),
    ('optimizer = "Adam"', 'optimizer = "LBFGS"', "can't take a step"),
    ('optimizer = "Adam"', 'optimizer = "no.such:thing"', "can't be imported"),
    ('optimizer = "Adam"', 'optimizer = "collections:Counter"', "Counter"),
    ('name = "blobs"', 'factory = "no.such:thing"', "can't be imported"),
    ('name = "blobs"', 'factory = "math:sqrt"', "must return"),
    ('name = "blobs"', 'factory = "builtins:list"', "failed for seed"),
    (
        'name = "blobs"',
        'name = "blobs"\nlikelihood = "gaussian"',
        "can't take a step|don't fit outputs",
    ),
    ("every = 4", 'device = "abacus"', "device 'abacus'"),
]


@pytest.mark.parametrize(
    ("old", "new", "sentence"), IMPOSSIBLE, ids=[new for _, new, _ in IMPOSSIBLE]
)
def test_impossible_values_are_refused_before_anything_is_trained(
    tmp_path, capsys, old, new, sentence
):
    config = write(tmp_path, text=CONFIG.replace(old, new))
    with pytest.raises(to.InputError, match=sentence):
        run_sweep(read_config(config))
    assert not (tmp_path / "sweep").exists()
    assert main(["sweep", str(config)]) == 2
    assert capsys.readouterr().err.startswith("thermo-opt: ")


def test_a_target_no_run_reaches_ends_with_status_2_and_keeps_the_runs(tmp_path, capsys):
    config = write(tmp_path, steps=4, text=CONFIG.replace("[0.9, 0.6]", "1e-6"))
    assert main(["sweep", str(config)]) == 2
    assert "the front is empty" in capsys.readouterr().err
    assert len(list((tmp_path / "sweep").glob("*-seed=*"))) == 8


OWN = """
import torch
from torch import nn

def line(seed):
    x = torch.linspace(-1, 1, 40)[:, None]
    torch.manual_seed(seed)
    return nn.Linear(1, 1), [(a, 3 * a) for a in x], (x[::4], 3 * x[::4])

def shifting(seed):
    model, train, (x, y) = line(seed)
    return model, train, (x + seed, y)

def decayed(model, lr):
    return torch.optim.SGD(model.parameters(), lr=lr, weight_decay=1e-4)
"""
OWN_CONFIG = """
output = "out"
[task]
factory = "{module}:line"
likelihood = "gaussian"
[training]
steps = 60
batch_size = 10
seeds = [0, 1]
[pareto]
target_loss = 1.0
[[method]]
name = "own"
optimizer = "{module}:decayed"
grid = {{ lr = [0.3, 1e30] }}
"""


def test_a_task_and_an_optimizer_of_ones_own_and_runs_that_diverge(tmp_path, monkeypatch, request):
    module = f"own_{abs(hash(request.node.nodeid))}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{module}.py").write_text(OWN)
    config = tmp_path / "own.toml"
    config.write_text(OWN_CONFIG.format(module=module))
    outcome = run_sweep(read_config(config))
    table = outcome.front.table
    assert table["censored"].tolist()[:2] == [False, False]
    # what diverged ended early: either never at the target, or without two finite predictions
    diverged = {
        trial.name for trial in read_config(config).trials() if trial.settings["lr"] == 1e30
    }
    assert diverged == set(outcome.left_out) | set(table.loc[table["censored"], "run"])
    assert all(len(to.load_run(tmp_path / "out" / name).steps) < 60 for name in diverged)
    config.write_text(
        OWN_CONFIG.format(module=module).replace(":line", ":shifting").replace('"out"', '"other"')
    )
    with pytest.raises(to.InputError, match="probe changes with the seed"):
        run_sweep(read_config(config))


@pytest.mark.parametrize("seed", [1, 2])
def test_every_method_sees_the_same_data_in_the_same_order(seed, tmp_path):
    text = CONFIG.replace("[0, 1]", f"[{seed}]").replace("[0.9, 0.6]", "1.4")
    config = write(tmp_path, steps=4, text=text)
    outcome = run_sweep(read_config(config))
    first = {
        to.load_run(tmp_path / "sweep" / name).steps["loss"].iloc[0]
        for name in outcome.front.table["run"]
    }
    assert len(first) == 1  # the same weights and the same minibatch


def test_minibatches_are_shuffled_passes_that_depend_on_the_generator_alone():
    x, y = torch.arange(300.0)[:, None], torch.arange(300)

    def seen(seed, size=128):
        data = minibatches((x, y), size, torch.Generator().manual_seed(seed))
        return torch.cat([next(data)[1] for _ in range(4)])

    assert torch.equal(seen(1), seen(1))
    assert not torch.equal(seen(1), seen(2))
    assert len(set(seen(1)[: 2 * 128].tolist())) == 256  # a pass repeats nothing
    assert torch.equal(seen(1, 0), y.repeat(4))


def test_ngdts_metric_may_have_options(tmp_path):
    options = 'settings = {{ metric = {{ kind = "ekfac", max_rows = 16 }} }}'
    text = CONFIG.replace('optimizer = "NGDT"', f'optimizer = "NGDT"\n{options}')
    trial = read_config(write(tmp_path, text=text)).trials()[-1]
    optimizer = build_optimizer(trial, torch.nn.Linear(8, 4))
    assert optimizer.metric.diagnostics() is not None
    assert "ekfac" in str(trial.facts()["settings"])
    wrong = replace(trial, settings={"metric": {"kind": "ekfac", "rows": 3}})
    with pytest.raises(to.InputError, match="rows"):
        build_optimizer(wrong, torch.nn.Linear(8, 4))


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
def test_the_training_loss_is_the_probes(likelihood):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    targets = {
        "categorical": torch.tensor([0, 2, 1, 1, 0, 2, 2]),
        "bernoulli": (outputs > 0.2).to(outputs.dtype),
        "gaussian": outputs.roll(1, 0),
    }[likelihood]
    from thermo_opt.manifold import embed

    expected = embed(outputs.numpy(), targets.numpy(), likelihood=likelihood).mean_loss
    assert float(loss_of(outputs, targets, likelihood)) == pytest.approx(expected, rel=1e-12)
