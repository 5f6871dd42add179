"""The Matplotlib figures: what is drawn is what the audit holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("agg")
import matplotlib.pyplot as plt

from tests.synthetic_audits import make_audit
from thermo_opt import plots
from thermo_opt.audits import Audit
from thermo_opt.plots.palette import look
from thermo_opt.plots.series import log_ticks, thin


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


def test_alignment_band_spans_the_bracket(audits: list[Audit]) -> None:
    ax = plots.alignment(audits[0])
    steps = audits[0].lenses["parameters"].steps
    extent = ax.collections[0].get_paths()[0].get_extents()
    assert extent.y1 == pytest.approx(steps["alignment_upper"].max())
    assert extent.y0 == pytest.approx(steps["alignment_lower"].min())


def test_an_upper_end_of_one_is_no_band(audits: list[Audit]) -> None:
    audit = make_audit("vacuous")
    audit.lenses["outputs"].steps["alignment_upper"] = 1.0
    ax = plots.alignment(audit)
    assert not ax.collections
    assert "lower bound" in ax.get_legend().get_texts()[0].get_text()


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
        "Where the dissipation went",
        "Coarse-graining",
        "Which layers dissipated: adam",
    } <= titles
    few = plots.overview(weights_only)
    assert {ax.get_title(loc="left") for ax in few.findobj(plt.Axes)} - {""} == {
        "Loss and dissipation"
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
