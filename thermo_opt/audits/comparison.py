"""Several audits in one table, at the snapshots that all of them have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from thermo_opt import arguments
from thermo_opt.audits.auditor import at_steps
from thermo_opt.audits.results import Audit
from thermo_opt.describe.ranking import coarsened, on_one_probe, ranking, snapshots_of
from thermo_opt.errors import InputError
from thermo_opt.lenses.results import LENSES, SUMMARY_KEYS, LensAudit

_LEAST_COMMON = 3
"""Snapshots in common below which there is one interval only, and no efficiency."""


_PARTS = tuple(
    key + end for key in ("noise", "drift", "transport", "housekeeping") for end in ("", "_error")
)
"""Columns with the parts of a run's split (§11)."""


@dataclass(frozen=True)
class Comparison:
    """Audits made comparable.

    Attributes:
        audits: Ranked ones first, the most efficient first; at common snapshots where there are.
        table: One row per run and lens, columns `SUMMARY_KEYS`, ``probe`` and the split's parts.
        notes: Sentences: to which snapshots runs were coarsened, or why there is no ranking.
    """

    audits: list[Audit]
    table: pd.DataFrame
    notes: list[str]


def compare(audits: Sequence[Audit]) -> pd.DataFrame:
    """Several audits in one table: lens by lens, the most efficient run first where they may be
    ranked.

    Runs are compared at the snapshots that all of them have: one recorded more often is audited
    again at those, since what is seen less often looks more efficient (§4). Quantities in nats
    compare between rows that share a ``probe`` (its fingerprint) only.

    Args:
        audits: What `audit` returns.

    Returns:
        One row per run and lens, columns `SUMMARY_KEYS`, ``probe`` and the parts of the split,
        ``noise, drift, transport, housekeeping`` each with its ``_error`` (§11).
        ``table.attrs["notes"]`` holds sentences on what was done to make the runs comparable, or
        why they are not ranked.

    Raises:
        InputError: Without audits.
    """
    return comparison(audits).table


def comparison(audits: Sequence[Audit]) -> Comparison:
    """As `compare`, with the audits at common snapshots."""
    audits = arguments.listed("audits", audits, Audit, "give a list of what to.audit returns")
    if not audits:
        raise InputError("nothing to compare: give at least one audit")
    audits, notes = _at_common_snapshots(list(audits))
    ranked = ranking(audits)
    if ranked.obstacle is not None:
        notes.append(ranked.obstacle)
    first = [*ranked.order, *ranked.hardly]
    order = [*first, *(i for i in range(len(audits)) if i not in first)]
    audits = [audits[i] for i in order]
    rows = [
        {**audit.lenses[lens].summary, "probe": audit.probe, **_parts(audit.lenses[lens])}
        for lens in LENSES
        for audit in audits
        if lens in audit.lenses
    ]
    table = pd.DataFrame(rows, columns=[*SUMMARY_KEYS, "probe", *_PARTS])
    table.attrs["notes"] = list(notes)
    return Comparison(audits, table, notes)


def _parts(lens: LensAudit) -> dict[str, float | None]:
    return {} if lens.split is None else {key: getattr(lens.split, key) for key in _PARTS}


def _at_common_snapshots(audits: list[Audit]) -> tuple[list[Audit], list[str]]:
    """The audits at the snapshots they share, where they don't share all and share enough."""
    together = on_one_probe(audits)
    if len(together) < len(audits):
        some, notes = _at_common_snapshots([audits[i] for i in together])
        for i, audit in zip(together, some, strict=True):
            audits[i] = audit
        return audits, notes
    taken = [snapshots_of(audit) for audit in audits]
    same_kind = len({(a.summary["clock"], a.summary["step_unit"]) for a in audits}) == 1
    if len(set(taken)) == 1 or not same_kind:
        return audits, []
    common = sorted(set(taken[0]).intersection(*taken[1:]))
    if len(common) < _LEAST_COMMON or any(audit.inputs is None for audit in audits):
        return audits, []
    again = [
        audit if list(steps) == common else at_steps(audit, common)
        for audit, steps in zip(audits, taken, strict=True)
    ]
    names = [audit.run for audit, steps in zip(audits, taken, strict=True) if list(steps) != common]
    return again, [coarsened(names, common, audits[0].summary["step_unit"])]
