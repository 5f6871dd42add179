"""A sweep's records: damage and strangers are refused by name, two sweeps on one output agree,
killed workers end in a sentence, earlier files still read."""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch

import thermo_opt as to
from thermo_opt.cli import main
from thermo_opt.sweep import finished, read_config, read_result, read_table, run_sweep, train
from thermo_opt.sweep.records import RESULT, SEAL, exclusive

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
output = "{output}"
[task]
name = "blobs"
[training]
steps = 12
batch_size = 64
seeds = [0, 1]
every = 4
[pareto]
target_loss = 1.2
[[method]]
optimizer = "SGD"
grid = {{ lr = [0.03] }}
"""
FIRST, SECOND = "SGD-lr=0.03-seed=0", "SGD-lr=0.03-seed=1"


@pytest.fixture(name="swept", scope="module")
def _swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept")
    (folder / "sweep.toml").write_text(CONFIG.format(output=folder / "out"))
    run_sweep(read_config(folder / "sweep.toml"))
    return folder


@pytest.fixture(name="copied")
def _copied(swept, tmp_path):
    """Configuration and output of a finished sweep, to be damaged."""
    shutil.copytree(swept / "out", tmp_path / "out")
    (tmp_path / "sweep.toml").write_text(CONFIG.format(output=tmp_path / "out"))
    return tmp_path / "sweep.toml", tmp_path / "out"


def cut(path, size=7):
    path.write_bytes(path.read_bytes()[:-size])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def set_notes(run, notes):
    content = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(content | {"notes": notes}))


DAMAGES = {
    "steps missing": (lambda run: (run / "steps.jsonl").unlink(), "steps.jsonl is missing"),
    "steps cut": (lambda run: cut(run / "steps.jsonl", 60), "steps.jsonl is not what was recorded"),
    "snapshot missing": (
        lambda run: (run / "snapshots" / "00000008.safetensors").unlink(),
        "00000008.safetensors is missing",
    ),
    "snapshot changed": (
        lambda run: flip(run / "snapshots" / "00000004.safetensors"),
        "00000004.safetensors is not what was recorded",
    ),
    "snapshot added": (
        lambda run: shutil.copy(
            run / "snapshots" / "00000004.safetensors", run / "snapshots" / "00000006.safetensors"
        ),
        "00000006.safetensors does not belong",
    ),
    "probe missing": (
        lambda run: (run / "probe.safetensors").unlink(),
        "probe.safetensors is missing",
    ),
    "seal of another run": (
        lambda run: shutil.copy(run.parent / SECOND / SEAL, run / SEAL),
        "belongs to another run",
    ),
    "seal cut": (lambda run: cut(run / SEAL), "can't be read"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_finished_run_that_was_damaged_is_named_and_does_not_stand(copied, what):
    config, output = copied
    damage, sentence = DAMAGES[what]
    damage(output / FIRST)
    with pytest.raises(to.InputError, match=rf"{FIRST}.*{sentence}.*remove the folder"):
        run_sweep(read_config(config))


UNSEALED = {
    "steps cut": lambda run: (run / "steps.jsonl").write_text(
        "".join((run / "steps.jsonl").read_text().splitlines(keepends=True)[:-3])
    ),
    "first step missing": lambda run: (run / "steps.jsonl").write_text(
        "".join((run / "steps.jsonl").read_text().splitlines(keepends=True)[1:])
    ),
    "last snapshot missing": lambda run: (run / "snapshots" / "00000012.safetensors").unlink(),
    "probe missing": lambda run: (run / "probe.safetensors").unlink(),
}


@pytest.mark.parametrize("what", UNSEALED)
def test_an_earlier_run_without_a_seal_is_checked_for_what_its_record_shows(copied, what):
    config, output = copied
    (trial, _) = read_config(config).trials()
    (output / FIRST / SEAL).unlink()
    assert finished(trial, output)
    UNSEALED[what](output / FIRST)
    with pytest.raises(to.InputError, match=rf"{FIRST} is damaged"):
        finished(trial, output)


@pytest.mark.parametrize("notes", [None, [1, 2], "words", 3.5, {"sweep": "no"}, {"sweep": {}}])
def test_notes_of_any_type_are_another_trials(copied, notes):
    config, output = copied
    set_notes(output / FIRST, notes)
    with pytest.raises(to.InputError, match=rf"{FIRST} was trained with another task"):
        run_sweep(read_config(config))


def test_a_seed_renamed_to_another_is_another_trials(copied):
    config, output = copied
    shutil.rmtree(output / FIRST)
    shutil.copytree(output / SECOND, output / FIRST)
    with pytest.raises(to.InputError, match=rf"{FIRST} was trained with another seed"):
        run_sweep(read_config(config))


def test_two_sweeps_on_one_output_agree(swept, tmp_path):
    (tmp_path / "sweep.toml").write_text(CONFIG.format(output=tmp_path / "out"))
    command = [sys.executable, "-m", "thermo_opt.cli", "sweep", str(tmp_path / "sweep.toml")]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    trained = sorted(out.split(" runs trained now")[0].split()[-1] for out, _ in told)
    assert trained == ["0", "2"]
    assert (tmp_path / "out" / "table.csv").read_bytes() == (
        swept / "out" / "table.csv"
    ).read_bytes()


def _hold(output, ready, seconds):
    with exclusive(output):
        ready.set()
        time.sleep(seconds)


def test_a_sweep_that_waits_says_for_what_and_a_killed_one_holds_nothing(tmp_path):
    context = multiprocessing.get_context("fork")
    for killed in (False, True):
        ready = context.Event()
        other = context.Process(target=_hold, args=(tmp_path, ready, 60 if killed else 0.3))
        other.start()
        assert ready.wait(30)
        if killed:
            other.kill()
            other.join()
            with exclusive(tmp_path):
                pass
        else:
            waits = pytest.warns(UserWarning, match="another sweep is writing to .*: waiting")
            with waits, exclusive(tmp_path):
                pass
            other.join()


DEADLY = """
import os, signal, torch
from torch import nn

