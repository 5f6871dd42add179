"""Every claim, by name. A claim is a function of (ingredients, random generator) that returns its
checks.

Its docstring's first line says in words what it claims; its checks compare measured with predicted,
one row each.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from thermo_opt.theory.verify.claims import (
    bounds,
    certificates,
    convergence,
    flows,
    geometry,
    minibatch,
    trap,
)
from thermo_opt.theory.verify.ingredients import Ingredients
from thermo_opt.theory.verify.verdict import Check

Claim = Callable[[Ingredients, np.random.Generator], list[Check]]

CLAIMS: dict[str, Claim] = {
    "speed-cost-bound": bounds.speed_cost_bound,
    "least-dissipation-direction": bounds.least_dissipation_direction,
    "path-inequalities": bounds.path_inequalities,
    "decomposition": bounds.decomposition,
    "constant-speed": bounds.constant_speed,
    "budget-saturation": bounds.budget_saturation,
    "closed-forms": geometry.closed_forms,
    "geodesics": geometry.geodesics,
    "least-dissipation-protocol": geometry.least_dissipation_protocol,
    "reparametrization": geometry.reparametrization,
    "null-space": geometry.null_space,
    "fisher-is-kl-curvature": geometry.fisher_is_kl_curvature,
    "flow-solution": flows.flow_solution,
    "energy-identity": flows.energy_identity,
    "zero-action": flows.zero_action,
    "one-step": convergence.one_step,
    "fixed-step-descent": convergence.fixed_step_descent,
    "budget-descent": convergence.budget_descent,
    "broken-hypotheses": convergence.broken_hypotheses,
    "stochastic-budget": convergence.stochastic_budget,
    "chi-squared": certificates.chi_squared_bound,
    "krylov-bracket": certificates.krylov_bracket,
    "optimizer-state": certificates.optimizer_state,
    "noise-and-drift": minibatch.split,
    "trap-dragging": trap.dragging,
    "trap-stiffness": trap.stiffness,
}
