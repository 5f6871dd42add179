"""The same run recorded at every step and thinned, through the whole pipeline: what the interface,
the terminal, the JSON and the page say of the thinned run is true of the whole."""

import html
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

import thermo_opt as to
from tests.audits.claims import (
    KEYS,
    Whole,
    check_note,
    check_number,
    check_sentences,
    check_summary,
    printed,
)
from tests.audits.recorded_every_step import RUNS, Recorded, thinned
from thermo_opt.cli import main
from thermo_opt.describe.split import SPLIT
from thermo_opt.lenses import LENSES, SUMMARY_KEYS
from thermo_opt.lenses.predictions import ReplayedPredictions


@pytest.fixture(name="recorded", scope="module", params=RUNS)
def _recorded(request, tmp_path_factory) -> Recorded:
    return RUNS[request.param](tmp_path_factory.mktemp(request.param))


def lenses_at(recorded: Recorded, stride: int) -> list[str]:
    """The parameter lens and the optimizer-state lens are dear: they look at some strides only."""
    moments = recorded.run.snapshots[0].has_group("exp_avg")
    closer = ["parameters"] if stride >= recorded.parameters_from else []
    return ["outputs", *closer, *(["optimizer-state"] if moments and stride >= 50 else [])]


@pytest.fixture(name="replayed_once", scope="module", autouse=True)
def _replayed_once():
    """The thinned copies' checkpoints are links to one run's files: each is replayed once."""
    replay, known = ReplayedPredictions.outputs, {}

    def outputs(self, index):
        path = self.run.snapshots[index].path
        file = next(path.glob("*.safetensors")) if path.is_dir() else path
        if file.stat().st_ino not in known:
            known[file.stat().st_ino] = replay(self, index)
        return known[file.stat().st_ino]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ReplayedPredictions, "outputs", outputs)
        yield


@cache
def whole_from(recorded: Recorded, first: int) -> Whole:
    """The run at every step from a snapshot on."""
    kept = [snapshot for snapshot in recorded.run.snapshots if snapshot.step >= first]
    audit = to.audit(replace(recorded.run, snapshots=kept), lens="outputs", **recorded.options)
    return Whole({"outputs": audit.summary})


@pytest.mark.parametrize("stride", [1, 2, 5, 10, 50])
def test_all_that_is_said_of_a_thinned_run_is_true_of_the_whole(
    recorded, stride, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "4000")
    if stride == 1 and recorded.options:
        pytest.skip("replayed: as slow as all its strides together")
    path = recorded.path if stride == 1 else thinned(recorded, tmp_path / "thinned", stride)
    if path is None:
        pytest.skip("two snapshots so far apart aren't there")
    lenses = lenses_at(recorded, stride)
    audit = to.audit(path, lens=lenses, **recorded.options)
    whole = (
        Whole({"outputs": audit.summary})
        if stride == 1
        else whole_from(recorded, audit.summary["first_step"])
    )
    options = [f"--{key.replace('_', '-')}={given}" for key, given in recorded.options.items()]
    command = ["audit", str(path), *options, *(f"--lens={lens}" for lens in lenses)]

    for summary in audit.summaries:
        check_summary(summary, whole)
    found = json.loads(audit.to_json())
    if stride in (5, 50):
        assert main([*command, "--json"]) == 0
        assert json.loads(capfd.readouterr().out) == found

    page = tmp_path / "page.html"
    assert main([*command, f"--html={page}"]) == 0
    sentences, rows, notes = printed(capfd.readouterr().out.partition("\nReport: ")[0])
    by_lens = {summary["lens"]: summary for summary in found["runs"]}
    check_sentences(sentences, by_lens["outputs"], whole)
    check_rows(rows, by_lens, whole)
    assert len(notes) >= 1
    for line in notes:
        lens, _, note = line.partition(": ")
        assert lens in LENSES
        check_note(note, by_lens.get(lens, {}), whole)
    check_page(page, found["runs"], sentences, whole)


def check_rows(rows: list[list[str]], by_lens: dict, whole: Whole) -> None:
    """The terminal's table: a column a lens, each number with the sign of what it is."""
    names = rows[0]
    assert names == [lens for lens in LENSES if lens in by_lens]
    for row in rows[1:]:
        if row[0] not in KEYS:
            assert row[0] in {quantity.name for quantity in SPLIT}
            continue
        for lens, text in zip(names, row[-len(names) :], strict=True):
            check_number(by_lens[lens], KEYS[row[0]], text, whole)


def check_page(page: Path, summaries: list[dict], sentences: str, whole: Whole) -> None:
    """The page: its JSON, cards, table and titles."""
    text = page.read_text("utf-8")
    embedded = re.search(r'id="thermo-opt-summaries">(.*?)</script>', text, re.S)
    assert embedded is not None
    assert json.loads(embedded[1])["runs"] == summaries
    first = summaries[0]
    card = re.findall(r'<p class="(?:headline|more)">(.*?)</p>', text)
    assert " ".join(map(html.unescape, card)) == sentences
    (efficiency,) = re.findall(r'<p class="big">(.*?)<small>', text)
    check_number(first, "efficiency", html.unescape(efficiency).replace("\u2009", " "), whole)
    cells = re.findall(
        r'<td data-key="(\w+)" data-column="(\d+)" data-value="[^"]*">(.*?)</td>', text
    )
    assert {key for key, _, _ in cells} < set(SUMMARY_KEYS)
    for key, column, cell in cells:
        check_number(summaries[int(column)], key, html.unescape(cell), whole)
    titles = re.findall(r'<h2 id="title-[\w-]+">(.*?)</h2>', text)
    seen = "seen every step" if first["stride"] == 1 else f"every {first['stride']:g} steps"
    assert all(seen in title for title in titles if title != "How much the sampling hides")
