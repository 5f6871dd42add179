"""Auditors: turn a recorded run into per-step scalars (a, d, Δ, τ) and a summary, through every lens it supports."""

import sys
from types import ModuleType
from typing import Any

from thermo_opt.audit.auditor import audit
from thermo_opt.audit.comparison import compare
from thermo_opt.audit.front import ParetoFront, pareto
from thermo_opt.audit.results import LENSES, SUMMARY_KEYS, Audit, Landmarks, LensAudit, summaries_json
from thermo_opt.audit.view import Progress

__all__ = [
    "LENSES",
    "SUMMARY_KEYS",
    "Audit",
    "Landmarks",
    "LensAudit",
    "ParetoFront",
    "Progress",
    "audit",
    "compare",
    "pareto",
    "summaries_json",
]


class _CallableModule(ModuleType):
    """``thermo_opt.audit`` names both this package and its main function: importing a submodule binds the package to
    the name, which must then still be callable."""

    def __call__(self, *args: Any, **kwargs: Any) -> Audit:
        return audit(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
