"""Auditors: turn a recorded run into per-step scalars (a, d, Δ, τ) and a summary, through every lens it supports."""

from thermo_opt.audit.auditor import audit
from thermo_opt.audit.compare import compare
from thermo_opt.audit.results import LENSES, SUMMARY_KEYS, Audit, Landmarks, LensAudit, summaries_json
from thermo_opt.audit.view import Progress

__all__ = [
    "LENSES",
    "SUMMARY_KEYS",
    "Audit",
    "Landmarks",
    "LensAudit",
    "Progress",
    "audit",
    "compare",
    "summaries_json",
]
