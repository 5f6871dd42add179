"""Several audits in one table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from thermo_opt import arguments
from thermo_opt.audits.results import Audit
from thermo_opt.errors import InputError
from thermo_opt.lenses.results import LENSES, SUMMARY_KEYS


def compare(audits: Sequence[Audit]) -> pd.DataFrame:
    """One row a run and lens, columns `SUMMARY_KEYS` and ``probe``: lens by lens, the most
    efficient run first.

    Ratios compare across any runs; quantities in nats only between rows that share a ``probe`` (its
    fingerprint). Raises InputError without audits.
    """
    audits = arguments.listed("audits", audits, Audit, "give a list of what to.audit returns")
    if not audits:
        raise InputError("nothing to compare: give at least one audit")
    rows = [{**summary, "probe": audit.probe} for audit in audits for summary in audit.summaries]
    table = pd.DataFrame(rows, columns=[*SUMMARY_KEYS, "probe"])
    order = table["lens"].map({lens: i for i, lens in enumerate(LENSES)})
    efficiency = pd.to_numeric(table["efficiency"])
    return (
        table.assign(_lens=order, _efficiency=efficiency)
        .sort_values(["_lens", "_efficiency"], ascending=[True, False], kind="stable")
        .drop(columns=["_lens", "_efficiency"])
        .reset_index(drop=True)
    )
