"""The report in a terminal: tables that fit 80 columns, sentences, and progress bars on stderr."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from thermo_opt.describe import counterfactual as other_words
from thermo_opt.describe import sentences as words
from thermo_opt.describe import split as noise_words
from thermo_opt.describe.quantities import (
    DURATION_UNITS,
    QUANTITIES,
    Quantity,
    cost_unit,
    number,
    time_of,
    unit,
)
from thermo_opt.describe.standing import share_with_standing, with_standing
from thermo_opt.errors import printable
from thermo_opt.lenses.results import Audited

_SPARE = (
    "least_distance",
    "distance",
    "ε",
    "length",
    "adam steadiness",
    "adam straightness",
    "transport",
    "span",
    "dissipation",
    "drift",
    "noise",
    "stride",
)
"""Columns of a comparison that a narrow terminal does without, the first of them first."""
_NAME = 14
"""Letters of a run's name on a line, at least."""
_WIDEST = 1000
"""Columns of text that no comparison needs."""
_PATIENCE = 0.8
"""Seconds before a progress bar appears: what is quicker shows none."""


class Bars:
    """Progress bars on stderr while in use as a context; called as ``bars(description, total)`` it
    returns ``advance(n)``."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._timer = threading.Timer(_PATIENCE, self._progress.start)
        self._timer.daemon = True
        self._prefix = ""

    def named(self, run: str) -> None:
        """Bars from here on are about this run; earlier ones are done."""
        for task in self._progress.tasks:
            self._progress.update(task.id, visible=False)
        self._prefix = f"{run}: "

    def __call__(self, description: str, total: int) -> Callable[[int], None]:
        task = self._progress.add_task(self._prefix + description, total=total)
        return lambda n: self._progress.advance(task, n)

    def __enter__(self) -> Bars:
        self._timer.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        self._timer.join()
        if not self._progress.disable:  # else older releases of rich print an empty line
            self._progress.stop()


def print_json(text: str) -> None:
    """One JSON object on stdout and nothing else."""
    sys.stdout.write(text + "\n")


def print_audit(audit: Audited) -> None:
    """One run: the headline in words, a table with a column for each lens, and what they could not
    see."""
    console = Console(highlight=False)
    title = plain(audit.run, style="bold")
    if audit.optimizer:
        title.append(f"  {printable(audit.optimizer)}", style="dim not bold")
    console.print(title)
    console.print(
        plain(" ".join([words.headline(audit.summary), *words.explanation(words.closest(audit))]))
    )
    table = _table()
    table.add_column("")
    table.add_column("", style="dim")
    for summary in audit.summaries:
        table.add_column(summary["lens"], justify="right")
    for quantity in QUANTITIES:
        if quantity.key == "lens":
            continue
        if any(summary[quantity.key] is not None for summary in audit.summaries):
            clock = time_of(audit.summary)
            notation = " ".join(
                part for part in (quantity.symbol, unit(quantity.unit, clock)) if part
            )
            cells = (with_standing(summary, quantity.key) for summary in audit.summaries)
            table.add_row(quantity.name, notation, *cells)
    _add_rows(table, noise_words.SPLIT, [s["split"] for s in audit.summaries])
    _add_rows(table, other_words.COUNTERFACTUAL, [s["counterfactual"] for s in audit.summaries])
    console.print()
    console.print(table)
    _print_blind_spots(console, [audit])


def _add_rows(
    table: Table, quantities: Sequence[Quantity], parts: Sequence[Mapping[str, Any] | None]
) -> None:
    """Rows of what a summary holds by name in one entry, with standard errors where there are."""
    for quantity in quantities:
        if any((part or {}).get(quantity.key) is not None for part in parts):
            notation = " ".join(part for part in (quantity.symbol, quantity.unit) if part)
            cells = (noise_words.with_error(part, quantity.key) for part in parts)
            table.add_row(quantity.name, notation.replace("ratio", ""), *cells)


def print_comparison(audits: Sequence[Audited], table: pd.DataFrame) -> None:
    """Several runs: one table per lens, ranked runs first, then the comparison in words."""
    console = Console(highlight=False)
    said = [*table.attrs.get("notes", []), words.comparison(audits)]
    for lens, rows in table.groupby("lens", sort=False):
        units = ""
        if lens != "optimizer-state":
            records = [dict(row) for _, row in rows.iterrows()]
            costs = dict.fromkeys(cost_unit(time_of(row)) for row in records)
            units = f" (Q in {' or '.join(costs)}; lengths in √nats)"
        console.print(plain(f"{lens} lens: {words.LENS_WORDS[str(lens)]}{units}", style="bold"))
        console.print(
            _comparison_table(
                [{str(k): v for k, v in row.items()} for row in rows.to_dict("records")], console
            )
        )
        console.print()
    for sentence in said:
        if sentence:
            console.print(plain(sentence))
    _print_blind_spots(console, audits)


def print_drift(table: pd.DataFrame) -> None:
    """A front on drift: one table a target, the fastest first, stars on the front."""
    from thermo_opt.report.drift import drift_sentences

    console = Console(highlight=False)
    for target, rows in table.groupby("target_loss", sort=False):
        console.print(plain(f"To reach loss {number(target)}, noise apart", style="bold"))
        shown = _table()
        shown.add_column("run", overflow="fold", min_width=_NAME)
        for name in ("", f"T, {DURATION_UNITS[table.attrs['clock']]}", "drift", "noise"):
            shown.add_column(name, justify="right", no_wrap=True)
        for row in rows.sort_values("time", kind="stable", na_position="last").to_dict("records"):
            parts = (noise_words.with_error(row, part) for part in ("drift", "noise"))
            cells = [number(row["time"]), *parts]
            star = "★" if row["on_front"] else ""
            shown.add_row(plain(row["run"]), star, *cells)
        console.print(shown)
    said = (
        "Nats on the clock step, with one standard error; no universal frontier bounds the drift."
    )
    for sentence in [*drift_sentences(table), said]:
        console.print(plain(sentence))


def print_info(facts: Mapping[str, Any]) -> None:
    """What a run's record holds, one fact a line."""
    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for key, value in facts.items():
        if value is not None:
            text = ", ".join(map(str, value)) if isinstance(value, list) else _plain(value)
            table.add_row(key.replace("_", " "), plain(text))
    console.print(table)


