"""How strongly weights are drawn to zero where the user doesn't say (theory §7, "weight decay").

Where labels can be told apart perfectly, the likelihood has no maximum: predictions become certain
and go on growing (Albert & Anderson 1984), on noisy labels too, and their Fisher vanishes, so that
nothing else holds them. A weak prior gives the loss a minimum.

Decay beside natural gradients, v = F⁻¹g + wθ, is the natural gradient of L + ½ w θᵀFθ: the prior of
Zellner (1986), which in a linear model shrinks the estimate by 1/(1 + w) whatever the scale of its
inputs (cf. Zhang, Wang, Xu & Grosse 2019 on weight decay with K-FAC). In a network whose outputs f
are homogeneous of degree L in its weights, θᵀ∂f/∂θ = L f: a decay of w shrinks the outputs L times
as fast. So the default is `STRENGTH` divided by the number of weight matrices. Parameters that no
layer rule covers don't decay by default: where they enter otherwise than as weights (the raw matrix
behind an orthogonal one), decay may be the largest part of a step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from thermo_opt.fisher.likelihoods import Bernoulli, Categorical, Likelihood

STRENGTH = 0.3
"""By how much a Newton step's decay shrinks the outputs of a deep network."""

FEWEST = 3
"""Weight matrices that a network counts for at least: a linear model's outputs shrink by a tenth.
"""


def default_weight_decay(params: Sequence[nn.Parameter], likelihood: Likelihood) -> float:
    """``STRENGTH / max(FEWEST, L)`` for L weight matrices among the parameters, and 0 for
    likelihoods other than "categorical" and "bernoulli", whose predictions can't become certain."""
    if not isinstance(likelihood, Categorical | Bernoulli):
        return 0.0
    return STRENGTH / max(FEWEST, sum(p.requires_grad and p.dim() >= 2 for p in params))
