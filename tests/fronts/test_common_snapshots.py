"""Fronts of runs that were not recorded at the same steps: at the snapshots they share, or not."""

import json
from dataclasses import replace

import pytest

import thermo_opt as to
from thermo_opt.cli import main
from thermo_opt.fronts import read_trajectory
from thermo_opt.runs import load_run


@pytest.fixture(name="pair", scope="module")
def _pair(tmp_path_factory, write_run, descent):
    """One run recorded at every step and the same recorded at every fourth; another of its kind,
    shorter, with a larger learning rate."""
    folder = tmp_path_factory.mktemp("common")
    z, y = descent(3, noise=0.3)
    other, _ = descent(4, noise=0.2, speed=0.3)
    return [
        write_run(folder / "whole", z, y),
        write_run(folder / "sparse", z[::4], y, every=4),
        write_run(folder / "short", other[:17], y, optimizer="Adam", settings={"lr": 0.3}),
    ]


@pytest.mark.parametrize("quick", [True, False])
def test_a_run_recorded_less_often_is_no_cheaper_than_itself(pair, quick):
    read = (lambda p: read_trajectory(load_run(p))) if quick else to.audit
    alone = to.pareto([read(path) for path in pair[:2]][:1], target_loss=1.0).table.iloc[0]
    front = to.pareto([read(path) for path in pair[:2]], target_loss=1.0)
    whole, sparse = front.table.to_dict("records")
    for key in ("time", "dissipation", "efficiency", "stride"):
        assert whole[key] == pytest.approx(sparse[key], rel=1e-12), key
    assert whole["stride"] == 4
    assert not whole["every_step"]
    assert whole["dissipation"] < alone["dissipation"]
    assert whole["efficiency"] > alone["efficiency"]
    assert front.notes[0].startswith("Compared at the snapshots that all runs have, every 4 steps")
    assert "whole recorded others too" in front.notes[0]
    assert "lower bounds" in front.notes[1]


def test_a_shorter_run_takes_nothing_from_a_longer_one(pair):
    front = to.pareto([to.audit(pair[0]), to.audit(pair[2])], target_loss=1.0)
    assert front.notes == ()
    assert front.table["duration"].tolist() == [24, 16]
    assert front.table["every_step"].all()


def test_runs_begin_where_all_of_them_are_seen(pair):
    late = load_run(pair[0])
    late.snapshots = late.snapshots[4:]
    front = to.pareto([to.audit(late), to.audit(pair[2])], target_loss=0.6)
    assert front.table["first_step"].tolist() == [4, 4]
    assert "from 4 to" in front.notes[0]
    assert "the first snapshot is step 4" in front.notes[1].lower()


def test_runs_that_share_too_little_have_no_front(pair, tmp_path, write_run, descent):
    z, y = descent(3)
    odd = load_run(write_run(tmp_path / "odd", z[::8], y, every=7))
    with pytest.raises(to.InputError, match="shares fewer than 3 snapshots"):
        to.pareto([to.audit(odd), to.audit(pair[1])])


def test_runs_of_other_units_are_refused_by_name(pair):
    run = load_run(pair[0])
    run.info = replace(run.info, step_unit="epoch")
    with pytest.raises(to.InputError, match=r"whole \(epoch\).*differ in their unit of steps"):
        to.pareto([to.audit(path) for path in pair[1:]] + [to.audit(run)])


def test_the_command_leaves_out_what_it_can_not_read_and_groups_by_settings(pair, capsys):
    arguments = ["pareto", *map(str, pair), "/no/such/run", "--target-loss", "1.0"]
    assert main([*arguments, "--group-by", "lr", "--label", "optimizer", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "left out: /no/such/run: no such folder" in err
    found = json.loads(out)
    assert found["schema_version"] == 2
    assert [entry["run"] for entry in found["left_out"]] == ["/no/such/run"]
    assert [row["group"] for row in found["runs"]] == ["lr 0.1", "lr 0.1", "lr 0.3"]
    assert [row["run"] for row in found["runs"]] == [
        "whole (optimizer SGD)",
        "sparse (optimizer SGD)",
        "short (optimizer Adam)",
    ]
    assert main(arguments) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "≤ " in out
    assert "≥ " in out
    assert "Compared at the snapshots that all runs have, every 4 steps" in out
    assert main([*arguments, "--group-by", "weather"]) == 2
    assert "use one of" in capsys.readouterr().err
    assert main(["pareto", "/no/such/run", "/nor/this"]) == 2
    assert "/no/such/run" in capsys.readouterr().err
