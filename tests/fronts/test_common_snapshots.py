"""Fronts of runs that were not recorded at the same steps: at the snapshots they share, or not."""

import json
from dataclasses import replace

import numpy as np
import pytest

import thermo_opt as to
from thermo_opt.cli import main
from thermo_opt.fronts import read_trajectory
from thermo_opt.report.front import costs, sentences
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
    assert "are estimates" in front.notes[1]


def towards(angles) -> np.ndarray:
    """Logits of one example of two classes at these angles from its target, arccos √p(y)."""
    return np.log(np.stack([np.cos(angles) ** 2, np.sin(angles) ** 2], axis=-1))[:, None, :]


def test_what_is_read_between_sparse_snapshots_bounds_nothing(tmp_path, write_run):
    """Along a straight path the loss falls faster than on the line between its ends: seen less
    often, the run looks later and dearer. One that undoes its steps looks cheaper."""
    target = np.array([0])
    straight = write_run(tmp_path / "straight", towards(np.linspace(1.2, 0.3, 21)), target)
    zigzag = np.linspace(1.2, 0.3, 21) + 0.1 * (np.arange(21) % 2)
    undone = write_run(tmp_path / "undone", towards(zigzag), target)
    dearer = []
    for path in (straight, undone):
        track = read_trajectory(load_run(path))
        whole, sparse = (t.crossing(0.4) for t in (track, track.at([0, 10, 20])))
        assert whole.least_distance == sparse.least_distance
        dearer.append(sparse.dissipation > whole.dissipation)
        front = to.pareto([track.at([0, 10, 20])], target_loss=0.4)
        time, spent, least, efficiency = costs(front.table.iloc[0].to_dict())
        assert all(cell.startswith("≈ ") for cell in (time, spent, efficiency))
        assert least[0].isdigit()
        assert "it dominates about" in sentences(front)[0]
    assert dearer == [True, False]


def test_a_loss_that_was_met_between_two_snapshots_was_not_seen_to_be_met(tmp_path, write_run):
    angles = np.linspace(1.2, 0.9, 21)
    angles[3] = 0.2  # for one step
    dips = read_trajectory(load_run(write_run(tmp_path / "dips", towards(angles), np.array([0]))))
    steady = write_run(tmp_path / "steady", towards(np.linspace(1.2, 0.3, 21)), np.array([0]))
    tracks = [dips, read_trajectory(load_run(steady))]
    assert not to.pareto(tracks, target_loss=0.4).table["censored"].any()
    front = to.pareto([track.at([0, 10, 20]) for track in tracks], target_loss=0.4)
    assert "; 1 of 2 runs are not seen to reach it." in sentences(front)[0]
    assert costs(front.table.iloc[0].to_dict())[:2] == ["–", "–"]


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


def test_the_command_leaves_out_what_is_not_like_most(pair, tmp_path, write_run, descent, capsys):
    """Another probe, epochs for steps, another likelihood: each costs its own run only."""
    z, y = descent(5)
    other_probe = write_run(tmp_path / "elsewhere", z[:, :8], y[:8])
    yes_or_no = np.eye(4)[y]
    labels = write_run(tmp_path / "labels", z, yes_or_no, likelihood="bernoulli")
    page = tmp_path / "front.html"
    command = ["pareto", *map(str, [other_probe, pair[0], pair[2], labels])]
    assert main([*command, "--target-loss", "1.0", "--json", "--html", str(page)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert [row["run"] for row in found["runs"]] == ["whole", "short"]
    left_out = {entry["run"]: entry["reason"] for entry in found["left_out"]}
    assert set(left_out) == {str(other_probe), str(labels)}
    assert "probe" in left_out[str(other_probe)]
    assert f"left out: {labels}: its probe" in err
    assert page.read_text("utf-8").count("Left out: ") == 2
    assert main(["pareto", str(other_probe), str(pair[0])]) == 2  # no majority
    assert "differ in their probe" in capsys.readouterr().err


def test_the_command_leaves_out_who_was_not_seen_with_the_others(
    pair, tmp_path, write_run, descent, capsys
):
    """A run that begins when others had met the target, and one with other snapshots than all."""
    z, y = descent(3, noise=0.3)
    late = write_run(tmp_path / "late", z, y)
    for file in (late / "snapshots").iterdir():
        if int(file.stem) < 12:
            file.unlink()
    odd = write_run(tmp_path / "odd", z[::8], y, every=7)
    command = ["pareto", *map(str, [late, odd, *pair]), "--target-loss", "1.2", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["run"] for row in found["runs"]] == ["whole", "sparse", "short"]
    assert found["runs"][0]["first_step"] == 0
    left_out = {entry["run"]: entry["reason"] for entry in found["left_out"]}
    assert "first snapshot is step 12, when" in left_out[str(late)]
    assert "shares fewer than 3 snapshots" in left_out[str(odd)]


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
    assert "≈ " in out
    assert "≥ " not in out
    assert "≤ " not in out
    assert "Compared at the snapshots that all runs have, every 4 steps" in out
    assert main([*arguments, "--group-by", "weather"]) == 2
    assert "use one of" in capsys.readouterr().err
    assert main(["pareto", "/no/such/run", "/nor/this"]) == 2
    assert "/no/such/run" in capsys.readouterr().err
