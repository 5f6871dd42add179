"""Write the report: a jinja2 template, the figures' specifications and plotly.js, in one file that
loads nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from thermo_opt import __version__
from thermo_opt.describe import counterfactual as other_words
from thermo_opt.describe import sentences as words
from thermo_opt.describe import split as noise_words
from thermo_opt.describe.quantities import (
    DEFINED,
    PER_STEP,
    QUANTITIES,
    Quantity,
    number,
    time_of,
    unit,
)
from thermo_opt.describe.ranking import ranking
from thermo_opt.describe.standing import share_with_standing, with_standing
from thermo_opt.errors import InputError
from thermo_opt.lenses.results import Audited, summaries_json
from thermo_opt.plots.crowd import crowd
from thermo_opt.plots.palette import PARTS
from thermo_opt.plots.series import as_list
from thermo_opt.report.figures import figures
from thermo_opt.report.spec import Figure
from thermo_opt.writing import write_whole


def write_report(
    audits: Audited | Iterable[Audited],
    path: str | PathLike[str],
    left_out: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the audits' report to ``path`` (by rename: a reader never sees half a page) and return
    the path. ``left_out`` and ``notes`` as in `summaries_json`.

    Cost: a fraction of a second; about 5 MB on disk, most of it plotly.js. Raises `InputError` when
    ``path`` can't be written.
    """
    return write_whole(path, render(as_list(audits), left_out, notes))


def render(
    audits: list[Audited],
    left_out: Sequence[tuple[str, str]] = (),
    notes: Sequence[str] = (),
) -> str:
    """The page as a string. Everything that came from a run is escaped; only the page's own scripts
    may execute."""
    if not audits:
        raise InputError("a report needs at least one audit.")
    obstacle = ranking(audits).obstacle
    lead = [*notes, None if obstacle in notes else obstacle, words.comparison(audits)]
    return render_template(
        "page.html.j2",
        figures(audits),
        summaries_json(audits, left_out, notes),
        title=(
            "Thermodynamic audit of "
            f"{audits[0].run if len(audits) == 1 else f'{len(audits)} training runs'}"
        ),
        comparison=" ".join(filter(None, lead)),
        left_out=left_out,
        cards=_cards(audits),
        parts={part.capitalize(): 100 * opacity for part, opacity in PARTS.items()},
        columns=[
            {"run": audit.run, "lens": summary["lens"]}
            for audit in audits
            for summary in audit.summaries
        ],
        rows=_rows(audits),
        blind_spots=words.blind_spots(audits),
        definitions=_definitions(audits),
    )


