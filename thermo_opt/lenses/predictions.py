"""Predictions of a run: as they were recorded, or replayed by putting recorded weights into the
model.

Nothing a run directory contains is executed: the architecture comes from the user
(``package.module:factory``), from this package's own demo models, or from the `transformers`
library by the class name in a checkpoint's config.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from thermo_opt import likelihoods
from thermo_opt.errors import InputError
from thermo_opt.manifold import Point, embed
from thermo_opt.models import load_factory, map_tensors, working_directory_last
from thermo_opt.runs import Probe, Run, adapters
from thermo_opt.runs.pretrained import pretrained
from thermo_opt.runs.probe import Inputs, attention_mask
from thermo_opt.runs.probing import install, predict, row_count
from thermo_opt.runs.readers.architecture import model_from_config

_BLOCK_BYTES = 1 << 25
"""Embedded predictions held at a time of one snapshot, where all of them would be more."""


class Predictions(ABC):
    """Where predictions come from: picklable, so that other processes can read their own segment.

    Attributes:
        steps: Step number of each snapshot.
        targets: The probe's targets, or None.
        likelihood: Family of the outputs.
        sigma2: Variance of Gaussian outputs.
        kind: What outputs of classes are, one of `thermo_opt.likelihoods.KINDS`; None: logits, and
            outputs that look like probabilities are refused.
        weights: Of the probe's examples or predictions, or None.
        without: Examples (of the first axis) to leave out, by position.
        only: Examples to keep, of those; None for all.
    """

    steps: Sequence[int]
    targets: np.ndarray | None
    likelihood: str
    sigma2: float
    kind: str | None = None
    weights: np.ndarray | None = None
    without: np.ndarray | None = None
    only: slice | None = None

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
        outputs = [self._array(index) for index in indices]
        if len({array.shape for array in outputs}) > 1:
            [self.points([index]) for index in indices]  # names the one that doesn't fit
        count, weights = len(outputs), self._weights(outputs[0].shape)
        targets, weights = (
            t if t is None or count == 1 else np.concatenate([t] * count)
            for t in (self.targets, weights)
        )
        array = outputs[0] if count == 1 else np.concatenate(outputs)
        try:
            for index, f in zip(indices, outputs, strict=True):
                if self.kind is None and index in (0, len(self.steps) - 1):
                    f = likelihoods.parameters_last(self.likelihood, f, self.targets)
                    likelihoods.refuse_probabilities(self.likelihood, f)
            return embed(
                array,
                targets,
                weights=weights,
                likelihood=self.likelihood,
                kind=self.kind or "logits",
                sigma2=self.sigma2,
            )
        except InputError as error:
            if count > 1:
                [self.points([index]) for index in indices]
            raise InputError(f"{self.name(indices[0])}: {error}") from None

    def point(self, index: int) -> Point:
        """The embedded predictions of snapshot ``index``."""
        return self.points([index])

    def known_floor(self, index: int) -> float | None:
        """The rounding floor that was recorded with a snapshot, if any (§4)."""
        return None

    def leaving_out(self, examples: np.ndarray) -> Predictions:
        """The same predictions without these examples of the probe."""
        other = copy.copy(self)
        other.without = examples
        if self.targets is not None:
            other.targets = np.delete(self.targets, examples, axis=0)
        if self.weights is not None:
            other.weights = np.delete(self.weights, examples, axis=0)
        return other

    def owners(self, index: int) -> np.ndarray:
        """The example (of the probe's first axis) that each row of a snapshot's `Point` is of."""
        shape = self.shape(index)
        kept = shape[0] - (0 if self.without is None else len(self.without))
        weights, targets = self._weights(shape), self.targets
        axis = self._class_axis(shape)
        leading: tuple[int, ...] = (kept,)  # a row is an example,
        if self.likelihood == "bernoulli":  # one of its labels,
            leading = (kept, *shape[1:])
        elif self.likelihood == "categorical":  # or one of its counted predictions
            leading = (kept, *np.delete(shape, axis)[1:].tolist())
        counted = np.ones(leading, dtype=bool)
        if self.likelihood == "categorical" and targets is not None:
            targets = likelihoods.soft_targets_last((*leading, shape[axis]), targets)
            ignored = targets == likelihoods.IGNORED
            counted &= ~(ignored if ignored.ndim == len(leading) else ignored[..., 0])
        if weights is not None:
            counted &= likelihoods.checked_weights(weights, leading) > 0
        return np.nonzero(counted)[0]

    def blocks(self, index: int) -> list[Predictions]:
        """The same predictions in blocks of examples small enough to be embedded side by side.

        Only where all at once would take much memory, as of a large vocabulary; sums over examples
        add up. One block, these predictions themselves, where they are small, weighted or soft.
        """
        shape = self.shape(index)
        size = 8 * int(np.prod(shape, dtype=np.int64))
        soft = self.targets is not None and self.targets.dtype.kind == "f"
        weighted = self._weights(shape) is not None
        if self.likelihood != "categorical" or size <= 2 * _BLOCK_BYTES or soft or weighted:
            return [self]
        kept = shape[0] - (0 if self.without is None else len(self.without))
        each = max(1, int(_BLOCK_BYTES // (size // shape[0])))
        parts = [slice(start, min(start + each, kept)) for start in range(0, kept, each)]
        return [self._rows(part) for part in parts if self._counts(part)]

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of the outputs of snapshot ``index``."""
        return tuple(self.outputs(index).shape)

    def _class_axis(self, shape: tuple[int, ...]) -> int:
        """The axis of the classes in outputs of this shape."""
        return likelihoods.class_axis(shape, None if self.targets is None else self.targets.shape)

    def _counts(self, part: slice) -> bool:
        """Whether any prediction of these examples counts."""
        return self.targets is None or bool((self.targets[part] != likelihoods.IGNORED).any())

    def _rows(self, part: slice) -> Predictions:
        other = copy.copy(self)
        other.only = part
        if self.targets is not None:
            other.targets = self.targets[part]
        return other

    def _weights(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """The weights of predictions with outputs of this shape."""
        return self.weights

    def _array(self, index: int) -> np.ndarray:
        outputs = self.outputs(index)
        if outputs.is_complex() or outputs.dtype == torch.bool:
            what = "complex numbers" if outputs.is_complex() else "true or false"
            raise InputError(
                f"{self.name(index)}: the outputs are {what}: record real logits or means"
            )
        array = array_of(outputs)
        try:
            if array.size:
                floats = array if array.dtype.kind == "f" else array.astype(np.float64)
                likelihoods.checked_outputs(self.likelihood, floats)
        except InputError as error:
            raise InputError(f"{self.name(index)}: {error}") from None
        return self._kept(array)

    def _kept(self, array: np.ndarray) -> np.ndarray:
        """Of one entry per example, those of the examples that are looked at."""
        array = array if self.without is None else np.delete(array, self.without, axis=0)
        return array if self.only is None else array[self.only]


class RecordedPredictions(Predictions):
    """Predictions found in the run's snapshots (``probe/logits``)."""

    def __init__(
        self, run: Run, likelihood: str, sigma2: float = 1.0, kind: str | None = None
    ) -> None:
        self.run, self.likelihood, self.sigma2, self.kind = run, likelihood, sigma2, kind
        self.steps = [s.step for s in run.snapshots]
        self.targets, self.weights = targets_of(run.probe), weights_of(run.probe)
        self.sketched = "probe/sketch" in run.snapshots[0].names()
        self._first_targets = self.targets if "probe/targets" in run.snapshots[0].names() else None

    def outputs(self, index: int) -> Tensor:
        """The outputs recorded in snapshot ``index``.

        Raises:
            InputError: Its targets aren't the first snapshot's, as when the rows were shuffled.
        """
        snapshot = self.run.snapshots[index]
        if self._first_targets is not None and index and "probe/targets" in snapshot.names():
            here = array_of(snapshot.load("probe/targets"))
            if not np.array_equal(here, self._first_targets, equal_nan=here.dtype.kind == "f"):
                raise InputError(
                    f"{snapshot.path}: the probe's targets aren't those of the first snapshot; "
                    "distances need the same examples in the same order: evaluate without shuffling"
                )
        return snapshot.load("probe/logits")

    def shape(self, index: int) -> tuple[int, ...]:
        """Shape of the outputs of snapshot ``index``."""
        name = "probe/sketch" if self.sketched else "probe/logits"
        return tuple(self.run.snapshots[index].shape(name))

    def _class_axis(self, shape: tuple[int, ...]) -> int:
        return -1 if self.sketched else super()._class_axis(shape)

    def name(self, index: int) -> str:
        """The snapshot's path."""
        return str(self.run.snapshots[index].path)

    def points(self, indices: Sequence[int]) -> Point:
        """The embedded predictions of these snapshots; see `Predictions.points`."""
        if not self.sketched:
            return super().points(indices)
        found = []
        for index in indices:
            snapshot = self.run.snapshots[index]
            names = ("probe/sketch", "probe/log_p_y")
            held = {name: snapshot.load(name) for name in names if name in snapshot.names()}
            found.append(self._sketch_point(held))
        if len(found) == 1:
            return found[0]
        return joined_points(found)

    def known_floor(self, index: int) -> float | None:
        """The rounding floor recorded with a sketch."""
        snapshot = self.run.snapshots[index]
        if "probe/floor" not in snapshot.names():
            return None
        return float(snapshot.load("probe/floor"))

    def recorded_point(self, tensors: Mapping[str, Tensor], name: str) -> Point:
        """Predictions by the names of a snapshot's tensors, embedded as the run's own are."""
        if self.sketched:
            return self._sketch_point(tensors)
        try:
            return embed(
                array_of(tensors["probe/logits"]),
                self.targets,
                weights=self.weights,
                likelihood=self.likelihood,
                kind=self.kind or "logits",
                sigma2=self.sigma2,
            )
        except (InputError, KeyError) as error:
            raise InputError(f"{name}: {error}") from None

    def _sketch_point(self, tensors: Mapping[str, Tensor]) -> Point:
        sketch = self._kept(array_of(tensors["probe/sketch"])).astype(np.float64)
        leading = sketch.shape[:-1]
        rows = sketch.reshape(-1, sketch.shape[-1])
        counted = np.ones(len(rows), dtype=bool)
        if self.targets is not None:
            counted &= (self.targets != likelihoods.IGNORED).reshape(-1)
        weights = None
        if self.weights is not None:
            weights = likelihoods.checked_weights(self.weights, leading).reshape(-1)
            counted &= weights > 0
            weights = weights[counted] / weights[counted].mean()
        rows, log_y = rows[counted], None
        if "probe/log_p_y" in tensors:
            log_p = self._kept(array_of(tensors["probe/log_p_y"])).astype(np.float64)
            log_p = log_p.reshape(-1)[counted]
            log_y = np.minimum(0.5 * log_p, 0.0)
        return Point(
            rows,
            len(rows),
            log_y,
            loss=None if log_y is None else -2 * log_y,
            finite=bool(np.isfinite(rows).all()),
            weights=weights,
            sketched=True,
        )


class ReplayedPredictions(Predictions):
    """Predictions made again from recorded weights: one evaluation-mode forward pass on the probe
    per snapshot."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        probe: Probe,
        likelihood: str,
        sigma2: float = 1.0,
        kind: str | None = None,
    ) -> None:
        if probe.inputs is None:
            raise InputError(
                f"{run.path}: replay needs the probe's inputs: give a file of inputs with --probe"
            )
        self.run, self.model = run, model
        self.likelihood, self.sigma2, self.kind = likelihood, sigma2, kind
        self.steps = [s.step for s in run.snapshots]
        self.targets, self.weights = targets_of(probe), weights_of(probe)
        self._padding = None if self.weights is not None else _padding_of(probe)
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

    def several(self) -> list[str]:
        """A note where the model returns a tuple with more than one tensor of a row per example,
        of which the first is taken. Cost: one forward pass of seven examples (seldom a number of
        layers, which a recurrent state's first axis counts)."""
        rows = min(row_count(self.inputs), 7)
        returned: list[Any] = []
        handle = self.model.register_forward_hook(lambda _m, _a, result: returned.append(result))
        try:
            predict(self.model, map_tensors(self.inputs, lambda tensor: tensor[:rows]))
        finally:
            handle.remove()
        result = returned[-1] if returned else None
        parts = result if isinstance(result, tuple | list) else ()
        shapes = [
            tuple(part.shape[1:])
            for part in parts
            if isinstance(part, Tensor) and part.is_floating_point() and part.shape[:1] == (rows,)
        ]
        if len(shapes) < 2:
            return []
        return [
            f"the model returns {len(shapes)} tensors of a row per example, of shapes "
            f"{', '.join(map(str, shapes))}: the first is taken for its predictions (return "
            "another first, or alone, if that is meant)"
        ]

    def _weights(self, shape: tuple[int, ...]) -> np.ndarray | None:
        """The probe's, or its attention mask where there is a prediction per token."""
        mask = self._padding
        if mask is None or mask.shape[1:] != shape[1:-1]:
            return self.weights
        fits = self.targets is None or self.targets.shape[1:] == mask.shape[1:]
        kept = mask if self.without is None else np.delete(mask, self.without, axis=0)
        return kept if fits else None


def joined_points(points: Sequence[Point]) -> Point:
    """Points of the same kind, one's rows after another's."""
    per_row = [
        f.name
        for f in fields(points[0])
        if all(
            isinstance(value := getattr(p, f.name), np.ndarray) and len(value) == len(p.w)
            for p in points
        )
    ]
    return replace(
        points[0],
        examples=sum(p.examples for p in points),
        finite=all(p.finite for p in points),
        **{name: np.concatenate([getattr(p, name) for p in points]) for name in per_row},
    )


def weights_of(probe: Probe | None) -> np.ndarray | None:
    """The probe's weights as an array, or None."""
    return None if probe is None or probe.weights is None else array_of(probe.weights)


def _padding_of(probe: Probe) -> np.ndarray | None:
    """Where an attention mask among the inputs says that there is no padding, if it says so."""
    mask = attention_mask(probe)
    if mask is None or mask.ndim != 2 or bool((mask != 0).all()):
        return None
    return array_of(mask != 0).astype(np.float64)


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

    ``spec``: a module, ``package.module:factory`` naming a callable that takes nothing and returns
    one, or the folder of a Hugging Face model; of a run that holds an adapter alone, the base or
    PEFT's whole model. Without it, a factory of this package named in the record, or the
    `transformers` class named in ``config.json``, is used; any other name found in a run directory
    is not imported. Raises InputError saying what is missing.
    """
    adapter = run.info.adapter_path
    if spec is not None:
        model = _given(spec)
        shapes = {
            name.removeprefix("params/"): shape
            for name, shape in run.snapshots[0].layout.items()
            if name.startswith("params/")
        }
        return model if adapter is None else adapters.adapted(model, adapter, shapes)
    if adapter is not None:
        name = adapters.base_name(adapter)
        said = f" (its config calls it {name[:80]!r})" if name else ""
        raise InputError(
            f"{run.path}: its checkpoints hold an adapter alone: give the base model{said}, as "
            "--model FOLDER or --model package.module:factory"
        )
    recorded = run.info.model
    if recorded is not None and recorded.startswith("thermo_opt.demo_models:"):
        return _call_factory(recorded)
    if run.info.hf_config_path is not None:
        return model_from_config(run.info.hf_config_path)
    hint = f"; the record names {recorded}, which is only imported on request" if recorded else ""
    raise InputError(f"{run.path}: the model is unknown{hint}: pass --model package.module:factory")


def _given(spec: str | nn.Module) -> nn.Module:
    """The model that the user gave: a module, the folder of a Hugging Face model, or a factory."""
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)  # the caller's own keeps its weights
    return pretrained(Path(spec)) if Path(spec).is_dir() else _call_factory(spec)


def _call_factory(spec: str) -> nn.Module:
    factory = load_factory(spec, "--model")
    try:
        with working_directory_last():
            model = factory() if not isinstance(factory, nn.Module) else factory
    except (Exception, SystemExit) as error:
        raise InputError(
            f"--model {spec!r} failed when called without arguments ({type(error).__name__}: "
            f"{error})"
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"--model {spec!r} returned {type(model).__name__}, not a torch.nn.Module")
    return model
