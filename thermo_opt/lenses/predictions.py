"""Predictions of a run: as they were recorded, or replayed by putting recorded weights into the
model.

Nothing a run directory contains is executed: the architecture comes from the user
(``package.module:factory``), from this package's own demo models, or from the `transformers`
library by the class name in a checkpoint's config.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt.errors import InputError
from thermo_opt.manifold import Point, embed
from thermo_opt.models import load_factory, map_tensors
from thermo_opt.runs import Probe, Run
from thermo_opt.runs.probe import Inputs
from thermo_opt.runs.probing import install, predict
from thermo_opt.runs.readers.architecture import model_from_config


class Predictions(ABC):
    """Where predictions come from: picklable, so that other processes can read their own segment.

    Attributes:
        steps: Step number of each snapshot.
        targets: The probe's targets, or None.
        likelihood: Family of the outputs.
        sigma2: Variance of Gaussian outputs.
        without: Examples (of the first axis) to leave out, by position.
    """

    steps: Sequence[int]
    targets: np.ndarray | None
    likelihood: str
    sigma2: float
    without: np.ndarray | None = None

    @abstractmethod
    def outputs(self, index: int) -> Tensor:
        """The outputs of snapshot ``index``, as the model gave them."""

    def name(self, index: int) -> str:
        """What to call the outputs of a snapshot in a sentence."""
        return "the probe"

    def points(self, indices: Sequence[int]) -> Point:
        """The embedded predictions of these snapshots, one snapshot's rows after another's.

        Raises:
            InputError: Naming the snapshot whose outputs can't be embedded.
        """
        if len(indices) == 1:
            return self._embedded(self._array(indices[0]), self.targets, self.name(indices[0]))
        outputs = [self._array(index) for index in indices]
        if len({array.shape for array in outputs}) > 1:
            [self.points([index]) for index in indices]  # names the one that doesn't fit
        targets = self.targets
        if targets is not None:
            targets = np.concatenate([targets] * len(outputs))
        try:
            return self._embedded(np.concatenate(outputs), targets, self.name(indices[0]))
        except InputError:
            [self.points([index]) for index in indices]
            raise

    def point(self, index: int) -> Point:
        """The embedded predictions of snapshot ``index``."""
        return self.points([index])

    def leaving_out(self, examples: np.ndarray) -> Predictions:
        """The same predictions without these examples of the probe."""
        other = copy.copy(self)
        other.without = examples
        if self.targets is not None:
            other.targets = np.delete(self.targets, examples, axis=0)
        return other

    def _array(self, index: int) -> np.ndarray:
        outputs = self.outputs(index)
        if outputs.is_complex():
            raise InputError(
                f"{self.name(index)}: the outputs are complex numbers: record real logits or means"
            )
        array = array_of(outputs)
        if self.likelihood == "categorical" and (array.ndim < 2 or array.shape[-1] < 2):
            raise InputError(
                f"{self.name(index)}: outputs of shape {tuple(array.shape)} aren't class logits, "
                "which have a row of two or more for each example: name the run's likelihood, "
                "bernoulli or gaussian, in its run.json"
            )
        return array if self.without is None else np.delete(array, self.without, axis=0)

    def _embedded(self, outputs: np.ndarray, targets: np.ndarray | None, name: str) -> Point:
        try:
            return embed(outputs, targets, likelihood=self.likelihood, sigma2=self.sigma2)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None


class RecordedPredictions(Predictions):
    """Predictions found in the run's snapshots (``probe/logits``)."""

    def __init__(self, run: Run, likelihood: str, sigma2: float = 1.0) -> None:
        self.run, self.likelihood, self.sigma2 = run, likelihood, sigma2
        self.steps = [s.step for s in run.snapshots]
        self.targets = targets_of(run.probe)

    def outputs(self, index: int) -> Tensor:
        """The outputs recorded in snapshot ``index``."""
        return self.run.snapshots[index].load("probe/logits")

    def name(self, index: int) -> str:
        """The snapshot's path."""
        return str(self.run.snapshots[index].path)


class ReplayedPredictions(Predictions):
    """Predictions made again from recorded weights: one evaluation-mode forward pass on the probe
    per snapshot."""

    def __init__(
        self, run: Run, model: nn.Module, probe: Probe, likelihood: str, sigma2: float = 1.0
    ) -> None:
        if probe.inputs is None:
            raise InputError(
                f"{run.path}: replay needs the probe's inputs: give a file of inputs with --probe"
            )
        self.run, self.model, self.likelihood, self.sigma2 = run, model, likelihood, sigma2
        self.steps = [s.step for s in run.snapshots]
        self.targets = targets_of(probe)
        dtypes = [weight.dtype for weight in model.parameters()]

        def fitting(tensor: Tensor) -> Tensor:
            """NumPy and pandas write float64 whatever the model computes in."""
            fits = not tensor.is_floating_point() or tensor.dtype in dtypes
            return tensor if fits else tensor.to(dtypes[0])

        self.inputs: Inputs = map_tensors(probe.inputs, fitting) if dtypes else probe.inputs

    def outputs(self, index: int) -> Tensor:
        """The model's outputs with the weights of snapshot ``index``."""
        install(self.model, self.run.snapshots[index], self.run.info.tied)
        return predict(self.model, self.inputs)


def targets_of(probe: Probe | None) -> np.ndarray | None:
    """The probe's targets as an array, or None."""
    return None if probe is None or probe.targets is None else array_of(probe.targets)


def array_of(tensor: Tensor) -> np.ndarray:
    """The tensor as an array; NumPy knows neither bfloat16 nor float8."""
    narrow = tensor.is_floating_point() and tensor.dtype != torch.float64
    return (tensor.float() if narrow else tensor).detach().cpu().numpy()


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
