"""The weights of a probe's examples, as lenses that make their own metric use them."""

from __future__ import annotations

from torch import Tensor

from thermo_opt import likelihoods
from thermo_opt.fisher.likelihoods import Likelihood
from thermo_opt.fisher.weighted import mean_one
from thermo_opt.lenses.inputs import Unsupported
from thermo_opt.runs import Probe


def per_prediction(probe: Probe, family: Likelihood, outputs: Tensor) -> Tensor | None:
    """Weights of the probe's predictions, of mean one over those that count; None where all count
    alike. ``outputs``: the model's, on an example or more of the probe.

    Raises:
        Unsupported: weights of single labels, which are no prediction of their own here.
        InputError: weights that don't fit, or leave no prediction.
    """
    if probe.weights is None:
        return None
    assert probe.targets is not None
    if probe.weights.ndim > 1 and family.name != "categorical":
        raise Unsupported(
            "its metric weighs examples, and the probe has weights of single labels: give --probe "
            "with one weight per example"
        )
    shape = (len(probe.targets), *family.outputs(outputs, probe.targets).shape[1:])
    counted = None
    if family.name == "categorical":
        targets = likelihoods.soft_targets_last(shape, probe.targets)
        counted = likelihoods.counted_targets("categorical", targets)
    return mean_one(probe.weights, counted, shape[:-1])
