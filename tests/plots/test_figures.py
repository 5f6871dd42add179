"""The Matplotlib figures: what is drawn is what the audit holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("agg")
import matplotlib.pyplot as plt

from tests.synthetic_audits import make_audit
from thermo_opt import plots
from thermo_opt.audits import Audit
from thermo_opt.plots import series
from thermo_opt.plots.crowd import crowd
from thermo_opt.plots.palette import look
from thermo_opt.plots.series import log_ticks, thin
from thermo_opt.report.figures import figures


@pytest.fixture(autouse=True)
def _close() -> Iterator[None]:
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def audits() -> list[Audit]:
    return [
        make_audit("adam", parameters=True, state=True),
        make_audit("sgd $x$ <b>", noise=2, seed=1),
    ]


@pytest.fixture(scope="module")
def weights_only() -> Audit:
    return make_audit("weights", outputs=False, state=True)


def test_bars_add_up_to_the_dissipation(audits: list[Audit]) -> None:
    ax = plots.decomposition_bars(audits)
    widths = [bar.get_width() for bar in ax.patches]
    for i, audit in enumerate(audits):
        assert sum(widths[3 * i : 3 * i + 3]) == pytest.approx(
            audit.summary["dissipation"], rel=1e-12
        )
    assert "nats" in ax.get_xlabel()


def test_loss_and_dissipation_end_at_the_summary(audits: list[Audit]) -> None:
    upper, lower = plots.loss_and_dissipation(audits).child_axes
    for line_up, line_low, audit in zip(upper.lines, lower.lines, audits, strict=True):
        assert line_up.get_ydata()[0] == audit.summary["loss_start"]
        assert line_up.get_ydata()[-1] == audit.summary["loss_end"]
        assert line_low.get_ydata()[-1] == pytest.approx(audit.summary["dissipation"], rel=1e-12)


def test_each_run_has_a_panel_of_shares_downhill_above_and_uphill_below(
    audits: list[Audit],
) -> None:
    panels = plots.alignment(audits).child_axes
    assert [panel.texts[0].get_text().split(",")[0] for panel in panels] == [
        "adam",
        r"sgd \$x\$ <b>",
    ]
    steps = audits[0].lenses["parameters"].steps
    window = len(steps) // 20
    drawn = [line for line in panels[0].lines if len(line.get_xdata()) > 2]
    uphill = bool((steps["d"] < 0).any())
    assert len(drawn) == 1 + uphill
    for line, sign in zip(drawn, (1, -1), strict=False):
        for k, y in enumerate(line.get_ydata()):
            some = steps.iloc[k : k + window]
            share = some["dissipation"] / some["dissipation"].sum()
            inner = some["alignment_lower"] if sign > 0 else -some["alignment_upper"]
            own = share[np.sign(some["d"]) == sign] * inner.clip(lower=0)
            assert y == pytest.approx(sign * float(own.sum()), abs=1e-12)
    bands = [np.concatenate([p.vertices for p in c.get_paths()]) for c in panels[0].collections]
    highest = steps["alignment_upper"].max() + 1e-12
    assert all((np.abs(band[:, 1]) <= highest).all() for band in bands)


def test_an_upper_end_of_one_is_no_band() -> None:
    audit = make_audit("vacuous")
    steps = audit.lenses["outputs"].steps
    steps["alignment_lower"] = steps["alignment_lower"].abs()
    steps["alignment_upper"] = 1.0
    steps["d"] = steps["d"].abs()
    (panel,) = plots.alignment(audit).child_axes
    assert not any(len(c.get_paths()) for c in panel.collections)
    assert np.isfinite(panel.lines[0].get_ydata()).all()


def test_what_says_nothing_at_all_is_not_drawn() -> None:
    steps = pd.DataFrame({"step": range(4), "step_end": range(1, 5), "d": 1.0, "dissipation": 1.0})
    steps = steps.assign(alignment_lower=[0.0, 0.3, 0.3, 0.3], alignment_upper=[1, 1, 0.9, 0.5])
    audit = make_audit("four")
    audit.lenses["outputs"] = replace(audit.lenses["outputs"], steps=steps)
    found = series.alignment_series(audit)
    assert found is not None
    np.testing.assert_array_equal(found.downhill[:, 0], [np.nan, 0.3, 0.3, 0.3])
    np.testing.assert_array_equal(found.downhill[:, 1], [np.nan, np.nan, np.nan, 0.5])
    assert not np.nan_to_num(found.uphill).any()


def test_no_key_covers_data_and_titles_say_the_stride() -> None:
    audits = [make_audit(f"run-{i}", seed=i, every=5, snapshots=9) for i in range(30)]
    for draw in (plots.loss_and_dissipation, plots.coarse_graining, plots.trajectory_map):
        figure = draw(audits).get_figure()
        assert figure is not None
        figure.canvas.draw()
        if draw is plots.loss_and_dissipation:
            assert any("every 5 steps" in ax.get_title("left") for ax in figure.findobj(plt.Axes))
        keys = [(ax, key) for ax in figure.findobj(plt.Axes) if (key := ax.get_legend())]
        assert len(keys) == 1
        for ax, key in keys:
            assert key.get_window_extent().x0 >= ax.get_window_extent().x1


def test_of_many_runs_the_best_the_median_and_the_worst_stand_out() -> None:
    audits = [make_audit(f"run-{i}", seed=i, noise=1 + i % 7, snapshots=9) for i in range(41)]
    ends = sorted(audits, key=lambda audit: audit.summary["loss_end"])
    upper, lower = plots.loss_and_dissipation(audits).child_axes
    key = upper.get_legend()
    assert key is not None
    assert [text.get_text() for text in key.get_texts()] == [
        f"{ends[0].run}: lowest loss at the end",
        f"{ends[20].run}: median loss at the end",
        f"{ends[40].run}: highest loss at the end",
        "38 other runs",
    ]
    for panel in (upper, lower):
        assert len(panel.lines) == 41
        faint = [line.get_alpha() is not None for line in panel.lines]
        assert faint == [True] * 38 + [False] * 3  # these lie on top
    assert [line.get_ydata()[-1] for line in upper.lines[38:]] == [
        ends[k].summary["loss_end"] for k in (40, 20, 0)
    ]
    drawn = next(f for f in figures(audits) if f.key == "loss-and-dissipation")
    assert [t["line"]["width"] for t in drawn.data] == [1] * 76 + [2] * 6
    assert f"Blue: {ends[0].run} (lowest loss at the end); " in drawn.caption
    assert drawn.caption.endswith("grey: the other 38 runs.")
    few = plots.loss_and_dissipation(audits[:12]).child_axes[0]
    assert not any(line.get_alpha() for line in few.lines)


def test_many_runs_without_a_known_loss_are_all_alike() -> None:
    audits = [make_audit(f"run-{i}", outputs=False, state=True) for i in range(13)]
    for audit in audits:
        audit.curve.drop(columns="loss", inplace=True)
    found = crowd(audits)
    assert found.behind == 13
    assert [found.label(i, audit.run) for i, audit in enumerate(audits)] == ["13 runs"] + [""] * 12
    assert found.sentence(audits) == ""


@pytest.mark.parametrize("runs", [1, 40])
def test_the_overview_names_the_runs_once_and_gives_each_its_room(runs: int) -> None:
    audits = [make_audit(f"run-{i}", seed=i, snapshots=9, parameters=i < 9) for i in range(runs)]
    figure = plots.overview(audits)
    figure.canvas.draw()
    keys = [key for ax in figure.findobj(plt.Axes) if (key := ax.get_legend())]
    assert [key.get_texts()[0].get_text() for key in keys] == ["irreducible"]
    assert len(figure.legends) == (runs > 1)
    titles = [ax.get_title("left") for ax in figure.findobj(plt.Axes)]
    assert sum(title.startswith("Which layers") for title in titles) == min(runs, 6)
    names = [t for ax in figure.findobj(plt.Axes) for t in ax.texts if t.get_text() == "run-0"]
    assert len(names) == 1  # of the alignment's panels


def test_the_key_of_long_names_stays_on_the_figure(audits: list[Audit]) -> None:
    names = [f"a-run-with-a-name-of-some-forty-letters-{k}" for k in range(6)]
    figure = plots.overview([audits[0].named(name) for name in names])
    figure.canvas.draw()
    (key,) = figure.legends
    assert key.get_window_extent().x1 <= figure.bbox.x1
    assert len(key.get_texts()) == 6


def test_losses_over_decades_are_drawn_on_a_logarithmic_axis() -> None:
    audit = make_audit("far")
    steps = audit.lenses["outputs"].steps
    upper, _ = plots.loss_and_dissipation(audit).child_axes
    assert upper.get_yscale() == "linear"
    steps["loss_end"] /= np.linspace(1, 1000, len(steps))
    upper, _ = plots.loss_and_dissipation(audit).child_axes
    assert upper.get_yscale() == "log"


def test_layers_are_named_without_what_all_share() -> None:
    audit = make_audit("deep", parameters=True)
    lens = audit.lenses["parameters"]
    assert lens.attribution is not None
    names = [f"model.h.{i}.{part}" for i in range(6) for part in ("weight", "bias")]
    named = replace(lens, attribution=lens.attribution.set_axis(names, axis=1))
    audit.lenses["parameters"] = named
    found = series.heat(audit)
    assert found is not None
    assert found.layers == [f"layer {i}" for i in range(6)]


def test_coarse_curves_are_the_audits(audits: list[Audit]) -> None:
    upper, lower = plots.coarse_graining(audits[1]).child_axes
    table = audits[1].headline.coarse
    np.testing.assert_array_equal(upper.lines[0].get_ydata(), table["length"])
    np.testing.assert_array_equal(lower.lines[0].get_ydata(), table["dissipation"])
    assert upper.get_xscale() == lower.get_yscale() == "log"


def test_map_draws_each_run(audits: list[Audit]) -> None:
    ax = plots.trajectory_map(audits)
    paths = [line for line in ax.lines if len(line.get_xdata()) > 1]
    assert len(paths) == 2
    np.testing.assert_allclose(
        paths[0].get_xydata()[0], paths[1].get_xydata()[0], atol=1e-6
    )  # the same start


def test_heat_map_sums_to_the_dissipation(audits: list[Audit]) -> None:
    attribution = audits[0].lenses["parameters"].attribution
    assert attribution is not None
    ax = plots.dissipation_heatmap(audits[0])
    drawn = np.asarray(ax.collections[0].get_array().filled(0.0))
    layers = attribution.T.groupby(lambda name: name.rpartition(".")[0], sort=False).sum()
    assert [label.get_text() for label in ax.get_yticklabels()] == list(layers.index)
    np.testing.assert_allclose(drawn.reshape(layers.shape), layers.clip(lower=0), rtol=1e-12)


def test_predicted_against_realised(audits: list[Audit]) -> None:
    ax = plots.predicted_vs_realised(audits)
    steps = audits[0].lenses["parameters"].steps
    np.testing.assert_allclose(
        ax.collections[0].get_offsets(), np.c_[steps["a"] / 2, steps["kl_realised"]]
    )


@pytest.mark.parametrize(
    "draw",
    [
        plots.decomposition_bars,
        plots.trajectory_map,
        plots.coarse_graining,
        plots.dissipation_heatmap,
        plots.predicted_vs_realised,
    ],
)
def test_what_no_lens_knows_is_said(draw: Callable[..., plt.Axes], weights_only: Audit) -> None:
    ax = draw(weights_only)
    assert len(ax.texts) == 1
    assert not ax.lines
    assert not ax.collections


def test_given_axes_are_used(audits: list[Audit]) -> None:
    for draw in (
        plots.alignment,
        plots.decomposition_bars,
        plots.trajectory_map,
        plots.predicted_vs_realised,
    ):
        _, ax = plt.subplots()
        assert draw(audits, ax) is ax


def test_overview_has_the_panels_the_lenses_allow(audits: list[Audit], weights_only: Audit) -> None:
    titles = {ax.get_title(loc="left") for ax in audits[0].plot().findobj(plt.Axes)}
    assert {
        "Where the dissipation went, seen every step",
        "Coarse-graining",
        "Which layers dissipated: adam, every interval",
    } <= titles
    few = plots.overview(weights_only)
    assert {ax.get_title(loc="left") for ax in few.findobj(plt.Axes)} - {""} == {
        "Loss and dissipation, seen every step"
    }
    few.canvas.draw()
    plots.overview(audits).canvas.draw()


def test_no_two_of_24_runs_look_the_same() -> None:
    assert len({(look(i).colour, look(i).dash) for i in range(24)}) == 24


@settings(max_examples=50)
@given(st.floats(1e-9, 1e9), st.floats(2, 1e9))
def test_log_ticks_are_few_and_inside(low: float, ratio: float) -> None:
    ticks = log_ticks(low, low * ratio)
    assert 1 <= len(ticks) <= 9
    assert ticks == sorted(set(ticks))
    assert low <= ticks[0]
    assert ticks[-1] <= low * ratio


@settings(max_examples=50)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(4, 100))
def test_thinning_keeps_the_outline(values: list[float], points: int) -> None:
    y = np.array(values)
    x = np.arange(len(y))
    kept_x, kept_y = thin(x, y, points)
    assert (kept_x[0], kept_x[-1]) == (x[0], x[-1])
    assert (kept_y.min(), kept_y.max()) == (y.min(), y.max())
    assert (np.diff(kept_x) > 0).all()
    assert len(kept_x) <= max(points, 0) + 2
    np.testing.assert_array_equal(y[kept_x], kept_y)
