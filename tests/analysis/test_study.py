"""The studies' protocol: equal trials, targets that the reference reaches, resumption after a kill,
the frontier, every command."""

import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import thermo_opt as to
from analysis.__main__ import COMMANDS, main
from analysis.studies import STUDIES, Scale, Study
from analysis.study import Plan, check, run_study
from analysis.study_table import differences, targets_of, together
from analysis.trials import assert_above_frontier, read, trial_of
from analysis.tuning import TRIALS
from thermo_opt.fronts import read_trajectory

ROOT = Path(__file__).resolve().parents[2]
MINIBATCH = Study("digits", {"tiny": Scale({"": {"batch_size": 64}}, 20, every=4, aligned=6)})
COSTS = ("seconds", "ms", "peak_memory", "date", "machine", "notes")
"""Columns that differ between one run and the next."""


def same(first, second):
    """The columns of two tables that a re-run must repeat to the digit."""
    kept = [c for c in first if not c.startswith(COSTS)]
    pd.testing.assert_frame_equal(first[kept], second[kept])


@pytest.fixture(name="done", scope="module")
def _done(tmp_path_factory):
    """A whole tiny study of three methods and two seeds."""
    folder = tmp_path_factory.mktemp("study")
    plan = Plan(MINIBATCH, "tiny", methods=("NGD-T", "AdamW", "SGD"), seeds=2, runs=folder)
    return plan, run_study(plan)


def test_every_method_gets_the_same_trials_and_seeds(done):
    plan, table = done
    best = table[table["choice"] == "best"]
    assert best["method"].tolist() == ["NGD-T", "AdamW", "SGD"]
    assert (table["trials"] == TRIALS).all()
    assert (table["seeds"] == 2).all()
    runs = pd.read_csv(plan.output / "digits_tiny_runs.csv")
    assert (runs.groupby("method").size() == TRIALS + table.groupby("method").size()).all()
    assert (runs[runs["best"]].groupby("method").size() == 2).all()
    for method, own in runs[runs["seed"] == 0].groupby("method"):
        chosen = best.set_index("method").loc[method, "setting"]
        assert own.set_index("setting")["validation_loss"].idxmin() == pytest.approx(chosen)


def test_thrifty_settings_are_the_smallest_that_match_the_reference_on_validation_data(done):
    plan, table = done
    runs = pd.read_csv(plan.output / "digits_tiny_runs.csv")
    first = runs[runs["seed"] == 0]
    limit = first[(first["method"] == "AdamW") & first["best"]]["validation_loss"].item()
    assert "NGD-T" in set(
        table[table["choice"] == "thrifty"]["method"]
    )  # or this test shows nothing
    for method, own in first.groupby("method"):
        smallest = own[own["validation_loss"] <= limit]["setting"].min()
        rows = table[(table["method"] == method) & (table["choice"] == "thrifty")]
        best = table[(table["method"] == method) & (table["choice"] == "best")]["setting"].item()
        if math.isnan(smallest) or smallest == pytest.approx(best):
            assert rows.empty
        else:
            assert rows["setting"].item() == pytest.approx(smallest)
            assert (
                len(runs[(runs["method"] == method) & runs["thrifty"]]) == rows["seeds"].item() == 2
            )


def test_trials_of_several_seeds_are_chosen_by_their_mean(tmp_path):
    study = Study("digits", {"tiny": Scale({"": {"batch_size": 64}}, 6, every=2, tuned=2)})
    plan = Plan(study, "tiny", methods=("AdamW",), seeds=2, memory=False, runs=tmp_path)
    table = run_study(plan)
    runs = pd.read_csv(plan.output / "digits_tiny_runs.csv")
    means = runs.groupby("setting")["validation_loss"].mean()
    assert (runs.groupby("setting").size() == 2).all()
    assert len(means) == TRIALS
    assert table["setting"].item() == pytest.approx(means.idxmin())


def test_settings_are_chosen_on_other_data_than_are_reported(done):
    plan, _ = done
    runs = pd.read_csv(plan.output / "digits_tiny_runs.csv")
    assert (runs["validation_loss"] != runs["final_loss"]).all()


