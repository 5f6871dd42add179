"""Predictions of a run: as they were recorded, or replayed by putting recorded weights into the
model.

Nothing a run directory contains is executed: the architecture comes from the user
(``package.module:factory``), from this package's own demo models, or from the `transformers`
library by the class name in a checkpoint's config.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.manifold import Point, embed
from thermo_opt.models import load_factory, map_tensors
from thermo_opt.runs import Probe, Run
from thermo_opt.runs.probe import Inputs
from thermo_opt.runs.probing import install, predict
from thermo_opt.runs.readers.huggingface import model_from_config


@dataclass
class RecordedPredictions:
    """Predictions found in the run's snapshots (``probe/logits``)."""

    run: Run
    likelihood: str
    sigma2: float = 1.0

    def __post_init__(self) -> None:
        self.steps = [s.step for s in self.run.snapshots]
        self.targets = targets_of(self.run.probe)

    def outputs(self, index: int) -> Tensor:
        """The outputs recorded in snapshot ``index``."""
        return self.run.snapshots[index].load("probe/logits")

    def point(self, index: int) -> Point:
        """The embedded predictions of snapshot ``index``."""
        source = str(self.run.snapshots[index].path)
        return _embed(self.outputs(index), self.targets, self.likelihood, self.sigma2, source)


@dataclass
class ReplayedPredictions:
    """Predictions made again from recorded weights: one evaluation-mode forward pass on the probe a
    snapshot."""

    run: Run
    model: nn.Module
    probe: Probe
    likelihood: str
    sigma2: float = 1.0
    steps: list[int] = field(init=False)
    inputs: Inputs = field(init=False)

    def __post_init__(self) -> None:
        if self.probe.inputs is None:
            raise InputError(
                f"{self.run.path}: replay needs the probe's inputs: give a file of inputs with "
                "--probe"
            )
        self.steps = [s.step for s in self.run.snapshots]
        self.targets = targets_of(self.probe)
        dtypes = [weight.dtype for weight in self.model.parameters()]

        def fitting(
            tensor: Tensor,
        ) -> Tensor:  # NumPy and pandas write float64 whatever the model computes in
            return (
                tensor
                if not tensor.is_floating_point() or tensor.dtype in dtypes
                else tensor.to(dtypes[0])
            )

        self.inputs = map_tensors(self.probe.inputs, fitting) if dtypes else self.probe.inputs

    def outputs(self, index: int) -> Tensor:
        """The model's outputs with the weights of snapshot ``index``."""
        install(self.model, self.run.snapshots[index], self.run.info.tied)
        return predict(self.model, self.inputs)

    def point(self, index: int) -> Point:
        """The embedded predictions of snapshot ``index``."""
        return _embed(self.outputs(index), self.targets, self.likelihood, self.sigma2, "the probe")


def targets_of(probe: Probe | None) -> np.ndarray | None:
    """The probe's targets as an array, or None."""
    return None if probe is None or probe.targets is None else _array(probe.targets)


def _array(tensor: Tensor) -> np.ndarray:
    narrow = (
        tensor.is_floating_point() and tensor.dtype != torch.float64
    )  # NumPy knows neither bfloat16 nor float8
    return (tensor.float() if narrow else tensor).detach().numpy()


def _embed(
    outputs: Tensor, targets: np.ndarray | None, likelihood: str, sigma2: float, source: str
) -> Point:
    if outputs.is_complex():
        raise InputError(f"{source}: the outputs are complex numbers: record real logits or means")
    array = _array(outputs)
    if likelihood == "categorical" and (array.ndim < 2 or array.shape[-1] < 2):
        raise InputError(
            f"{source}: outputs of shape {tuple(array.shape)} aren't class logits, which have a "
            "row of two or more for "
            "each example: name the run's likelihood, bernoulli or gaussian, in its run.json"
        )
    try:
        return embed(array, targets, likelihood=likelihood, sigma2=sigma2)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def build_model(run: Run, spec: str | nn.Module | None = None) -> nn.Module:
    """The architecture whose weights the run recorded, from ``spec``, the run's own note of it, or
    a Hugging Face config.

    ``spec``: a module, or ``package.module:factory`` naming a callable that takes nothing and
    returns one. Without it, a factory of this package named in the record, or the `transformers`
    class named in ``config.json``, is used; any other name found in a run directory is not
    imported. Raises InputError saying what is missing.
    """
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)  # the caller's own keeps its weights
    if spec is not None:
        return _call_factory(spec)
    recorded = run.info.model
    if recorded is not None and recorded.startswith("thermo_opt.demo_models:"):
        return _call_factory(recorded)
    if run.info.hf_config_path is not None:
        return model_from_config(run.info.hf_config_path)
    hint = f"; the record names {recorded}, which is only imported on request" if recorded else ""
    raise InputError(f"{run.path}: the model is unknown{hint}: pass --model package.module:factory")


def _call_factory(spec: str) -> nn.Module:
    factory = load_factory(spec, "--model")
    try:
        model = factory() if not isinstance(factory, nn.Module) else factory
    except (Exception, SystemExit) as error:
        raise InputError(
            f"--model {spec!r} failed when called without arguments ({type(error).__name__}: "
            f"{error})"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model
