"""The command line: JSON and nothing else, tables of 80 columns, sentences for bad input, exit
statuses."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import thermo_opt
from tests.synthetic_audits import make_audit
from thermo_opt import cli
from thermo_opt.audits import audit, compare
from thermo_opt.cli import demo
from thermo_opt.cli.pages import is_report
from thermo_opt.cli.terminal import Bars, print_audit, print_comparison
from thermo_opt.lenses import SUMMARY_KEYS

DATA = Path(__file__).parents[2] / "data"
SGD, ADAM = DATA / "digits-sgd", DATA / "digits-adam"


def _run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_json_is_the_audit_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("audit", SGD, "--lens", "outputs", "--json") == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == json.loads(audit(SGD, lens="outputs").to_json())
    (summary,) = json.loads(out)["runs"]
    assert tuple(summary) == SUMMARY_KEYS
    assert err == ""


def test_options_reach_the_audit(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        _run("audit", ADAM, "--lens", "outputs", "--clock", "flow", "--stride", 10, "--json") == 0
    )
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads(audit(ADAM, lens="outputs", clock="flow", stride=10).to_json())
    arguments = [
        "audit",
        ADAM,
        "--lens",
        "parameters",
        "--model",
        "thermo_opt.demo_models:digits_mlp",
    ]
    assert _run(*arguments, "--steps", "::60", "--json") == 0
    (summary,) = json.loads(capfd.readouterr().out)["runs"]
    assert (summary["lens"], summary["steps"]) == ("parameters", 2)


def test_audit_in_words_fits_80_columns(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert _run("audit", SGD, "--steps", "::40", "--html", tmp_path / "r.html") == 0
    out = capfd.readouterr().out
    told, _, report = out.partition("Report: ")
    assert max(map(len, told.splitlines())) <= 80
    assert re.search(r"Of the 0\.0\d+ nats that this run dissipated, \d+\s% was unavoidable", told)
    assert "What the lenses could not see" in told
    assert report.strip() == str((tmp_path / "r.html").resolve())


def test_compare_ranks_by_efficiency(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    runs = [ADAM, DATA / "digits-sgd-momentum", SGD]
    page = tmp_path / "compared.html"
    assert _run("compare", *runs, "--lens", "outputs", "--json", "--html", page) == 0
    out = capfd.readouterr().out
    summaries = json.loads(out)["runs"]
    table = compare([audit(run, lens="outputs") for run in runs])
    assert [summary["run"] for summary in summaries] == list(table["run"])
    assert [s["efficiency"] for s in summaries] == sorted(
        (s["efficiency"] for s in summaries), reverse=True
    )
    embedded = re.search(
        r'id="thermo-opt-summaries">(.*?)</script>', page.read_text("utf-8"), re.DOTALL
    )
    assert embedded is not None
    assert json.loads(embedded.group(1)) == json.loads(out)


def test_info(capfd: pytest.CaptureFixture[str]) -> None:
    assert _run("info", SGD, "--json") == 0
    (facts,) = json.loads(capfd.readouterr().out)["runs"]
    assert (facts["run"], facts["format"], facts["optimizer"]) == (
        "digits-sgd",
        "thermo-opt",
        "SGD",
    )
    assert (facts["snapshots"], facts["first_step"], facts["last_step"]) == (121, 0, 120)
    assert facts["parameters"] == 64 * 16 + 16 + 16 * 10 + 10
    assert _run("info", SGD) == 0
    out = capfd.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "digits-sgd" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["audit", "/nowhere/at/all"], "/nowhere/at/all"),
        (["audit", SGD, "--lens", "telescope"], "telescope"),
        (["audit", SGD, "--clock", "lunar"], "lunar"),
        (["audit", SGD, "--stride", 0], "stride"),
        (["audit", SGD, "--jobs", 0], "jobs"),
        (["audit", SGD, "--steps", "500:600"], "--steps"),
        (["audit", SGD, "--steps", "1"], "--steps 1"),
        (["audit", SGD, "--steps", "a:b"], "--steps a:b"),
        (["audit", SGD, "--steps", "::0"], "--steps ::0"),
        (["audit", SGD, "--format", "punched-cards"], "punched-cards"),
        (
            ["audit", SGD, "--lens", "outputs", "--html", "/nowhere/at/all/r.html"],
            "/nowhere/at/all/r.html",
        ),
        (["compare", SGD, "/nowhere/at/all"], "/nowhere/at/all"),
        (["info", "/nowhere/at/all", "--json"], "/nowhere/at/all"),
    ],
)
def test_bad_input_gets_a_sentence(
    arguments: list[object], sentence: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert _run(*arguments) == 2
    err = capfd.readouterr().err
    assert sentence in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize("command", ["audit", "compare"])
def test_a_file_of_somebodys_own_is_not_replaced(
    command: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    notes = tmp_path / "notes.html"
    notes.write_text("somebody's own notes")
    assert _run(command, SGD, "--lens", "outputs", "--html", notes) == 2
    out, err = capfd.readouterr()
    assert "notes.html exists" in err
    assert out == ""
    assert notes.read_text() == "somebody's own notes"
    page = tmp_path / "page.html"
    assert [_run(command, SGD, "--lens", "outputs", "--html", page) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_terminals_that_lack_letters(encoding: str) -> None:
    code = "import sys; from thermo_opt.cli import main; sys.exit(main(sys.argv[1:]))"
    told = subprocess.run(
        [sys.executable, "-c", code, "compare", SGD, "--lens", "outputs"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        check=True,
    )
    assert told.stderr == b""
    assert b"effic." in told.stdout


@pytest.mark.parametrize("arguments", [["--json"], [], ["--help"]])
def test_a_reader_that_has_seen_enough_ends_the_output_quietly(arguments: list[str]) -> None:
    """As with ``| head``: nobody reads any more when the output comes."""
    reading, writing = os.pipe()
    os.close(reading)
    code = "import sys; from thermo_opt.cli import main; sys.exit(main(sys.argv[1:]))"
    told = subprocess.run(
        [sys.executable, "-c", code, "audit", SGD, "--lens", "outputs", *arguments],
        stdout=writing,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writing)
    assert (told.returncode, told.stderr) == (141, b"")


def test_output_that_the_shell_has_closed() -> None:
    code = "import sys; from thermo_opt.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "audit", str(SGD), "--lens", "outputs", "--json"]
    told = subprocess.run(
        ["sh", "-c", '"$@" >&-', "sh", *command], stderr=subprocess.PIPE, check=False
    )
    assert (told.returncode, told.stderr) == (0, b"")


def test_warnings_are_sentences_and_models_that_fail_are_the_users(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "warns.py").write_text(
        "import warnings\nfrom thermo_opt.demo_models import digits_mlp\n"
        "def model():\n    warnings.warn('a word of caution')\n    return digits_mlp()\n"
    )
    arguments = ["audit", SGD, "--lens", "parameters", "--steps", "::60", "--json", "--model"]
    assert _run(*arguments, "warns:model") == 0
    out, err = capfd.readouterr()
    assert err == "thermo-opt: a word of caution\n"
    assert len(json.loads(out)["runs"]) == 1
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "quits.py").write_text("def model():\n    raise SystemExit(3)\n")
    for spec in ("broken:model", "quits:model"):
        assert _run(*arguments, spec) == 2
        out, err = capfd.readouterr()
        assert spec in err
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments",
    [["audit"], ["nonsense"], ["audit", SGD, "--no-such-option"], ["audit", SGD, "--jobs", "x"]],
)
def test_bad_usage(arguments: list[object], capfd: pytest.CaptureFixture[str]) -> None:
    assert _run(*arguments) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_our_bugs_are_ours(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a slip")

    monkeypatch.setattr("thermo_opt.runs.load_run", broken)
    assert _run("info", SGD) == 1
    err = capfd.readouterr().err
    assert "ZeroDivisionError: a slip" in err
    assert "bug of ours" in err


def test_odd_paths_and_names(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    odd = tmp_path / "[red] Läufe [bold]"
    odd.symlink_to(SGD, target_is_directory=True)
    assert _run("info", odd, "--json") == 0
    assert json.loads(capfd.readouterr().out)["runs"][0]["path"] == str(odd)
    audits = [make_audit("[red] Läufe"), make_audit("[/bold]", noise=2)]
    print_audit(audits[0])
    print_comparison(audits, compare(audits))
    out = capfd.readouterr().out
    assert out.count("[red] Läufe") >= 3
    assert "[/bold]" in out


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; from thermo_opt.cli import main; main(sys.argv[1:]); "
        "print('torch' in sys.modules, 'pandas' in sys.modules)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert told.rstrip().endswith("False False")
    for name in ("audit", "compare", "info", "demo", "pareto", "sweep", "verify"):
        assert name in told
    told = subprocess.run(
        [sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=True
    ).stdout
    assert told.splitlines() == [thermo_opt.__version__, "False False"]


@pytest.mark.parametrize("width", [46, 60, 80, 120, 200])
def test_comparison_on_narrow_and_wide_terminals(
    width: int, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    audits = [make_audit("a"), make_audit("b", noise=2)]
    print_comparison(audits, compare(audits))
    told = capfd.readouterr().out
    assert max(map(len, told.splitlines())) <= width
    assert "effic." in told
    assert "…" not in told


def test_bars_count_without_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with Bars() as bars:
        advance = bars("snapshots", 3)
        for _ in range(3):
            advance(1)
    assert capfd.readouterr().out == ""


def test_demo(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("somebody's own notes")
    assert _run("demo", "--output", target) == 2
    assert target.read_text() == "somebody's own notes"
    target.unlink()
    assert _run("demo", "--output", target) == 0
    out = capfd.readouterr().out
    rows = {
        line.split()[0]: line.split()
        for line in out.partition("parameters lens")[0].splitlines()
        if "%" in line
    }
    assert set(rows) == {path.name for path in demo.recorded_runs()}
    for row in rows.values():  # the last column: efficiency, in per cent
        assert 0 < float(row[-2]) < 100
    embedded = re.search(
        r'id="thermo-opt-summaries">(.*?)</script>', target.read_text("utf-8"), re.DOTALL
    )
    assert embedded is not None
    for s in json.loads(embedded.group(1))["runs"]:
        if s["lens"] == "outputs":
            bound = math.sqrt(2 * s["dissipation"] * s["duration"])
            assert s["least_distance"] <= s["distance"] <= s["length"] <= bound * (1 + 1e-12)
    assert is_report(target)  # so the next demo may replace it
