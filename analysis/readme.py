"""The tables of analysis/README.md, from the CSVs in analysis/results/.

    python -m analysis readme [--check]

Each table stands between ``<!-- NAME -->`` and ``<!-- end -->`` and is replaced by what `TABLES`
makes under that name. ``--check``: nothing is written; exit status 1 where a table is not what its
CSV says.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

import thermo_opt as to
from analysis.evidence import TASKS
from analysis.studies import STUDIES
from analysis.timing import RESULTS

README = Path(__file__).parent / "README.md"
_BLOCK = re.compile(r"(<!-- (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def _read(name: str) -> pd.DataFrame:
    path = RESULTS / f"{name}.csv"
    if not path.is_file():
        raise to.InputError(f"{path} does not exist: run the command that writes it")
    return pd.read_csv(path)


def _text(value: Any, digits: int = 2) -> str:
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.{digits}f}"
    return str(value)


def markdown(table: pd.DataFrame, digits: int = 2) -> str:
    """A table in Markdown; what isn't known is a dash."""
    rows = [list(table.columns), ["---"] * len(table.columns)]
    rows += [[_text(value, digits) for value in row] for row in table.to_numpy().tolist()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def studies() -> str:
    """Each study's methods at their best and thrifty settings."""
    rows = []
    for name in STUDIES:
        for _, row in _read(f"{name}_small").iterrows():
            task = f"{name}, {row['variant']}" if "variant" in row else name
            rows.append(
                {
                    "task": task,
                    "method": row["method"] + (", thrifty" if row["choice"] == "thrifty" else ""),
                    "setting": f"{row['knob']} {row['setting']:g}",
                    "final loss": f"{row['final_loss']:.3f} ± {row['final_loss_std']:.3f}",
                    "steps": row["steps_end_ratio"],
                    "seconds": row["seconds_end_ratio"],
                    "nats": row["dissipation_end_ratio"],
                    "step time": row["ms_a_step_ratio"],
                    "memory": row["memory"],
                }
            )
    return markdown(pd.DataFrame(rows))


def alignments() -> str:
    """The studies' brackets of alignment."""
    rows = []
    for name in STUDIES:
        table = _read(f"{name}_small")
        for _, row in table[table["choice"] == "best"].iterrows():
            bracket = f"{row['alignment_lower']:.2f} to {row['alignment_upper']:.2f}"
            task = f"{name}, {row['variant']}" if "variant" in row else name
            rows.append({"task": task, "method": row["method"], "alignment": bracket})
    wide = pd.DataFrame(rows).pivot_table(
        index="method", columns="task", values="alignment", aggfunc="first", sort=False
    )
    return markdown(wide.reset_index())


def ablations() -> str:
    """Final probe losses with one choice of NGD-T changed."""
    tables = {
        title: _read(f"ablate_ngdt_{task}").set_index("variant")["final_loss"]
        for title, task in (("transformer", "transformer"), ("BatchNorm ResNet", "imagenet"))
    }
    return markdown(pd.DataFrame(tables).rename_axis("change").reset_index())


def steps() -> str:
    """Step times over AdamW's."""
    table = _read("bench_step")
    kept = {
        **{"task": "task", "method": "method", "steps": "steps", "wall_all": "all steps"},
        **{"wall_first": "first 300", "wall_late": "last half"},
        **{"memory_over_parameters": "memory over parameters"},
    }
    return markdown(table[list(kept)].rename(columns=kept))


def plain(name: str) -> str:
    """A CSV as it is, without the machine."""
    return markdown(_read(name).drop(columns="machine"), 3)


def critical_batches() -> str:
    """B* by brute force, from audits, and the simple noise scale."""
    table = _read("critical_batch").dropna(subset="B*")
    found = table.pivot(index="task", columns="of", values="B*").reset_index()
    ratio = found["audit"] / found["brute force"]
    return markdown(found.assign(**{"audit / brute force": ratio}).rename_axis(columns=None), 1)


def splits() -> str:
    """Noise, drift, transport and housekeeping with their errors, nats."""
    rows = []
    for _, row in _read("splits").iterrows():
        keys = ("noise", "drift", "transport", "housekeeping")
        parts = {
            key: "–" if math.isnan(row[key]) else f"{row[key]:.3f} ± {row[f'{key} s.e.']:.3f}"
            for key in keys
        }
        where = {"task": row["task"], "run": row["run"], "batch": int(row["batch size"])}
        rows.append(where | {"loss": row["loss"], "Q": row["Q"]} | parts)
    return markdown(pd.DataFrame(rows))


def ensembles() -> str:
    """Distances between runs and their progress."""
    return markdown(
        _read("ensembles").drop(columns=["machine", "entropy at least", "entropy s.e."])
    )


def schedules() -> str:
    """Even schedules, predicted and realised, and the others' losses and dissipation."""
    table = _read("schedules")
    rows = []
    for (task, method), own in table.groupby(["task", "method"], sort=False):
        by = own.set_index("schedule")
        constant, even = by.loc["constant"], by.loc["even, equal Σ lr"]
        row = {
            "task": task,
            "method": method,
            "Q predicted": f"{even['predicted Q']:.2f} ± {even['± 1 s.e.']:.2f}",
            "Q realised": even["realised Q"],
            "drift realised": even["realised drift"],
            "loss, constant": f"{constant['loss']:.3f} ± {constant['loss s.e.']:.3f}",
            "loss, even": f"{even['loss']:.3f} ± {even['loss s.e.']:.3f}",
        }
        for name in ("cosine", "linear", "refined"):
            other = by.loc[f"{name}, tuned"]
            row[f"{name}: loss, Q"] = f"{other['loss']:.3f}, × {other['Q'] / constant['Q']:.1f}"
        rows.append(row)
    return markdown(pd.DataFrame(rows))


def budgets(name: str) -> str:
    """Realised KL over the budget in three windows of steps, and final losses."""
    table = _read(name)
    windows = [column for column in map(str, table) if column.startswith("KL / budget")]
    kept = table[["task", "budget", *windows]].copy()
    kept["budget"] = [f"{value:g}" for value in kept["budget"]]
    kept["s, late"] = table["signal, 160–239"]
    kept["loss"] = [f"{value:.3g}" for value in table["validation loss"]]
    best = table[[column for column in map(str, table) if column.startswith("AdamW ")]].min(axis=1)
    kept["AdamW's best"] = [f"{value:.3g}" for value in best]
    kept["AdamW 0.001"] = [f"{value:.3g}" for value in table["AdamW 0.001"]]
    kept["lowest"] = [f"{value:.3g}" for value in table["lowest validation loss"]]
    kept["AdamW's lowest"] = [f"{value:.3g}" for value in table["lowest of AdamW's"]]
    return markdown(kept)


def evidence() -> str:
    """Every method tuned alike, and untuned: final losses, and the way to AdamW's over AdamW's."""
    rows = []
    for name in (name for name in TASKS if (RESULTS / f"evidence_{name}.csv").is_file()):
        for _, row in _read(f"evidence_{name}").iterrows():
            ratios = {
                title: _with_interval(row[f"{key}_end_ratio"], row[f"{key}_end_ratio_ci"], 2)
                for title, key in (
                    ("steps", "steps"),
                    ("seconds", "seconds"),
                    ("nats", "dissipation"),
                )
            }
            rows.append(
                {
                    "task": f"{name}, {row['variant']}" if "variant" in row else name,
                    "method": row["method"],
                    "choice": row["choice"],
                    "final loss": _with_interval(row["final_loss"], row["final_loss_ci"], 3),
                    "reached": f"{row['reached_end']} of {row['seeds']}",
                    **ratios,
                }
            )
    return markdown(pd.DataFrame(rows))


def _with_interval(mean: float, half: float, digits: int) -> str:
    if math.isnan(mean):
        return "–"
    found = f"{mean:.{digits}f}"
    return found if math.isnan(half) else f"{found} ± {half:.{digits}f}"


_PRICES = {"GB-month": 0.023, "core-hour": 0.05, "1,000 writes": 0.005, "1,000 reads": 0.0004}
"""Dollars, as public clouds list them; assumed, not measured."""
_READING = 200e6
"""Bytes that a worker reads per second from a shared store; assumed, not measured."""


def on_paper(runs: int = 10_000, snapshots: int = 1_000, tokens: int = 50_000) -> str:
    """What many recorded language models would cost, from the measured rows of `sketch` and `bench
    audit`."""
    each = _read("sketch").set_index("predictions")["bytes a snapshot"]
    audit = _read("bench_audit").set_index("benchmark")["value"]
    (sketching,) = [value for name, value in audit.items() if "to sketch 1,000" in str(name)]
    (auditing,) = [value for name, value in audit.items() if "to audit a snapshot" in str(name)]
    count = runs * snapshots
    rows = []
    for what, n in (("whole", tokens), ("sketched", tokens), ("sketched", 2_048)):
        stored = count * each[what] / 2_048 * n
        row = {
            "predictions": f"{what}, {n:,} tokens",
            "a snapshot, MB": stored / count / 1e6,
            "all, TB": stored / 1e12,
            "storage, $ a month": stored / 1e9 * _PRICES["GB-month"],
            "writes and reads, $": count / 1e3 * (_PRICES["1,000 writes"] + _PRICES["1,000 reads"]),
            "reading, worker hours": stored / _READING / 3600,
        }
        if what == "sketched":
            hours = [count * n * sketching / 1e6 / 3600, count * n / 50_000 * auditing / 1e3 / 3600]
            row |= {
                "sketching, core hours": hours[0],
                "audits, core hours": hours[1],
                "both, $": sum(hours) * _PRICES["core-hour"],
            }
        rows.append(
            {
                key: v if isinstance(v, str) else f"{v:,.3g}" if v < 100 else f"{v:,.0f}"
                for key, v in row.items()
            }
        )
    return markdown(pd.DataFrame(rows).fillna("–"), 3)


TABLES: dict[str, Callable[[], str]] = {
    "studies": studies,
    "alignments": alignments,
    "ablations": ablations,
    "steps": steps,
    "budget": lambda: budgets("budget"),
    "budget-apart": lambda: budgets("budget_apart"),
    "evidence": evidence,
    "critical-batches": critical_batches,
    "ensembles": ensembles,
    "schedules": schedules,
    "splits": splits,
    "on-paper": on_paper,
    **{
        name: lambda name=name: plain(name)  # type: ignore[misc]
        for name in (
            "alignment",
            "bought",
            "damping",
            "bench_audit",
            "bench_fisher",
            "bench_pareto",
            "large",
            "sketch",
            "sketch_values",
        )
    },
}


def renewed(text: str) -> str:
    """The README's text with every table made anew."""

    def table(block: re.Match[str]) -> str:
        if block["name"] not in TABLES:
            raise to.InputError(f"{README} has a table {block['name']!r}: use {', '.join(TABLES)}")
        return block[1] + TABLES[block["name"]]() + block[3]

    return _BLOCK.sub(table, text)


def main(arguments: list[str]) -> int:
    """Write the tables, or check them."""
    parser = argparse.ArgumentParser(
        prog="analysis readme",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true")
    checked = parser.parse_args(arguments).check
    before = README.read_text(encoding="utf-8")
    after = renewed(before)
    if checked:
        print("the tables are those of the CSVs" if after == before else f"{README} is out of date")
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    return 0
