"""The same run recorded at every step and thinned, through the whole pipeline: what the interface,
the terminal, the JSON and the page say of the thinned run is true of the whole."""

import html
import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import thermo_opt as to
from tests.audits.claims import (
    KEYS,
    Whole,
    check_note,
    check_number,
    check_sentences,
    check_summary,
    near,
    printed,
)
from tests.audits.compared_claims import (
    COMPARISON,
    FRONT,
    Compared,
    Fronted,
    check_all,
    check_cells,
    tables,
)
from tests.audits.recorded_every_step import RUNS, Recorded, thinned
from thermo_opt.cli import main
from thermo_opt.describe.sentences import headline
from thermo_opt.describe.split import SPLIT
from thermo_opt.fronts import read_trajectory
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


def as_json(command: list[str], capfd: pytest.CaptureFixture[str]) -> Any:
    """What a command prints as JSON."""
    assert main([*command, "--json"]) == 0
    return json.loads(capfd.readouterr().out)


def thinned_all(runs: dict[str, Recorded], folder: Path, stride: int) -> list[Path | None]:
    """The runs at this stride, where they were recorded at every step."""
    return [
        run.path if stride == 1 else thinned(run, folder / name, stride)
        for name, run in runs.items()
    ]


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
        assert as_json(command, capfd) == found

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


DIGITS = [name for name in RUNS if name.startswith("digits")]


@pytest.fixture(name="digits", scope="module")
def _digits(tmp_path_factory) -> dict[str, Recorded]:
    return {name: RUNS[name](tmp_path_factory.mktemp(name)) for name in DIGITS}


@pytest.mark.parametrize("stride", [1, 2, 5, 10, 50])
def test_all_that_is_said_of_thinned_runs_compared_is_true_of_the_whole_ones(
    digits, stride, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "4000")
    places = thinned_all(digits, tmp_path, stride)
    command = ["compare", *map(str, places), "--lens=outputs"]
    found = as_json(command, capfd)
    seen = {summary["run"]: summary for summary in found["runs"]}
    whole = {name: whole_from(digits[name], seen[name]["first_step"]) for name in digits}
    runs = Compared(seen, whole)
    page = tmp_path / "page.html"
    assert main([*command, f"--html={page}"]) == 0
    check_comparison(capfd.readouterr().out, page, found, runs)


@pytest.mark.parametrize("stride", [5, 50])
def test_all_that_is_said_of_a_run_beside_itself_thinned_is_true_of_both(
    recorded, stride, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "4000")
    sparse = thinned(recorded, tmp_path / "thinned", stride)
    if sparse is None:
        pytest.skip("two snapshots so far apart aren't there")
    options = [f"--{key.replace('_', '-')}={given}" for key, given in recorded.options.items()]
    command = ["compare", str(recorded.path), str(sparse), *options, "--lens=outputs"]
    found = as_json(command, capfd)
    seen = {summary["run"]: summary for summary in found["runs"]}
    assert len(seen) == 2
    page = tmp_path / "page.html"
    assert main([*command, f"--html={page}"]) == 0
    whole = {name: whole_from(recorded, summary["first_step"]) for name, summary in seen.items()}
    check_comparison(capfd.readouterr().out, page, found, Compared(seen, whole))


def check_comparison(printed: str, page: Path, found: dict, runs: Compared) -> None:
    """What `compare` prints and writes: summaries, table, sentences, notes and page."""
    for name, summary in runs.seen.items():
        check_summary(summary, runs.whole[name])
    text = printed.partition("\nReport: ")[0]
    (table,) = tables(text)
    keys = {"Q": "dissipation", "ℒ": "length", "D*": "least_distance", "D": "distance"}
    for cells in table[1:]:
        row = dict(zip(table[0], cells, strict=True))
        summary, whole = runs.seen[row["run"]], runs.whole[row["run"]]
        assert [
            near(x, whole[k]) for x, k in zip(row["loss"].split(" → "), LOSSES, strict=True)
        ] == [True] * 2
        assert row["steps"] == f"{summary['first_step']}–{summary['last_step']}"
        for name, key in keys.items():
            if name not in ("D", "D*"):
                check_number(summary, key, row[name], whole)
            elif summary[key] is not None:
                assert near(row[name], whole[key])
        if summary["efficiency"] is not None:
            check_number(summary, "efficiency", row["effic."], whole)
    said, _, spots = text.partition("What the lenses could not see")
    said = said.rpartition("\n\n" if "\n\n" in said.strip() else "")[0] or said
    lead = said.strip().split("\n\n")[-1]
    check_all(lead, COMPARISON, runs)
    for line in filter(None, map(str.strip, spots.splitlines())):
        _, _, note = line.partition(": ")
        note, _, names = note.rpartition(" (")
        known = runs.seen if names == "all runs)" else names.rstrip(")").split(", ")
        for name in known:
            check_note(note, runs.seen[name], runs.whole[name])
    written = page.read_text("utf-8")
    (top,) = re.findall(r'<p class="lead">(.*?)</p>', written)
    assert re.sub("[ \n]+", " ", html.unescape(top)) == re.sub("[ \n]+", " ", lead)
    cards = re.findall(r'<article .*?<h2 id="run-\d+">(.*?)</h2>(.*?)</article>', written, re.S)
    assert [name for name, _ in cards] == [summary["run"] for summary in found["runs"]]
    for name, card in cards:
        summary, whole = runs.seen[name], runs.whole[name]
        told = re.findall(r'<p class="(?:headline|more)">(.*?)</p>', card)
        check_sentences(" ".join(map(html.unescape, told)), summary, whole)
        (efficiency,) = re.findall(r'<p class="big">(.*?)<small>', card)
        check_number(summary, "efficiency", html.unescape(efficiency).replace("\u2009", " "), whole)
    for key, column, cell in CELLS.findall(written):
        summary = found["runs"][int(column)]
        check_number(summary, key, html.unescape(cell), runs.whole[summary["run"]])


