"""thermo-opt: a thermodynamics toolkit for optimization.

Dissipation, speed-cost bounds and natural-gradient flow on arbitrary optimizer trajectories.
Everything is arithmetic on four numbers per step, (a, d, Δ, τ): see
:mod:`thermo_opt.thermodynamics`.

Public names and subpackages are imported on first use, so that ``thermo-opt --help`` and the
NumPy-only parts don't pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thermo_opt.audits import Audit as Audit
    from thermo_opt.audits import audit as audit
    from thermo_opt.audits import audit_predictions as audit_predictions
    from thermo_opt.audits import compare as compare
    from thermo_opt.audits import critical_batch as critical_batch
    from thermo_opt.audits import ensemble as ensemble
    from thermo_opt.audits import even_schedule as even_schedule
    from thermo_opt.errors import InputError as InputError
    from thermo_opt.fronts import pareto as pareto
    from thermo_opt.manifold import fisher_rao as fisher_rao
    from thermo_opt.manifold import least_distance as least_distance
    from thermo_opt.optim import NGDT as NGDT
    from thermo_opt.runs import Recorder as Recorder
    from thermo_opt.runs import Run as Run
    from thermo_opt.runs import load_run as load_run

_HOME = {
    "Audit": "audits",
    "InputError": "errors",
    "NGDT": "optim",
    "Recorder": "runs",
    "Run": "runs",
    "audit": "audits",
    "audit_predictions": "audits",
    "even_schedule": "audits",
    "compare": "audits",
    "critical_batch": "audits",
    "ensemble": "audits",
    "fisher_rao": "manifold",
    "least_distance": "manifold",
    "load_run": "runs",
    "pareto": "fronts",
}
"""Public name → the subpackage that has it."""

_SUBPACKAGES = {
    "fisher": "fisher",
    "flow": "theory.flow",
    "fronts": "fronts",
    "integrations": "integrations",
    "lenses": "lenses",
    "manifold": "manifold",
    "optim": "optim",
    "plots": "plots",
    "report": "report",
    "runs": "runs",
    "sweep": "sweep",
    "theory": "theory",
    "thermodynamics": "thermodynamics",
    "verify": "theory.verify",
}
"""Attribute → subpackage or module, where ``thermo_opt.attribute`` is one."""

_RENAMED = {"frontier_distance": "least_distance"}
"""Old public name → new."""

__all__ = sorted([*_HOME, "fisher"])


def __getattr__(name: str) -> Any:
    if name in _RENAMED:
        from thermo_opt.deprecated import warn_renamed

        warn_renamed(f"thermo_opt.{name}", f"thermo_opt.{_RENAMED[name]}")
        return __getattr__(_RENAMED[name])
    if name in _SUBPACKAGES:
        value = import_module(f"thermo_opt.{_SUBPACKAGES[name]}")
    elif name in _HOME:
        value = getattr(import_module(f"thermo_opt.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module 'thermo_opt' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, *_SUBPACKAGES])