def test_the_reference_reaches_its_own_targets_and_ratios_to_itself_are_one(done):
    _, table = done
    reference = table[table["choice"] == "best"].set_index("method").loc["AdamW"]
    for label in ("half", "end"):
        assert reference[f"reached_{label}"] == 2
        for what in ("steps", "seconds", "dissipation"):
            assert reference[f"{what}_{label}_ratio"] == 1
            assert reference[f"{what}_{label}_ratio_std"] == 0
    assert reference["target_half"] > reference["target_end"]
    assert reference["steps_half"] <= 20


def test_rows_say_what_an_audit_says(done):
    plan, _ = done
    runs = pd.read_csv(plan.output / "digits_tiny_runs.csv")
    row = runs[(runs["method"] == "AdamW") & runs["best"]].iloc[0]
    trial = plan.trial("", "AdamW", row["setting"], int(row["seed"]))
    audit = to.audit(plan.folder / trial.name, lens="outputs").summary
    for name in ("dissipation", "efficiency", "straightness", "steadiness"):
        assert row[name] == pytest.approx(audit[name], rel=1e-5)
    assert row["final_loss"] == pytest.approx(
        audit["loss_end"], rel=1e-5
    )  # here the probe is all that is tested on
    assert -1 <= row["alignment_lower"] <= row["alignment_upper"] <= 1
    assert row["memory"] == pytest.approx(2, abs=0.01)  # Adam's two moments
    snapshots = [s.step for s in to.load_run(plan.folder / trial.name).snapshots]
    assert snapshots == list(range(0, 21, 4))


def test_figures_are_drawn(done):
    plan, _ = done
    for name in ("digits_tiny_curves.png", "digits_tiny_front.png"):
        assert (plan.output / name).stat().st_size > 10_000


def test_a_finished_study_trains_nothing_anew_and_repeats_its_table(done, capsys):
    plan, table = done
    before = {path: path.stat().st_mtime_ns for path in plan.folder.glob("*/run.json")}
    again = run_study(plan)
    assert {path: path.stat().st_mtime_ns for path in plan.folder.glob("*/run.json")} == before
    assert capsys.readouterr().out.count("(recorded before)") == 3 * TRIALS + len(table)
    pd.testing.assert_frame_equal(again.drop(columns="date"), table.drop(columns="date"))


def test_a_killed_study_resumes_and_ends_with_the_table_of_one_never_killed(done, tmp_path):
    plan, table = done
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "from analysis.studies import Scale, Study\n"
        "from analysis.study import Plan, run_study\n"
        "study = Study('digits', {'tiny': Scale({'': {'batch_size': 64}}, 20, every=4, "
        "aligned=6)})\n"
        "run_study(Plan(study, 'tiny', methods=('NGD-T', 'AdamW', 'SGD'), seeds=2, "
        "runs=Path(sys.argv[2]), memory=False))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(ROOT), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[7/"):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    half = replace(plan, runs=tmp_path, memory=False)
    finished = {path: path.stat().st_mtime_ns for path in half.folder.glob("*/result.json")}
    assert 7 <= len(finished) < 3 * (TRIALS + 1)
    same(run_study(half), table)
    assert all(
        path.stat().st_mtime_ns == time or "alignment_lower" in path.read_text()
        for path, time in finished.items()
    )


def test_the_name_of_a_run_depends_on_all_that_its_result_does():
    facts = {
        **{"task": "digits", "options": {}, "method": "AdamW", "settings": {"lr": 0.01}},
        **{"seed": 0, "length": 6},
    }
    changes = (
        {"options": {"batch_size": 3}}, {"data": "x"}, {"method": "SOAP"}, {"every": 3},
        {"settings": {"lr": 0.02}}, {"settings": {"lr": 0.01, "betas": [0.8, 0.9]}}, {"seed": 1},
        {"length": 7}, {"aligned": 2}, {"decay": True}, {"min_lr_rate": 0.0},
    )  # fmt: skip
    names = {trial_of(**{**facts, **change}).name for change in ({}, *changes)}
    assert len(names) == 1 + len(changes)


def test_a_point_below_the_frontier_is_refused(done):
    plan, table = done
    trial = plan.trial("", "AdamW", float(table.set_index("method").loc["AdamW", "setting"]), 1)
    run = to.load_run(plan.folder / trial.name)
    track = read_trajectory(run)
    assert_above_frontier(run, track)
    with pytest.raises(AssertionError, match=r"at step 4: Q·T = .* lies below the frontier"):
        assert_above_frontier(run, replace(track, dissipation=1e-3 * track.dissipation))


