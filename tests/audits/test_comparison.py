"""Runs are compared at the snapshots they share, and not at all where they share too few."""

import json
import re
import shutil
from dataclasses import replace

import pytest

import thermo_opt as to
from tests.lenses.conftest import architecture, record
from thermo_opt.audits.comparison import comparison
from thermo_opt.cli import main
from thermo_opt.cli.pareto import print_front
from thermo_opt.cli.terminal import print_audit
from thermo_opt.plots import loss_and_dissipation
from thermo_opt.report.page import render


def thinned(path, target, keep):
    """A copy of a recorded run with some of its snapshots."""
    shutil.copytree(path, target)
    for file in (target / "snapshots").iterdir():
        if int(file.stem) not in keep:
            file.unlink()
    return target


@pytest.fixture(scope="module", name="whole")
def _whole(tmp_path_factory):
    return record(tmp_path_factory.mktemp("compared") / "whole", steps=24)


def test_a_run_against_itself_recorded_less_often_is_equally_efficient(tmp_path, whole):
    sparse = thinned(whole, tmp_path / "sparse", {0, 6, 12, 18, 24})
    found = comparison([to.audit(path, lens="outputs") for path in (whole, sparse)])
    first, second = found.table["efficiency"]
    assert first == pytest.approx(second, rel=1e-12)
    assert "every 6 steps from 0 to 24" in found.notes[0]
    assert to.compare([to.audit(whole), to.audit(sparse)]).attrs["notes"][0] == found.notes[0]


def test_with_two_snapshots_in_common_there_is_no_ranking(tmp_path, whole, capfd):
    ends = thinned(whole, tmp_path / "ends", {0, 24})
    assert main(["compare", str(whole), str(ends)]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "The runs are not ranked" in said
    assert "most efficient" not in said
    assert main(["compare", str(whole), str(ends), "--lens", "outputs", "--json"]) == 0
    rows = {row["run"]: row for row in json.loads(capfd.readouterr().out)["runs"]}
    assert rows["ends"]["efficiency"] is None
    assert (rows["ends"]["stride"], rows["whole"]["stride"]) == (24, 1)


def test_one_bad_folder_among_many_is_left_out_with_a_sentence(tmp_path, whole, capfd):
    other = record(tmp_path / "other", steps=24, seed=1)
    assert main(["compare", str(whole), "/no/such/run", str(other), "--json"]) == 0
    out, err = capfd.readouterr()
    assert "left out: /no/such/run: no such folder" in err
    assert [row["run"] for row in json.loads(out)["left_out"]] == ["/no/such/run"]


def test_page_and_json_say_at_which_snapshots_and_without_whom(tmp_path, whole, capfd):
    sparse = thinned(whole, tmp_path / "sparse", {0, 6, 12, 18, 24})
    paths = [str(whole), str(sparse), "/no/such/run"]
    page = tmp_path / "page.html"
    assert main(["compare", *paths, "--lens", "outputs", "--html", str(page), "--json"]) == 0
    (note,) = json.loads(capfd.readouterr().out)["notes"]
    assert "every 6 steps from 0 to 24: whole recorded others too" in note
    text = page.read_text("utf-8")
    assert f'<p class="lead">{note} Of the 2 runs' in text
    assert "Left out: /no/such/run: no such folder" in text
    ends = thinned(whole, tmp_path / "ends", {0, 24})
    assert main(["compare", str(whole), str(ends), "--lens", "outputs", "--json"]) == 0
    assert "The runs are not ranked" in json.loads(capfd.readouterr().out)["notes"][0]


def test_runs_are_named_by_recorded_settings(tmp_path, whole, capfd):
    other = record(tmp_path / "other", steps=24, seed=1)
    assert main(["compare", str(whole), str(other), "--label", "lr", "--json"]) == 0
    names = {row["run"] for row in json.loads(capfd.readouterr().out)["runs"]}
    assert names == {"whole (lr 0.02)", "other (lr 0.02)"}
    assert main(["compare", str(whole), str(other), "--label", "nonsense"]) == 2
    assert "use one of" in capfd.readouterr().err


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path, capfd):
    places = [record(tmp_path / folder / "run", steps=6) for folder in ("first", "second")]
    expected = {f"run ({path})" for path in places}
    for command in ("compare", "pareto"):
        assert main([command, *map(str, places), "--json"]) == 0
        assert {row["run"] for row in json.loads(capfd.readouterr().out)["runs"]} == expected


def test_time_in_epochs_is_called_so_everywhere(whole, capsys):
    """An epoch is no step: what is spent per epoch is in other nats, and no alignment is told."""
    run = to.load_run(whole)
    run.info = replace(run.info, step_unit="epoch")
    audit = to.audit(run, lens="outputs")
    print_audit(audit)
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"dissipated at least [\d.]+ nats per epoch, seen every epoch;", said)
    assert re.search(r"costs [\d.]+ nats per epoch\.", said)
    for row in ("Clock epoch", "Stride epochs 1", "Duration T epochs 24", "Q nats per epoch"):
        assert row in said
    assert "certified only from below" not in said
    page = render([audit])
    assert "<span>Q, nats per epoch</span>" in page
    assert "<span>Q, nats</span>" not in page
    assert '"training step' not in page
    assert "epoch %{x}" in page
    _, lower = loss_and_dissipation(audit).child_axes
    assert lower.get_xlabel() == "epoch"
    assert lower.get_ylabel() == "Q so far (nats per epoch)"
    front = to.pareto([audit])
    print_front(front)
    assert "T, epochs" in capsys.readouterr().out
    assert front.to_dict()["step_unit"] == "epoch"


def test_outputs_and_parameter_lens_never_contradict_each_other(adam_run, sgd_run):
    for path in (adam_run, sgd_run):
        for stride in (1, 3):
            audit = to.audit(path, model=architecture(), stride=stride)
            low = audit.lenses["outputs"].summary["alignment_lower"]
            high = audit.lenses["parameters"].summary["alignment_upper"]
            assert low is None or low <= high


def test_json_says_which_lenses_could_not_look_and_why(sgd_run, capfd):
    assert main(["audit", str(sgd_run), "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["schema_version"] == 2
    assert {entry["lens"] for entry in found["missing"]} == {"parameters", "optimizer-state"}
    assert all(entry["reason"] and entry["run"] == "sgd" for entry in found["missing"])


def test_runs_alike_are_not_told_apart(tmp_path, whole, capfd):
    """The same run twice: neither is the most efficient, and neither the least."""
    again = shutil.copytree(whole, tmp_path / "again")
    sparse = [thinned(path, tmp_path / f"{path.name}-12", {0, 12, 24}) for path in (whole, again)]
    for paths, seems in (((whole, again), "is"), (sparse, "looks")):
        assert main(["compare", *map(str, paths), "--clock", "examples"]) == 0
        said = " ".join(capfd.readouterr().out.split())
        assert f"none {seems} more efficient than another" in said
        assert "most efficient" not in said.replace("more efficient", "")
        assert "Q in nats per example seen; lengths in √nats" in said
