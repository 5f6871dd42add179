"""What MkDocs does to our pages: it links "§4" and fills in ``{{ options of COMMAND }}`` and
``{{ quantities }}``."""

import re
from typing import Any

import typer

from thermo_opt.cli.app import application
from thermo_opt.describe.counterfactual import COUNTERFACTUAL
from thermo_opt.describe.quantities import QUANTITIES
from thermo_opt.describe.split import SPLIT

_TAGS = re.compile(r"(<a\b.*?</a>|<[^>]+>)", re.S)
_SECTION = re.compile(r"§(\d+)")
_OPTIONS = re.compile(r"^\{\{ options of (\w+) \}\}$", re.M)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The page with its tables of options and of quantities filled in."""
    markdown = markdown.replace("{{ quantities }}", _quantities())
    return _OPTIONS.sub(lambda match: _table(match[1]), markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """The page's HTML with its citations linked; links and tags themselves are left alone."""
    from mkdocs.utils import get_relative_url  # the tests read the tables without MkDocs

    theory = get_relative_url("theory.html", page.url)
    link = rf'<a class="section" href="{theory}#s\1">§\1</a>'
    parts = _TAGS.split(html)
    return "".join(part if part.startswith("<") else _SECTION.sub(link, part) for part in parts)


def _table(command: str) -> str:
    """A command's arguments and options, as its ``--help`` has them."""
    rows = ["| argument or option | meaning |", "|---|---|"]
    for parameter in typer.main.get_command(application()).commands[command].params:
        if parameter.param_type_name == "argument":
            name = (parameter.metavar or parameter.name or "").upper()
        else:
            name = max(parameter.opts, key=len)
            if not getattr(parameter, "is_flag", False):
                name += f" {parameter.metavar or 'VALUE'}"
        meaning = (getattr(parameter, "help", "") or "").replace("|", r"\|")
        default = parameter.default
        if default not in (None, False) and not callable(default) and "efault" not in meaning:
            meaning += f" Default: {default}."
        rows.append(f"| `{name}` | {meaning} |")
    return "\n".join(rows)


def _quantities() -> str:
    """Every quantity as the terminal and the page name it, with its key in the JSON."""
    rows = ["| name | symbol | key | unit | meaning |", "|---|---|---|---|---|"]
    of = (("", QUANTITIES), ("split.", SPLIT), ("counterfactual.", COUNTERFACTUAL))
    units = {"clock": "time", "cost": "nats per time", "length": "√nats"}
    for entry, quantities in of:
        for q in quantities:
            measure = units.get(q.unit, q.unit)
            rows.append(f"| {q.name} | {q.symbol} | `{entry}{q.key}` | {measure} | {q.meaning} |")
    return "\n".join(rows)
