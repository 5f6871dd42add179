"""Audits: turn a recorded run into per-step scalars (a, d, Δ, τ) and a summary, through every lens
it supports."""

from thermo_opt.audits.advice import Advice, advise
from thermo_opt.audits.auditor import audit
from thermo_opt.audits.batch_size import BatchSchedule, CriticalBatch, critical_batch
from thermo_opt.audits.comparison import compare
from thermo_opt.audits.many_runs import Ensemble, ensemble
from thermo_opt.audits.predictions import audit_predictions
from thermo_opt.audits.results import Audit
from thermo_opt.audits.schedule import EvenSchedule, even_schedule

__all__ = [
    "Advice",
    "Audit",
    "BatchSchedule",
    "CriticalBatch",
    "Ensemble",
    "EvenSchedule",
    "advise",
    "audit",
    "audit_predictions",
    "compare",
    "critical_batch",
    "ensemble",
    "even_schedule",
]