def render_template(name: str, drawn: Sequence[Figure], numbers_json: str, **context: Any) -> str:
    """A page as a string: its template with the style sheet, scripts, figures and the JSON of its
    numbers filled in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    environment = Environment(
        loader=PackageLoader("thermo_opt.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    source = {name: _template_file(name) for name in ("page.css", "page.js")}
    plotly_js = get_plotlyjs()
    specifications = json.dumps(
        [{"key": f.key, "data": f.data, "layout": f.layout} for f in drawn],
        allow_nan=False,
        separators=(",", ":"),
    )
    return environment.get_template(name).render(
        **context,
        version=__version__,
        policy=_policy([plotly_js, source["page.js"]]),
        css=Markup(source["page.css"]),
        figures=drawn,
        summaries_json=Markup(_inert(numbers_json)),
        figures_json=Markup(_inert(specifications)),
        plotly_js=Markup(plotly_js),
        page_js=Markup(source["page.js"]),
    )


def _cards(audits: list[Audited]) -> list[dict[str, Any]]:
    """One card a run, in the order given."""
    cards, looks = [], crowd(audits).looks
    for index, audit in enumerate(audits):
        summary = words.closest(audit)
        efficiency = summary["efficiency"]
        total = summary["dissipation"]
        shares = []
        if total and all(summary[part] is not None for part in PARTS):
            shares = [
                {"opacity": 100 * opacity, "weight": f"{summary[part] / total:.6f}"}
                for part, opacity in PARTS.items()
            ]
        cards.append(
            {
                "index": index,
                "run": audit.run,
                "look": looks[index],
                "context": ", ".join(
                    filter(
                        None,
                        [
                            audit.optimizer,
                            f"{number(_span(audit))} {summary['step_unit']}s",
                            f"seen {words.seen_every(summary)}",
                        ],
                    )
                ),
                "efficiency": share_with_standing(summary, "efficiency").replace(" ", "\u2009"),
                "efficiency_words": "efficiency unknown" if efficiency is None else "efficient",
                "shares": shares,
                "headline": words.headline(summary),
                "more": words.explanation(summary) if len(audits) == 1 else words.brief(summary),
            }
        )
    return cards


def _span(audit: Audited) -> int:
    """Optimizer steps between the first and the last snapshot audited."""
    return int(audit.steps["step_end"].iloc[-1] - audit.steps["step"].iloc[0])


def _rows(audits: list[Audited]) -> list[dict[str, Any]]:
    """One row a quantity; each cell holds the exact value (as in the JSON) and the text a person
    reads."""
    summaries = json.loads(summaries_json(audits))["runs"]
    clocks = {time_of(summary) for summary in summaries}
    rows = []
    for quantity in QUANTITIES:
        if quantity.key == "lens" or all(s.get(quantity.key) is None for s in summaries):
            continue
        cells = [
            {"value": json.dumps(s.get(quantity.key)), "text": with_standing(s, quantity.key)}
            for s in summaries
        ]
        units = " or ".join(sorted({unit(quantity.unit, clock) for clock in clocks}))
        rows.append(
            {
                "key": quantity.key,
                "name": quantity.name,
                "symbol": quantity.symbol,
                "unit": units,
                "cells": cells,
            }
        )
    rows += _rows_of(summaries, "split", noise_words.SPLIT)
    return rows + _rows_of(summaries, "counterfactual", other_words.COUNTERFACTUAL)


def _rows_of(
    summaries: list[dict[str, Any]], entry: str, quantities: Sequence[Quantity]
) -> list[dict[str, Any]]:
    """Rows of what summaries hold by name in one entry, where any run tells them."""
    parts = [summary.get(entry) or {} for summary in summaries]
    return [
        {
            "key": f"{entry}-{quantity.key}",
            "name": quantity.name,
            "symbol": quantity.symbol,
            "unit": unit(quantity.unit, "step"),
            "cells": [
                {
                    "value": json.dumps(part.get(quantity.key)),
                    "text": noise_words.with_error(part, quantity.key),
                }
                for part in parts
            ],
        }
        for quantity in quantities
        if any(part.get(quantity.key) is not None for part in parts)
    ]


def _definitions(audits: list[Audited]) -> list[dict[str, str]]:
    clocks = sorted({time_of(audit.summary) for audit in audits})
    items = [
        {
            "name": q.name,
            "symbol": q.symbol,
            "unit": q.unit,
            "meaning": q.meaning,
            "formula": q.formula,
        }
        for q in (*DEFINED, *(noise_words.SPLIT if _any_split(audits) else ()))
    ]
    items += [
        {"name": name, "symbol": symbol, "unit": measure, "meaning": meaning, "formula": ""}
        for symbol, name, measure, meaning in PER_STEP
    ]
    for item in items:
        item["unit"] = " or ".join(sorted({unit(item["unit"], clock) for clock in clocks}))
    return items


def _any_split(audits: list[Audited]) -> bool:
    return any((s["split"] or {}).get("replicas") for a in audits for s in a.summaries)


def _policy(scripts: list[str]) -> str:
    """Content security policy: no request of any kind leaves the page, and no script runs but the
    two it came with."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'"
        for s in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:"


def _inert(text: str) -> str:
    """JSON that can stand inside a <script> element whatever strings it holds."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _template_file(name: str) -> str:
    return (Path(__file__).parent / "templates" / name).read_text(encoding="utf-8")
