"""The report's source: what stands in it, what can't get into it, how it is written."""

from __future__ import annotations

import html
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest

from tests.synthetic_audits import make_audit
from thermo_opt.audits import Audit
from thermo_opt.errors import InputError
from thermo_opt.lenses import summaries_json
from thermo_opt.plots.palette import OKABE_ITO
from thermo_opt.plots.series import MAX_LAYERS, heat
from thermo_opt.report import write_report
from thermo_opt.report.figures import figures
from thermo_opt.report.page import render

HOSTILE = "</script><script>alert(1)</script>"


@pytest.fixture(scope="module")
def audits() -> list[Audit]:
    return [
        make_audit("adam", parameters=True),
        make_audit("sgd", noise=2, seed=1),
        make_audit(HOSTILE, state=True),
    ]


@pytest.fixture(scope="module")
def page(audits: list[Audit]) -> str:
    return render(audits)


def _drawn(value: Any) -> Any:
    """The figure with its colour names looked up, as the page does when it draws."""
    if isinstance(value, str) and value.startswith("@"):
        name = value[1:].split(":")[0]
        return OKABE_ITO.get(name, "#123456")
    if isinstance(value, dict):
        return {key: _drawn(item) for key, item in value.items()}
    return [_drawn(item) for item in value] if isinstance(value, list) else value


def test_plotly_accepts_every_figure(audits: list[Audit]) -> None:
    for figure in figures(audits):
        drawn = go.Figure(data=_drawn(figure.data), layout=_drawn(figure.layout))
        assert len(drawn.data) == len(figure.data) > 0


def test_every_axis_has_a_title_and_costs_have_units(audits: list[Audit]) -> None:
    for figure in figures(audits):
        for name, axis in figure.layout.items():
            if (
                re.fullmatch(r"[xy]axis\d*", name)
                and axis.get("visible", True)
                and figure.key != "dissipation-heatmap"
            ):
                assert axis["title"]["text"], (figure.key, name)
    text = json.dumps([figure.layout for figure in figures(audits)], ensure_ascii=False)
    assert "dissipation Q (nats)" in text
    assert "length ℒ (√nats)" in text


def test_other_clocks_state_their_unit() -> None:
    text = render([make_audit("timed", clock="wall")])
    assert "nats per s" in text


def test_embedded_json_is_the_command_lines(audits: list[Audit], page: str) -> None:
    found = re.search(r'id="thermo-opt-summaries">(.*?)</script>', page, re.DOTALL)
    assert found is not None
    assert json.loads(found.group(1)) == json.loads(summaries_json(audits))


def test_names_cannot_leave_their_place(page: str) -> None:
    assert HOSTILE not in page
    assert "<script>alert" not in page
    assert page.count("</script>") == page.count("<script") == 4


def test_nothing_is_loaded(page: str) -> None:
    own = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"""(src|href)\s*=\s*["'](?!data:)""", own)
    assert "default-src 'none'" in html.unescape(own)
    assert "@import" not in own
    assert "url(" not in own


def test_every_lens_says_what_it_could_not_see(audits: list[Audit], page: str) -> None:
    assert "certified lower bound; the outputs lens has no gradients" in page
    assert "not used: the run has no optimizer-state" in page
    assert "batch size unknown" in page


def test_absent_quantities_leave_no_empty_figure() -> None:
    drawn = {figure.key for figure in figures([make_audit("weights", outputs=False, state=True)])}
    assert drawn == {"loss-and-dissipation"}


def test_figures_hold_no_nan() -> None:
    audit = make_audit("gaps", parameters=True)
    audit.lenses["outputs"].steps.loc[3:6, ["loss", "alignment_lower"]] = np.nan
    text = json.dumps(
        [[f.data, f.layout] for f in figures([audit])], allow_nan=False
    )  # raises for NaN
    assert "NaN" not in text


def test_runs_on_other_probes_are_named_not_mapped() -> None:
    runs = [make_audit("one"), make_audit("two", seed=1), make_audit("stranger", probe="probe-2")]
    found = next(figure for figure in figures(runs) if figure.key == "trajectory-map")
    assert [trace["name"] for trace in found.data] == ["one", "two"]
    assert "recorded on another probe: stranger" in found.caption


def test_long_curves_are_thinned() -> None:
    long = make_audit("long", snapshots=6001, every=1)
    found = next(figure for figure in figures([long]) if figure.key == "loss-and-dissipation")
    assert all(len(trace["x"]) < 2000 for trace in found.data)
    spent = next(trace for trace in found.data if trace.get("yaxis") == "y2")
    assert spent["y"][-1] == pytest.approx(long.summary["dissipation"], rel=1e-12)


def test_many_layers_are_merged_without_losing_any() -> None:
    audit = make_audit("shallow", parameters=True)
    lens = audit.lenses["parameters"]
    table = pd.DataFrame(
        {f"block{i}.weight": np.full(len(lens.steps), 1e-6 * (i + 1)) for i in range(100)}
    )
    found = heat(replace(audit, lenses={"parameters": replace(lens, attribution=table)}))
    assert found is not None
    assert len(found.layers) == MAX_LAYERS
    np.testing.assert_allclose(found.values.sum(axis=0), table.sum(axis=1), rtol=1e-12)


def test_written_whole_or_not_at_all(
    audits: list[Audit], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.html"
    assert audits[0].to_html(target) == target
    before = target.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(InputError, match="No space left"):
        write_report(audits, target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_bad_targets(audits: list[Audit], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory"):
        write_report(audits, tmp_path)
    with pytest.raises(InputError, match="can't be written"):
        write_report(audits, tmp_path / "absent" / "report.html")
    with pytest.raises(InputError, match="at least one"):
        write_report([], tmp_path / "report.html")
