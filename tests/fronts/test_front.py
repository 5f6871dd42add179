"""Fronts of runs: universal frontier, invariance under removal of what is dominated, refusals,
JSON, page and figure."""

import dataclasses
import json
import re

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import thermo_opt as to
from thermo_opt.cli import main
from thermo_opt.fronts.trajectory import Trajectory, read_trajectory
from thermo_opt.manifold.initial import InitialPredictions
from thermo_opt.runs import load_run

matplotlib.use("Agg")
TARGETS = [1.2, 0.9]


@pytest.fixture(name="audits", scope="module")
def _audits(runs):
    return [to.audit(path, lens="outputs") for path in runs]


def straight(name, time, excess, p_y, group):
    """A run of one interval from targets' probabilities ``p_y`` to loss 0.1, ``excess`` times above
    its frontier."""
    start = InitialPredictions("categorical", len(p_y), np.log(p_y))
    least = start.least_distance(0.1) ** 2 / (2 * time)
    return Trajectory(
        name, name, group, "probe", "step", start, np.array([0, 9]),
        np.array([start.loss, 0.1]), np.array([0.0, time]),
        np.array([0.0, excess * least]),
    )  # fmt: skip


SYNTHETIC = st.lists(
    st.tuples(st.floats(1, 50), st.floats(1, 9), st.floats(0.05, 0.4), st.sampled_from("AB")),
    min_size=2,
    max_size=9,
)


@given(SYNTHETIC)
@settings(max_examples=60)
def test_removing_a_dominated_run_never_changes_the_front(drawn):
    tracks = [
        straight(f"run{i}", time, excess, np.array([p, 0.3, 0.2]), group)
        for i, (time, excess, p, group) in enumerate(drawn)
    ]
    whole = to.pareto(tracks, target_loss=0.1)
    on_front = set(whole.front()["run"])
    for track in tracks:
        if track.run in on_front:
            continue
        fewer = to.pareto([t for t in tracks if t is not track], target_loss=0.1)
        assert set(fewer.front()["run"]) == on_front
        assert fewer.hypervolume == whole.hypervolume
        assert fewer.targets[0].least_distance == whole.targets[0].least_distance


@given(SYNTHETIC)
@settings(max_examples=40)
def test_the_excess_over_the_frontier_is_the_inverse_efficiency_whatever_the_start(drawn):
    tracks = [
        straight(f"run{i}", t, excess, np.array([p, 0.3]), g)
        for i, (t, excess, p, g) in enumerate(drawn)
    ]
    front = to.pareto(tracks, target_loss=0.1)
    excess = np.array([row[1] for row in drawn])
    np.testing.assert_allclose(front.table["efficiency"], 1 / excess, rtol=1e-9)
    target = front.targets[0]
    above = front.table["dissipation_scaled"] / target.least_dissipation(front.table["time"])
    np.testing.assert_allclose(above, excess, rtol=1e-9)
    assert 0 <= target.coverage <= 1 + 1e-12


def test_the_hypervolume_is_the_area_counted_on_a_fine_grid(audits):
    front = to.pareto(audits, target_loss=1.2)
    corner = front.targets[0].corner
    x, y = (np.linspace(0, c, 2001)[:-1] + c / 4000 for c in corner)
    points = front.table[["time", "dissipation_scaled"]].dropna().to_numpy()
    lowest = np.full(len(x), np.inf)
    for time, cost in points:
        lowest[x >= time] = np.minimum(lowest[x >= time], cost)
    counted = (y[None, :] >= lowest[:, None]).mean() * corner[0] * corner[1]
    assert front.hypervolume == pytest.approx(counted, rel=5e-3)


@pytest.mark.parametrize("x", ["steps", "seconds", "examples", "flow"])
def test_every_run_lies_on_or_above_its_frontier_on_every_clock(audits, x):
    table = to.pareto(audits, target_loss=TARGETS, x=x).table
    reached = table[~table["censored"]]
    assert len(reached) >= 6
    assert (reached["efficiency"] <= 1 + 1e-12).all()
    assert (
        reached["dissipation"] * reached["time"]
        >= 0.5 * reached["least_distance"] ** 2 * (1 - 1e-12)
    ).all()