def plain(text: str, style: str = "") -> Text:
    """``text`` for the terminal, with nothing in it that a run could steer the terminal with."""
    return Text(printable(text, keep="\n"), style=style)


def warn(text: str) -> None:
    """A line on stderr."""
    Console(stderr=True, highlight=False, soft_wrap=True).print(plain(f"thermo-opt: {text}"))


def warn_left_out(left_out: Iterable[tuple[str, str]]) -> None:
    """A line on stderr for each run that was left out, with the reason."""
    for run, reason in left_out:
        warn(f"left out: {reason if run in reason else f'{run}: {reason}'}")


def say(text: str) -> None:
    """A line on stdout, as it is."""
    Console(highlight=False, soft_wrap=True).print(plain(text))


def _comparison_table(rows: list[dict[str, Any]], console: Console) -> Table:
    rows = [{key: None if _missing(value) else value for key, value in row.items()} for row in rows]
    for row in rows:
        row["span"] = f"{row['first_step']}–{row['last_step']}"
        row["losses"] = f"{number(row['loss_start'])} → {number(row['loss_end'])}"
        row["ε"] = _range(row["alignment_lower"], row["alignment_upper"])
        for key in ("noise", "drift", "transport"):
            split = row["split"] or {}
            row[key] = split.get(key) if split.get("replicas") else None
        for key in ("alignment", "straightness", "steadiness"):
            row[f"adam {key}"] = _range(row[f"adam_{key}_lower"], row[f"adam_{key}_upper"])
    columns = {
        "span": "steps",
        "stride": "stride",
        "losses": "loss",
        "dissipation": "Q",
        "noise": "noise",
        "drift": "drift",
        "transport": "transp.",
        "least_distance": "D*",
        "distance": "D",
        "length": "ℒ",
        "ε": "ε",
        "adam alignment": "Adam’s ε",
        "adam straightness": "straight",
        "adam steadiness": "steady",
        "efficiency": "effic.",
    }
    columns = {
        key: name for key, name in columns.items() if any(row[key] is not None for row in rows)
    }
    folded = [row | {"run": row["run"][:_NAME]} for row in rows]
    wide = console.options.update(max_width=_WIDEST)
    for key in _SPARE:  # on a narrow terminal, whole columns fewer rather than all of them cut
        if Measurement.get(console, wide, _filled(folded, columns)).maximum <= console.width:
            break
        columns.pop(key, None)
    return _filled(rows, columns)


def _filled(rows: list[dict[str, Any]], columns: Mapping[str, str]) -> Table:
    table = _table()
    table.add_column("run", overflow="fold", min_width=_NAME)
    for name in columns.values():
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(plain(row["run"]), *(_cell(row, key) for key in columns))
    return table


def _cell(row: Mapping[str, Any], key: str) -> str:
    if key == "efficiency":
        return share_with_standing(row, key)
    return with_standing(row, key) if key in ("dissipation", "length") else number(row[key])


def _range(lower: float | None, upper: float | None) -> str | None:
    """A bracket of the alignment as one entry."""
    if lower is None or upper is None or upper - lower < 5e-4:
        return None if lower is None else number(lower, 2)
    low, high = number(lower, 2, "down"), number(upper, 2, "up")
    return f"≥ {low}" if upper >= 1 else f"{low}–{high}"


def _table() -> Table:
    return Table(
        box=SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, header_style="dim"
    )


def _print_blind_spots(console: Console, audits: Iterable[Audited]) -> None:
    spots = words.blind_spots(list(audits))
    if spots:
        console.print(plain("\nWhat the lenses could not see", style="bold"))
    for lens, reason, runs in spots:
        line = plain(f"{lens}: {reason}")
        if runs:
            line.append(f" ({printable(runs)})", style="dim")
        console.print(Padding(line, (0, 0, 0, 2)))


def _missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