class Deadly(nn.Linear):
    calls = 0
    def forward(self, x):
        type(self).calls += self.training
        if type(self).calls > {calls}:
            {end}
        return super().forward(x)

def task(seed, width=1):
    x = torch.linspace(-1, 1, 40)[:, None].repeat(1, width)
    torch.manual_seed(seed)
    return Deadly(width, 1), (x, x[:, :1]), (x[::4], x[::4, :1])
"""


def deadly(tmp_path, end, calls=3):
    (tmp_path / "deadly_task.py").write_text(DEADLY.format(end=end, calls=calls))
    text = CONFIG.format(output=tmp_path / "out")
    task = 'factory = "deadly_task:task"\nlikelihood = "gaussian"\noptions = { width = 2 }'
    (tmp_path / "sweep.toml").write_text(text.replace('name = "blobs"', task))
    return [sys.executable, "-m", "thermo_opt.cli", "sweep", "sweep.toml", "--jobs", "2"]


def test_a_worker_that_is_killed_ends_the_sweep_in_a_sentence(tmp_path):
    command = deadly(tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    told = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert told.returncode == 2
    sentence = told.stderr.replace("\n", " ")
    assert "was killed, perhaps for want of memory" in sentence
    assert "finished runs are kept" in sentence
    assert "Traceback" not in told.stderr


def test_a_model_that_fails_midway_is_told_with_its_step(tmp_path, monkeypatch):
    deadly(tmp_path, 'raise RuntimeError("no more")')
    monkeypatch.syspath_prepend(tmp_path)
    sentence = r"failed at step 3 \(RuntimeError: no more\); finished runs are kept"
    with pytest.raises(to.InputError, match=sentence):  # the check took a step before
        run_sweep(read_config(tmp_path / "sweep.toml"))


def test_hooks_see_every_step_and_results_are_kept_as_strict_json(tmp_path):
    (tmp_path / "sweep.toml").write_text(CONFIG.format(output=tmp_path / "out"))
    (trial, *_) = read_config(tmp_path / "sweep.toml").trials()
    seen = []

    class Watched:
        def __init__(self, trainer, folder):
            assert trainer.trial is trial
            assert (folder / "run.json").is_file()

        def __enter__(self):
            return seen.append

        def __exit__(self, *error):
            seen.append("left")

    def result(trainer, folder):
        loss, accuracy = trainer.evaluate([trainer.task.probe])
        return {"loss": loss, "accuracy": accuracy, "unknown": float("nan")}

    train(trial, tmp_path / "out", watch=Watched, result=result)
    assert [step.examples for step in seen[:-1]] == [64] * 12
    assert seen[-1] == "left"
    run = tmp_path / "out" / trial.name
    found = read_result(run)
    assert found["loss"] == pytest.approx(to.audit(run, lens="outputs").summary["loss_end"])
    assert torch.tensor(found["unknown"]).isnan()
    json.loads((run / RESULT).read_text(), parse_constant=pytest.fail)


def test_tables_written_before_are_read_under_todays_names(swept, tmp_path):
    table = read_table(swept / "out")
    old = table.rename(columns={"least_distance": "frontier"})
    old.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(read_table(tmp_path / "table.csv"), table)
    with pytest.raises(to.InputError, match="can't be read as a sweep's table"):
        read_table(tmp_path / "none.csv")


def test_the_command_refuses_a_damaged_run_without_a_traceback(copied, capsys):
    config, output = copied
    (output / FIRST / "probe.safetensors").unlink()
    assert main(["sweep", str(config)]) == 2
    assert "probe.safetensors is missing" in capsys.readouterr().err.replace("\n", " ")
