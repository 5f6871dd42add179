"""Keywords of NGDT that moved into objects: accepted for one release, each with a warning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thermo_opt.deprecated import warn_renamed
from thermo_opt.errors import InputError
from thermo_opt.optim.calibration import Calibration
from thermo_opt.optim.metrics import KFAC, MINIBATCH_KINDS, MetricOptions, Minibatch, metric_of

NEW = {
    "null_space": "inverse",
    "eta_null": "eta_null",
    "decay": "factor_decay",
    "rows": "max_rows",
    "refresh_every": "max_refresh_interval",
    "overhead": "max_solve_overhead",
    "setting": "kfac_approx",
    "targets": "fisher_type",
    "rtol": "rtol",
    "atol": "atol",
}
"""Old keyword → option of the metric's object."""

VALUES = {"none": "pseudo", "hybrid": "pseudo+null", "sampled": "mc"}
"""Old value → new one."""

MINIBATCH = ("inverse", "eta_null")
"""Those that `Minibatch` has too; the others had no effect there."""

OTHERS = {
    "calibrate": "calibration=Calibration(every=…)",
    "calibration_predictions": "calibration=Calibration(predictions=…)",
    "metric_options": "metric=Minibatch(kind, **options)",
}


def translated(
    metric: str | MetricOptions, calibration: Any, old: Mapping[str, Any], stacklevel: int
) -> tuple[MetricOptions, Any]:
    """(metric, calibration) with the old keywords taken in.

    Raises:
        TypeError: for a keyword that never existed.
        InputError: for old keywords beside a metric that is an object already.
    """
    options: dict[str, Any] = {}
    for name, value in old.items():
        if name not in NEW and name not in OTHERS:
            raise TypeError(f"NGDT.__init__() got an unexpected keyword argument {name!r}")
        if name in NEW:
            if not isinstance(metric, str):
                raise InputError(f"give {name} as {NEW[name]} to {type(metric).__name__}(…)")
            options[NEW[name]] = VALUES.get(value, value) if isinstance(value, str) else value
        place = OTHERS.get(name) or f"metric={_object(metric)}{NEW.get(name)}=…)"
        warn_renamed(f"NGDT's {name}=", place, stacklevel + 1)
    if metric in MINIBATCH_KINDS:
        options = {name: value for name, value in options.items() if name in MINIBATCH}
        options.update(old.get("metric_options") or {})
    made = metric_of(metric, **options)
    if "calibrate" in old or "calibration_predictions" in old:
        every = old.get("calibrate")
        if every is None:
            every = 10 if made.approximate else 0
        calibration = (
            None if every == 0 else Calibration(every, old.get("calibration_predictions", 32))
        )
    return made, calibration


def _object(metric: str | MetricOptions) -> str:
    name = metric.kind if isinstance(metric, KFAC | Minibatch) else metric
    return f"Minibatch({name!r}, " if name in MINIBATCH_KINDS else f"{name.upper()}("