def test_the_table_has_a_row_a_run_and_target_and_says_who_never_got_there(audits):
    front = to.pareto(audits, target_loss=TARGETS)
    assert len(front.table) == len(TARGETS) * len(audits)
    low = front.rows(0.9)
    expected = [audit.lenses["outputs"].steps["loss_end"].min() > 0.9 for audit in audits]
    assert low["censored"].tolist() == expected
    assert any(expected)
    assert low.loc[low["censored"], ["time", "dissipation", "efficiency"]].isna().all(axis=None)
    assert not low.loc[low["censored"], "on_front"].any()
    assert low["duration"].tolist() == [24.0] * 6
    assert low["dissipation_total"].tolist() == pytest.approx(
        [a.summary["dissipation"] for a in audits], rel=1e-12
    )
    assert low["group"].tolist() == [audit.optimizer for audit in audits]
    reached = ~low["censored"].to_numpy()
    assert (front.rows(1.2)["time"].to_numpy()[reached] < low["time"].to_numpy()[reached]).all()


def test_audits_and_quick_readings_give_one_front(audits, runs):
    quick = to.pareto([read_trajectory(load_run(path)) for path in runs], target_loss=TARGETS)
    slow = to.pareto(audits, target_loss=TARGETS)
    np.testing.assert_allclose(
        quick.table.select_dtypes("float").to_numpy(),
        slow.table.select_dtypes("float").to_numpy(),
        rtol=1e-12,
    )


def test_without_a_target_half_of_the_runs_reach_it(audits):
    front = to.pareto(audits)
    assert (~front.table["censored"]).sum() == 3


def test_equal_starts_leave_dissipation_as_it_is():
    p = np.array([0.2, 0.4])
    front = to.pareto([straight("a", 3, 2, p, "A"), straight("b", 6, 1.5, p, "B")], target_loss=0.1)
    assert front.targets[0].same_start
    np.testing.assert_allclose(
        front.table["dissipation_scaled"], front.table["dissipation"], rtol=1e-15
    )


def test_groups_and_corner_can_be_given(audits):
    labels = list("uvwxyz")
    front = to.pareto(audits, target_loss=1.2, groups=labels, corner=(24.0, 50.0))
    assert front.groups == labels
    assert front.targets[0].corner == (24.0, 50.0)
    with pytest.raises(to.InputError, match="5 groups for 6 runs"):
        to.pareto(audits, groups=labels[:5])


def test_hulls_hold_their_groups_points_on_logarithmic_axes(audits):
    front = to.pareto(audits, target_loss=1.2)
    for group, corners in front.hulls(1.2).items():
        rows = front.rows(1.2)
        own = rows[(rows["group"] == group) & ~rows["censored"]]
        logs = np.log(own[["time", "dissipation_scaled"]].to_numpy())
        hull = np.log(corners)
        for a, b in zip(hull, np.roll(hull, -1, axis=0), strict=True):
            edge = b - a
            assert (edge[0] * (logs - a)[:, 1] - edge[1] * (logs - a)[:, 0] >= -1e-12).all()


def test_the_json_is_strict_and_holds_the_table(audits, tmp_path):
    front = to.pareto(audits, target_loss=TARGETS)
    plain = json.loads(
        front.to_json(tmp_path / "front.json"), parse_constant=lambda name: pytest.fail(name)
    )
    assert plain == json.loads((tmp_path / "front.json").read_text())
    assert [row["run"] for row in plain["runs"]] == front.table["run"].tolist()
    assert [row["time"] is None for row in plain["runs"]] == front.table["censored"].tolist()
    assert plain["hypervolume"] == front.hypervolume
    assert plain["targets"][0]["front"] == front.front(TARGETS[0])["run"].tolist()


