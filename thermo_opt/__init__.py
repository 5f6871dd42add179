"""thermo-opt: a thermodynamics toolkit for optimization.

Dissipation, speed-cost bounds and natural-gradient flow on arbitrary optimizer trajectories. Everything is arithmetic on
four numbers per step, (a, d, Δ, τ): see :mod:`thermo_opt.thermodynamics`.

Public names are imported on first use, so that `thermo-opt --help` and the NumPy-only parts don't pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from thermo_opt import fisher as fisher
    from thermo_opt.audit import Audit as Audit
    from thermo_opt.audit import audit as audit
    from thermo_opt.audit import compare as compare
    from thermo_opt.audit import pareto as pareto
    from thermo_opt.errors import InputError as InputError
    from thermo_opt.manifold import fisher_rao as fisher_rao
    from thermo_opt.manifold import frontier_distance as frontier_distance
    from thermo_opt.optim import NGDT as NGDT
    from thermo_opt.runs import Recorder as Recorder
    from thermo_opt.runs import Run as Run
    from thermo_opt.runs import load_run as load_run

_HOME = {
    "Audit": "audit",
    "InputError": "errors",
    "NGDT": "optim",
    "Recorder": "runs",
    "Run": "runs",
    "audit": "audit",
    "compare": "audit",
    "fisher": "fisher",
    "fisher_rao": "manifold",
    "frontier_distance": "manifold",
    "load_run": "runs",
    "pareto": "audit",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'thermo_opt' has no attribute {name!r}")
    module = import_module(f"thermo_opt.{_HOME[name]}")
    value = module if name == _HOME[name] and name == "fisher" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
