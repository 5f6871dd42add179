"""``thermo-opt pareto --drift``: the front on what expected steps cost, the noise beside it."""

from __future__ import annotations

import json as encoder
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from thermo_opt.errors import InputError


def show_drift(
    paths: Sequence[Path],
    x: str,
    target_loss: Sequence[float] | None,
    reading: Mapping[str, Any],
    replay: Mapping[str, Any] | None,
    json: bool,
) -> None:
    """Audit the runs and print the front on drift, one table a target; runs that can't be used are
    left out with a sentence."""
    from thermo_opt.arguments import jsonable
    from thermo_opt.audits import audit
    from thermo_opt.cli import terminal
    from thermo_opt.fronts import CLOCK_OF, drift_front
    from thermo_opt.lenses.results import SCHEMA_VERSION
    from thermo_opt.runs import load_run

    audits, left_out = [], []
    for path in paths:
        try:
            run = load_run(path, **reading)
            found = audit(run, lens="outputs", clock=CLOCK_OF[x], **(replay or {}))
            split = found.summary["split"]
            if split is None or not split["replicas"]:
                raise InputError(f"{path}: it has no replicas, which tell noise from drift")
            audits.append(found)
        except InputError as error:
            left_out.append((str(path), str(error)))
    if not audits:
        raise InputError(left_out[0][1])
    table = drift_front(audits, target_loss=list(target_loss) if target_loss else None)
    terminal.warn_left_out(left_out)
    if json:
        rows = [jsonable(row) for row in table.to_dict("records")]
        whole = {
            "schema_version": SCHEMA_VERSION,
            "x": x,
            "notes": table.attrs["notes"],
            "runs": rows,
            "left_out": [{"run": run, "reason": reason} for run, reason in left_out],
        }
        terminal.print_json(encoder.dumps(whole, indent=2, allow_nan=False))
        return
    terminal.print_drift(table)