def test_the_page_holds_the_numbers_and_escapes_what_runs_say(audits, tmp_path):
    hostile = dataclasses.replace(audits[0], run="<script>alert(1)</script>")
    front = to.pareto([hostile, *audits[1:]], target_loss=TARGETS)
    page = front.to_html(tmp_path / "front.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in page
    held = re.search(r'id="thermo-opt-summaries">(.*?)</script>', page, re.S)
    assert held is not None
    assert json.loads(held[1]) == front.to_dict()
    assert page.count('class="plot"') == len(TARGETS)


def test_the_figure_shows_each_run_the_front_and_the_frontier(audits):
    front = to.pareto(audits, target_loss=1.2)
    ax = front.plot()
    drawn = np.vstack(
        [
            c.get_offsets()
            for c in ax.collections
            if len(c.get_offsets()) and c.get_label() in front.groups
        ]
    )
    reached = front.table.dropna(subset="time")
    np.testing.assert_allclose(np.sort(drawn[:, 0]), np.sort(reached["time"]))
    edge = next(line for line in ax.lines if line.get_label() == "no run can be below")
    np.testing.assert_allclose(
        edge.get_xdata() * edge.get_ydata(), 0.5 * front.targets[0].least_distance ** 2
    )
    matplotlib.pyplot.close(ax.figure)


BAD_TARGETS = [
    (1e-9, "no run reaches"),
    (1e-15, "below what floating point can resolve"),
    (0.0, "below what floating point can resolve"),
    (-1.0, "below what floating point can resolve"),
    (float("nan"), "isn't a finite number"),
    (float("inf"), "isn't a finite number"),
    (50.0, "nothing to reach"),
    ([], "no target loss"),
    ([1.2, 1e-9], "no run reaches"),
]


@pytest.mark.parametrize(("target", "sentence"), BAD_TARGETS)
def test_targets_that_cannot_be_are_refused(audits, target, sentence):
    with pytest.raises(to.InputError, match=sentence):
        to.pareto(audits, target_loss=target)


def test_runs_with_another_probe_are_refused_by_name(audits, tmp_path, write_run, descent):
    z, y = descent(1)
    other = to.audit(write_run(tmp_path / "other-probe", z, np.roll(y, 1)))
    with pytest.raises(to.InputError, match=r"other-probe .*differ in their probe"):
        to.pareto([*audits, other])


def test_runs_with_another_likelihood_are_refused_by_name(audits, tmp_path, write_run):
    tracks = [read_trajectory(load_run(audit.path)) for audit in audits]
    other = dataclasses.replace(
        tracks[0],
        run="bernoulli-run",
        start=dataclasses.replace(tracks[0].start, likelihood="bernoulli"),
    )
    with pytest.raises(to.InputError, match=r"bernoulli-run .*differ in their likelihood"):
        to.pareto([*tracks, other])


def test_runs_on_another_clock_are_refused_by_name(audits, runs):
    with pytest.raises(to.InputError, match=r"run0 \(wall\).*differ in their clock"):
        to.pareto([*audits[1:], to.audit(runs[0], clock="wall")])


def test_what_has_no_line_is_refused(audits, runs, adam_run_without_probe):
    with pytest.raises(to.InputError, match="at least one audited run"):
        to.pareto([])
    with pytest.raises(to.InputError, match="x='furlongs' is unknown"):
        to.pareto(audits, x="furlongs")
    with pytest.raises(to.InputError, match="needs the outputs lens"):
        to.pareto([to.audit(adam_run_without_probe)])
    with pytest.raises(to.InputError, match="needs 'tokens'"):
        to.pareto(audits, x="tokens")
    with pytest.raises(to.InputError, match="read them with clock='wall'"):
        to.pareto([read_trajectory(load_run(runs[0]))], x="seconds")


@pytest.fixture(name="adam_run_without_probe")
def _adam_run_without_probe(tmp_path):
    import torch

    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    options = {"params": True, "moments": True, "batch_size": 4, "probe": None}
    with to.Recorder(tmp_path / "bare", model=model, optimizer=optimizer, **options) as recorder:
        for _ in range(4):
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            recorder.step()
    return tmp_path / "bare"


def test_the_command_prints_one_object(runs, tmp_path, capsys):
    arguments = [
        "pareto",
        *map(str, runs),
        "--target-loss",
        "1.2",
        "--target-loss",
        "0.9",
        "--x",
        "seconds",
        "--json",
    ]
    assert main([*arguments, "--html", str(tmp_path / "p.html")]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = to.pareto(
        [to.audit(path, lens="outputs") for path in runs], target_loss=TARGETS, x="seconds"
    )
    assert [t["front"] for t in printed["targets"]] == [
        t["front"] for t in expected.to_dict()["targets"]
    ]
    assert printed["clock"] == "wall"
    assert (tmp_path / "p.html").stat().st_size > 1e6


def test_the_command_prints_tables_within_80_columns(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["pareto", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert out.count("★") == len(to.pareto([to.audit(path) for path in runs]).front())


def test_the_command_does_not_overwrite_what_is_no_page_of_ours(runs, tmp_path, capsys):
    notes = tmp_path / "notes.html"
    notes.write_text("somebody's own notes")
    assert main(["pareto", *map(str, runs), "--html", str(notes)]) == 2
    assert "notes.html exists" in capsys.readouterr().err
    assert notes.read_text() == "somebody's own notes"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--target-loss", "1e-9"], "the front is empty"),
        (["--x", "furlongs"], "use one of"),
        (["--jobs", "0"], "at least one process"),
    ],
)
def test_the_command_refuses_bad_input_with_status_2(runs, capsys, options, sentence):
    assert main(["pareto", *map(str, runs), *options]) == 2
    assert sentence in capsys.readouterr().err