def test_targets_are_the_worst_seeds_losses(done):
    plan, table = done
    setting = float(table.set_index("method").loc["AdamW", "setting"])
    runs = [read(plan.trial("", "AdamW", setting, seed), plan.folder) for seed in (0, 1)]
    targets = targets_of(runs)
    half = [
        run.track.loss[run.track.steps.tolist().index(12)] for run in runs
    ]  # the first snapshot past step 10
    assert targets["half"] == max(half)
    assert targets["end"] == max(run.track.loss[-1] for run in runs)


def test_a_diverging_setting_is_scored_last_and_the_study_goes_on(tmp_path, monkeypatch):
    from analysis import methods

    wild = replace(methods.METHODS["SGD"], grid={"lr": [0.3, 1e12, 1e30]})
    monkeypatch.setitem(methods.METHODS, "SGD", wild)
    plan = Plan(
        MINIBATCH, "tiny", methods=("AdamW", "SGD"), seeds=1, aligned=0, memory=False, runs=tmp_path
    )
    table = run_study(plan).drop_duplicates("method").set_index("method")
    assert table.loc["SGD", "setting"] < 10
    assert math.isfinite(table.loc["SGD", "final_loss"])
    assert table.loc["SGD", "trials"] == TRIALS


def test_methods_without_the_reference_are_compared_with_the_first(tmp_path):
    plan = Plan(
        MINIBATCH, "tiny", methods=("SGD",), seeds=1, aligned=0, memory=False, runs=tmp_path, jobs=2
    )
    table = run_study(plan)
    assert table["reference"].tolist() == ["SGD"]
    assert table["steps_end_ratio"].tolist() == [1.0]


def test_a_check_agrees_with_itself_and_names_what_differs(done, tmp_path, capsys):
    _, table = done
    assert len(differences(table, table)) == 0
    table = table[table["choice"] == "best"].reset_index(drop=True)
    changed = table.copy()
    changed.loc[0, "setting"] *= 2
    changed.loc[1, "final_loss"] += 1
    changed.loc[2, "seconds_end"] *= 100  # seconds belong to a machine
    # peak memory: within its spread, not measured on this system, and beyond it
    found = differences(
        table.assign(peak_memory=100.0, peak_memory_std=1.0),
        changed.assign(peak_memory=[111, math.nan, 150]),
    )
    expected = [["NGD-T", "setting"], ["AdamW", "final_loss"], ["SGD", "peak_memory"]]
    assert found[["method", "column"]].to_numpy().tolist() == expected
    assert (
        len(differences(table.drop(columns=["peak_memory", "peak_memory_std"]), table)) == 0
    )  # an older table
    few = Plan(
        MINIBATCH, "tiny", methods=("AdamW",), seeds=1, aligned=0, memory=False, runs=tmp_path
    )
    with pytest.raises(to.InputError, match="run the study without --check first"):
        check(few)
    run_study(few)
    check(few)
    assert "outside" not in capsys.readouterr().err


def data_for(name, folder, request):
    """Small data for a study, or None where it brings its own."""
    if name == "transformer":
        (folder / "text.txt").write_text("to be, or not to be: that is the question. " * 40)
        return folder / "text.txt"
    if name == "cifar10":
        write = request.getfixturevalue("write_parquet")
        write(folder / "train.parquet", 96, "img")
        write(folder / "test.parquet", 40, "img")
        return folder
    return request.getfixturevalue("folders") if name == "imagenet" else None


@pytest.mark.parametrize("name", STUDIES)
def test_each_command_runs(name, tmp_path, capsys, request):
    arguments = ["study", name, "--scale", "tiny", "--methods", "AdamW,NGD-T", "--seeds", "1"]
    arguments += ["--no-memory", "--runs", str(tmp_path / "runs")]
    if data := data_for(name, tmp_path, request):
        arguments += ["--data", str(data)]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    table = pd.read_csv(tmp_path / "runs" / f"{name}_tiny" / f"{name}_tiny.csv")
    assert set(table["method"]) == {"AdamW", "NGD-T"}
    assert np.isfinite(table["final_loss"]).all()
    table = table[table["choice"] == "best"]
    assert (table["alignment_lower"] <= table["alignment_upper"]).all()
    frozen = table["notes"].str.contains("batch normalisation frozen")
    assert frozen.all() == (name == "imagenet")
    assert table["peak_memory"].isna().all()
    assert "tiny" in set(table["scale"])


