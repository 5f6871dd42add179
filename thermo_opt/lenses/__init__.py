"""Lenses: what the record of a run shows of its scalars (a, d, Δ, τ), each through what it holds
(theory §3-5, §9)."""

from thermo_opt.lenses.inputs import LensInputs, Progress, Unsupported
from thermo_opt.lenses.measurements import Measurements
from thermo_opt.lenses.results import (
    LENSES,
    SUMMARY_KEYS,
    Audited,
    Landmarks,
    LensAudit,
    summaries_json,
)
from thermo_opt.lenses.summary import summarise

__all__ = [
    "LENSES",
    "SUMMARY_KEYS",
    "Audited",
    "Landmarks",
    "LensAudit",
    "LensInputs",
    "Measurements",
    "Progress",
    "Unsupported",
    "summaries_json",
    "summarise",
]