@pytest.mark.parametrize("stride", [1, 2, 5, 10, 50])
def test_all_that_is_said_of_the_front_of_thinned_runs_is_true_of_the_whole_ones(
    digits, stride, tmp_path, capfd, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "4000")
    places = thinned_all(digits, tmp_path, stride)
    command = ["pareto", *map(str, places)]
    found = as_json(command, capfd)
    first = found["runs"][0]["first_step"]
    lines = {
        name: read_trajectory(run.run, steps=[s.step for s in run.run.snapshots if s.step >= first])
        for name, run in digits.items()
    }
    front = Fronted(found["runs"], lines)
    page = tmp_path / "page.html"
    assert main([*command, f"--html={page}"]) == 0
    text = capfd.readouterr().out.partition("\nPage: ")[0]
    (table,) = tables(text)
    target = found["targets"][0]["target_loss"]
    rows = {row["run"]: row for row in found["runs"]}
    written = page.read_text("utf-8")
    for run, _, *cells in table[1:]:
        check_cells(cells[:4], rows[run], target, lines[run])
        assert ("★" in cells[4:]) == rows[run]["on_front"]
        row = re.search(rf'<tr><th scope="row">{run}(?: ★)?</th>(.*?)</tr>', written)
        assert row is not None
        on_page = [html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", row[1])]
        check_cells(on_page[2:6], rows[run], target, lines[run])
    lead = text.strip().split("\n\n")[-1]
    check_all(lead, FRONT, front)
    (top,) = re.findall(r'<p class="lead">(.*?)</p>', written)
    assert re.sub("[ \n]+", " ", html.unescape(top)) == re.sub("[ \n]+", " ", lead)


@pytest.mark.parametrize(
    ("stride", "said", "instead"),
    [
        (1, "went into detours", "went into uneven pacing"),
        (1, r"\d+\u00a0% was unavoidable", "50\u00a0% was unavoidable"),
        (10, "at least", "exactly"),
        (10, "every 10 steps", "every 5 steps"),
        (10, "at most", "at least"),
        (10, r"at least [\d.]+ nats", "at least 0.9 nats"),
        (10, r"at most \d+", "at most 9.9"),
        (50, "From step 20 on, this", "This"),
    ],
)
def test_a_false_sentence_would_be_caught(digits, stride, said, instead, tmp_path):
    """The judge of these tests: another word or number, or a bound turned round, fails them."""
    run = digits["digits-adam"]
    path = run.path if stride == 1 else thinned(run, tmp_path / "thinned", stride)
    audit = to.audit(path, lens="outputs")
    whole = whole_from(run, audit.summary["first_step"])
    true = headline(audit.summary)
    check_sentences(true, audit.summary, whole)
    false, count = re.subn(said, instead, true, count=1)
    assert count == 1
    with pytest.raises(AssertionError):
        check_sentences(false, audit.summary, whole)


LOSSES = ("loss_start", "loss_end")
CELLS = re.compile(r'<td data-key="(\w+)" data-column="(\d+)" data-value="[^"]*">(.*?)</td>')


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
    cells = CELLS.findall(text)
    assert {key for key, _, _ in cells} < set(SUMMARY_KEYS)
    for key, column, cell in cells:
        check_number(summaries[int(column)], key, html.unescape(cell), whole)
    titles = re.findall(r'<h2 id="title-[\w-]+">(.*?)</h2>', text)
    seen = "seen every step" if first["stride"] == 1 else f"every {first['stride']:g} steps"
    assert all(seen in title for title in titles if title != "How much the sampling hides")
