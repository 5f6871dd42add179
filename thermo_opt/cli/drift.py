"""``thermo-opt pareto --drift``: the front on what expected steps cost, the noise beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from thermo_opt.cli.options import setting, told_apart, with_settings
from thermo_opt.errors import InputError


def show_drift(
    paths: Sequence[Path],
    x: str,
    target_loss: Sequence[float] | None,
    reading: Mapping[str, Any],
    replay: Mapping[str, Any] | None,
    group_by: Sequence[str],
    label: Sequence[str],
    html: Path | None,
    json: bool,
) -> None:
    """Audit the runs and print the front on drift, one table a target, or draw its page; runs that
    can't be used are left out with a sentence."""
    from thermo_opt.audits import audit
    from thermo_opt.cli import terminal
    from thermo_opt.fronts import CLOCK_OF, drift_front
    from thermo_opt.report.drift import drift_json, write_drift_front
    from thermo_opt.runs import load_run

    audits, used, left_out = [], [], []
    for path in paths:
        try:
            run = load_run(path, **reading)
            found = audit(run, lens="outputs", clock=CLOCK_OF[x], **(replay or {}))
            split = found.summary["split"]
            if split is None or not split["replicas"]:
                raise InputError(f"{path}: it has no replicas, which tell noise from drift")
            audits.append(found)
            used.append(path)
        except InputError as error:
            left_out.append((str(path), str(error)))
    if not audits:
        raise InputError(left_out[0][1])
    groups = None
    if group_by:
        groups = [
            ", ".join(f"{key} {setting(one.run, one.settings, key)}" for key in group_by)
            for one in audits
        ]
    names = told_apart([with_settings(a.run, a.settings, label) for a in audits], used)
    named = [replace(a, run=name) for a, name in zip(audits, names, strict=True)]
    table = drift_front(
        named, target_loss=list(target_loss) if target_loss else None, groups=groups
    )
    terminal.warn_left_out(left_out)
    if html is not None:
        write_drift_front(table, html, left_out)
    if json:
        terminal.print_json(drift_json(table, left_out))
        return
    terminal.print_drift(table)
    if html is not None:
        terminal.say(f"\nPage: {html.resolve()}")
