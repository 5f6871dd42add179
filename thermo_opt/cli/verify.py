"""``thermo-opt verify``: run claims, their wrong twins, or an optimizer's scorecard, and print what
came out."""

from __future__ import annotations

import json as encoder
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from thermo_opt.cli.pages import check_page
from thermo_opt.errors import InputError
from thermo_opt.writing import write_whole

if TYPE_CHECKING:
    from thermo_opt.theory.verify import Rejection, Score, Verdict

GOOD, BAD = ("holds", "rejected"), ("fails", "not established", "survives")


@dataclass(frozen=True)
class Column:
    """A column of a printed table."""

    title: str
    number: bool = False


@dataclass(frozen=True)
class Section:
    """One printed table with its heading."""

    title: str
    text: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


def verify(
    claims: Annotated[
        list[str] | None, typer.Argument(help="Claims to check. Default: all.", metavar="CLAIM…")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object and nothing else.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option(help="Also write the tables as an HTML page.")
    ] = None,
    mutants: Annotated[
        bool, typer.Option("--mutants", help="Check that each claim rejects its wrong twins.")
    ] = False,
    optimizer: Annotated[
        str | None,
        typer.Option(
            help=(
                "Score an optimizer beside SGD, Adam and NGD-T; a function of the "
                "model, or a class."
            ),
            metavar="MODULE:FACTORY",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of every random draw.")] = 0,
) -> None:
    """Check the theory's claims on problems whose answers are known; exit 1 if any fails."""
    import torch
    from rich.console import Console

    from thermo_opt.theory.verify import run_claims, run_mutants, scorecard

    if optimizer is not None and (claims or mutants):
        raise InputError(
            "--optimizer prints a scorecard: leave out claims and --mutants, or run them separately"
        )
    if seed < 0:
        raise InputError(f"--seed {seed}: a seed must be 0 or larger")
    check_page(html, "--html")
    torch.set_num_threads(1)  # the problems are tiny: threads would only wait for each other
    verdicts: list[Verdict] = []
    console = Console(stderr=True)
    with console.status("", spinner="line") as status:
        if optimizer is not None:
            status.update("training")
            scores = scorecard(optimizer, seed)
            found: dict[str, Any] = {"seed": seed, "scorecard": [s.to_dict() for s in scores]}
            sections, summary, failed = _scores(scores), f"Scorecard, seed {seed}.", False
        elif mutants:
            rejections = run_mutants(claims, seed, status.update)
            survivors = sum(not r.rejected for r in rejections)
            found = {"seed": seed, "mutants": [r.to_dict() for r in rejections]}
            summary = (
                f"{len(rejections) - survivors} of {len(rejections)} wrong twins "
                f"rejected, seed {seed}."
            )
            sections, failed = _rejections(rejections), survivors > 0
        else:
            verdicts = run_claims(claims, seed, status.update)
            held = sum(v.verdict == "holds" for v in verdicts)
            names = len({v.claim for v in verdicts})
            found = {"seed": seed, "verdicts": [v.to_dict() for v in verdicts]}
            summary = f"{held} of {len(verdicts)} checks of {names} claims hold, seed {seed}."
            sections, failed = _verdicts(verdicts), held < len(verdicts)
    if html is not None:
        _write_page(html, sections, summary)
    if json:
        print(encoder.dumps(found, indent=2, ensure_ascii=False, allow_nan=False))
    elif claims or mutants or optimizer is not None:
        _print(sections, summary)
    else:
        _print(_overview(verdicts), summary)
    if failed:
        raise typer.Exit(1)


def _overview(verdicts: list[Verdict]) -> list[Section]:
    """One row a claim, then every comparison of the claims that don't hold."""
    from thermo_opt.theory.verify import describe

    columns = [
        Column("claim"),
        Column("says"),
        Column("checks", True),
        Column("seconds", True),
        Column("verdict"),
    ]
    rows, wrong = [], []
    for claim in dict.fromkeys(v.claim for v in verdicts):
        own = [v for v in verdicts if v.claim == claim]
        worst = next((v.verdict for v in own if v.verdict != "holds"), "holds")
        rows.append((claim, describe(claim), str(len(own)), f"{own[0].seconds:.1f}", worst))
        wrong += own if worst != "holds" else []
    text = "Name claims to see what each compared: thermo-opt verify CLAIM…"
    return [Section("Claims", text, columns, rows), *_verdicts(wrong)]


def _verdicts(verdicts: list[Verdict]) -> list[Section]:
    from thermo_opt.theory.verify import describe

    columns = [
        Column("problem"),
        Column("what"),
        Column("predicted", True),
        Column("measured", True),
        Column("tolerance", True),
        Column("verdict"),
    ]
    sections = []
    for claim in dict.fromkeys(v.claim for v in verdicts):
        own = [v for v in verdicts if v.claim == claim]
        rows = [
            (
                v.problem,
                v.statement,
                f"{v.relation} {_digits(v.predicted)}",
                _digits(v.measured),
                _digits(v.tolerance),
                v.verdict,
            )
            for v in own
        ]
        sections.append(
            Section(f"{claim}  ({own[0].seconds:.1f} s)", describe(claim), columns, rows)
        )
    return sections


def _rejections(rejections: list[Rejection]) -> list[Section]:
    columns = [
        Column("claim"),
        Column("wrong twin"),
        Column("verdict"),
        Column("first check that failed"),
    ]
    rows = [
        (r.claim, r.mutant, "rejected" if r.rejected else "survives", r.by or "")
        for r in rejections
    ]
    return [
        Section(
            "Wrong twins",
            "Each replaces one part of the toolkit by a mistake its claim must notice.",
            columns,
            rows,
        )
    ]


def _scores(scores: list[Score]) -> list[Section]:
    from thermo_opt.theory.verify.scorecard import DAMPING

    columns = [Column("")] + [Column(s.optimizer, True) for s in scores]
    lines: list[tuple[str, list[Any]]] = [
        ("largest d²/(aΔ) of a step (bound: 1)", [s.bound for s in scores]),
        ("alignment ε", [s.alignment for s in scores]),
        ("dissipation a step to half the loss, ½a (nats)", [s.budget_mean for s in scores]),
        ("its spread over its mean (0: on budget)", [s.budget_spread for s in scores]),
        ("change with parametrization (0: invariant)", [s.invariance for s in scores]),
        ("steps on which the loss fell", [s.descent for s in scores]),
        ("steps to half the loss", [s.steps_to_target for s in scores]),
        ("dissipation to half the loss (nats)", [s.dissipation_to_target for s in scores]),
        ("last loss (nats)", [s.loss for s in scores]),
    ]
    text = (
        "A small classifier, full batches, 60 steps; a, d and Δ in the exact metric F "
        f"+ λI, λ = {DAMPING:g}."
    )
    return [
        Section(
            "Scorecard", text, columns, [(name, *map(_digits, values)) for name, values in lines]
        )
    ]


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


def _print(sections: list[Section], summary: str) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for section in sections:
        console.print(f"\n[bold]{section.title}[/bold]", highlight=False)
        console.print(section.text, highlight=False)
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for column in section.columns:
            table.add_column(column.title, justify="right" if column.number else "left")
        for row in section.rows:
            table.add_row(
                *(
                    f"[green]{c}[/green]"
                    if c in GOOD
                    else f"[red]{c}[/red]"
                    if c in BAD
                    else c.replace("[", r"\[")
                    for c in row
                )
            )
        console.print(table)
    console.print(summary, highlight=False)


def _write_page(path: Path, sections: list[Section], summary: str) -> None:
    from jinja2 import Environment, PackageLoader

    from thermo_opt import __version__

    page = Environment(
        loader=PackageLoader("thermo_opt.theory.verify"), autoescape=True
    ).get_template("verify.html.j2")
    text = page.render(
        title="thermo-opt verify",
        version=__version__,
        summary=summary,
        sections=sections,
        good=GOOD,
        bad=BAD,
    )
    write_whole(path, text)