SMALLER = {
    "transformer": {"layers": 1, "width": 12, "context": 16, "batch_size": 4, "probe": 4},
    "cifar10": {"width": 4, "batch_size": 8, "probe": 8, "validation": 8},
    "imagenet": {"width": 4, "batch_size": 8, "probe": 8, "validation": 8, "size": 32},
}


@pytest.mark.parametrize("name", SMALLER)
def test_the_full_scale_runs_at_small_sizes(name, tmp_path, request):
    full = STUDIES[name].scales["full"]
    data = data_for(name, tmp_path, request)
    size = replace(full, variants={"": {**full.variants[""], **SMALLER[name]}}, length=4, every=2)
    plan = Plan(
        Study(name, {"full": size}),
        "full",
        data,
        ("NGD-T", "AdamW", "SGD"),
        1,
        trials=1,
        runs=tmp_path,
        memory=False,
    )
    table = run_study(replace(plan, results=tmp_path))
    assert np.isfinite(table["final_loss"]).all()
    assert (table["trials"] == 1).all()


def test_full_scale_networks_are_those_of_the_issue():
    from analysis.networks import CharGPT, resnet18

    assert (
        sum(p.numel() for p in resnet18().parameters()) == 11_173_962
    )  # the usual count at 32×32 with 10 classes
    full = STUDIES["transformer"].scales["full"].variants[""]
    assert (full["layers"], full["width"], full["context"]) == (6, 384, 256)
    model = CharGPT(65, 6, 384, 256, 6, 0.2)
    assert 10.5e6 < sum(p.numel() for p in model.parameters()) < 11e6
    assert model(torch.zeros(2, 256, dtype=torch.long)).shape == (2, 256, 65)


def test_bad_arguments_are_refused(tmp_path, capsys):
    with pytest.raises(to.InputError, match="method 'Adam' is unknown: use some of"):
        Plan(MINIBATCH, "tiny", methods=("Adam",))
    with pytest.raises(to.InputError, match="give each once"):
        Plan(MINIBATCH, "tiny", methods=("SGD", "SGD"))
    with pytest.raises(to.InputError, match="at least one seed"):
        Plan(MINIBATCH, "tiny", seeds=0)
    where = ["--data", str(tmp_path / "nowhere"), "--runs", str(tmp_path)]
    assert main(["study", "cifar10", "--scale", "tiny", *where]) == 2
    assert "nowhere holds no images" in capsys.readouterr().err
    assert main(["table", "--scale", "tiny", "--results", str(tmp_path)]) == 2
    assert "does not exist: run python -m analysis study digits" in capsys.readouterr().err


def test_every_command_explains_itself(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in COMMANDS)
    assert main(["studdy"]) == 2
    for name in COMMANDS:
        with pytest.raises(SystemExit, match="0"):
            main([name, "--help"])
        assert f"usage: analysis {name}" in capsys.readouterr().out


def test_shortened_studies_leave_the_projects_results_alone(tmp_path):
    from analysis.timing import RESULTS

    assert Plan(STUDIES["digits"]).output == RESULTS
    for change in ({"steps": 20}, {"seeds": 1}, {"methods": ("AdamW",)}, {"scale": "tiny"}):
        plan = Plan(STUDIES["digits"], **change, runs=tmp_path)
        assert plan.output == plan.folder


def test_one_table_gathers_the_studies(done, tmp_path):
    _, table = done
    table.to_csv(tmp_path / "digits_small.csv", index=False)
    table.assign(variant="x").to_csv(tmp_path / "cifar10_small.csv", index=False)
    found = pd.read_csv(together(["digits", "cifar10"], "small", tmp_path))
    assert found["task"].tolist() == ["digits"] * len(table) + ["cifar10, x"] * len(table)
    ratios = pytest.approx(
        table["steps_end_ratio"].tolist(), rel=1e-5, nan_ok=True
    )  # written with six digits
    assert found["steps_end_ratio"][: len(table)].tolist() == ratios


def test_the_readmes_tables_are_those_of_the_csvs(capsys):
    assert main(["readme", "--check"]) == 0
    assert "those of the CSVs" in capsys.readouterr().out


def test_results_are_strict_json(done):
    plan, _ = done
    paths = list(plan.folder.glob("*/result.json"))
    assert paths
    for path in paths:
        json.loads(path.read_text(), parse_constant=pytest.fail)
