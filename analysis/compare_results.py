"""Whether a study's re-run agrees with the results it left before: ``python -m analysis.<study>
--check``."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from analysis.study_table import MEASURES, RATIOS

_SPREADS = 2.0
"""Standard deviations over seeds by which a re-run's mean may differ."""
_RELATIVE = 0.02
"""Allowed besides, of the value: other builds of the libraries round sums differently."""
_TIMES_RELATIVE = 0.25
"""The same for times over the reference's; bare seconds belong to a machine and aren't compared."""
_MEMORY_RELATIVE = 0.1
"""The same for peak memory: it depends on the libraries' builds and on the system's allocator."""
_MEMORY_PAGES = 0.5
"""Allowed besides, in MiB: what pages of libraries and allocator add by chance."""


def differences(before: pd.DataFrame, after: pd.DataFrame) -> pd.DataFrame:
    """What of a re-run's methods' table lies outside the spread that the first one stated: a row
    each, empty when all agrees.

    Columns that the first table doesn't have yet are not compared.
    """
    if "choice" in after and "choice" not in before:
        after = after[after["choice"] == "best"]
    keys = [key for key in ("variant", "method", "choice") if key in before and key in after]
    first, second = before.set_index(keys), after.set_index(keys)
    rows: list[dict[str, Any]] = []
    for key in first.index:
        where = dict(zip(keys, key if isinstance(key, tuple) else (key,), strict=True))
        if key not in second.index:
            rows.append(
                {**where, "column": "method", "before": "run", "after": "not run", "allowed": ""}
            )
            continue
        old, new = first.loc[key], second.loc[key]
        if not math.isclose(old["setting"], new["setting"], rel_tol=1e-3):
            rows.append(
                {
                    **where,
                    "column": "setting",
                    "before": old["setting"],
                    "after": new["setting"],
                    "allowed": 0,
                }
            )
        for column in (*MEASURES, *(f"{name}_ratio" for name in RATIOS)):
            timed = column.startswith(("seconds", "ms"))
            if (timed and not column.endswith("_ratio")) or column not in old:
                continue
            was, now = float(old[column]), float(new[column])
            measured = column == "peak_memory"  # nothing to compare where one system couldn't
            if (math.isnan(was) and math.isnan(now)) or (
                measured and (math.isnan(was) or math.isnan(now))
            ):
                continue
            spread = float(old.get(f"{column}_std", math.nan))
            allowed = _SPREADS * (0.0 if math.isnan(spread) else spread)
            allowed += (
                _TIMES_RELATIVE if timed else _MEMORY_RELATIVE if measured else _RELATIVE
            ) * abs(was)
            allowed += _MEMORY_PAGES if measured else 0.0
            if not abs(now - was) <= allowed:
                rows.append(
                    {**where, "column": column, "before": was, "after": now, "allowed": allowed}
                )
    return pd.DataFrame(rows, columns=[*keys, "column", "before", "after", "allowed"])
