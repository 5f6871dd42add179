"""``thermo-opt info``: what a run's record holds."""

from __future__ import annotations

import json as encoder
import math
from typing import TYPE_CHECKING, Any

from thermo_opt.cli.options import Format, Json, Key, RunPath

if TYPE_CHECKING:
    from thermo_opt.runs import Run


def info(run: RunPath, json: Json = False, format: Format = None, key: Key = None) -> None:
    """Say what a run's record holds, without auditing it."""
    from thermo_opt.cli import terminal
    from thermo_opt.runs import load_run

    facts = _facts(load_run(run, format=format, key=key))
    if json:
        terminal.print_json(encoder.dumps({"runs": [facts]}, indent=2, allow_nan=False))
    else:
        terminal.print_info(facts)


def _facts(run: Run) -> dict[str, Any]:
    """What `info` says of a run; null where the record doesn't tell."""
    snapshots = run.snapshots
    settings = {
        str(key): value
        for key, value in run.info.settings.items()
        if isinstance(value, int | str) or (isinstance(value, float) and math.isfinite(value))
    }
    parameters = run.info.parameters
    groups = {name.split("/")[0]: None for name in snapshots[0].names()} if len(snapshots) else {}
    return {
        "run": run.name,
        "path": str(run.path),
        "format": run.format,
        "optimizer": run.info.optimizer,
        "settings": settings or None,
        "likelihood": run.info.likelihood,
        "batch_size": run.info.batch_size,
        "snapshots": len(snapshots),
        "steps_are": f"{run.info.step_unit}s, from {run.info.step_source}"
        if run.info.step_source
        else None,
        "first_step": snapshots[0].step if len(snapshots) else None,
        "last_step": snapshots[-1].step if len(snapshots) else None,
        "recorded": list(groups),
        "logged": [str(column) for column in run.steps.columns],
        "parameters": sum(_count(p) for p in parameters) if parameters else None,
        "probe": run.info.probe_fingerprint,
        "remarks": run.remarks or None,
    }


def _count(parameter: Any) -> int:
    product = 1
    for size in parameter["shape"]:
        product *= int(size)
    return product
